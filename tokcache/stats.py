"""Frozen snapshots of counters; every layer has one.

Counters only grow until their cache is cleared; `n_entries` and `n_bytes` are of the moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
class CacheStats:
    """Counters of a wrapped tokenizer.

    Units: `encoded_tokens` ids made by the engine in `encode_seconds`; `bypasses` calls that the
    plain tokenizer answered, by reason; `shared` callers that waited for another's encoding.
    """

    l0: L0Stats
    encoded_texts: int = 0
    encoded_tokens: int = 0
    encode_seconds: float = 0.0
    shared: int = 0
    invalidations: int = 0
    bypasses: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StateStats:
    """Counters of a prefix-state cache.

    Units: `reused_tokens` positions restored instead of decoded, `saved_tokens` positions stored;
    `n_bytes` bytes held; `refusals` states not stored or not used, by reason.
    """

    lookups: int
    hits: int
    lookup_tokens: int
    reused_tokens: int
    saved_tokens: int
    saved_blocks: int
    evictions: int
    refusals: Mapping[str, int]
    restore_seconds: float
    save_seconds: float
    n_entries: int
    n_blocks: int
    n_bytes: int

    @property
    def hit_rate(self) -> float:
        """Look-ups that found a usable prefix over all look-ups, 0.0 before the first."""
        return _ratio(self.hits, self.lookups)

    @property
    def token_hit_rate(self) -> float:
        """Tokens restored over tokens looked up, 0.0 before the first."""
        return _ratio(self.reused_tokens, self.lookup_tokens)
