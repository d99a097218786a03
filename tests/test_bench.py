"""The benchmarks' own command: its list, the comparison of two runs, workers, one short run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
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


def run_of(seed: int, *, speed: float = 1.0, ours: float = 1.0) -> dict[str, Any]:
    """Return a run of three cases whose rounds scatter by 8 %, as a JSON file has it."""
    rng, report = random.Random(seed), _report.Report("exact")
    report.console.quiet = True
    for n, case in enumerate(("64", "1,024", "8,192"), 1):
        values = {
            name: [
                n * us * speed * (ours if name == "tokcache" else 1.0) * rng.lognormvariate(0, 0.08)
                for _ in range(61)
            ]
            for name, us in SYSTEMS.items()
        }
        report.table(case, "ns", values, base="tokcache")
    return {"format": 1, "benchmarks": {"exact": report.as_json({}, 1.0)}}


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    found = _compare.changes(before, after, _compare.LEAST)
    return [one.verdict for one in found]


@pytest.mark.parametrize("seed", range(10))
def test_compare_finds_a_slow_down_of_a_fifth_and_nothing_between_equal_runs(seed: int) -> None:
    before, busy = run_of(seed), 1.0 + seed / 10  # the machine may be slower in the second run
    same = verdicts(before, run_of(seed + 100, speed=busy))
    assert set(same) <= {"same", "within noise"}
    assert verdicts(before, run_of(seed + 200, speed=busy, ours=1.2)) == ["slower"] * 3
    assert verdicts(before, run_of(seed + 300, speed=busy, ours=1 / 1.2)) == ["faster"] * 3


def test_a_higher_figure_that_is_better_is_not_slower() -> None:
    report = _report.Report("serve")
    report.console.quiet = True
    values = {"tokcache": [100.0] * 9, "peer": [50.0] * 9}
    report.table("requests", "1/s", values, is_higher_better=True)
    before = {"format": 1, "benchmarks": {"serve": report.as_json({}, 1.0)}}
    after = json.loads(json.dumps(before))
    after["benchmarks"]["serve"]["figures"][0]["values"] = [150.0] * 9
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
    assert "3 figures: 0 slower" in capsys.readouterr().out


def test_every_benchmark_is_listed_and_has_a_short_form() -> None:
    assert {"exact", "multiturn", "gateway", "ttft", "states"} <= set(command.names())
    for name in command.names():
        assert command.summary(name).endswith((".", ";", ","))
        assert len(command.summary(name)) > 20
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
