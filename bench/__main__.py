"""Lists, runs and compares the benchmarks: `python -m bench list | run | all | compare | page`."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import math
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import bench
from bench import _compare, _page, _repeat, _report
from tokcache.replay.report import require_libraries

USAGE = """python -m bench list                      the benchmarks, a line each
       python -m bench run NAME [OPTION …]       one of them; NAME --help has its options
       python -m bench run NAME NAME …           several, each in a process of its own
       python -m bench all                       every one, shortened; --json FILE, --html FILE
       python -m bench compare A.json B.json     what B does slower or faster than A
       python -m bench page A.json A.html        the results as a page with charts"""


MINUTES = 20.0  # of `all`
_OF_COMMAND = {"json", "later"}
_INTERRUPTED = 130


def names() -> list[str]:
    """Return the names of all benchmarks."""
    found = pkgutil.iter_modules([str(Path(bench.__file__).parent)])
    shown = [m.name for m in found if not m.ispkg and not m.name.startswith("_")]
    return sorted(name.replace("_", "-") for name in shown)


def module(name: str) -> ModuleType:
    """Return the module of a benchmark."""
    return importlib.import_module(f"bench.{name.replace('-', '_')}")


def stated(name: str, constant: str) -> str:
    """Return UNIT or BAR of a benchmark; its libraries are not imported."""
    file = Path(bench.__file__).with_name(f"{name.replace('-', '_')}.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == constant:
            return str(ast.literal_eval(node.value))
    raise AssertionError(f"{file.name} has no {constant}")


def show_list() -> int:
    """Print what each benchmark measures, its unit and its bar."""
    for name in names():
        print(f"{name:16} {_report.summary(name)}")
        print(f"{'':16}   in {stated(name, 'UNIT')}")
        print(f"{'':16}   bar: {stated(name, 'BAR')}")
    return 0


def run_one(name: str, argv: list[str]) -> int:
    """Run one benchmark in this process; the exit code is 1 if a result or a bar is missed."""
    it = module(name)
    parser = argparse.ArgumentParser(prog=f"python -m bench run {name}", description=it.__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    n_processes = getattr(it, "PROCESSES", 1)
    parser.add_argument(
        "--processes", type=int, default=n_processes, help="measure in this many, one by one"
    )
    parser.add_argument("--later", action="store_true", help=argparse.SUPPRESS)
    it.add_options(parser)
    options = parser.parse_args(argv)
    report = _report.Report(name, it.PACKAGES, is_first=not options.later)
    given = {key: value for key, value in vars(options).items() if key not in _OF_COMMAND}
    report.line(f"{name} with " + ", ".join(f"{key} {value}" for key, value in given.items()))
    began = monotonic()
    if options.processes > 1:
        _repeat.measure(report, argv, options.processes)
    else:
        it.run(options, report)
    if options.json is not None:
        found = {name: report.as_json(given, monotonic() - began)}
        write(options.json, found)
        print(f"wrote {options.json}")
    return 0 if report.is_good else 1


def write(file: Path, found: dict[str, Any]) -> None:
    """Write the results of some benchmarks."""
    # A fact may be any object, such as the counters of a cache: its text is written.
    file.write_text(json.dumps(_whole(found), indent=1, default=str) + "\n")


def _whole(found: dict[str, Any]) -> dict[str, Any]:
    """Return results with the conditions of their measurement."""
    return {
        "format": _report.FORMAT,
        "environment": _report.environment(),
        "benchmarks": found,
    }


def run_many(
    chosen: Mapping[str, Sequence[str]],
    file: Path | None,
    html: Path | None = None,
    minutes: float = math.inf,
) -> int:
    """Run benchmarks one after the other, each in a new process; return the worst exit code.

    It is 1 or more if none measured, and 130 after an interrupt. When the `minutes` are over, or
    the run is interrupted, the one that runs is stopped, and the others are skipped.
    """
    if html is not None:
        require_libraries()
    worst, began, is_interrupted = 0, monotonic(), False
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tokcache-bench-") as folder:
        for place, (name, options) in enumerate(chosen.items(), 1):
            taken = f"{(monotonic() - began) / 60:.1f}"
            taken += "" if math.isinf(minutes) else f" of {minutes:g}"
            words = " ".join(options)
            print(f"\n== {name} ({place} of {len(chosen)}, after {taken} min): {words}", flush=True)
            own = Path(folder, f"{name}.json")
            command = [sys.executable, "-m", "bench", "run", name, *options, "--json", str(own)]
            try:
                code = None if is_interrupted else _run_until(began + 60 * minutes, command)
            except KeyboardInterrupt:
                code, is_interrupted = None, True
            if code is None:
                reason = f"the {minutes:g} minutes of this run were over"
                reason = "the run was interrupted" if is_interrupted else reason
                print(f"{name}: {reason}")
                found[name] = {"skipped": reason}
            elif own.is_file():
                worst = max(worst, code)
                found |= json.loads(own.read_text())["benchmarks"]
            else:
                worst = max(worst, 1)  # the code of a signal is below 0
                print(f"{name} ended with exit code {code} and left no figures")
                found[name] = {"failed": code}
            if file is not None:  # after each: a run that is interrupted leaves those before it
                write(file, found)
    print(f"\n{'benchmark':16} {'seconds':>8}  bars")
    for name, one in found.items():
        print(f"{name:16} {one.get('seconds', 0):8.0f}  {_verdict(one)}")
    if all("failed" in one or one["skipped"] for one in found.values()):
        print("no benchmark measured anything")
        worst = max(worst, 1)
    print(f"{(monotonic() - began) / 60:.1f} min")
    if file is not None:
        print(f"wrote {file}")
    if html is not None:
        html.write_text(_page.page(_whole(found)), encoding="utf-8")
        print(f"wrote {html}")
    return _INTERRUPTED if is_interrupted else worst


def _run_until(deadline: float, command: Sequence[str]) -> int | None:
    """Return the exit code of a command; None if it had to be stopped at the deadline."""
    left = deadline - monotonic()
    if left <= 0:
        return None
    # A session of its own, so that the servers and workers that it started end with it.
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603 (our own words)
    try:
        return process.wait(None if math.isinf(left) else left)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _rounds(name: str, rounds: int | None) -> list[str]:
    """Return the words that set the rounds of a benchmark; none if it has no rounds."""
    parser = argparse.ArgumentParser()
    module(name).add_options(parser)
    has_rounds = hasattr(parser.parse_args([]), "rounds")
    return ["--rounds", str(rounds)] if rounds is not None and has_rounds else []


def _verdict(one: dict[str, Any]) -> str:
    if "failed" in one:
        return f"failed with exit code {one['failed']}"
    if one["skipped"]:
        return f"skipped: {one['skipped']}"
    wrong = [name for name, is_right in one["checks"].items() if not is_right]
    missed = [bar["name"] for bar in one["bars"] if not bar["met"]]
    words = [f"WRONG: {', '.join(wrong)}"] if wrong else []
    words += [f"missed {len(missed)} of {len(one['bars'])}: {'; '.join(missed)}"] if missed else []
    return ". ".join(words) or f"all {len(one['bars'])} met"


def main(argv: list[str]) -> int:
    """Do what the first word says."""
    match argv:
        case ["list"]:
            return show_list()
        case ["run", name, *rest] if name in names():
            chosen = [name, *takewhile(names().__contains__, rest)]
            rest = rest[len(chosen) - 1 :]
            if len(chosen) == 1:
                return run_one(name, rest)
            parser = argparse.ArgumentParser(prog="python -m bench run NAME NAME …")
            parser.add_argument("--json", type=Path, help="write all figures to this file")
            parser.add_argument("--rounds", type=int, help="of those that have rounds")
            some = parser.parse_args(rest)
            return run_many({key: _rounds(key, some.rounds) for key in chosen}, some.json)
        case ["all", *rest]:
            parser = argparse.ArgumentParser(prog="python -m bench all")
            parser.add_argument("--json", type=Path, help="write all figures to this file")
            parser.add_argument("--html", type=Path, help="write a page of them")
            parser.add_argument(
                "--minutes", type=float, default=MINUTES, help="what is left then is skipped"
            )
            parser.add_argument(
                "--rounds", type=int, help="of those that have rounds, instead of the shortened"
            )
            options = parser.parse_args(rest)
            chosen_all = {
                name: [*module(name).IN_ALL, *_rounds(name, options.rounds)] for name in names()
            }
            return run_many(chosen_all, options.json, options.html, options.minutes)
        case ["page", *rest]:
            return _page.main(rest)
        case ["compare", *rest]:
            return _compare.main(rest)
    print(f"usage: {USAGE}")
    return 2


if __name__ == "__main__":  # workers import this module again
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader of standard output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)
