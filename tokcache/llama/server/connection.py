"""Connections to one llama-server: `Connection` for threads, `AsyncConnection` for event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tokcache._forks import Forkable, tell_of_forks

if TYPE_CHECKING:
    import httpx

    from tokcache.llama.server.calls import Call
    from tokcache.llama.server.exchange import Exchange
    from tokcache.llama.server.results import Completion, Piece

T = TypeVar("T")


class Connection(Forkable):
    """Sends calls to one server and waits for their answers.

    Errors: subclasses of ServerError.
    Threads: safe, also after a fork.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.url, self.timeout_s = exchange.url, exchange.timeout_s
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._parents: list[httpx.Client | None] = []
        tell_of_forks(self)

    def do(self, call: Call[T]) -> T:
        """Send a call and return its answer."""
        exchange = self._exchange
        body = exchange.body(call)
        for attempt in range(exchange.retries + 1):
            try:
                client = self._open_client()
                request = exchange.request(client, call)
                with contextlib.closing(client.send(request, stream=True)) as response:
                    for chunk in response.iter_bytes():
                        body.add(chunk)
                return exchange.read(call, response, body)
            except exchange.errors as error:
                pause_s = exchange.retry_after(call, error, attempt)
            body.clear()
            time.sleep(pause_s)
        raise exchange.unreachable("no attempt was made")

    def stream(self, call: Call[Completion]) -> Generator[Piece]:
        """Send a call and yield its answer piece by piece; closing the iterator aborts it."""
        exchange = self._exchange
        reader = exchange.stream_reader(call)
        try:
            client = self._open_client()
            request = exchange.request(client, call)
            with contextlib.closing(client.send(request, stream=True)) as response:
                for chunk in response.iter_bytes():
                    yield from reader.feed(response, chunk)
                reader.finish(response)
        except exchange.errors as error:
            raise exchange.translated(error, call.path) from error

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            self._exchange.is_closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _open_client(self) -> httpx.Client:
        with self._lock:
            if self._exchange.is_closed:
                raise self._exchange.unreachable("this client was closed")
            if self._client is None:
                self._client = self._exchange.httpx.Client(**self._exchange.client_settings)
            return self._client

    def before_fork(self) -> None:
        """Take the lock, so that no other thread holds it at the fork."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Open connections of our own; the parent still uses its connections."""
        self._lock = threading.Lock()
        self._parents.append(self._client)
        self._client = None


@dataclass(frozen=True, slots=True)
class _LoopClient:
    """The client of one event loop, and the generator that closes it with the loop."""

    client: httpx.AsyncClient
    ending: AsyncGenerator[None]


class AsyncConnection(Forkable):
    """Sends calls to one server and awaits their answers.

    Each event loop has connections of its own, which are closed with the loop.

    Errors: subclasses of ServerError.
    Threads: safe, also after a fork and in any number of event loops.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.url, self.timeout_s = exchange.url, exchange.timeout_s
        self._lock = threading.Lock()
        self._loops: dict[asyncio.AbstractEventLoop, _LoopClient] = {}
        self._parents: list[Any] = []
        tell_of_forks(self)

    async def do(self, call: Call[T]) -> T:
        """Send a call and return its answer."""
        exchange = self._exchange
        body = exchange.body(call)
        for attempt in range(exchange.retries + 1):
            try:
                client = await self._open_client()
                request = exchange.request(client, call)
                async with contextlib.aclosing(await client.send(request, stream=True)) as response:
                    async for chunk in response.aiter_bytes():
                        body.add(chunk)
                return exchange.read(call, response, body)
            except exchange.errors as error:
                pause_s = exchange.retry_after(call, error, attempt)
            body.clear()
            await asyncio.sleep(pause_s)
        raise exchange.unreachable("no attempt was made")

    async def stream(self, call: Call[Completion]) -> AsyncGenerator[Piece]:
        """Send a call and yield its answer piece by piece; closing the iterator aborts it."""
        exchange = self._exchange
        reader = exchange.stream_reader(call)
        try:
            client = await self._open_client()
            request = exchange.request(client, call)
            async with contextlib.aclosing(await client.send(request, stream=True)) as response:
                async for chunk in response.aiter_bytes():
                    for piece in reader.feed(response, chunk):
                        yield piece
                reader.finish(response)
        except exchange.errors as error:
            raise exchange.translated(error, call.path) from error

    async def aclose(self) -> None:
        """Close the connections of the running event loop; other loops close their own."""
        self._exchange.is_closed = True
        with self._lock:
            held = self._loops.pop(asyncio.get_running_loop(), None)
        if held is not None:
            await held.ending.aclose()

    async def _open_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._exchange.is_closed:
                raise self._exchange.unreachable("this client was closed")
            for each in [each for each in self._loops if each.is_closed()]:
                del self._loops[each]
            held = self._loops.get(loop)
            is_new = held is None
            if held is None:
                client = self._exchange.httpx.AsyncClient(**self._exchange.client_settings)
                held = self._loops[loop] = _LoopClient(client, _until_the_end(client))
        if is_new:
            await anext(held.ending)  # a loop closes the generators that it started
        return held.client

    def before_fork(self) -> None:
        """Take the lock, so that no other thread holds it at the fork."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Open connections of our own; the parent still uses its connections."""
        self._lock = threading.Lock()
        self._parents.append(self._loops)
        self._loops = {}


async def _until_the_end(client: httpx.AsyncClient) -> AsyncGenerator[None]:
    """Close a client with its event loop, which closes the generators that were started in it."""
    try:
        yield
    finally:
        await client.aclose()
