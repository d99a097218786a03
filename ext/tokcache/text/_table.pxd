# The hash table below L0: raw keys, open addressing in one array.
#
# - An entry's home is (high half of its digest) * capacity >> 32; it is stored in the first free
#   place from there on. A removal moves back the entries that were pushed past the hole, so there
#   are no tombstones.
# - ticks[] is an array parallel to entries[], 0 for an empty place: a draw for eviction reads only
#   ticks until it finds an entry. The table shrinks, so that on average at least one read in 8
#   finds one.
# - A long key is filed under a digest of samples. When a second key has the same digest, that
#   digest becomes "crowded": the crowd records where the two keys differ, and both keys, like all
#   later ones, are filed under the digest refined by the bytes at that place. A refined digest can
#   become crowded in turn; after MAX_REFINED steps the whole key is digested. So texts of one
#   template cost a few more bytes to read, not all. A crowd counts the entries filed through it
#   and is removed with the last one.
#
# The table uses no Python objects and takes no lock. The caller owns the memory that `value` and
# `key` point to. An Entry* is valid until the next insert or remove.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp

from tokcache.text._digest cimport (
    N_SECRETS, SAMPLED_MIN, fold, full_digest, pair, sampled_digest,
)

cdef extern from *:
    """
    #include <stdlib.h>
    #include <string.h>
    #ifdef __linux__
    #include <sys/mman.h>
    #endif
    #define tokcache_fetch(p) __builtin_prefetch((const void *)(p))

    /* Zeroed memory for free(); large tables on huge pages, where a random look-up saves a walk
       through the page table (1,000,000 entries: see python -m bench exact). */
    static inline void *tokcache_zeroed(size_t n_bytes) {
    #ifdef MADV_HUGEPAGE
        const size_t huge = (size_t)2 << 20;
        void *raw;
        if (n_bytes >= 4 * huge && posix_memalign(&raw, huge, n_bytes) == 0) {
            madvise(raw, n_bytes, MADV_HUGEPAGE);
            return memset(raw, 0, n_bytes);
        }
    #endif
        return calloc(1, n_bytes);
    }
    """
    void fetch "tokcache_fetch"(const void* p) noexcept nogil
    int count_leading_zeros "__builtin_clzll"(unsigned long long bits) noexcept nogil
    void* zeroed "tokcache_zeroed"(size_t n_bytes) noexcept nogil

cdef enum:
    MIN_CAPACITY = 8
    MIN_CROWDS = 8
    DOUBLE_UNTIL = 4096      # places; above, the arrays grow by a quarter
    FETCH_BYTES = 512        # bytes of a stored key that are prefetched before the compare
    MAX_ENTRIES = 0x7FFFFFF0

    KIND_MASK = 0x7          # in meta: bytes per unit (1, 2 or 4)
    MAX_REFINED = 8          # crowds that a key passes through before it is digested whole
    REFINED_BYTES = 32       # bytes read around the place where two keys differ
    OWNER_SHIFT = 4          # in meta: two bits for the caller
    OWNER_MASK = 0x30
    SCOPE_SHIFT = 8          # in meta: the scope's number

cdef extern from *:
    """
    #define TOKCACHE_WHOLE UINT64_MAX
    """
    const uint64_t WHOLE "TOKCACHE_WHOLE"  # as a crowd's offset: digest the whole key

ctypedef struct Key:
    const uint8_t* data
    size_t n_bytes
    uint32_t n_units
    uint32_t kind
    uint32_t scope

ctypedef struct Entry:
    uint64_t digest
    void* value              # NULL: an empty place
    const uint8_t* key
    uint32_t n_units
    uint32_t meta

ctypedef struct Crowd:
    uint64_t digest
    uint64_t n_entries       # entries filed through it; 0: an empty place
    uint64_t offset          # the byte at which the first two keys differ, or WHOLE

