"""The text caches for minutes: exact ids, exact counters, kept budgets, memory that is flat.

L0: eight threads ask one wrapped tokenizer with a small L0 for the same few hundred texts, in three
scopes, while scopes are cleared and the tokenizer is changed every second. An answer must be that
of the tokenizer as it was at some moment of the call.

L1: the threads ask all tokenizers at hand for texts that share passages and never come twice. Every
twentieth text is also answered by a second wrapper with `verify_rate=1`, and compared here.

Every call must be counted exactly once, no budget may be exceeded at a sampled moment, and the
memory of the process may not grow over the last half of each part.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, normalizers

import tokcache
from bench.workloads import texts as workload
from bench.workloads.data import TINY, shared_data, tokenizer_file
from tokcache import CacheConfig, TokenIds

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("tokenizers",)
UNIT = "wrong answers, MB"
BAR = "no wrong answer; at most 2% more memory in the last half"
IN_ALL = ("--seconds", "12")
N_TEXTS, N_THREADS = 400, 8
SCOPES = (None, "a", "b")
# Small, so that many texts are evicted before they are asked for again.
L0 = CacheConfig(l0_max_entries=1200, l0_max_bytes="1M", l1=False, engine="tokenizers")
L1 = CacheConfig(l0_max_entries=1, l1_max_bytes="1M", engine="tokenizers")
VERIFIED = CacheConfig(l0_max_entries=1, l1_max_bytes="512K", engine="tokenizers", verify_rate=1.0)
CHANGE_EVERY_S, SAMPLE_EVERY_S = 1.0, 0.05
VERIFY_ONE_IN, CLEAR_ONE_IN = 20, 10_000
CALLS_AT_ONCE = 100  # between two looks at the clock
# Ten times as many switches between threads as usual: more races, and no waiting for a thread that
# does not encode.
SWITCH_INTERVAL_S = 0.0005
MAX_GROWTH = 0.02
_M_ARENA_MAX = -8  # of mallopt(3)
# In a shorter part the allocator still takes memory for the first requests.
MIN_SECONDS_OF_SLOPE = 50.0
# Refusals of L1 that are texts, not chunks that were not kept.
TEXT_REFUSALS = ("surrogate", "post_processor", "beside_single_word")
NORMALIZERS: tuple[Callable[[], Any], ...] = (
    lambda: normalizers.Sequence([]),
    normalizers.Lowercase,
    lambda: normalizers.Replace("e", "a"),
)


def wrap(tokenizer: Tokenizer, config: CacheConfig) -> Any:
    """Return a wrapped tokenizer."""
    return tokcache.wrap(tokenizer, config)


@dataclass
class Part:
    """One part of the soak: its threads, their counts, and samples of memory."""

    seconds: float
    n_wanted: int
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    began: float = field(default_factory=time.monotonic)
    is_over: threading.Event = field(default_factory=threading.Event)
    n_threads: int = 0

    def fault(self, words: str) -> None:
        """Record something that must not happen."""
        with self.lock:
            self.faults.append(words)

    def add(self, counts: Counter[str]) -> None:
        """Add what one thread counted; the part is over when there are enough answers."""
        with self.lock:
            self.counts += counts
            is_enough = self.counts["calls"] >= self.n_wanted
        if is_enough or time.monotonic() - self.began > self.seconds:
            self.is_over.set()

    def run(
        self, work: Callable[[int], None], n_threads: int, meanwhile: Callable[[], None]
    ) -> None:
        """Run `work` in threads until the part is over; `meanwhile` runs here, again and again."""

        def guarded(number: int) -> None:
            try:
                work(number)
            except Exception as error:  # noqa: BLE001 (the soak must end and report it)
                self.fault(f"{type(error).__name__}: {error}")
                self.is_over.set()

        self.n_threads = n_threads
        threads = [threading.Thread(target=guarded, args=(n,)) for n in range(n_threads)]
        for each in threads:
            each.start()
        while not self.is_over.wait(SAMPLE_EVERY_S):
            self.memory.append((time.monotonic(), memory_bytes()))
            meanwhile()
        for each in threads:
            each.join()

    def growth(self) -> float:
        """Return the growth of the memory over the last half, by a straight line through it."""
        last = self.memory[len(self.memory) // 2 :]
        if len(last) < 2:  # over before there was anything to measure
            return 0.0
        at, n_bytes = zip(*last, strict=True)
        slope = linear_regression(at, n_bytes).slope
        return float(slope * (at[-1] - at[0]) / n_bytes[0])


def memory_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def use_one_arena() -> None:
    """Have glibc use one heap for all threads.

    With a heap for each thread, memory grows for a long time without any leak: one thread frees
    what another has allocated. In 120 s on ten tokenizers it grew by 23%, and by none in one heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


