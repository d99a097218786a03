"""The page of a run's results: bars, how tokcache compares with its peers, all figures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench._report import number, summary
from tokcache.replay.report import Chart, Figure, Heading, Part, Report, Table, charts
from tokcache.replay.report.page import render

_OURS = "tokcache"
_BOUNDS = {"==", "memcpy", "list.copy"}  # part of the work, which no system can do without
_MOST_BARS, _MOST_LINES, _MOST_CHARS = 12, 3, 58
_LEAST_ROUNDS = 10
_SHOWN = 0.95  # of the rounds: a few take a hundred times as long on a busy machine
_TIMES = {"ns", "us", "ms", "s"}

Run = dict[str, Any]


def main(argv: list[str]) -> int:
    """Write the page of a JSON file of results."""
    parser = argparse.ArgumentParser(prog="python -m bench page", description=__doc__)
    parser.add_argument("results", type=Path, help="written by run --json or all --json")
    parser.add_argument("page", type=Path)
    options = parser.parse_args(argv)
    from bench._compare import read  # noqa: PLC0415 (numpy)

    options.page.write_text(page(read(options.results)), encoding="utf-8")
    print(f"wrote {options.page}")
    return 0


def page(run: Run) -> str:
    """Return the HTML of a run."""
    benchmarks: dict[str, Run] = run["benchmarks"]
    ran = {name: one for name, one in benchmarks.items() if "figures" in one and not one["skipped"]}
    bars = [(name, bar) for name, one in ran.items() for bar in one["bars"]]
    wrong = [f"{name}: {check}" for name, one in ran.items()
             for check, is_right in one["checks"].items() if not is_right]  # fmt: skip
    n_met = sum(bar["met"] for _, bar in bars)
    n_checks = sum(len(one["checks"]) for one in ran.values())
    said = []
    if bars:
        said.append(f"{n_met} of {len(bars)} bars were met")
    if n_checks:
        said.append(
            f"{len(wrong)} of {n_checks} checks of results failed"
            if wrong
            else f"all {n_checks} checks of results were right"
        )
    told = ", and ".join(said) or "no bars are stated"
    sentence = f"{len(ran)} of {len(benchmarks)} benchmarks measured: {told}."
    environment = run["environment"]
    seconds = sum(one.get("seconds", 0) for one in benchmarks.values())
    figures = []
    if bars:
        how = "limits that the benchmarks state"
        figures.append(Figure("Bars met", f"{n_met} of {len(bars)}", how))
    if n_checks:
        how = "results, before any was timed"
        figures.append(Figure("Checks", f"{n_checks - len(wrong)} of {n_checks}", how))
    figures += [
        Figure("Time", f"{seconds / 60:.0f} min", f"on {environment['cores']} cores"),
        Figure("Commit", environment["commit"], f"Python {environment['python']}"),
    ]
    parts: list[Part] = list(_bars(bars))
    for name, one in ran.items():
        parts += _benchmark(name, one)
    notes = [f"CPU: {environment['cpu']}"]
    notes += [f"Wrong: {each}" for each in wrong]
    for name, one in benchmarks.items():
        if "failed" in one:
            notes.append(f"{name} failed with exit code {one['failed']}")
        elif one["skipped"]:
            notes.append(f"{name} was skipped: {one['skipped']}")
    return render(Report("tokcache benchmarks", sentence, figures, parts, notes))


def _bars(bars: list[tuple[str, Run]]) -> Iterator[Table]:
    """Yield the table of the missed bars, and a folded one of the met bars."""
    for title, is_met in (("Missed bars", False), ("Met bars", True)):
        rows = [_bar(name, bar) for name, bar in bars if bool(bar["met"]) is is_met]
        if rows:
            head = ("Bar", "Found", "Limit")
            yield Table(title, head, rows, numbers=frozenset({1, 2}), is_folded=is_met)


def _bar(name: str, bar: Run) -> tuple[str, str, str]:
    value = "not measured" if bar["value"] is None else f"{number(bar['value'])} {bar['unit']}"
    kind = "at most" if bar["is_ceiling"] else "at least"
    return f"{name}: {bar['name']}", value, f"{kind} {bar['limit']:g} {bar['unit']}"


def _benchmark(name: str, one: Run) -> Iterator[Part]:
    versions = [f"{each} {found}" for each, found in one["packages"].items() if found]
    n_processes = int(one["options"].get("processes", 1))
    in_processes = f"; measured in {n_processes} processes" if n_processes > 1 else ""
    if "rounds" in one["options"]:
        in_processes += f"; {one['options']['rounds']} rounds"
    text = f"{summary(name)} With {', '.join(versions)}{in_processes}; {one['seconds']:.0f} s."
    yield Heading(name, text)
    measured = [each for each in one["figures"] if each["processes"]]
    if chart := _against_peers(measured):
        yield chart
    if chart := _distribution(measured):
        yield chart
    rows = []
    for case, figures in groupby(measured, _case):
        by_system = {each["system"]: each for each in figures}
        for system, each in by_system.items():
            values = _values(each)
            base = by_system.get(each["base"] or "")
            over = f"{median(values) / median(_values(base)):.2f}" if base and any(values) else ""
            p90 = number(quantiles(values, n=10)[-1]) if len(values) >= _LEAST_ROUNDS else ""
            rows.append(
                (case, system, number(median(values)), p90, each["unit"], over, each["note"])
            )
    if rows:
        head = ("Case", "System", "Median", "p90", "Unit", "Over the base", "")
        how = "p90: nine of ten rounds took no more."
        numbers = frozenset({2, 3, 5})
        yield Table(f"All {len(rows)} figures of {name}", head, rows, how, numbers, is_folded=True)
    if one["facts"]:
        facts = [(key, str(value)) for key, value in one["facts"].items()]
        yield Table(f"More of {name}", ("", ""), facts, "", frozenset(), is_folded=True)


def _case(figure: Run) -> str:
    return f"{figure['title']}, {figure['way']}" if figure["way"] else str(figure["title"])


def _values(figure: Run) -> list[float]:
    return [value for each in figure["processes"] for value in each]


def _against_peers(figures: list[Run]) -> Chart | None:
    """Return how tokcache compares with the best peer, by case."""
    found: dict[str, float] = {}
    peers_of: dict[str, str] = {}
    for case, group in groupby(figures, lambda one: (_case(one), one["unit"])):
        each = list(group)
        best = max if each[0]["is_higher_better"] else min
        middle = {one["system"]: median(_values(one)) for one in each}
        ours = [value for system, value in middle.items() if system.startswith(_OURS)]
        peers = {
            system: value
            for system, value in middle.items()
            if not system.startswith(_OURS) and system not in _BOUNDS
        }
        if not ours or not peers or min(*ours, *peers.values()) <= 0:
            continue
        peer = best(peers, key=peers.__getitem__)
        own = best(ours)
        found[case[0]] = own / peers[peer] if each[0]["is_higher_better"] else peers[peer] / own
        peers_of[case[0]] = peer
    if not found:
        return None
    shown = dict(list(found.items())[:_MOST_BARS])
    svg = charts.bars(
        {_short(case, f" ({peers_of[case]})"): ratio for case, ratio in shown.items()},
        x_label="times as good as the best peer",
        write=lambda ratio: f"{ratio:.2f}",
    )
    how = "Medians; the best peer in brackets. Above 1: tokcache takes less, or does more, than it."
    if len(found) > len(shown):
        how += f" The first {len(shown)} of {len(found)} cases; the table has all."
    return Chart("Against the best peer", svg, how)


def _short(case: str, end: str) -> str:
    n_chars = _MOST_CHARS - len(end)
    return (case if len(case) <= n_chars else f"{case[: n_chars - 1]}…") + end


def _distribution(figures: list[Run]) -> Chart | None:
    """Return the rounds of the first case whose times are known by round, as shares."""
    for case, group in groupby(figures, _case):
        each = [one for one in group
                if len(_values(one)) >= _LEAST_ROUNDS and one["system"] not in _BOUNDS]  # fmt: skip
        unit = each[0]["unit"] if each else ""
        if unit.split(" ")[0] not in _TIMES or not each[0]["system"].startswith(_OURS):
            continue
        series = {}
        for one in each[:_MOST_LINES]:
            values = sorted(_values(one))
            if values[0] <= 0:
                continue
            n_shown = math.ceil(_SHOWN * len(values))
            shares = [(at + 1) / len(values) for at in range(n_shown)]
            series[one["system"]] = values[:n_shown], shares
        if not series:
            continue
        svg = charts.lines(
            series,
            x_label=f"{unit}, {case}",
            y_label="rounds that took no longer",
            write_x=number,
        )
        n_rounds = len(_values(each[0]))
        how = f"{n_rounds} rounds of each system, in turns; the slowest 5% are not shown."
        return Chart("Spread of the rounds", svg, how)
    return None
