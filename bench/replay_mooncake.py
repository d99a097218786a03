"""Mooncake's conversation trace, replayed through the retention of a PrefixStateCache.

The trace has 12,031 prompts of one hour at Kimi, each a list of ids that stand for blocks of 512
tokens. Every prompt is planned and saved in the real cache, as an engine would do it. Here an id
stands for one block of a few tokens with a payload of 64 bytes, so that a budget in bytes is a
budget in blocks of the trace.

First, with a budget that is never reached, the hits are compared with those of a plain set of ids:
they must be the same for every prompt. The paper's table 2 (FAST'25) gives a cache ratio of 40%
and does not define it; here it is the share of a prompt's tokens that are a prefix seen before,
averaged over the prompts. The shares of all tokens and of all blocks are reported, too. Then the
budget is 10%, 25% and 50% of the bytes held at the end, and the peers are exact LRU, LFU and FIFO
(cachetools) with the same number of blocks. A peer's hits are counted as a prefix, too, and the
last block of a prompt is put into it first, which is best for each of them: the beginning of a
prompt is then younger than the blocks that can't be used without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cachetools
import numpy as np

from bench._report import Report, progress
from bench.workloads.data import read_json_lines, shared_file
from tokcache.state.cache import PrefixStateCache

if TYPE_CHECKING:
    from rich.progress import Progress

PACKAGES = ("cachetools", "numpy")
UNIT = "% hits"
BAR = "within 1 point of the paper's 40; at least 0.999 times the best peer's"
IN_ALL = ()
TRACE_TOKENS = 512  # tokens that an id of the trace stands for
TOKENS, STATE_BYTES = 4, 64  # of the block that it stands for here
UNBOUNDED = 1 << 40
SHARES = (0.10, 0.25, 0.50)
PEERS: dict[str, Callable[[int], Any]] = {
    "LRU": cachetools.LRUCache,
    "LFU": cachetools.LFUCache,
    "FIFO": cachetools.FIFOCache,
}
OURS = "tokcache"
PAPER, PAPER_TOLERANCE = 40.0, 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: the ids of its blocks, and its tokens (the last block may be shorter)."""

    ids: list[int]
    n_tokens: int


def load() -> list[Prompt] | None:
    """Return the prompts of the trace, None if it is absent."""
    file = shared_file("traces", "mooncake", "conversation_trace.jsonl")
    if file is None:
        return None
    rows = read_json_lines(file.read_text(encoding="utf-8"))
    return [Prompt(row["hash_ids"], row["input_length"]) for row in rows]


def cached(cache: PrefixStateCache, prompts: list[Prompt]) -> Iterator[int]:
    """Plan and save every prompt; yield the number of its blocks that were found."""
    states = cache.namespace(b"mooncake")
    for prompt in prompts:
        tokens = np.repeat(np.array(prompt.ids, np.int32), TOKENS)
        with states.plan(tokens) as plan:
            n_found, rest = divmod(plan.n_tokens, TOKENS)
        assert rest == 0
        yield n_found
        states.save(tokens, _fill, lambda *_: STATE_BYTES)


def _fill(start: int, _stop: int, buffer: memoryview) -> None:
    buffer[0] = start % 256


def seen(prompts: list[Prompt]) -> Iterator[int]:
    """Yield the number of leading blocks of every prompt that were in an earlier prompt."""
    known: set[int] = set()
    for prompt in prompts:
        yield _n_leading(prompt.ids, known)
        known.update(prompt.ids)


def classic(cache: Any, prompts: list[Prompt]) -> Iterator[int]:
    """Yield the number of leading blocks of every prompt that were in a cache of single blocks."""
    for prompt in prompts:
        yield _n_leading(prompt.ids, cache)
        for each in reversed(prompt.ids):
            if each in cache:
                cache[each]  # counts as a use
            else:
                cache[each] = True


def _n_leading(ids: list[int], held: Any) -> int:
    return next((n for n, each in enumerate(ids) if each not in held), len(ids))


