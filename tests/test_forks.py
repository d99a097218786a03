"""Locks are usable in a forked child, whatever the parent's threads held."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import tokcache
from tokcache._forks import call_in_child
from tokcache.state.locked import Locked

ROOT = Path(tokcache.__file__).parent


class Counted:
    def __init__(self) -> None:
        self.n_calls = 0
        call_in_child(self.count)

    def count(self) -> None:
        self.n_calls += 1


def holds_in_child(check: Callable[[], bool]) -> bool:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_method_is_called_in_the_child_only() -> None:
    one, other = Counted(), Counted()
    assert holds_in_child(lambda: one.n_calls == other.n_calls == 1)
    assert one.n_calls == other.n_calls == 0


def test_a_registered_object_is_freed() -> None:
    one = Counted()
    reference = weakref.ref(one)
    del one
    assert reference() is None
    assert holds_in_child(lambda: True)


def test_a_lock_is_free_in_parent_and_child() -> None:
    one = Locked()
    assert holds_in_child(lambda: not one.lock.locked())
    assert not one.lock.locked()


def test_no_other_module_registers_at_fork() -> None:
    sources = [path for path in ROOT.rglob("*.py") if path.name != "_forks.py"]
    assert not [path for path in sources if re.search("register_at_fork", path.read_text())]
