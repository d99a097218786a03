"""One request to a llama-server and its answer, over a connection of its own.

llama-server closes the connection after each stream, although its headers offer to keep it (seen in
build 11549), so no connection is kept. Head and body of a request leave in one write, and the
answer is parsed in the callback that receives it, without a task or a queue in between. A request
takes 4 ms of processor time this way; with httpx it took 10.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from tokcache.errors import InvalidAnswer, ServerRefused, ServerTimeout, ServerUnreachable

if TYPE_CHECKING:
    import httptools

_CONNECT_S = 5.0
_MAX_HEAD_BYTES = 64 << 10
# Reading stops while more bytes of an answer than this have arrived that no client has taken.
_MAX_WAITING_BYTES = 256 << 10
_FIRST_FINAL_STATUS = 200


class Address:
    """Where a llama-server listens, parsed once.

    Errors: ServerRefused, ServerTimeout, ServerUnreachable from `send`.
    """

    def __init__(self, url: str, *, read_timeout_s: float) -> None:
        parts = urlsplit(url)
        self.url = url
        self._read_timeout_s = read_timeout_s
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path
        self._fields = (
            f" HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            "Accept-Encoding: identity\r\nContent-Length: "
        ).encode("ascii")

    async def send(
        self, method: str, path: str, body: bytes = b"", *, timeout_s: float | None = None
    ) -> Exchange:
        """Send a request and return the exchange once the status of its answer is known."""
        loop = asyncio.get_running_loop()
        exchange = Exchange(self.url, timeout_s or self._read_timeout_s)
        try:
            async with asyncio.timeout(_CONNECT_S):
                transport, _ = await loop.create_connection(
                    lambda: exchange, self._host, self._port, ssl=self._tls
                )
        except TimeoutError as error:
            raise ServerTimeout(f"{self.url} did not accept a connection in time") from error
        except OSError as error:
            raise ServerRefused(f"{self.url} is out of reach: {type(error).__name__}") from error
        target = f"{method} {self._prefix}{path}".encode("ascii")
        transport.write(b"%s%s%d\r\n\r\n%s" % (target, self._fields, len(body), body))
        try:
            await exchange.answered()
        except BaseException:
            exchange.close()
            raise
        return exchange


class Exchange(asyncio.Protocol):
    """A request that was sent, and its answer; the caller closes it.

    Errors: ServerUnreachable if the connection breaks, ServerTimeout if nothing arrives for
            `timeout_s`, InvalidAnswer for anything that is not HTTP.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        import httptools  # noqa: PLC0415 (an extra)

        self.status = 0
        self._url = url
        self._timeout_s = timeout_s
        self._parser: httptools.HttpResponseParser = httptools.HttpResponseParser(self)
        self._parser_errors = (httptools.HttpParserError, httptools.HttpParserUpgrade)
        self._transport: asyncio.Transport | None = None
        self._n_head_bytes = 0
        self._arrived: list[bytes] = []
        self._n_waiting = 0
        self._is_paused = False
        self._is_over = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        # One timer for the whole exchange, because one for each wait took a tenth of the time.
        self._waits_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def answered(self) -> None:
        """Wait for the status."""
        while not self.status:
            await self._more()

    async def read(self) -> bytes:
        """Return the next bytes of the answer, all that have arrived; nothing at its end."""
        while not self._arrived:
            if self._is_over:
                return b""
            await self._more()
        found = self._arrived[0] if len(self._arrived) == 1 else b"".join(self._arrived)
        self._arrived.clear()
        self._n_waiting = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return found

    def close(self) -> None:
        """Close the connection, which makes llama-server stop; closing twice does no harm."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    async def _more(self) -> None:
        """Wait until something arrives, or raise the error that ended the connection."""
        if self._error is not None:
            raise self._error
        loop = asyncio.get_running_loop()
        self._waits_since = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s, self._time_out)
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _time_out(self) -> None:
        self._timer = None
        if self._waiter is None:
            return
        loop = asyncio.get_running_loop()
        left_s = self._waits_since + self._timeout_s - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._time_out)
        else:
            self._fail(ServerTimeout(f"{self._url} did not answer in time"))

    def _fail(self, error: Exception) -> None:
        if self._error is None and not self._is_over:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- called by asyncio --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse a part of the answer."""
        if not self.status:
            self._n_head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except self._parser_errors as error:
            self._fail(InvalidAnswer(f"{self._url} did not answer in HTTP: {error}"))
            self.close()
            return
        if not self.status and self._n_head_bytes > _MAX_HEAD_BYTES:
            self._fail(InvalidAnswer(f"{self._url} sent headers without an end"))
            self.close()
        if self._n_waiting > _MAX_WAITING_BYTES and not self._is_paused and self._transport:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Record that no more arrives."""
        self._transport = None
        kind = type(error).__name__ if error else "it closed the connection"
        self._fail(ServerUnreachable(f"{self._url} is out of reach: {kind}"))

    # -- called by the parser -----------------------------------------------------------------

    def on_headers_complete(self) -> None:
        """Record the status, unless it is an interim one (1xx)."""
        status = self._parser.get_status_code()
        if status >= _FIRST_FINAL_STATUS and not self._is_over:
            self.status = status

    def on_body(self, data: bytes) -> None:
        """Keep a part of the body."""
        if not self._is_over:
            self._arrived.append(data)
            self._n_waiting += len(data)

    def on_message_complete(self) -> None:
        """Record that the answer is whole."""
        self._is_over = self.status > 0
