"""Locked: an object with one lock that is usable after a fork."""

from __future__ import annotations

import threading

from tokcache._forks import Forkable, tell_of_forks


class Locked(Forkable):
    """The base of objects with one lock, which a forked child replaces."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        tell_of_forks(self)

    def before_fork(self) -> None:
        """Wait until no operation is half done."""
        self.lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        self.lock.release()

    def after_fork_in_child(self) -> None:
        """Make a new lock."""
        self.lock = threading.Lock()
