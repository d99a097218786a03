# Chooses where the chunks of a text end, so that equal content is cut alike wherever it stands.
#
# 1. A coarse cut is a place where a tokenizer never joins the characters on both sides: a matrix of
#    character classes in the Plan says which. 64 places are read at a time.
# 2. Each coarse cut gets a rank: a keyed digest of the WINDOW units before it, divided by the
#    distance from the cut before. The content decides, so that an insertion moves only the ends
#    near it.
# 3. A chunk ends at the first cut with a low rank, within limits of length: see `chunk_end`.
#
# Source: content-defined chunking as in FastCDC (Xia et al., USENIX ATC 2016).
#
# It uses no Python objects and takes no lock. `base` is the end of the last added token in the
# chunk, or the chunk's own start `p`: characters before it have no influence.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from tokcache.text._digest cimport fold, read64
from tokcache.text._places cimport places_of
from tokcache.text.segments._scan cimport (
    AS_TEXT, FOUND, LETTER, N_CLASSES, NEWLINE, OPENS, OTHER, TOKEN_END, UNSURE, Match, Plan, Text,
    class_behind, class_of, match_at, may_start, next_start, unit_at,
)

cdef extern from *:
    int count_zeros "__builtin_ctzll" (unsigned long long bits) noexcept nogil
    int count_leading_zeros "__builtin_clzll" (unsigned long long bits) noexcept nogil

cdef enum:
    MIN_UNITS = 128        # minimum chunk length, except at the start of a message
    MAX_UNITS = 1024       # maximum chunk length, if the text has a coarse cut before
    OPENING_UNITS = 96     # minimum length of a chunk that ends at the start of a message
    GAP_UNITS = 64         # maximum weight of a cut
    CHOSEN = 1 << 23       # a cut with a lower rank ends a chunk: about one in 512 units
    WINDOW = 16            # units before a cut that its rank depends on
    N_SEEDS = 6            # 64-bit words of the secret for ranks
    LOOK_UNITS = 512       # units searched for an added token at a time

ctypedef struct Chunker:
    Plan plan
    uint64_t[N_SEEDS] seed  # chunks cut with another seed are not found
    bint uses_vectors


cdef inline const uint8_t* latin_block(const Text* t, size_t i, uint8_t* room) noexcept nogil:
    """Return a pointer to the 64 units from `i` on as bytes, or NULL if one is wider than a byte.

    The WINDOW units before `i` precede them. Bytes after the end of the text are undefined. `room`
    has WINDOW + 64 bytes.
    """
    cdef size_t start = i - min(i, <size_t> WINDOW), stop = min(i + 64, t.n_units), j
    cdef const uint16_t* two = <const uint16_t*> t.data + start
    cdef const uint32_t* four = <const uint32_t*> t.data + start
    cdef uint8_t* into = room + WINDOW - (i - start)
    cdef uint32_t together = 0
    if t.kind == 1:
        if stop == i + 64:
            return t.data + i
        memcpy(into, t.data + start, stop - start)
        return room + WINDOW
    if t.kind == 2:
        for j in range(stop - start):
            into[j] = <uint8_t> two[j]
            together |= two[j]
    else:
        for j in range(stop - start):
            into[j] = <uint8_t> four[j]
            together |= four[j]
    return room + WINDOW if together < 0x100 else NULL

cdef inline bint opens_at(const Plan* plan, const Text* t, size_t p) noexcept nogil:
    """Return whether an added token that may begin a chunk starts at `p`."""
    cdef Match m
    if plan.n_tokens == 0 or not may_start(plan, unit_at(t, p)):
        return False
    m = match_at(plan, t, p, p)
    return m.outcome == FOUND and m.flags & OPENS

cdef inline bint may_end(
    const Plan* plan, const Text* t, size_t p, uint32_t end_class
) noexcept nogil:
    """Return whether a chunk may end at `p`, behind a character of this class."""
    return (
        plan.coarse[end_class * N_CLASSES + class_of(plan, unit_at(t, p))]
        or opens_at(plan, t, p)
    )

cdef inline uint32_t variant_at(const Plan* plan, const Text* t, size_t p) noexcept nogil:
    """Return the tokenizer variant that encodes the beginning of a chunk at `p`."""
    if plan.variant_of[0] == plan.variant_of[1] == plan.variant_of[2]:
        return plan.variant_of[0]
    if opens_at(plan, t, p):
        return plan.variant_of[1]
    return plan.variant_of[0 if p == 0 else 2]

