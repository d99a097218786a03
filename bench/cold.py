"""One 128 KiB prompt with nothing cached: tokcache over an engine against that engine alone.

English, code, JSON, Russian and Chinese, on one core and on two. Each kind of text has a new
process, which is bound to its cores before anything is imported. Every sample has new objects,
created outside the timed part, so the engine's own cache of words is empty, too. Ids are compared
first. "words known" is the same with tokcache cleared and tokenizers' cache of words kept, as for
a prompt of known words in new sentences. Systems take turns in random order.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

import numpy as np

from bench._disturb import fresh
from bench._process import in_new_process, settle
from bench._report import Report, progress
from bench.adapters import tokenizing as peers
from bench.workloads import texts
from bench.workloads.data import add_tokenizer, default_tokenizers, tokenizer_file

PACKAGES = ("tokenizers", "gigatoken", "numpy")
UNIT = "ms a prompt"
BAR = (
    "at least 1.3 times as fast as tokenizers on one core and 1.8 to 5 on two; at most 1.15 "
    "times gigatoken's time"
)
IN_ALL = ("--rounds", "3", "--kinds", "English", "Chinese")
N_BYTES = 128 << 10
BASE, GIGA = "tokenizers", "gigatoken, array API"
OVER_BASE, OVER_GIGA = peers.ENGINES
SYSTEMS = (BASE, OVER_BASE, GIGA, OVER_GIGA)
MIN_RATIO = {
    1: dict.fromkeys(texts.KINDS, 1.3),
    2: {"English": 2.5, "code": 2.0, "JSON": 5.0, "Russian": 1.8, "Chinese": 1.8},
}
MAX_OF_GIGATOKEN = 1.15


def encode_ms(system: peers.Encoder, text: str) -> float:
    """Return the milliseconds for one new string object."""
    given = fresh(text)
    gc.collect()
    settle()
    gc.disable()
    began = perf_counter_ns()
    system.encode(given)
    elapsed = perf_counter_ns() - began
    gc.enable()
    return elapsed / 1e6


def compare(file: Path, text: str) -> dict[str, str]:
    """Return "equal", "differs", or the reason why it is unavailable, for every system."""
    expected = np.array(peers.build(BASE, file).encode(text), np.int32)
    found = {}
    for name in SYSTEMS:
        try:
            system = peers.build(name, file)
        except peers.Unavailable as reason:
            found[name] = f"unavailable: {reason}"
            continue
        found[name] = "differs" if peers.n_different(system, [text], [expected]) else "equal"
    return found


def measure_here(tokenizer: str, kind: str, rounds: int) -> dict[str, Any]:
    """Measure one kind of text in this process, on its cores."""
    file, text = Path(tokenizer), texts.text(kind, N_BYTES)
    ids = compare(file, text)
    order = [name for name, found in ids.items() if not found.startswith("unavailable")]
    cold: dict[str, list[float]] = {name: [] for name in order}
    words_known: dict[str, list[float]] = {name: [] for name in order if name in (BASE, OVER_BASE)}
    rng = random.Random(7)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            system = peers.build(name, file)
            cold[name].append(encode_ms(system, text))
            if name in words_known:
                if isinstance(system, peers.Tokcache):
                    system.tokenizer.cache_clear()
                words_known[name].append(encode_ms(system, text))
    return {
        "ids": ids,
        "chars": len(text),
        "ms": cold,
        "ms, words known": words_known,
    }


def measure(file: Path, kind: str, n_cores: int, rounds: int) -> dict[str, Any]:
    """Measure in a new process with `n_cores`."""
    cores = sorted(os.sched_getaffinity(0))[:n_cores]
    found: dict[str, Any] = in_new_process(
        "bench.cold",
        "measure_here",
        str(file),
        kind,
        rounds,
        first=f"import os; os.sched_setaffinity(0, {cores})",
        settings={
            "RAYON_NUM_THREADS": str(n_cores),
            "TOKENIZERS_PARALLELISM": "true" if n_cores > 1 else "false",
        },
    )
    return found


def ratio(ms: dict[str, list[float]], name: str, base: str) -> float | None:
    """Return the time of `name` over that of `base`, None if one was not measured."""
    return median(ms[name]) / median(ms[base]) if name in ms and base in ms else None


def show(case: str, found: dict[str, Any], limit: float, report: Report) -> None:
    """Report the figures of one text."""
    ms, ids = found["ms"], found["ids"]
    notes = {name: f"ids {each}" for name, each in ids.items()}
    rows = {name: ms.get(name) for name in ids}
    known = {f"{name}, words known": each for name, each in found["ms, words known"].items()}
    report.table(case, "ms", rows | known, base=BASE, notes=notes)
    for name in peers.ENGINES:
        if not ids[name].startswith("unavailable"):
            report.check(f"{case}: ids of {name}", is_right=ids[name] == "equal")
    report.bar(f"{case}: tokenizers / tokcache over it", ratio(ms, BASE, OVER_BASE), limit)
    over = ratio(ms, OVER_GIGA, GIGA)
    report.bar(f"{case}: tokcache over gigatoken / it", over, MAX_OF_GIGATOKEN, most=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_tokenizer(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", choices=texts.KINDS, default=list(texts.KINDS))


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure every tokenizer on all texts."""
    available = len(os.sched_getaffinity(0))
    for name in options.tokenizer or default_tokenizers("qwen2.5"):
        file = tokenizer_file(name)
        for n_cores, limits in MIN_RATIO.items():
            if n_cores > available:
                report.line(f"only {available} core(s) here: nothing is measured on {n_cores}")
                continue
            with progress() as shown:
                for kind in shown.track(options.kinds, description=f"{name}, {n_cores} core(s)"):
                    found = measure(file, kind, n_cores, options.rounds)
                    size = f"{N_BYTES >> 10} KiB, {found['chars']:,} characters"
                    case = f"{name}, {kind}, {n_cores} core(s), {size}"
                    show(case, found, limits[kind], report)
