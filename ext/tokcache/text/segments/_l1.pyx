# cython: binding=False, embedsignature=True, embedsignature.format=clinic
"""SegmentCache: the token ids of chunks and segments, found by content in any text.

The classes here turn Python objects into the tables of the .pxd files, and back: `_store` holds the
entries, `_find` and `_keep` look up and store, `_lookup` is the state of one text in between.
"""

cimport cython
from cpython.buffer cimport PyBuffer_IsContiguous
from cpython.memoryview cimport PyMemoryView_FromObject, PyMemoryView_GET_BUFFER
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from operator import itemgetter
from os import environ, urandom

from tokcache.stats import L1Stats

from tokcache.text._digest cimport N_SECRETS
from tokcache.text._evictions cimport N_WHY
from tokcache.text._places cimport has_vectors
from tokcache.text._token_ids cimport TokenIds, ids_data, new_owner, owner_data
from tokcache.text.segments._beginnings cimport Beginning, beginnings_bytes, bytes_of
from tokcache.text.segments._chunker cimport N_SEEDS, chunk_end
from tokcache.text.segments._chunks cimport (
    NO_CHUNK, Chunk, chunk_item_bytes, key_of, no_link,
)
from tokcache.text.segments._find cimport NO_MEMORY, REFUSED, look_up
from tokcache.text.segments._id_lengths cimport (
    Lengths, PointSet, add_points, covers, has_all_text, is_unasked, set_length,
)
from tokcache.text.segments._keep cimport (
    KEPT, N_OUTCOMES, PRESENT, count_answer, fill_chunk, fill_segment, greatest_age, keep,
    n_answer_ids, older, write_answer,
)
from tokcache.text.segments._keys cimport narrow
from tokcache.text.segments._lookup cimport (
    APART, FITS, LAST, UNTOLD, Lookup, Pending, begin_lookup, end_beginning, lookup_bytes, pick,
    release_lookup, take_ids,
)
from tokcache.text.segments._plan cimport read_plan
from tokcache.text.segments._scan cimport N_CLASSES, Text, bits_of
from tokcache.text.segments._segmenter cimport END, SPAN, Span, Spans, begin_spans, next_span
from tokcache.text.segments._segments cimport PENDING, WAYS, Segment
from tokcache.text.segments._store cimport (
    BEGINNING_SHARE, N_REASONS, POST_PROCESSOR, TOO_LONG, Store, make_segment_room, release_store,
    remove_all, remove_scope, store_bytes,
)

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

cdef enum:
    SPARE_BYTES = 1 << 17  # a Walk with larger arrays is not reused for the next text
    MAX_CLEARED = 1024     # scopes whose last clear is remembered individually

cdef tuple REASONS = (  # as `_store` numbers them
    "post_processor", "surrogate", "too_long", "beside_single_word", "cleared", "no_cut",
    "oversize", "memory",
)
cdef tuple WHY = ("new", "evicted", "not_known")  # as `_evictions` numbers them
cdef bint uses_vectors = has_vectors() and environ.get("TOKCACHE_NO_VECTORS") != "1"
cdef Lengths no_lengths
memset(&no_lengths, 0, sizeof(no_lengths))


def use_vectors(bint wanted):
    """Have caches made from now on use AVX2, if the CPU has it, or not; return whether they do."""
    global uses_vectors
    uses_vectors = wanted and has_vectors()
    return uses_vectors


