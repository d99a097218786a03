"""Frozen snapshots of counters; every layer has one.

Counters only grow until their cache is cleared; `n_entries` and `n_bytes` are of the moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class L0Stats:
    """Counters of the exact-string cache.

    Units: `n_bytes` bytes held (keys, ids, overhead); `hit_tokens` token ids served from hits.
    """

    hits: int
    misses: int
    insertions: int
    evictions: int
    refusals: Mapping[str, int]
    hit_tokens: int
    n_entries: int
    n_bytes: int

    @property
    def hit_rate(self) -> float:
        """Hits over look-ups, 0.0 before the first."""
        return _ratio(self.hits, self.hits + self.misses)


@dataclass(frozen=True, slots=True)
class L1Stats:
    """Counters of the segment cache.

    Units: `hits` and `misses` texts of which every, not every, chunk was known; `chunk_` and
    `short_` the parts looked up in either table; `_chars` characters: of texts looked up, of
    chunks that were not there, and of parts that reached the engine; `tokens` ids answered,
    `engine_tokens` those of them that the engine made; `n_bytes` bytes held; `refusals` texts
    not cut, and parts not kept, by reason.
    """

    hits: int = 0
    misses: int = 0
    chunk_hits: int = 0
    chunk_misses: int = 0
    short_hits: int = 0
    short_misses: int = 0
    lookup_chars: int = 0
    chunk_miss_chars: int = 0
    engine_chars: int = 0
    engine_tokens: int = 0
    tokens: int = 0
    insertions: int = 0
    evictions: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    n_chunks: int = 0
    n_shorts: int = 0
    n_bytes: int = 0

    def __add__(self, now: L1Stats) -> L1Stats:
        """Add up two lives of a cache: counters grow, what is held is held now."""
        own, new = asdict(self), asdict(now)
        held = {name: new[name] for name in ("n_chunks", "n_shorts", "n_bytes")}
        refusals = dict(Counter(self.refusals) + Counter(now.refusals))
        total = {name: own[name] + new[name] for name in own if name not in (*held, "refusals")}
        return L1Stats(**total, **held, refusals=refusals)

    @property
    def char_hit_rate(self) -> float:
        """Characters that stood in known chunks over all looked up, 0.0 before the first."""
        return _ratio(self.lookup_chars - self.chunk_miss_chars, self.lookup_chars)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a wrapped tokenizer.

    Units: `encoded_tokens` ids of the texts that the engine encoded, all or parts of them, in
    `encode_seconds`; `bypasses` calls that the plain tokenizer answered, by reason; `shared`
    callers that waited for another's encoding.
    """

    l0: L0Stats
    l1: L1Stats = field(default_factory=L1Stats)
    encoded_texts: int = 0
    encoded_tokens: int = 0
    encode_seconds: float = 0.0
    shared: int = 0
    invalidations: int = 0
    bypasses: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters of a tier below memory: its own look-ups, not those that memory answered.

    Units: `hits` and `misses` states asked for; `n_bytes` held now, by all processes that share
    the tier; `refusals` states not stored or not used, by reason. What a Redis evicts and holds
    is its own to tell (INFO): `evictions` and `n_bytes` are 0 there.
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

    Units: `prompt_tokens` tokens of all prompts, of which `context_tokens` were still in the
    engine's context and `restored_tokens` came from this cache: the rest was decoded (a prompt that
    was all in context is not a look-up); `saved_tokens` positions stored; `n_bytes` bytes held in
    memory; `promoted_tokens` positions that came from a lower tier; `refusals` states not stored or
    not used, by reason, those of a lower tier as "disk: reason" or "redis: reason".
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
    n_states: int = 0
    promoted_tokens: int = 0
    expirations: int = 0
    disk: TierStats = field(default_factory=TierStats)
    redis: TierStats = field(default_factory=TierStats)

    @property
    def hit_rate(self) -> float:
        """Look-ups that found a usable prefix over all look-ups, 0.0 before the first."""
        return _ratio(self.hits, self.lookups)

    @property
    def token_hit_rate(self) -> float:
        """Prompt tokens that were not decoded over all prompt tokens, 0.0 before the first."""
        return _ratio(self.context_tokens + self.restored_tokens, self.prompt_tokens)
