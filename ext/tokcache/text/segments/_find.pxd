# Looks a text up in the store, chunk by chunk.
#
# 1. The chunk that followed the previous one in an earlier text is tried first: it is compared in
#    full and needs neither scan nor digest. Its end is proven by its own link to the next chunk, or
#    else by the characters there.
# 2. Otherwise the chunker says where the chunk ends, and its digest finds it in the table.
# 3. A missing chunk is split into spans. Segments that the table has are copied, the others become
#    pending: the engine must encode them.
#
# It uses no Python objects and takes no lock.

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memset

from tokcache.text._evictions cimport NEW, why_missing
from tokcache.text.segments._chunker cimport chunk_end, may_end, variant_at
from tokcache.text.segments._chunks cimport (
    NO_CHUNK, Chunk, find_chunk, find_next, is_chunk, link_to, no_link, place_of, put_follower,
    remember_fork,
)
from tokcache.text.segments._lookup cimport (
    Lookup, Missed, end_missed, push_known, push_long, push_missed, push_op, push_pending, push_run,
)
from tokcache.text.segments._scan cimport Plan, Text
from tokcache.text.segments._segmenter cimport (
    END, SPAN, SURROGATE, Span, Spans, begin_spans, next_span,
)
from tokcache.text.segments._segments cimport (
    PENDING, Segment, find_segment, segment_digest, segment_key,
)
from tokcache.text.segments._store cimport (
    BESIDE_SINGLE_WORD, LONE_SURROGATE, Store, advance_clock, chunk_digest, make_segment_room,
    place_new_segment,
)

cdef enum:
    STORED_UNITS = 1 << 16  # a longer chunk, in which no cut was found, is not stored

    LOOKED_UP = 0           # outcomes of `look_up`
    REFUSED = 1             # the text can't be cut safely: counted by reason
    NO_MEMORY = 2


cdef inline int look_up(Store* s, Lookup* l) noexcept nogil:
    """Look up the text of `l`, and list its chunks there."""
    cdef const Plan* plan = &s.chunker.plan
    cdef const Text* t = &l.text
    cdef const Chunk* chunk
    cdef size_t p = 0, end = 0
    cdef uint32_t place, before = NO_CHUNK, ahead = find_head(s, l)
    cdef uint32_t variant = 0, end_class = 0
    cdef uint64_t digest = 0
    cdef int outcome
    l.epoch = s.epoch
    advance_clock(s)
    while p < t.n_units:
        place = ahead
        ahead = NO_CHUNK
        if place != NO_CHUNK:
            chunk = &s.chunks.all[place]
            end = p + chunk.n_units
            ahead = find_next(&s.chunks, place, t, end, l.scope, &s.secret[0])
            if ahead == NO_CHUNK and not may_end_here(plan, t, end, chunk):
                place = NO_CHUNK
        if place == NO_CHUNK:
            variant = variant_at(plan, t, p)
            if not chunk_end(&s.chunker, t, p, &end, &end_class):
                s.counts.refusals[BESIDE_SINGLE_WORD] += 1
                return REFUSED
            if end - p <= STORED_UNITS:
                if not chunk_digest(s, t, p, end, l.scope, variant, &digest):
                    return NO_MEMORY
                place = find_chunk(&s.chunks, digest, t, p, end, l.scope, variant)
            if place != NO_CHUNK and before != NO_CHUNK:
                remember_fork(&s.chunks, before, t, p, place, &s.secret[0])
            if place != NO_CHUNK and end < t.n_units:
                s.chunks.all[place].is_tail = False
                ahead = find_next(&s.chunks, place, t, end, l.scope, &s.secret[0])
        if place == NO_CHUNK:
            outcome = split_missed(s, l, digest, p, end, variant, end_class, before)
            if outcome != LOOKED_UP:
                return outcome
        elif not take_chunk(s, l, p, place, before):
            return NO_MEMORY
        before = place
        p = end
    return LOOKED_UP

cdef inline bint may_end_here(
    const Plan* plan, const Text* t, size_t end, const Chunk* chunk
) noexcept nogil:
    if end == t.n_units or chunk.is_tail:
        return end == t.n_units
    return may_end(plan, t, end, chunk.end_class)

cdef inline uint32_t find_head(const Store* s, const Lookup* l) noexcept nogil:
    """Return the first chunk of the last text if this text begins with it, too."""
    cdef uint32_t place = place_of(&s.chunks, s.head)
    if (
        place != NO_CHUNK and s.chunks.all[place].scope == l.scope
        and is_chunk(&s.chunks.all[place], &l.text, 0)
        and s.chunks.all[place].variant == variant_at(&s.chunker.plan, &l.text, 0)
    ):
        return place
    return NO_CHUNK