ctypedef struct Table:
    Entry* entries
    uint32_t* ticks          # the clock at each entry's last use; 0: an empty place
    Crowd* crowds
    uint32_t n
    uint32_t capacity
    uint32_t enough          # places for the maximum number of entries, or 0 if unknown
    uint32_t n_crowds
    uint32_t crowd_capacity  # a power of two or 0
    uint64_t n_item_bytes    # bytes of all keys and values, maintained by the caller
    uint64_t secret[N_SECRETS]


# ---- keys

cdef inline uint64_t seed_of(const Key* key) noexcept nogil:
    return (<uint64_t> key.scope << 34) ^ (<uint64_t> key.n_units << 3) ^ key.kind

cdef inline uint64_t full_of(const Table* t, const Key* key) noexcept nogil:
    return full_digest(key.data, key.n_bytes, seed_of(key), t.secret)

cdef inline uint64_t sampled_of(const Table* t, const Key* key) noexcept nogil:
    return sampled_digest(key.data, key.n_bytes, seed_of(key), t.secret)

cdef inline bint is_long(const Key* key) noexcept nogil:
    return key.n_bytes >= SAMPLED_MIN

cdef inline Key key_of(const Entry* entry) noexcept nogil:
    cdef Key key
    key.kind = entry.meta & KIND_MASK
    key.scope = entry.meta >> SCOPE_SHIFT
    key.n_units = entry.n_units
    key.n_bytes = <size_t> entry.n_units * key.kind
    key.data = entry.key
    return key

cdef inline bint matches(const Entry* entry, const Key* key) noexcept nogil:
    return (
        entry.n_units == key.n_units
        and (entry.meta & KIND_MASK) == key.kind
        and (entry.meta >> SCOPE_SHIFT) == key.scope
        and (entry.key == key.data or memcmp(entry.key, key.data, key.n_bytes) == 0)
    )


# ---- crowded digests

cdef inline Crowd* find_crowd(const Table* t, uint64_t digest) noexcept nogil:
    """Return the crowd of a digest, or NULL if the digest is not crowded."""
    cdef uint32_t mask, i
    if t.n_crowds == 0:
        return NULL
    mask = t.crowd_capacity - 1
    i = <uint32_t> digest & mask
    while t.crowds[i].n_entries:
        if t.crowds[i].digest == digest:
            return &t.crowds[i]
        i = (i + 1) & mask
    return NULL

cdef inline void file_crowd(Table* t, Crowd crowd) noexcept nogil:
    cdef uint32_t mask = t.crowd_capacity - 1
    cdef uint32_t i = <uint32_t> crowd.digest & mask
    while t.crowds[i].n_entries:
        i = (i + 1) & mask
    t.crowds[i] = crowd

cdef inline uint32_t grown_crowds(const Table* t) noexcept nogil:
    return 2 * t.crowd_capacity if t.crowd_capacity else MIN_CROWDS

cdef inline Crowd* add_crowd(Table* t, uint64_t digest, uint64_t offset) noexcept nogil:
    """Make a digest crowded, with one entry filed through it; NULL if there is no memory."""
    cdef Crowd* old = t.crowds
    cdef uint32_t i, n_old = t.crowd_capacity
    cdef Crowd crowd
    crowd.digest = digest
    crowd.n_entries = 1
    crowd.offset = offset
    if 2 * (t.n_crowds + 1) > n_old:
        t.crowds = <Crowd*> zeroed(grown_crowds(t) * sizeof(Crowd))
        if t.crowds == NULL:
            t.crowds = old
            return NULL
        t.crowd_capacity = grown_crowds(t)
        for i in range(n_old):
            if old[i].n_entries:
                file_crowd(t, old[i])
        free(old)
    file_crowd(t, crowd)
    t.n_crowds += 1
    return find_crowd(t, digest)

cdef inline void leave_crowd(Table* t, Crowd* crowd) noexcept nogil:
    """Count one entry less in a crowd, and remove the crowd with its last entry."""
    cdef Crowd moved
    cdef uint32_t mask = t.crowd_capacity - 1, i
    crowd.n_entries -= 1
    if crowd.n_entries:
        return
    t.n_crowds -= 1
    i = <uint32_t> (crowd - t.crowds)
    while True:  # file the crowds again that were pushed past it
        i = (i + 1) & mask
        if t.crowds[i].n_entries == 0:
            return
        moved = t.crowds[i]
        t.crowds[i].n_entries = 0
        file_crowd(t, moved)

