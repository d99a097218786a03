"""Who may use the context: one step at a time, one generation after the other.

A generation lives in its context between two tokens too. Another one waits until it has ended; if
its consumer does not ask for the next token for `IDLE_S`, it is put aside (a snapshot) and brought
back when it is asked again. So an abandoned stream blocks nobody, interleaved streams both come
out right, and no lock is held while a consumer thinks, whatever thread it resumes from.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from tokcache.errors import ModelClosed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

IDLE_S = 0.1


class Context(Protocol):
    """What the gate asks of the model it guards."""

    def put_aside(self, *, has_started: bool) -> Any:
        """Return all that the present generation needs to go on later."""

    def bring_back(self, aside: Any) -> None:
        """Undo `put_aside`."""

    def end_generation(self) -> None:
        """Note that the present generation is over: its state can be saved."""


class Gate:
    """Guards one context.

    Errors: ModelClosed after `close`, and in a process that was forked off.
    Threads: any; a step may be taken from another thread than the one before.
    """

    def __init__(self, context: Context) -> None:
        self._context = weakref.proxy(context)
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        self._inside: int | None = None  # the thread that is in a step
        self._owner: weakref.ref[Steps] | None = None
        self._last_step = (0.0, 0)  # when the owner's ended, in which thread
        self._orphans: deque[Generator[Any, Any, Any]] = deque()
        self.is_closed = False

    def require_open(self) -> None:
        """Raise ModelClosed unless the context may be used here."""
        if os.getpid() != self._pid:
            raise ModelClosed(
                "this model belongs to the parent process: llama.cpp does not survive a fork; "
                "make a Llama of its own in each process, after the fork"
            )
        if self.is_closed:
            raise ModelClosed("this model was closed; make a new Llama")

    def is_inside(self) -> bool:
        """Return whether the calling thread is in a step already."""
        return self._inside == threading.get_ident()

    @contextmanager
    def step(self, steps: Steps | None = None) -> Iterator[None]:
        """Hold the context for `steps`, or for a plain call; nested calls pass through."""
        self.require_open()
        if self.is_inside():
            yield
            return
        self._enter(steps)
        try:
            self._take_over(steps)
            yield
        finally:
            self._leave()

    def _enter(self, steps: Steps | None) -> None:
        with self._changed:
            while self._inside is not None or (wait := self._wait_s(steps)) > 0:
                self._changed.wait(None if self._inside is not None else wait)
            self.require_open()
            self._inside = threading.get_ident()

    def _wait_s(self, steps: Steps | None) -> float:
        """Return how long the owner may still be left alone."""
        owner = self._owner() if self._owner else None
        if owner is None or owner is steps or owner.is_over:
            return 0.0
        when, thread = self._last_step
        # Its consumer is this very thread: it won't ask for more while it waits here.
        if thread == threading.get_ident():
            return 0.0
        return when + IDLE_S - time.monotonic()

    def _take_over(self, steps: Steps | None) -> None:
        while self._orphans:
            # Nobody refers to it any more. Closing it here, not in the garbage collector, which
            # may run anywhere, under any lock.
            self._orphans.popleft().close()
        owner = self._owner() if self._owner else None
        if owner is not steps or owner is None:
            if owner is not None and not owner.is_over:
                owner.aside = self._context.put_aside(has_started=owner.has_started)
            elif self._owner is not None:
                self._context.end_generation()
            self._owner = None
        if steps is not None:
            self._own(steps)

    def _own(self, steps: Steps) -> None:
        self._owner = weakref.ref(steps)
        if steps.aside is not None:
            aside, steps.aside = steps.aside, None
            try:
                self._context.bring_back(aside)
            except BaseException:
                self._owner = None
                steps.end_without_context()
                raise

    def own_now(self, steps: Steps) -> None:
        """Give the context to `steps` before its first step; only inside a step."""
        self._owner = weakref.ref(steps)

    def _leave(self) -> None:
        with self._changed:
            self._last_step = (time.monotonic(), threading.get_ident())
            self._inside = None
            self._changed.notify_all()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep every step out, whoever the owner is; nothing is put aside."""
        if self.is_inside() or os.getpid() != self._pid:
            yield
            return
        with self._changed:
            while self._inside is not None:
                self._changed.wait()
            self._inside = threading.get_ident()
        try:
            yield
        finally:
            self._leave()

    def finish(self, steps: Steps) -> None:
        """Note, while others are kept out, that the generation of `steps` is over."""
        if self._owner is not None and self._owner() is steps:
            self._owner = None
            if not self.is_closed and os.getpid() == self._pid:
                self._context.end_generation()

    def abandon(self, generator: Generator[Any, Any, Any]) -> None:
        """Take a generator that was collected; it is closed at the next step. Never blocks."""
        self._orphans.append(generator)

    def close(self, release: Callable[[], None]) -> None:
        """Wait for the step in progress, then call `release` and let nobody in any more."""
        if os.getpid() != self._pid:
            return
        with self.turn():
            if not self.is_closed:
                self._take_over(None)
                self.is_closed = True
                release()


class Steps(Generator[Any, Any, Any]):
    """A generator each step of which holds the gate; it may be resumed from any thread."""

    def __init__(self, gate: Gate, generator: Generator[Any, Any, Any]) -> None:
        self._gate = gate
        self._generator = generator
        self.aside: Any = None
        self.is_over = False
        self.has_started = False
        if gate.is_inside():
            gate.own_now(self)

    def send(self, value: Any) -> Any:
        """Return the next item."""
        return self._step(self._generator.send, value)

    def throw(
        self,
        typ: Any,
        val: object = None,
        tb: TracebackType | None = None,
    ) -> Any:
        """Raise an error in the generator and return its next item."""
        if val is None and tb is None:
            return self._step(self._generator.throw, typ)
        return self._step(self._generator.throw, typ, val, tb)

    def only(self) -> Any:
        """Return the one item of a generation that does not stream, and end it."""
        with self._gate.step(self):
            try:
                return next(self._generator)
            finally:
                self._end()

    def _step(self, advance: Callable[..., Any], *args: Any) -> Any:
        if self.is_over:
            return advance(*args)  # an exhausted generator's own answer
        with self._gate.step(self):
            self.has_started = True
            try:
                return advance(*args)
            except BaseException:
                self._end()
                raise

    def end_without_context(self) -> None:
        """End the generation where its state is lost: it must not go on in another's."""
        self.is_over = True
        self._generator.close()

    def _end(self) -> None:
        self.is_over = True
        self._generator.close()
        self._gate.finish(self)

    def close(self) -> None:
        """End the generation; what it decoded is saved."""
        if self.is_over:
            return
        with self._gate.turn():
            if not self.is_over:
                self.aside = None
                self._end()

    def __del__(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._gate.abandon(self._generator)
