"""The runner: creates the environment, runs every case in each mode, writes the table."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"
TABLE = REPOSITORY / "docs" / "ecosystem.md"
MODES = ("plain", "wrap", "patch")
# The real tokenizers used if TOKCACHE_SHARED_DATA has them: a BERT and one that prepends a space.
REAL = ("bert-base-uncased", "phi-3-mini")

_LIST = """
import dataclasses, json
from importlib.metadata import PackageNotFoundError, version
from tests.ecosystem.one import load_cases
def of(library):
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
fields = ("name", "library", "done", "n_steps")
cases = [
    {field: getattr(case, field) for field in fields} | {"version": of(case.library)}
    for case in load_cases().values()
]
main = {name: of(name) for name in ("tokcache", "transformers", "tokenizers", "torch")}
print(json.dumps([cases, main]))
"""
_SAMPLE = "import sys, tokcache.samples as s; print(s.tiny_tokenizer(sys.argv[1]).parent)"


@dataclass(frozen=True)
class Outcome:
    """One case in one mode: the results of its steps, or how its process failed."""

    steps: list[dict[str, Any]]
    failure: str | None = None


def environment(home: Path) -> Path:
    """Return the Python of the environment, which is made once for each requirements file."""
    python = home / "bin" / "python"
    stamp = home / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
        torch = [line for line in REQUIREMENTS.read_text().split() if line.startswith("torch==")]
        # torch is installed first and alone, so that no other package chooses its build.
        subprocess.run([*install, *torch], check=True)
        subprocess.run([*install, "--requirement", REQUIREMENTS], check=True)
        subprocess.run([*install, "--editable", REPOSITORY], check=True)
        stamp.write_text(REQUIREMENTS.read_text())
    return python


def settings(work: Path) -> dict[str, str]:
    """Return the variables of a case's process: no network, no GPU, a separate hash seed."""
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONHASHSEED": str(random.SystemRandom().randrange(1, 2**32)),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes minutes
    }


