"""Runs one step of many cases in one mode; the runner starts it, and it forks for each case.

The libraries that every case needs are imported once, before the forks. The parent does nothing
else, so that each case starts in the state of a new process.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.ecosystem import cases
from tests.ecosystem.given import CASES, Case, Given, as_json, used

LIMIT_S = 900.0


def load_cases() -> dict[str, Case]:
    """Return all cases, ordered by module and then by definition."""
    for module in sorted(found.name for found in pkgutil.iter_modules(cases.__path__)):
        importlib.import_module(f"tests.ecosystem.cases.{module}")
    return CASES


def run(name: str, mode: str, step: int, folder: Path, sources: list[Path]) -> dict[str, Any]:
    """Return the results by tokenizer, and the use counts of the caches."""
    if mode == "patch":
        import tokcache

        tokcache.patch_transformers()
    chosen = CASES[name]
    found: dict[str, Any] = {}
    kept = []
    for source in sources:
        if chosen.only is not None and source.name not in chosen.only:
            continue
        own = folder / source.name
        own.mkdir(parents=True, exist_ok=True)
        given = Given(source, mode, step, own)
        kept.append(given)  # keeps its tokenizers alive, so that their caches are counted
        try:
            result = {"result": as_json(chosen.run(given))}
        except Exception as error:  # noqa: BLE001 (an exception is a result to compare)
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        found[source.name] = result
    return {"results": found, "used": used()}


def _child(name: str, mode: str, step: int, folder: Path, sources: list[Path]) -> None:
    os.setpgid(0, 0)
    log = os.open(folder / f"step-{step}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    found = run(name, mode, step, folder, sources)
    (folder / f"step-{step}.json").write_text(json.dumps(found), encoding="utf-8")


def main(argv: list[str]) -> None:
    """Run the step of every case named on standard input; write a result file for each."""
    mode, step, work, *sources = argv
    names = [name for name in sys.stdin.read().split() if load_cases()[name].n_steps > int(step)]
    importlib.import_module("torch")
    importlib.import_module("transformers.models.auto.tokenization_auto")
    if mode != "plain":
        importlib.import_module("tokcache")
    for name in names:
        began = time.monotonic()
        folder = Path(work) / name / mode
        folder.mkdir(parents=True, exist_ok=True)
        arguments = (name, mode, int(step), folder, [Path(source) for source in sources])
        process = multiprocessing.get_context("fork").Process(target=_child, args=arguments)
        process.start()
        process.join(LIMIT_S)
        if process.exitcode is None and process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode:
            text = f"ended with {process.exitcode} after {time.monotonic() - began:.0f} s"
            (folder / f"step-{step}.failed").write_text(text)
        print(f"{mode}, step {step}: {name} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
