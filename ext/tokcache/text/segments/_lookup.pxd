# The state of one look-up: the cached ids of a text, and the segments that are missing.
#
# 1. Up to the first missing chunk, the places of the cached chunks are noted in `run`.
# 2. A missing chunk copies them, since its segments may evict chunks, and is listed in `missed`.
#    From then on the ids of the text are a list of `ops`: so many of the `known` ids, or those of
#    one `pending` segment.
# 3. The engine gets the pending segments joined into few texts: `pick` chooses them, `take_ids`
#    assigns the engine's answer to them.
# 4. When none is left, `write_ids` puts together the ids of a chunk, or of the text.
#
# It uses no Python objects and takes no lock. A function that returns False or NULL had no memory;
# the look-up is then of no use but to be released.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from tokcache.text._evictions cimport N_WHY
from tokcache.text.segments._chunks cimport Link
from tokcache.text.segments._id_lengths cimport Lengths, PointSet, covers, encoded_bytes, length_of
from tokcache.text.segments._scan cimport (
    N_CLASSES, NEWLINE, Plan, Text, class_behind, class_of, unit_at,
)

cdef enum:
    CACHED = 0xFFFFFFFF    # in an Op: the next cached ids
    LAST = 0               # after a pending segment in a joined text: the end
    APART = 1              # a separator
    SEAMLESS = 2           # the next segment
    FITS = 0               # outcomes of `take_ids`
    DIFFERS = 1            # the ids do not fit the segments
    UNTOLD = 2             # the length of an id is unknown

ctypedef struct Op:        # ids to append to the answer
    uint32_t pending       # those of this pending segment, or CACHED
    uint32_t n             # number of cached ids

ctypedef struct Pending:   # a segment, short or long, that the engine must encode
    size_t start
    size_t stop
    uint32_t variant
    const int32_t* ids     # within the engine's answer
    uint32_t n_ids
    bint is_encoded
    bint is_short          # it has an entry in the table of segments
    bint may_grow          # a long segment that follows may be merged into it
    uint32_t n_bytes       # in UTF-8, with the space before it; 0: id lengths are unknown
    uint32_t after         # LAST, APART or SEAMLESS

ctypedef struct Missed:    # a chunk that was not in the table
    uint64_t digest
    size_t start
    size_t stop
    uint32_t first_op
    uint32_t stop_op
    uint32_t first_known
    uint32_t variant
    uint32_t end_class
    Link before            # to the chunk before it, if that one was in the table
    Link after

ctypedef struct Lookup:
    Text text
    uint64_t scope
    bint keeps             # the scope was not cleared between the call and the look-up
    int32_t serial
    uint64_t epoch         # of the store; links of another epoch are not valid
    uint32_t* run          # the chunks found before the first missing one
    size_t n_run
    size_t run_capacity
    size_t n_run_ids
    int32_t* known
    size_t n_known
    size_t known_capacity
    Op* ops
    size_t n_ops
    size_t op_capacity
    size_t barrier         # ops before it belong to other chunks
    Pending* pending
    size_t n_pending
    size_t pending_capacity
    uint32_t* picked       # the pending segments in the texts for the engine
    size_t n_picked
    size_t pick_capacity
    Missed* missed
    size_t n_missed
    size_t missed_capacity
    uint64_t n_chunk_hits
    uint64_t n_miss_units  # of missing chunks
    uint64_t n_segment_hits
    uint64_t n_segment_misses
    # Set at the first missing chunk; they are read only if there is one.
    uint64_t[N_WHY] chunk_misses_by_reason
    uint64_t[N_WHY] segment_misses_by_reason


# ---- begin and end

cdef inline void begin_lookup(Lookup* l, Text text, uint64_t scope, int32_t serial) noexcept nogil:
    """Begin the look-up of another text with the arrays of the one before."""
    l.text = text
    l.scope = scope
    l.serial = serial
    l.n_run = l.n_run_ids = l.n_known = l.n_ops = l.n_pending = l.n_missed = l.barrier = 0
    l.n_picked = 0
    l.n_chunk_hits = l.n_miss_units = l.n_segment_hits = l.n_segment_misses = 0

cdef inline void release_lookup(Lookup* l) noexcept nogil:
    free(l.run)
    free(l.known)
    free(l.ops)
    free(l.pending)
    free(l.picked)
    free(l.missed)

cdef inline size_t lookup_bytes(const Lookup* l) noexcept nogil:
    """Return the bytes of the arrays."""
    return (
        l.run_capacity * sizeof(uint32_t) + l.op_capacity * sizeof(Op)
        + l.known_capacity * sizeof(int32_t) + l.pending_capacity * sizeof(Pending)
        + l.missed_capacity * sizeof(Missed) + l.pick_capacity * sizeof(uint32_t)
    )

