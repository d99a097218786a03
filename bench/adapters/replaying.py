"""One system that replays prompts, to be made in a process of its own."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from bench._disturb import QUIET, Disturber, fresh, one_by_one
from bench._process import keep_memory, settle
from bench.adapters import tokenizing as peers

N_FRESH = 16  # strings made, then encoded: few enough to stay in the CPU's cache
N_DISTURBED = 256  # prompts of a replay with a disturbed CPU cache: the last ones


class Replay:
    """Replays prompts through one system, which is new and has nothing cached in each round."""

    def __init__(self, name: str, file: str, prompts: list[str]) -> None:
        keep_memory()
        self._name, self._file, self._prompts = name, Path(file), prompts
        self._disturb = Disturber()
        self._known: tuple[peers.Encoder, list[str]] | None = None

    def ids(self) -> list[bytes]:
        """Return the ids of each prompt as bytes of int32; Unavailable if it can't be built."""
        encode = peers.build(self._name, self._file).encode
        given: list[Any] = [encode(fresh(each)) for each in self._prompts]
        return [np.array(ids, np.int32).tobytes() for ids in given]

    def miss_percent(self) -> dict[str, float]:
        """Return the shares of characters that miss the chunks and that reach the engine."""
        system = peers.build(self._name, self._file)
        if not isinstance(system, peers.Tokcache):
            return {}
        for prompt in self._prompts:
            system.encode(fresh(prompt))
        lookup, chunk_miss, engine = system.segment_chars()
        shares = {"chunk_miss": chunk_miss, "engine": engine}
        return {name: 100 * n / lookup for name, n in shares.items()} if lookup else {}

    def replay(self, mode: str) -> float:
        """Return the microseconds a prompt of a replay that begins with nothing cached.

        Quiet: the mean over all prompts, in batches. Disturbed: the median of the last ones, each
        timed alone, less an empty call; those before are encoded without being timed.
        """
        system = peers.build(self._name, self._file)
        gc.collect()
        settle()
        if mode == QUIET:
            return _back_to_back(system, self._prompts)
        for prompt in self._prompts[:-N_DISTURBED]:
            system.encode(fresh(prompt))
        texts = self._prompts[-N_DISTURBED:]
        return one_by_one([system.encode] * len(texts), texts, mode, self._disturb) / 1000

    def prepare_known(self, texts: list[str], settings: dict[str, Any]) -> bool:
        """Cache all prompts, then `texts` again; return whether tokcache holds all of them."""
        system = peers.build(self._name, self._file)
        if isinstance(system, peers.Tokcache):
            system = peers.over(peers.ENGINES[self._name], self._file, **settings)
        for prompt in (*self._prompts, *texts):
            system.encode(fresh(prompt))
        self._known = system, texts
        if not isinstance(system, peers.Tokcache):
            return True
        before, *missed = system.segment_chars()
        for text in texts:
            system.encode(fresh(text))
        after, *missed_now = system.segment_chars()
        return missed == missed_now and after - before == sum(map(len, texts))

    def known(self, mode: str) -> float:
        """Return the microseconds of a known prompt."""
        if self._known is None:
            raise RuntimeError("prepare_known was not called")
        system, texts = self._known
        if mode == QUIET:
            return _back_to_back(system, 8 * texts)
        picked = random.Random(len(texts)).sample(texts, len(texts))
        return one_by_one([system.encode] * len(picked), picked, mode, self._disturb) / 1000


def _back_to_back(system: peers.Encoder, prompts: list[str]) -> float:
    elapsed, encode = 0, system.encode
    gc.disable()
    for start in range(0, len(prompts), N_FRESH):
        texts = [fresh(prompt) for prompt in prompts[start : start + N_FRESH]]
        began = perf_counter_ns()
        for text in texts:
            encode(text)
        elapsed += perf_counter_ns() - began
    gc.enable()
    return elapsed / len(prompts) / 1000
