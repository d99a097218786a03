# Known beginnings of texts: the chunks that a text began with, as one run of text and one of ids.
#
# 1. A text whose chunks were all cached leaves them here in one piece, since it has come before and
#    may come again. The next text that begins alike is compared once, and its ids are one copy,
#    however many chunks they are. A text that is new at its end leaves nothing: in growing chats
#    the copies, one a chat of what all share, cost as much as they save.
# 2. A mark is a length in units, four in each power of two. `marks` names, for a mark and the
#    MARK_BYTES before it, the beginning that had them last. A look-up tries the longest mark of its
#    text first, so a text that is new at its end finds the beginning that it shares with another.
# 3. An equal mark is only a candidate: scope, kind and all units up to the mark are compared. So
#    nothing is trusted to a digest, and equal digests cost a compare, never a wrong answer.
# 4. A text that goes on where a beginning ends extends it.
# 5. Ids are in a Block, which the look-ups that use it hold: an eviction frees it after them.
#
# Two chunks are neighbours here only where an earlier text had them side by side, and both are
# compared in full. So the cut between them is proven as by a link (see `_chunks`).
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from tokcache.text._digest cimport fold, middle_digest
from tokcache.text.segments._chunks cimport Link
from tokcache.text.segments._scan cimport Text

cdef extern from *:
    int count_leading_zeros "__builtin_clzll" (unsigned long long bits) noexcept nogil

cdef enum:
    NO_BEGINNING = 0xFFFFFFFF
    LEAST_UNITS = 2048     # a shorter beginning saves too little
    LEAST_SHARE = 1 << 16  # bytes; a smaller share has room for too few
    MARK_BYTES = 64
    MIN_MARKS = 1 << 10    # slots of the table of marks
    MAX_MARKS = 1 << 18
    BYTES_A_MARK = 2048    # of the beginnings' share of the budget
    MIN_BEGINNINGS = 16
    COMPARED_BYTES = 4096  # compared at once

ctypedef struct Block:     # the ids follow
    uint32_t n_holders     # the beginning and the look-ups that use it
    uint32_t capacity      # ids

ctypedef struct Stop:      # the end of one chunk of a beginning
    uint32_t end           # units from the start of the text
    uint32_t n_ids         # ids up to here
    Link chunk
    uint8_t end_class
    uint8_t is_tail        # the chunk was only seen at the end of a text

ctypedef struct Beginning:
    uint8_t* text
    Block* block
    Stop* stops
    uint64_t scope
    uint32_t n_units
    uint32_t n_stops
    uint32_t text_capacity  # units
    uint32_t stop_capacity
    uint32_t kind          # bytes per unit
    uint32_t tick
    uint32_t touched       # the clock when its chunks were last marked as used

ctypedef struct Mark:
    uint32_t check         # high half of the digest
    uint32_t place         # of the beginning

ctypedef struct Beginnings:
    Beginning* all
    Mark* marks
    uint32_t n
    uint32_t capacity
    uint32_t n_marks       # a power of two, or 0 before the first beginning
    uint64_t item_bytes    # of texts, blocks and stops


# ---- blocks

cdef inline int32_t* block_ids(Block* block) noexcept nogil:
    return <int32_t*> (block + 1)

cdef inline Block* hold(Block* block) noexcept nogil:
    block.n_holders += 1
    return block

cdef inline void release_block(Block* block) noexcept nogil:
    if block != NULL:
        block.n_holders -= 1
        if block.n_holders == 0:
            free(block)

cdef inline Block* new_block(uint32_t capacity) noexcept nogil:
    cdef Block* block = <Block*> malloc(sizeof(Block) + capacity * sizeof(int32_t))
    if block != NULL:
        block.n_holders = 1
        block.capacity = capacity
    return block


# ---- bytes

cdef inline uint64_t beginning_bytes(
    uint64_t text_capacity, uint64_t kind, uint64_t n_ids, uint64_t stop_capacity
) noexcept nogil:
    """Return the bytes of three allocations."""
    return (
        text_capacity * kind + sizeof(Block) + n_ids * sizeof(int32_t)
        + stop_capacity * sizeof(Stop) + 3 * 16
    )

cdef inline uint64_t bytes_of(const Beginning* one) noexcept nogil:
    return beginning_bytes(one.text_capacity, one.kind, one.block.capacity, one.stop_capacity)

cdef inline uint64_t beginnings_bytes(const Beginnings* b) noexcept nogil:
    return (
        b.item_bytes + <uint64_t> b.capacity * sizeof(Beginning)
        + <uint64_t> b.n_marks * sizeof(Mark)
    )


# ---- marks

cdef inline uint64_t mark_below(uint64_t n_units) noexcept nogil:
    """Return the greatest mark of at most `n_units`, which are LEAST_UNITS or more."""
    cdef int shift = 61 - count_leading_zeros(n_units)
    return n_units >> shift << shift

cdef inline uint64_t mark_digest(
    const uint8_t* text, uint32_t kind, uint64_t scope, uint64_t mark, const uint64_t* secret
) noexcept nogil:
    return middle_digest(
        text + mark * kind - MARK_BYTES, MARK_BYTES,
        fold(scope ^ secret[46], mark << 3 ^ kind ^ secret[47]), secret,
    )

