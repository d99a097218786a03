"""Notices: which troubles to log a line about: each when it begins, and when it is over.

A trouble has a subject ("writes", say) and a reason. What it costs is counted state by state
elsewhere; a line is logged only when the reason changes. No line has a scope, a token or a secret.
"""

from __future__ import annotations

import threading

_MAX_TOLD = 1000  # models; above it, those told of long ago are told of again


class Notices:
    """What is in trouble now, and which models were told of.

    Threads: safe; a forked child has to `forget`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._troubles: dict[str, str] = {}
        self._told: set[bytes] = set()

    def forget(self) -> None:
        """Begin without troubles and with a new lock: a child finds out for itself."""
        self._lock = threading.Lock()
        self._troubles = {}

    def is_changed(self, subject: str, reason: str = "") -> bool:
        """Note the reason of a trouble, "" for none; return whether it was another one before."""
        if not reason and subject not in self._troubles:  # nearly always: no lock
            return False
        with self._lock:
            before = self._troubles.pop(subject, "")
            if reason:
                self._troubles[subject] = reason
            return before != reason

    def is_first(self, fingerprint: bytes) -> bool:
        """Return whether this is the first time for that model."""
        with self._lock:
            if fingerprint in self._told:
                return False
            if len(self._told) >= _MAX_TOLD:
                self._told.clear()
            self._told.add(fingerprint)
            return True
