# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""SegmentCache: the token ids of chunks and segments, found by content in any text."""

cimport cython
from cpython.buffer cimport PyBuffer_IsContiguous
from cpython.memoryview cimport PyMemoryView_FromObject, PyMemoryView_GET_BUFFER
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

from operator import itemgetter
from os import urandom

from tokcache.stats import L1Stats

from tokcache.text._digest cimport N_SECRETS, fold, full_digest, read64
from tokcache.text._places cimport fill_pairs, has_vectors, places_of
from tokcache.text.segments._scan cimport (
    AS_TEXT, FOUND, IN_PIECE, LETTER, LSTRIP, N_CLASSES, NEWLINE, NEWLINE_RUN, OPENS, OTHER,
    RSTRIP, SINGLE_WORD, SKIPS, TOKEN_END, UNSURE, Match, Node, Plan, Text, Token, child_slot,
    bits_of, class_after, class_behind, class_of, has_surrogate, is_surrogate, match_at, may_start,
    next_start, unit_at,
)
from tokcache.text.segments._segments cimport (
    NO_CHUNK, N_FORKS, PENDING, SHORT_BYTES, SHORT_IDS, WAYS, MIN_SETS, Chunk, Chunks, Fork, Link,
    Short, Shorts, add_chunk, chunk_item_bytes, chunks_bytes, find_behind, find_chunk, find_short,
    fork_at, grow_chunks, is_chunk, key_of, link_to, narrow, no_link, oldest_chunk, place_of,
    place_short, put_behind, release_chunks, release_shorts, remove_chunk, shorts_bytes, width_of,
)
from tokcache.text._token_ids cimport TokenIds, ids_data, new_owner, owner_data

cdef extern from "Python.h":
    int PyUnicode_READY(object o) except -1
    void* PyUnicode_DATA(object o)
    int PyUnicode_KIND(object o)
    Py_ssize_t PyUnicode_GET_LENGTH(object o)
    object PyUnicode_New(Py_ssize_t size, uint32_t max_char)
    object PyUnicode_FromKindAndData(int kind, const void* data, Py_ssize_t size)
    Py_ssize_t PyUnicode_CopyCharacters(
        object to, Py_ssize_t to_start, object source, Py_ssize_t start, Py_ssize_t n
    ) except -1

cdef extern from *:
    int count_zeros "__builtin_ctzll" (unsigned long long bits) noexcept nogil
    int count_leading_zeros "__builtin_clzll" (unsigned long long bits) noexcept nogil

cdef enum:
    MIN_UNITS = 128        # minimum chunk length, except at the start of a message
    MAX_UNITS = 1024       # maximum chunk length, if the text has a coarse cut before
    OPENING_UNITS = 96     # minimum length of a chunk that ends at the start of a message
    GAP_UNITS = 64         # maximum weight of a cut
    CHOSEN = 1 << 23       # a cut with a lower rank ends a chunk: about one in 512 units
    WINDOW = 16            # units before a cut that its rank depends on
    N_SEEDS = 6            # 64-bit words of the secret for ranks
    LOOK_UNITS = 512       # units searched for an added token at a time
    STORED_UNITS = 1 << 16  # a longer chunk, in which no cut was found, is not stored
    SPARE_BYTES = 1 << 17  # a Walk with larger arrays is not reused for the next text
    N_DRAWS = 8
    MAX_CLEARED = 1024     # scopes whose last clear is remembered individually
    SHORT_SHARE = 4        # short segments may take 1 / SHORT_SHARE of the budget
    NO_UNIT = 0xFFFFFFFF
    UNTOLD = 0xFFFFFFFF    # returned instead of a position: the length of an id is unknown
    NO_ROOM = 0            # outcomes of `fill_chunk` and `fill_short`
    KEPT = 1
    THERE = 2
    LAST = 0               # after a unit in a joined text: the end
    APART = 1              # a separator
    SEAMLESS = 2           # the next unit
    LONGEST = 0xFE         # maximum id length that the table holds, in bytes


cdef bint uses_vectors = has_vectors()


def use_vectors(bint wanted):
    """Switch AVX2 on, if the CPU has it, or off; return whether it is used. For tests."""
    global uses_vectors
    uses_vectors = wanted and has_vectors()
    return uses_vectors


ctypedef struct Op:       # ids to append to the answer
    uint32_t unit         # those of this unit, or NO_UNIT: the next cached ids
    uint32_t n            # number of cached ids

ctypedef struct Unit:     # a segment that the engine must encode
    size_t start
    size_t stop
    uint32_t variant
    const int32_t* ids    # within the engine's answer
    uint32_t n
    bint is_made
    bint is_short
    bint may_grow         # a long segment that follows may be merged into it
    uint32_t n_bytes      # in UTF-8, with the space before it; 0: id lengths are unknown
    uint32_t behind       # LAST, APART or SEAMLESS: what follows in the joined text

ctypedef struct Missed:   # a chunk that was not in the table
    uint64_t digest
    size_t start
    size_t stop
    uint32_t first_op
    uint32_t stop_op
    uint32_t first_known
    uint32_t variant
    uint32_t end_class
    Link before           # to the chunk before it, if that one was in the table
    Link behind


ctypedef struct Ints:
    int32_t* data
    size_t n
    size_t capacity


cdef int push_ints(Ints* v, const int32_t* ids, size_t n) except -1:
    cdef size_t capacity
    if v.n + n > v.capacity:
        capacity = max(2 * v.capacity, v.n + n, <size_t> 1024)
        v.data = <int32_t*> realloc_or_raise(v.data, capacity * sizeof(int32_t))
        v.capacity = capacity
    if n:
        memcpy(v.data + v.n, ids, n * sizeof(int32_t))
    v.n += n
    return 0


cdef void* realloc_or_raise(void* old, size_t n_bytes) except NULL:
    cdef void* grown = realloc(old, n_bytes)
    if grown == NULL:
        raise MemoryError
    return grown