@cython.final
cdef class Walk:
    """The look-up of one text: its cached ids, and the segments that the engine must encode."""

    cdef SegmentCache cache
    cdef str text              # None after `finish`
    cdef bint add_special_tokens
    cdef uint64_t since        # n_clears of the cache when the call began
    cdef Lookup found
    cdef list held             # the engine's answers, which `Pending.ids` points into

    def __dealloc__(self):
        release_lookup(&self.found)

    @property
    def n_chars(self):
        """Number of characters that the engine has yet to encode."""
        cdef size_t i, total = 0
        for i in range(self.found.n_pending):
            if not self.found.pending[i].is_encoded:
                total += self.found.pending[i].stop - self.found.pending[i].start
        return total

    def joined(
        self, uint32_t variant, int space_variant, str between, IdLengths lengths,
        CodePoints agreed, size_t max_chars, size_t max_apart,
    ):
        """Return texts that together contain all segments that `variant` has yet to encode.

        Segments of `space_variant` (-1: none) are included with a space before each: with it
        `variant` gives the same ids as the other variant without. A text has at most `max_chars`
        characters, or one segment, and contains `between`, which is ASCII, at most `max_apart`
        times. `between` is put between two segments, unless these may be adjacent and the id
        lengths show where each ends. With `agreed`, only segments of these code points and of at
        most `max_chars` characters are included.
        """
        cdef size_t i, first = 0
        cdef list texts = []
        cdef const PointSet* exact = NULL
        cdef const PointSet* wanted = NULL
        if lengths is not None:
            exact = lengths.exact_in(&self.found.text)
        if agreed is not None:
            wanted = &agreed.points
        if not pick(
            &self.found, &self.cache.store.chunker.plan, variant, space_variant,
            lengths is not None, exact, wanted, max_chars, max_apart,
        ):
            raise MemoryError
        for i in range(self.found.n_picked):
            if self.found.pending[self.found.picked[i]].after == LAST:
                texts.append(self.joined_text(first, i + 1, space_variant, between))
                first = i + 1
        return texts

    def take(self, list encoded, int separator, IdLengths lengths):
        """Assign the ids of the texts that `joined` returned to the segments; return True.

        Return False if the ids do not fit the segments, None if the length of an id is unknown.
        Each item of `encoded` is a list or a buffer of 32-bit integers.
        """
        cdef size_t i, n, began, at = 0
        cdef list held = []
        cdef int outcome = FITS
        cdef const int32_t* ids
        cdef const Lengths* table = &no_lengths
        cdef TokenIds copied
        cdef Py_buffer* view
        if lengths is not None:
            table = &lengths.lengths
        for one in encoded:
            if isinstance(one, list):
                copied = TokenIds(one)
                held.append(copied)
                ids = <const int32_t*> ids_data(copied)
                n = copied.n_tokens
            else:
                one = PyMemoryView_FromObject(one)
                held.append(one)  # keeps the buffer alive and in place
                view = PyMemoryView_GET_BUFFER(one)
                if not PyBuffer_IsContiguous(view, b"C"):
                    raise BufferError("an encoder's ids must lie side by side")
                ids = <const int32_t*> view.buf
                n = view.len // sizeof(int32_t)
            began = at
            outcome = take_ids(&self.found, &at, ids, n, separator, table)
            if outcome == UNTOLD and lengths is not None:  # the first time that an id occurs
                lengths.ask(ids, n)
                at = began
                outcome = take_ids(&self.found, &at, ids, n, separator, table)
            if outcome != FITS:
                break
        if outcome != FITS or at != self.found.n_picked:
            return None if outcome == UNTOLD else False
        self.held = held if self.held is None else self.held + held
        for i in range(self.found.n_picked):
            self.found.pending[self.found.picked[i]].is_encoded = True
        return True

    def finish(self):
        """Store the encoded segments and return the ids of the whole text."""
        cdef size_t i
        if self.text is None:
            raise RuntimeError("finish() was called before")
        for i in range(self.found.n_pending):
            if not self.found.pending[i].is_encoded:
                raise RuntimeError("finish() before every segment was taken")
        return self.cache.finish(self)

    cdef int begin(self, str text, uint64_t scope, int32_t serial) except -1:
        self.text = text
        begin_lookup(&self.found, text_of(text), scope, serial)
        return 0

    cdef str joined_text(self, size_t first, size_t stop, int space_variant, str between):
        """Return the text of the picked segments from `first` to `stop`."""
        cdef const Text* text = &self.found.text
        cdef uint32_t bits = 0x7F, kind
        cdef Py_ssize_t n_between = PyUnicode_GET_LENGTH(between), n_added = 0, n_own = 0, at = 0
        cdef size_t i
        cdef uint8_t* data
        cdef const Pending* one
        for i in range(first, stop):
            one = &self.found.pending[self.found.picked[i]]
            bits |= bits_of(text, one.start, one.stop)
            n_own += one.stop - one.start
            n_added += <int> one.variant == space_variant
            n_added += n_between if one.after == APART else 0
        if n_added == 0 and <size_t> n_own == text.n_units:
            return self.text  # the segments are the whole text
        joined = PyUnicode_New(n_own + n_added, min(bits, <uint32_t> 0x10FFFF))
        kind = PyUnicode_KIND(joined)  # not wider than that of the text
        data = <uint8_t*> PyUnicode_DATA(joined)
        for i in range(first, stop):
            one = &self.found.pending[self.found.picked[i]]
            if <int> one.variant == space_variant:
                PyUnicode_CopyCharacters(joined, at, " ", 0, 1)
                at += 1
            narrow(text, one.start, one.stop, kind, data + at * kind)
            at += one.stop - one.start
            if one.after == APART:
                PyUnicode_CopyCharacters(joined, at, between, 0, n_between)
                at += n_between
        return joined


