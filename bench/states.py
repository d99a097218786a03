"""The prefix-state cache: look-ups among many entries, branches of one prefix, growth, the disk.

Look-up: prompts of 8,192 tokens, the first 4,096 of which are one of 10,000 unrelated entries.
Branches: 50 continuations of 128 tokens of one prefix of 2,000 tokens; the state bytes in memory
are compared with those of the unique tokens. Growth: look-ups, and bytes per entry, from 100 to
100,000 entries. Disk: a prefix of 2,048 tokens in 8 blocks of 2.4 MB, restored from memory and from
files in the system's page cache, against a memcpy of its bytes; the three take turns. Results are
compared before anything is timed, and a changed byte must be detected. `--checksums` compares
checksums. Saving and restoring a model's state: bench restore.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bench._report import Report, Values, progress
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.block_file import StateCodec
from tokcache.state.tiers.disk import DiskTier

if TYPE_CHECKING:
    from tokcache.state.namespace import Namespace

PACKAGES = ("numpy", "xxhash")
UNIT = "us, bytes"
BAR = (
    "at most 40 us to look up 8,192 tokens; 1.1 times the bytes of unique blocks; 2 times as "
    "slow with the most entries"
)
IN_ALL = ("--rounds", "400", "--entries", "3000", "--largest", "10000")
MODEL = b"model"
BLOCK = 256
STATE_BYTES = 64  # of a block, in cases that do not measure states
BLOCK_BYTES = 2_400_000


def save(states: Namespace, tokens: Any, n_bytes: Callable[[int, int], int]) -> int:
    """Save states without filling their bytes; return the number of saved positions."""
    return states.save(tokens, lambda *_: None, n_bytes)


def small(_start: int, _stop: int) -> int:
    """Return the size of a state in cases that do not measure states."""
    return STATE_BYTES


def random_tokens(rng: Any, n_tokens: int) -> Any:
    """Return random ids of the type that a tokenizer gives."""
    return rng.integers(0, 150_000, n_tokens, np.int32)


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Return the microseconds of each call of `work`."""
    times = []
    for _ in range(rounds):
        began = perf_counter_ns()
        work()
        times.append((perf_counter_ns() - began) / 1000)
    return times


def n_found(states: Namespace, tokens: Any) -> int:
    """Return the number of leading tokens that are in the cache."""
    with states.plan(tokens) as plan:
        return plan.n_tokens


