"""Keeps locks usable across `os.fork`.

If a process forks while another thread holds a lock, the child's copy of the lock is never
released. So every object with a lock registers here. Two ways:

- A `Forkable`'s lock is taken before the fork, released in the parent and replaced in the child:
  the child finds the object between two operations, never within one.
- `call_in_child` calls one method in the child. It is enough for an object that the method empties,
  or that the parent's other threads can't leave half changed.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import MethodType


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
# The name of a method of each object: a WeakMethod prints an error when the interpreter ends.
_calls: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def tell_of_forks(each: Forkable) -> None:
    """Call the methods of `each` at every fork as long as the object lives."""
    _LIVING.add(each)


def call_in_child(method: Callable[[], object]) -> None:
    """Call a bound method in every forked child as long as its object lives; one an object."""
    bound = cast("MethodType", method)
    _calls[bound.__self__] = bound.__name__


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
    for each, name in list(_calls.items()):
        getattr(each, name)()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