cdef inline void set_marks(
    Beginnings* b, uint32_t place, uint64_t above, const uint64_t* secret
) noexcept nogil:
    """Have the marks of a beginning, those longer than `above`, name it."""
    cdef const Beginning* one = &b.all[place]
    cdef uint64_t digest, mark = mark_below(one.n_units)
    cdef Mark* slot
    while mark > above and mark >= LEAST_UNITS:
        digest = mark_digest(one.text, one.kind, one.scope, mark, secret)
        slot = &b.marks[digest & (b.n_marks - 1)]
        slot.check = <uint32_t> (digest >> 32)
        slot.place = place
        mark = mark_below(mark - 1)


# ---- look-up

cdef inline size_t n_equal_bytes(const uint8_t* a, const uint8_t* b, size_t n) noexcept nogil:
    """Return how many bytes two runs of `n` bytes have in common at their start."""
    cdef size_t i = 0, step = COMPARED_BYTES
    while step:
        while i + step <= n and memcmp(a + i, b + i, step) == 0:
            i += step
        step >>= 3
    return i

cdef inline Beginning* find_beginning(
    const Beginnings* b, const Text* t, uint64_t scope, const uint64_t* secret, size_t* n_equal
) noexcept nogil:
    """Return a beginning that this text shares at least up to a mark, or NULL.

    `n_equal` is set to the number of units that they have in common.
    """
    cdef uint64_t digest, mark
    cdef const Mark* slot
    cdef Beginning* one
    if b.n == 0 or t.n_units < LEAST_UNITS:
        return NULL
    mark = mark_below(t.n_units)
    while mark >= LEAST_UNITS:
        digest = mark_digest(t.data, t.kind, scope, mark, secret)
        slot = &b.marks[digest & (b.n_marks - 1)]
        if slot.check == <uint32_t> (digest >> 32) and slot.place < b.n:
            one = &b.all[slot.place]
            if one.scope == scope and one.kind == t.kind and one.n_units >= mark:
                n_equal[0] = n_equal_bytes(
                    one.text, t.data, min(<size_t> one.n_units, t.n_units) * t.kind
                ) // t.kind
                if n_equal[0] >= mark:
                    return one
        mark = mark_below(mark - 1)
    return NULL

cdef inline uint32_t n_stops_within(const Beginning* one, size_t n_units) noexcept nogil:
    """Return how many chunks of a beginning end within its first `n_units`."""
    cdef uint32_t low = 0, high = one.n_stops, middle
    if one.stops[high - 1].end <= n_units:  # most texts share all chunks
        return high
    while low < high:
        middle = (low + high) // 2
        if one.stops[middle].end <= n_units:
            low = middle + 1
        else:
            high = middle
    return low


# ---- removal and growth

cdef inline void release_beginning(Beginning* one) noexcept nogil:
    free(one.text)
    free(one.stops)
    release_block(one.block)

cdef inline void remove_beginning(
    Beginnings* b, uint32_t place, const uint64_t* secret
) noexcept nogil:
    """Remove one; the last one takes its place. Marks that named either are found stale."""
    b.item_bytes -= bytes_of(&b.all[place])
    release_beginning(&b.all[place])
    b.n -= 1
    if place != b.n:
        b.all[place] = b.all[b.n]
        set_marks(b, place, 0, secret)

cdef inline void release_beginnings(Beginnings* b) noexcept nogil:
    cdef uint32_t i
    for i in range(b.n):
        release_beginning(&b.all[i])
    free(b.all)
    free(b.marks)
    memset(b, 0, sizeof(Beginnings))

cdef inline uint32_t oldest_beginning(
    const Beginnings* b, uint64_t* rng, uint32_t clock, uint32_t n_draws, uint32_t spared
) noexcept nogil:
    """Return the least recently used of `n_draws` random beginnings, never `spared`.

    There are at least two, or one that is not spared.
    """
    cdef uint32_t i, drawn, oldest = NO_BEGINNING, age, greatest = 0
    for i in range(n_draws):
        rng[0] += <uint64_t> 0xA0761D6478BD642F  # wyrand (Wang Yi): a counter, folded
        drawn = <uint32_t> (
            (<uint64_t> <uint32_t> fold(rng[0], rng[0] ^ <uint64_t> 0xE7037ED1A0B428DB) * b.n) >> 32
        )
        drawn = i % b.n if b.n <= n_draws else drawn
        age = clock - b.all[drawn].tick
        if drawn != spared and (oldest == NO_BEGINNING or age > greatest):
            oldest, greatest = drawn, age
    if oldest == NO_BEGINNING:  # every draw was the spared one
        oldest = 1 if spared == 0 else 0
    return oldest

cdef inline uint32_t wanted_marks(uint64_t share) noexcept nogil:
    """Return the number of slots for marks within a share of the budget."""
    cdef uint32_t n = MIN_MARKS
    while n < MAX_MARKS and <uint64_t> n * BYTES_A_MARK < share:
        n *= 2
    return n

cdef inline bint reserve_beginning(Beginnings* b, uint64_t share) noexcept nogil:
    """Make room in the arrays for one more; return False without memory."""
    cdef uint32_t capacity = 2 * b.capacity if b.capacity else MIN_BEGINNINGS
    cdef void* grown
    if b.n_marks == 0:
        b.marks = <Mark*> calloc(wanted_marks(share), sizeof(Mark))
        if b.marks == NULL:
            return False
        b.n_marks = wanted_marks(share)
    if b.n == b.capacity:
        grown = realloc(b.all, capacity * sizeof(Beginning))
        if grown == NULL:
            return False
        b.all = <Beginning*> grown
        b.capacity = capacity
    return True
