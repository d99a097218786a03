# The store of a segment cache: chunks, segments and beginnings of texts within one budget of bytes.
#
# `_find` looks texts up in it, `_keep` stores new chunks and segments.
#
# It uses no Python objects and takes no lock: its caller holds the interpreter lock.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset

from tokcache.text._digest cimport N_SECRETS, full_digest
from tokcache.text._evictions cimport (
    N_WHY, Evictions, forget_all, forget_scope, note_eviction,
)
from tokcache.text.segments._beginnings cimport (
    Beginnings, beginnings_bytes, release_beginnings, remove_beginning,
)
from tokcache.text.segments._chunker cimport Chunker
from tokcache.text.segments._chunks cimport (
    LAST_SERIAL, NO_CHUNK, Chunks, Link, bytes_to_grow, chunks_bytes, no_link, oldest_chunk,
    place_of, release_chunks, remove_chunk,
)
from tokcache.text.segments._keys cimport narrow, width_of
from tokcache.text.segments._plan cimport release_plan
from tokcache.text.segments._scan cimport Text
from tokcache.text.segments._segments cimport (
    MAX_SETS, WAYS, Segment, Segments, grow_segments, grown_sets, place_segment,
    release_segments, segment_digest, sets_bytes,
)

cdef enum:
    N_DRAWS = 8            # chunks drawn for an eviction, of which the oldest is evicted
    SEGMENT_SHARE = 4      # segments may take 1 / SEGMENT_SHARE of the budget
    BEGINNING_SHARE = 8    # beginnings, which repeat what chunks have, 1 / BEGINNING_SHARE

    POST_PROCESSOR = 0     # reasons why a text is not cut, or why a chunk is not stored
    LONE_SURROGATE = 1
    TOO_LONG = 2
    BESIDE_SINGLE_WORD = 3
    CLEARED = 4
    NO_CUT = 5
    OVERSIZE = 6
    OUT_OF_MEMORY = 7
    N_REASONS = 8

ctypedef struct Counts:
    uint64_t hits
    uint64_t misses
    uint64_t chunk_hits
    uint64_t chunk_misses
    uint64_t lookup_chars
    uint64_t chunk_miss_chars
    uint64_t segment_hits
    uint64_t segment_misses
    uint64_t engine_chars
    uint64_t engine_tokens
    uint64_t tokens
    uint64_t insertions
    uint64_t evictions
    uint64_t[N_REASONS] refusals
    uint64_t[N_WHY] chunk_misses_by_reason
    uint64_t[N_WHY] segment_misses_by_reason

ctypedef struct Store:
    uint64_t max_bytes
    bint cuts_fine         # also between added tokens
    Chunker chunker
    Chunks chunks
    Segments segments
    Beginnings beginnings
    Link head              # to the first chunk of the last text
    uint64_t epoch         # changes when all chunks are removed
    uint64_t[N_SECRETS] secret
    uint64_t rng
    uint32_t clock         # never 0: tick 0 marks an empty place
    uint8_t* scratch       # units of a chunk, narrowed
    size_t n_scratch_bytes
    Counts counts
    Evictions evicted_chunks
    Evictions evicted_segments


cdef inline uint64_t store_bytes(const Store* s) noexcept nogil:
    return (
        chunks_bytes(&s.chunks) + sets_bytes(s.segments.n_sets)
        + beginnings_bytes(&s.beginnings)
    )

cdef inline void advance_clock(Store* s) noexcept nogil:
    s.clock += 1
    if s.clock == 0:
        s.clock = 1

cdef inline uint32_t place_in(const Store* s, Link link, uint64_t epoch) noexcept nogil:
    """Return the place of a chunk that was linked in this epoch, if it is still stored."""
    return place_of(&s.chunks, link) if epoch == s.epoch else NO_CHUNK

cdef inline bint chunk_digest(
    Store* s, const Text* t, size_t start, size_t stop, uint64_t scope, uint32_t variant,
    uint64_t* digest,
) noexcept nogil:
    """Set the digest of a chunk; return False if there is no memory."""
    cdef uint32_t width = width_of(t, start, stop)
    cdef const uint8_t* key = t.data + start * width
    cdef uint8_t* grown
    if width != t.kind:
        if s.n_scratch_bytes < (stop - start) * width:
            grown = <uint8_t*> realloc(s.scratch, (stop - start) * width)
            if grown == NULL:
                return False
            s.scratch = grown
            s.n_scratch_bytes = (stop - start) * width
        narrow(t, start, stop, width, s.scratch)
        key = s.scratch
    digest[0] = full_digest(
        key, (stop - start) * width,
        scope ^ (<uint64_t> width << 8) ^ variant ^ (<uint64_t> (stop - start) << 16),
        &s.secret[0],
    )
    return True


