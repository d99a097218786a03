"""Link: commands to a Redis server or a cluster, answered in time or not at all.

The one file that imports redis-py, which brings connections, TLS, authentication, the protocol
and the map of a cluster. Its time-out bounds each read from a socket, and a server that sends a
byte now and then never exceeds it: here, a call has to end at a point in time.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tokcache.errors import InvalidConfig, LinkFailed, MissingExtra
from tokcache.state.tiers.redis.commands import Command, Refused

try:
    import redis.exceptions as errors
    from redis.backoff import NoBackoff
    from redis.cluster import RedisCluster
    from redis.connection import (
        Connection,
        ConnectionPool,
        SSLConnection,
        UnixDomainSocketConnection,
        parse_url,
    )
    from redis.retry import Retry
except ImportError as error:
    raise MissingExtra(
        f"the Redis tier needs redis-py ({error}): pip install 'tokcache[redis]'"
    ) from error

_log = logging.getLogger("tokcache")

_PAGE = 1000  # keys that one SCAN looks at
_LINE, _LONGEST_LINE = 32, 4096  # bytes read for a reply's first line, and its greatest length
_LARGEST_REPLY = 1 << 30  # bytes; a server's own limit is half of that
_MAX_CONNECTIONS = 1 << 20  # each thread that asks has one
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (errors.AuthenticationError, "auth"),
    (errors.NoPermissionError, "permission"),
    (errors.BusyLoadingError, "loading"),
    (errors.ReadOnlyError, "read_only"),
    (errors.OutOfMemoryError, "full"),
    (errors.ClusterDownError, "cluster_down"),
    (errors.RedisClusterException, "cluster_down"),
    (errors.AskError, "moved"),
    (errors.TryAgainError, "moved"),
    (errors.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (errors.ConnectionError, "unreachable"),
    (OSError, "unreachable"),
)
_CODES = {
    "OOM": "full",
    "READONLY": "read_only",
    "MISCONF": "not_persisting",
    "NOREPLICAS": "no_replicas",
    "NOPERM": "permission",
    "NOAUTH": "auth",
    "LOADING": "loading",
    "WRONGTYPE": "wrong_type",
    "BUSY": "busy",
    "MOVED": "moved",
    "ASK": "moved",
    "TRYAGAIN": "moved",
    "CLUSTERDOWN": "cluster_down",
    "MASTERDOWN": "cluster_down",
}
_CODE = re.compile(rf"\b({'|'.join(_CODES)})\b")
_DOWN = {"auth", "loading", "cluster_down", "busy"}  # such a server can't serve any command now


class _Call(threading.local):
    """The time at which the call of this thread has to end."""

    until = float("inf")


_call = _Call()


@contextmanager
def _ending(until: float) -> Iterator[None]:
    before, _call.until = _call.until, until
    try:
        yield
    finally:
        _call.until = before


def _left_s() -> float:
    left = _call.until - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time of this call is over")
    return left


class _TimedSocket:
    """A socket whose reads and writes end at the deadline of the thread's call."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        self._timeout: float | None = None

    def settimeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def _timed(self) -> Any:
        left = _left_s()
        self._socket.settimeout(left if self._timeout is None else min(left, self._timeout))
        return self._socket

    def recv(self, *args: int) -> Any:
        return self._timed().recv(*args)

    def recv_into(self, *args: Any) -> Any:
        return self._timed().recv_into(*args)

    def sendall(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left.nbytes:
            left = left[self._timed().send(left) :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class _Payloads:
    """Replies of known lengths, received straight into their buffers.

    redis-py's parser copies a payload three times before it has it: 8 MiB took 9 ms, not 4.
    """

    def __init__(self, sock: _TimedSocket) -> None:
        self._socket = sock
        self._ahead = b""

    def read(self, room: memoryview) -> Any:
        """Fill `room` and return how many bytes came; None or Refused if there are none.

        Errors: LinkFailed where that is not such a reply.
        """
        line = self._line()
        if line == b"$-1":
            return None
        if line.startswith(b"-"):
            return _refused(errors.ResponseError(line[1:].decode("utf-8", "replace")))
        length = line[1:]
        if line[:1] != b"$" or not length.isdigit() or int(length) > _LARGEST_REPLY:
            raise LinkFailed("garbage")
        n_bytes = int(length)
        if n_bytes == room.nbytes:
            self._fill(room)
        else:  # a reply of another length is read and dropped
            scratch = memoryview(bytearray(min(n_bytes, 1 << 16)))
            for done in range(0, n_bytes, 1 << 16):
                self._fill(scratch[: n_bytes - done])
        if self._line() != b"":
            raise LinkFailed("garbage")
        return n_bytes

    def _line(self) -> bytes:
        while (end := self._ahead.find(b"\r\n")) < 0:
            if len(self._ahead) > _LONGEST_LINE:
                raise LinkFailed("garbage")
            self._ahead += self._received(self._socket.recv(_LINE))
        line, self._ahead = self._ahead[:end], self._ahead[end + 2 :]
        return line

    def _fill(self, room: memoryview) -> None:
        known = self._ahead[: room.nbytes]
        room[: len(known)], self._ahead = known, self._ahead[len(known) :]
        left = room[len(known) :]
        while left.nbytes:
            left = left[self._received(self._socket.recv_into(left)) :]

    def _received(self, data: Any) -> Any:
        if not data:
            raise ConnectionResetError("the server closed the connection")
        return data

    @property
    def is_at_end(self) -> bool:
        """Whether no more bytes came than were asked for."""
        return not self._ahead


def _connected(connection: Any, connect: Callable[[], Any]) -> Any:
    connection.socket_connect_timeout = _left_s()
    connection.timed_socket = _TimedSocket(connect())
    return connection.timed_socket


class _TimedConnection(Connection):
    def _connect(self) -> Any:
        return _connected(self, super()._connect)


class _TimedTls(SSLConnection):
    def _connect(self) -> Any:
        return _connected(self, super()._connect)


class _TimedUnix(UnixDomainSocketConnection):
    def _connect(self) -> Any:
        return _connected(self, super()._connect)


_TIMED: dict[type, type] = {
    Connection: _TimedConnection,
    SSLConnection: _TimedTls,
    UnixDomainSocketConnection: _TimedUnix,
}


class _Pool(ConnectionPool):
    """Connections that keep to the deadline of a call, and never try twice."""

    def __init__(self, connection_class: type = Connection, **options: Any) -> None:
        options |= {"protocol": 2, "decode_responses": False, "health_check_interval": 0}
        options |= {"retry": Retry(NoBackoff(), 0), "retry_on_timeout": False}
        options.setdefault("max_connections", _MAX_CONNECTIONS)
        super().__init__(connection_class=_TIMED[connection_class], **options)


class Link:
    """A server, or all nodes of a cluster, by URL.

    Units:  `until` on the monotonic clock, `timeout_s` seconds.
    Errors: InvalidConfig for a malformed URL; LinkFailed where a call got no answer.
    Threads: safe. A forked child has to `forget` its parent's connections.
    """

    def __init__(self, url: str, timeout_s: float, *, is_cluster: bool) -> None:
        self.place, self.has_password = _checked(url, is_cluster=is_cluster)
        self._url = re.sub(r"(?<=[?&])protocol=[^&]*", "", url)  # ours is RESP2
        self._timeout_s, self._is_cluster = timeout_s, is_cluster
        self.forget()

    def forget(self) -> None:
        """Start without connections; present ones are not touched."""
        self._lock = threading.Lock()
        self._cluster: Any = None
        self._is_stale = False
        self._pool = _Pool.from_url(self._url, socket_timeout=self._timeout_s)

    def close(self) -> None:
        """Close all connections."""
        self._pool.disconnect()
        with self._lock:
            cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close()

    # Asking

    def ask(self, commands: Sequence[Command], until: float) -> list[Any]:
        """Send all commands at once and return a reply to each, bytes as they came.

        Errors: LinkFailed; a command that the server refuses has Refused for a reply.
        """
        with self._failing(until):
            if not self._is_cluster:
                return _exchange(self._pool, commands)
            return self._ask_nodes(commands)

    def fill(
        self, commands: Sequence[Command], rooms: Sequence[memoryview], until: float
    ) -> list[Any]:
        """Send commands for one key and receive each reply in its room; return their lengths.

        A reply of another length is dropped; None and Refused are replies without a length.

        Errors: LinkFailed.
        """
        with self._failing(until):
            pool = self._node_pool(commands[0]) if self._is_cluster else self._pool
            replies = _fill(pool, commands, rooms)
            self._is_stale |= Refused("moved") in replies
            return replies

    def scan(self, pattern: str) -> Iterator[list[bytes]]:
        """Yield the keys that match, page by page, from every server; each page has its time.

        Errors: LinkFailed.
        """
        with self._failing(time.monotonic() + self._timeout_s):
            pools = [self._pool]
            if self._is_cluster:
                nodes = self._nodes()
                pools = [
                    nodes.get_redis_connection(each).connection_pool
                    for each in nodes.get_primaries()
                ]
        for pool in pools:
            cursor, seen = b"0", set[bytes]()
            while cursor not in seen:
                seen.add(cursor)
                command = ("SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE)
                with self._failing(time.monotonic() + self._timeout_s):
                    (reply,) = _exchange(pool, [command])
                    if isinstance(reply, Refused):
                        raise LinkFailed(reply.reason)
                    cursor, keys = reply
                    if not all(isinstance(each, bytes) for each in (cursor, *keys)):
                        raise LinkFailed("garbage")
                yield list(keys)
                if cursor == b"0":
                    break

    @contextmanager
    def _failing(self, until: float) -> Iterator[None]:
        try:
            with _ending(until):
                yield
        except LinkFailed:
            self._is_stale = True
            raise
        except Exception as error:
            # Any class: redis-py's parser raises all kinds of errors over other protocols.
            _log.debug("the Redis at %s failed", self.place, exc_info=error)
            self._is_stale = True
            raise LinkFailed(_reason(error)) from error

    # Clusters

    def _nodes(self) -> Any:
        """Return the map of the cluster, made again after a failure or a move."""
        if not self._lock.acquire(timeout=_left_s()):
            raise TimeoutError("another thread waits for the map of the cluster")
        try:
            if self._cluster is None:
                self._cluster = RedisCluster.from_url(
                    self._url,
                    connection_pool_class=_Pool,
                    protocol=2,
                    socket_timeout=self._timeout_s,
                    require_full_coverage=False,
                )
            elif self._is_stale:
                # At most half of the time that is left; if that fails the old map is used.
                self._is_stale = False
                try:
                    with _ending(time.monotonic() + _left_s() / 2):
                        self._cluster.nodes_manager.initialize()
                except Exception as error:  # noqa: BLE001  (of any class; the next call tries again)
                    message = "the map of the cluster at %s could not be made"
                    _log.debug(message, self.place, exc_info=error)
                    self._is_stale = True
            return self._cluster
        finally:
            self._lock.release()

    def _ask_nodes(self, commands: Sequence[Command]) -> list[Any]:
        places: dict[Any, list[int]] = defaultdict(list)
        for place, command in enumerate(commands):
            places[self._node_pool(command)].append(place)
        replies: list[Any] = [None] * len(commands)
        with ExitStack() as stack:  # all are asked before the first answers
            asked = [
                (stack.enter_context(_sent(pool, [commands[place] for place in own])), own)
                for pool, own in places.items()
            ]
            for connection, own in asked:
                for place in own:
                    replies[place] = _reply(connection.read_response)
        self._is_stale |= Refused("moved") in replies
        return replies

    def _node_pool(self, command: Command) -> Any:
        nodes = self._nodes()
        node = nodes.get_node_from_key(_key(command))
        return nodes.get_redis_connection(node).connection_pool


def _checked(url: str, *, is_cluster: bool) -> tuple[str, bool]:
    """Return the address in a URL, without its secrets, and whether it has a password.

    Errors: InvalidConfig.
    """
    # redis-py's own errors are not quoted: they may repeat a part of the password.
    try:
        options = parse_url(url)  # type: ignore[no-untyped-call]
        pool = _Pool.from_url(url)
        pool.connection_class(**pool.connection_kwargs)
    except Exception:  # noqa: BLE001  (an unknown option is a TypeError, others are ValueErrors)
        raise InvalidConfig(
            "the URL of a Redis must be redis://[[user]:[password]@]host[:port][/db], rediss://… "
            "(TLS) or unix://[[user]:[password]@]/path, with redis-py's options after a '?'; "
            "percent-encode special characters in a password"
        ) from None
    if is_cluster and ("path" in options or options.get("db", 0) != 0):
        raise InvalidConfig(
            "a cluster has no Unix sockets, and no databases other than 0; name a host"
        )
    has_password = bool(options.get("password"))
    if "path" in options:
        return str(options["path"]), has_password
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}", has_password


def _key(command: Command) -> Any:
    return command[3] if command[0] == "EVAL" else command[1]


@contextmanager
def _sent(pool: Any, commands: Sequence[Command]) -> Iterator[Any]:
    connection = pool.get_connection()
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        yield connection
    except BaseException:
        connection.disconnect()  # late replies must not be taken for those of another call
        raise
    finally:
        pool.release(connection)


def _exchange(pool: Any, commands: Sequence[Command]) -> list[Any]:
    with _sent(pool, commands) as connection:
        return [_reply(connection.read_response) for _ in commands]


def _fill(pool: Any, commands: Sequence[Command], rooms: Sequence[memoryview]) -> list[Any]:
    with _sent(pool, commands) as connection:
        payloads = _Payloads(connection.timed_socket)
        replies = [payloads.read(room) for room in rooms]
        if not payloads.is_at_end:
            raise LinkFailed("garbage")
        return replies


def _reply(read: Callable[..., Any]) -> Any:
    try:
        return read(disable_decoding=True)
    except errors.ResponseError as error:
        return _refused(error)


def _refused(error: errors.ResponseError) -> Refused:
    reason = _reason(error)
    if reason in _DOWN:
        raise LinkFailed(reason) from error
    return Refused(reason)


def _reason(error: BaseException) -> str:
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, errors.ResponseError):
        code = _CODE.search(str(error))
        return _CODES[code[1]] if code else "server_error"
    return "garbage"