@cython.final
cdef class Walk:
    """The state of one look-up: a text's cached ids, and the units that the engine must encode."""

    cdef SegmentCache cache
    cdef str text
    cdef Text view
    cdef uint64_t scope
    cdef uint64_t since        # n_clears of the cache when the call began
    cdef bint keeps            # its scope was not cleared between then and the look-up
    cdef bint add_special_tokens
    cdef int32_t serial
    cdef uint64_t epoch        # of the cache; links of another epoch are not valid
    cdef uint32_t* run         # the chunks found before the first missing one
    cdef size_t n_run, run_capacity, n_run_ids
    cdef Ints known
    cdef list held             # the engine's answers, which `Unit.ids` points into
    cdef Op* ops
    cdef size_t n_ops, op_capacity
    cdef size_t barrier        # ops before it belong to other chunks
    cdef Unit* units
    cdef size_t n_units, unit_capacity
    cdef uint32_t* picked      # the units in the texts of `joined`
    cdef size_t n_picked, pick_capacity
    cdef Missed* missed
    cdef size_t n_missed, missed_capacity
    cdef uint64_t chunk_hits, chunk_miss_chars, short_hits, short_misses

    def __dealloc__(self):
        free(self.run)
        free(self.known.data)
        free(self.ops)
        free(self.units)
        free(self.picked)
        free(self.missed)

    cdef size_t n_bytes(self) noexcept:
        """Return the bytes of the arrays."""
        return (
            self.run_capacity * sizeof(uint32_t) + self.op_capacity * sizeof(Op)
            + self.known.capacity * sizeof(int32_t)
            + self.unit_capacity * sizeof(Unit) + self.missed_capacity * sizeof(Missed)
            + self.pick_capacity * sizeof(uint32_t)
        )

    @property
    def n_chars(self):
        """Number of characters that the engine has yet to encode."""
        cdef size_t i, total = 0
        for i in range(self.n_units):
            if not self.units[i].is_made:
                total += self.units[i].stop - self.units[i].start
        return total

    def joined(
        self, uint32_t variant, int blank_variant, str between, TokenBytes sizes,
        CodePoints agreed, size_t max_chars, size_t max_apart,
    ):
        """Return texts that together contain all units that `variant` has yet to encode.

        Units of `blank_variant` (-1: none) are included with a space before each: with it `variant`
        gives the same ids as the other variant without. A text has at most `max_chars` characters,
        or one unit, and contains `between`, which is ASCII, at most `max_apart` times. `between` is
        put between two units, unless these may be adjacent and the id lengths in `sizes` show where
        each ends. With `agreed`, only units of these code points and of at most `max_chars`
        characters are included.
        """
        cdef size_t i, n, n_chars = 0, n_apart = 0, first = 0
        cdef Unit* unit
        cdef Unit* before = NULL
        cdef bint has_blank, is_seamless
        cdef list texts = []
        self.n_picked = 0
        for i in range(self.n_units):
            unit = &self.units[i]
            has_blank = <int> unit.variant == blank_variant
            if unit.is_made or (unit.variant != variant and not has_blank):
                continue
            n = unit.stop - unit.start
            if agreed is not None and (
                n > max_chars or not agreed.cover_part(&self.view, unit.start, unit.stop)
            ):
                continue
            unit.n_bytes = 0
            if sizes is not None:
                unit.n_bytes = sizes.of_part(&self.view, unit.start, unit.stop)
                unit.n_bytes += unit.n_bytes and has_blank
            if before != NULL:
                is_seamless = self.is_seam(before, unit, variant, has_blank)
                before.behind = SEAMLESS if is_seamless else APART
                n_apart += before.behind == APART
                if n_chars + n > max_chars or n_apart > max_apart:
                    before.behind = LAST
                    texts.append(self.text_of(first, self.n_picked, blank_variant, between))
                    first = self.n_picked
                    n_chars = n_apart = 0
            n_chars += n
            unit.behind = LAST
            before = unit
            self.pick(<uint32_t> i)
        if self.n_picked:
            texts.append(self.text_of(first, self.n_picked, blank_variant, between))
        return texts

    def take(self, list encoded, int separator, TokenBytes sizes):
        """Assign the ids of the texts that `joined` returned to the units; return True.

        Return False if the ids do not fit the units, None if the length of an id is unknown. Each
        item of `encoded` is a list or a buffer of 32-bit integers.
        """
        cdef size_t i, at = 0
        cdef list held = []
        cdef TokenIds ids
        cdef Py_buffer* view
        for one in encoded:
            if at > self.n_picked:
                break
            if isinstance(one, list):
                ids = TokenIds(one)
                held.append(ids)
                at = self.take_text(at, ids_data(ids), ids.n_tokens, separator, sizes)
                continue
            one = PyMemoryView_FromObject(one)
            held.append(one)  # keeps the buffer alive and in place
            view = PyMemoryView_GET_BUFFER(one)
            if not PyBuffer_IsContiguous(view, b"C"):
                raise BufferError("an encoder's ids must lie side by side")
            at = self.take_text(
                at, <const int*> view.buf, view.len // sizeof(int), separator, sizes
            )
        if at != self.n_picked:
            return None if at == UNTOLD else False
        self.held = held if self.held is None else self.held + held
        for i in range(self.n_picked):
            self.units[self.picked[i]].is_made = True
        return True

    def finish(self):
        """Store the encoded segments and return the ids of the whole text."""
        cdef size_t i
        if self.text is None:
            raise RuntimeError("finish() was called before")
        for i in range(self.n_units):
            if not self.units[i].is_made:
                raise RuntimeError("finish() before every part was taken")
        return self.cache.finish(self)

    # ---- inside

    cdef size_t take_text(
        self, size_t at, const int* ids, size_t n, int separator, TokenBytes sizes
    ) except? 0:
        """Assign the ids of one text to the units from `at` on; return the position after them.

        Return UNTOLD if the length of an id is unknown, n_picked + 1 if the ids do not fit.
        """
        cdef size_t start, i = 0, left, size
        cdef bint is_seamless = False
        cdef Unit* unit
        while at < self.n_picked:
            unit = &self.units[self.picked[at]]
            start = i
            if is_seamless or unit.behind == SEAMLESS:
                left = unit.n_bytes
                while left:
                    if i == n:
                        return self.n_picked + 1
                    size = sizes.of_id(ids[i])
                    if size == 0:
                        return UNTOLD
                    if size > left:
                        return self.n_picked + 1
                    left -= size
                    i += 1
            else:
                while i < n and ids[i] != separator:
                    i += 1
            unit.ids = <const int32_t*> ids + start
            unit.n = <uint32_t> (i - start)
            at += 1
            is_seamless = unit.behind == SEAMLESS
            if unit.behind == LAST:
                return at if i == n else self.n_picked + 1
            if unit.behind == APART:
                if i == n or ids[i] != separator:
                    return self.n_picked + 1
                i += 1
        return self.n_picked + 1

    cdef bint is_seam(
        self, const Unit* before, const Unit* unit, uint32_t variant, bint has_blank
    ) noexcept:
        """Return whether two units need no separator in a joined text.

        They need none if they are adjacent in the text, or if a text may be cut between two such
        characters and no added token contains them side by side.
        """
        cdef const Plan* plan = &self.cache.plan
        cdef uint32_t left, last = unit_at(&self.view, before.stop - 1)
        if not before.n_bytes or not unit.n_bytes or variant != plan.variant_of[2]:
            return False
        if before.stop == unit.start and not has_blank:
            return True
        left = class_of(plan, last)
        if left == NEWLINE:
            if before.stop - before.start == 1:
                return False  # its class depends on a character before the unit
            left = class_behind(plan, last, class_of(plan, unit_at(&self.view, before.stop - 2)))
        last = 0x20 if has_blank else unit_at(&self.view, unit.start)
        return plan.seams[left * N_CLASSES + class_behind(plan, last, left)]

    cdef str text_of(self, size_t first, size_t stop, int blank_variant, str between):
        """Return the text of the picked units from `first` to `stop`."""
        cdef uint32_t bits = 0x7F, kind
        cdef Py_ssize_t n_between = PyUnicode_GET_LENGTH(between), size = 0, own = 0, at = 0
        cdef size_t i
        cdef uint8_t* data
        cdef const Unit* unit
        for i in range(first, stop):
            unit = &self.units[self.picked[i]]
            bits |= bits_of(&self.view, unit.start, unit.stop)
            own += unit.stop - unit.start
            size += <int> unit.variant == blank_variant
            size += n_between if unit.behind == APART else 0
        if size == 0 and <size_t> own == self.view.n_units:
            return self.text  # the units are the whole text
        size += own
        joined = PyUnicode_New(size, min(bits, <uint32_t> 0x10FFFF))
        kind = PyUnicode_KIND(joined)  # not wider than that of the text
        data = <uint8_t*> PyUnicode_DATA(joined)
        for i in range(first, stop):
            unit = &self.units[self.picked[i]]
            if <int> unit.variant == blank_variant:
                PyUnicode_CopyCharacters(joined, at, " ", 0, 1)
                at += 1
            narrow(&self.view, unit.start, unit.stop, kind, data + at * kind)
            at += unit.stop - unit.start
            if unit.behind == APART:
                PyUnicode_CopyCharacters(joined, at, between, 0, n_between)
                at += n_between
        return joined

    cdef int pick(self, uint32_t unit) except -1:
        if self.n_picked == self.pick_capacity:
            self.pick_capacity = max(2 * self.pick_capacity, <size_t> 64)
            self.picked = <uint32_t*> realloc_or_raise(
                self.picked, self.pick_capacity * sizeof(uint32_t)
            )
        self.picked[self.n_picked] = unit
        self.n_picked += 1
        return 0

    cdef void begin(self, str text, uint64_t scope, bint add_special_tokens, int32_t serial):
        self.text = text
        self.scope = scope
        self.add_special_tokens = add_special_tokens
        self.serial = serial
        self.view.data = <const uint8_t*> PyUnicode_DATA(text)
        self.view.n_units = PyUnicode_GET_LENGTH(text)
        self.view.kind = PyUnicode_KIND(text)
        self.known.n = 0
        self.n_run = self.n_run_ids = self.n_ops = self.n_units = self.n_missed = self.barrier = 0
        self.n_picked = 0
        self.chunk_hits = self.chunk_miss_chars = 0
        self.short_hits = self.short_misses = 0

    cdef int push_run(self, uint32_t place) except -1:
        if self.n_run == self.run_capacity:
            self.run_capacity = max(2 * self.run_capacity, <size_t> 64)
            self.run = <uint32_t*> realloc_or_raise(self.run, self.run_capacity * sizeof(uint32_t))
        self.run[self.n_run] = place
        self.n_run += 1
        return 0

    cdef int push_known(self, const int32_t* ids, size_t n) except -1:
        push_ints(&self.known, ids, n)
        if self.n_ops > self.barrier and self.ops[self.n_ops - 1].unit == NO_UNIT:
            self.ops[self.n_ops - 1].n += <uint32_t> n
            return 0
        return self.push_op(NO_UNIT, <uint32_t> n)

    cdef int push_op(self, uint32_t unit, uint32_t n) except -1:
        if self.n_ops == self.op_capacity:
            self.op_capacity = max(2 * self.op_capacity, <size_t> 64)
            self.ops = <Op*> realloc_or_raise(self.ops, self.op_capacity * sizeof(Op))
        self.ops[self.n_ops].unit = unit
        self.ops[self.n_ops].n = n
        self.n_ops += 1
        return 0

    cdef int push_unit(self, size_t start, size_t stop, uint32_t variant, bint is_short) except -1:
        cdef Unit* unit
        if self.n_units == self.unit_capacity:
            self.unit_capacity = max(2 * self.unit_capacity, <size_t> 64)
            self.units = <Unit*> realloc_or_raise(self.units, self.unit_capacity * sizeof(Unit))
        unit = &self.units[self.n_units]
        unit.start = start
        unit.stop = stop
        unit.variant = variant
        unit.is_made = False
        unit.is_short = is_short
        unit.may_grow = False
        self.push_op(<uint32_t> self.n_units, 0)
        self.n_units += 1
        return 0

    cdef int push_long(self, size_t start, size_t stop, uint32_t variant) except -1:
        """Make a unit of a segment that is too long for a short one, or merge it into the last.

        Merging saves separators; it costs little, because few long segments repeat within a text.
        """
        cdef Unit* unit
        if (
            self.n_ops > self.barrier and self.n_units
            and self.ops[self.n_ops - 1].unit == self.n_units - 1
        ):
            unit = &self.units[self.n_units - 1]
            if unit.may_grow and unit.stop == start:
                unit.stop = stop
                return 0
        self.push_unit(start, stop, variant, False)
        self.units[self.n_units - 1].may_grow = True
        return 0

    cdef Missed* push_missed(self) except NULL:
        if self.n_missed == self.missed_capacity:
            self.missed_capacity = max(2 * self.missed_capacity, <size_t> 16)
            self.missed = <Missed*> realloc_or_raise(
                self.missed, self.missed_capacity * sizeof(Missed)
            )
        self.n_missed += 1
        self.barrier = self.n_ops
        self.missed[self.n_missed - 1].first_op = <uint32_t> self.n_ops
        self.missed[self.n_missed - 1].first_known = <uint32_t> self.known.n
        return &self.missed[self.n_missed - 1]

    cdef size_t n_ids(self, size_t first_op, size_t stop_op) noexcept:
        cdef size_t i, n = 0
        for i in range(first_op, stop_op):
            if self.ops[i].unit == NO_UNIT:
                n += self.ops[i].n
            else:
                n += self.units[self.ops[i].unit].n
        return n

    cdef void write_ids(
        self, int32_t* into, size_t first_op, size_t stop_op, size_t first_known
    ) noexcept:
        cdef const int32_t* known = self.known.data + first_known
        cdef Unit* unit
        cdef size_t i
        for i in range(first_op, stop_op):
            if self.ops[i].unit == NO_UNIT:
                memcpy(into, known, self.ops[i].n * sizeof(int32_t))
                known += self.ops[i].n
                into += self.ops[i].n
            else:
                unit = &self.units[self.ops[i].unit]
                memcpy(into, unit.ids, unit.n * sizeof(int32_t))
                into += unit.n