cdef inline bint take_chunk(
    Store* s, Lookup* l, size_t p, uint32_t place, uint32_t before
) noexcept nogil:
    """Append the ids of the cached chunk at `p`; return False if there is no memory."""
    cdef Chunk* chunk = &s.chunks.all[place]
    chunk.tick = s.clock
    if p == 0:
        s.head = link_to(&s.chunks, place)
    elif before != NO_CHUNK:
        put_follower(&s.chunks, before, link_to(&s.chunks, place))
    elif l.n_missed:
        l.missed[l.n_missed - 1].after = link_to(&s.chunks, place)
    l.n_chunk_hits += 1
    if l.n_missed:
        return push_known(l, chunk.ids, chunk.n_ids)
    return push_run(l, place, chunk.n_ids)

cdef inline int split_missed(
    Store* s, Lookup* l, uint64_t digest, size_t p, size_t end, uint32_t variant,
    uint32_t end_class, uint32_t before,
) noexcept nogil:
    """Split a missing chunk into cached and pending segments."""
    cdef const Plan* plan = &s.chunker.plan
    cdef const Chunk* chunk
    cdef Missed* missed
    cdef Spans spans
    cdef Span span
    cdef int outcome, why
    cdef size_t i
    if l.n_missed == 0:
        memset(l.chunk_misses_by_reason, 0, sizeof(l.chunk_misses_by_reason))
        memset(l.segment_misses_by_reason, 0, sizeof(l.segment_misses_by_reason))
    # A chunk that is too long to be stored has no digest.
    why = NEW if end - p > STORED_UNITS else why_missing(&s.evicted_chunks, digest, l.scope)
    l.chunk_misses_by_reason[why] += 1
    for i in range(l.n_run):  # copy the ids found so far: the chunks may be evicted now
        chunk = &s.chunks.all[l.run[i]]
        if not push_known(l, chunk.ids, chunk.n_ids):
            return NO_MEMORY
    l.n_run = 0
    missed = push_missed(l)
    if missed == NULL:
        return NO_MEMORY
    missed.digest = digest
    missed.start = p
    missed.stop = end
    missed.variant = variant
    missed.end_class = end_class
    missed.before = link_to(&s.chunks, before)
    missed.after = no_link()
    spans = begin_spans(plan, &l.text, p, end, variant, s.cuts_fine)
    while True:
        outcome = next_span(plan, &l.text, &spans, &span)
        if outcome != SPAN:
            break
        if not (push_known(l, &span.id, 1) if span.is_token else take_segment(s, l, &span)):
            return NO_MEMORY
    if outcome != END:
        s.counts.refusals[LONE_SURROGATE if outcome == SURROGATE else BESIDE_SINGLE_WORD] += 1
        return REFUSED
    end_missed(l)
    return LOOKED_UP

cdef inline bint take_segment(Store* s, Lookup* l, const Span* span) noexcept nogil:
    """Append the ids of a segment if they are cached, else list it as pending."""
    cdef Segment key
    cdef Segment* at
    cdef uint64_t digest
    cdef int why
    if not segment_key(&l.text, span.start, span.stop, l.scope, span.variant, &key):
        return push_long(l, span.start, span.stop, span.variant)
    digest = segment_digest(&key, &s.secret[0])
    at = find_segment(&s.segments, digest, &key)
    if at != NULL:
        at.tick = s.clock
        if at.n_ids != PENDING:
            l.n_segment_hits += 1
            return push_known(l, at.ids, at.n_ids)
        if at.ids[1] == l.serial:
            l.n_segment_hits += 1
            return push_op(l, <uint32_t> at.ids[0], 0)
    why = why_missing(&s.evicted_segments, digest, l.scope)  # before another one is evicted
    if at == NULL and l.keeps:
        make_segment_room(s, 1, True)
        if s.segments.n_sets:
            at = place_new_segment(s, digest)
            at[0] = key
            at.tick = s.clock
    l.segment_misses_by_reason[why] += 1
    l.n_segment_misses += 1
    if at != NULL:
        at.n_ids = PENDING
        at.ids[0] = <int32_t> l.n_pending
        at.ids[1] = l.serial
    return push_pending(l, span.start, span.stop, span.variant, True)
