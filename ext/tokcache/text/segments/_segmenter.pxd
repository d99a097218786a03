# Splits a chunk into spans: added tokens, and segments of the text between them.
#
# `begin_spans` starts at a chunk; each `next_span` finds one span, until the outcome is END. With
# `fine`, text is cut wherever the Plan's matrix of fine cuts allows it, else at added tokens alone.
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, uint32_t

from tokcache.text.segments._scan cimport (
    AS_TEXT, FOUND, LETTER, N_CLASSES, TOKEN_END, UNSURE, Match, Plan, Text, class_behind,
    has_surrogate, is_surrogate, match_at, next_start, unit_at,
)

cdef enum:
    SPAN = 0             # outcomes of `next_span`
    END = 1
    UNSURE_TOKEN = 2     # an added token's match depends on a neighbour that can't be judged
    SURROGATE = 3        # a lone surrogate, which has no UTF-8

ctypedef struct Span:
    size_t start
    size_t stop
    uint32_t variant     # the tokenizer variant that encodes the text
    bint is_token
    int32_t id           # of the added token

ctypedef struct Spans:   # the way through one chunk
    size_t first         # of the chunk
    size_t end
    size_t start         # of the next span
    size_t i             # units before it are scanned
    size_t token_at      # an added token may start here, not before
    uint32_t left        # class of the unit before `i`
    uint32_t variant
    bint fine
    bint has_token       # `token` follows the span that was found last
    Match token


cdef inline Spans begin_spans(
    const Plan* plan, const Text* t, size_t first, size_t end, uint32_t variant, bint fine
) noexcept nogil:
    cdef Spans s
    s.first = s.start = s.i = first
    s.end = end
    s.token_at = next_start(plan, t, first, end)
    s.left = LETTER if first else plan.piece_left
    s.variant = variant
    s.fine = fine
    s.has_token = False
    return s

cdef inline int text_span(Spans* s, size_t stop, Span* span) noexcept nogil:
    span.start = s.start
    span.stop = stop
    span.variant = s.variant
    span.is_token = False
    s.start = stop
    return SPAN

cdef inline int token_span(
    const Plan* plan, const Text* t, Spans* s, Span* span
) noexcept nogil:
    span.start = s.token.start
    span.stop = s.start = s.token.stop
    span.is_token = True
    span.id = s.token.id
    s.i = s.token.end
    s.left = TOKEN_END
    s.variant = plan.variant_of[1]
    s.token_at = next_start(plan, t, s.i, s.end)
    s.has_token = False
    return SPAN

cdef inline int next_span(const Plan* plan, const Text* t, Spans* s, Span* span) noexcept nogil:
    """Find the next span of the chunk; return SPAN, END, UNSURE_TOKEN or SURROGATE."""
    cdef size_t i = s.i, start = s.start
    cdef uint32_t left = s.left, own, unit
    if s.has_token:
        return token_span(plan, t, s, span)
    while i < s.end:
        if not s.fine and i < s.token_at:  # there are no cuts between added tokens
            if has_surrogate(t, i, s.token_at):
                return SURROGATE
            i = s.token_at
            continue
        if i == s.token_at:
            s.token = match_at(plan, t, i, start)
            if s.token.outcome == UNSURE:
                return UNSURE_TOKEN
            if s.token.outcome == FOUND:
                # Below `start` where a token begins in whitespace that the last one took: no plan
                # allows that, and a length below zero must not be possible even so.
                if s.token.start <= start:
                    return token_span(plan, t, s, span)
                s.has_token = True
                return text_span(s, s.token.start, span)
            if s.token.outcome == AS_TEXT:
                while i < s.token.end:
                    left = class_behind(plan, unit_at(t, i), left)
                    i += 1
                s.token_at = next_start(plan, t, i, s.end)
                continue
            s.token_at = next_start(plan, t, i + 1, s.end)
        if i < start:
            i += 1
            continue
        if i == start and i > s.first and left == TOKEN_END:
            left = plan.piece_left
        unit = unit_at(t, i)
        own = class_behind(plan, unit, left)
        if own == 0 and is_surrogate(unit):
            return SURROGATE
        if s.fine and i > start and plan.fine[left * N_CLASSES + own]:
            s.i = i + 1
            s.left = own
            text_span(s, i, span)
            s.variant = plan.variant_of[2]
            return SPAN
        left = own
        i += 1
    s.i = i
    return text_span(s, s.end, span) if s.end > start else END
