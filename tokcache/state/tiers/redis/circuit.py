"""Circuit: holds back calls to a server that does not answer."""

from __future__ import annotations

import time

_LONGEST_S = 60.0


class Circuit:
    """Opens after failures in a row, for a time that doubles; then one call probes.

    Units:  `n_failures` failures in a row that open it; `retry_s` seconds that it is open first,
            twice as long after each probe that failed, a minute at most.
    Threads: not safe; Calls locks.
    """

    def __init__(self, n_failures: int, retry_s: float) -> None:
        self.n_failures, self.retry_s = n_failures, retry_s
        self._failed = 0
        self._delay_s = retry_s
        self._open_until_s = 0.0
        self._is_probed = False

    @property
    def is_open(self) -> bool:
        """Whether calls are held back, except for a probe now and then."""
        return self._failed >= self.n_failures

    def would_open(self) -> bool:
        """Return whether it is open, or a failure of the present call opens it."""
        return self._failed + 1 >= self.n_failures

    def lets_through(self) -> bool:
        """Return whether a call may be made; `note` must follow each that may."""
        if not self.is_open:
            return True
        if self._is_probed or time.monotonic() < self._open_until_s:
            return False
        self._is_probed = True
        return True

    def note(self, *, is_good: bool) -> None:
        """Note how a call ended."""
        self._is_probed = False
        if is_good:
            self._failed, self._delay_s = 0, self.retry_s
            return
        was_open = self.is_open
        self._failed += 1
        if was_open:
            self._delay_s = min(2 * self._delay_s, max(_LONGEST_S, self.retry_s))
        if self.is_open:
            self._open_until_s = time.monotonic() + self._delay_s
