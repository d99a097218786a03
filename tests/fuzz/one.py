"""Fuzzes one target in this process: NAME SECONDS SEED FOLDER [--planted].

`python -m tests.fuzz run NAME` starts it.
"""

from __future__ import annotations

import sys
import tempfile

try:
    import atheris
except ImportError:
    sys.exit("fuzzing needs atheris: pip install atheris")

with atheris.instrument_imports(include=["tokcache"]):
    from tests.fuzz.planted import plant
    from tests.fuzz.targets import CORPUS, TARGETS

_MAX_INPUT_BYTES = 4096
_SLOWEST_S = 20  # an input that takes longer is a fault


def main() -> None:
    """Fuzz; atheris ends the process."""
    name, seconds, seed, found, *planted = sys.argv[1:]
    if planted:
        plant(name)
    # New inputs go into a folder of their own; the seeds are only read.
    with tempfile.TemporaryDirectory(prefix="tokcache-fuzz-") as own:
        limits = [f"-max_total_time={seconds}", f"-timeout={_SLOWEST_S}", f"-seed={seed}"]
        limits += [f"-max_len={_MAX_INPUT_BYTES}", f"-artifact_prefix={found}/{name}-"]
        atheris.Setup([sys.argv[0], *limits, own, str(CORPUS / name)], TARGETS[name].run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