def filled(
    n_entries: int, n_tokens: int, rng: Any
) -> tuple[PrefixStateCache, list[Any], list[float]]:
    """Return a cache with `n_entries` entries, a sample of them, and the us of each save."""
    cache = PrefixStateCache(ram_bytes=1 << 40, max_entries=1 << 30, block_tokens=BLOCK)
    states = cache.namespace(MODEL)
    kept, times = [], []
    for n in range(n_entries):
        tokens = random_tokens(rng, n_tokens)
        began = perf_counter_ns()
        assert save(states, tokens, small) > n_tokens - 8  # a few share their first tokens
        times.append((perf_counter_ns() - began) / 1000)
        if n % max(n_entries // 100, 1) == 0:
            kept.append(tokens)
    return cache, kept, times


def lookups(rounds: int, n_entries: int) -> dict[str, list[float]]:
    """Time prompts of 8,192 tokens among entries of 4,096."""
    rng = np.random.default_rng(1)
    cache, kept, save_us = filled(n_entries, 4096, rng)
    states = cache.namespace(MODEL)
    prompts = [np.concatenate([each, random_tokens(rng, 4096)]) for each in kept]
    prompts_inside = [np.concatenate([p[:3000], random_tokens(rng, 5192)]) for p in prompts]
    for prompt, inside in zip(prompts, prompts_inside, strict=True):
        assert (n_found(states, prompt), n_found(states, inside)) == (4096, 3000)
    strangers = [random_tokens(rng, 8192) for _ in range(50)]
    assert max(n_found(states, each) for each in strangers) < 8
    pick = random.Random(1)
    return {
        "tokcache, hit": timed(lambda: n_found(states, pick.choice(prompts)), rounds),
        "tokcache, hit inside a block": timed(
            lambda: n_found(states, pick.choice(prompts_inside)), rounds
        ),
        "tokcache, miss": timed(lambda: n_found(states, pick.choice(strangers)), rounds),
        "tokcache, save of 4,096": save_us,
    }


def branches() -> dict[str, float]:
    """Return the bytes of 50 branches of one prefix, and the bytes of their unique tokens."""
    rng, token_bytes = np.random.default_rng(2), 9216
    cache = PrefixStateCache(ram_bytes=1 << 40, max_entries=100, block_tokens=BLOCK)
    states = cache.namespace(MODEL)
    shared = random_tokens(rng, 2000)
    prompts = [np.concatenate([shared, random_tokens(rng, 128)]) for _ in range(50)]
    for prompt in prompts:
        save(states, prompt, lambda start, stop: (stop - start) * token_bytes)
    assert [n_found(states, prompt) for prompt in prompts] == [2128] * 50
    assert len(cache) == 50
    held = cache._store.memory.tier.memory_usage()
    unique = (2000 + 50 * 128) * token_bytes
    return {
        "states": held,
        "all": cache.memory_usage(),
        "unique": unique,
        "copies": 50 * 2128 * token_bytes,
    }


def growth(rounds: int, largest: int) -> dict[int, dict[str, Values]]:
    """Time hits and count bytes from 100 entries of 512 tokens to `largest`."""
    rows: dict[int, dict[str, Values]] = {}
    n_entries = 100
    while n_entries <= largest:
        cache, kept, save_us = filled(n_entries, 512, np.random.default_rng(3))
        states = cache.namespace(MODEL)
        assert [n_found(states, each) for each in kept] == [512] * len(kept)
        pick = random.Random(3)
        hit_us = timed(partial(_hit, states, kept, pick), rounds)
        overhead = cache.memory_usage() / n_entries
        rows[n_entries] = {"hit": hit_us, "save": save_us, "bytes": overhead}
        n_entries *= 10
    return rows


def _hit(states: Namespace, prompts: list[Any], pick: random.Random) -> None:
    n_found(states, pick.choice(prompts))


class Files:
    """The same prefix in memory, in files, and as plain bytes."""

    def __init__(self, folder: Path) -> None:
        self.tokens = np.arange(8 * BLOCK, dtype=np.int32)
        self.payload = np.random.default_rng(4).integers(0, 255, BLOCK_BYTES, np.uint8)
        self.tier = DiskTier(folder)
        self.memory = self._cache(self.tier)
        self.memory.namespace(MODEL).save(self.tokens, self._read, lambda *_: BLOCK_BYTES)
        self.memory.flush()
        self.fresh = self._cache(self.tier)
        self.sources = [self.payload.copy() for _ in range(8)]
        self.targets = [np.ones(BLOCK_BYTES, np.uint8) for _ in range(8)]

    def _cache(self, tier: DiskTier) -> PrefixStateCache:
        return PrefixStateCache(ram_bytes=1 << 30, block_tokens=BLOCK, disk=tier)

    def _read(self, _start: int, _stop: int, buffer: memoryview) -> None:
        np.copyto(np.frombuffer(buffer, np.uint8), self.payload)

    def remove_from_memory(self) -> None:
        """Remove the prefix from memory, so that only the disk has it; buffers are reused."""
        memory = self.fresh._store.memory
        for node in list(memory.index.nodes()):
            memory.remove(node)

    def restore(self, cache: PrefixStateCache) -> None:
        """Copy the prefix's blocks out of a cache, as an engine would."""

        def load(start: int, _stop: int, payload: memoryview) -> None:
            np.copyto(self.targets[start // BLOCK], np.frombuffer(payload, np.uint8))

        with cache.namespace(MODEL).plan(self.tokens) as plan:
            assert plan.restore(load) == 8 * BLOCK

    def copy(self) -> None:
        """Copy the same number of bytes as `restore` does, in the same number of copies."""
        for target, source in zip(self.targets, self.sources, strict=True):
            np.copyto(target, source)

    def compare(self) -> bool:
        """Return whether the files give the saved bytes and a damaged file is refused."""
        self.remove_from_memory()
        self.restore(self.fresh)
        is_equal = all(np.array_equal(each, self.payload) for each in self.targets)
        file = next(iter(self.tier.files()))
        path, place = self.tier.path / file.path, 5000
        with path.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)
            opened.seek(place)
            opened.write(bytes([byte[0] ^ 1]))
        self.remove_from_memory()
        is_refused = n_found(self.fresh.namespace(MODEL), self.tokens) < 8 * BLOCK
        self.__init__(self.tier.path)  # type: ignore[misc]  # writes the damaged file again
        return is_equal and is_refused


def disk(rounds: int) -> tuple[bool, dict[str, list[float]]]:
    """Time memcpy, memory and files in turns; return whether bytes were right, and the us."""
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder) / "states")
        is_right = files.compare()
        times: dict[str, list[int]] = {"memcpy": [], "memory": [], "files": []}
        for _ in range(rounds):
            files.remove_from_memory()
            for name, work in (
                ("memcpy", files.copy),
                ("memory", lambda: files.restore(files.memory)),
                ("files", lambda: files.restore(files.fresh)),
            ):
                began = perf_counter_ns()
                work()
                times[name].append(perf_counter_ns() - began)
        return is_right, {name: [ns / 1000 for ns in each] for name, each in times.items()}


