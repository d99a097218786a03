"""Compares two runs of the benchmarks: which figures of tokcache are slower, which are faster.

Two runs are never made under the same conditions: the machine is faster in one of them, or busier.
So the figures of the peers are the control: their code is the same in both runs. The change of a
figure is its ratio between the runs over the median ratio of the peers in the same case, or in the
same benchmark where the case has none. A change counts if it exceeds `--least` and the noise: four
standard errors of the medians, and one and a half times the distance of the peer that is farthest
from that median. Where less than five values were measured, a quarter is taken for the error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench._report import FORMAT, number

LEAST = 0.10  # a change below this is not looked at
_N_ERRORS = 4.0
_N_SPREADS = 1.5
_FEW_VALUES, _ERROR_OF_FEW = 5, 0.25
_OURS = "tokcache"

Key = tuple[str, str, str, str]  # benchmark, case, system, unit


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of tokcache in two runs; `log_ratio` above zero: the second run is worse.

    `control` is the ratio of the peers, `noise` how large a log ratio may be by chance.
    """

    key: Key
    before: float
    after: float
    log_ratio: float
    control: float
    noise: float
    least: float

    @property
    def ratio(self) -> float:
        """How many times as much the second run takes, with the peers' ratio taken out."""
        return math.exp(self.log_ratio)

    @property
    def verdict(self) -> str:
        """The result in a word."""
        if abs(self.log_ratio) <= math.log1p(self.least):
            return "same"
        if abs(self.log_ratio) <= self.noise:
            return "within noise"
        return "slower" if self.log_ratio > 0 else "faster"


def _figures(run: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {
        (name, one["case"], one["system"], one["unit"]): one
        for name, benchmark in run["benchmarks"].items()
        for one in benchmark.get("figures", [])
    }


def _log_median(values: list[float]) -> tuple[float, float]:
    """Return the logarithm of the median, and its standard error by the median deviation."""
    logs = [math.log(value) for value in values]
    middle = median(logs)
    if len(logs) < _FEW_VALUES:
        return middle, _ERROR_OF_FEW
    deviation = median(abs(each - middle) for each in logs)
    return middle, 1.4826 * deviation * 1.2533 / math.sqrt(len(logs))


def _log_ratio(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float] | None:
    """Return by how much `after` is worse, as a logarithm, and its standard error."""
    if min(*before["values"], *after["values"]) <= 0:
        return None
    (old, old_error), (new, new_error) = map(_log_median, (before["values"], after["values"]))
    ratio = old - new if before["is_higher_better"] else new - old
    return ratio, math.hypot(old_error, new_error)


def changes(before: dict[str, Any], after: dict[str, Any], least: float) -> Iterator[Change]:
    """Yield every figure of tokcache that both runs have."""
    old, new = _figures(before), _figures(after)
    both = {key: ratio for key in old if key in new if (ratio := _log_ratio(old[key], new[key]))}
    for key, (log_ratio, error) in both.items():
        if not key[2].startswith(_OURS):
            continue
        peers = [r for k, (r, _) in both.items() if k[:2] == key[:2] and not k[2].startswith(_OURS)]
        if not peers:
            peers = [
                r for k, (r, _) in both.items() if k[0] == key[0] and not k[2].startswith(_OURS)
            ]
        control = median(peers) if peers else 0.0
        spread = max((abs(each - control) for each in peers), default=0.0)
        yield Change(
            key,
            median(old[key]["values"]),
            median(new[key]["values"]),
            log_ratio - control,
            math.exp(control),
            math.hypot(_N_ERRORS * error, _N_SPREADS * spread),
            least,
        )


def read(file: Path) -> dict[str, Any]:
    """Return a run; end with a message that says why the file is none."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] == FORMAT:
            return found
        problem = f"it has format {found['format']}, and this reads {FORMAT}"
    except OSError as error:
        problem = error.strerror or str(error)
    except (ValueError, KeyError, TypeError):
        problem = "it was not written by `python -m bench run … --json` or `all --json`"
    sys.exit(f"{file} can't be compared: {problem}")


def main(argv: list[str]) -> int:
    """Print the changes; the exit code is 1 if a figure is slower."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=LEAST, help="the least change that counts")
    parser.add_argument("--every", action="store_true", help="show figures that are the same, too")
    options = parser.parse_args(argv)
    before, after = read(options.before), read(options.after)
    found = list(changes(before, after, options.least))
    for title, run in (("before", before), ("after", after)):
        print(f"{title}: commit {run['environment']['commit']}, {run['environment']['cpu']}")
    console = Console(width=140, highlight=False)
    shown = [one for one in found if options.every or one.verdict in ("slower", "faster")]
    if shown:
        table = Table(box=None, pad_edge=False)
        for name in ("benchmark", "case", "system"):
            table.add_column(name)
        for name in ("before", "after", "unit", "times", "peers", "noise", ""):
            table.add_column(name, justify="right")
        for one in sorted(shown, key=lambda each: -each.log_ratio):
            name, case, system, unit = one.key
            cells = [number(one.before), number(one.after), unit, f"{one.ratio:.2f}"]
            noise = f"{math.expm1(one.noise):.0%}"
            table.add_row(name, case, system, *cells, f"{one.control:.2f}", noise, one.verdict)
        console.print(table)
    counts = {word: sum(one.verdict == word for one in found) for word in (
        "slower", "faster", "within noise", "same")}  # fmt: skip
    print(f"{len(found)} figures: " + ", ".join(f"{n} {word}" for word, n in counts.items()))
    return 1 if counts["slower"] else 0
