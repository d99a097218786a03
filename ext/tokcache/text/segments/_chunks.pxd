# The table of chunks, found by content.
#
# 1. A chunk's digest chooses its bucket; the chunks of a bucket are chained. Equal digests are only
#    candidates: scope, variant and all units of the key are compared.
# 2. Chunks are dense in one array, so that a random draw for eviction is one index. The last chunk
#    takes the place of a removed one.
# 3. Each chunk has links, by place and serial number, to the two chunks that followed it most
#    recently. A link between two chunks proves that a text may be cut where they meet. If many
#    different chunks follow one, `Fork` holds more links, found by the text that follows.
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from tokcache.text._digest cimport fold, full_digest
from tokcache.text.segments._keys cimport equals
from tokcache.text.segments._scan cimport Text

cdef enum:
    NO_CHUNK = 0xFFFFFFFF
    LAST_SERIAL = 0xFFFFFFFF
    MIN_CHUNKS = 64
    N_LINKS = 2
    N_FORKS = 1024       # a power of two
    FORK_BYTES = 96      # a chunk is not shorter, except at the end of a text
    FORK_UNITS = 1025    # few chunks are longer

ctypedef struct Link:    # to the chunk at `place`; valid while that chunk has this serial
    uint32_t place       # or NO_CHUNK
    uint32_t serial

ctypedef struct Chunk:   # one cache line
    uint64_t digest
    uint64_t scope
    int32_t* ids         # one allocation: the ids, then the key
    uint32_t n_ids
    uint32_t n_units     # of the key
    uint32_t serial      # unique among the stored chunks
    Link[N_LINKS] followers  # the chunks that followed it, most recent first
    uint32_t chain       # the next chunk of its bucket, or NO_CHUNK
    uint32_t tick
    uint8_t width        # bytes per unit of the key
    uint8_t variant
    uint8_t end_class
    uint8_t is_tail      # seen only at the end of a text, so its end is not proven elsewhere

ctypedef struct Fork:    # one of many chunks that followed a chunk
    uint32_t serial      # of the chunk before
    Link ahead

ctypedef struct Chunks:
    Chunk* all
    uint32_t* buckets
    uint32_t n
    uint32_t capacity    # of both arrays; a power of two
    uint32_t serial      # of the newest chunk
    uint64_t item_bytes  # of ids and keys
    Fork[N_FORKS] forks


cdef inline const uint8_t* key_of(const Chunk* chunk) noexcept nogil:
    return <const uint8_t*> (chunk.ids + chunk.n_ids)

cdef inline uint64_t chunk_item_bytes(
    uint64_t n_ids, uint64_t n_units, uint64_t width
) noexcept nogil:
    return (n_ids * sizeof(int32_t) + n_units * width + 8 + 15) & ~<uint64_t> 15

cdef inline uint64_t chunks_bytes(const Chunks* c) noexcept nogil:
    return c.item_bytes + <uint64_t> c.capacity * (sizeof(Chunk) + sizeof(uint32_t))

cdef inline bint is_chunk(const Chunk* chunk, const Text* t, size_t start) noexcept nogil:
    """Return whether the text continues at `start` with this chunk."""
    return (
        chunk.n_units <= t.n_units - start
        and equals(t, start, chunk.n_units, chunk.width, key_of(chunk))
    )

cdef inline Link no_link() noexcept nogil:
    cdef Link link
    link.place = NO_CHUNK
    link.serial = 0
    return link

cdef inline Link link_to(const Chunks* c, uint32_t place) noexcept nogil:
    cdef Link link = no_link()
    if place != NO_CHUNK:
        link.place = place
        link.serial = c.all[place].serial
    return link

cdef inline uint32_t place_of(const Chunks* c, Link link) noexcept nogil:
    """Return the place of the linked chunk, or NO_CHUNK if it was removed."""
    if link.place < c.n and c.all[link.place].serial == link.serial:
        return link.place
    return NO_CHUNK

