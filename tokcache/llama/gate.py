"""Gate: lets one thread use a context at a time, and one generation after the other.

Life of a step:

1. A thread that wants the context takes a ticket. Of the tickets that may enter (2), the one that
   came first is served first.
2. A call "between" (a setting, the end of a stream, the end of the model) and a plain call
   (`reset`, `eval`) may enter as soon as no thread is inside. A generation enters when the one
   whose turn it is has ended, or when its consumer has not asked for a token for `IDLE_S`.
3. A plain call or a generation that finds another generation's state in the context suspends it:
   it takes a snapshot. The suspended one resumes from the snapshot at its own next step.
4. A step that decodes more than once pauses between two decodes when there are tickets that may
   enter: so they wait for one decode, not for a whole prompt or answer.
5. A step for idle times (`is_idle`) enters when no other ticket waits and no generation had a step
   for `REST_S`. It asks `is_wanted` after each decode, and leaves if another thread waits.

So an unread stream blocks no other call, interleaved streams both give the right tokens, and no
lock is held while a consumer is busy with a token, whatever thread it comes back from.

Implementation: `_inside` is the thread in a step, `_owner` the generation whose state the context
holds, `_turn` the generation whose turn it is (they differ after a plain call has suspended it).
The gate refers weakly to the model and to its generations: a generator refers to the model, so a
strong reference would keep an abandoned stream and its model alive until a garbage collection.
"""

from __future__ import annotations

import gc
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from tokcache.errors import ModelClosed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from types import TracebackType

IDLE_S = 0.1
REST_S = 1.0


class Context(Protocol):
    """The model that a gate guards."""

    def suspend(self, *, has_started: bool, is_decoding: bool) -> Any:
        """Return all that the present generation needs to go on later.

        `is_decoding`: it is about to decode, so it does not need the present logits.
        """

    def resume(self, suspended: Any) -> None:
        """Undo `suspend`."""

    def end_generation(self) -> None:
        """Note that the present generation is over: its state can be saved."""

    def serving(self, scope: str | None) -> AbstractContextManager[None]:
        """Return a context in which this thread works for a request of this scope."""


class _Kind(Enum):
    BETWEEN = "between"  # leaves the positions in the context as they are
    CALL = "call"  # changes the positions in the context
    GENERATION = "generation"
    IDLE = "idle"  # changes the positions in the context, and has the time that nobody else needs


_ENTER_AT_ONCE = (_Kind.BETWEEN, _Kind.CALL)


@dataclass(slots=True, eq=False)
class _Ticket:
    kind: _Kind
    thread: int
    steps: Steps | None = None
    called: threading.Condition | None = None  # notified when it is this ticket's turn


