"""Calls: the link to a Redis, with a circuit breaker for calls and one for writes.

1. A call is made only if the circuit lets it through; otherwise it is refused at once.
2. Its outcome is noted: failures in a row open the circuit, an answer closes it.
3. Writes have a second circuit: a server that is full still answers reads.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from tokcache.errors import LinkFailed, StateRefused
from tokcache.state.locked import Locked
from tokcache.state.tiers.redis.circuit import Circuit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tokcache.state.tiers.redis.commands import Command
    from tokcache.state.tiers.redis.link import Link
    from tokcache.state.tiers.redis.notices import RedisNotices

_SLOWEST = 32 << 20  # bytes a second: slower payloads are not worth waiting for
_NO_WRITES = {"full", "read_only", "not_persisting", "no_replicas", "permission"}


class Deadline:
    """The time by which all calls of one look-up, or of one write, have to end.

    Units: `until_s` seconds of the monotonic clock.
    """

    def __init__(self, timeout_s: float) -> None:
        self.until_s = time.monotonic() + timeout_s

    def extend(self, n_bytes: int) -> None:
        """Allow the time that `n_bytes` more may take."""
        self.until_s += n_bytes / _SLOWEST


class Calls(Locked):
    """Commands to a Redis that is given up for a while after failures in a row.

    Units:  `timeout_s` seconds of a look-up or write.
    Errors: StateRefused where there was no answer, or the circuit is open.
    Threads: safe, each has its connection while it asks; a forked child makes its own.
    """

    fork_rank = 2

    def __init__(
        self,
        link: Link,
        notices: RedisNotices,
        *,
        timeout_s: float,
        n_failures: int,
        retry_s: float,
    ) -> None:
        self.link, self._notices, self._timeout_s = link, notices, timeout_s
        self._all, self._writes = Circuit(n_failures, retry_s), Circuit(n_failures, retry_s)
        super().__init__()

    def deadline(self) -> Deadline:
        """Return the deadline of a look-up or write that begins now."""
        return Deadline(self._timeout_s)

    def ask(self, commands: Sequence[Command], deadline: Deadline) -> list[Any]:
        """Send all commands at once and return a reply to each."""
        self._require_closed()
        return self._call(partial(self.link.ask, commands), commands, deadline)

    def fill(
        self, commands: Sequence[Command], rooms: Sequence[memoryview], deadline: Deadline
    ) -> list[Any]:
        """Send commands for one key and receive each reply in its room; return their lengths."""
        self._require_closed()
        return self._call(partial(self.link.fill, commands, rooms), commands, deadline)

    def ask_anyway(self, commands: Sequence[Command], deadline: Deadline) -> list[Any]:
        """Send all commands at once, even if the circuit is open.

        Missing rights are not logged here: the caller reports them.
        """
        return self._call(partial(self.link.ask, commands), (), deadline)

    def _require_closed(self) -> None:
        with self.lock:
            if not self._all.lets_through():
                raise StateRefused("circuit_open")

    def _call(
        self,
        ask: Callable[[float], list[Any]],
        commands: Sequence[Command],
        deadline: Deadline,
    ) -> list[Any]:
        is_good = False
        try:
            replies = ask(deadline.until_s)
            is_good = True
        except LinkFailed as failure:
            reason = str(failure)
            if reason in ("auth", "permission"):
                self._notices.no_access(reason)
            else:
                with self.lock:
                    is_chance = not self._all.would_open()
                if not is_chance:
                    circuit = self._all
                    self._notices.no_answer(reason, circuit.n_failures, circuit.retry_s)
            raise StateRefused(reason) from failure
        finally:
            with self.lock:
                self._all.note(is_good=is_good)
        self._notices.answered(commands, replies)
        return replies

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Note the outcome of a write, of several calls; writes in a row that failed pause it.

        Errors: StateRefused while writes are paused.
        """
        with self.lock:
            if not self._writes.lets_through():
                raise StateRefused("writes_paused")
        reason = ""
        try:
            yield
        except StateRefused as refusal:
            reason = str(refusal)
            raise
        finally:
            with self.lock:
                self._writes.note(is_good=reason not in _NO_WRITES)
                is_open = self._writes.is_open
            if is_open:
                self._notices.not_written(reason)

    def close_circuits(self) -> None:
        """Let calls and writes through again."""
        with self.lock:
            for circuit in (self._all, self._writes):
                circuit.note(is_good=True)

    def after_fork_in_child(self) -> None:
        """Make a new lock and close the circuits; the parent's connections are not used."""
        super().after_fork_in_child()
        self.link.forget()
        self.close_circuits()
