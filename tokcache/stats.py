"""Frozen copies of the counters of every layer.

Counters only grow until their cache is cleared; `n_entries` and `n_bytes` are current values.
A look-up that is under way while its tokenizer is changed may be missing from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from tokcache.reasons import TEXT_MISSES


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _no_misses() -> dict[str, int]:
    return dict.fromkeys(TEXT_MISSES, 0)


def add_counts(old: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """Add the counts of each reason; those of 0 are kept."""
    return {reason: old.get(reason, 0) + now.get(reason, 0) for reason in {**old, **now}}


@dataclass(frozen=True, slots=True)
class L0Stats:
    """Counters of L0, the exact-string cache.

    Units: `n_bytes` is the bytes held (keys, ids, overhead); `hit_tokens` counts the token ids
    served from hits. `misses_by_reason` says how many of the `misses` were texts that this cache
    had evicted.
    """

    hits: int
    misses: int
    insertions: int
    evictions: int
    refusals: Mapping[str, int]
    hit_tokens: int
    n_entries: int
    n_bytes: int
    misses_by_reason: Mapping[str, int] = field(default_factory=_no_misses)

    @property
    def hit_rate(self) -> float:
        """Hits divided by look-ups, 0.0 before the first look-up."""
        return _ratio(self.hits, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class L1Stats:
    """Counters of L1, the segment cache.

    Units: a text is one of the `hits` if all of its chunks were cached, else one of the `misses`.
    `chunk_hits` and `chunk_misses` count look-ups of chunks, `segment_hits` and `segment_misses`
    those of segments; `chunk_misses_by_reason` and `segment_misses_by_reason` say how many of the
    misses had been evicted. `lookup_chars`, `chunk_miss_chars` and `engine_chars` are the code
    points of texts looked up, of chunks not found, and of text that the engine encoded. `tokens`
    counts the ids of all answers, `engine_tokens` those of them that the engine made. `n_bytes` is
    the bytes held. `refusals` counts, by reason, texts that were not cut and segments that were not
    kept.
    """

    hits: int = 0
    misses: int = 0
    chunk_hits: int = 0
    chunk_misses: int = 0
    segment_hits: int = 0
    segment_misses: int = 0
    lookup_chars: int = 0
    chunk_miss_chars: int = 0
    engine_chars: int = 0
    engine_tokens: int = 0
    tokens: int = 0
    insertions: int = 0
    evictions: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    n_chunks: int = 0
    n_segments: int = 0
    n_bytes: int = 0
    chunk_misses_by_reason: Mapping[str, int] = field(default_factory=_no_misses)
    segment_misses_by_reason: Mapping[str, int] = field(default_factory=_no_misses)

    def __add__(self, now: L1Stats) -> L1Stats:
        """Add the counters of a cache that was replaced; sizes are those of `now`."""
        total = asdict(now)
        for name, old in asdict(self).items():
            if isinstance(old, dict):
                total[name] = add_counts(old, total[name])
            elif name not in {"n_chunks", "n_segments", "n_bytes"}:
                total[name] += old
        return L1Stats(**total)

    @property
    def char_hit_rate(self) -> float:
        """Share of the looked-up code points that were in cached chunks, 0.0 before the first."""
        return _ratio(self.lookup_chars - self.chunk_miss_chars, self.lookup_chars)


@dataclass(frozen=True, slots=True)
class RenderStats:
    """Counters of the cache of rendered chats.

    Units: a chat is one of the `hits` if the text of some of its messages was cached, else one of
    the `misses`. `messages` counts the messages of both, `hit_messages` those that were not
    rendered again. An entry is the text of one more message. `n_bytes` is the bytes held.
    `refusals` counts, by reason, chats that transformers rendered and texts that were not kept.
    """

    hits: int = 0
    misses: int = 0
    messages: int = 0
    hit_messages: int = 0
    insertions: int = 0
    evictions: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    n_entries: int = 0
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a wrapped tokenizer.

    Units: `encoded_texts` counts the texts that the engine encoded, in full or in part,
    `encoded_tokens` their ids and `encode_seconds` the time. `bypasses` counts, by reason, the
    calls that the plain tokenizer answered. `shared` counts callers that waited for another
    caller's encoding of the same text. `engine` names the encoder of uncached text, and
    `engine_reason` says why it is that one: a key of `reasons.ENGINE_REASONS`.
    """

    l0: L0Stats
    l1: L1Stats = field(default_factory=L1Stats)
    render: RenderStats = field(default_factory=RenderStats)
    encoded_texts: int = 0
    encoded_tokens: int = 0
    encode_seconds: float = 0.0
    shared: int = 0
    invalidations: int = 0
    bypasses: Mapping[str, int] = field(default_factory=dict)
    engine: str = "tokenizers"
    engine_reason: str = "pending"


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters of a tier below memory, without the look-ups that memory answered.

    Units: `hits` and `misses` count states looked up; `n_bytes` is the bytes held now, by all
    processes that share the tier; `refusals` counts, by reason, states not stored or not used. For
    Redis `evictions` and `n_bytes` are 0: its own INFO command reports them.
    """

    hits: int = 0
    misses: int = 0
    writes: int = 0
    evictions: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StateStats:
    """Counters of a prefix-state cache.

    Units: `prompt_tokens` counts the tokens of all prompts, `context_tokens` those still in the
    engine's context, `restored_tokens` those restored from this cache; the rest were decoded. A
    prompt that was entirely in the context is not a look-up. `saved_tokens` counts positions
    stored, `saved_bytes` the bytes of their states, `promoted_tokens` positions that came from a
    lower tier. `n_bytes` is the bytes held in memory. `refusals` counts, by reason, states not
    stored or not used; those of a lower tier have reasons such as "disk: reason" or "redis:
    reason". `misses` counts, by `MissReason`, the prompts that were reused no further than to some
    token before their end, `missed_tokens` their tokens from there on.
    """

    lookups: int
    hits: int
    prompt_tokens: int
    context_tokens: int
    restored_tokens: int
    saved_tokens: int
    saved_blocks: int
    evictions: int
    refusals: Mapping[str, int]
    restore_seconds: float
    save_seconds: float
    n_entries: int
    n_blocks: int
    n_bytes: int
    misses: Mapping[str, int] = field(default_factory=dict)
    missed_tokens: Mapping[str, int] = field(default_factory=dict)
    n_states: int = 0
    saved_bytes: int = 0
    promoted_tokens: int = 0
    expirations: int = 0
    disk: TierStats = field(default_factory=TierStats)
    redis: TierStats = field(default_factory=TierStats)

    @property
    def hit_rate(self) -> float:
        """Share of look-ups that found a usable prefix, 0.0 before the first look-up."""
        return _ratio(self.hits, self.lookups)

    @property
    def token_hit_rate(self) -> float:
        """Share of prompt tokens that were not decoded, 0.0 before the first prompt."""
        return _ratio(self.context_tokens + self.restored_tokens, self.prompt_tokens)