class Gate:
    """Guards one context.

    Errors: ModelClosed after `close`, and in a process that was forked off.
    Threads: any; a step may be taken from another thread than the one before.
    """

    def __init__(self, context: Context) -> None:
        self._context = weakref.proxy(context)
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._waiting: list[_Ticket] = []  # in the order of arrival
        self._inside: int | None = None
        self._running: Steps | None = None  # the generation whose step the thread inside is in
        self._paused_call: _Ticket | None = None  # of a plain call that pauses: no other may enter
        self._owner: weakref.ref[Steps] | None = None
        self._turn: weakref.ref[Steps] | None = None
        self._last_step = (0.0, 0)  # when the last step of `_turn` ended, in which thread
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

    def is_wanted(self) -> bool:
        """Return whether another thread waits for more than idle time."""
        return bool(self._waiting) and any(
            ticket.kind is not _Kind.IDLE for ticket in self._waiting[:]
        )

    def is_inside(self) -> bool:
        """Return whether the calling thread is in a step already."""
        return self._inside == threading.get_ident()

    @contextmanager
    def step(
        self, steps: Steps | None = None, *, is_generation: bool = False, is_idle: bool = False
    ) -> Iterator[None]:
        """Hold the context for `steps`, or for a plain call; nested calls pass through.

        `is_generation`: a plain call that generates waits for its turn as a generation does.
        `is_idle`: a plain call that waits until nobody else needs the context.
        """
        self.require_open()
        serving = nullcontext() if steps is None else self._context.serving(steps.scope)
        if self.is_inside():
            before, self._running = self._running, steps or self._running
            try:
                with serving:
                    yield
            finally:
                self._running = before
            return
        kind = _Kind.GENERATION if steps is not None or is_generation else _Kind.CALL
        kind = _Kind.IDLE if is_idle else kind
        self._enter(_Ticket(kind, threading.get_ident(), steps))
        try:
            self.require_open()
            self._running = steps
            with serving:
                if steps is None or not steps.is_over:  # closed while it waited
                    self._take_over(steps)
                yield
        finally:
            self._running = None
            self._leave(is_step=kind is _Kind.GENERATION)

    # Tickets

    def _enter(self, ticket: _Ticket) -> None:
        with self._mutex:
            is_free = self._inside is None and not self._waiting
            is_ours = ticket.kind in _ENTER_AT_ONCE or ticket.steps is self._whose_turn()
            if is_free and is_ours:  # the usual case, once a token: no other thread waits
                self._inside = ticket.thread
                return
            self._waiting.append(ticket)
            self._wait_for(ticket)

    def _wait_for(self, ticket: _Ticket) -> None:
        """Wait until `ticket`, one of those that wait, has entered. The mutex is held."""
        try:
            while True:
                first, wait = (None, math.inf) if self._inside else self._first()
                if first is ticket and wait <= 0:
                    self._inside = ticket.thread
                    return
                if first is not ticket:
                    self._call(first)
                ticket.called = ticket.called or threading.Condition(self._mutex)
                ticket.called.wait(wait if first is ticket and wait < math.inf else None)
        finally:
            self._waiting.remove(ticket)
            if self._inside is None:  # this one was interrupted
                self._call(self._first()[0])

    def _first(self) -> tuple[_Ticket | None, float]:
        """Return the ticket that is served next, and how long it still has to wait."""
        first, shortest = None, math.inf
        turn, others_wait_s = self._whose_turn(), self._others_wait_s()
        for ticket in self._waiting:
            if ticket.kind is _Kind.BETWEEN or self.is_closed:
                wait = 0.0
            elif self._paused_call is not None:
                wait = 0.0 if ticket is self._paused_call else math.inf
            elif ticket.kind is _Kind.IDLE:
                wait = math.inf if self.is_wanted() else self._others_wait_s(REST_S)
            elif ticket.kind is _Kind.CALL or (ticket.steps and ticket.steps is turn):
                wait = 0.0
            else:
                wait = others_wait_s
            if wait < shortest:
                first, shortest = ticket, wait
            if wait <= 0:
                break
        return first, shortest

    def _call(self, ticket: _Ticket | None) -> None:
        if ticket is not None and ticket.called is not None:
            ticket.called.notify()

    def _whose_turn(self) -> Steps | None:
        steps = self._turn() if self._turn else None
        return None if steps is None or steps.is_over else steps

    def _others_wait_s(self, idle_s: float = IDLE_S) -> float:
        """Return how long the generation whose turn it is keeps out the others.

        `idle_s` is for how long its consumer must not have asked for a token.
        """
        turn = self._whose_turn()
        if turn is None:
            return 0.0
        waiting = [ticket for ticket in self._waiting if ticket.kind is not _Kind.BETWEEN]
        if any(ticket.steps is turn for ticket in waiting):
            return math.inf
        when, thread = self._last_step
        # Its consumer waits here for another step: it won't ask for a token meanwhile.
        if any(ticket.thread == thread for ticket in waiting):
            return 0.0
        return max(when + idle_s - time.monotonic(), 0.0)

    def _leave(self, *, is_step: bool) -> None:
        with self._mutex:
            if is_step:
                self._last_step = (time.monotonic(), threading.get_ident())
            self._inside = None
            if self._waiting:
                self._call(self._first()[0])

    # Steps

    def _take_over(self, steps: Steps | None) -> None:
        owner = self._owner() if self._owner else None
        if owner is not steps or owner is None:
            if owner is not None and not owner.is_over:
                owner.suspended = self._context.suspend(
                    has_started=owner.has_started, is_decoding=owner.is_paused
                )
            elif self._owner is not None:
                self._context.end_generation()
            self._owner = None
        if steps is not None:
            self._own(steps)

    def _own(self, steps: Steps) -> None:
        self._owner = self._turn = weakref.ref(steps)
        if steps.suspended is not None:
            suspended, steps.suspended = steps.suspended, None
            try:
                self._context.resume(suspended)
            except BaseException:
                self._owner = None
                steps.end_without_context()
                raise

    def own_now(self, steps: Steps) -> None:
        """Give the context to `steps` before its first step; only inside a step."""
        self._owner = self._turn = weakref.ref(steps)

    def pause(self, *, only_between: bool = False) -> float:
        """Let the waiting tickets that may enter do so; return how many seconds that took.

        Only inside a step, where the context holds whole batches, and before a decode: a
        generation may be suspended meanwhile, a plain call may not. `only_between` keeps plain
        calls out in any case.

        Errors: ModelClosed if the model was closed meanwhile; GeneratorExit if the stream was.
        """
        if not self._waiting:
            return 0.0
        began, running = time.perf_counter(), self._running
        is_call = running is None or only_between
        mine = _Ticket(_Kind.CALL if is_call else _Kind.GENERATION, threading.get_ident(), running)
        wanted = {_Kind.BETWEEN} if is_call else {_Kind.BETWEEN, _Kind.CALL}
        with self._mutex:
            if not any(ticket.kind in wanted for ticket in self._waiting):
                return 0.0
            self._waiting.append(mine)
            self._paused_call = mine if is_call else None
            self._running = self._inside = None
            if running is not None:
                running.is_paused = True
            error = self._wait_without_fail(mine)
            self._paused_call, self._running = None, running
            if running is not None:
                running.is_paused = False
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame
        self.require_open()
        if running is not None:
            if running.is_over:
                raise GeneratorExit
            if not is_call:
                self._take_over(running)
        return time.perf_counter() - began

    def _wait_without_fail(self, ticket: _Ticket) -> BaseException | None:
        """Wait until `ticket` has entered; return an interruption (Ctrl-C), to be raised then.

        A thread in a step must not leave it before it has entered again: another may be inside.
        """
        error = None
        while True:
            try:
                self._wait_for(ticket)
            except BaseException as interruption:  # noqa: BLE001 (returned)
                error = interruption
                self._waiting.insert(0, ticket)
            else:
                return error

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep every other step out; no generation is suspended for it."""
        if self.is_inside() or os.getpid() != self._pid:
            yield
            return
        self._enter(_Ticket(_Kind.BETWEEN, threading.get_ident()))
        try:
            yield
        finally:
            self._leave(is_step=False)

    def finish(self, steps: Steps) -> None:
        """Note, while others are kept out, that the generation of `steps` is over."""
        if self._owner is not None and self._owner() is steps:
            self._owner = None
            if not self.is_closed and os.getpid() == self._pid:
                self._context.end_generation()

    def close(self, release: Callable[[], None]) -> None:
        """Save the decoded states, then call `release` and let no more steps in.

        A generation that is going on ends with ModelClosed at its next decode.
        """
        if os.getpid() != self._pid:
            return
        with self.turn():
            if not self.is_closed:
                if self._owner is not None:
                    self._context.end_generation()
                self._owner = None
                self.is_closed = True
                release()


class Steps(Generator[Any, Any, Any]):
    """A generator each step of which holds the gate; it may be resumed from any thread.

    `scope` is the scope of the request that it serves.
    """

    def __init__(
        self, gate: Gate, generator: Generator[Any, Any, Any], *, scope: str | None
    ) -> None:
        self._gate = gate
        self._generator = generator
        self.scope = scope
        self.suspended: Any = None
        self.is_over = False
        self.has_started = False
        self.is_paused = False  # between two decodes of one step
        self._is_closed = False
        self._advancing_in: int | None = None  # the thread
        if gate.is_inside():
            gate.own_now(self)

    def send(self, value: Any) -> Any:
        """Return the next item."""
        return self._step(lambda generator: generator.send(value))

    def throw(
        self,
        typ: Any,
        val: object = None,
        tb: TracebackType | None = None,
    ) -> Any:
        """Raise an error in the generator and return its next item."""
        raised = [typ] if val is None and tb is None else [typ, val, tb]
        del typ, val, tb  # the error's traceback refers to this frame
        try:
            return self._step(lambda generator: generator.throw(*raised))
        finally:
            raised.clear()

    def only(self) -> Any:
        """Return the one item of a generation that does not stream, and end it."""
        with self._gate.step(self):
            try:
                return self._advance(next)
            finally:
                self._end()

    def _step(self, advance: Callable[[Generator[Any, Any, Any]], Any]) -> Any:
        if self.is_over:
            return advance(self._generator)  # an exhausted generator's own answer
        try:
            with self._gate.step(self):
                if self.is_over:
                    return advance(self._generator)
                try:
                    return self._advance(advance)
                except BaseException:
                    self._end()
                    raise
        except GeneratorExit:
            if not self._is_closed:
                raise
        raise StopIteration  # closed by another thread, in the middle of this step

    def _advance(self, advance: Callable[[Generator[Any, Any, Any]], Any]) -> Any:
        self.has_started, self._advancing_in = True, threading.get_ident()
        try:
            return advance(self._generator)
        finally:
            self._advancing_in = None

    def end_without_context(self) -> None:
        """End the generation where its state is lost: it must not go on in another's."""
        self.is_over = True
        if self._advancing_in is None:
            self._generator.close()

    def _end(self) -> None:
        self.is_over = True
        self._generator.close()
        self._gate.finish(self)

    def close(self) -> None:
        """End the generation and save its state.

        Another thread that waits for the next item meanwhile gets StopIteration. A garbage
        collection may run under any lock, so this does not wait there; the state is saved later.
        """
        if self.is_over:
            return
        if threading.get_ident() in _collecting:
            self.is_over = True
            self._generator.close()
            return
        with self._gate.turn():
            if self._advancing_in == threading.get_ident():
                raise ValueError("generator already executing")
            if self.is_over:
                return
            self.suspended, self._is_closed = None, True
            if self._advancing_in is not None:  # it pauses between two decodes
                self._generator = (item for item in list[Any]())
            self._end()


_collecting: set[int] = set()  # the thread that collects garbage at this moment


def _note_collection(
    phase: str,
    _: object,
    threads: set[int] = _collecting,
    thread: Callable[[], int] = threading.get_ident,
) -> None:
    (threads.add if phase == "start" else threads.discard)(thread())


gc.callbacks.append(_note_collection)
