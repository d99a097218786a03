"""The object-free tables in threads, under ThreadSanitizer; it can't be loaded into Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs gcc and Linux")
    if importlib.util.find_spec("Cython") is None:
        pytest.skip("needs Cython, to make C from the tables")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import check_native  # noqa: PLC0415 (a script, found by the path above)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    try:
        made: Path = check_native.built_races(ROOT, tmp_path_factory.mktemp("races"))
    except SystemExit as error:
        if "tsan" in str(error):
            pytest.skip("gcc has no ThreadSanitizer here")
        raise
    return made


def run(program: Path, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 (built above)
        [str(program), mode], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["locked", "apart"])
def test_lookups_write_nothing_and_tables_share_nothing(program: Path, mode: str) -> None:
    done = run(program, mode)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_planted_race_is_found(program: Path) -> None:
    done = run(program, "planted")
    assert done.returncode != 0
    assert "data race" in done.stderr