cdef inline bint ends(
    size_t at, uint32_t left, size_t* end, uint32_t* end_class
) noexcept nogil:
    """Set the end of a chunk to `at`, after a character of class `left`."""
    end[0] = at
    end_class[0] = left
    return True


@cython.final
cdef class SegmentCache:
    """The token ids of chunks and short segments of texts, cut as `plan` (a CutPlan) says.

    Units:   `max_bytes` is for keys, ids and tables; working memory takes up to 300 KiB more.
    Cost:    one compare and one copy of the ids per cached chunk; an uncached chunk is scanned
             once. Only the answer is allocated.
    Threads: safe under the interpreter lock.
    Source:  content-defined chunks: FastCDC (Xia et al., USENIX ATC 2016).
    """

    cdef readonly uint64_t max_bytes
    cdef readonly bint cuts_fine
    cdef Plan plan
    cdef uint32_t n_variants
    cdef Chunks chunks
    cdef Shorts shorts
    cdef uint64_t[N_SECRETS] secret
    cdef uint64_t[N_SEEDS] seed
    cdef uint64_t rng
    cdef uint32_t clock
    cdef Link head             # to the first chunk of the last text
    cdef Fork[N_FORKS] forks
    cdef uint64_t epoch        # changes when all chunks are removed
    cdef int32_t serial
    cdef object prefixes       # by add_special_tokens: TokenIds or None
    cdef object suffixes
    cdef Walk spare
    cdef uint8_t* scratch
    cdef size_t scratch_bytes
    cdef uint64_t hits, misses, chunk_hits, chunk_misses, lookup_chars, chunk_miss_chars
    cdef uint64_t short_hits, short_misses, engine_chars, engine_tokens, tokens
    cdef uint64_t insertions, evictions
    cdef dict refusals
    # A look-up that began before its scope was cleared stores nothing.
    cdef readonly uint64_t n_clears  # number of clears, of one scope or of all
    cdef dict cleared          # scope -> n_clears at its last clear
    cdef uint64_t cleared_all  # n_clears at the last clear of all, or when `cleared` was full

    def __cinit__(self, plan, max_bytes, cuts_fine=True):
        cdef bytes random = urandom(8 * N_SECRETS + 8)
        self.max_bytes = max_bytes
        self.cuts_fine = cuts_fine
        memcpy(&self.secret[0], <const char*> random, 8 * N_SECRETS)
        memcpy(&self.rng, <const char*> random + 8 * N_SECRETS, 8)
        self.cut_seed = urandom(8 * N_SEEDS)
        self.head = no_link()
        self.n_variants = len(plan.variants)
        read_plan(&self.plan, plan)
        affixes = [(TokenIds(a[0]), TokenIds(a[1])) if a else (None, None) for a in plan.affixes]
        self.prefixes = tuple([a[0] for a in affixes])
        self.suffixes = tuple([a[1] for a in affixes])
        self.refusals = {}
        self.cleared = {}

    def __init__(self, plan, max_bytes, cuts_fine=True):
        pass

    def __dealloc__(self):
        release_chunks(&self.chunks)
        release_shorts(&self.shorts)
        free(self.plan.nodes)
        free(self.plan.children)
        free(self.plan.tokens)
        free(self.scratch)

    def look(self, str text, bint add_special_tokens, uint64_t scope, since=None):
        """Return the ids of `text` if all of it is cached, else a Walk with the units to encode.

        Return None, counted by reason, if the text can't be cut safely. Nothing is stored if the
        scope was cleared after `n_clears` was `since`, or is cleared before the Walk is finished.
        """
        cdef Walk walk
        PyUnicode_READY(text)
        if self.prefixes[add_special_tokens] is None:
            return self.refuse("post_processor")
        if PyUnicode_GET_LENGTH(text) >= 1 << 31:
            return self.refuse("too_long")
        walk = self.spare
        self.spare = None
        if walk is None:
            walk = Walk.__new__(Walk)
            walk.cache = self
        self.serial = self.serial + 1 if self.serial < 0x7FFFFFF0 else 1
        walk.begin(text, scope, add_special_tokens, self.serial)
        walk.epoch = self.epoch
        walk.since = self.n_clears if since is None else since
        walk.keeps = not self.was_cleared(walk)
        if not self.follow(walk):
            self.put_by(walk)
            return None
        if walk.n_units or walk.n_missed:
            if walk.n_units == 0:
                return self.finish(walk)
            return walk
        return self.answer(walk)

    def clear(self, scope=None, n_clears=None):
        """Remove all entries and set the counters to zero, or remove those of `scope` only.

        `n_clears` is the new value of that attribute; by default it grows by one.
        """
        self.n_clears = self.n_clears + 1 if n_clears is None else n_clears
        if scope is not None:
            self.clear_scope(scope)
            return
        self.cleared_all = self.n_clears
        self.cleared = {}
        self.forget_chunks()
        release_shorts(&self.shorts)
        self.hits = self.misses = self.chunk_hits = self.chunk_misses = self.lookup_chars = 0
        self.chunk_miss_chars = self.short_hits = self.short_misses = self.engine_chars = 0
        self.engine_tokens = self.tokens = self.insertions = self.evictions = 0
        self.refusals = {}

    def memory_usage(self):
        """Return the bytes held: keys, ids and tables."""
        return self.n_bytes()

    def stats(self):
        """Return a copy of the counters."""
        return L1Stats(
            hits=self.hits,
            misses=self.misses,
            chunk_hits=self.chunk_hits,
            chunk_misses=self.chunk_misses,
            short_hits=self.short_hits,
            short_misses=self.short_misses,
            lookup_chars=self.lookup_chars,
            chunk_miss_chars=self.chunk_miss_chars,
            engine_chars=self.engine_chars,
            engine_tokens=self.engine_tokens,
            tokens=self.tokens,
            insertions=self.insertions,
            evictions=self.evictions,
            refusals=dict(self.refusals),
            n_chunks=self.chunks.n,
            n_shorts=self.shorts.n,
            n_bytes=self.n_bytes(),
        )

    def cut(self, str text, bint fine):
        """Return the chunks (or with `fine` the segments) of `text` as (start, stop, is_token).

        Return None if the text can't be cut. For `explain` and tests.
        """
        cdef Walk walk = Walk.__new__(Walk)
        cdef size_t p = 0, end
        cdef uint32_t end_class
        walk.cache = self
        walk.begin(text, 0, False, 0)
        found = []
        while p < walk.view.n_units:
            if not self.chunk_end(&walk.view, p, &end, &end_class):
                return None
            if not fine:
                found.append((p, end, False))
            elif self.scan(walk, p, end, 0, found) == 0:
                return None
            p = end
        return found

    # ---- dump and load

    @property
    def cut_seed(self):
        """The secret that chooses where chunks end: dumped chunks are useful only with it."""
        return (<const char*> &self.seed[0])[:8 * N_SEEDS]

    @cut_seed.setter
    def cut_seed(self, bytes seed):
        if len(seed) != 8 * N_SEEDS:
            raise ValueError(f"a cut seed has {8 * N_SEEDS} bytes, not {len(seed)}")
        memcpy(&self.seed[0], <const char*> seed, 8 * N_SEEDS)

    def held_chunks(self):
        """Return (text, ids, scope, variant, end_class, is_tail) of every chunk, newest first."""
        cdef list columns = []
        cdef uint32_t i
        cdef const Chunk* one
        while not columns or len(columns[0]) != self.chunks.n:  # an allocation may run other code
            columns = [[None] * self.chunks.n for _ in range(7)]
        ages, texts, ids, scopes, variants, end_classes, tails = columns
        for i in range(self.chunks.n):
            one = &self.chunks.all[i]
            ages[i] = self.clock - one.tick
            texts[i] = PyUnicode_FromKindAndData(one.width, key_of(one), one.n_units)
            ids[i] = ids_of(one.ids, one.n_ids)
            scopes[i] = one.scope
            variants[i] = one.variant
            end_classes[i] = one.end_class
            tails[i] = bool(one.is_tail)
        return by_age(columns)

    def held_shorts(self):
        """Return (text, ids, scope, variant) of every short segment, newest first."""
        cdef list columns = []
        cdef uint32_t i, n = 0
        cdef const Short* one
        while not columns or len(columns[0]) != self.shorts.n:  # an allocation may run other code
            columns = [[None] * self.shorts.n for _ in range(5)]
        ages, texts, ids, scopes, variants = columns
        for i in range(self.shorts.n_sets * WAYS):
            one = &self.shorts.all[i]
            if one.tick == 0 or one.n_ids == PENDING:
                continue
            ages[n] = self.clock - one.tick
            texts[n] = PyUnicode_FromKindAndData(
                one.width, &one.key[0], one.n_bytes // one.width
            )
            ids[n] = ids_of(&one.ids[0], one.n_ids)
            scopes[n] = one.scope
            variants[n] = one.variant
            n += 1
        return by_age([column[:n] for column in columns])

    def fill_chunks(self, rows):
        """Store chunks in the form that `held_chunks` returns, without evicting any.

        They count as older than all present entries. Return the number stored, and the number that
        were already present.
        """
        cdef uint32_t age = self.greatest_age()
        cdef Py_ssize_t[3] n  # by outcome
        cdef Walk walk = Walk.__new__(Walk)
        memset(n, 0, sizeof(n))
        for text, ids, scope, variant, end_class, is_tail in rows:
            if not 0 <= variant < self.n_variants or not 0 <= end_class < N_CLASSES:
                raise ValueError(f"no chunk has variant {variant} and end class {end_class}")
            PyUnicode_READY(text)
            walk.begin(text, scope, False, 0)
            age = self.older(age)
            n[self.fill_chunk(walk, TokenIds(ids), variant, end_class, is_tail, age)] += 1
        return n[KEPT], n[THERE]

    def fill_shorts(self, rows):
        """Store short segments in the form that `held_shorts` returns; like `fill_chunks`."""
        cdef uint32_t age = self.greatest_age(), n_sets = NO_UNIT
        cdef Py_ssize_t[3] n  # by outcome
        cdef Walk walk = Walk.__new__(Walk)
        memset(n, 0, sizeof(n))
        rows = list(rows) if self.cuts_fine else []
        while n_sets != self.shorts.n_sets:  # doubled until they have room or the budget is used
            n_sets = self.shorts.n_sets
            self.room_for_shorts(len(rows), False)
        for text, ids, scope, variant in rows:
            if not 0 <= variant < self.n_variants:
                raise ValueError(f"no segment has variant {variant}")
            PyUnicode_READY(text)
            walk.begin(text, scope, False, 0)
            age = self.older(age)
            n[self.fill_short(walk, TokenIds(ids), variant, age)] += 1
        return n[KEPT], n[THERE]

    cdef int fill_chunk(
        self, Walk walk, TokenIds ids, uint32_t variant, uint32_t end_class, bint is_tail,
        uint32_t age,
    ) except -1:
        cdef uint32_t place, n_held = self.chunks.n
        cdef uint64_t n_units = walk.view.n_units
        cdef Missed* missed = walk.push_missed()
        if not 0 < n_units <= STORED_UNITS:
            return NO_ROOM
        walk.push_known(<const int32_t*> ids_data(ids), ids.n_tokens)
        missed.start = 0
        missed.stop = n_units
        missed.stop_op = <uint32_t> walk.n_ops
        missed.variant = variant
        missed.end_class = end_class
        if not self.has_room(
            chunk_item_bytes(ids.n_tokens, n_units, width_of(&walk.view, 0, n_units))
        ):
            return NO_ROOM
        missed.digest = self.digest(walk, 0, n_units, variant)
        place = self.keep_chunk(walk, missed)
        if self.chunks.n == n_held:
            return NO_ROOM if place == NO_CHUNK else THERE
        self.chunks.all[place].tick = self.clock - age or 1
        self.chunks.all[place].is_tail = is_tail
        return KEPT

    cdef int fill_short(self, Walk walk, TokenIds ids, uint32_t variant, uint32_t age) except -1:
        cdef Short key
        cdef Short* at
        cdef uint64_t digest
        cdef bint evicts = False
        if self.shorts.n_sets == 0 or ids.n_tokens > SHORT_IDS:
            return NO_ROOM
        if not short_key(&walk.view, 0, walk.view.n_units, &key):
            return NO_ROOM
        key.scope = walk.scope
        key.variant = <uint8_t> variant
        digest = self.short_digest(&key)
        if find_short(&self.shorts, digest, &key) != NULL:
            return THERE
        at = place_short(&self.shorts, digest, self.clock, &evicts)
        if evicts:
            return NO_ROOM
        at[0] = key
        at.tick = self.clock - age or 1
        at.n_ids = <uint8_t> ids.n_tokens
        memcpy(at.ids, ids_data(ids), ids.n_tokens * sizeof(int32_t))
        self.insertions += 1
        return KEPT

    cdef bint has_room(self, uint64_t n_bytes) noexcept:
        """Return whether one more chunk of `n_bytes` fits without an eviction."""
        cdef uint64_t more = 0
        if self.chunks.n == self.chunks.capacity:
            more = max(self.chunks.capacity, <uint32_t> 64) * (sizeof(Chunk) + sizeof(uint32_t))
        return self.n_bytes() + n_bytes + more <= self.max_bytes

    cdef uint32_t greatest_age(self) noexcept:
        cdef uint32_t i, greatest = 0
        for i in range(self.chunks.n):
            greatest = max(greatest, self.clock - self.chunks.all[i].tick)
        for i in range(self.shorts.n_sets * WAYS):
            if self.shorts.all[i].tick:
                greatest = max(greatest, self.clock - self.shorts.all[i].tick)
        return greatest

    cdef uint32_t older(self, uint32_t age) noexcept:
        return age + 2 if age + 1 == self.clock else age + 1  # tick 0 marks an empty place

    def _check(self):
        """Verify every invariant; for tests."""
        cdef uint32_t i, j, n = 0
        cdef uint64_t n_bytes = 0
        assert self.n_bytes() <= self.max_bytes
        for i in range(self.chunks.n):
            n_bytes += chunk_item_bytes(
                self.chunks.all[i].n_ids, self.chunks.all[i].n_units, self.chunks.all[i].width
            )
            j = self.chunks.buckets[self.chunks.all[i].digest & (self.chunks.capacity - 1)]
            while j != i:
                assert j != NO_CHUNK
                j = self.chunks.all[j].chain
        assert n_bytes == self.chunks.item_bytes
        for i in range(self.shorts.n_sets * WAYS):
            n += self.shorts.all[i].tick != 0
        assert n == self.shorts.n

    # ---- the walk

    cdef refuse(self, str reason):
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        return None

    cdef int clear_scope(self, uint64_t scope) except -1:
        cdef uint32_t i
        if len(self.cleared) < MAX_CLEARED:
            self.cleared[scope] = self.n_clears
        else:
            self.cleared_all = self.n_clears
            self.cleared = {}
        # Backwards, so that the chunk that takes a removed one's place was already looked at.
        for i in range(self.chunks.n, 0, -1):
            if self.chunks.all[i - 1].scope == scope:
                remove_chunk(&self.chunks, i - 1)
        if self.chunks.n == 0:
            self.forget_chunks()
        for i in range(self.shorts.n_sets * WAYS):
            if self.shorts.all[i].tick and self.shorts.all[i].scope == scope:
                memset(&self.shorts.all[i], 0, sizeof(Short))
                self.shorts.n -= 1
        if self.shorts.n == 0:
            release_shorts(&self.shorts)
        return 0

    cdef bint was_cleared(self, Walk walk) except -1:
        """Return whether the scope of a Walk was cleared since its call began."""
        return walk.since != self.n_clears and (
            self.cleared_all > walk.since or self.cleared.get(walk.scope, 0) > walk.since
        )

    cdef void forget_chunks(self) noexcept:
        release_chunks(&self.chunks)
        memset(&self.forks[0], 0, sizeof(self.forks))
        self.head = no_link()
        self.epoch += 1

    cdef uint64_t n_bytes(self) noexcept:
        return chunks_bytes(&self.chunks) + shorts_bytes(&self.shorts)

    cdef inline void tick(self) noexcept:
        self.clock += 1
        if self.clock == 0:  # tick 0 marks an empty place
            self.clock = 1

    cdef bint opens_at(self, const Text* t, size_t p) noexcept:
        """Return whether an added token that may begin a chunk starts at `p`."""
        cdef Match m
        if self.plan.n_tokens == 0 or not may_start(&self.plan, unit_at(t, p)):
            return False
        m = match_at(&self.plan, t, p, p)
        return m.outcome == FOUND and m.flags & OPENS

    cdef bint may_end(self, const Text* t, size_t p, const Chunk* chunk) noexcept:
        """Return whether `chunk`, which matches the text before `p`, may end at `p`."""
        if p == t.n_units or chunk.is_tail:
            return p == t.n_units
        return (
            self.plan.coarse[chunk.end_class * N_CLASSES + class_of(&self.plan, unit_at(t, p))]
            or self.opens_at(t, p)
        )

    cdef uint32_t variant_at(self, const Text* t, size_t p) noexcept:
        """Return the tokenizer variant that encodes the beginning of a chunk at `p`."""
        if self.plan.variant_of[0] == self.plan.variant_of[1] == self.plan.variant_of[2]:
            return self.plan.variant_of[0]
        if self.opens_at(t, p):
            return self.plan.variant_of[1]
        return self.plan.variant_of[0 if p == 0 else 2]

    cdef bint follow(self, Walk walk) except -1:
        """Look up the text chunk by chunk; return False, counted, if it can't be cut safely.

        The chunk that followed the previous one in an earlier text is tried first: it is compared
        in full and needs neither scan nor digest. Its end is proven by its own link to the next
        chunk, or else by the characters there.
        """
        cdef Text* t = &walk.view
        cdef size_t p = 0, end = 0
        cdef uint32_t place, before = NO_CHUNK, ahead = self.find_head(walk)
        cdef uint32_t variant = 0, end_class = 0
        cdef uint64_t digest = 0
        self.tick()
        while p < t.n_units:
            place = ahead
            ahead = NO_CHUNK
            if place != NO_CHUNK:
                end = p + self.chunks.all[place].n_units
                ahead = self.find_ahead(walk, place, end)
                if ahead == NO_CHUNK and not self.may_end(t, end, &self.chunks.all[place]):
                    place = NO_CHUNK
            if place == NO_CHUNK:
                variant = self.variant_at(t, p)
                if not self.chunk_end(t, p, &end, &end_class):
                    self.refuse("beside_single_word")
                    return False
                if end - p <= STORED_UNITS:
                    digest = self.digest(walk, p, end, variant)
                    place = self.find(walk, digest, p, end, variant)
                if place != NO_CHUNK and before != NO_CHUNK:
                    self.remember(t, before, p, place)
                if place != NO_CHUNK and end < t.n_units:
                    self.chunks.all[place].is_tail = False
                    ahead = self.find_ahead(walk, place, end)
            if place == NO_CHUNK:
                self.flush_run(walk)
                if not self.miss(walk, digest, p, end, variant, end_class, before):
                    return False
            else:
                self.hit(walk, p, place, before)
            before = place
            p = end
        return True

    cdef uint32_t find_head(self, Walk walk) noexcept:
        """Return the first chunk of the last text if this text begins with it, too."""
        cdef uint32_t place = place_of(&self.chunks, self.head)
        if (
            place != NO_CHUNK and self.chunks.all[place].scope == walk.scope
            and is_chunk(&self.chunks.all[place], &walk.view, 0)
            and self.chunks.all[place].variant == self.variant_at(&walk.view, 0)
        ):
            return place
        return NO_CHUNK

    cdef inline uint32_t find_ahead(self, Walk walk, uint32_t place, size_t end) noexcept:
        if end == walk.view.n_units:
            return NO_CHUNK
        cdef uint32_t found = find_behind(&self.chunks, place, &walk.view, end, walk.scope)
        cdef const Fork* fork
        if found == NO_CHUNK:
            fork = fork_at(&self.forks[0], &self.chunks, place, &walk.view, end, self.secret)
            if fork.serial == self.chunks.all[place].serial:
                found = place_of(&self.chunks, fork.ahead)
                if found != NO_CHUNK and not (
                    self.chunks.all[found].scope == walk.scope
                    and is_chunk(&self.chunks.all[found], &walk.view, end)
                ):
                    found = NO_CHUNK
        return found

    cdef inline void remember(
        self, const Text* t, uint32_t before, size_t p, uint32_t place
    ) noexcept:
        """Remember the chunk at `p` as one that follows `before`."""
        cdef Fork* fork = fork_at(&self.forks[0], &self.chunks, before, t, p, self.secret)
        fork.serial = self.chunks.all[before].serial
        fork.ahead = link_to(&self.chunks, place)

    cdef inline int hit(self, Walk walk, size_t p, uint32_t place, uint32_t before) except -1:
        cdef Chunk* chunk = &self.chunks.all[place]
        chunk.tick = self.clock
        if p == 0:
            self.head = link_to(&self.chunks, place)
        elif before != NO_CHUNK:
            put_behind(&self.chunks, before, link_to(&self.chunks, place))
        elif walk.n_missed:
            walk.missed[walk.n_missed - 1].behind = link_to(&self.chunks, place)
        walk.chunk_hits += 1
        if walk.n_missed:
            return walk.push_known(chunk.ids, chunk.n_ids)
        walk.n_run_ids += chunk.n_ids
        return walk.push_run(place)

    cdef int flush_run(self, Walk walk) except -1:
        """Copy the ids of the chunks found so far, because the next steps may evict them."""
        cdef size_t i
        for i in range(walk.n_run):
            walk.push_known(
                self.chunks.all[walk.run[i]].ids, self.chunks.all[walk.run[i]].n_ids
            )
        walk.n_run = 0
        return 0

    cdef bint miss(
        self, Walk walk, uint64_t digest, size_t p, size_t end, uint32_t variant,
        uint32_t end_class, uint32_t before,
    ) except -1:
        """Split a missing chunk; return False, counted, if an added token's match is unsure."""
        cdef Missed* missed = walk.push_missed()
        missed.digest = digest
        missed.start = p
        missed.stop = end
        missed.variant = variant
        missed.end_class = end_class
        missed.before = link_to(&self.chunks, before)
        missed.behind = no_link()
        if not self.scan(walk, p, end, variant, None):
            return False
        walk.missed[walk.n_missed - 1].stop_op = <uint32_t> walk.n_ops
        walk.barrier = walk.n_ops
        walk.chunk_miss_chars += end - p
        return True

    cdef uint32_t find(
        self, Walk walk, uint64_t digest, size_t start, size_t stop, uint32_t variant
    ) noexcept:
        if self.chunks.n == 0:
            return NO_CHUNK
        return find_chunk(&self.chunks, digest, &walk.view, start, stop, walk.scope, variant)

    cdef uint64_t digest(
        self, Walk walk, size_t start, size_t stop, uint32_t variant
    ) except? 0:
        cdef uint32_t width = width_of(&walk.view, start, stop)
        cdef const uint8_t* key = walk.view.data + start * width
        if width != walk.view.kind:
            if self.scratch_bytes < (stop - start) * width:
                self.scratch = <uint8_t*> realloc_or_raise(self.scratch, (stop - start) * width)
                self.scratch_bytes = (stop - start) * width
            narrow(&walk.view, start, stop, width, self.scratch)
            key = self.scratch
        return full_digest(
            key, (stop - start) * width,
            walk.scope ^ (<uint64_t> width << 8) ^ variant ^ (<uint64_t> (stop - start) << 16),
            &self.secret[0],
        )

    cdef bint chunk_end(
        self, const Text* t, size_t p, size_t* end, uint32_t* end_class
    ) noexcept:
        """Find the end of the chunk that begins at `p`; return False if a token's match is unsure.

        The first of these that applies:

        1. The start of a message, once the chunk has OPENING_UNITS.
        2. Between MIN_UNITS and MAX_UNITS, the first coarse cut with a rank below CHOSEN.
        3. The end of the text, if it is within MAX_UNITS.
        4. Between MIN_UNITS and MAX_UNITS, the coarse cut with the lowest rank.
        5. The next coarse cut, or the end of the text.
        """
        cdef const Plan* plan = &self.plan
        cdef size_t i = p, piece = p, last = 0, cut = p, token_at = self.next_token(t, p), stop, at
        cdef uint32_t last_class = 0, gap, best_gap = 1
        cdef uint64_t digest, best = 0, places
        cdef uint8_t[WINDOW + 64] room
        cdef const uint8_t* latin
        cdef bint is_late
        cdef Match m
        while i < t.n_units:
            if i == token_at:
                m = match_at(plan, t, i, piece)
                if m.outcome == UNSURE:
                    return False
                if m.outcome == FOUND:
                    if m.flags & OPENS and i >= p + OPENING_UNITS:
                        return ends(i, self.class_before(t, i, p, piece), end, end_class)
                    if last and i > p + MAX_UNITS:
                        break
                    piece = cut = m.stop
                    i = m.end
                    token_at = self.next_token(t, i)
                    continue
                token_at = self.next_token(t, m.end if m.outcome == AS_TEXT else i + 1)
                if m.outcome == AS_TEXT:  # there is no cut inside it or directly before it
                    i = m.end
                    continue
            if i < piece:
                i += 1
                continue
            stop = min(token_at, t.n_units)
            if i < p + MIN_UNITS:  # a cut here only affects the weight of the next one
                stop = min(stop, p + MIN_UNITS)
                at = self.last_place(t, i, stop, p, piece)
                cut = at if at else cut
                i = stop
                continue
            stop = min(stop, i + 64)
            latin = latin_block(t, i, &room[0])
            places = self.coarse_places(t, i, stop, p, piece, latin)
            while places:
                at = i + count_zeros(places)
                places &= places - 1
                is_late = at > p + MAX_UNITS
                if is_late and last:
                    return ends(last, last_class, end, end_class)
                digest = self.rank(t, at, latin + (at - i) if latin else NULL, at - cut, &gap)
                # Keep the cut with the lowest rank, which is digest / gap.
                if last == 0 or digest * best_gap < best * gap:
                    best, best_gap, last = digest, gap, at
                    last_class = self.class_before(t, at, p, piece)
                # Earlier ranks were not below CHOSEN, so this one is the lowest if it is.
                if is_late or digest < <uint64_t> CHOSEN * gap:
                    return ends(last, last_class, end, end_class)
                cut = at
            i = stop
        if i >= t.n_units and (last == 0 or t.n_units - p <= MAX_UNITS):
            last, last_class = t.n_units, self.class_before(t, t.n_units, p, piece)
        return ends(last, last_class, end, end_class)

    cdef uint32_t class_before(self, const Text* t, size_t i, size_t p, size_t piece) noexcept:
        """Return the class of the character before `i` in a chunk that begins at `p`.

        Characters before `piece`, the end of the last added token, have no influence.
        """
        cdef const Plan* plan = &self.plan
        if i <= piece:
            return TOKEN_END if piece > p else LETTER if p else plan.piece_left
        if i - 1 > piece:
            return class_behind(plan, unit_at(t, i - 1), class_of(plan, unit_at(t, i - 2)))
        return class_behind(
            plan, unit_at(t, i - 1), LETTER if p and piece == p else plan.piece_left
        )

    cdef inline size_t last_place(
        self, const Text* t, size_t start, size_t stop, size_t p, size_t piece
    ) noexcept:
        """Return the last coarse cut in [start, stop), 0 if there is none."""
        cdef size_t i
        cdef uint64_t places
        cdef uint8_t[WINDOW + 64] room
        while stop > start:
            i = stop - 64 if stop - start > 64 else start
            places = self.coarse_places(t, i, stop, p, piece, latin_block(t, i, &room[0]))
            if places:
                return i + 63 - count_leading_zeros(places)
            stop = i
        return 0

    cdef uint64_t coarse_places(
        self, const Text* t, size_t i, size_t stop, size_t p, size_t piece, const uint8_t* latin
    ) noexcept:
        """Return a bit for each of up to 64 units from `i` on: 1 if a coarse cut is before it.

        `latin` has these units as bytes, or is NULL.
        """
        cdef const Plan* plan = &self.plan
        cdef const uint8_t* one = t.data
        cdef const uint16_t* two = <const uint16_t*> t.data
        cdef const uint32_t* four = <const uint32_t*> t.data
        cdef const uint8_t* classes = plan.classes
        cdef uint32_t left, own
        cdef uint64_t places = 0, behind = ~<uint64_t> 0, sure
        cdef size_t j, at
        left = class_of(plan, unit_at(t, i - 1)) if i > piece else OTHER
        if latin and uses_vectors:
            places = places_of(latin, left, NEWLINE, classes, &plan.place_pairs, &behind)
            places &= ~<uint64_t> 0 >> (64 - (stop - i))
        elif t.kind == 1:
            for j in range(stop - i):
                own = classes[one[i + j]]
                places |= <uint64_t> plan.places[left * N_CLASSES + own] << j
                left = own
        elif t.kind == 2:
            for j in range(stop - i):
                own = classes[two[i + j]]
                places |= <uint64_t> plan.places[left * N_CLASSES + own] << j
                left = own
        else:
            for j in range(stop - i):
                own = class_of(plan, four[i + j])
                places |= <uint64_t> plan.places[left * N_CLASSES + own] << j
                left = own
        if i <= piece:
            places &= ~<uint64_t> 1  # a piece is not cut before its first character
        sure = places & behind
        while sure:  # after a newline the cut depends on the character before the newline
            at = i + count_zeros(sure)
            sure &= sure - 1
            if class_of(plan, unit_at(t, at - 1)) == NEWLINE:
                left = self.class_before(t, at, p, piece)
                if not plan.coarse[left * N_CLASSES + class_behind(plan, unit_at(t, at), left)]:
                    places &= ~(<uint64_t> 1 << (at - i))
        return places

    cdef inline size_t next_token(self, const Text* t, size_t i) noexcept:
        """Return the next position where an added token may start, or one that none is before."""
        return next_start(&self.plan, t, i, min(t.n_units, i + LOOK_UNITS))

    cdef inline uint64_t rank(
        self, const Text* t, size_t i, const uint8_t* latin, size_t gap, uint32_t* weight
    ) noexcept:
        """Return a 32-bit digest of the WINDOW units before a cut, and the cut's weight.

        The rank of a cut is digest / weight; the lowest ends a chunk. The weight is `gap`, the
        units since the previous coarse cut, so that texts with few cuts have chunks of the same
        length as others. It is four times as large for characters beyond Latin-1, because each
        of them carries more text. `latin` points to the unit at `i` in the units as bytes, or is
        NULL.
        """
        cdef const uint16_t* two = <const uint16_t*> t.data + i - WINDOW
        cdef const uint32_t* four = <const uint32_t*> t.data + i - WINDOW
        cdef uint8_t[WINDOW] low, middle, high  # bytes of the units, the same for every kind
        cdef uint64_t[6] words
        cdef uint64_t digest
        cdef size_t j
        gap = min(gap, <size_t> GAP_UNITS)
        if latin:
            weight[0] = <uint32_t> gap
            return <uint32_t> fold(
                read64(latin - WINDOW) ^ self.seed[0], read64(latin - WINDOW + 8) ^ self.seed[1]
            )
        if t.kind == 2:
            for j in range(WINDOW):
                low[j] = <uint8_t> two[j]
                middle[j] = <uint8_t> (two[j] >> 8)
        else:
            for j in range(WINDOW):
                low[j] = <uint8_t> four[j]
                middle[j] = <uint8_t> (four[j] >> 8)
                high[j] = <uint8_t> (four[j] >> 16)
        memset(&words[0], 0, sizeof(words))
        memcpy(&words[0], &low[0], WINDOW)
        memcpy(&words[2], &middle[0], WINDOW)
        if t.kind > 2:
            memcpy(&words[4], &high[0], WINDOW)
        digest = fold(words[0] ^ self.seed[0], words[1] ^ self.seed[1])
        if words[2] | words[3] | words[4] | words[5]:
            digest ^= fold(words[2] ^ self.seed[2], words[3] ^ self.seed[3])
            digest ^= fold(words[4] ^ self.seed[4], words[5] ^ self.seed[5])
            gap *= 4
        weight[0] = <uint32_t> gap
        return <uint32_t> digest

    cdef bint scan(
        self, Walk walk, size_t p, size_t end, uint32_t variant, list found
    ) except -1:
        """Split a chunk at added tokens and fine cuts; return False if it can't be split safely.

        The ids of cached segments are copied, the other segments become units. With `found`, the
        segments are only appended to it.
        """
        cdef const Plan* plan = &self.plan
        cdef Text* t = &walk.view
        cdef size_t i = p, start = p, token_at
        cdef uint32_t left = LETTER if p else plan.piece_left, own, unit
        cdef bint fine = self.cuts_fine
        cdef Match m
        token_at = next_start(plan, t, p, end)
        while i < end:
            if not fine and i < token_at:  # there are no cuts between added tokens
                if has_surrogate(t, i, token_at):
                    self.refuse("surrogate")
                    return False
                i = token_at
                continue
            if i == token_at:
                m = match_at(plan, t, i, start)
                if m.outcome == UNSURE:
                    self.refuse("beside_single_word")
                    return False
                if m.outcome == FOUND:
                    if m.start > start:
                        self.part(walk, start, m.start, variant, found)
                    if found is None:
                        walk.push_known(&m.id, 1)
                    else:
                        found.append((m.start, m.stop, True))
                    start = m.stop
                    i = m.end
                    left = TOKEN_END
                    variant = plan.variant_of[1]
                    token_at = next_start(plan, t, i, end)
                    continue
                if m.outcome == AS_TEXT:
                    while i < m.end:
                        left = class_behind(plan, unit_at(t, i), left)
                        i += 1
                    token_at = next_start(plan, t, i, end)
                    continue
                token_at = next_start(plan, t, i + 1, end)
            if i < start:
                i += 1
                continue
            if i == start and i > p and left == TOKEN_END:
                left = plan.piece_left
            unit = unit_at(t, i)
            own = class_behind(plan, unit, left)
            if own == 0 and is_surrogate(unit):
                self.refuse("surrogate")
                return False
            if fine and i > start and plan.fine[left * N_CLASSES + own]:
                self.part(walk, start, i, variant, found)
                start = i
                variant = plan.variant_of[2]
            left = own
            i += 1
        if end > start:
            self.part(walk, start, end, variant, found)
        return True

    cdef int part(
        self, Walk walk, size_t start, size_t stop, uint32_t variant, list found
    ) except -1:
        """Copy the ids of a segment if they are cached, else make a unit of it."""
        cdef Short key
        cdef Short* at
        cdef uint64_t digest
        cdef bint evicts = False
        if found is not None:
            found.append((start, stop, False))
            return 0
        if not short_key(&walk.view, start, stop, &key):
            return walk.push_long(start, stop, variant)
        key.scope = walk.scope
        key.variant = <uint8_t> variant
        digest = self.short_digest(&key)
        at = find_short(&self.shorts, digest, &key)
        if at != NULL:
            at.tick = self.clock
            if at.n_ids != PENDING:
                walk.short_hits += 1
                return walk.push_known(at.ids, at.n_ids)
            if at.ids[1] == walk.serial:
                walk.short_hits += 1
                return walk.push_op(<uint32_t> at.ids[0], 0)
        elif walk.keeps:
            self.room_for_shorts(1, True)
            if self.shorts.n_sets:
                at = place_short(&self.shorts, digest, self.clock, &evicts)
                self.evictions += evicts
                at[0] = key
                at.tick = self.clock
        walk.short_misses += 1
        if at != NULL:
            at.n_ids = PENDING
            at.ids[0] = <int32_t> walk.n_units
            at.ids[1] = walk.serial
        return walk.push_unit(start, stop, variant, True)

    cdef inline uint64_t short_digest(self, Short* key) noexcept:
        cdef uint64_t[3] words
        cdef uint64_t digest
        memcpy(&words[0], &key.key[0], SHORT_BYTES)
        digest = fold(words[0] ^ self.secret[42], words[1] ^ self.secret[43])
        digest = fold(
            digest ^ words[2] ^ self.secret[44],
            key.scope ^ self.secret[45]
            ^ (<uint64_t> key.n_bytes << 16 | <uint64_t> key.width << 8 | key.variant),
        )
        key.check = <uint32_t> (digest >> 32)
        return digest

    cdef int room_for_shorts(self, uint64_t n_more, bint may_evict) except -1:
        """Double the table of short segments if it is half full and the budget allows it."""
        cdef Shorts old = self.shorts
        cdef uint32_t n_sets = 2 * old.n_sets if old.n_sets else MIN_SETS
        cdef uint64_t n_bytes = <uint64_t> n_sets * WAYS * sizeof(Short), digest
        cdef uint32_t i
        cdef bint evicts = False
        if 2 * (old.n + n_more) <= <uint64_t> old.n_sets * WAYS:
            return 0
        if n_bytes > self.max_bytes // SHORT_SHARE or old.n_sets >= 1 << 24:
            return 0
        # The old and the new table exist at the same time for a moment.
        while self.n_bytes() + n_bytes > self.max_bytes:
            if self.chunks.n == 0 or not may_evict:
                return 0
            self.evict()
        self.shorts.all = <Short*> calloc(n_sets * WAYS, sizeof(Short))
        if self.shorts.all == NULL:
            self.shorts = old
            return 0
        self.shorts.n_sets = n_sets
        self.shorts.n = 0
        for i in range(old.n_sets * WAYS):
            if old.all[i].tick:
                digest = self.short_digest(&old.all[i])
                place_short(&self.shorts, digest, self.clock, &evicts)[0] = old.all[i]
        free(old.all)
        return 0

    cdef int evict(self) except -1:
        self.evictions += 1
        remove_chunk(
            &self.chunks, oldest_chunk(&self.chunks, &self.rng, self.clock, N_DRAWS)
        )
        return 0

    # ---- the end of a Walk

    cdef finish(self, Walk walk):
        cdef size_t i
        cdef uint32_t place, before = NO_CHUNK
        cdef Link link = no_link()
        cdef Missed* missed
        cdef bint keeps = not self.was_cleared(walk)
        self.tick()
        for i in range(walk.n_units):
            self.engine_chars += walk.units[i].stop - walk.units[i].start
            self.engine_tokens += walk.units[i].n
            if walk.units[i].is_short and keeps:
                self.keep_short(walk, &walk.units[i])
        if not keeps:
            self.refuse("cleared")
            return self.answer(walk)
        for i in range(walk.n_missed):
            missed = &walk.missed[i]
            place = self.keep_chunk(walk, missed)
            if missed.before.place != NO_CHUNK:
                link = missed.before
            before = self.place_in(walk, link)
            link = link_to(&self.chunks, place)
            if place == NO_CHUNK:
                continue
            if missed.start == 0:
                self.head = link
            elif before != NO_CHUNK:
                put_behind(&self.chunks, before, link)
            if self.place_in(walk, missed.behind) != NO_CHUNK:
                put_behind(&self.chunks, place, missed.behind)
        return self.answer(walk)

    cdef uint32_t place_in(self, Walk walk, Link link) noexcept:
        return place_of(&self.chunks, link) if walk.epoch == self.epoch else NO_CHUNK

    cdef int keep_short(self, Walk walk, const Unit* unit) except -1:
        cdef Short key
        cdef Short* at
        cdef uint64_t digest
        cdef bint evicts = False
        if not short_key(&walk.view, unit.start, unit.stop, &key):
            return 0
        key.scope = walk.scope
        key.variant = <uint8_t> unit.variant
        digest = self.short_digest(&key)
        at = find_short(&self.shorts, digest, &key)
        if at == NULL and unit.n <= SHORT_IDS and self.shorts.n_sets:
            at = place_short(&self.shorts, digest, self.clock, &evicts)
            self.evictions += evicts
            at[0] = key
        if at == NULL:
            return 0
        if unit.n > SHORT_IDS:
            at.tick = 0
            self.shorts.n -= 1
            return 0
        at.tick = self.clock
        at.n_ids = <uint8_t> unit.n
        memcpy(at.ids, unit.ids, unit.n * sizeof(int32_t))
        self.insertions += 1
        return 0

    cdef uint32_t keep_chunk(self, Walk walk, const Missed* missed) except? 0:
        """Store a missing chunk, unless it is in the table by now; return its place."""
        cdef size_t n_units = missed.stop - missed.start
        cdef size_t n_ids = walk.n_ids(missed.first_op, missed.stop_op)
        cdef uint32_t index = NO_CHUNK
        cdef uint64_t n_bytes
        cdef Chunk chunk
        if n_units > STORED_UNITS:
            self.refuse("no_cut")
            return NO_CHUNK
        chunk.digest = missed.digest
        index = self.find(walk, chunk.digest, missed.start, missed.stop, missed.variant)
        if index == NO_CHUNK:
            chunk.width = <uint8_t> width_of(&walk.view, missed.start, missed.stop)
            n_bytes = chunk_item_bytes(n_ids, n_units, chunk.width)
            if not self.room_for_chunk(n_bytes):
                self.refuse("oversize")
                return NO_CHUNK
            chunk.ids = <int32_t*> malloc(n_ids * sizeof(int32_t) + n_units * chunk.width + 1)
            if chunk.ids == NULL:
                self.refuse("memory")
                return NO_CHUNK
            chunk.n_ids = <uint32_t> n_ids
            chunk.n_units = <uint32_t> n_units
            chunk.scope = walk.scope
            chunk.variant = <uint8_t> missed.variant
            chunk.end_class = <uint8_t> missed.end_class
            chunk.is_tail = missed.stop == walk.view.n_units
            chunk.tick = self.clock
            walk.write_ids(chunk.ids, missed.first_op, missed.stop_op, missed.first_known)
            narrow(
                &walk.view, missed.start, missed.stop, chunk.width,
                <uint8_t*> (chunk.ids + n_ids),
            )
            add_chunk(&self.chunks, &chunk)
            self.insertions += 1
            index = self.chunks.n - 1
        return index

    cdef bint room_for_chunk(self, uint64_t n_bytes) except -1:
        """Evict until one more chunk of `n_bytes` fits; return False if it can't fit."""
        cdef uint64_t more
        if self.chunks.serial == 0xFFFFFFFF:  # a serial used again could make an old link valid
            self.forget_chunks()
        more = 64 * (sizeof(Chunk) + sizeof(uint32_t)) if self.chunks.capacity == 0 else 0
        if self.n_bytes() - self.chunks.item_bytes + n_bytes + more > self.max_bytes:
            return False  # it does not fit even after evicting all others
        while True:
            more = 0
            if self.chunks.n == self.chunks.capacity:
                more = max(self.chunks.capacity, <uint32_t> 64) * (
                    sizeof(Chunk) + sizeof(uint32_t)
                )
            if self.n_bytes() + n_bytes + more <= self.max_bytes:
                break
            if self.chunks.n == 0:
                return False
            self.evict()
        return grow_chunks(&self.chunks) if more else True

    cdef TokenIds answer(self, Walk walk):
        """Return the ids of the text with its affixes, and update the counters."""
        cdef TokenIds before = self.prefixes[walk.add_special_tokens]
        cdef TokenIds behind = self.suffixes[walk.add_special_tokens]
        cdef size_t n = walk.n_run_ids if walk.n_missed == 0 else walk.n_ids(0, walk.n_ops)
        cdef TokenIds ids = new_owner(before.n_tokens + n + behind.n_tokens)
        cdef int* into = owner_data(ids)
        cdef const Chunk* chunk
        cdef size_t i
        memcpy(into, ids_data(before), before.n_tokens * sizeof(int32_t))
        into += before.n_tokens
        if walk.n_missed:
            walk.write_ids(<int32_t*> into, 0, walk.n_ops, 0)
            into += n
        for i in range(walk.n_run):
            chunk = &self.chunks.all[walk.run[i]]
            memcpy(into, chunk.ids, chunk.n_ids * sizeof(int32_t))
            into += chunk.n_ids
        memcpy(into, ids_data(behind), behind.n_tokens * sizeof(int32_t))
        self.count(walk, n)
        self.put_by(walk)
        return ids

    cdef void put_by(self, Walk walk):
        """Keep a Walk for use by the next text, unless its arrays are large."""
        walk.text = None
        walk.held = None
        if walk.n_bytes() <= SPARE_BYTES:
            self.spare = walk

    cdef void count(self, Walk walk, size_t n_ids):
        if walk.n_missed:
            self.misses += 1
        else:
            self.hits += 1
        self.chunk_hits += walk.chunk_hits
        self.chunk_misses += walk.n_missed
        self.chunk_miss_chars += walk.chunk_miss_chars
        self.lookup_chars += walk.view.n_units
        self.short_hits += walk.short_hits
        self.short_misses += walk.short_misses
        self.tokens += n_ids


