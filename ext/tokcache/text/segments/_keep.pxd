# Stores the chunks and segments that were encoded, or loaded from elsewhere.
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy

from tokcache.text._evictions cimport N_WHY
from tokcache.text.segments._beginnings cimport block_ids
from tokcache.text.segments._chunks cimport (
    NO_CHUNK, Chunk, Link, add_chunk, bytes_to_grow, chunk_item_bytes, find_chunk, grow_chunks,
    link_to, no_link, put_follower,
)
from tokcache.text.segments._find cimport STORED_UNITS
from tokcache.text.segments._keys cimport narrow, width_of
from tokcache.text.segments._lookup cimport (
    Lookup, Missed, Pending, count_ids, end_missed, push_known, push_missed, write_ids,
)
from tokcache.text.segments._segments cimport (
    SEGMENT_IDS, WAYS, Segment, find_segment, place_segment, segment_digest, segment_key,
    vacate_segment,
)
from tokcache.text.segments._store cimport (
    CLEARED, NO_CUT, OUT_OF_MEMORY, OVERSIZE, Store, advance_clock, chunk_digest, has_room,
    make_room, place_in, place_new_segment,
)

cdef enum:
    NO_ROOM = 0            # outcomes of `fill_chunk` and `fill_segment`
    KEPT = 1
    PRESENT = 2
    N_OUTCOMES = 3


# ---- after the engine

cdef inline void keep(Store* s, Lookup* l, bint may_store) noexcept nogil:
    """Store the encoded segments and the missing chunks, and link the chunks in their order."""
    cdef uint32_t place, before
    cdef Link link = no_link()
    cdef const Missed* missed
    cdef size_t i
    advance_clock(s)
    for i in range(l.n_pending):
        s.counts.engine_chars += l.pending[i].stop - l.pending[i].start
        s.counts.engine_tokens += l.pending[i].n_ids
        if l.pending[i].is_short and may_store:
            keep_segment(s, l, &l.pending[i])
    if not may_store:
        s.counts.refusals[CLEARED] += 1
        return
    for i in range(l.n_missed):
        missed = &l.missed[i]
        place = keep_chunk(s, l, missed)
        if missed.before.place != NO_CHUNK:
            link = missed.before
        before = place_in(s, link, l.epoch)
        link = link_to(&s.chunks, place)
        if place == NO_CHUNK:
            continue
        if missed.start == 0:
            s.head = link
        elif before != NO_CHUNK:
            put_follower(&s.chunks, before, link)
        if place_in(s, missed.after, l.epoch) != NO_CHUNK:
            put_follower(&s.chunks, place, missed.after)

cdef inline void keep_segment(Store* s, const Lookup* l, const Pending* one) noexcept nogil:
    cdef Segment key
    cdef Segment* at
    cdef uint64_t digest
    if not segment_key(&l.text, one.start, one.stop, l.scope, one.variant, &key):
        return
    digest = segment_digest(&key, &s.secret[0])
    at = find_segment(&s.segments, digest, &key)
    if at == NULL and one.n_ids <= SEGMENT_IDS and s.segments.n_sets:
        at = place_new_segment(s, digest)
        at[0] = key
    if at == NULL:
        return
    if one.n_ids > SEGMENT_IDS:
        vacate_segment(&s.segments, at)
        return
    at.tick = s.clock
    at.n_ids = <uint8_t> one.n_ids
    memcpy(at.ids, one.ids, one.n_ids * sizeof(int32_t))
    s.counts.insertions += 1

cdef inline uint32_t keep_chunk(Store* s, const Lookup* l, const Missed* missed) noexcept nogil:
    """Store a missing chunk, unless it is in the table by now; return its place or NO_CHUNK."""
    cdef size_t n_units = missed.stop - missed.start
    cdef size_t n_ids = count_ids(l, missed.first_op, missed.stop_op)
    cdef uint32_t place
    cdef Chunk chunk
    if n_units > STORED_UNITS:
        s.counts.refusals[NO_CUT] += 1
        return NO_CHUNK
    place = find_chunk(
        &s.chunks, missed.digest, &l.text, missed.start, missed.stop, l.scope, missed.variant
    )
    if place != NO_CHUNK:
        return place
    chunk.width = <uint8_t> width_of(&l.text, missed.start, missed.stop)
    if not make_room(s, chunk_item_bytes(n_ids, n_units, chunk.width)):
        s.counts.refusals[OVERSIZE] += 1
        return NO_CHUNK
    chunk.ids = NULL
    if bytes_to_grow(&s.chunks) == 0 or grow_chunks(&s.chunks):
        chunk.ids = <int32_t*> malloc(n_ids * sizeof(int32_t) + n_units * chunk.width + 1)
    if chunk.ids == NULL:
        s.counts.refusals[OUT_OF_MEMORY] += 1
        return NO_CHUNK
    chunk.digest = missed.digest
    chunk.n_ids = <uint32_t> n_ids
    chunk.n_units = <uint32_t> n_units
    chunk.scope = l.scope
    chunk.variant = <uint8_t> missed.variant
    chunk.end_class = <uint8_t> missed.end_class
    chunk.is_tail = missed.stop == l.text.n_units
    chunk.tick = s.clock
    write_ids(l, chunk.ids, missed.first_op, missed.stop_op, missed.first_known)
    narrow(&l.text, missed.start, missed.stop, chunk.width, <uint8_t*> (chunk.ids + n_ids))
    add_chunk(&s.chunks, &chunk)
    s.counts.insertions += 1
    return s.chunks.n - 1


