"""The time of `import tokcache` in a new process, next to that of its dependencies.

Each sample is a new interpreter that times one import; the imports take turns in random order. The
minimum of each is reported, because load on the machine can only add time. First it is checked
that no optional library is imported.
"""

from __future__ import annotations

import random
import subprocess
import sys
from statistics import median

from bench import _report

MODULES = ("tokcache", "tokenizers", "numpy", "transformers")
OPTIONAL = ("transformers", "numpy", "llama_cpp", "redis", "prometheus_client", "httpx")
MAX_IMPORT_MS = 150


def run(code: str) -> str:
    """Return the output of `code` in a new interpreter."""
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def import_ms(module: str) -> float:
    """Return the milliseconds of an import, without the start of the interpreter."""
    return float(
        run(
            "from time import perf_counter as now\n"
            f"began = now()\nimport {module}\nprint(1000 * (now() - began))"
        )
    )


def imported_optional() -> list[str]:
    """Return the optional libraries that `import tokcache` imports."""
    return [
        one for one in run("import sys, tokcache; print(*sys.modules)").split() if one in OPTIONAL
    ]


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Return the minimum and the median milliseconds of every import."""
    order, rng = list(MODULES), random.Random(7)
    times: dict[str, list[float]] = {name: [] for name in order}
    for name in order:
        import_ms(name)  # not counted: the first import reads from disk
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            times[name].append(import_ms(name))
    return {name: {"least": min(ms), "median": median(ms)} for name, ms in times.items()}


def main(argv: list[str]) -> int:
    """Measure and report; return 1 if a bar is missed."""
    parser = _report.parser(str(__doc__))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(argv)
    found = imported_optional()
    print(f"optional libraries imported: {', '.join(found) or 'none'}")
    ms = measure(options.rounds)
    for name, one in ms.items():
        print(f"  import {name:13} {one['least']:8.1f} ms at least, median {one['median']:8.1f} ms")
    least = ms["tokcache"]["least"]
    bars = [
        _report.Bar("import tokcache", least, MAX_IMPORT_MS, "ms", is_ceiling=True),
        _report.Bar("optional libraries imported", len(found), 0, "", is_ceiling=True),
    ]
    figures = {"imported_optional": found, "ms": ms, "bars": _report.show_bars(bars)}
    _report.finish({"environment": _report.environment(*MODULES[1:]), **figures}, options.json)
    return 0 if all(bar.is_met for bar in bars) else 1