def listed(python: Path, work: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the cases with their library's versions, and the versions shown above the table."""
    done = subprocess.run(
        [python, "-c", _LIST],
        check=True,
        cwd=REPOSITORY,
        env=settings(work),
        capture_output=True,
        text=True,
    )
    cases, main = json.loads(done.stdout)
    return cases, main


def sources(python: Path, work: Path) -> list[Path]:
    """Return the folders of the tokenizers: the sample's, and those of real ones if present."""
    made = subprocess.run(
        [python, "-c", _SAMPLE, work / "samples"],
        check=True,
        cwd=REPOSITORY,
        env=settings(work),
        capture_output=True,
        text=True,
    )
    sample = work / "sample"
    sample.symlink_to(made.stdout.strip(), target_is_directory=True)
    shared = os.environ.get("TOKCACHE_SHARED_DATA")
    real = [Path(shared) / "tokenizers" / name for name in REAL] if shared else []
    return [sample, *real]


def run(python: Path, cases: list[dict[str, Any]], work: Path, given: list[Path]) -> None:
    """Run the steps of all cases in every mode; each mode's process forks one for each case."""
    names = "\n".join(case["name"] for case in cases)
    for step in range(max(case["n_steps"] for case in cases)):
        started = []
        for mode in MODES:
            arguments: list[str | Path] = [mode, str(step), work, *given]
            process = subprocess.Popen(
                [python, "-m", "tests.ecosystem.one", *arguments],
                cwd=REPOSITORY,
                env=settings(work),
                stdin=subprocess.PIPE,
                text=True,
            )
            assert process.stdin is not None
            process.stdin.write(names)
            process.stdin.close()
            started.append(process)
        statuses = [process.wait() for process in started]
        if any(statuses):
            raise RuntimeError("the process that runs the cases failed; see its output above")


def outcome(case: dict[str, Any], mode: str, work: Path) -> Outcome:
    """Return the results that the steps of a case wrote into its folder."""
    folder = work / case["name"] / mode
    found: list[dict[str, Any]] = []
    for step in range(case["n_steps"]):
        failed = folder / f"step-{step}.failed"
        if failed.exists():
            log = (folder / f"step-{step}.log").read_text(errors="replace").strip()
            return Outcome(found, f"{failed.read_text()}: {' / '.join(log.splitlines()[-3:])}")
        found.append(json.loads((folder / f"step-{step}.json").read_text()))
    return Outcome(found)


def differences(plain: Outcome, other: Outcome) -> list[str]:
    """Return the differences from the results of plain tokenizers; empty if they are equal."""
    if plain.failure or other.failure:
        return [f"plain: {plain.failure}" if plain.failure else str(other.failure)]
    found = []
    for step, pair in enumerate(zip(plain.steps, other.steps, strict=True)):
        one, two = (part["results"] for part in pair)
        for name, expected in one.items():
            where = f"{name}, step {step}"
            if "error" in expected:
                found.append(f"{where}: plain failed: {expected['error']}")
            elif "error" in two[name]:
                found.append(f"{where}: {two[name]['error']}")
            elif expected["result"] != two[name]["result"]:
                difference = first_difference(expected["result"], two[name]["result"])
                found.append(f"{where}: {difference}")
    return found


def first_difference(one: Any, two: Any, place: str = "result") -> str:
    """Return the place of the first difference between two JSON values, and the values there."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for name in one:
            if one[name] != two[name]:
                return first_difference(one[name], two[name], f"{place}[{name!r}]")
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for index, pair in enumerate(zip(one, two, strict=True)):
            if pair[0] != pair[1]:
                return first_difference(*pair, f"{place}[{index}]")
    return f"{place}: {_short(one)} plain, {_short(two)} here"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 120 else f"{text[:117]}..."


def used(outcomes: Iterable[Outcome]) -> str:
    """Return how many answers came from cached ids and how many were bypasses, by reason."""
    answered: int = 0
    bypasses: Counter[str] = Counter()
    for outcome in outcomes:
        for step in outcome.steps:
            answered += step["used"]["answered"]
            bypasses.update(step["used"]["bypasses"])
    parts = [f"{answered} cached"] if answered else []
    parts += [f"{count} {reason}" for reason, count in bypasses.most_common()]
    return ", ".join(parts) or "nothing encoded here"


_PAGE = """\
# Libraries that take a wrapped tokenizer

Written by `python -m tests.ecosystem`; run it again rather than edit this page.

With {versions}. Each use was run with plain tokenizers, with those that `tokcache.wrap` returns, \
and with those loaded after `tokcache.patch_transformers()`, each in a separate process with \
another hash seed. "equal" means that all results were those of the plain tokenizer. Tokenizers: \
{tokenizers}; uses that generate text are without BERT, and those of trl, `Hasher` and workers \
that import torch again take the sample alone. The helpers of vLLM, SGLang, Triton and NeMo were \
written from their behaviour; the packages themselves were not run.

The column "cache" counts, over both runs, the texts answered from token ids and the calls that \
the plain tokenizer answered, by reason; tokenizers that a use drops before its end, and worker \
processes, are not counted.
"""


def markdown(rows: list[dict[str, str]], main: dict[str, str], tokenizers: list[str]) -> str:
    """Return the page for docs/ in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in main.items())
    lines = [
        _PAGE.format(versions=versions, tokenizers=", ".join(tokenizers)),
        "| library | version | use | wrap | patch | cache |",
        "|---|---|---|---|---|---|",
    ]
    names = ("library", "version", "done", "wrap", "patch", "cache")
    lines += [f"| {' | '.join(row[name] for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def row(case: dict[str, Any], work: Path) -> dict[str, str]:
    """Compare a case's results in every mode, print the differences, return its table row."""
    outcomes = {mode: outcome(case, mode, work) for mode in MODES}
    bad = {mode: differences(outcomes["plain"], outcomes[mode]) for mode in MODES[1:]}
    cells = {mode: "differs" if found else "equal" for mode, found in bad.items()}
    cache = used(outcomes[mode] for mode in MODES[1:])
    print(f"{case['name']}: {cells['wrap']}, {cells['patch']}; {cache}")
    for mode, found in bad.items():
        for line in found:
            print(f"    {mode}: {line}")
    return {**{key: str(value) for key, value in case.items()}, **cells, "cache": cache}


def main(argv: list[str]) -> int:
    """Run the chosen cases; return 1 if any result differs from the plain one."""
    parser = argparse.ArgumentParser(prog="python -m tests.ecosystem")
    parser.add_argument("--only", default="", help="run cases whose name this pattern matches")
    parser.add_argument("--python", type=Path, help="a Python that has the requirements")
    parser.add_argument("--table", type=Path, help="where to write the table")
    asked = parser.parse_args(argv)
    home = Path(tempfile.gettempdir()) / "tokcache-ecosystem"
    python = asked.python or environment(home)
    with tempfile.TemporaryDirectory(prefix="tokcache-ecosystem-") as folder:
        work = Path(folder)
        given = sources(python, work)
        cases, versions = listed(python, work)
        chosen = [case for case in cases if re.search(asked.only, case["name"])]
        run(python, chosen, work, given)
        rows = [row(case, work) for case in chosen]
    n_bad = sum("differs" in (found["wrap"], found["patch"]) for found in rows)
    page = markdown(rows, versions, [source.name for source in given])
    if asked.table or not asked.only:
        table = asked.table or TABLE
        table.parent.mkdir(exist_ok=True)
        table.write_text(page, encoding="utf-8")
    print(f"{len(rows)} cases, {n_bad} with a difference")
    return int(n_bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
