"""Systems that answer prompts with states kept from earlier ones, each in its own process.

A system is created by name in its process; prompts and answers go through a pipe. `restart` ends
the process in an orderly way and starts a new one.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import llama_cpp
import numpy as np

from tokcache import TokenIds
from tokcache._prefix import n_common
from tokcache.llama import Llama
from tokcache.llama.server import LlamaServer
from tokcache.samples.server_process import ServerProcess, require_xllamacpp
from tokcache.state.cache import PrefixStateCache

BLOCK, N_CTX, N_ANSWER = 256, 8192, 8
ROOM_BYTES = 4 << 30
PREFIX = "prefix.json"
_START_S = 120.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one prompt; times are seconds since the prompt, `n_prefilled` its tokens."""

    token_ids: list[int]
    first_token_s: float
    whole_s: float
    n_prefilled: int


@dataclass(frozen=True, slots=True)
class Setting:
    """The settings of a system; `folder` belongs to the system and outlives its process."""

    model: str
    n_threads: int
    folder: str
    redis_url: str


class System(Protocol):
    """A system to measure."""

    def ask(self, prompt: list[int]) -> Answer:
        """Answer a prompt."""

    def close(self) -> None:
        """Finish pending writes, and end."""


class InProcess:
    """A llama_cpp.Llama that counts the tokens it decodes."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._n_decoded = 0
        evaluate = llm.eval

        def counted(tokens: Any) -> None:
            self._n_decoded += len(tokens)
            evaluate(tokens)

        llm.eval = counted

    def ask(self, prompt: list[int]) -> Answer:
        """Answer a prompt."""
        first: list[tuple[float, int]] = []

        def note(_ids: Any, _logits: Any) -> bool:
            first.append((perf_counter() - began, self._n_decoded))
            return False

        self._n_decoded = 0
        criteria = llama_cpp.StoppingCriteriaList([note])
        began = perf_counter()
        self.llm.create_completion(
            prompt, max_tokens=N_ANSWER, temperature=0.0, stopping_criteria=criteria
        )
        whole_s = perf_counter() - began
        answer = self.llm.input_ids[len(prompt) : self.llm.n_tokens].tolist()
        return Answer(answer, first[0][0], whole_s, first[0][1])

    def close(self) -> None:
        """End."""
        self.llm.close()


class NothingKept(InProcess):
    """Decodes every prompt as a whole; its answers are those that others are compared with."""

    def ask(self, prompt: list[int]) -> Answer:
        """Answer a prompt."""
        self.llm.reset()
        return super().ask(prompt)


class UnseenAlone(InProcess):
    """Puts the seen tokens into the context before the clock starts: the ideal cache."""

    def __init__(self, llm: Any) -> None:
        super().__init__(llm)
        self._states: list[tuple[TokenIds, Any]] = []

    def ask(self, prompt: list[int]) -> Answer:
        """Answer a prompt."""
        ids = TokenIds(prompt)
        if self._states:
            _, state = max(self._states, key=lambda held: n_common(held[0], ids))
            self.llm.load_state(state)
        answer = super().ask(prompt)
        state = self.llm.save_state()
        state.scores = np.zeros((1, 1), np.float32)  # not read, and the largest part of it
        held = self.llm.input_ids[: self.llm.n_tokens].tolist()
        self._states.append((TokenIds(held), state))
        return answer


class QuietDiskCache(llama_cpp.LlamaDiskCache):  # type: ignore[misc]
    """LlamaDiskCache without the lines that it prints at each step."""

    def __setitem__(self, key: Any, value: Any) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            super().__setitem__(key, value)


class Tokcache(InProcess):
    """tokcache.llama.Llama over the given tiers."""

    def __init__(self, setting: Setting, *, reproducible: bool, **tiers: Any) -> None:
        self.cache = PrefixStateCache(
            ram_bytes=ROOM_BYTES, max_entries=1000, block_tokens=BLOCK, **tiers
        )
        llm = Llama(
            setting.model,
            prefix_cache=self.cache,
            reproducible=reproducible,
            **llama_settings(setting),
        )
        llm.wait_for_fingerprint()
        super().__init__(llm)

    def close(self) -> None:
        """Finish pending writes, and end."""
        super().close()
        self.cache.close()


class Prewarmed(Tokcache):
    """tokcache with a folder of states; the prefix in `folder` is warmed at the start."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, reproducible=False, disk=Path(setting.folder, "states"))
        prefix = json.loads(Path(setting.folder, PREFIX).read_text())
        (result,) = self.llm.prewarm([prefix])
        if result.refusal is not None:
            raise RuntimeError(f"the prefix was refused: {result.refusal}")


