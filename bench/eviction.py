"""Which entries a full cache should give up: hit rates of sampled LRU and of other policies.

tokcache is the real `L0Cache` with samples of 4, 8 (the default) and 16 entries. The others are
those of libCacheSim (`pip install libcachesim`, which is no dependency of this project): exact LRU,
SIEVE, S3-FIFO and W-TinyLFU; and "age over hits", a sample of 8 from which the entry with the
longest time since its last use per use is evicted, simulated here. Requests: Zipf of several
exponents, Zipf with scans of objects that never return, and real traces where they are present: the
blocks of Mooncake's conversations and of coding agents, and the messages of tau-bench's prompts,
which stand for the parts of prompts that L1 keeps. The capacity is a share of the distinct objects.
Every object counts as one entry. Figures are hits in percent of the requests.
"""

from __future__ import annotations

import heapq
import importlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from bench._report import Report, progress
from bench.workloads import chats
from bench.workloads.data import read_json_lines, shared_data, shared_file
from tokcache import L0Cache, TokenIds

if TYPE_CHECKING:
    import argparse

PACKAGES = ("libcachesim", "numpy")
UNIT = "% hits"
BAR = "no other policy has 1 point more on the real traces"
IN_ALL = ("--requests", "25000")
CAPACITIES = (0.01, 0.05, 0.10, 0.25, 0.50)
DEFAULT = "tokcache, sample of 8"
REAL = ("Mooncake", "coding agents", "tau-bench")
MAX_GAIN = 1.0  # points by which another policy may be better on the real traces

Requests = Sequence[int]


def zipf(exponent: float, n_requests: int, seed: int = 1) -> Requests:
    """Return requests of a quarter as many objects, the n-th as frequent as n ** -exponent."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, n_requests // 4 + 1) ** -exponent
    drawn = rng.choice(len(weights), n_requests, p=weights / weights.sum())
    return [int(each) for each in drawn]


def with_scans(n_requests: int) -> Requests:
    """Return Zipf requests; after each tenth of them come as many that never return, halved."""
    serial = n_requests
    made: list[int] = []
    known = zipf(1.0, n_requests)
    for start in range(0, n_requests, n_requests // 10):
        made += known[start : start + n_requests // 10]
        made += range(serial, serial + n_requests // 20)
        serial += n_requests // 20
    return made


def mooncake() -> Requests | None:
    """Return the blocks of Mooncake's conversations, prompt by prompt."""
    file = shared_file("traces", "mooncake", "conversation_trace.jsonl")
    if file is None:
        return None
    rows = read_json_lines(file.read_text(encoding="utf-8"))
    return [each for row in rows for each in row["hash_ids"]]


def agents() -> Requests | None:
    """Return the blocks of all coding agents' requests, in the order of their times."""
    folder = shared_data()
    files = sorted(folder.glob("traces/claude-code/*.json")) if folder else []
    streams = []
    for number, file in enumerate(files):
        found = json.loads(file.read_text(encoding="utf-8"))["requests"]
        streams.append([(one["t"], number, one["hash_ids"]) for one in _flat(found)])
    requests = heapq.merge(*map(sorted, streams))
    return [number << 32 | each for _, number, ids in requests for each in ids] or None