cdef inline uint32_t class_before(
    const Plan* plan, const Text* t, size_t i, size_t p, size_t base
) noexcept nogil:
    """Return the class of the character before `i` in a chunk that begins at `p`.

    Characters before `base`, the end of the last added token, have no influence.
    """
    if i <= base:
        return TOKEN_END if base > p else LETTER if p else plan.piece_left
    if i - 1 > base:
        return class_behind(plan, unit_at(t, i - 1), class_of(plan, unit_at(t, i - 2)))
    return class_behind(
        plan, unit_at(t, i - 1), LETTER if p and base == p else plan.piece_left
    )

cdef inline uint64_t coarse_places(
    const Chunker* c, const Text* t, size_t i, size_t stop, size_t p, size_t base,
    const uint8_t* latin,
) noexcept nogil:
    """Return a bit for each of up to 64 units from `i` on: 1 if a coarse cut is before it.

    `latin` has these units as bytes, or is NULL.
    """
    cdef const Plan* plan = &c.plan
    cdef const uint8_t* one = t.data
    cdef const uint16_t* two = <const uint16_t*> t.data
    cdef const uint32_t* four = <const uint32_t*> t.data
    cdef const uint8_t* classes = plan.classes
    cdef uint32_t left, own
    cdef uint64_t places = 0, behind = ~<uint64_t> 0, sure
    cdef size_t j, at
    left = class_of(plan, unit_at(t, i - 1)) if i > base else OTHER
    if latin and c.uses_vectors:
        places = places_of(latin, left, NEWLINE, classes, &plan.place_pairs, &behind)
        places &= ~<uint64_t> 0 >> (64 - (stop - i))
    elif t.kind == 1:
        for j in range(stop - i):
            own = classes[one[i + j]]
            places |= <uint64_t> plan.places[left * N_CLASSES + own] << j
            left = own
    elif t.kind == 2:
        for j in range(stop - i):
            own = classes[two[i + j]]
            places |= <uint64_t> plan.places[left * N_CLASSES + own] << j
            left = own
    else:
        for j in range(stop - i):
            own = class_of(plan, four[i + j])
            places |= <uint64_t> plan.places[left * N_CLASSES + own] << j
            left = own
    if i <= base:
        places &= ~<uint64_t> 1  # an added token, or the chunk before, ends here: no coarse cut
    sure = places & behind
    while sure:  # after a newline the cut depends on the character before the newline
        at = i + count_zeros(sure)
        sure &= sure - 1
        if class_of(plan, unit_at(t, at - 1)) == NEWLINE:
            left = class_before(plan, t, at, p, base)
            if not plan.coarse[left * N_CLASSES + class_behind(plan, unit_at(t, at), left)]:
                places &= ~(<uint64_t> 1 << (at - i))
    return places

cdef inline size_t last_place(
    const Chunker* c, const Text* t, size_t start, size_t stop, size_t p, size_t base
) noexcept nogil:
    """Return the last coarse cut in [start, stop), 0 if there is none."""
    cdef size_t i
    cdef uint64_t places
    cdef uint8_t[WINDOW + 64] room
    while stop > start:
        i = stop - 64 if stop - start > 64 else start
        places = coarse_places(c, t, i, stop, p, base, latin_block(t, i, &room[0]))
        if places:
            return i + 63 - count_leading_zeros(places)
        stop = i
    return 0

cdef inline size_t next_token(const Plan* plan, const Text* t, size_t i) noexcept nogil:
    """Return the next position where an added token may start, or one that none is before."""
    return next_start(plan, t, i, min(t.n_units, i + LOOK_UNITS))

