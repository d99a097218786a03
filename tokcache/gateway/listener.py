"""Listens for clients: binds the socket, and limits what they send before a request is known.

The application limits bodies. A head is limited here, by size and by time, because uvicorn with
httptools has no limit of its own and no key is known before its end.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tokcache.errors import TokcacheError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tokcache.gateway.config import GatewayConfig
    from tokcache.gateway.service import Service

MAX_HEAD_BYTES = 64 << 10
# Each request takes two connections, and a process often has 1,024 files at most.
MAX_CONNECTIONS = 400
# A client that reads nothing of its answer for so long loses its connection, and its slot is free.
_STALLED_S = 60.0
# Framing of chunks: at most six bytes a byte of the body.
_FRAMING = 7
_BACKLOG = 512
_TOO_LARGE, _TOO_SLOW = 431, 408


def bind(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on all addresses of a host.

    Clients that connect before the server runs wait.

    Errors: TokcacheError in one line.
    """
    made: list[socket.socket] = []
    try:
        flags = socket.AI_PASSIVE
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            made.append(socket.socket(family, kind, protocol))
            made[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # All addresses of a host get one port, also if any free port was asked for.
            made[-1].bind((address[0], port or _port(made), *address[2:]))
            made[-1].listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        for each in made:
            each.close()
        raise TokcacheError(f"can't listen on {host}:{port}; is it in use? ({error})") from None
    return made


def _port(made: list[socket.socket]) -> int:
    return int(made[0].getsockname()[1]) if len(made) > 1 else 0


class Server(uvicorn.Server):
    """uvicorn's server, which begins the drain of the service as soon as it shuts down."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, and wait for those under way."""
        self._service.begin_drain()
        await super().shutdown(sockets)


def server(app: ASGIApp, service: Service, config: GatewayConfig) -> Server:
    """Return the server of an application."""
    limited = type("_Limited", (_LimitedProtocol,), {"head_timeout_s": config.body_timeout_s})
    return Server(
        uvicorn.Config(
            app,
            http=limited,
            ssl_certfile=config.tls_certfile,
            ssl_keyfile=config.tls_keyfile,
            timeout_graceful_shutdown=math.ceil(config.drain_timeout_s),
            limit_concurrency=MAX_CONNECTIONS,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            # An address in a header would be believed from everybody.
            proxy_headers=False,
        ),
        service,
    )


class _LimitedProtocol(HttpToolsProtocol):
    """A connection whose heads, trailers and framing have a limited size and take limited time."""

    head_timeout_s = 30.0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._n_raw = self._n_body = 0
        self._refusal = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        if len(self.connections) > 2 * MAX_CONNECTIONS:
            transport.abort()
            return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_waiting()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse a part of a request, and refuse it if it is larger than its body explains."""
        self._n_raw += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            self._stop_waiting()
        elif self._n_raw - _FRAMING * self._n_body > MAX_HEAD_BYTES:
            self._refuse(_TOO_LARGE)
        elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_head()

    def pause_writing(self) -> None:
        """Begin to watch whether the client reads its answer."""
        super().pause_writing()
        self._watch_reader(-1)

    def resume_writing(self) -> None:
        """Stop watching."""
        self._stop_stall_timer()
        super().resume_writing()

    def _watch_reader(self, n_waiting: int) -> None:
        """Close the connection if as many bytes wait as `_STALLED_S` ago."""
        n_now = self.transport.get_write_buffer_size()
        if n_now == n_waiting:
            self.transport.abort()
        else:
            self._stall_timer = self.loop.call_later(_STALLED_S, self._watch_reader, n_now)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def on_message_begin(self) -> None:
        """Count for the next request."""
        self._n_raw = self._n_body = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin the request, or raise an error, which makes the parser stop."""
        if len(self.url) + sum(len(n) + len(v) for n, v in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _TOO_LARGE
            raise ValueError
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count and take a part of the body."""
        self._n_body += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP, or whose head was refused."""
        if self._refusal:
            self._refuse(self._refusal)
        else:
            super().send_400_response(msg)

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self._time_out)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        self._refuse(_TOO_SLOW)

    def _refuse(self, status: int) -> None:
        """Answer with an error and close, unless an answer has begun; then only close."""
        told = {
            _TOO_LARGE: f"the head of the request is larger than {MAX_HEAD_BYTES:,} bytes",
            _TOO_SLOW: f"the request did not arrive within {self.head_timeout_s:g} s",
        }[status]
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:
            kind = {"message": told, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": kind}).encode()
            head = (
                f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\nconnection: close\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
