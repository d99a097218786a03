# Finds added tokens and the classes of characters in a string's raw buffer.
#
# It finds the same added tokens as the tokenizers library: leftmost-longest matches, to which the
# flags are then applied; the search continues at the end of the bare match, without the white space
# that a flag adds. It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr

from tokcache.text._places cimport Pairs

cdef enum:
    N_CLASSES = 16
    OTHER = 0            # names from tokcache.text.cuts.char_classes.CharClass
    LETTER = 1
    UNDERSCORE = 4
    DIGIT = 2
    TAB = 8
    RETURN = 9
    SPACE = 7
    NEWLINE = 10
    NEWLINE_RUN = 13
    TOKEN_END = 14

    LSTRIP = 1           # flags of a token
    RSTRIP = 2
    SINGLE_WORD = 4
    IN_PIECE = 8
    SKIPS = 16
    OPENS = 32

    NOTHING = 0          # outcomes of a match
    AS_TEXT = 1          # the match does not count and remains text
    FOUND = 2
    UNSURE = 3           # it depends on a neighbouring character of which too little is known

ctypedef struct Text:
    const uint8_t* data
    size_t n_units
    uint32_t kind        # bytes per unit

ctypedef struct Node:    # of the trie of added tokens; node 0 is the root
    uint32_t unit
    uint32_t parent
    int32_t token        # the token that ends here, or -1

ctypedef struct Token:
    int32_t id
    uint32_t flags

ctypedef struct Plan:
    const uint8_t* classes  # of the code points below 0x10000
    uint8_t[128] starts  # 1 if an added token begins with this ASCII character
    uint8_t[256] coarse  # [left * N_CLASSES + right]
    uint8_t[256] fine
    uint8_t[256] seams
    uint8_t[256] places  # a superset of `coarse`, with NEWLINE for NEWLINE_RUN, too
    Pairs place_pairs    # `places` as a matrix of bits
    uint32_t only_start  # the character that all added tokens begin with, or 0
    uint32_t starts_non_ascii  # 1 if an added token begins with a non-ASCII character
    Node* nodes
    uint32_t* children   # nodes by parent and unit: open addressing, 0 for an empty slot
    uint32_t last_slot   # of `children`, whose number of slots is a power of two
    Token* tokens
    uint32_t n_tokens
    uint32_t[3] variant_of
    uint32_t piece_left  # the class assumed before a piece, the text between two added tokens

ctypedef struct Match:
    uint32_t outcome
    int32_t id
    uint32_t flags
    size_t start         # with the white space that lstrip includes
    size_t stop          # with the white space that rstrip includes
    size_t end           # of the bare match; the search continues here


cdef inline uint32_t unit_at(const Text* t, size_t i) noexcept nogil:
    if t.kind == 1:
        return t.data[i]
    if t.kind == 2:
        return (<const uint16_t*> t.data)[i]
    return (<const uint32_t*> t.data)[i]

cdef inline uint32_t bits_of(const Text* t, size_t start, size_t stop) noexcept nogil:
    """Return the bitwise or of all units of a range."""
    cdef const uint16_t* two = <const uint16_t*> t.data
    cdef const uint32_t* four = <const uint32_t*> t.data
    cdef uint32_t bits = 0
    cdef size_t i
    if t.kind == 1:
        for i in range(start, stop):
            bits |= t.data[i]
    elif t.kind == 2:
        for i in range(start, stop):
            bits |= two[i]
    else:
        for i in range(start, stop):
            bits |= four[i]
    return bits

cdef inline uint32_t class_of(const Plan* plan, uint32_t unit) noexcept nogil:
    return plan.classes[unit] if unit < 0x10000 else OTHER

cdef inline bint is_blank_class(uint32_t char_class) noexcept nogil:
    """Return whether a newline after this class is in a run of white space (OTHER: may be)."""
    return (SPACE <= char_class <= NEWLINE) or char_class == NEWLINE_RUN or char_class == OTHER

cdef inline uint32_t class_after(uint32_t own, uint32_t left) noexcept nogil:
    return NEWLINE_RUN if own == NEWLINE and is_blank_class(left) else own

cdef inline uint32_t class_behind(
    const Plan* plan, uint32_t unit, uint32_t left
) noexcept nogil:
    """Return the class of a character whose left neighbour has the class `left`."""
    return class_after(class_of(plan, unit), left)

cdef inline bint may_start(const Plan* plan, uint32_t unit) noexcept nogil:
    return plan.starts[unit] if unit < 128 else plan.starts_non_ascii

cdef inline bint stands_in_block(const Text* t, size_t i, uint32_t unit) noexcept nogil:
    """Return whether `unit` is among 32 units of 2 or 4 bytes; the loops are vectorized."""
    cdef const uint16_t* two = <const uint16_t*> t.data + i
    cdef const uint32_t* four = <const uint32_t*> t.data + i
    cdef uint16_t found_two = 0, unit_two = <uint16_t> unit
    cdef uint32_t found_four = 0
    cdef size_t j
    if t.kind == 2:
        for j in range(32):
            found_two |= <uint16_t> (two[j] == unit_two)
        return found_two
    for j in range(32):
        found_four |= four[j] == unit
    return found_four

