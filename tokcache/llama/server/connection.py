"""Connections to one llama-server from threads and event loops: time-outs, retries and errors.

A request is sent again only if that is safe: no connection was made, or the connection broke and
the request may be repeated. A request that timed out is not sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from tokcache._forks import Forkable, tell_of_forks
from tokcache.errors import (
    InvalidAnswer,
    InvalidConfig,
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
# llama-server closes idle connections after 5 s; drop ours first, so none breaks when used.
_IDLE_S = 4.0
_FIRST_SERVER_ERROR = 500
_MAX_ANSWER_BYTES = 256 << 20
_MAX_PORT = 65_535
_STATUSES: dict[int, type[RequestRejected | ServerFailed]] = {
    401: KeyRejected,
    403: KeyRejected,
    501: ServerUnsupported,
    503: ServerLoading,
}


class Connection(Forkable):
    """Sends calls to one server and reads its answers.

    Errors: subclasses of ServerError; MissingExtra without httpx; InvalidConfig.
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
        self._httpx = _httpx()
        self.url = _require_url(self._httpx, url)
        self.timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._headers = _headers(api_key)
        self._verify = _trust(url, verify)
        self._retries = retries
        self._lock = threading.Lock()
        self._is_closed = False
        self._sync: httpx.Client | None = None
        self._loops: dict[asyncio.AbstractEventLoop, _LoopClient] = {}
        self._parents: list[Any] = []
        tell_of_forks(self)

    def before_fork(self) -> None:
        """Take the lock, so that no other thread holds it at the fork."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Open connections of our own; the parent still uses its connections."""
        self._lock = threading.Lock()
        self._parents.append((self._sync, self._loops))
        self._sync, self._loops = None, {}

    def close(self) -> None:
        """Close the threads' connections; an event loop closes its own when it ends."""
        with self._lock:
            self._is_closed = True
            client, self._sync = self._sync, None
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        held = self._loops.pop(asyncio.get_running_loop(), None)
        if held is not None:
            await held.ending.aclose()

    def do(self, call: Call[T]) -> T:
        """Send a call and return its answer."""
        body = _Body(self.url, call.path, self.timeout_s)
        for attempt in range(self._retries + 1):
            try:
                client = self._client
                request = self._request(client, call)
                with contextlib.closing(client.send(request, stream=True)) as response:
                    for chunk in response.iter_bytes():
                        body.add(chunk)
                return self._read(call, response, body)
            except self._errors as error:
                if not self._is_worth_repeating(call, error, attempt):
                    raise self._translated(error, call.path) from error
                body.clear()
                time.sleep(_pause_s(attempt))
        raise ServerUnreachable(self._out_of_reach("no attempt was made"))

    async def ado(self, call: Call[T]) -> T:
        """Send a call and return its answer."""
        body = _Body(self.url, call.path, self.timeout_s)
        for attempt in range(self._retries + 1):
            try:
                client = await self._async_client()
                request = self._request(client, call)
                async with contextlib.aclosing(await client.send(request, stream=True)) as response:
                    async for chunk in response.aiter_bytes():
                        body.add(chunk)
                return self._read(call, response, body)
            except self._errors as error:
                if not self._is_worth_repeating(call, error, attempt):
                    raise self._translated(error, call.path) from error
                body.clear()
                await asyncio.sleep(_pause_s(attempt))
        raise ServerUnreachable(self._out_of_reach("no attempt was made"))

    def stream(self, call: Call[Completion]) -> Generator[Piece]:
        """Send a call and yield its answer piece by piece; closing the iterator aborts it."""
        reader, lines = _StreamReader(), _Lines(self.url, call.path)
        try:
            client = self._client
            request = self._request(client, call)
            with contextlib.closing(client.send(request, stream=True)) as response:
                for chunk in response.iter_bytes():
                    if not response.is_success:
                        lines.add(chunk)
                        continue
                    for line in lines.feed(chunk):
                        yield from self._pieces(reader, line, call.path)
                if not response.is_success:
                    raise self._rejection(response, lines, call.path)
        except self._errors as error:
            raise self._translated(error, call.path) from error
        self._require_end(reader)

    async def astream(self, call: Call[Completion]) -> AsyncGenerator[Piece]:
        """Send a call and yield its answer piece by piece; closing the iterator aborts it."""
        reader, lines = _StreamReader(), _Lines(self.url, call.path)
        try:
            client = await self._async_client()
            request = self._request(client, call)
            async with contextlib.aclosing(await client.send(request, stream=True)) as response:
                async for chunk in response.aiter_bytes():
                    if not response.is_success:
                        lines.add(chunk)
                        continue
                    for line in lines.feed(chunk):
                        for piece in self._pieces(reader, line, call.path):
                            yield piece
                if not response.is_success:
                    raise self._rejection(response, lines, call.path)
        except self._errors as error:
            raise self._translated(error, call.path) from error
        self._require_end(reader)

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        found = (self._httpx.HTTPError, self._httpx.InvalidURL, self._httpx.StreamError, OSError)
        # httpx raises these if a client is closed during a request.
        return (*found, RuntimeError, ValueError) if self._is_closed else found

    @property
    def _client(self) -> httpx.Client:
        with self._lock:
            self._require_open()
            if self._sync is None:
                self._sync = self._httpx.Client(**self._settings)
            return self._sync

    async def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            self._require_open()
            for each in [each for each in self._loops if each.is_closed()]:
                del self._loops[each]
            held = self._loops.get(loop)
            if held is None:
                client = self._httpx.AsyncClient(**self._settings)
                held = self._loops[loop] = _LoopClient(client, _until_the_end(client))
                is_new = True
            else:
                is_new = False
        if is_new:
            await anext(held.ending)  # a loop closes the generators that it started
        return held.client

    def _require_open(self) -> None:
        if self._is_closed:
            raise ServerUnreachable(self._out_of_reach("this LlamaServer was closed"))

    @cached_property
    def _settings(self) -> dict[str, Any]:
        timeout = self._httpx.Timeout(self.timeout_s, connect=self._connect_timeout_s)
        limits = self._httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S)
        return {
            "base_url": self.url,
            "timeout": timeout,
            "headers": self._headers,
            "limits": limits,
            "verify": self._verify,
        }

    @staticmethod
    def _request(client: Any, call: Call[Any]) -> Any:
        if call.body is None:
            return client.build_request(call.method, call.path)
        content = json.dumps(call.body, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/json"}
        return client.build_request(call.method, call.path, content=content, headers=headers)

    def _is_worth_repeating(self, call: Call[Any], error: Exception, attempt: int) -> bool:
        if attempt >= self._retries:
            return False
        if isinstance(error, self._httpx.ConnectError | self._httpx.ConnectTimeout):
            return True
        is_broken = isinstance(error, self._httpx.NetworkError | self._httpx.RemoteProtocolError)
        return call.is_repeatable and is_broken

    def _read(self, call: Call[T], response: Any, body: _Body) -> T:
        if not response.is_success:
            raise self._rejection(response, body, call.path)
        found = body.text if call.is_text else self._json(body.text)
        try:
            answer = call.read(found)
            if isinstance(answer, Completion):
                return _timed(answer, found, body.seconds)  # type: ignore[return-value]
        except InvalidAnswer as error:
            raise InvalidAnswer(f"{self.url} answered {call.path}: {error}") from None
        return answer

    def _json(self, found: str) -> Any:
        try:
            return json.loads(found)
        except (ValueError, RecursionError):
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
            raise ServerUnreachable(self._out_of_reach("the stream ended before its final piece"))

    def _out_of_reach(self, reason: str) -> str:
        return f"llama-server at {self.url} is out of reach: {reason}"

    def _translated(self, error: Exception, path: str) -> ServerError:
        if self._is_closed:
            return ServerUnreachable(self._out_of_reach("this LlamaServer was closed"))
        if isinstance(error, self._httpx.TimeoutException):
            is_connecting = "Connect" in type(error).__name__
            late = "accept a connection" if is_connecting else f"answer {path}"
            return ServerTimeout(
                f"llama-server at {self.url} did not {late} in time; is it overloaded, or is"
                " timeout_s too short?"
            )
        if isinstance(error, self._httpx.DecodingError):
            return InvalidAnswer(f"{self.url} answered {path} in an invalid encoding: {error}")
        reason = self._out_of_reach(str(error) or type(error).__name__)
        is_refused = any(isinstance(cause, ConnectionRefusedError) for cause in _causes(error))
        return ServerRefused(reason) if is_refused else ServerUnreachable(reason)

    def _rejection(self, response: Any, body: _Body, path: str) -> ServerError:
        try:
            found = json.loads(body.text)
        except (ValueError, RecursionError):
            found = {"error": {"message": body.text[:200] or "nothing"}}
        if response.has_redirect_location:
            where = response.headers["Location"][:200]
            found = {"error": {"message": f"a redirect to {where}; pass LlamaServer that url"}}
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


@dataclass(frozen=True, slots=True)
class _LoopClient:
    """The client of one event loop, and the generator that closes it with the loop."""

    client: httpx.AsyncClient
    ending: AsyncGenerator[None]


async def _until_the_end(client: httpx.AsyncClient) -> AsyncGenerator[None]:
    """Close a client with its event loop, which closes the generators that were started in it."""
    try:
        yield
    finally:
        await client.aclose()


class _Body:
    """The bytes of an answer so far, limited in time and size."""

    def __init__(self, url: str, path: str, timeout_s: float) -> None:
        self._url, self._path = url, path
        self._timeout_s = timeout_s
        self._began = perf_counter()
        self._content = bytearray()

    @property
    def seconds(self) -> float:
        """Return the seconds since the request."""
        return perf_counter() - self._began

    @property
    def text(self) -> str:
        """Return the answer as text: llama-server writes UTF-8, whatever its headers claim."""
        return self._content.decode("utf-8", "replace")

    def clear(self) -> None:
        """Discard the bytes for another attempt; the time limit stays."""
        self._content.clear()

    def add(self, chunk: bytes) -> None:
        """Add bytes, or raise ServerTimeout or InvalidAnswer if a limit is exceeded."""
        if self.seconds > self._timeout_s:
            raise ServerTimeout(
                f"llama-server at {self._url} did not answer {self._path} in full in time; is it"
                " overloaded, or is timeout_s too short?"
            )
        self._content += chunk
        if len(self._content) > _MAX_ANSWER_BYTES:
            raise InvalidAnswer(
                f"{self._url} answered {self._path} with more than {_MAX_ANSWER_BYTES:,} bytes"
            )


class _Lines(_Body):
    """Splits a stream into lines of limited size; only a newline ends one."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__(url, path, math.inf)  # the reader of a stream may take any time

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Add bytes and yield the lines that they complete."""
        n_searched = len(self._content)
        self.add(chunk)
        while (end := self._content.find(b"\n", n_searched)) >= 0:
            line = self._content[:end].removesuffix(b"\r").decode("utf-8", "replace")
            del self._content[: end + 1]
            n_searched = 0
            yield line


class _StreamReader:
    """Assembles a completion from the pieces of a stream."""

    def __init__(self) -> None:
        self.is_complete = False
        self._started = perf_counter()
        self._first_token_s: float | None = None
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._has_gap = False

    def read(self, found: Any) -> Iterator[Piece]:
        if self.is_complete:
            raise InvalidAnswer("a piece came after the final one")
        content = calls.text(found, "content")
        self._texts.append(content)
        if found.get("stop") is True:
            self.is_complete = True
            yield Piece(content, TokenIds(), self._completion(found))
            return
        ids = calls.token_ids(found, "tokens") if found.get("tokens") else TokenIds()
        if self._first_token_s is None and ids:
            self._first_token_s = perf_counter() - self._started
        yield Piece(content, self._noted(ids, found))

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


def _require_url(httpx: ModuleType, url: Any) -> str:
    try:
        found = httpx.URL(url)
        is_server = found.scheme in {"http", "https"} and found.host
        is_port = found.port is None or 0 < found.port <= _MAX_PORT
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise InvalidConfig(f"{url!r} is not a URL: {error}") from None
    if not is_server or not is_port:
        raise InvalidConfig(
            f"{url!r} is not a server's URL; pass one such as http://127.0.0.1:8080"
        )
    return str(url)


def _headers(api_key: Any) -> dict[str, str]:
    if not api_key:
        return {}
    if not isinstance(api_key, str) or not api_key.isascii() or not api_key.isprintable():
        raise InvalidConfig("api_key must be a str of printable ASCII characters")
    return {"Authorization": f"Bearer {api_key}"}


def _trust(url: str, verify: Any) -> bool | ssl.SSLContext:
    if not isinstance(verify, bool | str | ssl.SSLContext):
        raise InvalidConfig(f"verify must be a bool, a file or an SSLContext, not {verify!r}")
    if isinstance(verify, str):
        try:
            return ssl.create_default_context(cafile=verify)
        except OSError as error:  # also for a file that is not a certificate
            raise InvalidConfig(f"verify: {verify!r} can't be used: {error}") from None
    # Plain HTTP has no certificates, and loading the system's takes 30 ms.
    return False if url.startswith("http://") else verify


def _httpx() -> ModuleType:
    try:
        import httpx  # noqa: PLC0415 (an extra)
    except ImportError:
        raise MissingExtra("LlamaServer needs httpx: pip install 'tokcache[server]'") from None
    return httpx
