"""One style of result for all benchmarks: tables of figures, checks, bars, the JSON file."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

FORMAT = 2  # of the JSON file

# A figure of one system: its values in the order of the rounds, those of each process where several
# measured, or one value.
Values = Sequence[float] | Sequence[Sequence[float]] | float


def summary(name: str) -> str:
    """Return the first line of a benchmark's docstring; its libraries are not imported."""
    file = Path(__file__).with_name(f"{name.replace('-', '_')}.py")
    return file.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 (fixed words)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment(*packages: str) -> dict[str, Any]:
    """Return the conditions of a measurement: versions, CPU, commit."""
    return {
        "python": sys.version.split()[0],
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        "packages": {name: _version(name) for name in ("tokcache", *packages)},
    }


@dataclass(frozen=True, slots=True)
class Figure:
    """The measurements of one system in one case.

    `processes` are the values in the order of the rounds, of each process that measured; it is
    empty if the system was not measured, for the reason in `note`. A table with a column for each
    way of measuring has the ways' figures under one title; `base` is the system that the others are
    divided by.
    """

    title: str
    system: str
    unit: str
    processes: list[list[float]]
    is_higher_better: bool = False
    note: str = ""
    way: str = ""
    base: str | None = None

    @property
    def case(self) -> str:
        """The title and the way of measuring."""
        return f"{self.title}, {self.way}" if self.way else self.title

    @property
    def values(self) -> list[float]:
        """The values of all processes."""
        return [value for each in self.processes for value in each]

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return median(self.values)

    @property
    def p90(self) -> float | None:
        """The value that nine of ten rounds do not exceed; None below ten rounds."""
        values = self.values
        return quantiles(values, n=10)[-1] if len(values) >= 10 else None


def _by_process(given: Values | None) -> list[list[float]]:
    if given is None:
        return []
    if isinstance(given, int | float):
        return [[float(given)]]
    of_one = [float(each) for each in given if isinstance(each, int | float)]
    return [of_one] if of_one else [list(each) for each in given if isinstance(each, Sequence)]


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and its limit; a figure that could not be measured (None) misses the bar."""

    name: str
    value: float | None
    limit: float
    unit: str = "x"
    is_ceiling: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the figure is at least the limit, or at most the limit if that is a ceiling."""
        if self.value is None:
            return False
        return self.value <= self.limit if self.is_ceiling else self.value >= self.limit

    def __str__(self) -> str:
        found = "not measured" if self.value is None else f"{self.value:,.2f} {self.unit}"
        kind = "at most" if self.is_ceiling else "at least"
        verdict = "pass" if self.is_met else "MISS"
        return f"  {verdict}  {self.name}: {found} (bar: {kind} {self.limit:g} {self.unit})"


def number(value: float | None) -> str:
    """Return a figure with three digits that matter, or as a whole number from 100 on."""
    if value is None:
        return ""
    if value and abs(value) < 100:
        digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 3
        return f"{value:,.{digits}f}"
    return f"{value:,.0f}"