cdef inline size_t next_start(
    const Plan* plan, const Text* t, size_t i, size_t limit
) noexcept nogil:
    """Return the first position from `i` on where an added token may start, or `limit`."""
    cdef const void* hit
    if plan.n_tokens == 0 or i >= limit:
        return limit
    if t.kind == 1 and plan.only_start:
        hit = memchr(t.data + i, <int> plan.only_start, limit - i)
        return limit if hit == NULL else <size_t> (<const uint8_t*> hit - t.data)
    if plan.only_start:
        while i + 32 <= limit and not stands_in_block(t, i, plan.only_start):
            i += 32
    while i < limit and not may_start(plan, unit_at(t, i)):
        i += 1
    return i

cdef inline bint is_white_space(uint32_t unit) noexcept nogil:
    """Return whether a unit has Unicode's White_Space property, as Rust's \\s requires."""
    if unit < 128:
        return unit == 32 or 9 <= unit <= 13
    return (
        unit == 0x85 or unit == 0xA0 or unit == 0x1680 or 0x2000 <= unit <= 0x200A
        or unit == 0x2028 or unit == 0x2029 or unit == 0x202F or unit == 0x205F or unit == 0x3000
    )

cdef inline bint is_surrogate(uint32_t unit) noexcept nogil:
    return 0xD800 <= unit <= 0xDFFF

cdef inline bint has_surrogate(const Text* t, size_t start, size_t stop) noexcept nogil:
    """Return whether a range has a surrogate; the loops have no branch, so they are vectorized."""
    cdef const uint16_t* two = <const uint16_t*> t.data
    cdef const uint32_t* four = <const uint32_t*> t.data
    cdef uint32_t found = 0
    cdef size_t i
    if t.kind == 2:
        for i in range(start, stop):
            found |= (two[i] & 0xF800) == 0xD800
    elif t.kind == 4:
        for i in range(start, stop):
            found |= (four[i] & <uint32_t> 0xFFFFF800) == 0xD800
    return found != 0

cdef inline bint is_word(const Plan* plan, uint32_t unit) noexcept nogil:
    """Return whether an ASCII character belongs to a word."""
    return (
        plan.classes[unit] == LETTER or plan.classes[unit] == DIGIT
        or plan.classes[unit] == UNDERSCORE
    )

cdef inline uint32_t* child_slot(const Plan* plan, uint32_t node, uint32_t unit) noexcept nogil:
    """Return the slot of a node's child, or the empty slot where it would be."""
    cdef uint32_t mixed = (node * <uint32_t> 0x9E3779B1) ^ (unit * <uint32_t> 0x85EBCA6B)
    cdef uint32_t slot = (mixed ^ (mixed >> 15)) & plan.last_slot
    cdef uint32_t child = plan.children[slot]
    while child and (plan.nodes[child].unit != unit or plan.nodes[child].parent != node):
        slot = (slot + 1) & plan.last_slot
        child = plan.children[slot]
    return &plan.children[slot]

cdef inline int32_t longest_token(
    const Plan* plan, const Text* t, size_t i, size_t* end
) noexcept nogil:
    """Return the longest added token that starts at `i`, or -1."""
    cdef uint32_t node = 0, child, unit
    cdef int32_t found = -1
    while i < t.n_units:
        unit = unit_at(t, i)
        child = node + 1  # most nodes have one child, which was created next
        if plan.nodes[child].unit != unit or plan.nodes[child].parent != node:
            child = child_slot(plan, node, unit)[0]
        if child == 0:
            break
        node = child
        i += 1
        if plan.nodes[node].token >= 0:
            found = plan.nodes[node].token
            end[0] = i
    return found

cdef inline uint32_t beside_word(
    const Plan* plan, const Text* t, const Match* m, size_t piece
) noexcept nogil:
    """Return FOUND if no word touches a single-word token, AS_TEXT if one does, or UNSURE."""
    cdef uint32_t unit
    cdef bint touches = False
    if m.start > 0 and not (m.flags & IN_PIECE and m.start == piece):
        unit = unit_at(t, m.start - 1)
        if unit >= 128:
            return UNSURE
        touches = is_word(plan, unit)
    if m.end < t.n_units:
        unit = unit_at(t, m.end)
        if unit >= 128 or may_start(plan, unit):
            return UNSURE
        touches = touches or is_word(plan, unit)
    if not touches:
        return FOUND
    # As text it must be encoded together with the characters that it touches.
    return UNSURE if m.start == piece and piece > 0 else AS_TEXT

cdef inline Match match_at(
    const Plan* plan, const Text* t, size_t i, size_t piece
) noexcept nogil:
    """Return the added token at `i`; `piece` is the end of the previous one."""
    cdef Match m
    cdef int32_t token
    m.outcome = NOTHING
    m.id = 0
    m.flags = 0
    m.start = m.stop = m.end = i
    token = longest_token(plan, t, i, &m.end)
    if token < 0:
        return m
    m.id = plan.tokens[token].id
    m.flags = plan.tokens[token].flags
    m.start = i
    m.stop = m.end
    m.outcome = FOUND
    if m.flags & SKIPS:
        m.outcome = AS_TEXT
    elif m.flags & SINGLE_WORD:
        m.outcome = beside_word(plan, t, &m, piece)
    if m.outcome == FOUND:
        if m.flags & LSTRIP:
            while m.start > 0 and is_white_space(unit_at(t, m.start - 1)):
                m.start -= 1
            if m.start < piece:
                m.start = piece
        if m.flags & RSTRIP:
            while m.stop < t.n_units and is_white_space(unit_at(t, m.stop)):
                m.stop += 1
    return m