@cython.final
cdef class SegmentCache:
    """The token ids of chunks and short segments of texts, cut as `plan` (a CutPlan) says.

    Units:   `max_bytes` is for keys, ids and tables; working memory and the memory of evictions
             take up to 450 KiB more.
    Cost:    one compare and one copy of the ids per cached chunk; an uncached chunk is scanned
             once. Only the answer is allocated.
    Threads: safe under the interpreter lock.
    Source:  content-defined chunks: FastCDC (Xia et al., USENIX ATC 2016).
    """

    cdef Store store
    cdef uint32_t n_variants
    cdef int32_t serial        # of the last look-up
    cdef object prefixes       # by add_special_tokens: TokenIds or None
    cdef object suffixes
    cdef Walk spare
    # A look-up that began before its scope was cleared stores nothing.
    cdef readonly uint64_t n_clears  # number of clears, of one scope or of all
    cdef dict cleared          # scope -> n_clears at its last clear
    cdef uint64_t cleared_all  # n_clears at the last clear of all, or when `cleared` was full

    def __cinit__(self, plan, max_bytes, cuts_fine=True):
        cdef bytes random = urandom(8 * N_SECRETS + 8)
        self.store.max_bytes = max_bytes
        self.store.cuts_fine = cuts_fine
        self.store.head = no_link()
        memcpy(&self.store.secret[0], <const char*> random, 8 * N_SECRETS)
        memcpy(&self.store.rng, <const char*> random + 8 * N_SECRETS, 8)
        self.cut_seed = urandom(8 * N_SEEDS)
        self.store.chunker.uses_vectors = uses_vectors
        read_plan(&self.store.chunker.plan, plan)
        self.n_variants = len(plan.variants)
        prefixes, suffixes = [], []
        for affixes in plan.affixes:
            prefixes.append(TokenIds(affixes[0]) if affixes else None)
            suffixes.append(TokenIds(affixes[1]) if affixes else None)
        self.prefixes = tuple(prefixes)
        self.suffixes = tuple(suffixes)
        self.cleared = {}

    def __init__(self, plan, max_bytes, cuts_fine=True):
        pass

    def __dealloc__(self):
        release_store(&self.store)

    @property
    def max_bytes(self):
        return self.store.max_bytes

    @property
    def cuts_fine(self):
        return bool(self.store.cuts_fine)

    @cuts_fine.setter
    def cuts_fine(self, bint cuts_fine):
        # Entries stay valid: the flag only says into what a missing chunk is split.
        self.store.cuts_fine = cuts_fine

    def look(self, str text not None, bint add_special_tokens, uint64_t scope, since=None):
        """Return the ids of `text` if all of it is cached, else a Walk with the segments to encode.

        Return None, counted by reason, if the text can't be cut safely. Nothing is stored if the
        scope was cleared after `n_clears` was `since`, or is cleared before the Walk is finished.
        """
        cdef Walk walk
        cdef int outcome
        if self.prefixes[add_special_tokens] is None:
            self.store.counts.refusals[POST_PROCESSOR] += 1
            return None
        if PyUnicode_GET_LENGTH(text) >= 1 << 31:
            self.store.counts.refusals[TOO_LONG] += 1
            return None
        walk = self.spare
        self.spare = None
        if walk is None:
            walk = Walk.__new__(Walk)
            walk.cache = self
        self.serial = self.serial + 1 if self.serial < 0x7FFFFFF0 else 1
        walk.begin(text, scope, self.serial)
        walk.add_special_tokens = add_special_tokens
        walk.since = self.n_clears if since is None else since
        walk.found.keeps = not self.was_cleared(walk)
        outcome = look_up(&self.store, &walk.found)
        if outcome == NO_MEMORY:
            raise MemoryError
        if outcome == REFUSED:
            self.put_by(walk)
            return None
        if walk.found.n_pending:
            return walk
        if walk.found.n_missed:
            return self.finish(walk)
        return self.answer(walk)

    def clear(self, scope=None, n_clears=None):
        """Remove all entries and set the counters to zero, or remove those of `scope` only.

        `n_clears` is the new value of that attribute; by default it grows by one.
        """
        self.n_clears = self.n_clears + 1 if n_clears is None else n_clears
        if scope is not None and len(self.cleared) < MAX_CLEARED:
            self.cleared[scope] = self.n_clears
        else:
            self.cleared_all = self.n_clears
            self.cleared = {}
        if scope is None:
            remove_all(&self.store)
        else:
            remove_scope(&self.store, scope)

    def memory_usage(self):
        """Return the bytes held: keys, ids and tables."""
        return store_bytes(&self.store)

    def stats(self):
        """Return a copy of the counters."""
        cdef int i
        counts = self.store.counts
        return L1Stats(
            hits=counts.hits,
            misses=counts.misses,
            chunk_hits=counts.chunk_hits,
            chunk_misses=counts.chunk_misses,
            segment_hits=counts.segment_hits,
            segment_misses=counts.segment_misses,
            chunk_misses_by_reason={
                WHY[i]: counts.chunk_misses_by_reason[i] for i in range(N_WHY)
            },
            segment_misses_by_reason={
                WHY[i]: counts.segment_misses_by_reason[i] for i in range(N_WHY)
            },
            lookup_chars=counts.lookup_chars,
            chunk_miss_chars=counts.chunk_miss_chars,
            engine_chars=counts.engine_chars,
            engine_tokens=counts.engine_tokens,
            tokens=counts.tokens,
            insertions=counts.insertions,
            evictions=counts.evictions,
            refusals={
                REASONS[i]: counts.refusals[i] for i in range(N_REASONS) if counts.refusals[i]
            },
            n_chunks=self.store.chunks.n,
            n_segments=self.store.segments.n,
            n_bytes=store_bytes(&self.store),
        )

    def cut(self, str text not None, bint fine):
        """Return the chunks (or with `fine` the segments) of `text` as (start, stop, is_token).

        Return None if the text can't be cut. For `explain` and tests.
        """
        cdef Text t = text_of(text)
        cdef size_t p = 0, end = 0
        cdef uint32_t end_class = 0
        cdef Spans spans
        cdef Span span
        cdef int outcome
        found = []
        while p < t.n_units:
            if not chunk_end(&self.store.chunker, &t, p, &end, &end_class):
                return None
            if not fine:
                found.append((p, end, False))
            else:
                spans = begin_spans(
                    &self.store.chunker.plan, &t, p, end, 0, self.store.cuts_fine
                )
                outcome = SPAN
                while outcome == SPAN:
                    outcome = next_span(&self.store.chunker.plan, &t, &spans, &span)
                    if outcome == SPAN:
                        found.append((span.start, span.stop, bool(span.is_token)))
                if outcome != END:
                    return None
            p = end
        return found

    # ---- dump and load

    @property
    def cut_seed(self):
        """The secret that chooses where chunks end: dumped chunks are useful only with it."""
        return (<const char*> &self.store.chunker.seed[0])[:8 * N_SEEDS]

    @cut_seed.setter
    def cut_seed(self, bytes seed):
        if len(seed) != 8 * N_SEEDS:
            raise ValueError(f"a cut seed has {8 * N_SEEDS} bytes, not {len(seed)}")
        memcpy(&self.store.chunker.seed[0], <const char*> seed, 8 * N_SEEDS)

    def held_chunks(self):
        """Return (text, ids, scope, variant, end_class, is_tail) of every chunk, newest first."""
        cdef list columns = []
        cdef uint32_t i
        cdef const Chunk* one
        while not columns or len(columns[0]) != self.store.chunks.n:
            # Again if the allocation ran other code that changed the table.
            columns = empty_columns(7, self.store.chunks.n)
        ages, texts, ids, scopes, variants, end_classes, tails = columns
        for i in range(self.store.chunks.n):
            one = &self.store.chunks.all[i]
            ages[i] = self.store.clock - one.tick
            texts[i] = PyUnicode_FromKindAndData(one.width, key_of(one), one.n_units)
            ids[i] = ids_of(one.ids, one.n_ids)
            scopes[i] = one.scope
            variants[i] = one.variant
            end_classes[i] = one.end_class
            tails[i] = bool(one.is_tail)
        return by_age(columns)

    def held_segments(self):
        """Return (text, ids, scope, variant) of every short segment, newest first."""
        cdef list columns = []
        cdef uint32_t i, n = 0
        cdef const Segment* one
        while not columns or len(columns[0]) != self.store.segments.n:
            # Again if the allocation ran other code that changed the table.
            columns = empty_columns(5, self.store.segments.n)
        ages, texts, ids, scopes, variants = columns
        for i in range(self.store.segments.n_sets * WAYS):
            one = &self.store.segments.all[i]
            if one.tick == 0 or one.n_ids == PENDING:
                continue
            ages[n] = self.store.clock - one.tick
            texts[n] = PyUnicode_FromKindAndData(
                one.width, &one.key[0], one.n_bytes // one.width
            )
            ids[n] = ids_of(&one.ids[0], one.n_ids)
            scopes[n] = one.scope
            variants[n] = one.variant
            n += 1
        for i in range(5):
            columns[i] = columns[i][:n]
        return by_age(columns)

    def fill_chunks(self, rows):
        """Store chunks in the form that `held_chunks` returns, without evicting any.

        They count as older than all present entries. Return the number stored, and the number that
        were already present.
        """
        cdef uint32_t age = greatest_age(&self.store)
        cdef Py_ssize_t[N_OUTCOMES] n
        cdef Walk walk = Walk.__new__(Walk)
        cdef TokenIds own
        memset(n, 0, sizeof(n))
        for text, ids, scope, variant, end_class, is_tail in rows:
            if not 0 <= variant < self.n_variants or not 0 <= end_class < N_CLASSES:
                raise ValueError(f"no chunk has variant {variant} and end class {end_class}")
            walk.begin(text, scope, 0)
            own = TokenIds(ids)
            age = older(&self.store, age)
            n[fill_chunk(
                &self.store, &walk.found, <const int32_t*> ids_data(own), own.n_tokens, variant,
                end_class, is_tail, age,
            )] += 1
        return n[KEPT], n[PRESENT]

    def fill_segments(self, rows):
        """Store short segments in the form that `held_segments` returns; like `fill_chunks`."""
        cdef uint32_t age = greatest_age(&self.store), n_sets = 0
        cdef Py_ssize_t[N_OUTCOMES] n
        cdef Walk walk = Walk.__new__(Walk)
        cdef TokenIds own
        memset(n, 0, sizeof(n))
        rows = list(rows) if self.store.cuts_fine else []
        while True:  # doubled until they have room or the budget is used
            n_sets = self.store.segments.n_sets
            make_segment_room(&self.store, len(rows), False)
            if n_sets == self.store.segments.n_sets:
                break
        for text, ids, scope, variant in rows:
            if not 0 <= variant < self.n_variants:
                raise ValueError(f"no segment has variant {variant}")
            walk.begin(text, scope, 0)
            own = TokenIds(ids)
            age = older(&self.store, age)
            n[fill_segment(
                &self.store, &walk.found, <const int32_t*> ids_data(own), own.n_tokens, variant,
                age,
            )] += 1
        return n[KEPT], n[PRESENT]

    @property
    def _uses_vectors(self):
        """Whether cuts are found with AVX2; for tests."""
        return bool(self.store.chunker.uses_vectors)

    @property
    def _n_beginnings(self):
        """Number of beginnings of texts; for tests."""
        return self.store.beginnings.n

    def _check(self):
        """Verify every invariant; for tests."""
        cdef uint32_t i, j, n = 0
        cdef uint64_t n_bytes = 0
        cdef const Chunk* one
        assert store_bytes(&self.store) <= self.store.max_bytes
        for i in range(self.store.chunks.n):
            one = &self.store.chunks.all[i]
            n_bytes += chunk_item_bytes(one.n_ids, one.n_units, one.width)
            j = self.store.chunks.buckets[one.digest & (self.store.chunks.capacity - 1)]
            while j != i:
                assert j != NO_CHUNK
                j = self.store.chunks.all[j].chain
        assert n_bytes == self.store.chunks.item_bytes
        for i in range(self.store.segments.n_sets * WAYS):
            n += self.store.segments.all[i].tick != 0
        assert n == self.store.segments.n
        self.check_beginnings()

    # ---- inside

    cdef int check_beginnings(self) except -1:
        cdef uint32_t i, j, end, n_ids
        cdef uint64_t n_bytes = 0
        cdef const Beginning* one
        assert BEGINNING_SHARE * beginnings_bytes(&self.store.beginnings) <= self.store.max_bytes
        for i in range(self.store.beginnings.n):
            one = &self.store.beginnings.all[i]
            n_bytes += bytes_of(one)
            end = n_ids = 0
            for j in range(one.n_stops):
                assert one.stops[j].end > end and one.stops[j].n_ids >= n_ids
                assert j + 1 == one.n_stops or not one.stops[j].is_tail
                end, n_ids = one.stops[j].end, one.stops[j].n_ids
            assert end == one.n_units <= one.text_capacity
            assert n_ids <= one.block.capacity and one.block.n_holders
        assert n_bytes == self.store.beginnings.item_bytes
        return 0

    cdef bint was_cleared(self, Walk walk) except -1:
        """Return whether the scope of a Walk was cleared since its call began."""
        return walk.since != self.n_clears and (
            self.cleared_all > walk.since or self.cleared.get(walk.found.scope, 0) > walk.since
        )

    cdef TokenIds finish(self, Walk walk):
        keep(&self.store, &walk.found, not self.was_cleared(walk))
        return self.answer(walk)

    cdef TokenIds answer(self, Walk walk):
        """Return the ids of the text with its affixes, and update the counters."""
        cdef TokenIds prefix = self.prefixes[walk.add_special_tokens]
        cdef TokenIds suffix = self.suffixes[walk.add_special_tokens]
        cdef size_t n = n_answer_ids(&walk.found)
        cdef TokenIds ids = new_owner(prefix.n_tokens + n + suffix.n_tokens)
        cdef int* into = owner_data(ids)
        memcpy(into, ids_data(prefix), prefix.n_tokens * sizeof(int32_t))
        into += prefix.n_tokens
        write_answer(&self.store, &walk.found, <int32_t*> into)
        memcpy(into + n, ids_data(suffix), suffix.n_tokens * sizeof(int32_t))
        count_answer(&self.store, &walk.found, n)
        self.put_by(walk)
        return ids

    cdef void put_by(self, Walk walk):
        """Keep a Walk for use by the next text, unless its arrays are large."""
        end_beginning(&walk.found)
        walk.text = None
        walk.held = None
        if lookup_bytes(&walk.found) <= SPARE_BYTES:
            self.spare = walk


