"""L0 against dict, lru_cache, cachetools, cachebox, lru-dict and `==`: hits, puts, memory.

Every hit is timed on a new string object (without a cached hash), as a server gets it. Systems
take turns in random order within one run; figures are medians and ratios of medians.
"""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics  # text that every Python installation has
from statistics import median
from time import perf_counter_ns
from typing import Any

from tokenizers import Tokenizer

from bench import _report
from bench.adapters import exact as peers
from tokcache import L0Cache, TokenIds
from tokcache.samples import tiny_tokenizer

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


def fresh(text: str) -> str:
    """Return an equal string that is a new object."""
    return (text + "\0")[:-1]


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
) -> dict[str, float]:
    """Return the median nanoseconds per call of each system; they take turns in random order."""
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
    return {name: median(values) for name, values in samples.items()}


def hits(n_chars: int, filler: str, n_keys: int, rounds: int) -> dict[str, float]:
    """Time hits on new strings of one length; `==` compares with a stored equal string."""
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

    return interleaved(timed, make, rounds)


def random_hits(n_keys: int, rounds: int, batch: int) -> dict[str, float]:
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


def puts(capacity: int, rounds: int, batch: int) -> dict[str, float]:
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


def collisions(n_keys: int, rounds: int) -> dict[str, float]:
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
        figures[f"put {name}"] = per_call(_loop_tokcache_put(caches[name], ids), pairs)
        assert all(caches[name].get(fresh(key)) == ids for key in keys)
        del pairs
    for name, keys in sets.items():

        def make(rng: random.Random, keys: list[str] = keys) -> list[tuple[str, str]]:
            return [(fresh(keys[rng.randrange(n_keys)]), "") for _ in range(64)]

        figures |= {
            f"hit {key}": value
            for key, value in interleaved(
                {name: _loop_tokcache_get(caches[name])}, make, rounds
            ).items()
        }
    return figures


def tolist(n_tokens: int, rounds: int) -> dict[str, float]:
    """Time making a list of the ids that a tokenizer gives for English text."""
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer()))
    text = "\n".join(topics.values())
    values = tokenizer.encode(text[: 8 * n_tokens]).ids[:n_tokens]
    assert len(values) == n_tokens
    ids, arr = TokenIds(values), array("i", values)
    assert ids.tolist() == arr.tolist() == values
    calls: dict[str, Callable[[], Any]] = {
        "TokenIds.tolist": ids.tolist,
        "array.tolist": arr.tolist,
        "list.copy": values.copy,
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = perf_counter_ns()
            call()
            samples[name].append(perf_counter_ns() - start)
    return {name: median(one) for name, one in samples.items()}


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


def memory() -> dict[str, dict[str, float]]:
    """Measure each case in a new process, because it would use memory that the last one freed."""
    figures = {}
    for name, case in MEMORY_CASES.items():
        code = f"import json, bench.exact as e; print(json.dumps(e.memory_here(*{case})))"
        done = subprocess.run(  # noqa: S603 (our own code)
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        figures[name] = json.loads(done.stdout)
    return figures


def show(title: str, figures: dict[str, float], base: str | None = None) -> None:
    """Print one row of medians, and the ratio of tokcache to each."""
    cells = []
    for name, value in figures.items():
        ratio = f" ({figures[base] / value:.2f}x)" if base and name != base else ""
        cells.append(f"{name} {value:,.0f}{ratio}")
    print(f"{title:34} " + "  ".join(cells), flush=True)


def main(argv: list[str]) -> int:
    """Run all cases; print nanoseconds and, in brackets, tokcache's time over the peer's."""
    options = _report.parser(__doc__ or "")
    options.add_argument("--quick", action="store_true", help="fewer rounds, no million keys")
    args = options.parse_args(argv)
    rounds, million = (101, 100_000) if args.quick else (401, 1_000_000)
    figures: dict[str, Any] = {}
    print("nanoseconds a call, medians; in brackets: tokcache / peer")
    for n_chars, filler, n_keys in (
        (64, "x", 64), (1024, "x", 64), (8192, "x", 64), (8192, "\u6c49", 64),
        (32768, "x", 64), (131072, "x", 16),
    ):  # fmt: skip
        title = f"hit, {n_chars:,} chars of {1 if filler == 'x' else 2} bytes"
        figures[title] = hits(n_chars, filler, n_keys, rounds)
        show(title, figures[title], "tokcache")
    for n_keys in (1000, million):
        title = f"random hits among {n_keys:,}"
        figures[title] = random_hits(n_keys, max(11, rounds // 20), 5000)
        show(title, figures[title], "tokcache")
    for capacity in (1000, million):
        title = f"put with eviction at {capacity:,}"
        figures[title] = puts(capacity, max(11, rounds // 20), 5000)
        show(title, figures[title], "tokcache")
    title = "32 KiB keys of one template"
    figures[title] = collisions(1000 if args.quick else 10_000, rounds // 2)
    show(title, figures[title])
    figures["tolist of 8,192 ids"] = tolist(8192, rounds * 2)
    show("tolist of 8,192 ids", figures["tolist of 8,192 ids"], "TokenIds.tolist")
    figures["memory"] = memory()
    for name, one in figures["memory"].items():
        print(f"memory, {name:26} " + "  ".join(f"{k} {v:,.2f}" for k, v in one.items()))
    environment = _report.environment("cachetools", "cachebox", "lru-dict", "numpy")
    _report.finish({"environment": environment, "ns": figures}, args.json)
    return 0