# ---- L0


def normalized(tokenizer: Tokenizer, version: int) -> Tokenizer:
    """Return a copy of a tokenizer as it is after `version` changes."""
    made = Tokenizer.from_str(tokenizer.to_str())
    made.normalizer = NORMALIZERS[version % len(NORMALIZERS)]()
    return made


class L0Part(Part):
    """Texts that come again, on one tokenizer that is changed."""

    def prepare(self, seed: int) -> None:
        """Make the tokenizer, the texts, and their ids in each version of the tokenizer."""
        rng = random.Random(seed)
        plain = Tokenizer.from_file(str(tokenizer_file(TINY)))
        self.tokenizer = wrap(normalized(plain, 0), L0)
        source = [workload.endless(kind, seed) for kind in workload.KINDS]
        filler = ["".join(next(rng.choice(source)) for _ in range(2)) for _ in range(40)]
        # Texts of one template differ in a number alone, so that their samples collide.
        self.texts = [
            f"{rng.choice(filler)[: rng.choice((9, 90, 900))]} {n} {rng.choice('eaé字🙂')}"
            for n in range(N_TEXTS)
        ]
        self.expected: dict[tuple[int, bool], Sequence[Any]] = {}
        for version, special in itertools.product(range(len(NORMALIZERS)), (True, False)):
            own = normalized(plain, version)
            found = own.encode_batch(self.texts, add_special_tokens=special)
            self.expected[version, special] = [TokenIds(one.ids) for one in found]
        self.n_begun = self.n_done = 0  # changes of the tokenizer

    def work(self, number: int, seed: int) -> None:
        """Ask for texts until the part is over."""
        rng = random.Random(seed * 1000 + number)
        ask, texts, expected = self.tokenizer.token_ids, self.texts, self.expected
        while not self.is_over.is_set():
            counts: Counter[str] = Counter()
            for _ in range(CALLS_AT_ONCE):
                # The first texts come most often, as some prompts do in traffic.
                place = int(len(texts) * rng.random() ** 8)
                special, scope = rng.random() < 0.5, rng.choice(SCOPES)
                first = self.n_done
                ids = ask(texts[place], add_special_tokens=special, scope=scope)
                last = self.n_begun
                counts["ids"] += len(ids)
                right = expected[first % len(NORMALIZERS), special][place]
                if ids != right and not any(
                    ids == expected[version % len(NORMALIZERS), special][place]
                    for version in range(first, last + 1)
                ):
                    self.fault(f"wrong ids of text {place} between changes {first} and {last}")
                if rng.random() * CLEAR_ONE_IN < 1:
                    counts["clears"] += 1
                    self.tokenizer.cache_clear(scope=rng.choice(SCOPES[1:]))
            counts["calls"] += CALLS_AT_ONCE
            self.add(counts)

    def meanwhile(self) -> None:
        """Check the budgets, and change the tokenizer when it is time."""
        stats = self.tokenizer.cache_stats().l0
        if stats.n_bytes > L0.l0_max_bytes or stats.n_entries > L0.l0_max_entries:
            self.fault(f"{stats.n_entries:,} entries and {stats.n_bytes:,} bytes in L0")
        if time.monotonic() - self.began > CHANGE_EVERY_S * (self.n_done + 1):
            self.n_begun += 1
            version = NORMALIZERS[self.n_begun % len(NORMALIZERS)]()
            self.tokenizer.normalizer = version
            self.n_done += 1

    def check(self, report: Report) -> None:
        """Check the counters: each call was a hit, or encoded, or waited for another's encoding."""
        stats = self.tokenizer.cache_stats()
        n_told = stats.l0.hits + stats.encoded_texts + stats.shared
        report.fact("L0: calls", f"{self.counts['calls']:,}, {dict(self.counts)}")
        report.fact("L0: changes of the tokenizer", self.n_done)
        report.fact("L0: counters", stats.l0)
        # A call that looks its text up while the tokenizer is changed may find the old cache, whose
        # counters have been added up already.
        n_lost = self.counts["calls"] - n_told
        is_right = 0 <= n_lost <= self.n_threads * self.n_done
        found = f"{n_lost:,} were lost during {self.n_done:,} changes"
        report.check("L0: each call is counted once", is_right=is_right, found=found)
        # A caller that finds the text landed has missed first.
        n_missed = stats.encoded_texts + stats.shared
        n_landed = stats.l0.misses - n_missed
        report.check(
            "L0: each miss has a cause, and was encoded or shared or had landed",
            is_right=sum(stats.l0.misses_by_reason.values()) == stats.l0.misses and n_landed >= 0,
            found=f"{n_landed:,} had landed",
        )
        report.check("L0: texts were evicted", is_right=stats.l0.evictions > 0)
        self.tokenizer._tokcache._generation.l0._check()


