# The two tables of the segment cache: chunks, and the short segments inside missed chunks.
#
# Keys are code points with the fewest bytes per code point that hold all of them, so that a segment
# has the same key in every string. A digest finds candidates; their bytes are then compared.
#
# - Chunks are dense in one array, so that a random draw for eviction is one index. The last chunk
#   takes the place of a removed one. Each chunk has links, by place and serial number, to the two
#   chunks that followed it most recently. A link between two chunks proves that a text may be cut
#   where they meet. If many different chunks follow one, `Fork` holds more links, found by the
#   text that follows.
# - Short segments are in sets of WAYS entries, one cache line each; the oldest of a set is evicted.
#
# The tables use no Python objects and take no lock.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from tokcache.text._digest cimport fold, full_digest
from tokcache.text.segments._scan cimport Text, bits_of

cdef enum:
    NO_CHUNK = 0xFFFFFFFF
    MIN_CHUNKS = 64
    N_LINKS = 2
    N_FORKS = 1024       # a power of two
    FORK_BYTES = 96      # a chunk is not shorter, except at the end of a text
    FORK_UNITS = 1025    # few chunks are longer
    WAYS = 4
    MIN_SETS = 64
    SHORT_BYTES = 24     # maximum key length of a short segment
    SHORT_IDS = 5        # maximum number of token ids of a short segment
    PENDING = 255        # as n_ids: ids[0] is a unit of the Walk with the serial ids[1]

ctypedef struct Link:    # to the chunk at `place`; valid while that chunk has this serial
    uint32_t place       # or NO_CHUNK
    uint32_t serial

ctypedef struct Chunk:   # one cache line
    uint64_t digest
    uint64_t scope
    int32_t* ids         # one allocation: the ids, then the key
    uint32_t n_ids
    uint32_t n_units
    uint32_t serial      # unique among the stored chunks
    Link[N_LINKS] behind  # the chunks that followed it, most recent first
    uint32_t chain       # the next chunk of its bucket, or NO_CHUNK
    uint32_t tick
    uint8_t width        # bytes per unit of the key
    uint8_t variant
    uint8_t end_class
    uint8_t is_tail       # seen only at the end of a text, so its end is not proven elsewhere

ctypedef struct Fork:    # one of many chunks that followed a chunk
    uint32_t serial      # of the chunk before
    Link ahead

ctypedef struct Chunks:
    Chunk* all
    uint32_t* buckets
    uint32_t n
    uint32_t capacity    # of both arrays; a power of two
    uint32_t serial      # of the newest chunk
    uint64_t item_bytes

ctypedef struct Short:   # one cache line
    uint8_t[SHORT_BYTES] key  # padded with zeros
    uint64_t scope
    int32_t[SHORT_IDS] ids
    uint32_t tick        # 0: empty
    uint32_t check       # high half of the digest
    uint8_t n_bytes
    uint8_t n_ids
    uint8_t width
    uint8_t variant

ctypedef struct Shorts:
    Short* all
    uint32_t n_sets      # a power of two or 0
    uint32_t n


# ---- keys

cdef inline uint32_t width_of(const Text* t, size_t start, size_t stop) noexcept nogil:
    """Return the fewest bytes per unit that hold every unit of this range."""
    cdef uint32_t together
    if t.kind == 1:
        return 1
    together = bits_of(t, start, stop)
    return 1 if together < 0x100 else 2 if together < 0x10000 else 4

cdef inline void narrow(
    const Text* t, size_t start, size_t stop, uint32_t width, uint8_t* into
) noexcept nogil:
    """Copy the units of a range with `width` bytes each."""
    cdef size_t i
    cdef const uint16_t* two = <const uint16_t*> t.data
    cdef const uint32_t* four = <const uint32_t*> t.data
    if t.kind == width:
        memcpy(into, t.data + start * width, (stop - start) * width)
    elif t.kind == 2:
        for i in range(start, stop):
            into[i - start] = <uint8_t> two[i]
    elif width == 1:
        for i in range(start, stop):
            into[i - start] = <uint8_t> four[i]
    else:
        for i in range(start, stop):
            (<uint16_t*> into)[i - start] = <uint16_t> four[i]

cdef inline bint equals(
    const Text* t, size_t start, size_t n, uint32_t width, const uint8_t* key
) noexcept nogil:
    """Return whether the `n` units from `start` on equal this key."""
    cdef size_t i
    cdef uint32_t differs = 0
    if t.kind == width:
        return memcmp(t.data + start * width, key, n * width) == 0
    if t.kind < width:
        return False  # the key contains a unit that is too wide for this string
    cdef const uint16_t* two = <const uint16_t*> t.data + start
    cdef const uint32_t* four = <const uint32_t*> t.data + start
    if t.kind == 2:
        if n and two[0] != key[0]:
            return False
        for i in range(n):
            differs |= two[i] ^ key[i]
    elif width == 1:
        if n and four[0] != key[0]:
            return False
        for i in range(n):
            differs |= four[i] ^ key[i]
    else:
        for i in range(n):
            differs |= four[i] ^ (<const uint16_t*> key)[i]
    return differs == 0

