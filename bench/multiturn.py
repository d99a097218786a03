"""Agent chats replayed turn by turn: tokenizers, other encoders, tokcache; microseconds a prompt.

Every system has a process of its own, in plain memory, or on huge pages with `--huge-pages`.
Prompts are rendered first. The ids of every system are compared with those of tokenizers before
anything is timed: other encoders that differ are timed and marked, tokcache must not differ. In
every round each system, new and with nothing cached, replays all prompts, in random order. Slow
systems take part in every third round. Figures are medians. Three columns: back to back; with the
CPU's cache disturbed before each call; and with the text made after the disturbance, as by a server
that has just parsed it (bench/_disturb.py).

"Known" are prompts of about 12k characters that were replayed before, with room for one whole
prompt in L0, so that tokcache assembles each from cached segments; "L0" is a hit of the whole text.
`--next FOLDER` names a folder with tokenizers 1.0 (`pip install --pre --target FOLDER
"tokenizers>=1.0.0rc0"`), which can't be imported beside the release that tokcache uses.
"""

from __future__ import annotations

import argparse
import random
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from tokenizers import Tokenizer

from bench._disturb import DISTURBED, MODES, QUIET
from bench._process import HUGE_PAGES, Worker
from bench._report import Report, progress
from bench.adapters import tokenizing as peers
from bench.workloads import chats
from bench.workloads.data import add_tokenizer, default_tokenizers, tokenizer_file

PACKAGES = ("tokenizers", "fastokens", "gigatoken", "numpy")
UNIT = "us a prompt"
BAR = (
    "at least 60 times as fast as tokenizers and 3 as tokenizers 1.0; at most 3 times a hit "
    "of L0 for a known prompt"
)
IN_ALL = ("--tokenizer", "qwen2.5", "--rounds", "2", "--chats", "12")
BASE, ARRAY = "tokenizers", "gigatoken, array API"
OVER_BASE, OVER_GIGA = peers.ENGINES
SLOW = (BASE, "tokenizers, encode_batch_fast", "dict over tokenizers")
IN_KNOWN = (ARRAY, "fastokens, segments, flat API", peers.NEXT, *peers.ENGINES)
L0_HIT = "tokcache, L0"
KNOWN_CHARS, N_KNOWN = 12_000, 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_tokenizer(parser)
    parser.add_argument("--chats", type=int, help="use only the first CHATS chats")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--huge-pages", action="store_true", help="memory on huge pages")
    parser.add_argument("--next", type=Path, metavar="FOLDER", help="has tokenizers 1.0")


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare, then measure, every tokenizer."""
    for name in options.tokenizer or default_tokenizers("qwen2.5", "phi-3-mini"):
        measure(name, options, report)


def measure(name: str, options: argparse.Namespace, report: Report) -> None:
    """Compare, then measure, one tokenizer."""
    file = tokenizer_file(name)
    source, found = chats.load(options.chats)
    prompts = chats.prompts(found, Tokenizer.from_file(str(file)))
    size = f"{len(prompts):,} prompts of {len(found)} chats, mean {mean(map(len, prompts)):,.0f}"
    report.fact(f"{name}: workload", f"{source}, {size} characters")
    memory = HUGE_PAGES if options.huge_pages else {}
    with ExitStack() as opened:
        workers = {}
        for system in peers.SYSTEMS:
            if system == peers.NEXT and options.next is None:
                continue
            side = str(options.next) if system == peers.NEXT else None
            worker = Worker(
                "bench.adapters.replaying:Replay",
                system,
                str(file),
                prompts,
                settings=memory,
                side=side,
            )
            opened.callback(worker.close)
            workers[system] = worker
        notes = compare(name, workers, report)
        us = replays(workers, options.rounds)
        report.columns(f"{name}: agent chats", "us a prompt", us, base=BASE, notes=notes)
        shares = workers[OVER_BASE].ask("miss_percent")
        known = known_prompts(workers, prompts, options.rounds, report, name)
        report.columns(f"{name}: known prompts", "us a prompt", known, base=OVER_BASE)
        bars(name, us, known, shares, report)


def compare(name: str, workers: dict[str, Worker], report: Report) -> dict[str, str]:
    """Compare ids with those of tokenizers; remove systems that can't be built; return notes."""
    expected = workers[BASE].ask("ids")
    notes = {BASE: "the ids that count"}
    for system, worker in list(workers.items()):
        if system == BASE:
            continue
        try:
            given = worker.ask("ids")
        except peers.Unavailable as reason:
            report.line(f"  unavailable: {system}: {reason}")
            del workers[system]
            continue
        n_different = sum(map(bytes.__ne__, given, expected))
        notes[system] = f"{n_different:,} prompts differ" if n_different else "ids equal"
        if system in peers.ENGINES:
            report.check(f"{name}: ids of {system}", is_right=not n_different, found=notes[system])
    return notes


