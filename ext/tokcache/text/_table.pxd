# The hash table below L0: raw keys, entries dense in one array, an open-addressing index.
#
# - entries[0 .. n) are the entries in no order, so that a truly random draw is one index.
# - slots[] is the index: (tag << 32 | position + 1), 0 for empty; tag is the high half of the
#   digest, and its home is tag * n_slots >> 32. A slot alone tells its home, so that growing and
#   removing never touch an entry.
# - A long key is filed under a digest of samples. When a second key comes with the same samples,
#   that digest is "crowded": both, and all that follow, are filed under their full digest. A
#   crowded digest knows how many entries stand behind it and goes with the last one.
#
# Knows no Python object and takes no lock. What `value` and `key` point to belongs to the caller.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp

from tokcache.text._digest cimport N_SECRETS, SAMPLED_MIN, full_digest, sampled_digest

cdef extern from *:
    """
    #define tokcache_fetch(p) __builtin_prefetch((const void *)(p))
    """
    void fetch "tokcache_fetch"(const void* p) noexcept nogil

cdef enum:
    MIN_SLOTS = 16
    MIN_CAPACITY = 8
    MIN_CROWDS = 8
    DOUBLE_UNTIL = 4096      # entries; above, arrays grow by a quarter
    MAX_ENTRIES = 0x7FFFFFF0

    KIND_MASK = 0x7          # of meta: bytes a unit (1, 2 or 4)
    IS_FULL = 0x8            # filed under its full digest because the sampled one is crowded
    OWNER_SHIFT = 4          # two bits for the caller
    OWNER_MASK = 0x30
    SCOPE_SHIFT = 8          # the scope's number

ctypedef struct Key:
    const uint8_t* data
    size_t n_bytes
    uint32_t n_units
    uint32_t kind
    uint32_t scope

ctypedef struct Entry:
    uint64_t digest
    void* value
    const uint8_t* key
    uint32_t n_units
    uint32_t meta

ctypedef struct Crowd:
    uint64_t digest
    uint64_t n_entries       # 0: an empty place

ctypedef struct Table:
    Entry* entries
    uint32_t* ticks          # the clock at the last use of each entry
    uint64_t* slots
    Crowd* crowds
    uint32_t n
    uint32_t capacity
    uint32_t n_slots
    uint32_t n_crowds
    uint32_t crowd_capacity  # a power of two or 0
    uint64_t n_item_bytes    # kept by the caller: bytes of all keys and values
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

cdef inline bint matches(const Entry* entry, uint64_t digest, const Key* key) noexcept nogil:
    return (
        entry.digest == digest
        and entry.n_units == key.n_units
        and (entry.meta & KIND_MASK) == key.kind
        and (entry.meta >> SCOPE_SHIFT) == key.scope
        and (entry.key == key.data or memcmp(entry.key, key.data, key.n_bytes) == 0)
    )


# ---- the index

cdef inline uint32_t home_of(const Table* t, uint64_t slot) noexcept nogil:
    return <uint32_t> (((slot >> 32) * t.n_slots) >> 32)

cdef inline uint32_t next_slot(const Table* t, uint32_t i) noexcept nogil:
    return i + 1 if i + 1 < t.n_slots else 0

cdef inline void file_slot(Table* t, uint64_t slot) noexcept nogil:
    cdef uint32_t i = home_of(t, slot)
    while t.slots[i]:
        i = next_slot(t, i)
    t.slots[i] = slot

cdef inline uint64_t slot_of(uint64_t digest, uint32_t position) noexcept nogil:
    return (digest & <uint64_t> 0xFFFFFFFF00000000) | (position + 1)

cdef inline uint32_t find_slot(const Table* t, uint64_t digest, uint32_t position) noexcept nogil:
    """Return where the entry at `position` is indexed; it must be."""
    cdef uint64_t slot = slot_of(digest, position)
    cdef uint32_t i = home_of(t, slot)
    while t.slots[i] != slot:
        i = next_slot(t, i)
    return i

cdef inline void clear_slot(Table* t, uint32_t i) noexcept nogil:
    """Empty slot `i` and move back what was pushed past it."""
    cdef uint32_t j = i, home
    while True:
        j = next_slot(t, j)
        if t.slots[j] == 0:
            break
        home = home_of(t, t.slots[j])
        # A slot may move back to i unless its home lies cyclically in (i, j].
        if (home <= i or home > j) if i < j else (home <= i and home > j):
            t.slots[i] = t.slots[j]
            i = j
    t.slots[i] = 0

