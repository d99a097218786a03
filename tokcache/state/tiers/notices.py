"""Notices: decides which troubles get a line in the log: each when it begins and when it ends.

A trouble has a subject ("writes", say) and a reason. Its cost is counted elsewhere, state by state;
a line is logged only when the reason changes. No line has a scope, a token or a secret.
"""

from __future__ import annotations

from tokcache.state.locked import Locked

_MAX_LOGGED = 1000  # models; above it, models that were logged long ago are logged again


class Notices(Locked):
    """The present troubles, and the models that a line was logged for.

    Threads: safe; after a fork, too: the child starts without troubles and finds its own.
    """

    fork_rank = 3

    def __init__(self) -> None:
        super().__init__()
        self._troubles: dict[str, str] = {}
        self._logged: set[bytes] = set()

    def is_changed(self, subject: str, reason: str = "") -> bool:
        """Note the reason of a trouble, "" for none; return whether it was another one before."""
        if not reason and subject not in self._troubles:  # nearly always: no lock
            return False
        with self.lock:
            before = self._troubles.pop(subject, "")
            if reason:
                self._troubles[subject] = reason
            return before != reason

    def is_first(self, fingerprint: bytes) -> bool:
        """Return whether this is the first time for that model."""
        with self.lock:
            if fingerprint in self._logged:
                return False
            if len(self._logged) >= _MAX_LOGGED:
                self._logged.clear()
            self._logged.add(fingerprint)
            return True

    def after_fork_in_child(self) -> None:
        """Make a new lock, and start without troubles."""
        super().after_fork_in_child()
        self._troubles = {}
