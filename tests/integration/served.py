"""Real llama-servers and both clients for tests, prompts for them, and the right answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

import pytest
from tokenizers import Tokenizer

from tokcache import TokenIds, samples

pytest.importorskip("xllamacpp", reason="needs tokcache[demo]")
pytest.importorskip("httpx", reason="needs tokcache[server]")

from bench import soak
from tokcache.llama.server import AsyncLlamaServer, Completion, LlamaServer, SlotSettings
from tokcache.samples.server_process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator
    from pathlib import Path

    from tokcache.llama.server import Piece, Reused

BLOCK = 64
N_CTX = 1024
N_PREDICT = 6


class Wrapped:
    """Has exactly the methods of a wrapped tokenizer that LlamaServer uses."""

    def __init__(self, path: Path) -> None:
        self._plain = Tokenizer.from_file(str(path))
        self.scopes: list[str | None] = []

    def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        self.scopes.append(scope)
        return TokenIds(self._plain.encode(text, add_special_tokens=add_special_tokens).ids)

    def unwrap(self) -> Tokenizer:
        return self._plain


def complete(server: LlamaServer, tokens: list[int], **settings: Any) -> Reused:
    """Complete and save, so that the next request finds the slot's file."""
    found = server.complete(tokens, **{"n_predict": N_PREDICT, **settings})
    server.flush(30)
    return found


def serve(folder: Path, *, port: int = 0, n_slots: int = 2, **settings: Any) -> ServerProcess:
    """Start a server that saves slots in `folder`."""
    model = settings.pop("model", None) or samples.tiny_model()
    return ServerProcess(
        model,
        n_ctx=settings.pop("n_ctx", N_CTX),
        n_slots=n_slots,
        block_tokens=BLOCK,
        n_threads=1,
        port=port,
        slot_folder=folder,
        overrides=settings,
    )


# A process of its own: ServerProcess passes on plain values only, and an adapter is an object.
_WITH_ADAPTER = """
import sys, xllamacpp
model, adapter, folder, port = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = model, ["127.0.0.1"], int(port)
params.n_ctx, params.n_parallel, params.kv_unified = 2048, 2, False
params.n_batch, params.n_ubatch = 64, 64
params.slot_save_path = folder and folder + "/"
params.endpoint_slots, params.cache_ram_mib = True, 0
params.fit_params, params.cache_idle_slots = False, False
params.ui, params.cpuparams.n_threads = False, 1
lora = xllamacpp.CommonAdapterLoraInfo()
lora.path, lora.scale = adapter, 1.0
params.lora_adapters = [lora]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def serve_with_adapter(
    folder: Path | str, model: Path | None = None, port: int = 0
) -> Iterator[str]:
    """Serve a model with one LoRA adapter at scale 1 on two slots; yield the server's url."""
    model = model or samples.tiny_model()
    command = [sys.executable, "-c", _WITH_ADAPTER, str(model), str(samples.tiny_lora(model))]
    with subprocess.Popen(  # noqa: S603 (fixed words)
        [*command, str(folder), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        if process.stdin is None or process.stdout is None:  # both are pipes; for the type checker
            raise RuntimeError("no pipes")
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def port_of(process: ServerProcess) -> int:
    return int(process.url.rpartition(":")[2])


def client(process: ServerProcess, **settings: Any) -> LlamaServer:
    """Return a client with these slot settings."""
    return LlamaServer(process.url, timeout_s=60, slot_settings=SlotSettings(**settings))


class InLoop:
    """Has the methods of LlamaServer, and performs them with an AsyncLlamaServer in a loop."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.inner = AsyncLlamaServer(url, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        try:
            self.wait(self.inner.__aenter__())
        except BaseException:
            self._end()
            raise

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)
        if not asyncio.iscoroutinefunction(method):
            return method
        return lambda *args, **settings: self.wait(method(*args, **settings))

    def __repr__(self) -> str:
        return repr(self.inner)

    def stream(self, *args: Any, **settings: Any) -> Generator[Piece]:
        async def following() -> Piece | None:
            return await anext(pieces, None)

        pieces = self.inner.stream(*args, **settings)
        try:
            while (piece := self.wait(following())) is not None:
                yield piece
        finally:
            self.wait(pieces.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._thread.is_alive():
            self.wait(self.inner.aclose())
            self._end()

    def _end(self) -> None:
        self.wait(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


# Runs a test on both clients: `connect(url, ...)` returns a client with the methods of LlamaServer.
both_clients = pytest.mark.parametrize(
    "connect", [LlamaServer, InLoop], ids=["LlamaServer", "AsyncLlamaServer"]
)
if TYPE_CHECKING:
    Connect = Callable[..., LlamaServer]


def async_client(process: ServerProcess, **settings: Any) -> AsyncLlamaServer:
    """Return a client for event loops with these slot settings."""
    return AsyncLlamaServer(process.url, timeout_s=60, slot_settings=SlotSettings(**settings))


def prompt(seed: int, n_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 2048) for _ in range(n_tokens)]


def uncached(server: LlamaServer, tokens: list[int], n_predict: int = N_PREDICT) -> Completion:
    """Return the server's answer without any reuse."""
    return server.completion(tokens, n_predict=n_predict, id_slot=0, n_probs=4, cache_prompt=False)


def is_right(given: Completion, expected: Completion) -> bool:
    """Return whether two greedy answers are equal up to a near tie of two tokens."""
    if len(given.token_ids) != len(expected.token_ids):
        return False
    found = soak.gap(given, expected)
    # None: they differ within an unfinished character, which no right answer here does.
    return found is not None and found <= soak.NEAR_TIE
