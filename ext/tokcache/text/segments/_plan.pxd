# Reads a CutPlan, which the planner made for a tokenizer, into the tables that scans use.

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from tokcache.text._places cimport fill_pairs
from tokcache.text.segments._scan cimport (
    IN_PIECE, LETTER, LSTRIP, N_CLASSES, NEWLINE, NEWLINE_RUN, OPENS, OTHER, RSTRIP, SINGLE_WORD,
    SKIPS, Node, Plan, Token, child_slot, class_after,
)

cdef enum:
    NO_PARENT = 0xFFFFFFFF


cdef inline int read_plan(Plan* plan, source) except -1:
    """Fill an empty Plan; `release_plan` frees its tables, also after an exception."""
    from tokcache.text.cuts.char_classes import BMP_CLASSES

    cdef uint32_t left, right
    cdef uint8_t allowed
    plan.classes = <const uint8_t*> <const char*> <bytes> BMP_CLASSES  # the module keeps it alive
    memcpy(plan.coarse, <const char*> <bytes> source.coarse, sizeof(plan.coarse))
    memcpy(plan.fine, <const char*> <bytes> source.fine, sizeof(plan.fine))
    memcpy(plan.seams, <const char*> <bytes> source.seams, sizeof(plan.seams))
    for left in range(N_CLASSES):
        for right in range(N_CLASSES):
            allowed = plan.coarse[left * N_CLASSES + class_after(right, left)]
            if left == NEWLINE:
                allowed |= plan.coarse[NEWLINE_RUN * N_CLASSES + class_after(right, NEWLINE_RUN)]
            plan.places[left * N_CLASSES + right] = allowed != 0
    fill_pairs(&plan.place_pairs, plan.places)
    for i in range(3):
        plan.variant_of[i] = source.variant_of[i]
    # A newline at the start of a piece counts as one after a visible character, unless the
    # tokenizer puts something before the piece.
    plan.piece_left = LETTER if len(source.variants) == 1 else OTHER
    return read_tokens(plan, source.separators)

cdef inline int read_tokens(Plan* plan, separators) except -1:
    """Build the trie of the added tokens, in which they are found."""
    cdef size_t n_nodes = 1, n_slots = 2
    cdef uint32_t node, n = 1
    cdef uint32_t* slot
    for one in separators:
        n_nodes += len(one.content)
    while n_slots < 2 * n_nodes:
        n_slots *= 2
    plan.last_slot = n_slots - 1
    plan.nodes = <Node*> calloc(n_nodes + 1, sizeof(Node))
    plan.children = <uint32_t*> calloc(n_slots, sizeof(uint32_t))
    plan.tokens = <Token*> calloc(len(separators) + 1, sizeof(Token))
    if plan.nodes == NULL or plan.children == NULL or plan.tokens == NULL:
        raise MemoryError
    plan.nodes[0].token = -1
    plan.n_tokens = len(separators)
    firsts = {one.content[0] for one in separators}
    for first in firsts:
        if ord(first) < 128:
            plan.starts[<uint32_t> ord(first)] = 1
        else:
            plan.starts_non_ascii = 1
    if len(firsts) == 1 and not plan.starts_non_ascii:
        plan.only_start = ord(firsts.pop())
    for i, one in enumerate(separators):
        node = 0
        for char in one.content:
            slot = child_slot(plan, node, ord(char))
            if slot[0] == 0:
                slot[0] = n
                plan.nodes[n].unit = ord(char)
                plan.nodes[n].parent = node
                plan.nodes[n].token = -1
                n += 1
            node = slot[0]
        plan.nodes[node].token = i
        plan.tokens[i].id = one.id
        plan.tokens[i].flags = (
            (LSTRIP if one.lstrip else 0) | (RSTRIP if one.rstrip else 0)
            | (SINGLE_WORD if one.single_word else 0) | (IN_PIECE if one.in_piece else 0)
            | (SKIPS if one.skips else 0) | (OPENS if one.opens else 0)
        )
    plan.nodes[n].parent = NO_PARENT  # for `longest_token`, which looks at the next node
    return 0

cdef inline void release_plan(Plan* plan) noexcept nogil:
    free(plan.nodes)
    free(plan.children)
    free(plan.tokens)
