"""The benchmarks' own command: its list, the comparison of two runs, workers, one short run."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

pytest.importorskip("cachebox")

from bench import __main__ as command
from bench import _compare, _report
from bench._disturb import (
    DISTURBED,
    MADE_AFTER,
    MODES,
    QUIET,
    Disturber,
    fresh,
    l2_bytes,
    one_by_one,
)
from bench._process import Worker

ROOT = Path(__file__).parents[1]
SYSTEMS = {"tokcache": 100.0, "dict": 300.0, "lru_cache": 350.0, "cachebox": 320.0}


def python(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 (our own words)


def run_of(seed: int, *, speed: float = 1.0, ours: float = 1.0, n: int = 5) -> dict[str, Any]:
    """Return a run of six cases as a JSON file has it.

    Rounds scatter by 8 %, processes by 4 %, and every case of a process by 3 % for all systems.
    """
    rng, report = random.Random(seed), _report.Report("exact")
    report.console.quiet = True
    for case in range(1, 7):
        shared = [speed * case * rng.lognormvariate(0, 0.03) for _ in range(n)]
        values = {}
        for name, us in SYSTEMS.items():
            us *= ours if name == "tokcache" else 1.0  # noqa: PLW2901 (its own figure)
            own = [us * each * rng.lognormvariate(0, 0.04) for each in shared]
            values[name] = [[one * rng.lognormvariate(0, 0.08) for _ in range(21)] for one in own]
        report.table(f"case {case}", "ns", values, base="tokcache")
    return {"format": _report.FORMAT, "benchmarks": {"exact": report.as_json({}, 1.0)}}


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [one.verdict for one in _compare.changes(before, after, _compare.LEAST)]


@pytest.mark.parametrize("seed", range(10))
def test_compare_finds_a_slow_down_of_a_fifth_and_nothing_between_equal_runs(seed: int) -> None:
    before, busy = run_of(seed), 1.0 + seed / 10  # the machine may be slower in the second run
    same = verdicts(before, run_of(seed + 100, speed=busy))
    assert set(same) <= {"same", "not decided"}
    slower = verdicts(before, run_of(seed + 200, speed=busy, ours=1.2))
    assert set(slower) <= {"slower", "not decided"}
    assert slower[-1] == "slower"  # all cases together
    faster = verdicts(before, run_of(seed + 300, speed=busy, ours=1 / 1.2))
    assert set(faster) <= {"faster", "not decided"}
    assert faster[-1] == "faster"


def test_a_difference_between_processes_is_no_change() -> None:
    """Its rounds agree within 1 %, but each process has another memory layout."""
    rng = random.Random(1)

    def run() -> dict[str, Any]:
        report = _report.Report("exact")
        report.console.quiet = True
        values = {
            name: [[us * layout * rng.lognormvariate(0, 0.01) for _ in range(99)]
                   for layout in (rng.lognormvariate(0, 0.1) for _ in range(5))]
            for name, us in SYSTEMS.items()
        }  # fmt: skip
        report.table("case", "ns", values)
        return {"format": _report.FORMAT, "benchmarks": {"exact": report.as_json({}, 1.0)}}

    found = Counter(verdict for _ in range(200) for verdict in verdicts(run(), run()))
    assert found["slower"] + found["faster"] <= 4  # 1 % of equal runs, and chance


def test_one_process_decides_only_large_changes() -> None:
    before = run_of(1, n=1)
    assert set(verdicts(before, run_of(2, n=1, ours=1.5))) == {"not decided"}
    assert set(verdicts(before, run_of(2, n=1, ours=10.0))) == {"slower"}


@pytest.mark.parametrize("n", [1, 2])
def test_a_single_figure_without_peers_is_compared(n: int) -> None:
    def run(ns: float) -> dict[str, Any]:
        report = _report.Report("start")
        report.console.quiet = True
        report.table("import", "ns", {"tokcache": [[ns] * 3] * n})
        return {"format": _report.FORMAT, "benchmarks": {"start": report.as_json({}, 1.0)}}

    (same,) = _compare.changes(run(100), run(100), _compare.LEAST)
    (large,) = _compare.changes(run(100), run(10_000), _compare.LEAST)
    assert same.verdict in ("same", "not decided")
    assert large.verdict == "slower"
    assert (same.p, same.df) == (1.0, {1: 8, 2: 2}[n])


def test_a_higher_figure_that_is_better_is_not_slower() -> None:
    report = _report.Report("serve")
    report.console.quiet = True
    values = {"tokcache": [[100.0] * 9] * 3, "peer": [[50.0] * 9] * 3}
    report.table("requests", "1/s", values, is_higher_better=True)
    before = {"format": _report.FORMAT, "benchmarks": {"serve": report.as_json({}, 1.0)}}
    after = json.loads(json.dumps(before))
    after["benchmarks"]["serve"]["figures"][0]["processes"] = [[150.0] * 9] * 3
    assert verdicts(before, after) == ["faster"]
    assert verdicts(after, before) == ["slower"]


def test_compare_says_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(run_of(1) | {"environment": {"commit": "a", "cpu": "b"}}))
    for content, problem in (("{", "was not written by"), ('{"format": 9}', "has format 9")):
        bad.write_text(content)
        with pytest.raises(SystemExit, match=problem):
            _compare.main([str(good), str(bad)])
    with pytest.raises(SystemExit, match="No such file"):
        _compare.main([str(good), str(tmp_path / "absent.json")])
    assert _compare.main([str(good), str(good)]) == 0
    assert "7 figures: 0 slower" in capsys.readouterr().out


def test_the_page_has_bars_figures_and_failures(tmp_path: Path) -> None:
    report = _report.Report("exact")
    report.console.quiet = True
    values = {"tokcache": [[10.0] * 12, [12.0] * 12], "dict": [[40.0] * 24], "==": [[1.0] * 24]}
    report.columns("hit <b>", "ns", {"quiet": values}, base="tokcache")
    report.check("ids", is_right=True)
    report.bar("hit, times a dict", 0.3, 0.2, most=True)
    report.fact("seed", 7)
    run = run_of(1) | {"environment": _report.environment()}
    run["benchmarks"] = {"exact": report.as_json({"processes": 2}, 90.0), "ttft": {"failed": 3}}
    source, made = tmp_path / "a.json", tmp_path / "a.html"
    source.write_text(json.dumps(run))
    assert command.main(["page", str(source), str(made)]) == 0
    text = made.read_text()
    assert "1 of 2 benchmarks measured: 0 of 1 bars were met" in text
    assert "ttft failed with exit code 3" in text
    assert "hit, times a dict" in text
    assert "measured in 2 processes" in text
    assert "hit &lt;b&gt;, quiet (dict)" in text  # the best peer, not the bound
    assert ">3.64<" in text
    assert "<b>" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)


def test_the_run_of_all_ends_in_time_and_stops_what_still_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    chosen = {"soak": ["--seconds", "600"], "start": []}
    began = monotonic()
    assert command.run_many(chosen, file, minutes=4 / 60) == 1  # nothing was measured
    assert monotonic() - began < 30
    found = json.loads(file.read_text())["benchmarks"]
    reason = "the 0.0666667 minutes of this run were over"
    assert found == {"soak": {"skipped": reason}, "start": {"skipped": reason}}
    assert f"skipped: {reason}" in capsys.readouterr().out


def test_an_interrupted_run_leaves_its_figures_and_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_until, calls = command._run_until, []

    def interrupted(deadline: float, words: Any) -> int | None:
        calls.append(words)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return run_until(deadline, words)

    monkeypatch.setattr(command, "_run_until", interrupted)
    file, html = tmp_path / "a.json", tmp_path / "a.html"
    chosen = {"start": ["--rounds", "1"], "soak": [], "exact": []}
    assert command.run_many(chosen, file, html, 20.0) == 130
    found = json.loads(file.read_text())["benchmarks"]
    assert found["start"]["figures"]
    assert found["soak"] == found["exact"] == {"skipped": "the run was interrupted"}
    assert len(calls) == 2
    assert "soak was skipped: the run was interrupted" in html.read_text()
    shown = capsys.readouterr().out
    assert "== soak (2 of 3, after 0." in shown
    assert "of 20 min)" in shown


def test_rounds_of_a_run_of_several_are_those_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Any] = {}
    monkeypatch.setattr(command, "run_many", lambda given, *_: chosen.update(given) or 0)
    assert command.main(["run", "start", "exact", "--rounds", "7"]) == 0
    assert chosen == {"start": ["--rounds", "7"], "exact": []}
    before, after = (run_of(seed) | {"environment": {"commit": "a", "cpu": "b"}} for seed in (1, 2))
    after["benchmarks"]["exact"]["options"] = {"rounds": "60"}
    before["benchmarks"]["exact"]["options"] = {"rounds": "200"}
    monkeypatch.setattr(_compare, "read", lambda file: before if file.name == "a" else after)
    _compare.main(["a", "b"])
    assert "exact: rounds 200 before, 60 after: other work was measured" in capsys.readouterr().out


def test_every_benchmark_is_listed_and_has_a_short_form() -> None:
    assert {"exact", "multiturn", "gateway", "ttft", "states"} <= set(command.names())
    for name in command.names():
        assert _report.summary(name).endswith((".", ";", ","))
        assert len(_report.summary(name)) > 20
        assert command.stated(name, "UNIT") == command.module(name).UNIT
        assert command.stated(name, "BAR") == command.module(name).BAR
        assert all(isinstance(word, str) for word in command.module(name).IN_ALL)


def test_run_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "start.json"
    words = ["run", "start", "--rounds", "1", "--json", str(file)]
    done = python("bench", *words)
    assert done.returncode in (0, 1), done.stderr  # a busy machine may miss the bar
    found = json.loads(file.read_text())
    assert found["environment"]["cores"] == len(os.sched_getaffinity(0))
    assert found["benchmarks"]["start"]["checks"] == {"no optional library is imported": True}
    systems = {one["system"] for one in found["benchmarks"]["start"]["figures"]}
    assert systems == {"tokcache", "tokenizers", "numpy", "transformers"}
    assert "start with processes 1, rounds 1" in done.stdout


def test_several_processes_measure_and_their_figures_are_put_together(tmp_path: Path) -> None:
    file = tmp_path / "start.json"
    words = ["run", "start", "--rounds", "1", "--processes", "2", "--json", str(file)]
    done = python("bench", *words)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(file.read_text())["benchmarks"]["start"]
    assert found["options"]["processes"] == "2"
    assert [[len(each) for each in one["processes"]] for one in found["figures"]] == [[1, 1]] * 8
    assert found["checks"] == {"no optional library is imported": True}
    assert [bar["name"] for bar in found["bars"]] == ["import tokcache, the least"]
    assert "over tokcache" in done.stdout


def test_a_worker_raises_what_its_method_raises_and_has_its_own_settings() -> None:
    worker = Worker("collections:Counter", "aab", settings={"TOKCACHE_TEST": "1"}, side="/side")
    try:
        assert worker.ask("most_common", 1) == [("a", 2)]
        with pytest.raises(TypeError):
            worker.ask("most_common", "x")
        assert worker.ask("total") == 3
    finally:
        worker.close()
    assert "TOKCACHE_TEST" not in os.environ
    with pytest.raises(ModuleNotFoundError):
        Worker("absent:Thing")


class Logged(Disturber):
    """A disturber that notes when it was called."""

    log: list[str]

    def __call__(self) -> None:
        super().__call__()
        self.log.append("disturbed")


def test_the_cache_is_disturbed_before_each_call_that_gets_a_new_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disturb, text = Logged(), "7" * 5000
    assert len(disturb.buffer) == 4 * l2_bytes()
    assert set(disturb.buffer) == {2}  # written, and without the byte that is searched for
    given: list[str] = []

    def call(own: str) -> None:
        given.append(own)
        disturb.log.append("called")

    def made(given: str) -> str:
        disturb.log.append("made")
        return fresh(given)

    monkeypatch.setattr("bench._disturb.fresh", made)
    for mode in MODES:
        given.clear()
        disturb.log = []
        assert one_by_one([call] * 3, [text] * 3, mode, disturb) > 0
        each = {
            QUIET: ["made", "called"],
            DISTURBED: ["made", "disturbed", "called"],
            MADE_AFTER: ["made", "disturbed", "made", "called"],
        }
        assert disturb.log == 3 * each[mode]
        assert given == [text] * 3
        assert len({id(own) for own in [*given, text]}) == 4


def test_the_micro_benchmarks_run() -> None:
    words = ["bench/micro", "--benchmark-disable", "-q", "-o", "addopts=", "-p", "no:xdist"]
    done = python("pytest", *words)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_reader_that_ends_early_costs_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "bench", "list"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_fact_of_any_kind_is_written_as_its_text(tmp_path: Path) -> None:
    command.write(tmp_path / "a.json", {"exact": {"facts": {"counters": Path("a")}}})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["benchmarks"]["exact"]["facts"] == {"counters": "a"}
