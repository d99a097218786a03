# Keys of chunks and segments: the units of a range of a text, as narrow as they fit.
#
# A unit is one code point of a str, stored in 1, 2 or 4 bytes. A key has the fewest bytes per unit
# that hold all of its units, so that the same content has the same key in every str.
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy

from tokcache.text.segments._scan cimport Text, bits_of


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
