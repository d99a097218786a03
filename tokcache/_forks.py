"""What holds locks is told of forks.

Forked while another thread is inside, a lock would stay locked in the child for ever.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod


class Forkable(ABC):
    """Something with a lock; `fork_rank` is the order in which locks are taken, lowest first."""

    fork_rank = 0

    @abstractmethod
    def before_fork(self) -> None:
        """Take the lock."""

    @abstractmethod
    def after_fork_in_parent(self) -> None:
        """Give it back."""

    @abstractmethod
    def after_fork_in_child(self) -> None:
        """Make a new one, and forget what the other threads were doing."""


_LIVING: weakref.WeakSet[Forkable] = weakref.WeakSet()
_forking: list[Forkable] = []


def tell_of_forks(each: Forkable) -> None:
    """Tell `each` of forks as long as it lives."""
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
