"""The HTTP of one llama-server: builds requests, reads responses and names errors.

Nothing here sends; `connection` does, from threads and from event loops.
"""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from tokcache._validate import require_int, require_seconds, without_password
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


class Exchange:
    """Turns calls into httpx requests, and responses and errors into results.

    Errors: subclasses of ServerError; MissingExtra without httpx; InvalidConfig.
    Threads: safe.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        connect_timeout_s: float,
        retries: int,
        api_key: str | None,
        verify: bool | str | ssl.SSLContext,
    ) -> None:
        self.retries = require_int("retries", retries, minimum=0, maximum=10)
        self.timeout_s = require_seconds("timeout_s", timeout_s)
        if api_key and not (
            isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()
        ):
            raise InvalidConfig("api_key must be a str of printable ASCII characters")
        try:
            import httpx  # noqa: PLC0415 (an extra)
        except ImportError:
            raise MissingExtra("LlamaServer needs httpx: pip install 'tokcache[server]'") from None
        self.httpx = httpx
        server = _require_url(httpx, url)
        # Errors, names and log lines show this one; httpx itself logs the URL of each request.
        self.url = str(server.copy_with(userinfo=b""))
        self.is_closed = False
        timeout = require_seconds("connect_timeout_s", connect_timeout_s)
        # The arguments of httpx.Client and httpx.AsyncClient.
        self.client_settings: dict[str, Any] = {
            "base_url": self.url,
            "timeout": httpx.Timeout(self.timeout_s, connect=timeout),
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "auth": (server.username, server.password) if server.userinfo else None,
            "limits": httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S),
            "verify": _trusted(url, verify),
        }

    @staticmethod
    def request(client: Any, call: Call[Any]) -> Any:
        """Return a call as a request of `client`."""
        if call.body is None:
            return client.build_request(call.method, call.path)
        content = json.dumps(call.body, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/json"}
        return client.build_request(call.method, call.path, content=content, headers=headers)

    def body(self, call: Call[Any]) -> Body:
        """Return an empty body for the answer to a call; its time begins now."""
        return Body(self.url, call.path, self.timeout_s)

    def stream_reader(self, call: Call[Completion]) -> StreamReader:
        """Return a reader for the streamed answer to a call; its time begins now."""
        return StreamReader(self, call.path)

    def read(self, call: Call[T], response: Any, body: Body) -> T:
        """Return the result of a call, or raise the error that the server reported."""
        if not response.is_success:
            raise self.rejection(response, body, call.path)
        found = body.text if call.is_text else self.json(body.text)
        try:
            answer = call.read(found)
            if isinstance(answer, Completion):
                first_token_s = body.seconds - calls.predicted_seconds(found)
                return replace(answer, seconds=body.seconds, first_token_s=first_token_s)
        except InvalidAnswer as error:
            raise InvalidAnswer(f"{self.url} answered {call.path}: {error}") from None
        return answer

    def json(self, found: str) -> Any:
        """Return the value of a JSON text."""
        try:
            return json.loads(found)
        except (ValueError, RecursionError):
            raise InvalidAnswer(
                f"{self.url} did not answer in JSON; is a llama-server there?"
            ) from None

    # -- errors -------------------------------------------------------------------------------

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """The exceptions of a request that `retry_after` understands."""
        found = (self.httpx.HTTPError, self.httpx.InvalidURL, self.httpx.StreamError, OSError)
        # httpx raises these if a client is closed during a request.
        return (*found, RuntimeError, ValueError) if self.is_closed else found

    def retry_after(self, call: Call[Any], error: Exception, attempt: int) -> float:
        """Return the seconds to wait before a call is sent again.

        It is sent again if no connection was made, or if the connection broke and the call may be
        repeated; not if it timed out.

        Errors: the ServerError for `error` if the call is not sent again.
        """
        is_unsent = isinstance(error, self.httpx.ConnectError | self.httpx.ConnectTimeout)
        is_broken = isinstance(error, self.httpx.NetworkError | self.httpx.RemoteProtocolError)
        if attempt >= self.retries or not (is_unsent or (call.is_repeatable and is_broken)):
            raise self.translated(error, call.path) from error
        return min(_FIRST_PAUSE_S * 2.0**attempt, _LONGEST_PAUSE_S)

    def translated(self, error: Exception, path: str) -> ServerError:
        """Return the ServerError for an exception of httpx."""
        if self.is_closed:
            return self.unreachable("this client was closed")
        if isinstance(error, self.httpx.TimeoutException):
            is_connecting = "Connect" in type(error).__name__
            late = "accept a connection" if is_connecting else f"answer {path}"
            return ServerTimeout(
                f"llama-server at {self.url} did not {late} in time; is it overloaded, or is"
                " timeout_s too short?"
            )
        if isinstance(error, self.httpx.DecodingError):
            return InvalidAnswer(f"{self.url} answered {path} in an invalid encoding: {error}")
        unreachable = self.unreachable(str(error) or type(error).__name__)
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConnectionRefusedError):
                return ServerRefused(str(unreachable))
            cause = cause.__cause__ or cause.__context__
        return unreachable

    def unreachable(self, reason: str) -> ServerUnreachable:
        """Return the error for a server that can't be reached."""
        return ServerUnreachable(f"llama-server at {self.url} is out of reach: {reason}")

    def rejection(self, response: Any, body: Body, path: str) -> ServerError:
        """Return the error for a response whose status is not 2xx."""
        try:
            found = json.loads(body.text)
        except (ValueError, RecursionError):
            found = {"error": {"message": body.text[:200] or "nothing"}}
        if response.has_redirect_location:
            where = response.headers["Location"][:200]
            found = {"error": {"message": f"a redirect to {where}; pass that url to the client"}}
        return self.rejected(response.status_code, found, path)

    def rejected(self, status: int, found: Any, path: str) -> ServerError:
        """Return the error for a status and the JSON that came with it."""
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