def ratios(prompts: list[Prompt], found: list[int]) -> dict[str, float]:
    """Return the hits in %: averaged over prompts, of all tokens, and of all blocks."""
    tokens = [
        min(n * TRACE_TOKENS, prompt.n_tokens) for n, prompt in zip(found, prompts, strict=True)
    ]
    shares = [n / prompt.n_tokens for n, prompt in zip(tokens, prompts, strict=True)]
    return {
        "a prompt": 100 * sum(shares) / len(shares),
        "tokens": 100 * sum(tokens) / sum(prompt.n_tokens for prompt in prompts),
        "blocks": 100 * sum(found) / sum(len(prompt.ids) for prompt in prompts),
    }


class Replay:
    """Replays the trace through caches of several sizes, with a progress bar."""

    def __init__(self, prompts: list[Prompt], shown: Progress) -> None:
        self.prompts, self._progress = prompts, shown
        self.n_blocks = len({each for prompt in prompts for each in prompt.ids})
        self.n_bytes = 0

    def _run(self, title: str, found: Iterator[int]) -> list[int]:
        total = len(self.prompts)
        return list(self._progress.track(found, total=total, description=title))

    def unbounded(self) -> tuple[list[int], list[int]]:
        """Return the hits of every prompt without a limit: the cache's, and the expected ones."""
        with_room = make_cache(UNBOUNDED)
        found = self._run(f"{OURS}, unbounded", cached(with_room, self.prompts))
        stats = with_room.stats()
        assert (stats.n_blocks, stats.evictions) == (self.n_blocks, 0), stats
        self.n_bytes = with_room.memory_usage()
        return found, list(seen(self.prompts))

    def bounded(self, share: float) -> dict[str, dict[str, float]]:
        """Return the hits of all systems with a share of the unbounded run's bytes."""
        cache = make_cache(int(share * self.n_bytes))
        title = f"{share:.0%}"
        found = {OURS: self._run(f"{OURS}, {title}", cached(cache, self.prompts))}
        cache._check()
        assert cache.stats().refusals == {}, cache.stats()
        for name, make in PEERS.items():
            peer = make(int(share * self.n_blocks))
            found[name] = self._run(f"{name}, {title}", classic(peer, self.prompts))
        return {name: ratios(self.prompts, hits) for name, hits in found.items()}


def make_cache(ram_bytes: int) -> PrefixStateCache:
    """Return a cache that is limited only in bytes."""
    return PrefixStateCache(ram_bytes=ram_bytes, max_entries=1 << 30, block_tokens=TOKENS)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add no option."""


def run(_options: argparse.Namespace, report: Report) -> None:
    """Replay: exact hits, the paper's ratio, and at least the best peer's hits."""
    prompts = load()
    if prompts is None:
        report.skip("traces/mooncake/conversation_trace.jsonl is not in the shared data")
        return
    with progress() as shown:
        replay = Replay(prompts, shown)
        hits, expected = replay.unbounded()
        found = {"unbounded": {OURS: ratios(prompts, hits), "a set": ratios(prompts, expected)}}
        found |= {f"{share:.0%}": replay.bounded(share) for share in SHARES}
    report.fact("prompts", len(prompts))
    report.fact("distinct blocks", replay.n_blocks)
    report.fact("bytes without a limit", replay.n_bytes)
    for room, systems in found.items():
        for counted in ("a prompt", "tokens", "blocks"):
            rows = {name: row[counted] for name, row in systems.items()}
            title = f"hits, {room}, counted by {counted}"
            report.table(title, "%", rows, base=OURS, is_higher_better=True)
    n_different = sum(map(int.__ne__, hits, expected))
    title = "hits of every prompt are those of a set of ids"
    report.check(title, is_right=not n_different, found=f"{n_different} differ")
    off = abs(found["unbounded"][OURS]["a prompt"] - PAPER)
    report.bar("unbounded: off the paper's 40 %", off, PAPER_TOLERANCE, "%", most=True)
    for room, systems in found.items():
        if room != "unbounded":
            best = max(systems[name]["a prompt"] for name in PEERS)
            ratio = systems[OURS]["a prompt"] / best
            report.bar(f"{room}: hits over the best of the peers", ratio, 0.999)
