"""L0 against dict, lru_cache, cachetools, cachebox, lru-dict and `==`: hits, puts, memory.

Every hit is timed on a new string object (without a cached hash), as a server gets it. Systems
take turns in random order within one run; figures are medians and ratios of medians. Hits are
timed back to back, and alone with the CPU's cache disturbed before each (bench/_disturb.py).
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics  # text that every Python installation has
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from bench._disturb import DISTURBED, MADE_AFTER, MODES, Disturber, fresh, one_by_one
from bench._process import in_new_process
from bench.adapters import exact as peers
from tokcache import L0Cache, TokenIds
from tokcache.samples import tiny_tokenizer

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("cachetools", "cachebox", "lru-dict", "numpy")
UNIT = "ns a call"
BAR = "none"
IN_ALL = ("--quick",)
PROCESSES = 5
SYSTEMS: dict[str, Any] = {
    "tokcache": peers.Tokcache,
    "dict": peers.Dict,
    "lru_cache": peers.LruCache,
    "cachetools": peers.Cachetools,
    "cachebox": peers.Cachebox,
    "lru-dict": peers.LruDict,
}
FRESH = 16  # strings made, then hit: few enough to stay in the CPU's cache, as in a server
Timed = Callable[[list[tuple[str, str]]], Any]


def prompts(n: int, n_chars: int, filler: str) -> list[str]:
    """Return `n` unrelated texts of `n_chars` characters."""
    rng = random.Random(n_chars)
    noise = "abcdefghijklmnopqrstuvwxyz    "
    head = min(n_chars - 8, 4096)
    return [
        "".join(rng.choices(noise, k=head)) + filler * (n_chars - 8 - head) + f"{i:08d}"
        for i in range(n)
    ]


def per_call(call: Timed, pairs: list[tuple[str, str]]) -> float:
    """Return nanoseconds per call, including the loop around it."""
    gc.disable()
    start = perf_counter_ns()
    call(pairs)
    elapsed = perf_counter_ns() - start
    gc.enable()
    return elapsed / len(pairs)


def _loop(function: Callable[[str], Any]) -> Timed:
    def run(pairs: list[tuple[str, str]]) -> None:
        for text, _ in pairs:
            function(text)

    return run


def _loop_tokcache_get(cache: L0Cache) -> Timed:
    get = cache.get

    def run(pairs: list[tuple[str, str]]) -> None:
        for text, _ in pairs:
            get(text)

    return run


def _loop_tokcache_put(cache: L0Cache, ids: TokenIds) -> Timed:
    put = cache.put

    def run(pairs: list[tuple[str, str]]) -> None:
        for text, _ in pairs:
            put(text, ids)

    return run


def _loop_equal(pairs: list[tuple[str, str]]) -> None:
    for text, stored in pairs:
        text == stored  # noqa: B015 (the compare itself is timed)


def filled(name: str, keys: Sequence[str], capacity: int, ids: TokenIds) -> Any:
    """Return the system's adapter with every key stored; check that it returns their values."""
    system = SYSTEMS[name](capacity, ids)
    for key in keys:
        system.miss(fresh(key))
    assert all(system.hit(fresh(key)) == ids for key in keys[:100])
    return system


def interleaved(
    timed: dict[str, Timed], make: Callable[[random.Random], list[tuple[str, str]]], rounds: int
) -> dict[str, list[float]]:
    """Return the nanoseconds per call of each system and round; they take turns at random."""
    rng = random.Random(7)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    order = list(timed)
    for _ in range(rounds):
        rng.shuffle(order)
        state = rng.getstate()
        for name in order:
            rng.setstate(state)
            pairs = make(rng)
            samples[name].append(per_call(timed[name], pairs))
            del pairs
    return samples


