"""TierCounters: the counters that every tier below memory has."""

from __future__ import annotations

import threading
from collections import Counter

from tokcache.state.locked import Locked
from tokcache.stats import TierStats

_own = threading.local()  # `refusal`: the last one in each thread
_NAMES = ("hits", "misses", "writes", "evictions", "read_bytes", "written_bytes")


class TierCounters(Locked):
    """The counters of one tier and the lock that guards them.

    Threads: safe; after a fork, too.
    """

    fork_rank = 2

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()

    def count(self, name: str, n: int = 1) -> None:
        """Add `n` to a counter; `name` is that of a field of TierStats."""
        with self.lock:
            self._counts[name] += n

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""
        with self.lock:
            self._refusals[reason] += 1
        _own.refusal = reason

    def stats(self, n_bytes: int = 0) -> TierStats:
        """Return the counters, with `n_bytes` as the number of bytes held."""
        with self.lock:
            return TierStats(
                **{name: self._counts[name] for name in _NAMES},
                refusals=dict(self._refusals),
                n_bytes=n_bytes,
            )


def take_refusal() -> str:
    """Return the last reason for which a tier refused a state in this thread, once; or ""."""
    reason: str = getattr(_own, "refusal", "")
    _own.refusal = ""
    return reason