cdef inline bint grow(
    void** data, size_t* capacity, size_t n, size_t least, size_t n_item_bytes
) noexcept nogil:
    """Double an array of `capacity` items, to at least `n` and at least `least`."""
    cdef size_t more = max(2 * capacity[0], n, least)
    cdef void* grown = realloc(data[0], more * n_item_bytes)
    if grown == NULL:
        return False
    data[0] = grown
    capacity[0] = more
    return True


# ---- cached and missing ids, in the order of the text

cdef inline bint push_run(Lookup* l, uint32_t place, size_t n_ids) noexcept nogil:
    """Append the ids of the cached chunk at `place`, while no chunk is missing yet."""
    if l.n_run == l.run_capacity and not grow(
        <void**> &l.run, &l.run_capacity, 0, 64, sizeof(uint32_t)
    ):
        return False
    l.run[l.n_run] = place
    l.n_run += 1
    l.n_run_ids += n_ids
    return True

cdef inline bint push_op(Lookup* l, uint32_t pending, uint32_t n) noexcept nogil:
    if l.n_ops == l.op_capacity and not grow(
        <void**> &l.ops, &l.op_capacity, 0, 64, sizeof(Op)
    ):
        return False
    l.ops[l.n_ops].pending = pending
    l.ops[l.n_ops].n = n
    l.n_ops += 1
    return True

cdef inline bint push_known(Lookup* l, const int32_t* ids, size_t n) noexcept nogil:
    """Append a copy of cached ids."""
    if l.n_known + n > l.known_capacity and not grow(
        <void**> &l.known, &l.known_capacity, l.n_known + n, 1024, sizeof(int32_t)
    ):
        return False
    if n:
        memcpy(l.known + l.n_known, ids, n * sizeof(int32_t))
    l.n_known += n
    if l.n_ops > l.barrier and l.ops[l.n_ops - 1].pending == CACHED:
        l.ops[l.n_ops - 1].n += <uint32_t> n
        return True
    return push_op(l, CACHED, <uint32_t> n)

cdef inline bint push_pending(
    Lookup* l, size_t start, size_t stop, uint32_t variant, bint is_short
) noexcept nogil:
    """Append the ids of a segment that the engine must encode."""
    cdef Pending* one
    if l.n_pending == l.pending_capacity and not grow(
        <void**> &l.pending, &l.pending_capacity, 0, 64, sizeof(Pending)
    ):
        return False
    one = &l.pending[l.n_pending]
    one.start = start
    one.stop = stop
    one.variant = variant
    one.is_encoded = False
    one.is_short = is_short
    one.may_grow = False
    l.n_pending += 1
    return push_op(l, <uint32_t> (l.n_pending - 1), 0)

cdef inline bint push_long(
    Lookup* l, size_t start, size_t stop, uint32_t variant
) noexcept nogil:
    """Append a segment too long for the table of segments, or merge it into the last one.

    Merging saves separators; it costs little, because few long segments repeat within a text.
    """
    cdef Pending* one
    if l.n_ops > l.barrier and l.n_pending and l.ops[l.n_ops - 1].pending == l.n_pending - 1:
        one = &l.pending[l.n_pending - 1]
        if one.may_grow and one.stop == start:
            one.stop = stop
            return True
    if not push_pending(l, start, stop, variant, False):
        return False
    l.pending[l.n_pending - 1].may_grow = True
    return True

cdef inline Missed* push_missed(Lookup* l) noexcept nogil:
    """Begin a missing chunk, whose ids are the ops from here on; return its record or NULL."""
    if l.n_missed == l.missed_capacity and not grow(
        <void**> &l.missed, &l.missed_capacity, 0, 16, sizeof(Missed)
    ):
        return NULL
    l.n_missed += 1
    l.barrier = l.n_ops
    l.missed[l.n_missed - 1].first_op = <uint32_t> l.n_ops
    l.missed[l.n_missed - 1].first_known = <uint32_t> l.n_known
    return &l.missed[l.n_missed - 1]

cdef inline void end_missed(Lookup* l) noexcept nogil:
    """End the missing chunk that was begun last."""
    cdef Missed* missed = &l.missed[l.n_missed - 1]
    missed.stop_op = <uint32_t> l.n_ops
    l.barrier = l.n_ops
    l.n_miss_units += missed.stop - missed.start

cdef inline size_t count_ids(const Lookup* l, size_t first_op, size_t stop_op) noexcept nogil:
    cdef size_t i, n = 0
    for i in range(first_op, stop_op):
        if l.ops[i].pending == CACHED:
            n += l.ops[i].n
        else:
            n += l.pending[l.ops[i].pending].n_ids
    return n

