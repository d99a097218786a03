"""Measures a benchmark in several new processes, and puts their figures together.

A process has its own memory layout, hash seeds and page colours, and its own share of the other
work on the machine. They move a figure by up to a tenth, and no number of rounds within the process
shows it. So what a figure may be by chance is only known from several processes, one after the
other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench._report import Report, progress


def measure(report: Report, argv: Sequence[str], n: int) -> None:
    """Run a benchmark in `n` processes, and print and keep the figures of all."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="tokcache-bench-") as folder, progress() as shown:
        for number in shown.track(range(n), description=f"{report.name}, {n} processes"):
            own = Path(folder, f"{number}.json")
            words = [*argv, "--processes", "1", "--json", str(own)] + ["--later"] * (number > 0)
            command = [sys.executable, "-m", "bench", "run", report.name, *words]
            done = subprocess.run(  # noqa: S603 (our own words)
                command, check=False, stdout=subprocess.PIPE, text=True
            )
            if not own.is_file():
                report.line(done.stdout)
                sys.exit(f"{report.name}: process {number + 1} ended with {done.returncode}")
            runs.append(json.loads(own.read_text())["benchmarks"][report.name])
    put_together(report, runs)


def put_together(report: Report, runs: Sequence[dict[str, Any]]) -> None:
    """Print and keep the figures of several runs of one benchmark."""
    first = runs[0]
    if first["skipped"]:
        report.skip(first["skipped"])
    of_all = [{_key(one): one["processes"] for one in run["figures"]} for run in runs]
    for (title, unit, base), group in groupby(
        first["figures"], lambda one: (one["title"], one["unit"], one["base"])
    ):
        figures = list(group)
        notes = {one["system"]: one["note"] for one in figures}
        ways: dict[str, dict[str, list[list[float]]]] = {}
        for one in figures:
            values = [each for run in of_all for each in run.get(_key(one), [])]
            ways.setdefault(one["way"], {})[one["system"]] = values
        is_higher_better = figures[0]["is_higher_better"]
        kept: dict[str, Any] = {"notes": notes, "is_higher_better": is_higher_better}
        if "" in ways:
            report.table(title, unit, ways[""], base=base, **kept)
        else:
            report.columns(title, unit, ways, base=base, **kept)
    for run in runs:
        for name, is_right in run["checks"].items():
            report.checks[name] = report.checks.get(name, True) and is_right
    for name, is_right in report.checks.items():
        report.check(name, is_right=is_right)
    for bar in first["bars"]:
        same = [one["value"] for run in runs for one in run["bars"] if one["name"] == bar["name"]]
        known = [value for value in same if value is not None]
        value = median(known) if len(known) == len(same) else None
        report.bar(bar["name"], value, bar["limit"], bar["unit"], most=bar["is_ceiling"])
    for name, value in first["facts"].items():
        report.fact(name, value)


def _key(one: dict[str, Any]) -> tuple[str, str, str, str]:
    return one["title"], one["way"], one["system"], one["unit"]