@cython.final
cdef class CodePoints:
    """A set of code points, given as inclusive (first, last) ranges."""

    cdef uint8_t[0x10000] basic   # 1 for each member below 0x10000
    cdef uint8_t[0x20000] beyond  # one bit for each code point from 0x10000 on
    cdef bint has_text            # all visible ASCII and ASCII white space are members

    def __cinit__(self, ranges):
        cdef uint32_t first, last, point
        memset(&self.basic[0], 0, sizeof(self.basic))
        memset(&self.beyond[0], 0, sizeof(self.beyond))
        for first, last in ranges:
            if first < 0x10000:
                memset(&self.basic[first], 1, min(last, <uint32_t> 0xFFFF) + 1 - first)
            for point in range(max(first, <uint32_t> 0x10000), last + 1):
                self.beyond[(point - 0x10000) >> 3] |= 1 << (point & 7)
        self.has_text = True
        for point in range(9, 0x7F):
            if (point <= 13 or point >= 0x20) and not self.basic[point]:
                self.has_text = False

    def __init__(self, ranges):
        pass

    def cover(self, str text):
        """Return whether every character of `text` is in the set."""
        cdef Text t
        PyUnicode_READY(text)
        t.data = <const uint8_t*> PyUnicode_DATA(text)
        t.n_units = PyUnicode_GET_LENGTH(text)
        t.kind = PyUnicode_KIND(text)
        return bool(self.cover_part(&t, 0, t.n_units))

    cdef bint cover_part(self, const Text* t, size_t start, size_t stop) noexcept:
        """Return whether every character of a range is in the set."""
        cdef const uint16_t* two = <const uint16_t*> t.data
        cdef const uint32_t* four = <const uint32_t*> t.data
        cdef size_t i, end
        cdef uint32_t unit
        cdef uint8_t are_in = 1
        while start < stop:
            end = min(start + 64, stop)
            if not (self.has_text and is_plain(t, start, end)):
                if t.kind == 1:
                    for i in range(start, end):
                        are_in &= self.basic[t.data[i]]
                elif t.kind == 2:
                    for i in range(start, end):
                        are_in &= self.basic[two[i]]
                else:
                    for i in range(start, end):
                        unit = four[i]
                        if unit < 0x10000:
                            are_in &= self.basic[unit]
                        else:
                            are_in &= self.beyond[(unit - 0x10000) >> 3] >> (unit & 7)
                if not are_in:
                    return False
            start = end
        return True