cdef inline int grow_slots(Table* t, uint32_t n_slots) noexcept nogil:
    """Return 0 if there was no memory; homes keep their order, so that this is one sweep."""
    cdef uint64_t* old = t.slots
    cdef uint32_t i, n_old = t.n_slots
    cdef uint64_t* grown = <uint64_t*> calloc(n_slots, sizeof(uint64_t))
    if grown == NULL:
        return 0
    t.slots = grown
    t.n_slots = n_slots
    for i in range(n_old):
        if old[i]:
            file_slot(t, old[i])
    free(old)
    return 1


# ---- crowded digests

cdef inline Crowd* find_crowd(const Table* t, uint64_t digest) noexcept nogil:
    """Return its place, or NULL if the digest is not crowded."""
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

cdef inline int add_crowd(Table* t, uint64_t digest) noexcept nogil:
    """Note that one entry stands behind this crowded digest; 0 if there was no memory."""
    cdef Crowd* old = t.crowds
    cdef uint32_t i, n_old = t.crowd_capacity
    cdef Crowd crowd
    crowd.digest = digest
    crowd.n_entries = 1
    if 2 * (t.n_crowds + 1) > n_old:
        t.crowds = <Crowd*> calloc(grown_crowds(t), sizeof(Crowd))
        if t.crowds == NULL:
            t.crowds = old
            return 0
        t.crowd_capacity = grown_crowds(t)
        for i in range(n_old):
            if old[i].n_entries:
                file_crowd(t, old[i])
        free(old)
    file_crowd(t, crowd)
    t.n_crowds += 1
    return 1

cdef inline void leave_crowd(Table* t, uint64_t digest) noexcept nogil:
    """One entry behind this crowded digest goes; the digest goes with the last."""
    cdef Crowd* crowd = find_crowd(t, digest)
    cdef Crowd moved
    cdef uint32_t mask = t.crowd_capacity - 1, i
    crowd.n_entries -= 1
    if crowd.n_entries:
        return
    t.n_crowds -= 1
    i = <uint32_t> (crowd - t.crowds)
    while True:  # what was pushed past it is filed anew
        i = (i + 1) & mask
        if t.crowds[i].n_entries == 0:
            return
        moved = t.crowds[i]
        t.crowds[i].n_entries = 0
        file_crowd(t, moved)


# ---- entries

cdef inline uint64_t digest_of(const Table* t, const Key* key) noexcept nogil:
    """Return the digest under which this key is filed or would be."""
    cdef uint64_t digest
    if not is_long(key):
        return full_of(t, key)
    digest = sampled_of(t, key)
    return digest if find_crowd(t, digest) == NULL else full_of(t, key)

cdef inline Entry* find(const Table* t, uint64_t digest, const Key* key) noexcept nogil:
    """Return the entry of exactly this key, or NULL."""
    cdef uint64_t slot
    cdef uint32_t i, position
    if t.n == 0:
        return NULL
    i = home_of(t, digest)
    while True:
        slot = t.slots[i]
        if slot == 0:
            return NULL
        if (slot ^ digest) >> 32 == 0:
            position = <uint32_t> slot - 1
            fetch(t.entries[position].key)
            if matches(&t.entries[position], digest, key):
                return &t.entries[position]
        i = next_slot(t, i)

cdef inline Entry* find_digest(const Table* t, uint64_t digest) noexcept nogil:
    """Return any entry that is filed under this digest, or NULL."""
    cdef uint32_t i
    if t.n == 0:
        return NULL
    i = home_of(t, digest)
    while t.slots[i]:
        if (t.slots[i] ^ digest) >> 32 == 0:
            if t.entries[<uint32_t> t.slots[i] - 1].digest == digest:
                return &t.entries[<uint32_t> t.slots[i] - 1]
        i = next_slot(t, i)
    return NULL

cdef inline uint32_t grown(uint32_t n, uint32_t minimum) noexcept nogil:
    if n == 0:
        return minimum
    return 2 * n if n < DOUBLE_UNTIL else n + n // 4

cdef inline uint64_t bytes_to_grow(const Table* t, const Key* key) noexcept nogil:
    """Return by how many bytes the arrays must grow, at most, to take one more entry."""
    cdef uint64_t n_bytes = 0
    if t.n == t.capacity:
        n_bytes += (grown(t.capacity, MIN_CAPACITY) - t.capacity) * (
            sizeof(Entry) + sizeof(uint32_t)
        )
    if 4 * <uint64_t> (t.n + 1) > 3 * <uint64_t> t.n_slots:
        n_bytes += (grown(t.n_slots, MIN_SLOTS) - t.n_slots) * sizeof(uint64_t)
    if is_long(key) and 2 * (t.n_crowds + 1) > t.crowd_capacity:
        n_bytes += (grown_crowds(t) - t.crowd_capacity) * sizeof(Crowd)
    return n_bytes

