"""Runs the steps of a request in a thread or in an event loop.

A request is written once, as a generator. It yields steps and receives the result of each; an error
is raised at the `yield` of its step. A step is one of three:
- a `Call` to the server;
- a `Future`, such as the one of a free slot;
- a function without arguments, for work that would hold up an event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from tokcache.errors import ServerTimeout
from tokcache.llama.server.calls import Call

if TYPE_CHECKING:
    from tokcache.llama.server.connection import AsyncConnection, Connection

T = TypeVar("T")
Steps = Generator[Any, Any, T]


def drive(steps: Steps[T], connection: Connection) -> T:
    """Perform steps in this thread."""
    done, error = None, None
    while True:
        try:
            step = steps.send(done) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        done, error = None, None
        try:
            if isinstance(step, Call):
                done = connection.do(step)
            elif isinstance(step, Future):
                done = step.result(connection.timeout_s)
            else:
                done = step()
        except BaseException as raised:  # noqa: BLE001 (thrown into the generator)
            is_late = isinstance(step, Future) and isinstance(raised, TimeoutError)
            error = _no_free_slot(connection) if is_late else raised


async def adrive(steps: Steps[T], connection: AsyncConnection) -> T:
    """Perform steps in the running event loop."""
    done, error = None, None
    while True:
        try:
            step = steps.send(done) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        done, error = None, None
        try:
            if isinstance(step, Call):
                done = await connection.do(step)
            elif isinstance(step, Future):
                # In Python 3.11 wait_for ignores a cancellation if the future is done.
                async with asyncio.timeout(connection.timeout_s):
                    done = await asyncio.wrap_future(step)
            else:
                done = await asyncio.to_thread(step)
        except BaseException as raised:  # noqa: BLE001 (thrown into the generator)
            is_late = isinstance(step, Future) and isinstance(raised, TimeoutError)
            error = _no_free_slot(connection) if is_late else raised


def _no_free_slot(connection: Connection | AsyncConnection) -> ServerTimeout:
    return ServerTimeout(
        f"no slot of {connection.url} became free within {connection.timeout_s:g} s"
    )