@cython.final
cdef class TokenBytes:
    """The number of bytes of text that each token id stands for.

    `length_of(id)` returns it for an id below `n_ids`, or 0 if it is unknown; it is called once for
    each id that occurs. `exact()` returns the code points that are encoded unchanged; Latin-1
    always is, and without `exact` all code points are.
    """

    cdef uint8_t* sizes    # the length of each id + 1; 0 if it was not asked for yet
    cdef uint32_t n_ids
    cdef object length_of
    cdef object exact
    cdef CodePoints covered

    def __cinit__(self, n_ids, length_of, exact=None):
        self.n_ids = n_ids
        self.length_of = length_of
        self.exact = exact
        self.sizes = <uint8_t*> calloc(self.n_ids + 1, 1)
        if self.sizes == NULL:
            raise MemoryError

    def __init__(self, n_ids, length_of, exact=None):
        pass

    def __dealloc__(self):
        free(self.sizes)

    def fill(self, list sizes):
        """Set the lengths of the first ids, 0 for an unknown one."""
        cdef size_t i
        for i in range(min(<size_t> len(sizes), <size_t> self.n_ids)):
            self.keep(i, sizes[i])

    cdef inline uint32_t of_id(self, int index) except? 0:
        if index < 0 or <uint32_t> index >= self.n_ids:
            return 0
        if self.sizes[index] == 0:
            self.keep(index, self.length_of(index))
        return self.sizes[index] - 1

    cdef inline void keep(self, size_t index, size_t size) noexcept:
        self.sizes[index] = <uint8_t> (size + 1) if size <= LONGEST else 1

    cdef uint32_t of_part(self, const Text* t, size_t start, size_t stop) except? 0:
        """Return the UTF-8 bytes of a range, or 0 if some characters are not encoded unchanged."""
        cdef size_t i, n = stop - start
        cdef const uint16_t* two = <const uint16_t*> t.data
        cdef const uint32_t* four = <const uint32_t*> t.data
        cdef uint32_t together = bits_of(t, start, stop)
        if together < 0x80:
            return <uint32_t> n
        if t.kind == 1:
            for i in range(start, stop):
                n += t.data[i] >> 7
            return <uint32_t> n
        if self.exact is not None and together > 0xFF:
            if self.covered is None:
                self.covered = self.exact()
            if not self.covered.cover_part(t, start, stop):
                return 0
        if t.kind == 2:
            for i in range(start, stop):
                n += (two[i] > 0x7F) + (two[i] > 0x7FF)
        else:
            for i in range(start, stop):
                n += (four[i] > 0x7F) + (four[i] > 0x7FF) + (four[i] > 0xFFFF)
        return <uint32_t> n


