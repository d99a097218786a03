"""Agent chats replayed turn by turn: tokenizers, other encoders, tokcache; microseconds a prompt.

Prompts are rendered first. The ids of every system are compared with those of tokenizers before
anything is timed: other encoders that differ are timed and marked, tokcache must not differ. In
every round each system, new and with nothing cached, replays all prompts in random order. Each call
gets a new string object, as in a server. Slow systems take part in every third round. Figures are
medians. Memory is on huge pages and stays with the process when freed, so that no system waits for
new pages.

"All segments cached": prompts of about 12k characters from a replay that the segment cache has
seen, with room for one whole prompt in L0, so that each is assembled from cached segments. Each
system has several replays in turn, so that the CPU caches that the previous system left matter
little. This runs in a new process, because memory that other systems freed would scatter the
allocations.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from time import perf_counter_ns
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from bench import _report
from bench._process import in_new_process, settle, without_page_faults
from bench.adapters import tokenizing as peers
from bench.workloads import chats
from bench.workloads.data import default_tokenizers, fresh, tokenizer_file

BASE, ARRAY = "tokenizers", "gigatoken, array API"
SLOW = (BASE, "tokenizers, encode_batch_fast", "dict over tokenizers")
FRESH = 16  # strings made, then encoded: few enough to stay in the CPU's cache
KNOWN_CHARS, N_KNOWN, A_TURN = 12_000, 64, 8
Encode = Callable[[str], Any]


@dataclass(slots=True)
class Row:
    """One system: why it has no figures, how many prompts differ, microseconds of each round."""

    name: str
    unavailable: str | None = None
    n_different: int = 0
    us: list[float] = field(default_factory=list)
    miss_percent: dict[str, float] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether the ids must be those of tokenizers."""
        return self.name in peers.ENGINES

    @property
    def median_us(self) -> float | None:
        """Median over the rounds, None without rounds."""
        return median(self.us) if self.us else None

    @property
    def verdict(self) -> str:
        """The result of comparing the ids, in words."""
        if not self.n_different:
            return "equal"
        return ("WRONG" if self.is_ours else "not exact") + f": {self.n_different:,} prompts differ"


def replay_us(encode: Encode, prompts: list[str]) -> float:
    """Return the mean microseconds per prompt, without the time to make the strings."""
    elapsed = 0
    gc.disable()
    for start in range(0, len(prompts), FRESH):
        texts = [fresh(prompt) for prompt in prompts[start : start + FRESH]]
        began = perf_counter_ns()
        for text in texts:
            encode(text)
        elapsed += perf_counter_ns() - began
    gc.enable()
    return elapsed / len(prompts) / 1000


def compare(file: Path, prompts: list[str]) -> list[Row]:
    """Return a row per system, with the number of prompts whose ids differ from tokenizers'."""
    encode = peers.build(BASE, file).encode
    expected = [np.array(encode(prompt), np.int32) for prompt in prompts]
    return [_compared(name, file, prompts, expected) for name in peers.SYSTEMS]


def _compared(name: str, file: Path, prompts: list[str], expected: list[Any]) -> Row:
    row = Row(name)
    if name == BASE:
        return row
    try:
        system = peers.build(name, file)
    except peers.Unavailable as reason:
        row.unavailable = str(reason)
        return row
    row.n_different = peers.n_different(system, [fresh(one) for one in prompts], expected)
    if isinstance(system, peers.Tokcache):
        lookup, chunk_miss, engine = system.segment_chars()
        shares = {"chunk_miss": chunk_miss, "engine": engine}
        if lookup:  # otherwise the segment cache is off for this tokenizer
            row.miss_percent = {name: 100 * n / lookup for name, n in shares.items()}
    return row


def measure(rows: list[Row], file: Path, prompts: list[str], rounds: int) -> None:
    """Add the microseconds of every round to the rows."""
    rng = random.Random(7)
    rows = [row for row in rows if row.unavailable is None]
    for turn in range(rounds):
        rng.shuffle(rows)
        for row in rows:
            if row.name in SLOW and turn % 3:
                continue
            system = peers.build(row.name, file)
            gc.collect()
            settle()
            row.us.append(replay_us(system.encode, prompts))


def all_segments_cached(tokenizer: str, n_chats: int | None, rounds: int) -> dict[str, Any]:
    """Time prompts whose segments are all cached, in turn with gigatoken's array API."""
    file = tokenizer_file(tokenizer)
    prompts = chats.prompts(chats.load(n_chats)[1], Tokenizer.from_file(str(file)))
    ours = peers.over("tokenizers", file, l0_max_entries=1)
    systems: dict[str, peers.Encoder] = {"tokcache": ours}
    for name in (ARRAY, "fastokens, segments, flat API"):
        try:
            systems[name] = peers.build(name, file)
        except peers.Unavailable:
            continue
    unlike = dict.fromkeys(prompts)  # equal neighbours would hit in L0
    near = sorted(unlike, key=lambda prompt: abs(len(prompt) - KNOWN_CHARS))[:N_KNOWN]
    for system in systems.values():
        for prompt in (*prompts, *near):  # cache evicted ones again
            system.encode(prompt)
    before, *missed_before = ours.segment_chars()
    samples: dict[str, list[float]] = {name: [] for name in systems}
    rng, order = random.Random(9), list(systems)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            samples[name].append(replay_us(systems[name].encode, A_TURN * near))
    after, *missed_after = ours.segment_chars()
    looked_up = rounds * A_TURN * sum(map(len, near))
    return {
        "us": {name: median(values) for name, values in samples.items()},
        "mean chars": mean(map(len, near)),
        "all cached": missed_before == missed_after and after - before == looked_up,
    }