@cython.final
cdef class CodePoints:
    """A set of code points, given as inclusive (first, last) ranges."""

    cdef PointSet points

    def __cinit__(self, ranges):
        for first, last in ranges:
            add_points(&self.points, first, last)
        self.points.has_text = has_all_text(&self.points)

    def __init__(self, ranges):
        pass

    def cover(self, str text not None):
        """Return whether every character of `text` is in the set."""
        cdef Text t = text_of(text)
        return bool(covers(&self.points, &t, 0, t.n_units))


@cython.final
cdef class IdLengths:
    """The number of bytes of text that each token id stands for.

    `length_of(id)` returns it for an id below `n_ids`, or 0 if it is unknown; it is called once for
    each id that occurs. `exact()` returns the code points that are encoded unchanged; Latin-1
    always is, and without `exact` all code points are.
    """

    cdef Lengths lengths
    cdef object length_of
    cdef object exact
    cdef CodePoints unchanged  # the answer of `exact`

    def __cinit__(self, n_ids, length_of, exact=None):
        self.lengths.n_ids = n_ids
        self.lengths.sizes = <uint8_t*> calloc(self.lengths.n_ids + 1, 1)
        if self.lengths.sizes == NULL:
            raise MemoryError
        self.length_of = length_of
        self.exact = exact

    def __init__(self, n_ids, length_of, exact=None):
        pass

    def __dealloc__(self):
        free(self.lengths.sizes)

    def fill(self, list lengths):
        """Set the lengths of the first ids, 0 for an unknown one."""
        cdef size_t i
        for i in range(min(<size_t> len(lengths), <size_t> self.lengths.n_ids)):
            set_length(&self.lengths, i, lengths[i])

    cdef int ask(self, const int32_t* ids, size_t n) except -1:
        """Call `length_of` for the ids that were not met before."""
        cdef size_t i
        for i in range(n):
            if is_unasked(&self.lengths, ids[i]):
                set_length(&self.lengths, ids[i], self.length_of(ids[i]))
        return 0

    cdef const PointSet* exact_in(self, const Text* t) except? NULL:
        """Return the code points that are encoded unchanged; NULL if all in the text are."""
        if self.exact is None or t.kind == 1:
            return NULL
        if self.unchanged is None:
            self.unchanged = self.exact()
        return &self.unchanged.points


cdef Text text_of(str text):
    cdef Text t
    PyUnicode_READY(text)
    t.data = <const uint8_t*> PyUnicode_DATA(text)
    t.n_units = PyUnicode_GET_LENGTH(text)
    t.kind = PyUnicode_KIND(text)
    return t


cdef TokenIds ids_of(const int32_t* ids, size_t n):
    cdef TokenIds owner = new_owner(n)
    memcpy(owner_data(owner), ids, n * sizeof(int32_t))
    return owner


cdef list empty_columns(int n_columns, Py_ssize_t n_rows):
    cdef list columns = []
    for _ in range(n_columns):
        columns.append([None] * n_rows)
    return columns


cdef list by_age(list columns):
    """Return the columns as rows, youngest first; the first column, the age, is left out."""
    return list(map(itemgetter(slice(1, None)), sorted(zip(*columns), key=itemgetter(0))))