cdef bint is_plain(const Text* t, size_t start, size_t stop) noexcept nogil:
    """Return whether a range is visible ASCII and ASCII white space; the loops are vectorized."""
    cdef const uint16_t* two = <const uint16_t*> t.data
    cdef const uint32_t* four = <const uint32_t*> t.data
    cdef uint8_t one, others_one = 0
    cdef uint16_t unit_two, others_two = 0
    cdef uint32_t unit, others = 0
    cdef size_t i
    if t.kind == 1:
        for i in range(start, stop):
            one = t.data[i]
            others_one |= (<uint8_t> (one - 0x20) > 0x5E) & (<uint8_t> (one - 9) > 4)
        return others_one == 0
    if t.kind == 2:
        for i in range(start, stop):
            unit_two = two[i]
            others_two |= (<uint16_t> (unit_two - 0x20) > 0x5E) & (<uint16_t> (unit_two - 9) > 4)
        return others_two == 0
    for i in range(start, stop):
        unit = four[i]
        others |= (unit - 0x20 > 0x5E) & (unit - 9 > 4)
    return others == 0


cdef inline const uint8_t* latin_block(const Text* t, size_t i, uint8_t* room) noexcept nogil:
    """Return a pointer to the 64 units from `i` on as bytes, or NULL if one is wider than a byte.

    The WINDOW units before `i` precede them. Bytes after the end of the text are undefined. `room`
    has WINDOW + 64 bytes.
    """
    cdef size_t start = i - min(i, <size_t> WINDOW), stop = min(i + 64, t.n_units), j
    cdef const uint16_t* two = <const uint16_t*> t.data + start
    cdef const uint32_t* four = <const uint32_t*> t.data + start
    cdef uint8_t* into = room + WINDOW - (i - start)
    cdef uint32_t together = 0
    if t.kind == 1:
        if stop == i + 64:
            return t.data + i
        memcpy(into, t.data + start, stop - start)
        return room + WINDOW
    if t.kind == 2:
        for j in range(stop - start):
            into[j] = <uint8_t> two[j]
            together |= two[j]
    else:
        for j in range(stop - start):
            into[j] = <uint8_t> four[j]
            together |= four[j]
    return room + WINDOW if together < 0x100 else NULL


