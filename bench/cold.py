"""One 128 KiB prompt with nothing cached: tokcache over an engine against that engine alone.

English, code, JSON, Russian and Chinese, on one core and on two. Each kind of text has a new
process, which is bound to its cores before anything is imported. Every sample has new objects,
created outside the timed part, so the engine's own cache of words is empty, too. Ids are compared
first. "Words known" is the same with tokcache cleared and tokenizers' cache of words kept, as for
a prompt of known words in new sentences. Systems take turns in random order.
"""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

import numpy as np

from bench import _report
from bench._process import in_new_process, settle
from bench.adapters import tokenizing as peers
from bench.workloads import texts
from bench.workloads.data import default_tokenizers, fresh, tokenizer_file

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
        "ms": {name: median(values) for name, values in cold.items()},
        "ms, words known": {name: median(values) for name, values in words_known.items()},
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


def ratio(ms: dict[str, float], name: str, base: str) -> float | None:
    """Return the time of `name` over that of `base`, None if one was not measured."""
    return ms[name] / ms[base] if name in ms and base in ms else None


def bars(n_cores: int, kind: str, found: dict[str, Any]) -> list[_report.Bar]:
    """Return the bars for this text on `n_cores`."""
    case, ms = f"{kind}, {n_cores} core(s)", found["ms"]
    limit = MIN_RATIO[n_cores][kind]
    return [
        _report.Bar(f"{case}: tokenizers / tokcache over it", ratio(ms, BASE, OVER_BASE), limit),
        _report.Bar(
            f"{case}: tokcache over gigatoken / it",
            ratio(ms, OVER_GIGA, GIGA),
            MAX_OF_GIGATOKEN,
            is_ceiling=True,
        ),
    ]


def show(n_cores: int, kind: str, found: dict[str, Any]) -> None:
    """Print the figures of one text."""
    print(f"{kind}, {found['chars']:,} characters, {n_cores} core(s)")
    for name, ids in found["ids"].items():
        if name not in found["ms"]:
            print(f"    {name:25} {ids}")
            continue
        known = found["ms, words known"].get(name)
        more = "" if known is None else f"  (words known: {known:,.2f} ms)"
        print(f"    {name:25} {found['ms'][name]:9,.2f} ms  ids {ids}{more}")


def run(name: str, rounds: int) -> dict[str, Any]:
    """Measure one tokenizer on all texts."""
    file = tokenizer_file(name)
    print(f"{name}: {N_BYTES >> 10} KiB of UTF-8, nothing cached; medians of {rounds} rounds")
    available = len(os.sched_getaffinity(0))
    figures, reached = {}, []
    for n_cores in MIN_RATIO:
        if n_cores > available:
            print(f"only {available} core(s) here: the bars of {n_cores} are not measured")
        for kind in texts.KINDS:
            found: dict[str, Any] = {"ids": {}, "ms": {}}
            if n_cores <= available:
                found = measure(file, kind, n_cores, rounds)
                show(n_cores, kind, found)
            reached += _report.show_bars(bars(n_cores, kind, found))
            figures[f"{kind}, {n_cores} core(s)"] = found
    return {"texts": figures, "bars": reached}


def _is_good(one: dict[str, Any]) -> bool:
    ours = [text["ids"].get(name) for text in one["texts"].values() for name in peers.ENGINES]
    return all(ids == "equal" for ids in ours) and all(bar["met"] for bar in one["bars"])


def main(argv: list[str]) -> int:
    """Exit code 1 if tokcache's ids differ or a bar is missed."""
    options = _report.parser(__doc__ or "")
    options.add_argument(
        "--tokenizer",
        action="append",
        help="a tokenizer.json, a real one's name, or tiny; repeatable",
    )
    options.add_argument("--rounds", type=int, default=7)
    args = options.parse_args(argv)
    found = {
        name: run(name, args.rounds) for name in args.tokenizer or default_tokenizers("qwen2.5")
    }
    environment = _report.environment("tokenizers", "gigatoken", "numpy")
    _report.finish({"environment": environment, "tokenizers": found}, args.json)
    return 0 if all(map(_is_good, found.values())) else 1
