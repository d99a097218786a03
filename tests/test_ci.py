"""The workflows, `.ci/run` and pyproject.toml name the same Pythons, scripts and commands."""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES = ["ci.yml", "nightly.yml"]


def jobs(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
    return dict(parsed["jobs"])


def commands(name: str) -> list[str]:
    """Return the command of every step that runs one."""
    return [step["run"] for job in jobs(name).values() for step in job["steps"] if "run" in step]


def scripts(text: str) -> set[str]:
    return set(re.findall(r"\.ci/(\w+)", text))


def test_there_are_no_other_workflows() -> None:
    assert [each.name for each in WORKFLOWS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_command_of_a_workflow_exists(name: str) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    found = 0
    for command in commands(name):
        for script in scripts(command):
            assert os.access(ROOT / ".ci" / script, os.X_OK), script
            found += 1
        for module in re.findall(r"python -m (\S+)", command):
            assert importlib.util.find_spec(module) is not None, module
            found += 1
        for file in re.findall(r"(?:tests|tools|bench)/[\w/]+\.py", command):
            assert (ROOT / file).is_file(), file
        for chosen in re.findall(r"'\.\[(.*?)\]'", command):
            assert set(chosen.split(",")) <= set(extras), command
    assert found >= 4


def test_ci_run_has_the_steps_of_the_workflow_in_its_order() -> None:
    run = re.findall(r"^\.ci/(\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert run == ["services", "lint", "types", "docs", "native", "tests"]
    in_workflow = [script for command in commands("ci.yml") for script in scripts(command)]
    # `tests` builds and tests the package of each matrix; `native` sees that they were built there.
    assert [s for s in run if s not in {"services", "native"}] == [
        s for s in dict.fromkeys(in_workflow) if s in set(run) - {"services", "native"}
    ]


def test_every_python_that_is_claimed_is_tested_and_built() -> None:
    claimed = [
        each.rsplit(" ", 1)[-1]
        for each in PROJECT["project"]["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", each)
    ]
    matrix = jobs("ci.yml")["tests"]["strategy"]["matrix"]
    assert matrix["python"] == claimed
    assert matrix["implementation"] == ["native", "reference"]
    built = PROJECT["tool"]["cibuildwheel"]["build"]
    assert built == [f"cp{each.replace('.', '')}-manylinux_*" for each in claimed]
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"
    machines = [
        each["machine"] for each in jobs("ci.yml")["wheels"]["strategy"]["matrix"]["include"]
    ]
    assert machines == PROJECT["tool"]["cibuildwheel"]["linux"]["archs"]