class Server:
    """A llama-server with one slot, which keeps prompts in its --cache-ram."""

    def __init__(self, setting: Setting) -> None:
        self._process = ServerProcess(
            setting.model,
            n_ctx=N_CTX,
            block_tokens=BLOCK,
            n_threads=setting.n_threads,
            overrides={"cache_ram_mib": ROOM_BYTES >> 20},
        )
        self._client = LlamaServer(self._process.url, retries=5)

    def ask(self, prompt: list[int]) -> Answer:
        """Answer a prompt."""
        began = perf_counter()
        found = self._client.completion(TokenIds(prompt), n_predict=N_ANSWER)
        whole_s = perf_counter() - began
        n_prefilled = len(prompt) - found.n_cached
        return Answer(list(found.token_ids)[:-1], found.first_token_s, whole_s, n_prefilled)

    def close(self) -> None:
        """End."""
        self._client.close()
        self._process.close()


def llama_settings(setting: Setting) -> dict[str, Any]:
    """Return the arguments of every llama_cpp.Llama; n_batch is left at its default."""
    return {
        "n_ctx": N_CTX,
        "n_threads": setting.n_threads,
        "n_threads_batch": setting.n_threads,
        "verbose": False,
    }


def _with_cache(setting: Setting, cache: Any) -> InProcess:
    llm = _plain(setting)
    llm.set_cache(cache)
    return InProcess(llm)


def _plain(setting: Setting, **settings: Any) -> Any:
    return llama_cpp.Llama(setting.model, **{**llama_settings(setting), **settings})


def _disk(setting: Setting) -> str:
    return f"{setting.folder}/states"


PREWARMED = "tokcache disk, pre-warmed"
SYSTEMS: dict[str, Callable[[Setting], System]] = {
    # In pieces of 256, as in reproducible mode.
    "nothing kept": lambda s: NothingKept(_plain(s, n_batch=BLOCK)),
    "unseen alone": lambda s: UnseenAlone(_plain(s)),
    "llama_cpp.Llama": lambda s: InProcess(_plain(s)),
    "LlamaRAMCache": lambda s: _with_cache(s, llama_cpp.LlamaRAMCache(ROOM_BYTES)),
    "LlamaDiskCache": lambda s: _with_cache(s, QuietDiskCache(_disk(s), ROOM_BYTES)),
    "llama-server": Server,
    "tokcache RAM": lambda s: Tokcache(s, reproducible=False),
    "tokcache RAM, reproducible": lambda s: Tokcache(s, reproducible=True),
    "tokcache disk": lambda s: Tokcache(s, reproducible=False, disk=_disk(s)),
    "tokcache disk, reproducible": lambda s: Tokcache(s, reproducible=True, disk=_disk(s)),
    "tokcache Redis": lambda s: Tokcache(s, reproducible=False, redis=s.redis_url),
    "tokcache Redis, reproducible": lambda s: Tokcache(s, reproducible=True, redis=s.redis_url),
}


class Worker:
    """A system in its own process."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self._setting = name, setting
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self.name, self._setting, theirs), daemon=False
        )
        self._process.start()
        theirs.close()
        if not self._pipe.poll(_START_S):
            raise RuntimeError(f"{self.name} did not start within {_START_S:.0f} s")
        self._pipe.recv()

    def ask(self, prompt: list[int]) -> Answer:
        """Answer a prompt."""
        self._pipe.send(prompt)
        answer: Answer = self._pipe.recv()
        return answer

    def restart(self) -> None:
        """End the process and start another one."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the process after its pending writes."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join()
        self._pipe.close()


def _serve(name: str, setting: Setting, pipe: Connection) -> None:
    # Threads that spin while they wait for each other take time from the other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # One-time work (digest of the model file, connections, first pages) must count for no prompt;
    # of the system that warms up itself, the first prompt is measured.
    system = Prewarmed(setting) if name == PREWARMED else SYSTEMS[name](setting)
    if name != PREWARMED:
        system.ask(random.Random(os.getpid()).choices(range(3, 2000), k=2 * BLOCK))
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while (prompt := pipe.recv()) is not None:
            pipe.send(system.ask(prompt))
    system.close()


def why_without(name: str) -> str | None:
    """Return why a system can't be measured here, None if it can."""
    if name == "llama-server":
        try:
            require_xllamacpp()
        except Exception as error:  # noqa: BLE001  (any error is reported)
            return str(error)
    if "Redis" in name:
        if "redis" not in inspect.signature(PrefixStateCache).parameters:
            return "this tokcache has no Redis tier"
        if not (shutil.which("redis-server") or shutil.which("valkey-server")):
            return "there is no redis-server"
    return None


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """Run a redis-server that writes nothing to the disk; yield its URL."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise RuntimeError("there is no redis-server")
    with tempfile.TemporaryDirectory(prefix="tokcache-bench-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": folder}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen([program, *words], stdout=log)  # noqa: S603 (our own words)
        try:
            _wait_for(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait()


def _wait_for(port: int) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError("redis-server did not start within 10 s")