class Body:
    """The bytes of an answer that have arrived, limited in time and size."""

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
        """Return the answer as text: llama-server writes UTF-8, also if its headers differ."""
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

    def lines(self, chunk: bytes) -> Iterator[str]:
        """Add bytes; yield the lines that are complete now, and remove them.

        Only a newline ends a line.
        """
        n_searched = len(self._content)
        self.add(chunk)
        while (end := self._content.find(b"\n", n_searched)) >= 0:
            line = self._content[:end].removesuffix(b"\r").decode("utf-8", "replace")
            del self._content[: end + 1]
            n_searched = 0
            yield line


class StreamReader:
    """Assembles a completion from the chunks of a streamed answer."""

    def __init__(self, exchange: Exchange, path: str) -> None:
        self._exchange = exchange
        self._path = path
        self._body = Body(exchange.url, path, math.inf)  # the reader of a stream may take any time
        self._is_complete = False
        self._first_token_s: float | None = None
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._has_gap = False

    def feed(self, response: Any, chunk: bytes) -> Iterator[Piece]:
        """Add bytes and yield the pieces that they complete."""
        if not response.is_success:
            self._body.add(chunk)  # for the error that `finish` raises
            return
        for line in self._body.lines(chunk):
            if line.strip() and not line.startswith(":"):  # a comment keeps the connection alive
                yield self._piece(line)

    def finish(self, response: Any) -> None:
        """Raise the error of a stream that failed or ended early."""
        if not response.is_success:
            raise self._exchange.rejection(response, self._body, self._path)
        if not self._is_complete:
            raise self._exchange.unreachable("the stream ended before its final piece")

    def _piece(self, line: str) -> Piece:
        exchange = self._exchange
        name, _, data = line.partition(": ")
        if name == "error":
            raise exchange.rejected(500, {"error": exchange.json(data)}, self._path)
        if name != "data":
            raise InvalidAnswer(f"{exchange.url} sent {line[:80]!r} in a stream of data lines")
        found = exchange.json(data)
        if isinstance(found, dict) and "error" in found:
            code = found["error"].get("code") if isinstance(found["error"], dict) else None
            raise exchange.rejected(code if isinstance(code, int) else 500, found, self._path)
        try:
            return self._read(found)
        except InvalidAnswer as error:
            raise InvalidAnswer(f"{exchange.url} streamed {self._path}: {error}") from None

    def _read(self, found: Any) -> Piece:
        if self._is_complete:
            raise InvalidAnswer("a piece came after the final one")
        content = calls.text(found, "content")
        self._texts.append(content)
        if found.get("stop") is True:
            self._is_complete = True
            seconds = self._body.seconds
            completion = replace(
                calls.read_completion(found),
                token_ids=TokenIds(self._ids),
                text="".join(self._texts),
                seconds=seconds,
                first_token_s=seconds if self._first_token_s is None else self._first_token_s,
            )
            return Piece(content, TokenIds(), completion)
        ids = calls.token_ids(found, "tokens") if found.get("tokens") else TokenIds()
        if self._first_token_s is None and ids:
            self._first_token_s = self._body.seconds
        # A stream omits the ids of tokens that end within a character. Ids that follow such a gap
        # do not continue the earlier ones, so they are dropped.
        n_predicted = calls.optional_integer(found, "tokens_predicted")
        self._has_gap |= n_predicted is not None and n_predicted != len(self._ids) + len(ids)
        if not self._has_gap:
            self._ids.extend(ids)
        return Piece(content, ids)


def _require_url(httpx: ModuleType, url: Any) -> Any:
    try:
        found = httpx.URL(url)
        is_server = found.scheme in {"http", "https"} and found.host
        is_port = found.port is None or 0 < found.port <= _MAX_PORT
    except (httpx.InvalidURL, TypeError, ValueError):
        # The error of httpx may repeat a part of a password.
        is_server = is_port = False
    if not is_server or not is_port:
        raise InvalidConfig(
            f"{without_password(url)} is not a server's URL; pass one such as http://127.0.0.1:8080"
        )
    return found


def _trusted(url: str, verify: Any) -> bool | ssl.SSLContext:
    if not isinstance(verify, bool | str | ssl.SSLContext):
        raise InvalidConfig(f"verify must be a bool, a file or an SSLContext, not {verify!r}")
    if isinstance(verify, str):
        try:
            return ssl.create_default_context(cafile=verify)
        except OSError as error:  # also for a file that is not a certificate
            raise InvalidConfig(f"verify: {verify!r} can't be used: {error}") from None
    # Plain HTTP has no certificates, and loading the system's takes 30 ms.
    return False if url.startswith("http://") else verify
