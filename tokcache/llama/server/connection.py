"""Connections to one llama-server: time-outs, retries, errors; for threads and event loops alike.

A request is sent again only where that is safe: it was never sent (no connection came about), or
asking twice does no harm and the connection broke. A server that is slow is not asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from tokcache.errors import (
    InvalidAnswer,
    KeyRejected,
    MissingExtra,
    PromptTooLong,
    RequestRejected,
    ServerError,
    ServerFailed,
    ServerLoading,
    ServerRefused,
    ServerTimeout,
    ServerUnreachable,
    ServerUnsupported,
)
from tokcache.llama.server import calls
from tokcache.llama.server.results import Completion, Piece
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from types import ModuleType

    import httpx

    from tokcache.llama.server.calls import Call

T = TypeVar("T")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
# llama-server closes idle connections after 5 s: one that is about to be closed is not used.
_IDLE_S = 4.0
_FIRST_SERVER_ERROR = 500
_STATUSES: dict[int, type[RequestRejected | ServerFailed]] = {
    401: KeyRejected,
    403: KeyRejected,
    501: ServerUnsupported,
    503: ServerLoading,
}


class Connection:
    """What sends calls to one server and reads its answers.

    Errors: subclasses of ServerError; MissingExtra without httpx.
    Threads: safe, also after a fork and in any event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        api_key: str | None,
        verify: bool | str | ssl.SSLContext,
        retries: int,
    ) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._verify = verify
        self._retries = retries
        self._httpx = _httpx()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._sync: httpx.Client | None = None
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            WeakKeyDictionary()
        )

    def close(self) -> None:
        """Close the threads' connections."""
        with self._lock:
            client, self._sync = self._sync, None
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        client = self._loops.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def do(self, call: Call[T], timeout_s: float | None = None) -> T:
        """Send a call and return its answer."""
        started = perf_counter()
        for attempt in range(self._retries + 1):
            try:
                response = self._client.send(self._request(self._client, call, timeout_s))
                return self._read(call, response, perf_counter() - started)
            except self._errors as error:
                if not self._is_worth_repeating(call, error, attempt):
                    raise self._translated(error, call.path) from error
                time.sleep(_pause_s(attempt))
        raise ServerUnreachable(self._out_of_reach("no attempt was made"))

    async def ado(self, call: Call[T], timeout_s: float | None = None) -> T:
        """Send a call and return its answer."""
        started = perf_counter()
        client = self._async_client()
        for attempt in range(self._retries + 1):
            try:
                response = await client.send(self._request(client, call, timeout_s))
                return self._read(call, response, perf_counter() - started)
            except self._errors as error:
                if not self._is_worth_repeating(call, error, attempt):
                    raise self._translated(error, call.path) from error
                await asyncio.sleep(_pause_s(attempt))
        raise ServerUnreachable(self._out_of_reach("no attempt was made"))

    def stream(self, call: Call[Completion]) -> Generator[Piece]:
        """Send a call and yield its answer as it comes; closing the iterator aborts it."""
        reader = _StreamReader()
        try:
            request = self._request(self._client, call)
            with contextlib.closing(self._client.send(request, stream=True)) as response:
                if not response.is_success:
                    response.read()
                    raise self._rejection(response, call.path)
                for line in response.iter_lines():
                    yield from self._pieces(reader, line, call.path)
        except self._errors as error:
            raise self._translated(error, call.path) from error
        self._require_end(reader)

    async def astream(self, call: Call[Completion]) -> AsyncGenerator[Piece]:
        """Send a call and yield its answer as it comes; closing the iterator aborts it."""
        reader = _StreamReader()
        client = self._async_client()
        try:
            response = await client.send(self._request(client, call), stream=True)
            async with contextlib.aclosing(response):
                if not response.is_success:
                    await response.aread()
                    raise self._rejection(response, call.path)
                async for line in response.aiter_lines():
                    for piece in self._pieces(reader, line, call.path):
                        yield piece
        except self._errors as error:
            raise self._translated(error, call.path) from error
        self._require_end(reader)

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        return (self._httpx.HTTPError, self._httpx.InvalidURL)

    @property
    def _client(self) -> httpx.Client:
        with self._lock:
            if self._sync is None or self._pid != os.getpid():
                # A child of a fork must not read what was sent to its parent.
                self._pid = os.getpid()
                self._sync = self._httpx.Client(**self._settings)
            return self._sync

    def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._loops.get(loop)
        if client is None:
            client = self._loops[loop] = self._httpx.AsyncClient(**self._settings)
        return client

    @cached_property
    def _settings(self) -> dict[str, Any]:
        timeout = self._httpx.Timeout(self.timeout_s, connect=self._connect_timeout_s)
        limits = self._httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S)
        return {
            "base_url": self.url,
            "timeout": timeout,
            "headers": self._headers,
            "limits": limits,
            "verify": self._trust(),
        }

    def _trust(self) -> bool | ssl.SSLContext:
        if self.url.startswith("http://"):
            return False  # nothing to verify, and reading all certificates takes 30 ms
        if isinstance(self._verify, str):
            return ssl.create_default_context(cafile=self._verify)
        return self._verify

    def _request(self, client: Any, call: Call[Any], timeout_s: float | None = None) -> Any:
        settings = {}
        if timeout_s is not None:
            settings["timeout"] = self._httpx.Timeout(timeout_s, connect=self._connect_timeout_s)
        return client.build_request(call.method, call.path, json=call.body, **settings)

    def _is_worth_repeating(self, call: Call[Any], error: Exception, attempt: int) -> bool:
        if attempt >= self._retries:
            return False
        if isinstance(error, self._httpx.ConnectError | self._httpx.ConnectTimeout):
            return True
        is_broken = isinstance(error, self._httpx.NetworkError | self._httpx.RemoteProtocolError)
        return call.is_repeatable and is_broken

    def _read(self, call: Call[T], response: Any, seconds: float) -> T:
        if not response.is_success:
            raise self._rejection(response, call.path)
        found = response.text if call.is_text else self._json(response.text)
        try:
            answer = call.read(found)
        except InvalidAnswer as error:
            raise InvalidAnswer(f"{self.url} answered {call.path}: {error}") from None
        if isinstance(answer, Completion):
            return _timed(answer, found, seconds)  # type: ignore[return-value]
        return answer

    def _json(self, found: str) -> Any:
        try:
            return json.loads(found)
        except ValueError:
            raise InvalidAnswer(
                f"{self.url} did not answer in JSON; is a llama-server there?"
            ) from None

    def _pieces(self, reader: _StreamReader, line: str, path: str) -> Iterator[Piece]:
        if not line.strip() or line.startswith(":"):  # a comment keeps the connection alive
            return
        name, _, data = line.partition(": ")
        if name == "error":
            raise self._rejected(500, {"error": self._json(data)}, path)
        if name != "data":
            raise InvalidAnswer(f"{self.url} sent {line[:80]!r} in a stream of data lines")
        found = self._json(data)
        if isinstance(found, dict) and "error" in found:
            code = found["error"].get("code") if isinstance(found["error"], dict) else None
            raise self._rejected(code if isinstance(code, int) else 500, found, path)
        try:
            yield from reader.read(found)
        except InvalidAnswer as error:
            raise InvalidAnswer(f"{self.url} streamed {path}: {error}") from None

    def _require_end(self, reader: _StreamReader) -> None:
        if not reader.is_complete:
            raise ServerUnreachable(self._out_of_reach("the stream ended before its last piece"))

    def _out_of_reach(self, reason: str) -> str:
        return f"llama-server at {self.url} is out of reach: {reason}"

    def _translated(self, error: Exception, path: str) -> ServerError:
        if isinstance(error, self._httpx.TimeoutException):
            what = "accept a connection" if "Connect" in type(error).__name__ else f"answer {path}"
            return ServerTimeout(
                f"llama-server at {self.url} did not {what} in time; is it overloaded, or is"
                " timeout_s too short?"
            )
        if isinstance(error, self._httpx.DecodingError):
            return InvalidAnswer(f"{self.url} answered {path} in an encoding that is none: {error}")
        reason = self._out_of_reach(str(error) or type(error).__name__)
        is_refused = any(isinstance(cause, ConnectionRefusedError) for cause in _causes(error))
        return ServerRefused(reason) if is_refused else ServerUnreachable(reason)

    def _rejection(self, response: Any, path: str) -> ServerError:
        try:
            found = response.json()
        except ValueError:
            found = {"error": {"message": response.text[:200] or "nothing"}}
        return self._rejected(response.status_code, found, path)

    def _rejected(self, status: int, found: Any, path: str) -> ServerError:
        error = found.get("error") if isinstance(found, dict) else found
        details = error if isinstance(error, dict) else {"message": str(error)[:200]}
        message = f"llama-server at {self.url} answered {path} with {status}: "
        message += str(details.get("message", details))[:2000]
        kind = _STATUSES.get(
            status, ServerFailed if status >= _FIRST_SERVER_ERROR else RequestRejected
        )
        if details.get("type") == "exceed_context_size_error":
            kind = PromptTooLong
        rejected = kind(message)
        rejected.status = status
        return rejected


