"""Saving and restoring a prefix of 1,024 tokens against a memcpy of the same bytes.

The model has 12 layers x 768 (9.2 KB of state per token), flash attention and n_ctx 4,096; the
prefix is four blocks of 256, and buffers are used again. First the logits after a restore are
compared, bit for bit and at every position of a tail, with those of an uncached run with the same
decode boundaries; a deliberately changed block must fail that comparison. Then saving (look-up,
eviction of the previous round's states, copy), restoring (look-up, copy) and a memcpy take turns.
Figures are medians.
"""

from __future__ import annotations

import argparse
import random
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from tokcache import samples
from tokcache.llama import Llama
from tokcache.state.cache import PrefixStateCache

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("llama-cpp-python", "numpy")
UNIT = "us"
BAR = "at most 2 times a memcpy, and 2.5 for saving"
IN_ALL = ("--rounds", "60")
N_PREFIX, N_TAIL, BLOCK, N_CTX = 1024, 200, 256, 4096
BARS = {"restore": 2.0, "save": 2.5}


def big_model(**sizes: Any) -> str:
    """Return the path of a random model; by default of the size for which the bars are set."""
    shape: dict[str, Any] = {
        "n_layers": 12,
        "n_embd": 768,
        "n_heads": 12,
        "n_kv_heads": 3,
        "n_ff": 2048,
    }
    return str(samples.tiny_model(**{**shape, **sizes}))


def llama(cache: PrefixStateCache | None, model: str) -> Any:
    """Return a reproducible Llama that keeps the logits of every decoded position."""
    llm = Llama(
        model, prefix_cache=cache, reproducible=True, n_ctx=N_CTX, flash_attn=True, verbose=False
    )
    llm.wait_for_fingerprint()
    llm._logits_all = True
    llm.scores = np.zeros((N_CTX, llm.n_vocab()), np.float32)
    return llm


def tail_logits(llm: Any, prompt: list[int]) -> Any:
    """Decode `prompt` and one answer token; return the bits of the logits of the tail."""
    next(llm.generate(prompt, temp=0.0))
    return llm.scores[N_PREFIX : len(prompt)].copy().view(np.int32)


def compare(model: str, prompt: list[int]) -> dict[str, Any]:
    """Return whether a restore gives the uncached logits, and whether a wrong state does not."""
    cache = PrefixStateCache(block_tokens=BLOCK)
    cached, uncached = llama(cache, model), llama(None, model)
    expected = tail_logits(uncached, prompt)
    tail_logits(cached, [*prompt[:N_PREFIX], 7, 7, 7])
    cached.reset()
    restored = tail_logits(cached, prompt)
    assert cached.last_reuse.n_restored == N_PREFIX, cached.last_reuse
    payload = cache._store.memory.tier.get(next(iter(cache._store.memory.tier.names())))
    assert payload is not None
    np.frombuffer(payload, np.uint8)[-2:] = (0, 0x40)  # one value of the last layer becomes 2.0
    cached.reset()
    wrong = tail_logits(cached, prompt)
    assert cached.last_reuse.n_restored == N_PREFIX, cached.last_reuse
    figures = {
        "tail positions": N_TAIL,
        "identical": bool(np.array_equal(expected, restored)),
        "control differs": not np.array_equal(expected, wrong),
    }
    for one in (cached, uncached):
        one.close()
    return figures


class Timed:
    """A context that holds the prefix, and a cache with room for exactly its blocks."""

    def __init__(self, model: str, prompt: list[int]) -> None:
        self.tokens = np.array(prompt[:N_PREFIX], np.int32)
        self.llm = llama(None, model)
        self.llm.eval(prompt[:N_PREFIX])
        self.sequence = self.llm._sequence
        size = self.sequence.block_bytes(0, BLOCK)
        self.n_bytes = size * N_PREFIX // BLOCK
        # The next save finds no room and uses the buffers of the previous one.
        self.cache = PrefixStateCache(ram_bytes=self.n_bytes + size // 2, block_tokens=BLOCK)
        self.source = [np.ones(size, np.uint8) for _ in range(N_PREFIX // BLOCK)]
        self.target = [np.ones(size, np.uint8) for _ in range(N_PREFIX // BLOCK)]
        self.states = self.cache.namespace(b"0")
        self.round = 0

    def save(self) -> None:
        """Save all blocks as those of a new prefix."""
        self.round += 1
        self.states = self.cache.namespace(b"%d" % self.round)
        saved = self.states.save(self.tokens, self.sequence.read_block, self.sequence.block_bytes)
        assert saved == N_PREFIX

    def restore(self) -> None:
        """Restore the blocks into the emptied sequence."""
        with self.states.plan(self.tokens) as plan:
            assert plan.restore(self.sequence.write_block) == N_PREFIX

    def memcpy(self) -> None:
        """Copy the same number of bytes as a restore does, in the same number of copies."""
        for source, target in zip(self.source, self.target, strict=True):
            np.copyto(target, source)


def measure(timed: Timed, rounds: int) -> dict[str, list[float]]:
    """Return the microseconds of each step; the steps take turns."""
    samples_ns: dict[str, list[int]] = {"memcpy": [], "save": [], "restore": []}
    for _ in range(rounds):
        for name, times in samples_ns.items():
            if name == "restore":
                timed.sequence.clear()
            began = perf_counter_ns()
            getattr(timed, name)()
            times.append(perf_counter_ns() - began)
    warm = rounds // 10
    return {name: [ns / 1000 for ns in times[warm:]] for name, times in samples_ns.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--rounds", type=int, default=200)


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare the logits, then measure."""
    model = big_model()
    prompt = random.Random(11).choices(range(3, 2000), k=N_PREFIX + N_TAIL)
    equality = compare(model, prompt)
    report.check(
        "logits after a restore are those of an uncached run", is_right=equality["identical"]
    )
    report.check("a changed block gives other logits", is_right=equality["control differs"])
    timed = Timed(model, prompt)
    us = measure(timed, options.rounds)
    rows = {"memcpy": us["memcpy"]} | {f"tokcache, {name}": us[name] for name in BARS}
    report.table(f"{N_PREFIX} tokens, {timed.n_bytes / 1e6:.2f} MB", "us", rows, base="memcpy")
    for name, limit in BARS.items():
        ratio = median(us[name]) / median(us["memcpy"])
        report.bar(f"{name} over memcpy", ratio, limit, most=True)
