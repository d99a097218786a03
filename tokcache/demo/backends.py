"""The demo's backends: llama.cpp in this process, a llama-server, or tokenization alone."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tokcache.state.cache import PrefixStateCache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tokcache.llama.server import LlamaServer
    from tokcache.text.token_ids import TokenIds

BLOCK_TOKENS = 256

BackendName = Literal["inprocess", "server", "tokens"]


@dataclass(frozen=True, slots=True)
class Generation:
    """Greedy tokens after a prompt. Units: `n_decoded` counts tokens of the prompt."""

    token_ids: list[int]
    first_token_s: float
    seconds: float
    n_decoded: int


@dataclass(frozen=True, slots=True)
class Held:
    """The bytes of the stored states, where they are, and why some were not used."""

    n_bytes: int
    where: str
    refusals: Mapping[str, int]


class Runner(Protocol):
    """One side of the comparison: it generates the continuation of a prompt."""

    def generate(self, ids: TokenIds, n_tokens: int) -> Generation:
        """Return `n_tokens` greedy tokens, or fewer if the model ends the text."""


class CachingRunner(Runner, Protocol):
    """A runner that keeps states."""

    def forget(self) -> None:
        """Clear the states that the warm-up stored."""

    def held(self) -> Held:
        """Return the size of the stored states."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides of the comparison; `baseline` describes the plain one in words."""

    plain: Runner
    cached: CachingRunner
    baseline: str


def choose_backend(*, has_model: bool) -> tuple[BackendName, str]:
    """Return the best installed backend, and why a better one is not available."""
    can_have_model = has_model or find_spec("gguf") is not None
    if can_have_model and find_spec("llama_cpp"):
        return "inprocess", ""
    if can_have_model and find_spec("xllamacpp") and find_spec("httpx"):
        return "server", ""
    missing = "llama.cpp" if can_have_model else "gguf, which makes the demo's model,"
    return "tokens", f": {missing} is not installed; pip install 'tokcache[demo]' adds it"


@contextlib.contextmanager
def in_process(model: Path, tokenizer: Any, n_ctx: int, n_threads: int) -> Iterator[Sides]:
    """Yield two models in this process, equal except that one has a prefix cache."""
    # Spinning threads starve each other on busy machines. OpenMP reads this when llama_cpp is
    # imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from tokcache.llama import Llama  # noqa: PLC0415 (an extra)

    states = PrefixStateCache(
        ram_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4,
        max_entries=1000,
        block_tokens=BLOCK_TOKENS,
    )
    settings = {
        "tokenizer": tokenizer,
        "reproducible": True,
        "n_ctx": n_ctx,
        "n_threads": n_threads,
        "n_threads_batch": n_threads,
        "verbose": False,
    }
    with contextlib.ExitStack() as opened:
        plain = opened.enter_context(contextlib.closing(Llama(model, **settings)))
        cached = Llama(model, prefix_cache=states, **settings)
        opened.callback(cached.close)
        cached.wait_for_fingerprint()  # otherwise a large model's first prompts are not stored
        yield Sides(
            plain=_InProcess(plain),
            cached=_InProcessCached(cached, states),
            baseline="llama.cpp, which keeps its context from prompt to prompt",
        )


class _InProcess:
    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def generate(self, ids: TokenIds, n_tokens: int) -> Generation:
        started = perf_counter()
        first_token_s = 0.0
        produced: list[int] = []
        stream = self._llm.generate(ids.tolist(), temp=0.0)
        for token in stream:
            first_token_s = first_token_s or perf_counter() - started
            produced.append(token)
            if len(produced) == n_tokens or token == self._llm.token_eos():
                break
        stream.close()  # saves the state
        seconds = perf_counter() - started
        return Generation(produced, first_token_s, seconds, self._llm.last_reuse.n_decoded)


class _InProcessCached(_InProcess):
    def __init__(self, llm: Any, states: PrefixStateCache) -> None:
        super().__init__(llm)
        self._states = states

    def forget(self) -> None:
        self._states.clear()

    def held(self) -> Held:
        stats = self._states.stats()
        return Held(stats.n_bytes, "in memory", stats.refusals)


@contextlib.contextmanager
def served(model: Path, tokenizer: Any, n_ctx: int, n_threads: int) -> Iterator[Sides]:
    """Yield two slots of one llama-server: one erased before each prompt, one saved and restored.

    The second one is in reproducible mode, so both sides give the same results.
    """
    from tokcache.llama.server import LlamaServer, SlotSettings  # noqa: PLC0415 (an extra)
    from tokcache.samples.server_process import ServerProcess  # noqa: PLC0415 (an extra)

    settings = SlotSettings(
        reproducible=True, block_tokens=BLOCK_TOKENS, slot_ids=(1,), min_save_tokens=1
    )
    with (
        ServerProcess(
            model,
            n_ctx=n_ctx,
            n_slots=2,
            block_tokens=BLOCK_TOKENS,
            n_threads=n_threads,
            # A checkpoint ends a decode early. Then the pieces of the two sides would differ, and
            # with them the last bits of the results.
            overrides={"n_ctx_checkpoints": 0},
        ) as process,
        LlamaServer(process.url, tokenizer=tokenizer, slot_settings=settings) as server,
    ):
        yield Sides(
            plain=_EmptiedSlot(server, 0),
            cached=_SavedSlot(server),
            baseline="a llama-server slot that is erased before each prompt",
        )


class _EmptiedSlot:
    def __init__(self, server: LlamaServer, id_slot: int) -> None:
        self._server = server
        self._id_slot = id_slot

    def generate(self, ids: TokenIds, n_tokens: int) -> Generation:
        self._server.erase_slot(self._id_slot)
        found = self._server.completion(ids, n_predict=n_tokens, id_slot=self._id_slot)
        n_decoded = found.n_prompt - found.n_cached
        return Generation(found.token_ids.tolist(), found.first_token_s, found.seconds, n_decoded)


class _SavedSlot:
    def __init__(self, server: LlamaServer) -> None:
        self._server = server

    def generate(self, ids: TokenIds, n_tokens: int) -> Generation:
        started = perf_counter()
        reused = self._server.complete(ids, n_predict=n_tokens)
        seconds = perf_counter() - started
        token_ids = reused.completion.token_ids.tolist()
        return Generation(token_ids, reused.first_token_s, seconds, len(ids) - reused.n_restored)

    def forget(self) -> None:
        """Do nothing: the warm-up prompt is shorter than a block, so it was not saved."""

    def held(self) -> Held:
        stats = self._server.stats()
        return Held(stats.n_bytes, "in slot files", stats.refusals)
