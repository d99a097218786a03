"""Measured costs of prefilling and of reads: a tier slower than prefilling is left unused."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

_KEEP = 0.8  # weight of older measurements: the last ten or so decide
_MAX_LOSS_S = 0.25


@dataclass(slots=True)
class Speed:
    """The time that a token takes to prefill; the last measurements count most."""

    _n_tokens: float = 0.0
    _seconds: float = 0.0

    def note(self, n_tokens: int, seconds: float) -> None:
        """Note that `n_tokens` took `seconds`."""
        self._n_tokens = self._n_tokens * _KEEP + n_tokens
        self._seconds = self._seconds * _KEEP + seconds

    def seconds(self, n_tokens: int) -> float:
        """Return the seconds that `n_tokens` are expected to take."""
        return self._seconds / self._n_tokens * n_tokens


@dataclass(slots=True)
class _Account:
    loss_s: float = 0.0
    rests_until_s: float = 0.0


@dataclass(slots=True)
class Worth:
    """Whether reading from one tier is faster than prefilling, for each model.

    Each read adds the time by which it took longer than prefilling the same tokens; faster reads
    subtract, down to zero. Once a quarter of a second is lost the tier rests for `rest_s`, then it
    is tried again. So it never costs more than that and one read in that time, and fast reads make
    up for a single one that was slow by chance (the first one, a busy disk).

    Threads: not safe; the store locks.
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
        """Return whether the tier is not asked now for this model's states."""
        account = self._accounts.get(fingerprint)
        return account is not None and time.monotonic() < account.rests_until_s
