"""Measured costs of prefilling and of reads: a tier slower than prefilling is left unused.

It is neither asked for states nor given any that it would give back too late.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

_KEEP = 0.8  # weight of older measurements: the last ten or so decide
_MAX_LOSS_S = 0.25
_MIN_READS, _MAX_READS = 3, 8  # of which the last ones say how long a read takes


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
    reads: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_MAX_READS))
    noted_s: float = 0.0  # when a read was measured, or a state written to measure one

    def read_s(self, n_bytes: int) -> float:
        """Return how long reading `n_bytes` is expected to take: 0 before a few reads.

        Of the last reads the slowest is left out: a busy disk may have delayed it.
        """
        if len(self.reads) < _MIN_READS:
            return 0.0
        usual = sorted(self.reads, key=lambda read: read[0] / read[1])[:-1]
        return sum(s for s, _ in usual) / sum(n for _, n in usual) * n_bytes


@dataclass(slots=True)
class Worth:
    """Whether reading from one tier is faster than prefilling, for each model.

    Each read adds the time by which it took longer than prefilling the same tokens; faster reads
    subtract, down to zero. Once a quarter of a second is lost the tier rests for `rest_s`, then it
    is tried again. So it never costs more than that and one read in that time, and fast reads make
    up for a single one that was slow by chance (the first one, a busy disk).

    A state is not written if reading its bytes is expected to take longer than prefilling its
    tokens. Once no read was measured for `rest_s`, one is written nevertheless: without it, a tier
    that has become faster could never show it.

    Threads: not safe; the store locks.
    """

    rest_s: float = 30.0
    _accounts: dict[bytes, _Account] = field(default_factory=dict)

    def note(self, fingerprint: bytes, read_s: float, prefill_s: float, n_bytes: int) -> None:
        """Note how long a read took, and how long prefilling its tokens would have taken."""
        account = self._accounts.setdefault(fingerprint, _Account())
        if n_bytes:
            account.reads.append((read_s, n_bytes))
            account.noted_s = time.monotonic()
        account.loss_s = max(0.0, account.loss_s + read_s - prefill_s)
        if account.loss_s > _MAX_LOSS_S:
            account.loss_s, account.rests_until_s = 0.0, time.monotonic() + self.rest_s

    def pays(self, fingerprint: bytes, prefill_s: float, n_bytes: int) -> bool:
        """Return whether to write `n_bytes` of state, whose tokens take `prefill_s` to prefill."""
        account = self._accounts.get(fingerprint)
        if account is None or account.read_s(n_bytes) <= prefill_s:
            return True
        now = time.monotonic()
        is_trial = now - account.noted_s >= self.rest_s
        if is_trial:
            account.noted_s = now
        return is_trial

    def rests(self, fingerprint: bytes) -> bool:
        """Return whether the tier is not asked now for this model's states."""
        account = self._accounts.get(fingerprint)
        return account is not None and time.monotonic() < account.rests_until_s