def hits(n_chars: int, filler: str, n_keys: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time hits on new strings of one length, by mode; `==` compares with a stored string.

    Without a disturbance calls are timed in batches; with one, alone, less an empty call.
    """
    keys = prompts(n_keys, n_chars, filler)
    ids = TokenIds(range(n_chars // 4))
    systems = {name: filled(name, keys, n_keys, ids) for name in SYSTEMS}
    stored = [fresh(key) for key in keys]
    timed = {name: _loop(system.hit) for name, system in systems.items()}
    timed["tokcache"] = _loop_tokcache_get(systems["tokcache"].cache)
    timed["=="] = _loop_equal

    def make(rng: random.Random) -> list[tuple[str, str]]:
        picked = [rng.randrange(n_keys) for _ in range(FRESH)]
        return [(fresh(keys[i]), stored[i]) for i in picked]

    found = {mode: interleaved(timed, make, rounds) for mode in MODES[:1]}
    calls = {name: system.hit for name, system in systems.items()}
    calls["tokcache"] = systems["tokcache"].cache.get
    disturb, rng = Disturber(), random.Random(8)
    for mode in (DISTURBED, MADE_AFTER):
        samples: dict[str, list[float]] = {name: [] for name in (*calls, "==")}
        for _ in range(max(rounds // 8, 11)):
            picked = rng.sample(range(n_keys), min(n_keys, FRESH))
            texts = [keys[i] for i in picked]
            for name in rng.sample(list(samples), len(samples)):
                one = calls.get(name)
                each = [stored[i].__eq__ if one is None else one for i in picked]
                samples[name].append(one_by_one(each, texts, mode, disturb))
        found[mode] = samples
    return found


def random_hits(n_keys: int, rounds: int, batch: int) -> dict[str, list[float]]:
    """Time hits on random short keys among many."""
    keys = [f"{i:08d} what is the capital of this country?" for i in range(n_keys)]
    ids = TokenIds(range(12))
    names = ("tokcache", "dict", "lru_cache", "lru-dict", "cachebox")
    systems = {name: filled(name, keys, n_keys, ids) for name in names}
    timed = {name: _loop(system.hit) for name, system in systems.items()}
    timed["tokcache"] = _loop_tokcache_get(systems["tokcache"].cache)

    def make(rng: random.Random) -> list[tuple[str, str]]:
        return [(fresh(keys[rng.randrange(n_keys)]), "") for _ in range(batch)]

    return interleaved(timed, make, rounds)


def puts(capacity: int, rounds: int, batch: int) -> dict[str, list[float]]:
    """Time storing new short keys in a full cache: each evicts one."""
    ids = TokenIds(range(12))
    keys = [f"old {i:08d} what is the capital of this country?" for i in range(capacity)]
    names = ("tokcache", "lru_cache", "lru-dict", "cachebox")
    systems = {name: filled(name, keys, capacity, ids) for name in names}
    timed = {name: _loop(system.miss) for name, system in systems.items()}
    timed["tokcache"] = _loop_tokcache_put(systems["tokcache"].cache, ids)
    serial = iter(range(1 << 60))

    def make(_rng: random.Random) -> list[tuple[str, str]]:
        return [(f"new {next(serial):08d} what is the capital of this?", "") for _ in range(batch)]

    figures = interleaved(timed, make, rounds)
    assert len(systems["tokcache"].cache) == capacity
    return figures


def collisions(n_keys: int, rounds: int) -> dict[str, list[float]]:
    """Time 32 KiB keys that differ only between the samples, against unrelated keys."""
    unrelated = prompts(n_keys, 32 << 10, "x")
    body = unrelated[0]
    template = [body[:40] + f"{i:08d}" + body[48:] for i in range(n_keys)]
    ids = TokenIds(range(8))
    sets = {"unrelated": unrelated, "template": template}
    caches = {name: L0Cache(max_entries=n_keys, max_bytes=1 << 40) for name in sets}
    figures = {}
    for name, keys in sets.items():
        pairs = [(fresh(key), "") for key in keys]
        figures[f"tokcache, put, {name}"] = [per_call(_loop_tokcache_put(caches[name], ids), pairs)]
        assert all(caches[name].get(fresh(key)) == ids for key in keys)
        del pairs
    for name, keys in sets.items():

        def make(rng: random.Random, keys: list[str] = keys) -> list[tuple[str, str]]:
            return [(fresh(keys[rng.randrange(n_keys)]), "") for _ in range(64)]

        figures |= {
            f"tokcache, hit, {key}": value
            for key, value in interleaved(
                {name: _loop_tokcache_get(caches[name])}, make, rounds
            ).items()
        }
    return figures


def tolist(n_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Time making a list of the ids that a tokenizer gives for English text."""
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer()))
    text = "\n".join(topics.values())
    values = tokenizer.encode(text[: 8 * n_tokens]).ids[:n_tokens]
    assert len(values) == n_tokens
    ids, arr = TokenIds(values), array("i", values)
    assert ids.tolist() == arr.tolist() == values
    calls: dict[str, Callable[[], Any]] = {
        "tokcache, TokenIds.tolist": ids.tolist,
        "array.tolist": arr.tolist,
        "list.copy": values.copy,
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = perf_counter_ns()
            call()
            samples[name].append(perf_counter_ns() - start)
    return samples


MEMORY_CASES = {"64 chars": (200_000, 64, 16), "4,096 chars": (20_000, 4096, 1024)}


def resident_bytes() -> int:
    """Return the bytes of this process's resident set."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def memory_here(n_entries: int, n_chars: int, n_tokens: int) -> dict[str, float]:
    """Fill a cache with strings that only it holds; return reported and resident bytes."""
    cache = L0Cache(max_entries=n_entries, max_bytes=1 << 40)
    template = list(range(n_tokens))
    TokenIds(template)
    gc.collect()
    before = resident_bytes()
    for i in range(n_entries):
        cache.put(f"{i:0{n_chars}d}", TokenIds(template))
    gc.collect()
    grown = resident_bytes() - before
    string = sys.getsizeof(f"{0:0{n_chars}d}")
    reported = cache.memory_usage()
    return {
        "reported / RSS growth": reported / grown,
        "bytes an entry": reported / n_entries,
        "above string object + 4 a token": reported / n_entries - string - 4 * n_tokens,
        "above characters + 4 a token": reported / n_entries - n_chars - 4 * n_tokens,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no million keys")


def run(options: argparse.Namespace, report: Report) -> None:
    """Run all cases; every system must return the stored ids before it is timed."""
    rounds, million = (21, 100_000) if options.quick else (81, 1_000_000)
    for n_chars, filler, n_keys in (
        (64, "x", 64), (1024, "x", 64), (8192, "x", 64), (8192, "\u6c49", 64),
        (32768, "x", 64), (131072, "x", 16),
    ):  # fmt: skip
        width = 1 if filler == "x" else 2
        case = f"hit, {n_chars:,} characters of {width} byte(s)"
        report.columns(case, "ns", hits(n_chars, filler, n_keys, rounds), base="tokcache")
    for n_keys in (1000, million):
        values = random_hits(n_keys, 2 * rounds, 500)
        report.table(f"random hits among {n_keys:,}", "ns", values, base="tokcache")
    for capacity in (1000, million):
        values = puts(capacity, 2 * rounds, 500)
        report.table(f"put with eviction at {capacity:,}", "ns", values, base="tokcache")
    values = collisions(200 if options.quick else 10_000, rounds // 2)
    report.table("32 KiB keys of one template", "ns", values)
    values = tolist(8192, rounds * 2)
    report.table("a list of 8,192 ids", "ns", values, base="tokcache, TokenIds.tolist")
    if not report.is_first:
        return
    for name, sizes in MEMORY_CASES.items():  # a process each: memory that was freed is used again
        for key, value in in_new_process("bench.exact", "memory_here", *sizes).items():
            report.fact(f"memory, {name}: {key}", round(value, 2))
