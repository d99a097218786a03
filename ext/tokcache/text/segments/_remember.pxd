# Keeps texts whose chunks were all found as beginnings: see `_beginnings`.
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport malloc, realloc
from libc.string cimport memcpy, memset

from tokcache.text.segments._beginnings cimport (
    LEAST_SHARE, LEAST_UNITS, NO_BEGINNING, Beginning, Block, Stop, beginning_bytes,
    beginnings_bytes, block_ids, bytes_of, hold, new_block, oldest_beginning, release_beginning,
    release_beginnings, release_block, remove_beginning, reserve_beginning, set_marks,
)
from tokcache.text.segments._chunks cimport Chunk, link_to
from tokcache.text.segments._lookup cimport Lookup
from tokcache.text.segments._store cimport (
    BEGINNING_SHARE, N_DRAWS, Store, evict_chunk, store_bytes,
)


cdef inline void remember(Store* s, Lookup* l) noexcept nogil:
    """Keep a text whose chunks were all found as a beginning, if that saves enough.

    The ids of the look-up are then those of the beginning, and none are in `run`: afterwards any
    chunk may be evicted.
    """
    cdef size_t stop = l.text.n_units, n_new = stop - l.begun_units
    cdef size_t n_ids = l.n_begun_ids + l.n_run_ids
    cdef uint32_t place = l.beginning, n_stops = l.n_begun_stops + <uint32_t> l.n_run
    cdef uint64_t share = s.max_bytes // BEGINNING_SHARE, above = 0
    cdef Beginning* one
    if l.n_run == 0 or not l.keeps or stop < LEAST_UNITS:
        return
    if share < LEAST_SHARE:
        return
    if beginning_bytes(stop, l.text.kind, n_ids, n_stops) > share // 2:
        return
    if place != NO_BEGINNING and is_extended(&s.beginnings.all[place], l):
        above = s.beginnings.all[place].stops[l.n_begun_stops - 1].end
    elif n_new < LEAST_UNITS or 4 * n_new < stop:
        return
    else:
        if not reserve_beginning(&s.beginnings, share):
            drop_beginnings(s, l)
            return
        place = s.beginnings.n
        one = &s.beginnings.all[place]
        memset(one, 0, sizeof(Beginning))
        one.scope = l.scope
        one.kind = l.text.kind
    one = &s.beginnings.all[place]
    if place < s.beginnings.n:
        s.beginnings.item_bytes -= bytes_of(one)
    if not fits(one, stop, n_ids, n_stops):
        if place < s.beginnings.n:
            s.beginnings.item_bytes += bytes_of(one)
        else:
            release_beginning(one)
        drop_beginnings(s, l)
        return
    append(s, l, one)
    if place == s.beginnings.n:
        s.beginnings.n += 1
    s.beginnings.item_bytes += bytes_of(one)
    set_marks(&s.beginnings, place, above, &s.secret[0])
    shrink(s, place, share)

cdef inline void drop_beginnings(Store* s, Lookup* l) noexcept nogil:
    """Remove all beginnings, for lack of memory: an array that has grown may exceed the budget."""
    release_beginnings(&s.beginnings)
    l.beginning = NO_BEGINNING

cdef inline bint is_extended(const Beginning* one, const Lookup* l) noexcept nogil:
    """Return whether the text goes on where a beginning ends, but for a chunk that ended a text."""
    if l.text.n_units <= one.n_units:
        return False
    return l.n_begun_stops == one.n_stops or (
        l.n_begun_stops + 1 == one.n_stops and one.stops[one.n_stops - 1].is_tail
    )

cdef inline uint32_t roomy(uint32_t capacity, size_t n) noexcept nogil:
    """Return a capacity for `n` items: one that grows gets room for a quarter more."""
    if n <= capacity:
        return capacity
    return <uint32_t> (n + (n // 4 if capacity else 0))

cdef inline bint fits(
    Beginning* one, size_t n_units, size_t n_ids, uint32_t n_stops
) noexcept nogil:
    """Give a beginning room for so many units, ids and stops; return False without memory."""
    cdef uint32_t capacity = roomy(one.text_capacity, n_units)
    cdef void* grown
    cdef Block* block
    if capacity != one.text_capacity:
        grown = realloc(one.text, <size_t> capacity * one.kind)
        if grown == NULL:
            return False
        one.text = <uint8_t*> grown
        one.text_capacity = capacity
    capacity = roomy(one.stop_capacity, n_stops)
    if capacity != one.stop_capacity:
        grown = realloc(one.stops, capacity * sizeof(Stop))
        if grown == NULL:
            return False
        one.stops = <Stop*> grown
        one.stop_capacity = capacity
    if one.block == NULL or n_ids > one.block.capacity:
        # A new one, because a look-up may hold the old one.
        block = new_block(roomy(one.block.capacity if one.block != NULL else 0, n_ids))
        if block == NULL:
            return False
        if one.block != NULL:
            memcpy(block_ids(block), block_ids(one.block), one.block.capacity * sizeof(int32_t))
        release_block(one.block)
        one.block = block
    return True

cdef inline void append(Store* s, Lookup* l, Beginning* one) noexcept nogil:
    """Append the look-up's chunks to a beginning, or to the chunks that it shares with another."""
    cdef const Chunk* chunk
    cdef Stop* at
    cdef size_t i, n_kept = l.begun_units, n_new
    cdef uint32_t n_ids = <uint32_t> l.n_begun_ids, end = <uint32_t> l.begun_units
    if one.n_stops == 0:
        n_kept = 0
        if l.n_begun_stops:
            memcpy(
                one.stops, s.beginnings.all[l.beginning].stops, l.n_begun_stops * sizeof(Stop)
            )
            memcpy(block_ids(one.block), block_ids(l.block), n_ids * sizeof(int32_t))
    n_new = l.text.n_units - n_kept
    memcpy(one.text + n_kept * one.kind, l.text.data + n_kept * one.kind, n_new * one.kind)
    for i in range(l.n_run):
        chunk = &s.chunks.all[l.run[i]]
        memcpy(block_ids(one.block) + n_ids, chunk.ids, chunk.n_ids * sizeof(int32_t))
        n_ids += chunk.n_ids
        end += chunk.n_units
        at = &one.stops[l.n_begun_stops + i]
        at.end = end
        at.n_ids = n_ids
        at.chunk = link_to(&s.chunks, l.run[i])
        at.end_class = chunk.end_class
        at.is_tail = chunk.is_tail
    one.n_units = end
    one.n_stops = l.n_begun_stops + <uint32_t> l.n_run
    one.tick = one.touched = s.clock
    release_block(l.block)
    l.block = hold(one.block)
    l.n_begun_ids = n_ids
    l.n_run = l.n_run_ids = 0

cdef inline void shrink(Store* s, uint32_t place, uint64_t share) noexcept nogil:
    """Evict until beginnings are within their share, and all within the budget."""
    cdef uint32_t gone
    while beginnings_bytes(&s.beginnings) > share and s.beginnings.n > 1:
        gone = oldest_beginning(&s.beginnings, &s.rng, s.clock, N_DRAWS, place)
        remove_beginning(&s.beginnings, gone, &s.secret[0])
        if place == s.beginnings.n:  # the last one took the place of the removed one
            place = gone
    while store_bytes(s) > s.max_bytes and s.chunks.n:
        evict_chunk(s)
    if beginnings_bytes(&s.beginnings) > share or store_bytes(s) > s.max_bytes:
        release_beginnings(&s.beginnings)