# ---- room

cdef inline void evict_chunk(Store* s) noexcept nogil:
    cdef uint32_t place = oldest_chunk(&s.chunks, &s.rng, s.clock, N_DRAWS)
    s.counts.evictions += 1
    note_eviction(&s.evicted_chunks, s.chunks.all[place].digest, s.chunks.all[place].scope)
    remove_chunk(&s.chunks, place)

cdef inline Segment* place_new_segment(Store* s, uint64_t digest) noexcept nogil:
    """Return the place for a new segment; another one may be evicted from it."""
    cdef bint evicts = False
    cdef Segment* at = place_segment(&s.segments, digest, s.clock, &evicts)
    if evicts:
        s.counts.evictions += 1
        note_eviction(&s.evicted_segments, segment_digest(at, &s.secret[0]), at.scope)
    return at

cdef inline bint has_room(const Store* s, uint64_t n_bytes) noexcept nogil:
    """Return whether one more chunk of `n_bytes` fits without an eviction."""
    return store_bytes(s) + n_bytes + bytes_to_grow(&s.chunks) <= s.max_bytes

cdef inline bint make_room(Store* s, uint64_t n_bytes) noexcept nogil:
    """Evict until one more chunk of `n_bytes` fits; return False if it can't fit.

    The table itself may still have to grow, which needs memory.
    """
    cdef uint64_t least
    if s.chunks.serial == LAST_SERIAL:  # a serial used again could make an old link valid
        remove_chunks(s)
        s.evicted_chunks.is_lost = True
    least = store_bytes(s) - s.chunks.item_bytes - beginnings_bytes(&s.beginnings) + n_bytes
    if s.chunks.capacity == 0:
        least += bytes_to_grow(&s.chunks)
    if least > s.max_bytes:
        return False  # it does not fit even after evicting all others
    while not has_room(s, n_bytes):
        if s.chunks.n == 0:
            if s.beginnings.n == 0:
                return False
            release_beginnings(&s.beginnings)
        else:
            evict_chunk(s)
    return True

cdef inline void make_segment_room(Store* s, uint64_t n_more, bint may_evict) noexcept nogil:
    """Double the table of segments if it is half full and the budget allows it."""
    cdef uint64_t n_bytes = sets_bytes(grown_sets(&s.segments))
    if 2 * (s.segments.n + n_more) <= <uint64_t> s.segments.n_sets * WAYS:
        return
    if SEGMENT_SHARE * n_bytes > s.max_bytes or s.segments.n_sets >= MAX_SETS:
        return
    # The old and the new table exist at the same time for a moment.
    while store_bytes(s) + n_bytes > s.max_bytes:
        if s.chunks.n == 0 or not may_evict:
            return
        evict_chunk(s)
    grow_segments(&s.segments, s.clock, &s.secret[0])


# ---- removal

cdef inline void remove_chunks(Store* s) noexcept nogil:
    release_beginnings(&s.beginnings)  # they have links to chunks
    release_chunks(&s.chunks)
    s.head = no_link()
    s.epoch += 1

cdef inline void remove_scope(Store* s, uint64_t scope) noexcept nogil:
    cdef uint32_t i
    forget_scope(&s.evicted_chunks, scope)
    forget_scope(&s.evicted_segments, scope)
    # Backwards, so that the chunk that takes a removed one's place was already looked at.
    for i in range(s.chunks.n, 0, -1):
        if s.chunks.all[i - 1].scope == scope:
            remove_chunk(&s.chunks, i - 1)
    for i in range(s.beginnings.n, 0, -1):
        if s.beginnings.all[i - 1].scope == scope:
            remove_beginning(&s.beginnings, i - 1, &s.secret[0])
    if s.chunks.n == 0:
        remove_chunks(s)
    for i in range(s.segments.n_sets * WAYS):
        if s.segments.all[i].tick and s.segments.all[i].scope == scope:
            memset(&s.segments.all[i], 0, sizeof(Segment))
            s.segments.n -= 1
    if s.segments.n == 0:
        release_segments(&s.segments)

cdef inline void remove_all(Store* s) noexcept nogil:
    """Remove all entries and set the counters to zero."""
    remove_chunks(s)
    release_segments(&s.segments)
    memset(&s.counts, 0, sizeof(Counts))
    forget_all(&s.evicted_chunks)
    forget_all(&s.evicted_segments)

cdef inline void release_store(Store* s) noexcept nogil:
    release_beginnings(&s.beginnings)
    release_chunks(&s.chunks)
    release_segments(&s.segments)
    release_plan(&s.chunker.plan)
    forget_all(&s.evicted_chunks)
    forget_all(&s.evicted_segments)
    free(s.scratch)
