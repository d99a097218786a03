"""Compares two runs of the benchmarks: which figures of tokcache are slower, which are faster.

Two runs are never made under the same conditions: the machine is faster in one of them, or busier,
and each process has another memory layout. So a run measures in several processes, and:

1. A figure's value in one process is the logarithm of its median, less that of the peers in the
   same case and process: their code is the same in both runs. Peers that move with the figure from
   one process to the next, such as `==` with hits that are bound by memory, count the most. Where a
   case has no peer, it is the median of all of the benchmark.
2. The change is the difference of the means over the processes. Its standard error comes from the
   spread between the processes of a run; eight more degrees of freedom come from the median spread
   of the benchmark's figures (a moderated t statistic: Smyth, SAGMB 2004).
3. What differs between runs, but not within one, shows in the peers. Standard errors are multiplied
   until the median of the peers' own statistics is that of no change (genomic control: Devlin and
   Roeder, Biometrics 1999).
4. A change is named if it exceeds `--least` and is significant among all figures compared (Holm, 1%
   for one false name in the whole comparison). A figure whose noise could hide twice `--least` is
   not decided.

A benchmark of one process says nothing about the spread between processes; a quarter is assumed,
with the eight degrees of freedom.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench._report import FORMAT, number

LEAST = 0.10  # a change below this is not named
_FALSE_NAMES = 0.01  # the probability of one or more in a comparison of equal runs
_PRIOR_DF = 8
# Assumed between processes if only one measured: twice the spread of the noisiest figures.
_SPREAD_OF_ONE = 0.25
_LEAST_SPREAD = 0.02  # assumed at least: the spread of the quietest figures
_MEDIAN_CHI2 = 0.4549  # of one degree of freedom
_FEW_PEERS = 8
_OURS = "tokcache"
TOGETHER = "all cases together"
VERDICTS = ("slower", "faster", "not decided", "same")

Case = tuple[str, str, str]  # case, system, unit
Key = tuple[str, str, str, str]  # the same, with the benchmark before it
Logs = NDArray[np.float64]  # of the median of each process; greater ones are worse


@dataclass(slots=True)
class Change:
    """A figure of tokcache in two runs; `log_ratio` above zero: the second run is worse.

    `control` is the ratio of the peers, `error` the standard error of the log ratio with `df`
    degrees of freedom, `noise` how large a log ratio may be by chance.
    """

    key: Key
    before: float | None
    after: float | None
    log_ratio: float
    control: float | None
    error: float
    df: int
    least: float
    noise: float = 0.0
    is_significant: bool = False

    @property
    def ratio(self) -> float:
        """How many times as much the second run takes, with the peers' ratio taken out."""
        return math.exp(self.log_ratio)

    @property
    def p(self) -> float:
        """The probability of such a change by chance (Wallace's normal deviate, 1959)."""
        t, df = self.log_ratio / self.error, self.df
        z = (8 * df + 1) / (8 * df + 3) * math.sqrt(df * math.log1p(t * t / df))
        return 2 * NormalDist().cdf(-z)

    @property
    def verdict(self) -> str:
        """The result in a word."""
        is_large = abs(self.log_ratio) > math.log1p(self.least)
        if is_large and self.is_significant:
            return "slower" if self.log_ratio > 0 else "faster"
        is_loud = self.noise > math.log1p(2 * self.least)
        return "not decided" if is_large or is_loud else "same"


@dataclass(frozen=True, slots=True)
class _Pair:
    """A figure in two runs, less its control."""

    old: Logs
    new: Logs
    control: float = 0.0

    @property
    def log_ratio(self) -> float:
        return float(self.new.mean() - self.old.mean())

    @property
    def n_processes(self) -> tuple[int, int]:
        return len(self.old), len(self.new)

    @property
    def df(self) -> int:
        return len(self.old) + len(self.new) - 2

    @property
    def variance(self) -> float:
        """Between the processes of a run."""
        if not self.df:
            return _SPREAD_OF_ONE**2
        sums = [float(((one - one.mean()) ** 2).sum()) for one in (self.old, self.new)]
        return max(sum(sums) / self.df, _LEAST_SPREAD**2)

    def error(self, usual: float | None) -> float:
        """Return the standard error; `usual` is the variance of the benchmark's other figures."""
        variance = self.variance
        if usual is not None:
            variance = (variance * self.df + usual * _PRIOR_DF) / (self.df + _PRIOR_DF)
        return math.sqrt(variance * (1 / len(self.old) + 1 / len(self.new)))


@dataclass(frozen=True, slots=True)
class _Figure:
    """One figure of a run: its median, and the logs of the medians of each process."""

    value: float
    logs: Logs


def _figures(run: dict[str, Any]) -> dict[str, dict[Case, _Figure]]:
    """Return the figures of each benchmark by case, system and unit."""
    found: dict[str, dict[Case, _Figure]] = {}
    for name, benchmark in run["benchmarks"].items():
        own = found.setdefault(name, {})
        for one in benchmark.get("figures", []):
            medians = [median(values) for values in one["processes"]]
            if medians and min(medians) > 0:
                case = f"{one['title']}, {one['way']}" if one["way"] else one["title"]
                logs = np.log(medians)
                logs = -logs if one["is_higher_better"] else logs
                own[case, one["system"], one["unit"]] = _Figure(median(medians), logs)
    return found