cdef inline void put_follower(Chunks* c, uint32_t place, Link link) noexcept nogil:
    """Put a link first among the chunks that followed `place`; the oldest link is dropped."""
    cdef Link* links = c.all[place].followers
    cdef int i = 0
    if links[0].place == link.place and links[0].serial == link.serial:
        return
    while i < N_LINKS - 1 and (links[i].place != link.place or links[i].serial != link.serial):
        i += 1
    while i > 0:
        links[i] = links[i - 1]
        i -= 1
    links[0] = link

cdef extern from *:
    void prefetch "__builtin_prefetch" (const void* at) noexcept nogil

cdef inline void fetch_ahead(const Chunks* c, uint32_t place) noexcept nogil:
    """Prefetch the chunk that probably follows, before it is compared."""
    cdef uint32_t ahead = c.all[place].followers[0].place
    cdef const Chunk* one
    cdef const uint8_t* key
    cdef uint32_t i
    if ahead >= c.n:
        return
    one = &c.all[ahead]
    key = key_of(one)
    for i in range(8):
        prefetch(key + 64 * i)
    if one.followers[0].place < c.n:
        prefetch(&c.all[one.followers[0].place])

cdef inline uint32_t find_follower(
    const Chunks* c, uint32_t place, const Text* t, size_t start, uint64_t scope
) noexcept nogil:
    """Return the linked chunk that the text continues with at `start`, or NO_CHUNK."""
    cdef uint32_t found
    cdef int i
    for i in range(N_LINKS):
        found = place_of(c, c.all[place].followers[i])
        if found != NO_CHUNK:
            fetch_ahead(c, found)
        if found != NO_CHUNK and c.all[found].scope == scope and is_chunk(&c.all[found], t, start):
            return found
    return NO_CHUNK

cdef inline Fork* fork_at(
    Chunks* c, uint32_t place, const Text* t, size_t end, const uint64_t* secret
) noexcept nogil:
    """Return the fork for a chunk that ends at `end` and the text that follows it.

    It is chosen by the first FORK_BYTES that follow and, near the end of the text, by how many
    units follow.
    """
    cdef size_t n_left = t.n_units - end
    cdef size_t n_bytes = min(<size_t> FORK_BYTES, n_left * t.kind)
    cdef uint64_t before = <uint64_t> c.all[place].serial << 32
    before |= min(n_left, <size_t> FORK_UNITS)
    return &c.forks[full_digest(t.data + end * t.kind, n_bytes, before, secret) & (N_FORKS - 1)]

cdef inline uint32_t find_next(
    Chunks* c, uint32_t place, const Text* t, size_t end, uint64_t scope, const uint64_t* secret
) noexcept nogil:
    """Return a chunk that followed `place` and that the text continues with at `end`, if any."""
    cdef const Fork* fork
    cdef uint32_t found
    if end == t.n_units:
        return NO_CHUNK
    found = find_follower(c, place, t, end, scope)
    if found == NO_CHUNK:
        fork = fork_at(c, place, t, end, secret)
        if fork.serial == c.all[place].serial:
            found = place_of(c, fork.ahead)
            if found != NO_CHUNK and not (
                c.all[found].scope == scope and is_chunk(&c.all[found], t, end)
            ):
                found = NO_CHUNK
    return found

cdef inline void remember_fork(
    Chunks* c, uint32_t before, const Text* t, size_t end, uint32_t place, const uint64_t* secret
) noexcept nogil:
    """Remember `place` as the chunk that followed `before`, which ends at `end`."""
    cdef Fork* fork = fork_at(c, before, t, end, secret)
    fork.serial = c.all[before].serial
    fork.ahead = link_to(c, place)

cdef inline uint32_t find_chunk(
    const Chunks* c, uint64_t digest, const Text* t, size_t start, size_t stop,
    uint64_t scope, uint32_t variant,
) noexcept nogil:
    cdef uint32_t i
    if c.n == 0:
        return NO_CHUNK
    i = c.buckets[digest & (c.capacity - 1)]
    while i != NO_CHUNK:
        if (
            c.all[i].digest == digest and c.all[i].n_units == stop - start
            and c.all[i].scope == scope and c.all[i].variant == variant
            and is_chunk(&c.all[i], t, start)
        ):
            return i
        i = c.all[i].chain
    return NO_CHUNK