cdef inline const uint8_t* key_of(const Chunk* chunk) noexcept nogil:
    return <const uint8_t*> (chunk.ids + chunk.n_ids)

cdef inline uint64_t chunk_item_bytes(
    uint64_t n_ids, uint64_t n_units, uint64_t width
) noexcept nogil:
    return (n_ids * sizeof(int32_t) + n_units * width + 8 + 15) & ~<uint64_t> 15


# ---- chunks

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

cdef inline void put_behind(Chunks* c, uint32_t place, Link link) noexcept nogil:
    """Put a link first among the chunks that followed `place`; the oldest link is dropped."""
    cdef Link* links = c.all[place].behind
    cdef int i = 0
    if links[0].place == link.place and links[0].serial == link.serial:
        return
    while i < N_LINKS - 1 and (links[i].place != link.place or links[i].serial != link.serial):
        i += 1
    while i > 0:
        links[i] = links[i - 1]
        i -= 1
    links[0] = link

cdef inline Fork* fork_at(
    Fork* forks, const Chunks* c, uint32_t place, const Text* t, size_t end,
    const uint64_t* secret,
) noexcept nogil:
    """Return the fork for a chunk that ends at `end` and the text that follows it.

    It is chosen by the first FORK_BYTES that follow and, near the end of the text, by how many
    units follow.
    """
    cdef size_t n_left = t.n_units - end
    cdef size_t n_bytes = min(<size_t> FORK_BYTES, n_left * t.kind)
    cdef uint64_t before = <uint64_t> c.all[place].serial << 32
    before |= min(n_left, <size_t> FORK_UNITS)
    return &forks[full_digest(t.data + end * t.kind, n_bytes, before, secret) & (N_FORKS - 1)]

cdef extern from *:
    void prefetch "__builtin_prefetch" (const void* at) noexcept nogil

cdef inline void fetch_ahead(const Chunks* c, uint32_t place) noexcept nogil:
    """Prefetch the chunk that probably follows, before it is compared."""
    cdef uint32_t ahead = c.all[place].behind[0].place
    cdef const Chunk* one
    cdef const uint8_t* key
    cdef uint32_t i
    if ahead >= c.n:
        return
    one = &c.all[ahead]
    key = key_of(one)
    for i in range(8):
        prefetch(key + 64 * i)
    if one.behind[0].place < c.n:
        prefetch(&c.all[one.behind[0].place])

cdef inline uint32_t find_behind(
    const Chunks* c, uint32_t place, const Text* t, size_t start, uint64_t scope
) noexcept nogil:
    """Return the linked chunk that the text continues with at `start`, or NO_CHUNK."""
    cdef uint32_t found
    cdef int i
    for i in range(N_LINKS):
        found = place_of(c, c.all[place].behind[i])
        if found != NO_CHUNK:
            fetch_ahead(c, found)
        if found != NO_CHUNK and c.all[found].scope == scope and is_chunk(&c.all[found], t, start):
            return found
    return NO_CHUNK

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
        c.all[c.n].behind[i] = no_link()
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


# ---- short segments

cdef inline Short* set_of(const Shorts* s, uint64_t digest) noexcept nogil:
    return &s.all[(digest & (s.n_sets - 1)) * WAYS]

cdef inline bint is_short(const Short* one, const Short* key) noexcept nogil:
    return (
        one.tick and one.check == key.check and one.scope == key.scope
        and memcmp(&one.key[0], &key.key[0], SHORT_BYTES) == 0
        and one.n_bytes == key.n_bytes and one.width == key.width and one.variant == key.variant
    )

cdef inline Short* find_short(const Shorts* s, uint64_t digest, const Short* key) noexcept nogil:
    cdef Short* at
    cdef int i
    if s.n_sets == 0:
        return NULL
    at = set_of(s, digest)
    for i in range(WAYS):
        if is_short(&at[i], key):
            return &at[i]
    return NULL

cdef inline Short* place_short(
    Shorts* s, uint64_t digest, uint32_t clock, bint* evicts
) noexcept nogil:
    """Return the place for a new entry: an empty one, or the oldest of its set."""
    cdef Short* at = set_of(s, digest)
    cdef Short* oldest = at
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

cdef inline uint64_t shorts_bytes(const Shorts* s) noexcept nogil:
    return <uint64_t> s.n_sets * WAYS * sizeof(Short)

cdef inline void release_shorts(Shorts* s) noexcept nogil:
    free(s.all)
    memset(s, 0, sizeof(Shorts))