def _flat(requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in requests:
        if "hash_ids" in one:
            yield one
        yield from _flat(one.get("requests", []))


def messages() -> Requests | None:
    """Return the messages of each tau-bench prompt; chats take turns."""
    source, found = chats.load()
    if source != "tau-bench":
        return None
    numbers: dict[str, int] = {}
    turns = []
    for chat_number, chat in enumerate(found):
        ends = [n for n, message in enumerate(chat) if message["role"] == "assistant"]
        for turn, end in enumerate(ends):
            texts = [json.dumps(message) for message in chat[:end]]
            ids = [numbers.setdefault(text, len(numbers)) for text in texts]
            turns.append((chat_number // 8, turn, chat_number, ids))  # eight chats at a time
    return [each for *_, ids in sorted(turns) for each in ids]


def sampled(size: int) -> Callable[[Requests, int], int]:
    """Return the real cache with samples of `size`, as a function that counts hits."""

    def run(requests: Requests, capacity: int) -> int:
        cache = L0Cache(max_entries=capacity, max_bytes=1 << 40, sample_size=size)
        ids, n_hits = TokenIds([1]), 0
        for each in requests:
            key = str(each)
            if cache.get(key) is not None:
                n_hits += 1
            else:
                cache.put(key, ids)
        return n_hits

    return run


def age_over_hits(requests: Requests, capacity: int) -> int:
    """Count the hits of a sample of 8, from which the longest unused for its uses is evicted."""
    rng, n_hits = random.Random(1), 0
    held: list[int] = []
    state: dict[int, list[int]] = {}  # object: its place in `held`, its last use, its uses
    for now, each in enumerate(requests):
        found = state.get(each)
        if found is not None:
            n_hits += 1
            found[1], found[2] = now, found[2] + 1
            continue
        if len(held) == capacity:
            drawn = (held[int(rng.random() * capacity)] for _ in range(8))
            victim = max(drawn, key=lambda one: (now - state[one][1]) / state[one][2])
            place = state.pop(victim)[0]
            last = held.pop()
            if last != victim:
                held[place] = last
                state[last][0] = place
        state[each] = [len(held), now, 1]
        held.append(each)
    return n_hits


def of_library(name: str) -> Callable[[Requests, int], int]:
    """Return a policy of libCacheSim as a function that counts hits."""
    libcachesim: Any = importlib.import_module("libcachesim")

    def run(requests: Requests, capacity: int) -> int:
        cache = getattr(libcachesim, name)(cache_size=capacity, hashpower=16)
        request, n_hits = libcachesim.Request(), 0
        request.obj_size = 1
        for each in requests:
            request.obj_id = each
            n_hits += cache.get(request)
        return n_hits

    return run


def policies(report: Report) -> dict[str, Callable[[Requests, int], int]]:
    """Return all policies that can be run here."""
    found = {f"tokcache, sample of {size}": sampled(size) for size in (4, 8, 16)}
    found["age over hits, sample of 8"] = age_over_hits
    named = {"exact LRU": "LRU", "SIEVE": "Sieve", "S3-FIFO": "S3FIFO", "W-TinyLFU": "WTinyLFU"}
    try:
        return found | {title: of_library(name) for title, name in named.items()}
    except ImportError:
        report.line("  unavailable: the policies of libCacheSim (pip install libcachesim)")
        return found


def workloads(n_requests: int) -> dict[str, Requests]:
    """Return all requests by name."""
    found: dict[str, Requests | None] = {
        f"Zipf {exponent}": zipf(exponent, n_requests) for exponent in (0.8, 0.9, 1.0, 1.1, 1.2)
    }
    found["Zipf 1.0 with scans"] = with_scans(n_requests)
    found |= dict(zip(REAL, (mooncake(), agents(), messages()), strict=True))
    return {name: requests for name, requests in found.items() if requests}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--requests", type=int, default=200_000, help="of each made workload")


def run(options: argparse.Namespace, report: Report) -> None:
    """Count the hits of every policy, workload and capacity."""
    made, found = policies(report), workloads(options.requests)
    gains: dict[str, list[float]] = {name: [] for name in made}
    with progress() as shown:
        task = shown.add_task("evicting", total=len(made) * len(found) * len(CAPACITIES))
        for title, requests in found.items():
            n_objects = len(set(requests))
            columns: dict[str, dict[str, float]] = {}
            for share in CAPACITIES:
                hits = {}
                for name, policy in made.items():
                    n_hits = policy(requests, max(1, int(share * n_objects)))
                    hits[name] = 100 * n_hits / len(requests)
                    shown.advance(task)
                    if title in REAL:
                        gains[name].append(hits[name])
                columns[f"{share:.0%}"] = hits
            case = f"{title}: {len(requests):,} requests of {n_objects:,} objects"
            report.columns(case, "% hits", columns, base=DEFAULT, is_higher_better=True)
    if not gains[DEFAULT]:
        report.line("no real trace is here: the default is not judged")
        return
    averages = {name: mean(values) for name, values in gains.items()}
    report.table("mean of the real traces", "% hits", averages, base=DEFAULT, is_higher_better=True)
    others = [value for name, value in averages.items() if not name.startswith("tokcache")]
    title = "points by which the best other policy is better on the real traces"
    report.bar(title, max(others) - averages[DEFAULT], MAX_GAIN, "points", most=True)
