"""A real redis-server for tests: on a loopback port, in a folder, stopped at the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import pytest

_START_S = 20.0


def required_binary() -> str:
    """Return the path of redis-server; skip the test if it is not installed."""
    found = shutil.which("redis-server")
    if found is None:
        required = "REQUIRED: " if os.environ.get("TOKCACHE_REQUIRE_REDIS") else ""
        pytest.skip(
            f"{required}no redis-server is installed (Debian: apt-get install redis-server)"
        )
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class RedisServer:
    """A server that starts when it is constructed; `options` are lines of redis.conf."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        self._binary = required_binary()
        self.folder, self.options = folder, options
        folder.mkdir(exist_ok=True, parents=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._is_tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def client(self, **options: Any) -> Any:
        import redis  # noqa: PLC0415 (an extra)

        return redis.Redis(port=self.port, protocol=2, socket_timeout=10, **options)

    def start(self) -> None:
        lines = ["bind 127.0.0.1", 'save ""', "appendonly no", "rdbcompression no"]
        lines += [f"dir {self.folder}", f"{'tls-' if self._is_tls else ''}port {self.port}"]
        lines += ["port 0"] if self._is_tls else []
        config = self.folder / "redis.conf"
        config.write_text("\n".join([*lines, *self.options]) + "\n")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own arguments)
                [self._binary, str(config)], stdout=log, stderr=log
            )
        until = time.monotonic() + _START_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > until:
                raise AssertionError((self.folder / "log").read_text())
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def states(self) -> dict[str, dict[bytes, bytes]]:
        """Return the stored states: the fields of each hash by its key."""
        with self.client() as client:
            return {
                key.decode(): client.hgetall(key)
                for key in sorted(client.scan_iter(count=1000))
                if key.endswith((b":0", b":1"))
            }

    def all_bytes(self) -> bytes:
        """Return the uncompressed dump of the server: all keys and values."""
        with self.client() as client:
            client.save()
        return (self.folder / "dump.rdb").read_bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
