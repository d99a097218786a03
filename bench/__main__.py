"""Runs one benchmark: `python -m bench NAME [--json FILE]`; NAME is a module here with a main."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import bench


def names() -> list[str]:
    """Return the names of all benchmarks."""
    found = pkgutil.iter_modules([str(Path(bench.__file__).parent)])
    shown = [m.name for m in found if not m.ispkg and not m.name.startswith("_")]
    return sorted(name.replace("_", "-") for name in shown)


def main(argv: list[str]) -> int:
    """Run the benchmark that `argv` names and return its exit code."""
    if not argv or argv[0] not in names():
        print(f"usage: python -m bench NAME [--json FILE]; NAME: {', '.join(names())}")
        return 2
    module = importlib.import_module(f"bench.{argv[0].replace('-', '_')}")
    return int(module.main(argv[1:]))


sys.exit(main(sys.argv[1:]))