cdef TokenIds ids_of(const int32_t* ids, size_t n):
    cdef TokenIds owner = new_owner(n)
    memcpy(owner_data(owner), ids, n * sizeof(int32_t))
    return owner


cdef list by_age(list columns):
    """Return the columns as rows, youngest first; the first column, the age, is left out."""
    return [row[1:] for row in sorted(zip(*columns), key=itemgetter(0))]


cdef inline bint short_key(const Text* t, size_t start, size_t stop, Short* key) noexcept:
    """Fill in the key of a short segment; return False if the segment is too long."""
    cdef uint32_t width
    if stop - start > SHORT_BYTES:
        return False
    width = width_of(t, start, stop)
    if (stop - start) * width > SHORT_BYTES:
        return False
    memset(key, 0, sizeof(Short))
    narrow(t, start, stop, width, &key.key[0])
    key.width = <uint8_t> width
    key.n_bytes = <uint8_t> ((stop - start) * width)
    return True


cdef int read_plan(Plan* plan, source) except -1:
    from tokcache.text.cuts.char_classes import BMP_CLASSES

    plan.classes = <const uint8_t*> <const char*> <bytes> BMP_CLASSES  # the module keeps it alive
    memcpy(plan.coarse, <const char*> <bytes> source.coarse, 256)
    memcpy(plan.fine, <const char*> <bytes> source.fine, 256)
    memcpy(plan.seams, <const char*> <bytes> source.seams, 256)
    for left in range(N_CLASSES):
        for right in range(N_CLASSES):
            found = [source.coarse[one * N_CLASSES + class_after(right, one)] for one in (
                (NEWLINE, NEWLINE_RUN) if left == NEWLINE else (left,)
            )]
            plan.places[left * N_CLASSES + right] = any(found)
    fill_pairs(&plan.place_pairs, plan.places)
    for i in range(3):
        plan.variant_of[i] = source.variant_of[i]
    # A newline at the start of a piece counts as one after a visible character, unless the
    # tokenizer puts something before the piece.
    plan.piece_left = LETTER if len(source.variants) == 1 else OTHER
    return read_tokens(plan, source.separators)