cdef inline uint64_t bytes_to_grow(const Chunks* c) noexcept nogil:
    """Return the bytes by which the arrays grow for one more chunk."""
    if c.n < c.capacity:
        return 0
    return max(c.capacity, <uint32_t> MIN_CHUNKS) * (sizeof(Chunk) + sizeof(uint32_t))

cdef inline int grow_chunks(Chunks* c) noexcept nogil:
    """Double the arrays; return 0, with nothing changed, if there is no memory."""
    cdef uint32_t capacity = 2 * c.capacity if c.capacity else MIN_CHUNKS
    cdef uint32_t* buckets = <uint32_t*> malloc(capacity * sizeof(uint32_t))
    cdef Chunk* grown
    cdef uint32_t i, home
    if buckets == NULL:
        return 0
    grown = <Chunk*> realloc(c.all, capacity * sizeof(Chunk))
    if grown == NULL:
        free(buckets)
        return 0
    free(c.buckets)
    c.all = grown
    c.buckets = buckets
    c.capacity = capacity
    memset(buckets, 0xFF, capacity * sizeof(uint32_t))
    for i in range(c.n):
        home = <uint32_t> (c.all[i].digest & (capacity - 1))
        c.all[i].chain = buckets[home]
        buckets[home] = i
    return 1

cdef inline void unlink(Chunks* c, uint32_t index, uint32_t instead) noexcept nogil:
    """Replace the pointer to `index` in its bucket by `instead`."""
    cdef uint32_t* link = &c.buckets[c.all[index].digest & (c.capacity - 1)]
    while link[0] != index:
        link = &c.all[link[0]].chain
    link[0] = instead

cdef inline void remove_chunk(Chunks* c, uint32_t index) noexcept nogil:
    cdef uint32_t last = c.n - 1
    c.item_bytes -= chunk_item_bytes(
        c.all[index].n_ids, c.all[index].n_units, c.all[index].width
    )
    free(c.all[index].ids)
    unlink(c, index, c.all[index].chain)
    if index != last:
        unlink(c, last, index)
        c.all[index] = c.all[last]
    c.n = last

cdef inline void add_chunk(Chunks* c, const Chunk* chunk) noexcept nogil:
    """Add a chunk that is not in the table; the caller has made room for it."""
    cdef uint32_t home = <uint32_t> (chunk.digest & (c.capacity - 1)), i
    c.serial += 1
    c.all[c.n] = chunk[0]
    c.all[c.n].serial = c.serial
    for i in range(N_LINKS):
        c.all[c.n].followers[i] = no_link()
    c.all[c.n].chain = c.buckets[home]
    c.buckets[home] = c.n
    c.n += 1
    c.item_bytes += chunk_item_bytes(chunk.n_ids, chunk.n_units, chunk.width)

cdef inline uint32_t oldest_chunk(
    const Chunks* c, uint64_t* rng, uint32_t clock, uint32_t n_draws
) noexcept nogil:
    """Return the least recently used of `n_draws` random chunks, or of all if there are fewer."""
    cdef uint32_t i, drawn, oldest = 0, age, greatest = 0
    for i in range(min(n_draws, c.n)):
        rng[0] += <uint64_t> 0xA0761D6478BD642F  # wyrand (Wang Yi): a counter, folded
        drawn = <uint32_t> (
            (<uint64_t> <uint32_t> fold(rng[0], rng[0] ^ <uint64_t> 0xE7037ED1A0B428DB) * c.n) >> 32
        )
        drawn = i if c.n <= n_draws else drawn
        age = clock - c.all[drawn].tick
        if i == 0 or age > greatest:
            oldest, greatest = drawn, age
    return oldest

cdef inline void release_chunks(Chunks* c) noexcept nogil:
    cdef uint32_t i
    for i in range(c.n):
        free(c.all[i].ids)
    free(c.all)
    free(c.buckets)
    memset(c, 0, sizeof(Chunks))