def _less_peers(own: _Pair, same: list[_Pair], others: list[_Pair], elsewhere: float) -> _Pair:
    """Return a figure less its control: the peers of its case, of its benchmark, or of all."""
    if same:
        spreads = [_Pair(own.old - one.old, own.new - one.new).variance for one in same]
        # By the inverse variance; the median in it bounds how far chance may choose the weights.
        weights = 1 / (np.array(spreads) + median(spreads))
        weights /= weights.sum()
        old = own.old - weights @ np.array([one.old for one in same])
        new = own.new - weights @ np.array([one.new for one in same])
    elif others:
        old = own.old - np.median([one.old for one in others], axis=0)
        new = own.new - np.median([one.new for one in others], axis=0)
    else:
        old, new = own.old, own.new - elsewhere
    return _Pair(old, new, own.log_ratio - float(new.mean() - old.mean()))


def _of_benchmark(
    pairs: Mapping[Case, _Pair], elsewhere: float
) -> tuple[dict[Case, _Pair], float, float | None]:
    """Return our figures less their controls, the factor of their errors, the usual variance."""
    own: dict[Case, _Pair] = {}
    of_peers = []
    for key, one in pairs.items():
        peers = {
            k: p
            for k, p in pairs.items()
            if k != key and not k[1].startswith(_OURS) and p.n_processes == one.n_processes
        }
        same = [p for k, p in peers.items() if (k[0], k[2]) == (key[0], key[2])]
        if key[1].startswith(_OURS):
            own[key] = _less_peers(one, same, list(peers.values()), elsewhere)
        elif same:
            of_peers.append(_less_peers(one, same, [], elsewhere))
    scale = 1.0
    if len(of_peers) >= _FEW_PEERS:
        typical = median([one.variance for one in of_peers])
        squares = [(one.log_ratio / one.error(typical)) ** 2 for one in of_peers]
        scale = math.sqrt(max(1.0, median(squares) / _MEDIAN_CHI2))
    alike = list(own.values()) if len(own) > 1 else of_peers
    usual = median([one.variance for one in alike]) if alike else None
    return own, scale, usual


def changes(before: dict[str, Any], after: dict[str, Any], least: float) -> list[Change]:
    """Return the change of every figure of tokcache that both runs have."""
    old, new = _figures(before), _figures(after)
    pairs = {
        name: {key: _Pair(old[name][key].logs, new[name][key].logs)
               for key in old[name] if key in new[name]}
        for name in old if name in new
    }  # fmt: skip
    peers = [one.log_ratio for each in pairs.values() for key, one in each.items()
             if not key[1].startswith(_OURS)]  # fmt: skip
    elsewhere = median(peers) if peers else 0.0
    found: list[Change] = []
    for name, each in pairs.items():
        own, scale, usual = _of_benchmark(each, elsewhere)
        for key, one in own.items():
            values = old[name][key].value, new[name][key].value
            is_from_spread = one.df > 0 and usual is None  # of this figure's own processes alone
            error, df = scale * one.error(usual), one.df + (0 if is_from_spread else _PRIOR_DF)
            control = math.exp(one.control)
            found.append(Change((name, *key), *values, one.log_ratio, control, error, df, least))
        if len(own) > 1 and len({one.n_processes for one in own.values()}) == 1:
            mean = _Pair(
                np.mean([one.old for one in own.values()], axis=0),
                np.mean([one.new for one in own.values()], axis=0),
            )
            if mean.df:
                words = (name, TOGETHER, _OURS, "")
                error = scale * mean.error(None)
                found.append(Change(words, None, None, mean.log_ratio, None, error, mean.df, least))
    # Holm: the smallest of m probabilities is compared with a share of 1/m, the next of 1/(m - 1).
    is_open = True
    for place, change in enumerate(sorted(found, key=lambda each: each.p)):
        share = _FALSE_NAMES / (len(found) - place)
        is_open = is_open and change.p <= share
        change.is_significant = is_open
        z = -NormalDist().inv_cdf(share / 2) * (8 * change.df + 3) / (8 * change.df + 1)
        change.noise = change.error * math.sqrt(change.df * math.expm1(z * z / change.df))
    return found


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
    found = changes(before, after, options.least)
    for title, run in (("before", before), ("after", after)):
        print(f"{title}: commit {run['environment']['commit']}, {run['environment']['cpu']}")
    for name, one in before["benchmarks"].items():
        other = after["benchmarks"].get(name, {}).get("options", {})
        for key, value in one.get("options", {}).items():
            if other.get(key, value) != value:
                print(f"{name}: {key} {value} before, {other[key]} after: other work was measured")
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
            cells.append("" if one.control is None else f"{one.control:.2f}")
            noise = f"{math.expm1(one.noise):.0%}"
            table.add_row(name, case, system, *cells, noise, one.verdict)
        console.print(table)
    counts = {word: sum(one.verdict == word for one in found) for word in VERDICTS}
    print(f"{len(found)} figures: " + ", ".join(f"{n} {word}" for word, n in counts.items()))
    return 1 if counts["slower"] else 0
