"""What every benchmark shares: medians, the machine's description, the JSON file."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser that knows `--json FILE`."""
    made = argparse.ArgumentParser(prog="python -m bench", description=doc)
    made.add_argument("--json", type=Path, help="write the figures to this file")
    return made


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 (fixed words)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment(*packages: str) -> dict[str, Any]:
    """Return what a figure depends on: versions, CPU, commit."""
    return {
        "python": sys.version.split()[0],
        "cpu": _cpu(),
        "commit": _commit(),
        "packages": {name: _version(name) for name in ("tokcache", *packages)},
    }


def finish(figures: dict[str, Any], file: Path | None) -> None:
    """Write `figures` to `file` if one was named."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"wrote {file}")