cdef int read_tokens(Plan* plan, separators) except -1:
    cdef size_t n_nodes = 1 + sum([len(one.content) for one in separators])
    cdef size_t n_slots = 2
    cdef uint32_t node, n = 1
    cdef uint32_t* slot
    while n_slots < 2 * n_nodes:
        n_slots *= 2
    plan.last_slot = n_slots - 1
    plan.nodes = <Node*> calloc(n_nodes + 1, sizeof(Node))
    plan.children = <uint32_t*> calloc(n_slots, sizeof(uint32_t))
    plan.tokens = <Token*> calloc(len(separators) + 1, sizeof(Token))
    if plan.nodes == NULL or plan.children == NULL or plan.tokens == NULL:
        raise MemoryError
    plan.nodes[0].token = -1
    plan.n_tokens = len(separators)
    firsts = {one.content[0] for one in separators}
    for first in firsts:
        if ord(first) < 128:
            plan.starts[<uint32_t> ord(first)] = 1
        else:
            plan.starts_beyond = 1
    if len(firsts) == 1 and not plan.starts_beyond:
        plan.only_start = ord(firsts.pop())
    for i, one in enumerate(separators):
        node = 0
        for char in one.content:
            slot = child_slot(plan, node, ord(char))
            if slot[0] == 0:
                slot[0] = n
                plan.nodes[n].unit = ord(char)
                plan.nodes[n].parent = node
                plan.nodes[n].token = -1
                n += 1
            node = slot[0]
        plan.nodes[node].token = i
        plan.tokens[i].id = one.id
        plan.tokens[i].flags = (
            (LSTRIP if one.lstrip else 0) | (RSTRIP if one.rstrip else 0)
            | (SINGLE_WORD if one.single_word else 0) | (IN_PIECE if one.in_piece else 0)
            | (SKIPS if one.skips else 0) | (OPENS if one.opens else 0)
        )
    plan.nodes[n].parent = NO_UNIT  # the entry after the last node has no parent
    return 0
