"""Keeps locks usable across `os.fork`.

If a process forks while another thread holds a lock, the child's copy of the lock is never
released. So every object with a lock registers here: its lock is taken before the fork, released
in the parent and replaced in the child.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod


class Forkable(ABC):
    """An object with a lock; locks are taken in the order of `fork_rank`, lowest first."""

    fork_rank = 0

    @abstractmethod
    def before_fork(self) -> None:
        """Take the lock."""

    @abstractmethod
    def after_fork_in_parent(self) -> None:
        """Release the lock."""

    @abstractmethod
    def after_fork_in_child(self) -> None:
        """Make a new lock and discard the state of threads that do not exist in the child."""


_LIVING: weakref.WeakSet[Forkable] = weakref.WeakSet()
_forking: list[Forkable] = []


def tell_of_forks(each: Forkable) -> None:
    """Call the methods of `each` at every fork as long as the object lives."""
    _LIVING.add(each)


def _before() -> None:
    _forking.extend(sorted(_LIVING, key=lambda each: each.fork_rank))
    for each in _forking:
        each.before_fork()


def _after_in_parent() -> None:
    while _forking:
        _forking.pop().after_fork_in_parent()


def _after_in_child() -> None:
    while _forking:
        _forking.pop().after_fork_in_child()


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