@dataclass
class Report:
    """The results of one benchmark, printed as they come."""

    name: str
    packages: tuple[str, ...] = ()
    console: Console = field(default_factory=lambda: Console(width=120, highlight=False))
    found: list[Figure] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None
    is_first: bool = True  # of the processes that measure the same things

    def line(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def fact(self, name: str, value: Any) -> None:
        """Print and keep a result that is not compared: sources, sizes, counters."""
        self.facts[name] = value
        self.line(f"  {name}: {value}")

    def skip(self, reason: str) -> None:
        """Say why nothing is measured here."""
        self.skipped = reason
        self.line(f"skipped: {reason}")

    def check(self, name: str, *, is_right: bool, found: object = "") -> None:
        """Keep whether results were right; a wrong one fails the benchmark."""
        self.checks[name] = self.checks.get(name, True) and is_right
        more = f": {found}" if found != "" else ""
        self.line(f"  {'right' if is_right else 'WRONG'}  {name}{more}")

    def bar(
        self, name: str, value: float | None, limit: float, unit: str = "x", *, most: bool = False
    ) -> None:
        """Print and keep a bar; `most`: the figure must not exceed the limit."""
        self.bars.append(Bar(name, value, limit, unit, most))
        self.line(str(self.bars[-1]))

    def table(
        self,
        case: str,
        unit: str,
        values: Mapping[str, Values | None],
        *,
        base: str | None = None,
        notes: Mapping[str, str] | None = None,
        is_higher_better: bool = False,
    ) -> None:
        """Print a table of one case, a row a system, and keep its figures.

        A system without values (None) has a row with its note alone. `base` names the system by
        whose median the others are divided in the last column.
        """
        notes = notes or {}
        rows: dict[str, Figure | None] = {}
        for system, given in values.items():
            each, note = _by_process(given), notes.get(system, "")
            made = Figure(case, system, unit, each, is_higher_better, note, "", base)
            self.found.append(made)
            rows[system] = made if each else None
        self._print(case, unit, rows, base, notes)

    def _print(
        self,
        case: str,
        unit: str,
        rows: Mapping[str, Figure | None],
        base: str | None,
        notes: Mapping[str, str],
    ) -> None:
        figures = [one for one in rows.values() if one is not None]
        reference = rows.get(base) if base else None
        has_p90 = any(one.p90 is not None for one in figures)
        table = Table(
            title=case, title_justify="left", box=None, pad_edge=False, title_style="bold"
        )
        table.add_column("", min_width=30)
        table.add_column(unit, justify="right")
        if has_p90:
            table.add_column("p90", justify="right")
        if reference is not None:
            table.add_column(f"over {reference.system}", justify="right")
        table.add_column("")
        for system, one in rows.items():
            cells = [system, number(one.value if one else None)]
            if has_p90:
                cells.append(number(one.p90 if one else None))
            if reference is not None:
                share = f"{one.value / reference.value:.2f}" if one and reference.value else ""
                cells.append(share)
            table.add_row(*cells, notes.get(system, ""))
        self.console.print(table)

    def columns(
        self,
        case: str,
        unit: str,
        values: Mapping[str, Mapping[str, Values | None]],
        *,
        base: str,
        notes: Mapping[str, str] | None = None,
        is_higher_better: bool = False,
    ) -> None:
        """Print one table with a column for each way of measuring, and keep its figures.

        `values` are by way, then by system; the ratio to `base` stands in brackets.
        """
        notes = notes or {}
        rows: dict[str, dict[str, Figure]] = {}
        for way, of_systems in values.items():
            for system, given in of_systems.items():
                each, note = _by_process(given), notes.get(system, "")
                made = Figure(case, system, unit, each, is_higher_better, note, way, base)
                self.found.append(made)
                rows.setdefault(system, {})
                if each:
                    rows[system][way] = made
        title = f"\n{case}; {unit}, in brackets over {base}"
        self.console.print(title, style="bold", markup=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        table.add_column("", min_width=30)
        for way in values:
            table.add_column(way, justify="right")
        table.add_column("")
        for system, by_way in rows.items():
            cells = []
            for way in values:
                one, reference = by_way.get(way), rows[base].get(way)
                share = f" ({one.value / reference.value:.2f})" if one and reference else ""
                cells.append(number(one.value if one else None) + share)
            table.add_row(system, *cells, notes.get(system, ""))
        self.console.print(table)

    @property
    def is_good(self) -> bool:
        """Whether all results were right and all bars are met."""
        return all(self.checks.values()) and all(bar.is_met for bar in self.bars)

    def as_json(self, options: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the results for the JSON file."""
        return {
            "options": {name: str(value) for name, value in options.items()},
            "seconds": round(seconds, 1),
            "packages": environment(*self.packages)["packages"],
            "skipped": self.skipped,
            "checks": self.checks,
            "bars": [asdict(bar) | {"met": bar.is_met} for bar in self.bars],
            "figures": [asdict(one) for one in self.found],
            "facts": self.facts,
        }


@contextmanager
def progress() -> Iterator[Progress]:
    """Show progress on stderr while the block runs; nothing where stderr is no terminal."""
    with Progress(console=Console(stderr=True), transient=True) as shown:
        yield shown
