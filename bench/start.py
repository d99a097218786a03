"""The time of `import tokcache` in a new process, next to that of its dependencies.

Each sample is a new interpreter that times one import; the imports take turns in random order. The
minimum of each counts, because load on the machine can only add time. First it is checked
that no optional library is imported.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("tokenizers", "numpy", "transformers")
UNIT = "ms"
BAR = "at most 150"
IN_ALL = ("--rounds", "7")
MODULES = ("tokcache", "tokenizers", "numpy", "transformers")
OPTIONAL = ("transformers", "numpy", "llama_cpp", "redis", "prometheus_client", "httpx")
MAX_IMPORT_MS = 150


def output(code: str) -> str:
    """Return the output of `code` in a new interpreter."""
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def import_ms(module: str) -> float:
    """Return the milliseconds of an import, without the start of the interpreter."""
    return float(
        output(
            "from time import perf_counter as now\n"
            f"began = now()\nimport {module}\nprint(1000 * (now() - began))"
        )
    )


def imported_optional() -> list[str]:
    """Return the optional libraries that `import tokcache` imports."""
    return [
        one
        for one in output("import sys, tokcache; print(*sys.modules)").split()
        if one in OPTIONAL
    ]


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of every import."""
    order, rng = list(MODULES), random.Random(7)
    times: dict[str, list[float]] = {name: [] for name in order}
    for name in order:
        import_ms(name)  # not counted: the first import reads from disk
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            times[name].append(import_ms(name))
    return times


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--rounds", type=int, default=15)


def run(options: argparse.Namespace, report: Report) -> None:
    """Check that no optional library is imported, then time the imports."""
    found = imported_optional()
    report.check("no optional library is imported", is_right=not found, found=", ".join(found))
    ms = measure(options.rounds)
    report.table("import in a new process", "ms", ms, base="tokcache")
    least = {name: min(times) for name, times in ms.items()}
    report.table("the least of them", "ms", least, base="tokcache")
    report.bar("import tokcache, the least", least["tokcache"], MAX_IMPORT_MS, "ms", most=True)
