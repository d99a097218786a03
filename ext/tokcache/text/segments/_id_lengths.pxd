# How many bytes of text stand for each token id, and for each segment.
#
# Segments can then be encoded together without a separator: the lengths of the ids show where each
# segment ends, and the engine's answer is refused if an id crosses that place.
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from tokcache.text.segments._scan cimport Text, bits_of

cdef enum:
    UNASKED = 0          # in `Lengths.sizes`
    UNKNOWN = 1
    LONGEST = 0xFE       # maximum length that the table holds; a longer one is UNKNOWN

ctypedef struct Lengths:
    uint8_t* sizes       # length of each id in bytes + 1, UNKNOWN or UNASKED
    uint32_t n_ids

ctypedef struct PointSet:     # a set of code points
    uint8_t[0x10000] basic    # 1 for each member below 0x10000
    uint8_t[0x20000] others   # one bit for each code point from 0x10000 on
    bint has_text             # all visible ASCII and ASCII white space are members


cdef inline void set_length(Lengths* lengths, uint32_t index, size_t n_bytes) noexcept nogil:
    """Set the length of an id; 0: unknown."""
    lengths.sizes[index] = <uint8_t> (n_bytes + 1) if n_bytes <= LONGEST else UNKNOWN

cdef inline bint is_unasked(const Lengths* lengths, int32_t index) noexcept nogil:
    return 0 <= index < <int64_t> lengths.n_ids and lengths.sizes[index] == UNASKED

cdef inline uint32_t length_of(const Lengths* lengths, int32_t index) noexcept nogil:
    """Return the bytes of text that an id stands for, or 0 if they are unknown."""
    if index < 0 or <uint32_t> index >= lengths.n_ids or lengths.sizes[index] == UNASKED:
        return 0
    return lengths.sizes[index] - 1

cdef inline uint32_t encoded_bytes(
    const Text* t, size_t start, size_t stop, const PointSet* exact
) noexcept nogil:
    """Return the UTF-8 bytes of a range, or 0 if some characters are not encoded unchanged.

    Latin-1 and the members of `exact` are encoded unchanged; with NULL, all are.
    """
    cdef size_t i, n = stop - start
    cdef const uint16_t* two = <const uint16_t*> t.data
    cdef const uint32_t* four = <const uint32_t*> t.data
    cdef uint32_t together = bits_of(t, start, stop)
    if together < 0x80:
        return <uint32_t> n
    if t.kind == 1:
        for i in range(start, stop):
            n += t.data[i] >> 7
        return <uint32_t> n
    if exact != NULL and together > 0xFF and not covers(exact, t, start, stop):
        return 0
    if t.kind == 2:
        for i in range(start, stop):
            n += (two[i] > 0x7F) + (two[i] > 0x7FF)
    else:
        for i in range(start, stop):
            n += (four[i] > 0x7F) + (four[i] > 0x7FF) + (four[i] > 0xFFFF)
    return <uint32_t> n

cdef inline void add_points(PointSet* points, uint32_t first, uint32_t last) noexcept nogil:
    cdef uint32_t point
    if first < 0x10000:
        memset(&points.basic[first], 1, min(last, <uint32_t> 0xFFFF) + 1 - first)
    for point in range(max(first, <uint32_t> 0x10000), last + 1):
        points.others[(point - 0x10000) >> 3] |= 1 << (point & 7)

cdef inline bint has_all_text(const PointSet* points) noexcept nogil:
    """Return whether all visible ASCII and ASCII white space are members."""
    cdef uint32_t point
    for point in range(9, 0x7F):
        if (point <= 13 or point >= 0x20) and not points.basic[point]:
            return False
    return True

cdef inline bint covers(
    const PointSet* points, const Text* t, size_t start, size_t stop
) noexcept nogil:
    """Return whether every unit of a range is in the set."""
    cdef const uint16_t* two = <const uint16_t*> t.data
    cdef const uint32_t* four = <const uint32_t*> t.data
    cdef size_t i, end
    cdef uint32_t unit
    cdef uint8_t are_in = 1
    while start < stop:
        end = min(start + 64, stop)
        if not (points.has_text and is_plain(t, start, end)):
            if t.kind == 1:
                for i in range(start, end):
                    are_in &= points.basic[t.data[i]]
            elif t.kind == 2:
                for i in range(start, end):
                    are_in &= points.basic[two[i]]
            else:
                for i in range(start, end):
                    unit = four[i]
                    if unit < 0x10000:
                        are_in &= points.basic[unit]
                    else:
                        are_in &= points.others[(unit - 0x10000) >> 3] >> (unit & 7)
            if not are_in:
                return False
        start = end
    return True

cdef inline bint is_plain(const Text* t, size_t start, size_t stop) noexcept nogil:
    """Return whether a range is visible ASCII and ASCII white space; the loops are vectorized."""
    cdef const uint16_t* two = <const uint16_t*> t.data
    cdef const uint32_t* four = <const uint32_t*> t.data
    cdef uint8_t one, others_one = 0
    cdef uint16_t unit_two, others_two = 0
    cdef uint32_t unit, others = 0
    cdef size_t i
    if t.kind == 1:
        for i in range(start, stop):
            one = t.data[i]
            others_one |= (<uint8_t> (one - 0x20) > 0x5E) & (<uint8_t> (one - 9) > 4)
        return others_one == 0
    if t.kind == 2:
        for i in range(start, stop):
            unit_two = two[i]
            others_two |= (<uint16_t> (unit_two - 0x20) > 0x5E) & (<uint16_t> (unit_two - 9) > 4)
        return others_two == 0
    for i in range(start, stop):
        unit = four[i]
        others |= (unit - 0x20 > 0x5E) & (unit - 9 > 4)
    return others == 0