class _StreamReader:
    """Puts a streamed answer together."""

    def __init__(self) -> None:
        self.is_complete = False
        self._started = perf_counter()
        self._first_token_s: float | None = None
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._has_gap = False

    def read(self, found: Any) -> Iterator[Piece]:
        if self.is_complete:
            raise InvalidAnswer("a piece came after the last one")
        content = calls.text(found, "content")
        self._texts.append(content)
        if found.get("stop") is True:
            self.is_complete = True
            yield Piece(content, TokenIds(), self._completion(found))
            return
        ids = found.get("tokens") if isinstance(found.get("tokens"), list) else []
        if self._first_token_s is None and ids:
            self._first_token_s = perf_counter() - self._started
        yield Piece(content, self._noted(TokenIds(ids), found))

    def _noted(self, ids: TokenIds, found: Any) -> TokenIds:
        n_predicted = calls.optional_integer(found, "tokens_predicted")
        self._has_gap |= n_predicted is not None and n_predicted != len(self._ids) + len(ids)
        if not self._has_gap:
            self._ids.extend(ids)
        return ids

    def _completion(self, found: Any) -> Completion:
        seconds = perf_counter() - self._started
        first = seconds if self._first_token_s is None else self._first_token_s
        return replace(
            calls.read_completion(found),
            token_ids=TokenIds(self._ids),
            text="".join(self._texts),
            seconds=seconds,
            first_token_s=first,
        )


def _timed(answer: Completion, found: Any, seconds: float) -> Completion:
    first_token_s = seconds - calls.predicted_seconds(found)
    return replace(answer, seconds=seconds, first_token_s=first_token_s)


def _pause_s(attempt: int) -> float:
    return min(_FIRST_PAUSE_S * 2.0**attempt, _LONGEST_PAUSE_S)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _httpx() -> ModuleType:
    try:
        import httpx  # noqa: PLC0415 (an extra)
    except ImportError:
        raise MissingExtra("LlamaServer needs httpx: pip install 'tokcache[server]'") from None
    return httpx
