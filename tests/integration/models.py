"""Tiny models in llama.cpp, and helpers for tests of their contexts."""

from __future__ import annotations

import ctypes
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tokcache import samples

llama_cpp = pytest.importorskip("llama_cpp", reason="needs tokcache[llama]")
pytest.importorskip("gguf", reason="tiny models need tokcache[demo]")

from tokcache.llama import Llama  # noqa: E402
from tokcache.state.cache import PrefixStateCache  # noqa: E402

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32
# A short answer, always the most likely token.
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
# One thread: tiny models gain nothing from more, and two on a busy core wait for each other.
SETTINGS: dict[str, Any] = {"n_ctx": 1024, "n_batch": 512, "n_threads": 1, "n_threads_batch": 1}


def store(**settings: Any) -> PrefixStateCache:
    return PrefixStateCache(**{"max_entries": 1000, "block_tokens": BLOCK, **settings})


def llama(cache: PrefixStateCache | None = None, **settings: Any) -> Any:
    """Return a Llama with the block length of `store()`, with a cache or without."""
    model = settings.pop("model", None) or samples.tiny_model()
    llm = Llama(model, prefix_cache=cache, **{"verbose": False, **SETTINGS, **settings})
    if cache is None:
        llm.block_tokens = BLOCK
    return llm


def plain(**settings: Any) -> Any:
    """Return a plain llama_cpp.Llama."""
    model = settings.pop("model", None) or samples.tiny_model()
    return llama_cpp.Llama(str(model), **{"verbose": False, **SETTINGS, **settings})


def keep_logits(llm: Any) -> None:
    """Let eval keep the logits of every position it decodes (a Llama made with logits_all is not
    cached, and that is another test)."""
    llm._logits_all = True
    llm.scores = np.zeros((llm.n_ctx(), llm.n_vocab()), np.float32)


def text(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


def random_prompts(n: int, n_vocab: int, seed: int = 0) -> list[list[int]]:
    """Return token prompts that branch off one another at random places."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(n):
        is_branch = prompts and rng.random() < 0.95
        parent = rng.choice([prompts[-1], rng.choice(prompts)]) if is_branch else []
        kept = parent[: rng.randint(len(parent) // 2, len(parent))]
        fresh = rng.choices(range(3, n_vocab), k=rng.choice([1, 7, 31, 32, 33, 90, 150]))
        prompts.append((kept + fresh)[:400])
    return prompts


def decode_embeddings(llm: Any, rows: NDArray[np.float32]) -> None:
    """Write positions without tokens into sequence 0, as a handler does with an image."""
    batch = llama_cpp.llama_batch_init(len(rows), rows.shape[1], 1)
    ctypes.memmove(batch.embd, np.ascontiguousarray(rows).ctypes.data, rows.nbytes)
    batch.n_tokens = len(rows)
    for i in range(len(rows)):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = llm.n_tokens + i, 1, 0
        batch.logits[i] = False
    try:
        assert llama_cpp.llama_decode(llm._ctx.ctx, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
    llm.n_tokens = llm.n_tokens + len(rows)