def replays(workers: dict[str, Worker], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the microseconds of every round, by mode and system."""
    rng = random.Random(7)
    us: dict[str, dict[str, Any]] = {mode: {name: [] for name in workers} for mode in MODES}
    with progress() as shown:
        for turn in shown.track(range(rounds), description="replaying"):
            for name in rng.sample(list(workers), len(workers)):
                if name in SLOW and turn % 3:
                    continue
                for mode in MODES:
                    us[mode][name].append(workers[name].ask("replay", mode))
    return us


def known_prompts(
    workers: dict[str, Worker], prompts: list[str], rounds: int, report: Report, name: str
) -> dict[str, dict[str, Any]]:
    """Return the microseconds of prompts whose segments are all cached, and of hits of L0."""
    unlike = dict.fromkeys(prompts)  # equal neighbours would hit in L0
    near = sorted(unlike, key=lambda prompt: abs(len(prompt) - KNOWN_CHARS))[:N_KNOWN]
    report.fact(f"{name}: known prompts, mean characters", round(mean(map(len, near))))
    rng = random.Random(9)
    us: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        us[mode] = {one: [] for one in (*workers, L0_HIT) if one in IN_KNOWN or one == L0_HIT}
    for one in us[QUIET]:
        if one != L0_HIT:
            held = workers[one].ask("prepare_known", near, {"l0_max_entries": 1})
            if one in peers.ENGINES:
                report.check(f"{name}: {one} holds every segment", is_right=held)
    for _ in range(4 * rounds):
        for one in rng.sample(list(us[QUIET]), len(us[QUIET])):
            if one != L0_HIT:
                for mode in MODES:
                    us[mode][one].append(workers[one].ask("known", mode))
    workers[OVER_BASE].ask("prepare_known", near, {})  # with room for all prompts in L0
    for _ in range(4 * rounds):
        for mode in MODES:
            us[mode][L0_HIT].append(workers[OVER_BASE].ask("known", mode))
    return us


def bars(
    name: str,
    us: dict[str, dict[str, Any]],
    known: dict[str, dict[str, Any]],
    shares: dict[str, float],
    report: Report,
) -> None:
    """Report the bars."""

    def faster(mode: str, peer: str, ours: str, figures: dict[str, dict[str, Any]] = us) -> Any:
        both: list[Any] = [figures[mode].get(each) for each in (peer, ours)]
        return median(both[0]) / median(both[1]) if all(both) else None

    for mode, least in ((QUIET, 2.5), (DISTURBED, 1.7)):
        report.bar(
            f"{name}: tokcache over gigatoken, {mode}", faster(mode, ARRAY, OVER_GIGA), least
        )
    report.bar(f"{name}: tokcache over tokenizers, quiet", faster(QUIET, BASE, OVER_BASE), 60)
    if peers.NEXT in us[QUIET]:
        for mode in (QUIET, DISTURBED):
            best = max(faster(mode, peers.NEXT, ours) or 0 for ours in peers.ENGINES)
            report.bar(f"{name}: tokcache over tokenizers 1.0, {mode}", best, 3)
    report.bar(f"{name}: miss the chunks", shares.get("chunk_miss"), 5.5, "%", most=True)
    report.bar(f"{name}: reach the engine", shares.get("engine"), 1, "%", most=True)
    for mode in (QUIET, DISTURBED):
        over = faster(mode, OVER_BASE, L0_HIT, known)
        report.bar(f"{name}: a known prompt over L0's hit, {mode}", over, 3, most=True)
