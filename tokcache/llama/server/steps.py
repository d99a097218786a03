"""Runs the steps of a request in a thread or in an event loop.

A request is written once, as a generator. It yields steps (a call to the server, or a future to
wait for) and receives each result; an error is raised at the `yield` of its step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar

from tokcache.errors import ServerTimeout
from tokcache.llama.server.calls import Call

if TYPE_CHECKING:
    from tokcache.llama.server.connection import Connection

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
            done = _perform(step, connection)
        except BaseException as raised:  # noqa: BLE001 (thrown into the generator)
            error = raised


async def adrive(steps: Steps[T], connection: Connection) -> T:
    """Perform steps in the running event loop."""
    done, error = None, None
    while True:
        try:
            step = steps.send(done) if error is None else steps.throw(error)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        done, error = None, None
        try:
            done = await _aperform(step, connection)
        except BaseException as raised:  # noqa: BLE001 (thrown into the generator)
            error = raised


def _perform(step: Any, connection: Connection) -> Any:
    if isinstance(step, Call):
        return connection.do(step)
    try:
        return step.result(connection.timeout_s)
    except TimeoutError:
        raise _no_free_slot(connection) from None


async def _aperform(step: Any, connection: Connection) -> Any:
    if isinstance(step, Call):
        return await connection.ado(step)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(step), connection.timeout_s)
    except TimeoutError:
        raise _no_free_slot(connection) from None


def _no_free_slot(connection: Connection) -> ServerTimeout:
    return ServerTimeout(
        f"no slot of {connection.url} became free within {connection.timeout_s:g} s"
    )
