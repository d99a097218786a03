"""Fuzzes with atheris: `python -m tests.fuzz list`, `run NAME --seconds 60`, `all --seconds 3600`.

`all` divides its seconds between the targets. Each runs in a process of its own, guided by the
coverage of tokcache, from the seeds in `corpus/`. An input that raises is kept in the folder of
`--found`, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import TARGETS


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("command", choices=["list", "run", "all"])
    parser.add_argument("name", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"))
    parser.add_argument("--planted", action="store_true", help="fuzz code with a planted fault")
    given = parser.parse_args()
    if given.command == "list":
        for each in TARGETS.values():
            print(f"{each.name:16} {each.about}")
        return 0
    if given.command == "run" and given.name is None:
        parser.error("run needs the name of a target")
    names = [given.name] if given.name else list(TARGETS)
    seconds = max(1, given.seconds // len(names))
    failed = [name for name in names if _in_a_process(name, seconds, given)]
    print(f"{len(names)} targets, {seconds} s each: ", end="")
    print("no fault" if not failed else f"faults in {', '.join(failed)}, see {given.found}")
    return 1 if failed else 0


def _in_a_process(name: str, seconds: int, given: argparse.Namespace) -> bool:
    """Fuzz one target; return whether it found a fault."""
    print(f"== {name}, {seconds} s, seed {given.seed}", flush=True)
    given.found.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.one", name, str(seconds), str(given.seed)]
    command += [str(given.found), *(["--planted"] if given.planted else [])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    lines = (done.stdout + done.stderr).splitlines()
    shown = lines[-40:] if done.returncode else [each for each in lines if "Done " in each]
    print("\n".join(shown), flush=True)
    return done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
