# The memory of evictions: whether a missing entry was held and evicted, or is new.
#
# 1. An evicted entry leaves a digest of its key and its scope. The digest chooses a set of N_WAYS
#    rows, most recent first; the last row of a full set is forgotten, and the set is marked.
# 2. A miss looks for its own digest and scope. Without them it is NEW, or NOT_KNOWN if the set is
#    marked. So a new key is never taken for an evicted one, or an evicted one for a new one.
# 3. Clearing a scope forgets its evictions.
#
# The rows are allocated at the first eviction and belong to no budget. It uses no Python objects
# and takes no lock.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memmove, memset

from tokcache.text._digest cimport fold, read64

cdef extern from *:
    """
    /* A digest of all n bytes. It is a function of its own, in C, because look-ups call those of
       _digest.pxd: another caller of them in the same module changed which ones the compiler put
       into the look-up, and a hit cost more instructions. */
    static __attribute__((noinline, unused)) uint64_t tokcache_text_digest(
        const uint8_t *p, size_t n, uint64_t seed, const uint64_t *secret
    ) {
        uint64_t digest = seed ^ secret[0], last[2] = {0, 0};
        const uint64_t length = n;
        for (; n >= 16; p += 16, n -= 16)
            digest = tokcache_fold(
                tokcache_read64(p) ^ secret[1], tokcache_read64(p + 8) ^ digest
            );
        memcpy(last, p, n);
        digest = tokcache_fold(last[0] ^ secret[2], last[1] ^ digest);
        return tokcache_fold(digest ^ secret[3], length ^ secret[4]);
    }
    """
    uint64_t text_digest "tokcache_text_digest"(
        const uint8_t* p, size_t n, uint64_t seed, const uint64_t* secret
    ) noexcept nogil

cdef enum:
    N_SETS = 1024      # a power of two
    N_WAYS = 4         # rows of a set: one cache line

    NEW = 0            # why an entry is missing
    EVICTED = 1
    NOT_KNOWN = 2
    N_WHY = 3

ctypedef struct Row:
    uint64_t digest    # of the whole key, with the scope; 0: an empty row
    uint64_t scope

ctypedef struct Evictions:
    Row* rows          # NULL: nothing was evicted, or there was no memory
    uint8_t* marks     # by set: 1 if a row of it was forgotten
    bint is_lost       # there was no memory


cdef inline uint64_t row_digest(uint64_t digest) noexcept nogil:
    return digest | 1  # never 0; the set is chosen by other bits

cdef inline uint32_t set_of(uint64_t digest) noexcept nogil:
    return <uint32_t> (digest >> 32) & (N_SETS - 1)

cdef inline void note_eviction(Evictions* e, uint64_t digest, uint64_t scope) noexcept nogil:
    cdef Row* at
    cdef int i = 0
    if e.rows == NULL:
        e.rows = <Row*> calloc(N_SETS, N_WAYS * sizeof(Row) + 1)
        if e.rows == NULL:
            e.is_lost = True
            return
        e.marks = <uint8_t*> (e.rows + N_SETS * N_WAYS)
    digest = row_digest(digest)
    at = e.rows + set_of(digest) * N_WAYS
    while i < N_WAYS - 1 and at[i].digest and (at[i].digest != digest or at[i].scope != scope):
        i += 1
    if at[i].digest and (at[i].digest != digest or at[i].scope != scope):
        e.marks[set_of(digest)] = 1
    memmove(at + 1, at, i * sizeof(Row))
    at[0].digest = digest
    at[0].scope = scope

cdef inline int why_missing(const Evictions* e, uint64_t digest, uint64_t scope) noexcept nogil:
    """Return why no entry has the key of this digest: NEW, EVICTED or NOT_KNOWN."""
    cdef const Row* at
    cdef int i
    if e.rows == NULL:
        return NOT_KNOWN if e.is_lost else NEW
    digest = row_digest(digest)
    at = e.rows + set_of(digest) * N_WAYS
    for i in range(N_WAYS):
        if at[i].digest == digest and at[i].scope == scope:
            return EVICTED
    return NOT_KNOWN if e.is_lost or e.marks[set_of(digest)] else NEW

cdef inline void forget_scope(Evictions* e, uint64_t scope) noexcept nogil:
    cdef Row* at
    cdef uint32_t i
    cdef int way, n
    if e.rows == NULL:
        return
    for i in range(N_SETS):
        at = e.rows + i * N_WAYS
        n = 0
        for way in range(N_WAYS):
            if at[way].digest and at[way].scope != scope:
                at[n] = at[way]
                n += 1
        memset(at + n, 0, (N_WAYS - n) * sizeof(Row))

cdef inline void forget_all(Evictions* e) noexcept nogil:
    free(e.rows)
    memset(e, 0, sizeof(Evictions))
