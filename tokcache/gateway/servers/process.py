"""Starts the llama-server of `tokcache serve MODEL.gguf`, and starts it again after a crash."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from tokcache.errors import InvalidConfig, ServerError
from tokcache.samples.server_process import ServerProcess

if TYPE_CHECKING:
    from tokcache.gateway.config import GatewayConfig

_STOP_S = 10.0
_LOOK_AGAIN_S = 0.1
_MAX_LOG_TAIL = 2_000


class ManagedServer:
    """One llama-server with the settings that reuse needs: xllamacpp's, or a given program.

    Each slot has its own KV stream, slots can be saved to `folder`, context checkpoints keep
    llama-server's default, and its cache in RAM is off: it knows no tenants, and the saved files do
    its work. All calls block; an event loop calls them in a thread.
    """

    def __init__(self, config: GatewayConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._port = 0
        self._server: ServerProcess | None = None
        self._program: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> str:
        """Start the server and return its URL, the same one after a crash."""
        self.stop()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidConfig(
                f"the folder {self._folder} for saved slots can't be made: {error.strerror}; name"
                " another with --folder"
            ) from None
        if self._config.llama_server:
            self._start_program()
        else:
            config = self._config
            self._server = ServerProcess(
                str(config.model),
                n_ctx=config.n_ctx,
                n_slots=config.n_slots,
                n_threads=config.n_threads or None,
                timeout_s=config.start_timeout_s,
                port=self._port,
                slot_folder=self._folder,
                overrides={"n_batch": 2048, "n_ubatch": 512, "endpoint_metrics": True},
            )
            self.url = self._server.url
        self._port = int(self.url.rpartition(":")[2])
        return self.url

    @property
    def pid(self) -> int | None:
        """The process id, None if it does not run."""
        if self._server is not None:
            return self._server.pid
        return self._program.pid if self._program is not None else None

    def is_running(self) -> bool:
        """Return whether the process is there."""
        if self._program is not None:
            return self._program.poll() is None
        return self._server is not None and self._server.is_running()

    def stop(self) -> None:
        """End the server; stopping twice does no harm."""
        if self._server is not None:
            self._server.close()
            self._server = None
        program, self._program = self._program, None
        if program is not None:
            program.terminate()
            try:
                program.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()

    def command(self) -> list[str]:
        """Return the command line of a given llama-server program."""
        config = self._config
        return [
            *(str(config.llama_server), "--model", str(config.model)),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--ctx-size", str(config.n_ctx * config.n_slots)),
            *("--parallel", str(config.n_slots), "--no-kv-unified", "--cache-ram", "0"),
            *("--slot-save-path", f"{self._folder}{os.sep}", "--slots", "--metrics"),
            *(("--threads", str(config.n_threads)) if config.n_threads else ()),
            *config.server_args,
        ]

    def _start_program(self) -> None:
        if not self._port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = int(probe.getsockname()[1])
        log_path = self._folder / "llama-server.log"
        try:
            with log_path.open("wb") as log:
                program = self._program = subprocess.Popen(  # noqa: S603 (the user named it)
                    self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        except OSError as error:
            raise ServerError(
                f"{self._config.llama_server} can't be started: {error.strerror}"
            ) from None
        self.url = f"http://127.0.0.1:{self._port}"
        deadline = time.monotonic() + self._config.start_timeout_s
        while time.monotonic() < deadline and program.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):  # noqa: S310
                    return
            except OSError:  # it does not listen yet, or is still loading
                pass
            time.sleep(_LOOK_AGAIN_S)
        is_over = program.poll() is not None
        self.stop()
        tail = log_path.read_text(encoding="utf-8", errors="replace")[-_MAX_LOG_TAIL:]
        raise ServerError(
            f"{self._config.llama_server} {'ended' if is_over else 'did not come up in time'};"
            f" the end of its log:\n{tail}"
        )