cdef inline uint64_t table_bytes(const Table* t) noexcept nogil:
    return (
        <uint64_t> t.capacity * (sizeof(Entry) + sizeof(uint32_t))
        + <uint64_t> t.n_slots * sizeof(uint64_t)
        + <uint64_t> t.crowd_capacity * sizeof(Crowd)
    )

cdef inline int reserve(Table* t) noexcept nogil:
    """Make room for one more entry; 0, and nothing changed, if there was no memory."""
    cdef uint32_t capacity
    cdef void* moved
    if t.n >= MAX_ENTRIES:
        return 0
    if t.n == t.capacity:
        capacity = grown(t.capacity, MIN_CAPACITY)
        moved = realloc(t.entries, capacity * sizeof(Entry))
        if moved == NULL:
            return 0
        t.entries = <Entry*> moved
        moved = realloc(t.ticks, capacity * sizeof(uint32_t))
        if moved == NULL:
            return 0
        t.ticks = <uint32_t*> moved
        t.capacity = capacity
    if 4 * <uint64_t> (t.n + 1) > 3 * <uint64_t> t.n_slots:
        return grow_slots(t, grown(t.n_slots, MIN_SLOTS))
    return 1

cdef inline int settle(Table* t, const Key* key, uint64_t* digest, uint32_t* flag) noexcept nogil:
    """Choose the digest to file a new key under; 0 if there was no memory.

    The first entry of a crowd is filed anew under its full digest when the second comes.
    """
    cdef uint64_t sampled
    cdef Entry* first
    cdef Crowd* crowd
    cdef Key first_key
    flag[0] = 0
    if not is_long(key):
        digest[0] = full_of(t, key)
        return 1
    sampled = sampled_of(t, key)
    digest[0] = sampled
    crowd = find_crowd(t, sampled)
    if crowd == NULL:
        first = find_digest(t, sampled)
        if first == NULL or first.meta & IS_FULL:
            return 1
        if not add_crowd(t, sampled):
            return 0
        crowd = find_crowd(t, sampled)
        first_key = key_of(first)
        clear_slot(t, find_slot(t, sampled, <uint32_t> (first - t.entries)))
        first.digest = full_of(t, &first_key)
        first.meta |= IS_FULL
        file_slot(t, slot_of(first.digest, <uint32_t> (first - t.entries)))
    crowd.n_entries += 1
    digest[0] = full_of(t, key)
    flag[0] = IS_FULL
    return 1

cdef inline void insert(Table* t, const Entry* entry, uint32_t tick) noexcept nogil:
    """Add an entry; room was reserved and its digest settled."""
    t.entries[t.n] = entry[0]
    t.ticks[t.n] = tick
    file_slot(t, slot_of(entry.digest, t.n))
    t.n += 1

cdef inline Entry remove(Table* t, uint32_t position) noexcept nogil:
    """Take an entry out and return it; the last entry fills the hole."""
    cdef Entry gone = t.entries[position]
    cdef uint32_t last = t.n - 1
    cdef Key key
    if gone.meta & IS_FULL:
        key = key_of(&gone)
        leave_crowd(t, sampled_of(t, &key))
    clear_slot(t, find_slot(t, gone.digest, position))
    if position != last:
        t.slots[find_slot(t, t.entries[last].digest, last)] = slot_of(
            t.entries[last].digest, position
        )
        t.entries[position] = t.entries[last]
        t.ticks[position] = t.ticks[last]
    t.n = last
    return gone

cdef inline uint64_t draw(uint64_t* rng) noexcept nogil:
    """Return the next number of xorshift64* (Vigna 2016)."""
    cdef uint64_t x = rng[0]
    x ^= x >> 12
    x ^= x << 25
    x ^= x >> 27
    rng[0] = x
    return x * <uint64_t> 0x2545F4914F6CDD1D

cdef inline uint32_t oldest_of(
    const Table* t, uint64_t* rng, uint32_t n_draws, uint32_t clock
) noexcept nogil:
    """Return the position of the least recently used of `n_draws` random entries."""
    cdef uint32_t oldest = 0, position, age, highest = 0, i
    for i in range(n_draws):
        position = <uint32_t> (((draw(rng) >> 32) * t.n) >> 32)
        age = clock - t.ticks[position]  # modulo 2**32: right while ages stay below it
        if i == 0 or age > highest:
            highest = age
            oldest = position
    return oldest

cdef inline void release_arrays(Table* t) noexcept nogil:
    free(t.entries)
    free(t.ticks)
    free(t.slots)
    free(t.crowds)
    t.entries = NULL
    t.ticks = NULL
    t.slots = NULL
    t.crowds = NULL
    t.n = t.capacity = t.n_slots = t.n_crowds = t.crowd_capacity = 0
    t.n_item_bytes = 0
