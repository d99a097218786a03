"""Measured costs of prefilling and reading: a tier that is slower than prefilling rests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_KEEP = 0.8  # weight of older measurements: the last ten or so decide
_MAX_LOSS_S = 0.25


@dataclass(slots=True)
class Speed:
    """How long a token takes to prefill; the last measurements count most."""

    _n_tokens: float = 0.0
    _seconds: float = 0.0

    def note(self, n_tokens: int, seconds: float) -> None:
        """Learn from `n_tokens` that took so long."""
        self._n_tokens = self._n_tokens * _KEEP + n_tokens
        self._seconds = self._seconds * _KEEP + seconds

    def seconds(self, n_tokens: int) -> float:
        """Return how long `n_tokens` are expected to take."""
        return self._seconds / self._n_tokens * n_tokens


@dataclass(slots=True)
class _Account:
    loss_s: float = 0.0
    rests_until_s: float = 0.0


@dataclass(slots=True)
class Worth:
    """Whether reading from one tier is faster than prefilling, for each model.

    For each read it is counted how much longer it took than prefilling the same tokens; reads that
    were faster make up for that, but no credit is kept. Once a quarter of a second is lost the tier
    rests for `rest_s`, then it is tried again. So it never costs more than that and one read in
    that time, and a single read that was slow by chance (the first one, a busy disk) is forgiven
    where others are fast.

    Threads: not safe, the cache locks.
    """

    rest_s: float = 30.0
    _accounts: dict[bytes, _Account] = field(default_factory=dict)

    def note(self, fingerprint: bytes, read_s: float, prefill_s: float) -> None:
        """Note how long a read took, and how long prefilling its tokens would have taken."""
        account = self._accounts.setdefault(fingerprint, _Account())
        account.loss_s = max(0.0, account.loss_s + read_s - prefill_s)
        if account.loss_s > _MAX_LOSS_S:
            account.loss_s, account.rests_until_s = 0.0, time.monotonic() + self.rest_s

    def rests(self, fingerprint: bytes) -> bool:
        """Return whether the tier is left alone now for this model's states."""
        account = self._accounts.get(fingerprint)
        return account is not None and time.monotonic() < account.rests_until_s