cdef inline uint64_t rank(
    const Chunker* c, const Text* t, size_t i, const uint8_t* latin, size_t gap, uint32_t* weight
) noexcept nogil:
    """Return a 32-bit digest of the WINDOW units before a cut, and the cut's weight.

    The rank of a cut is digest / weight; the lowest ends a chunk. The weight is `gap`, the
    units since the previous coarse cut, so that texts with few cuts have chunks of the same
    length as others. It is four times as large for characters beyond Latin-1, because each
    of them carries more text. `latin` points to the unit at `i` in the units as bytes, or is
    NULL.
    """
    cdef const uint16_t* two = <const uint16_t*> t.data + i - WINDOW
    cdef const uint32_t* four = <const uint32_t*> t.data + i - WINDOW
    cdef uint8_t[WINDOW] low, middle, high  # bytes of the units, the same for every kind
    cdef uint64_t[6] words
    cdef uint64_t digest
    cdef size_t j
    gap = min(gap, <size_t> GAP_UNITS)
    if latin:
        weight[0] = <uint32_t> gap
        return <uint32_t> fold(
            read64(latin - WINDOW) ^ c.seed[0], read64(latin - WINDOW + 8) ^ c.seed[1]
        )
    if t.kind == 2:
        for j in range(WINDOW):
            low[j] = <uint8_t> two[j]
            middle[j] = <uint8_t> (two[j] >> 8)
    else:
        for j in range(WINDOW):
            low[j] = <uint8_t> four[j]
            middle[j] = <uint8_t> (four[j] >> 8)
            high[j] = <uint8_t> (four[j] >> 16)
    memset(&words[0], 0, sizeof(words))
    memcpy(&words[0], &low[0], WINDOW)
    memcpy(&words[2], &middle[0], WINDOW)
    if t.kind > 2:
        memcpy(&words[4], &high[0], WINDOW)
    digest = fold(words[0] ^ c.seed[0], words[1] ^ c.seed[1])
    if words[2] | words[3] | words[4] | words[5]:
        digest ^= fold(words[2] ^ c.seed[2], words[3] ^ c.seed[3])
        digest ^= fold(words[4] ^ c.seed[4], words[5] ^ c.seed[5])
        gap *= 4
    weight[0] = <uint32_t> gap
    return <uint32_t> digest

cdef inline bint ends(
    size_t at, uint32_t left, size_t* end, uint32_t* end_class
) noexcept nogil:
    """Set the end of a chunk to `at`, after a character of class `left`."""
    end[0] = at
    end_class[0] = left
    return True

cdef inline bint chunk_end(
    const Chunker* c, const Text* t, size_t p, size_t* end, uint32_t* end_class
) noexcept nogil:
    """Find the end of the chunk that begins at `p`; return False if a token's match is unsure.

    The first of these that applies:

    1. The start of a message, once the chunk has OPENING_UNITS.
    2. Between MIN_UNITS and MAX_UNITS, the first coarse cut with a rank below CHOSEN.
    3. The end of the text, if it is within MAX_UNITS.
    4. Between MIN_UNITS and MAX_UNITS, the coarse cut with the lowest rank.
    5. The next coarse cut, or the end of the text.
    """
    cdef const Plan* plan = &c.plan
    cdef size_t i = p, base = p, last = 0, cut = p, token_at = next_token(plan, t, p), stop, at
    cdef uint32_t last_class = 0, gap, best_gap = 1
    cdef uint64_t digest, best = 0, places
    cdef uint8_t[WINDOW + 64] room
    cdef const uint8_t* latin
    cdef bint is_late
    cdef Match m
    while i < t.n_units:
        if i == token_at:
            m = match_at(plan, t, i, base)
            if m.outcome == UNSURE:
                return False
            if m.outcome == FOUND:
                if m.flags & OPENS and i >= p + OPENING_UNITS:
                    return ends(i, class_before(plan, t, i, p, base), end, end_class)
                if last and i > p + MAX_UNITS:
                    break
                base = cut = m.stop
                i = m.end
                token_at = next_token(plan, t, i)
                continue
            token_at = next_token(plan, t, m.end if m.outcome == AS_TEXT else i + 1)
            if m.outcome == AS_TEXT:  # there is no cut inside it or directly before it
                i = m.end
                continue
        if i < base:
            i += 1
            continue
        stop = min(token_at, t.n_units)
        if i < p + MIN_UNITS:  # a cut here only affects the weight of the next one
            stop = min(stop, p + MIN_UNITS)
            at = last_place(c, t, i, stop, p, base)
            cut = at if at else cut
            i = stop
            continue
        stop = min(stop, i + 64)
        latin = latin_block(t, i, &room[0])
        places = coarse_places(c, t, i, stop, p, base, latin)
        while places:
            at = i + count_zeros(places)
            places &= places - 1
            is_late = at > p + MAX_UNITS
            if is_late and last:
                return ends(last, last_class, end, end_class)
            digest = rank(c, t, at, latin + (at - i) if latin else NULL, at - cut, &gap)
            # Keep the cut with the lowest rank, which is digest / gap.
            if last == 0 or digest * best_gap < best * gap:
                best, best_gap, last = digest, gap, at
                last_class = class_before(plan, t, at, p, base)
            # Earlier ranks were not below CHOSEN, so this one is the lowest if it is.
            if is_late or digest < <uint64_t> CHOSEN * gap:
                return ends(last, last_class, end, end_class)
            cut = at
        i = stop
    if i >= t.n_units and (last == 0 or t.n_units - p <= MAX_UNITS):
        last, last_class = t.n_units, class_before(plan, t, t.n_units, p, base)
    return ends(last, last_class, end, end_class)