# ---- L1


def real_tokenizers() -> dict[str, Tokenizer]:
    """Return the tokenizers at hand, by name."""
    found = {TINY: tokenizer_file(TINY)}
    folder = shared_data()
    for file in sorted(folder.glob("tokenizers/*/tokenizer.json")) if folder else ():
        found[file.parent.name] = file
    made = {name: Tokenizer.from_file(str(file)) for name, file in found.items()}
    for each in made.values():  # `token_ids` neither truncates nor pads
        each.no_truncation()
        each.no_padding()
    return made


class L1Part(Part):
    """Texts that share passages, on every tokenizer at hand."""

    def prepare(self, seed: int) -> None:
        """Make the tokenizers and the passages."""
        self.plain = real_tokenizers()
        self.wrapped = {name: wrap(one, L1) for name, one in self.plain.items()}
        self.verified = {name: wrap(one, VERIFIED) for name, one in self.plain.items()}
        self.asked: dict[str, Counter[str]] = {name: Counter() for name in self.plain}
        source = {kind: workload.endless(kind, seed) for kind in workload.KINDS}
        self.passages = [next(source[kind])[:700] for kind in workload.KINDS for _ in range(60)]

    def work(self, number: int, seed: int) -> None:
        """Ask for texts until the part is over."""
        rng = random.Random(seed * 1000 + number)
        names = list(self.wrapped)
        for call in itertools.count():
            name = rng.choice(names)
            counts: Counter[str] = Counter()
            asked: Counter[str] = Counter()
            for n in range(CALLS_AT_ONCE // 10):
                passages = rng.choices(self.passages, k=rng.randrange(1, 4))
                # Each text is a new one; the number is at a place that changes one passage.
                cut = rng.randrange(len(passages[0]) + 1)
                passages[0] = f"{passages[0][:cut]} {number}.{call}.{n} {passages[0][cut:]}"
                text, special = "\n\n".join(passages), rng.random() < 0.5
                ids = self.wrapped[name].token_ids(text, add_special_tokens=special)
                counts["ids"] += len(ids)
                asked["chars"] += len(text)
                if rng.random() * VERIFY_ONE_IN < 1:
                    counts["verified"] += 1
                    again = self.verified[name].token_ids(text, add_special_tokens=special)
                    right = self.plain[name].encode(text, add_special_tokens=special).ids
                    if not ids == again == right:
                        self.fault(f"wrong ids of {name} for a text of {len(text)} characters")
            counts["calls"] = asked["calls"] = CALLS_AT_ONCE // 10
            with self.lock:
                self.asked[name] += asked
            self.add(counts)
            if self.is_over.is_set():
                return

    def meanwhile(self) -> None:
        """Check the budgets."""
        for name, each in itertools.chain(self.wrapped.items(), self.verified.items()):
            n_bytes = each.cache_stats().l1.n_bytes
            if n_bytes > L1.l1_max_bytes:
                self.fault(f"{n_bytes:,} bytes in L1 of {name}")

    def check(self, report: Report) -> None:
        """Check the counters of every tokenizer, and that its L1 is still in use."""
        report.fact("L1: answers", f"{self.counts['calls']:,}, {dict(self.counts)}")
        wrong, n_evictions, n_cut = [], 0, 0
        for name, each in self.wrapped.items():
            stats, asked = each.cache_stats(), self.asked[name]
            own = stats.l1
            n_refused = sum(own.refusals.get(reason, 0) for reason in TEXT_REFUSALS)
            n_told = own.hits + own.misses + n_refused
            l1 = each._tokcache.l1
            is_off = l1 is None or l1.off is not None
            n_cut += own.hits + own.misses
            n_evictions += own.evictions
            why = own.refusals, self.verified[name].cache_stats().l1.refusals
            if any("differences" in refusals for refusals in why):
                wrong.append(f"{name}: a difference")
            if not is_off and n_told != asked["calls"]:
                wrong.append(f"{name}: {n_told:,} of {asked['calls']:,} texts")
            if not is_off and not n_refused and own.lookup_chars != asked["chars"]:
                wrong.append(f"{name}: {own.lookup_chars:,} of {asked['chars']:,} characters")
            if l1 is not None:
                l1.cache._check()
        report.fact("L1: tokenizers", ", ".join(self.wrapped))
        report.fact("L1: texts cut, chunks evicted", f"{n_cut:,}, {n_evictions:,}")
        report.check("L1: each text and character is counted once", is_right=not wrong,
                     found="; ".join(wrong))  # fmt: skip
        report.check("L1: most texts are cut", is_right=2 * n_cut > self.counts["calls"])


# ---- the command


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--seconds", type=float, default=1200.0, help="half of them for each part")
    parser.add_argument("--operations", type=int, default=10_000_000, help="calls of L0 at most")
    parser.add_argument("--answers", type=int, default=1_000_000, help="texts of L1 at most")
    parser.add_argument("--threads", type=int, default=N_THREADS)
    parser.add_argument("--seed", type=int, default=None, help="by default a random one")


def run(options: argparse.Namespace, report: Report) -> None:
    """Run both parts, and report every fault."""
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    report.fact("seed", seed)
    half = options.seconds / 2
    use_one_arena()
    run_part(L0Part(half, options.operations), options.threads, seed, report)
    run_part(L1Part(half, options.answers), options.threads, seed, report)


def run_part(part: L0Part | L1Part, n_threads: int, seed: int, report: Report) -> None:
    """Run one part, and report every fault."""
    name = "L0" if isinstance(part, L0Part) else "L1"
    part.prepare(seed)
    gc.collect()
    part.began = time.monotonic()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        part.run(lambda number: part.work(number, seed), n_threads, part.meanwhile)
    finally:
        sys.setswitchinterval(interval)
    taken = time.monotonic() - part.began
    report.fact(f"{name}: calls a second", round(part.counts["calls"] / taken))
    part.check(report)
    title = f"{name}: right ids, budgets kept, no error"
    report.check(title, is_right=not part.faults, found="; ".join(part.faults[:5]))
    report.fact(f"{name}: memory, MB", round(memory_bytes() / 1e6, 1))
    title, growth = f"{name}: memory grown over the last half", part.growth()
    if taken >= MIN_SECONDS_OF_SLOPE:
        report.bar(title, growth, MAX_GROWTH, "of it", most=True)
    else:
        report.fact(title, f"{growth:.2%}")
