# cython: language_level=3
"""The object-free tables as plain C functions, for `races.c`; never imported as a module."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from tokcache.text._digest cimport N_SECRETS
from tokcache.text._evictions cimport Evictions, forget_all, note_eviction, why_missing
from tokcache.text._table cimport (
    SCOPE_SHIFT, Entry, Key, Table, digest_of, find, insert, key_of, oldest_of, release_arrays,
    remove, reserve, settle,
)
from tokcache.text.segments._scan cimport Text
from tokcache.text.segments._segments cimport (
    Segment, Segments, find_segment, grow_segments, place_segment, release_segments,
    segment_digest, segment_key,
)

ctypedef public struct Tables:
    Table table
    Segments segments
    Evictions evicted
    uint64_t rng
    uint32_t clock


cdef Key key_from(const uint8_t* data, size_t n_bytes, uint32_t scope) noexcept nogil:
    cdef Key key
    key.data = data
    key.n_bytes = n_bytes
    key.n_units = <uint32_t> n_bytes
    key.kind = 1
    key.scope = scope
    return key


cdef Text text_from(const uint8_t* data, size_t n_bytes) noexcept nogil:
    cdef Text text
    text.data = data
    text.n_units = n_bytes
    text.kind = 1
    return text


cdef public void* tables_new(uint64_t seed) noexcept nogil:
    cdef Tables* t = <Tables*> calloc(1, sizeof(Tables))
    cdef int i
    for i in range(N_SECRETS):
        t.table.secret[i] = (seed + <uint64_t> i) * <uint64_t> 0xA0761D6478BD642F
    t.clock = 1
    return t


cdef public void tables_put(
    void* tables, const uint8_t* data, size_t n_bytes, uint32_t scope, uint32_t max_entries
) noexcept nogil:
    """Store a key, whose first byte is its value, in both tables; evict if there are too many."""
    cdef Tables* t = <Tables*> tables
    cdef Key key = key_from(data, n_bytes, scope)
    cdef Key gone_key
    cdef Entry entry, gone
    cdef Segment segment
    cdef Segment* at
    cdef Text text = text_from(data, n_bytes)
    cdef uint64_t digest
    cdef uint32_t position
    cdef bint evicts = False
    t.clock += 1
    entry.digest = digest_of(&t.table, &key)
    if find(&t.table, entry.digest, &key) == NULL:
        while t.table.n >= max_entries:
            position = oldest_of(&t.table, &t.rng, 8, t.clock)
            gone_key = key_of(&t.table.entries[position])
            note_eviction(&t.evicted, digest_of(&t.table, &gone_key), gone_key.scope)
            gone = remove(&t.table, position)
            free(<void*> gone.key)
        entry.key = <const uint8_t*> calloc(1, n_bytes)
        memcpy(<void*> entry.key, data, n_bytes)
        reserve(&t.table)
        settle(&t.table, &key, &entry.digest)
        entry.meta = key.kind | scope << SCOPE_SHIFT
        entry.n_units = key.n_units
        entry.value = <void*> (1 + <size_t> data[0])
        insert(&t.table, &entry, t.clock)
    if segment_key(&text, 0, n_bytes, scope, 0, &segment):
        digest = segment_digest(&segment, t.table.secret)
        if find_segment(&t.segments, digest, &segment) == NULL:
            if t.segments.n_sets < 1024 and t.segments.n >= 2 * t.segments.n_sets:
                grow_segments(&t.segments, t.clock, t.table.secret)
            at = place_segment(&t.segments, digest, t.clock, &evicts)
            at[0] = segment
            at.tick = t.clock
            at.n_ids = 1
            at.ids[0] = data[0]


cdef public int tables_get(
    const void* tables, const uint8_t* data, size_t n_bytes, uint32_t scope
) noexcept nogil:
    """Return the value of a key, or -1; both tables must agree if both have it."""
    cdef const Tables* t = <const Tables*> tables
    cdef Key key = key_from(data, n_bytes, scope)
    cdef const Entry* entry = find(&t.table, digest_of(&t.table, &key), &key)
    cdef Text text = text_from(data, n_bytes)
    cdef Segment segment
    cdef const Segment* at
    cdef int found = -1 if entry == NULL else <int> (<size_t> entry.value - 1)
    if entry == NULL:
        why_missing(&t.evicted, digest_of(&t.table, &key), scope)
    if segment_key(&text, 0, n_bytes, scope, 0, &segment):
        at = find_segment(&t.segments, segment_digest(&segment, t.table.secret), &segment)
        if at != NULL:
            return -2 if found >= 0 and at.ids[0] != found else at.ids[0]
    return found


cdef public void tables_free(void* tables) noexcept nogil:
    cdef Tables* t = <Tables*> tables
    cdef uint32_t i
    for i in range(t.table.capacity):
        if t.table.entries[i].value != NULL:
            free(<void*> t.table.entries[i].key)
    release_arrays(&t.table)
    release_segments(&t.segments)
    forget_all(&t.evicted)
    memset(t, 0, sizeof(Tables))
    free(t)