# ---- the answer

cdef inline size_t n_answer_ids(const Lookup* l) noexcept nogil:
    return l.n_begun_ids + (count_ids(l, 0, l.n_ops) if l.n_missed else l.n_run_ids)

cdef inline void write_answer(const Store* s, const Lookup* l, int32_t* into) noexcept nogil:
    """Write the `n_answer_ids` ids of the text."""
    cdef const Chunk* chunk
    cdef size_t i
    if l.block != NULL:
        memcpy(into, block_ids(l.block), l.n_begun_ids * sizeof(int32_t))
        into += l.n_begun_ids
    if l.n_missed:
        write_ids(l, into, 0, l.n_ops, 0)
        return
    for i in range(l.n_run):
        chunk = &s.chunks.all[l.run[i]]
        memcpy(into, chunk.ids, chunk.n_ids * sizeof(int32_t))
        into += chunk.n_ids

cdef inline void count_answer(Store* s, const Lookup* l, size_t n_ids) noexcept nogil:
    cdef int why
    if l.n_missed:
        s.counts.misses += 1
        for why in range(N_WHY):
            s.counts.chunk_misses_by_reason[why] += l.chunk_misses_by_reason[why]
            s.counts.segment_misses_by_reason[why] += l.segment_misses_by_reason[why]
    else:
        s.counts.hits += 1
    s.counts.chunk_hits += l.n_chunk_hits
    s.counts.chunk_misses += l.n_missed
    s.counts.chunk_miss_chars += l.n_miss_units
    s.counts.lookup_chars += l.text.n_units
    s.counts.segment_hits += l.n_segment_hits
    s.counts.segment_misses += l.n_segment_misses
    s.counts.tokens += n_ids


# ---- from elsewhere

cdef inline int fill_chunk(
    Store* s, Lookup* l, const int32_t* ids, size_t n_ids, uint32_t variant, uint32_t end_class,
    bint is_tail, uint32_t age,
) noexcept nogil:
    """Store the text of `l` as a chunk, without an eviction."""
    cdef uint32_t place, n_held = s.chunks.n
    cdef uint64_t n_units = l.text.n_units
    cdef Missed* missed
    if not 0 < n_units <= STORED_UNITS:
        return NO_ROOM
    missed = push_missed(l)
    if missed == NULL or not push_known(l, ids, n_ids):
        return NO_ROOM
    missed.start = 0
    missed.stop = n_units
    missed.variant = variant
    missed.end_class = end_class
    end_missed(l)
    if not has_room(s, chunk_item_bytes(n_ids, n_units, width_of(&l.text, 0, n_units))):
        return NO_ROOM
    if not chunk_digest(s, &l.text, 0, n_units, l.scope, variant, &missed.digest):
        return NO_ROOM
    place = keep_chunk(s, l, missed)
    if s.chunks.n == n_held:
        return NO_ROOM if place == NO_CHUNK else PRESENT
    s.chunks.all[place].tick = s.clock - age or 1
    s.chunks.all[place].is_tail = is_tail
    return KEPT

cdef inline int fill_segment(
    Store* s, const Lookup* l, const int32_t* ids, size_t n_ids, uint32_t variant, uint32_t age
) noexcept nogil:
    """Store the text of `l` as a segment, without an eviction."""
    cdef Segment key
    cdef Segment* at
    cdef uint64_t digest
    cdef bint evicts = False
    if s.segments.n_sets == 0 or n_ids > SEGMENT_IDS:
        return NO_ROOM
    if not segment_key(&l.text, 0, l.text.n_units, l.scope, variant, &key):
        return NO_ROOM
    digest = segment_digest(&key, &s.secret[0])
    if find_segment(&s.segments, digest, &key) != NULL:
        return PRESENT
    at = place_segment(&s.segments, digest, s.clock, &evicts)
    if evicts:
        return NO_ROOM
    at[0] = key
    at.tick = s.clock - age or 1
    at.n_ids = <uint8_t> n_ids
    memcpy(at.ids, ids, n_ids * sizeof(int32_t))
    s.counts.insertions += 1
    return KEPT

cdef inline uint32_t greatest_age(const Store* s) noexcept nogil:
    cdef uint32_t i, greatest = 0
    for i in range(s.chunks.n):
        greatest = max(greatest, s.clock - s.chunks.all[i].tick)
    for i in range(s.segments.n_sets * WAYS):
        if s.segments.all[i].tick:
            greatest = max(greatest, s.clock - s.segments.all[i].tick)
    return greatest

cdef inline uint32_t older(const Store* s, uint32_t age) noexcept nogil:
    return age + 2 if age + 1 == s.clock else age + 1  # tick 0 marks an empty place