def bars(rows: dict[str, Row], known: dict[str, Any] | None) -> list[_report.Bar]:
    """Return the bars."""
    hf, giga = (rows[name] for name in peers.ENGINES)
    fastest = min(row.median_us for row in rows.values() if row.median_us and not row.is_ours)
    us = known["us"] if known and known["all cached"] else {}
    miss = hf.miss_percent
    return [
        _report.Bar("tokcache over tokenizers / tokenizers", _ratio(rows[BASE].median_us, hf), 60),
        _report.Bar("tokcache over gigatoken / fastest peer", _ratio(fastest, giga), 2.4),
        _report.Bar("characters that miss the chunks", miss.get("chunk_miss"), 5.5, "%", True),
        _report.Bar("characters that reach the engine", miss.get("engine"), 1, "%", True),
        _report.Bar(
            "all segments cached / gigatoken, array API",
            us[ARRAY] / us["tokcache"] if ARRAY in us else None,
            8,
        ),
    ]


def _ratio(us: float | None, row: Row) -> float | None:
    return us / row.median_us if us and row.median_us else None


def show(rows: list[Row], known: dict[str, Any] | None) -> None:
    """Print a line per system."""
    base = next(row.median_us for row in rows if row.name == BASE)
    print(f"  {'':31} {'us a prompt':>12} {'x tokenizers':>13}  ids")
    for row in rows:
        if row.median_us is None:
            print(f"  {row.name:31} unavailable: {row.unavailable}")
            continue
        ratio = base / row.median_us if base else 0.0
        shares = "".join(f", {key} {value:.2f} %" for key, value in row.miss_percent.items())
        print(f"  {row.name:31} {row.median_us:12,.1f} {ratio:13,.1f}  {row.verdict}{shares}")
    if known:
        cells = ", ".join(f"{name} {value:,.2f} us" for name, value in known["us"].items())
        size = f"{known['mean chars']:,.0f} chars"
        print(f"  all segments cached ({known['all cached']}), {size}: {cells}")


def run(name: str, n_chats: int | None, rounds: int) -> dict[str, Any]:
    """Compare, then measure, for one tokenizer."""
    file = tokenizer_file(name)
    source, found = chats.load(n_chats)
    prompts = chats.prompts(found, Tokenizer.from_file(str(file)))
    size = mean(map(len, prompts))
    print(
        f"{name}: {len(prompts):,} prompts of {len(found)} chats ({source}), mean {size:,.0f}"
        f" characters; medians of {rounds} rounds",
        flush=True,
    )
    rows = compare(file, prompts)
    measure(rows, file, prompts, rounds)
    by_name = {row.name: row for row in rows}
    has_segments = by_name["tokcache over tokenizers"].unavailable is None
    known = (
        in_new_process("bench.multiturn", "all_segments_cached", name, n_chats, 4 * rounds)
        if has_segments
        else None
    )
    show(rows, known)
    return {
        "source": source,
        "n_prompts": len(prompts),
        "mean_chars": size,
        "systems": {
            row.name: {
                "us": row.median_us,
                "us of each round": row.us,
                "n_different": row.n_different,
                "unavailable": row.unavailable,
                "miss_percent": row.miss_percent,
            }
            for row in rows
        },
        "all segments cached": known,
        "bars": _report.show_bars(bars(by_name, known)),
    }


def _is_good(one: dict[str, Any]) -> bool:
    equal = all(one["systems"][name]["n_different"] == 0 for name in peers.ENGINES)
    return equal and all(bar["met"] for bar in one["bars"])


def main(argv: list[str]) -> int:
    """Exit code 1 if tokcache's ids differ or a bar is missed."""
    options = _report.parser(__doc__ or "")
    options.add_argument(
        "--tokenizer",
        action="append",
        help="a tokenizer.json, a real one's name, or tiny; repeatable",
    )
    options.add_argument("--chats", type=int, help="use only the first CHATS chats")
    options.add_argument("--rounds", type=int, default=9)
    args = options.parse_args(argv)
    without_page_faults()
    names = args.tokenizer or default_tokenizers("qwen2.5", "phi-3-mini")
    found = {name: run(name, args.chats, args.rounds) for name in names}
    environment = _report.environment("tokenizers", "fastokens", "gigatoken", "numpy")
    _report.finish({"environment": environment, "tokenizers": found}, args.json)
    return 0 if all(map(_is_good, found.values())) else 1