cdef inline uint64_t refined(
    const Table* t, uint64_t digest, uint64_t offset, const Key* key
) noexcept nogil:
    """Return the digest refined by the bytes around `offset`, or for WHOLE by the whole key."""
    cdef const uint8_t* p
    if offset == WHOLE:
        return full_of(t, key)
    p = key.data + min(
        max(offset, <uint64_t> REFINED_BYTES // 2) - REFINED_BYTES // 2,
        <uint64_t> key.n_bytes - REFINED_BYTES,
    )
    return fold(
        digest ^ pair(p, t.secret[26], t.secret[27]),
        t.secret[28] ^ pair(p + 16, t.secret[29], t.secret[30]),
    )

cdef inline uint64_t differs_at(const Key* a, const Key* b) noexcept nogil:
    """Return the first byte at which two keys differ, or WHOLE if their lengths differ."""
    cdef uint64_t i = 0
    if a.n_bytes != b.n_bytes:
        return WHOLE
    while i < a.n_bytes and a.data[i] == b.data[i]:
        i += 1
    return i if i < a.n_bytes else WHOLE


# ---- entries

cdef inline uint64_t digest_of(const Table* t, const Key* key) noexcept nogil:
    """Return the digest under which this key is filed or would be."""
    return long_digest_of(t, key) if is_long(key) else full_of(t, key)

cdef inline uint64_t long_digest_of(const Table* t, const Key* key) noexcept nogil:
    cdef uint64_t digest = sampled_of(t, key)
    cdef Crowd* crowd
    while True:
        crowd = find_crowd(t, digest)
        if crowd == NULL:
            return digest
        digest = refined(t, digest, crowd.offset, key)
        if crowd.offset == WHOLE:
            return digest

cdef inline uint32_t home_of(const Table* t, uint64_t digest) noexcept nogil:
    return <uint32_t> (((digest >> 32) * t.capacity) >> 32)

cdef inline uint32_t after(const Table* t, uint32_t i) noexcept nogil:
    return i + 1 if i + 1 < t.capacity else 0

cdef inline void fetch_home(const Table* t, uint64_t digest) noexcept nogil:
    """Prefetch the place where the entry of this digest is or will be."""
    if t.capacity:
        fetch(&t.entries[home_of(t, digest)])
        fetch(<const uint8_t*> &t.entries[home_of(t, digest)] + 64)

cdef inline void fetch_entry(const Entry* entry, size_t n_bytes) noexcept nogil:
    """Prefetch the memory that a match needs: the ids' header and the start of the stored key."""
    cdef size_t i
    fetch(entry.value)
    if n_bytes > 64:  # the compare reads a shorter key at once
        for i in range(0, min(n_bytes, <size_t> FETCH_BYTES), 64):
            fetch(entry.key + i)

cdef inline Entry* find(const Table* t, uint64_t digest, const Key* key) noexcept nogil:
    """Return the entry with exactly this key, or NULL."""
    cdef uint32_t i
    if t.n == 0:
        return NULL
    i = home_of(t, digest)
    while t.entries[i].value != NULL:
        if t.entries[i].digest == digest:
            fetch_entry(&t.entries[i], key.n_bytes)
            if matches(&t.entries[i], key):
                return &t.entries[i]
        i = after(t, i)
    return NULL

cdef inline Entry* find_digest(const Table* t, uint64_t digest) noexcept nogil:
    """Return any entry that is filed under this digest, or NULL."""
    cdef uint32_t i
    if t.n == 0:
        return NULL
    i = home_of(t, digest)
    while t.entries[i].value != NULL:
        if t.entries[i].digest == digest:
            return &t.entries[i]
        i = after(t, i)
    return NULL

cdef inline void place(Table* t, const Entry* entry, uint32_t tick) noexcept nogil:
    cdef uint32_t i = home_of(t, entry.digest)
    while t.entries[i].value != NULL:
        i = after(t, i)
    t.entries[i] = entry[0]
    t.ticks[i] = tick

cdef inline void vacate(Table* t, uint32_t i) noexcept nogil:
    """Empty place `i` and move back the entries that were pushed past it."""
    cdef uint32_t j = i, home
    while True:
        j = after(t, j)
        if t.entries[j].value == NULL:
            break
        home = home_of(t, t.entries[j].digest)
        # The entry at j may move back to i unless its home is cyclically in (i, j].
        if (home <= i or home > j) if i < j else (home <= i and home > j):
            t.entries[i] = t.entries[j]
            t.ticks[i] = t.ticks[j]
            i = j
    t.entries[i].value = NULL
    t.ticks[i] = 0

cdef inline int resize(Table* t, uint32_t capacity) noexcept nogil:
    """Move all entries to arrays of `capacity` places; return 0 if there is no memory.

    Homes keep their order, so one sweep is enough.
    """
    cdef Entry* entries = t.entries
    cdef uint32_t* ticks = t.ticks
    cdef uint32_t i, n_places = t.capacity
    t.entries = <Entry*> zeroed(capacity * sizeof(Entry))
    t.ticks = <uint32_t*> zeroed(capacity * sizeof(uint32_t))
    if t.entries == NULL or t.ticks == NULL:
        free(t.entries)
        free(t.ticks)
        t.entries = entries
        t.ticks = ticks
        return 0
    t.capacity = capacity
    for i in range(n_places):
        if entries[i].value != NULL:
            place(t, &entries[i], ticks[i])
    free(entries)
    free(ticks)
    return 1

cdef inline bint is_crammed(const Table* t) noexcept nogil:
    """Return whether one more entry would fill more than two thirds of the places."""
    return 3 * <uint64_t> (t.n + 1) > 2 * <uint64_t> t.capacity

cdef inline uint32_t grown_capacity(const Table* t) noexcept nogil:
    cdef uint32_t capacity = t.capacity + t.capacity // 4
    if t.capacity == 0:
        return MIN_CAPACITY
    if t.capacity < DOUBLE_UNTIL:
        capacity = 2 * t.capacity
    # Stop at `enough`, the places that the maximum number of entries needs.
    return t.enough if t.capacity < t.enough < capacity else capacity

cdef inline uint64_t bytes_to_grow(const Table* t, const Key* key) noexcept nogil:
    """Return the most bytes by which the arrays grow for one more entry."""
    cdef uint64_t n_bytes = 0
    if is_crammed(t):
        n_bytes += (grown_capacity(t) - t.capacity) * (sizeof(Entry) + sizeof(uint32_t))
    if is_long(key) and 2 * (t.n_crowds + 1) > t.crowd_capacity:
        n_bytes += (grown_crowds(t) - t.crowd_capacity) * sizeof(Crowd)
    return n_bytes

cdef inline uint64_t table_bytes(const Table* t) noexcept nogil:
    return (
        <uint64_t> t.capacity * (sizeof(Entry) + sizeof(uint32_t))
        + <uint64_t> t.crowd_capacity * sizeof(Crowd)
    )

cdef inline int reserve(Table* t) noexcept nogil:
    """Make room for one more entry; return 0, with nothing changed, if there is no memory."""
    if t.n >= MAX_ENTRIES:
        return 0
    return resize(t, grown_capacity(t)) if is_crammed(t) else 1

cdef inline int settle(Table* t, const Key* key, uint64_t* digest) noexcept nogil:
    """Set the digest under which a new key is filed; return 0 if there is no memory.

    `digest` holds the key's `digest_of`. If another key is filed under it, the digest becomes
    crowded and both keys get refined digests.
    """
    cdef uint64_t here
    cdef Crowd* crowd
    cdef Entry* first
    cdef Entry moved
    cdef Key moved_key
    cdef uint32_t tick, depth = 0
    if not is_long(key):
        return 1
    here = sampled_of(t, key)
    while True:
        crowd = find_crowd(t, here)
        if crowd == NULL:
            first = find_digest(t, here)
            if first == NULL:
                digest[0] = here
                return 1
            moved_key = key_of(first)
            crowd = add_crowd(
                t, here, differs_at(key, &moved_key) if depth < MAX_REFINED else WHOLE
            )
            if crowd == NULL:
                retreat(t, key, here)
                return 0
            moved = first[0]
            tick = t.ticks[first - t.entries]
            vacate(t, <uint32_t> (first - t.entries))
            moved.digest = refined(t, here, crowd.offset, &moved_key)
            place(t, &moved, tick)
        crowd.n_entries += 1
        here = refined(t, here, crowd.offset, key)
        depth += 1
        if crowd.offset == WHOLE:
            digest[0] = here
            return 1

cdef inline void retreat(Table* t, const Key* key, uint64_t until) noexcept nogil:
    """Take a key out of every crowd that it is filed through, down to the digest `until`."""
    cdef uint64_t here = sampled_of(t, key), offset, following
    cdef Crowd* crowd
    while here != until:
        crowd = find_crowd(t, here)
        if crowd == NULL:
            return
        offset = crowd.offset
        following = refined(t, here, offset, key)
        leave_crowd(t, crowd)
        if offset == WHOLE:
            return
        here = following

cdef inline void insert(Table* t, const Entry* entry, uint32_t tick) noexcept nogil:
    """Add an entry after `reserve` and `settle`; `tick` is not 0."""
    place(t, entry, tick)
    t.n += 1

cdef inline Entry remove(Table* t, uint32_t position) noexcept nogil:
    """Take an entry out and return it."""
    cdef Entry gone = t.entries[position]
    cdef Key key
    if t.n_crowds:
        key = key_of(&gone)
        if is_long(&key):
            retreat(t, &key, gone.digest)
    vacate(t, position)
    t.n -= 1
    if t.capacity > 8 * MIN_CAPACITY and 4 * <uint64_t> t.n < t.capacity:
        resize(t, t.capacity // 2)  # if there is no memory, the table stays large
    return gone

cdef inline uint32_t oldest_of(
    const Table* t, uint64_t* rng, uint32_t n_draws, uint32_t clock
) noexcept nogil:
    """Return the position of the least recently used of `n_draws` different random entries.

    Every entry is equally likely; with at most `n_draws` entries the result is exactly the oldest.
    Implementation: steps of a random odd number from a random start visit each place of a power of
    two once. No branch depends on the drawn values, because a misprediction would cost more than
    the draw.
    """
    cdef uint64_t both, mask, step, position, aged, oldest = 0  # age << 32 | position
    cdef uint32_t tick, n_seen = 0, n_wanted = min(n_draws, t.n)
    rng[0] += <uint64_t> 0xA0761D6478BD642F  # wyrand (Wang Yi): a counter, folded
    both = fold(rng[0], rng[0] ^ t.secret[0])
    mask = ~<uint64_t> 0 >> count_leading_zeros(t.capacity - 1)
    position, step = both >> 32, both | 1
    while n_seen < n_wanted:
        position = (position + step) & mask
        tick = t.ticks[position if position < t.capacity else 0]
        tick = tick if position < t.capacity else 0
        n_seen += tick != 0
        # Ages are computed modulo 2**32, which is right while they stay below it.
        aged = <uint64_t> <uint32_t> (clock - tick) << 32 | position
        aged = aged if tick else 0
        oldest = max(oldest, aged)
    return <uint32_t> oldest

cdef inline void release_arrays(Table* t) noexcept nogil:
    free(t.entries)
    free(t.ticks)
    free(t.crowds)
    t.entries = NULL
    t.ticks = NULL
    t.crowds = NULL
    t.n = t.capacity = t.n_crowds = t.crowd_capacity = 0
    t.n_item_bytes = 0