cdef inline void write_ids(
    const Lookup* l, int32_t* into, size_t first_op, size_t stop_op, size_t first_known
) noexcept nogil:
    cdef const int32_t* known = l.known + first_known
    cdef const Pending* one
    cdef size_t i
    for i in range(first_op, stop_op):
        if l.ops[i].pending == CACHED:
            memcpy(into, known, l.ops[i].n * sizeof(int32_t))
            known += l.ops[i].n
            into += l.ops[i].n
        else:
            one = &l.pending[l.ops[i].pending]
            memcpy(into, one.ids, one.n_ids * sizeof(int32_t))
            into += one.n_ids


# ---- texts for the engine

cdef inline bint is_seam(
    const Plan* plan, const Lookup* l, const Pending* before, const Pending* one, uint32_t variant,
    bint has_space,
) noexcept nogil:
    """Return whether two segments need no separator in a joined text.

    They need none if they are adjacent in the text, or if a text may be cut between two such
    characters and no added token contains them side by side.
    """
    cdef uint32_t left, unit = unit_at(&l.text, before.stop - 1)
    if not before.n_bytes or not one.n_bytes or variant != plan.variant_of[2]:
        return False
    if before.stop == one.start and not has_space:
        return True
    left = class_of(plan, unit)
    if left == NEWLINE:
        if before.stop - before.start == 1:
            return False  # its class depends on a character before the segment
        left = class_behind(plan, unit, class_of(plan, unit_at(&l.text, before.stop - 2)))
    unit = 0x20 if has_space else unit_at(&l.text, one.start)
    return plan.seams[left * N_CLASSES + class_behind(plan, unit, left)]

cdef inline bint pick(
    Lookup* l, const Plan* plan, uint32_t variant, int space_variant, bint has_lengths,
    const PointSet* exact, const PointSet* agreed, size_t max_units, size_t max_apart,
) noexcept nogil:
    """Choose the pending segments of `variant`, and set `after` for each in a joined text.

    Those of `space_variant` (-1: none) are chosen, too, for a text with a space before each. A text
    ends at a segment with the mark LAST: it has at most `max_units` units, or one segment, and at
    most `max_apart` separators. With `agreed`, only segments of these code points and of at most
    `max_units` are chosen. `exact` is as in `encoded_bytes`, used if `has_lengths`.
    """
    cdef size_t i, n, n_units = 0, n_apart = 0
    cdef Pending* one
    cdef Pending* before = NULL
    cdef bint has_space
    l.n_picked = 0
    for i in range(l.n_pending):
        one = &l.pending[i]
        has_space = <int> one.variant == space_variant
        if one.is_encoded or (one.variant != variant and not has_space):
            continue
        n = one.stop - one.start
        if agreed != NULL and (
            n > max_units or not covers(agreed, &l.text, one.start, one.stop)
        ):
            continue
        one.n_bytes = 0
        if has_lengths:
            one.n_bytes = encoded_bytes(&l.text, one.start, one.stop, exact)
            if one.n_bytes and has_space:
                one.n_bytes += 1
        if before != NULL:
            before.after = SEAMLESS
            if not is_seam(plan, l, before, one, variant, has_space):
                before.after = APART
                n_apart += 1
            if n_units + n > max_units or n_apart > max_apart:
                before.after = LAST
                n_units = n_apart = 0
        n_units += n
        one.after = LAST
        before = one
        if l.n_picked == l.pick_capacity and not grow(
            <void**> &l.picked, &l.pick_capacity, 0, 64, sizeof(uint32_t)
        ):
            return False
        l.picked[l.n_picked] = <uint32_t> i
        l.n_picked += 1
    return True

cdef inline int take_ids(
    Lookup* l, size_t* at, const int32_t* ids, size_t n, int32_t separator, const Lengths* lengths
) noexcept nogil:
    """Assign the ids of one joined text to the picked segments from `at` on, and move `at`."""
    cdef size_t start, i = 0, left, size
    cdef bint is_seamless = False
    cdef Pending* one
    while at[0] < l.n_picked:
        one = &l.pending[l.picked[at[0]]]
        start = i
        if is_seamless or one.after == SEAMLESS:
            left = one.n_bytes
            while left:
                if i == n:
                    return DIFFERS
                size = length_of(lengths, ids[i])
                if size == 0:
                    return UNTOLD
                if size > left:
                    return DIFFERS
                left -= size
                i += 1
        else:
            while i < n and ids[i] != separator:
                i += 1
        one.ids = ids + start
        one.n_ids = <uint32_t> (i - start)
        at[0] += 1
        is_seamless = one.after == SEAMLESS
        if one.after == LAST:
            return FITS if i == n else DIFFERS
        if one.after == APART:
            if i == n or ids[i] != separator:
                return DIFFERS
            i += 1
    return DIFFERS
