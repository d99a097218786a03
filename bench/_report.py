"""Parts that all benchmarks share: the machine's description, bars, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the option `--json FILE`."""
    made = argparse.ArgumentParser(prog="python -m bench", description=doc)
    made.add_argument("--json", type=Path, help="write the figures to this file")
    return made


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


def show_bars(bars: list[Bar]) -> list[dict[str, Any]]:
    """Print every bar; return them for the JSON file."""
    for bar in bars:
        print(bar, flush=True)
    return [asdict(bar) | {"met": bar.is_met} for bar in bars]


def finish(figures: dict[str, Any], file: Path | None) -> None:
    """Write `figures` to `file` if one was named."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"wrote {file}")
