"""Starts a llama-server (the xllamacpp package's) in a process that ends with its parent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import tokcache
from tokcache._validate import require_int
from tokcache.errors import MissingExtra, MissingFile, ServerError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

_STOP_S = 10.0
_LOG_TAIL = 5
_MAX_PORT = 65_535
_ERROR_LINE = re.compile(r"[\d.]+ E ")


class ServerProcess:
    """A running llama-server on a free port of 127.0.0.1.

    Prompts are decoded in pieces of `block_tokens`, so that a slot that was saved at a multiple of
    it and restored gives exactly the results of an uncached run. llama-server's cache in memory is
    off.

    Context checkpoints are on (32 per slot, the default of llama-server): without them it reuses
    nothing of a restored slot if the model has a sliding window or is recurrent or hybrid. With
    such a model it also ends a decode where it makes a checkpoint; for exact results
    (`SlotSettings(reproducible=True)`) start it with `overrides={"n_ctx_checkpoints": 0}`. Models
    with full attention have no checkpoints.

    `overrides` are xllamacpp's parameters by name ("cache_ram_mib", "cpuparams.n_threads"). A
    `slot_folder` that you pass is not removed with the server, so a later server can use its files;
    pass a `port` too if that server must have the same address.

    Units:  `n_ctx` is in tokens per slot.
    Errors: MissingFile; MissingExtra without xllamacpp; ServerError with the end of the server's
            log if it does not come up within `timeout_s`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        n_ctx: int = 4096,
        n_slots: int = 1,
        block_tokens: int = 256,
        n_threads: int | None = None,
        timeout_s: float = 120.0,
        port: int = 0,
        slot_folder: str | os.PathLike[str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        if not Path(model).is_file():
            raise MissingFile(f"no such model file: {os.fspath(model)}")
        for name, value in (("n_ctx", n_ctx), ("n_slots", n_slots), ("block_tokens", block_tokens)):
            require_int(name, value, minimum=1)
        require_int("port", port, 0, _MAX_PORT)
        self._files = contextlib.ExitStack()
        folder = self._files.enter_context(tempfile.TemporaryDirectory(prefix="tokcache-server-"))
        self.slot_folder = Path(folder, "slots") if slot_folder is None else Path(slot_folder)
        self.slot_folder.mkdir(mode=0o700, exist_ok=True)
        self.log_path = Path(folder, "log")
        self.block_tokens = block_tokens
        settings = _settings(str(model), self.slot_folder, n_ctx, n_slots, block_tokens)
        if n_threads is not None:
            settings["cpuparams.n_threads"] = require_int("n_threads", n_threads, minimum=1)
        settings |= {"port": port, **(overrides or {})}
        try:
            self._process = _start(self.log_path)
            self._files.callback(_stop, self._process)
            self.url = self._wait(settings, time.monotonic() + timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def is_running(self) -> bool:
        """Return whether the server's process is there."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the server at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the server and remove its temporary folder; closing twice does no harm."""
        self._files.close()

    def _wait(self, settings: dict[str, Any], deadline: float) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:  # never: both are pipes; for the type checker
            raise ServerError("the server has no pipes")
        with contextlib.suppress(BrokenPipeError):  # it died at once; its log says why
            stdin.write(json.dumps(settings).encode() + b"\n")
            stdin.flush()
        ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
        line = stdout.readline() if ready else b""
        if line:
            return str(json.loads(line)["url"])
        why = "ended" if ready else "did not come up in time"
        log = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in log if _ERROR_LINE.match(line)]
        tail = "\n".join((errors or log)[-_LOG_TAIL:])
        raise ServerError(f"llama-server {why}; the end of its log:\n{tail}")


def require_xllamacpp() -> Any:
    """Return the xllamacpp module, or raise MissingExtra."""
    try:
        import xllamacpp  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise MissingExtra(
            f"starting a llama-server needs xllamacpp ({error}): pip install 'tokcache[demo]'"
        ) from None
    return xllamacpp


def _settings(
    model: str, slot_folder: Path, n_ctx: int, n_slots: int, block_tokens: int
) -> dict[str, Any]:
    return {
        "model.path": model,
        "hostnames": ["127.0.0.1"],
        "port": 0,
        # Each slot gets its own KV stream: in a shared one the last bits of the results depend on
        # the cells that other slots occupy.
        "n_ctx": n_ctx * n_slots,
        "n_parallel": n_slots,
        "kv_unified": False,
        "n_batch": block_tokens,
        "n_ubatch": block_tokens,
        "slot_save_path": f"{slot_folder}{os.sep}",
        "endpoint_slots": True,
        "cache_ram_mib": 0,
        "cache_idle_slots": False,
        "fit_params": False,
        "ui": False,
    }


def _start(log_path: Path) -> subprocess.Popen[bytes]:
    root = str(Path(tokcache.__file__).parents[1])
    environment = dict(os.environ)
    # OpenMP threads spin while they wait for each other: if other processes need the same cores, a
    # prefill takes a hundred times as long.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with log_path.open("wb") as log:
        return subprocess.Popen(
            # -P: a module in the current folder must not stand in for a library.
            [sys.executable, "-P", "-m", "tokcache.samples.server_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve() -> None:
    """Run a server with the settings on the first line of stdin until stdin ends."""
    settings = json.loads(sys.stdin.buffer.readline())
    # The parent's end of the pipe closes when the parent dies, however it dies.
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    xllamacpp = require_xllamacpp()
    params = xllamacpp.CommonParams()
    for name, value in settings.items():
        *path, last = name.split(".")
        part = params
        for step in path:
            part = getattr(part, step)
        setattr(part, last, value)
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)  # a normal exit needs stdin's lock, which the reading thread holds
    sys.stdout.write(json.dumps({"url": server.listening_address}) + "\n")
    sys.stdout.flush()
    threading.Event().wait()


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
