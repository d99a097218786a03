# The table of short segments, the text between two cuts inside a chunk.
#
# Segments are in sets of WAYS entries, one cache line each. A digest chooses the set; then all of
# the key is compared. The oldest of a full set is evicted.
#
# A segment that waits for the engine has a PENDING entry, so that it is encoded once although a
# text has it several times: the entry names the look-up and the position in its list.
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from tokcache.text._digest cimport fold
from tokcache.text.segments._keys cimport narrow, width_of
from tokcache.text.segments._scan cimport Text

cdef enum:
    WAYS = 4
    MIN_SETS = 64
    MAX_SETS = 1 << 24
    SEGMENT_BYTES = 24   # maximum key length of a segment in the table
    SEGMENT_IDS = 5      # maximum number of its token ids
    PENDING = 255        # as n_ids: ids[0] is its position in the look-up with the serial ids[1]

ctypedef struct Segment:  # one cache line
    uint8_t[SEGMENT_BYTES] key  # padded with zeros
    uint64_t scope
    int32_t[SEGMENT_IDS] ids
    uint32_t tick        # 0: an empty place
    uint32_t check       # high half of the digest
    uint8_t n_bytes      # of the key
    uint8_t n_ids
    uint8_t width        # bytes per unit of the key
    uint8_t variant

ctypedef struct Segments:
    Segment* all
    uint32_t n_sets      # a power of two or 0
    uint32_t n


cdef inline bint segment_key(
    const Text* t, size_t start, size_t stop, uint64_t scope, uint32_t variant, Segment* key
) noexcept nogil:
    """Fill in the key of a segment; return False if it is too long for the table."""
    cdef uint32_t width
    if stop - start > SEGMENT_BYTES:
        return False
    width = width_of(t, start, stop)
    if (stop - start) * width > SEGMENT_BYTES:
        return False
    memset(key, 0, sizeof(Segment))
    narrow(t, start, stop, width, &key.key[0])
    key.width = <uint8_t> width
    key.n_bytes = <uint8_t> ((stop - start) * width)
    key.scope = scope
    key.variant = <uint8_t> variant
    return True

cdef inline uint64_t segment_digest(Segment* key, const uint64_t* secret) noexcept nogil:
    """Return the digest of a key, and set its `check`."""
    cdef uint64_t[3] words
    cdef uint64_t digest
    memcpy(&words[0], &key.key[0], SEGMENT_BYTES)
    digest = fold(words[0] ^ secret[42], words[1] ^ secret[43])
    digest = fold(
        digest ^ words[2] ^ secret[44],
        key.scope ^ secret[45]
        ^ (<uint64_t> key.n_bytes << 16 | <uint64_t> key.width << 8 | key.variant),
    )
    key.check = <uint32_t> (digest >> 32)
    return digest

cdef inline bint is_segment(const Segment* one, const Segment* key) noexcept nogil:
    return (
        one.tick and one.check == key.check and one.scope == key.scope
        and memcmp(&one.key[0], &key.key[0], SEGMENT_BYTES) == 0
        and one.n_bytes == key.n_bytes and one.width == key.width and one.variant == key.variant
    )

cdef inline Segment* find_segment(
    const Segments* s, uint64_t digest, const Segment* key
) noexcept nogil:
    """Return the entry with exactly this key, or NULL."""
    cdef Segment* at
    cdef int i
    if s.n_sets == 0:
        return NULL
    at = &s.all[(digest & (s.n_sets - 1)) * WAYS]
    for i in range(WAYS):
        if is_segment(&at[i], key):
            return &at[i]
    return NULL

cdef inline Segment* place_segment(
    Segments* s, uint64_t digest, uint32_t clock, bint* evicts
) noexcept nogil:
    """Return the place for a new entry: an empty one, or the oldest of its set."""
    cdef Segment* at = &s.all[(digest & (s.n_sets - 1)) * WAYS]
    cdef Segment* oldest = at
    cdef int i
    evicts[0] = False
    for i in range(WAYS):
        if at[i].tick == 0:
            s.n += 1
            return &at[i]
        if clock - at[i].tick > clock - oldest.tick:
            oldest = &at[i]
    evicts[0] = oldest.n_ids != PENDING
    return oldest

cdef inline void vacate_segment(Segments* s, Segment* at) noexcept nogil:
    at.tick = 0
    s.n -= 1

cdef inline uint32_t grown_sets(const Segments* s) noexcept nogil:
    return 2 * s.n_sets if s.n_sets else MIN_SETS

cdef inline uint64_t sets_bytes(uint64_t n_sets) noexcept nogil:
    return n_sets * WAYS * sizeof(Segment)

cdef inline void grow_segments(Segments* s, uint32_t clock, const uint64_t* secret) noexcept nogil:
    """Double the number of sets; nothing changes if there is no memory."""
    cdef Segments old = s[0]
    cdef Segment* grown = <Segment*> calloc(grown_sets(s) * WAYS, sizeof(Segment))
    cdef uint64_t digest
    cdef uint32_t i
    cdef bint evicts = False
    if grown == NULL:
        return
    s.n_sets = grown_sets(&old)
    s.all = grown
    s.n = 0
    for i in range(old.n_sets * WAYS):
        if old.all[i].tick:
            digest = segment_digest(&old.all[i], secret)
            place_segment(s, digest, clock, &evicts)[0] = old.all[i]
    free(old.all)

cdef inline void release_segments(Segments* s) noexcept nogil:
    free(s.all)
    memset(s, 0, sizeof(Segments))