def checksums(rounds: int) -> dict[str, list[float]]:
    """Time checksums of one block; microseconds."""
    data = np.random.default_rng(5).bytes(BLOCK_BYTES)
    target = bytearray(BLOCK_BYTES)
    plain, keyed = StateCodec(), StateCodec(b"k" * 32)
    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: target.__setitem__(slice(None), data),
        "XXH3, 128 bits": lambda: plain.checksum(data),
        "crc32": lambda: zlib.crc32(data),
        "blake2b": lambda: blake2b(data).digest(),
        "HMAC-SHA256": lambda: keyed.checksum(data),
    }
    return {name: timed(work, rounds) for name, work in ways.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--largest", type=int, default=100_000)
    parser.add_argument("--checksums", action="store_true", help="compare checksums, nothing else")


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare, then measure."""
    if options.checksums:
        size = f"{BLOCK_BYTES:,} bytes"
        report.table(f"checksum of {size}", "us", checksums(51), base="memcpy")
        return
    with progress() as shown:
        task = shown.add_task("states", total=4)
        look_up = lookups(options.rounds, options.entries)
        shown.advance(task)
        held = branches()
        shown.advance(task)
        grown = growth(options.rounds, options.largest)
        shown.advance(task)
        is_right, read = disk(max(options.rounds // 40, 10))
    title = f"prompts of 8,192 tokens among {options.entries:,} entries of 4,096"
    report.table(title, "us", look_up)
    report.bar("look-up of 8,192 tokens", median(look_up["tokcache, hit"]), 40, "us", most=True)

    rows: dict[str, Values]
    sizes = {"tokcache, states": held["states"], "tokcache, all": held["all"]}
    sizes |= {"the unique tokens": held["unique"], "a copy of each": held["copies"]}
    megabytes = {name: n_bytes / 1e6 for name, n_bytes in sizes.items()}
    title = "50 branches of 128 tokens on 2,000"
    report.table(title, "MB", megabytes, base="the unique tokens")
    report.bar("branches", held["states"] / held["unique"], 1.1, most=True)

    for what, unit in (("hit", "us"), ("save", "us"), ("bytes", "bytes an entry")):
        rows = {f"tokcache, {n:,} entries of 512": row[what] for n, row in grown.items()}
        report.table(f"growth: {what}", unit, rows)
    least, most = (median(cast("list[float]", grown[n]["hit"])) for n in (min(grown), max(grown)))
    report.bar("hit at the most entries over the fewest", most / least, 2, most=True)

    report.check("files give the saved bytes, and a changed byte is detected", is_right=is_right)
    rows = {name if name == "memcpy" else f"tokcache, {name}": us for name, us in read.items()}
    report.table("a prefix of 2,048 tokens in 8 blocks of 2.4 MB", "us", rows, base="memcpy")
