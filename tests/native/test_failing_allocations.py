"""Allocations that fail, one after the other: a MemoryError, nothing corrupted, nothing lost.

Here a share of them; `python tools/check_native.py allocations` lets each one fail.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.text.implementations import native

SOURCE = Path(__file__).with_name("failing_allocations.c")
ROOT = Path(__file__).resolve().parents[2]
# Every n-th allocation, so that each scenario takes about two seconds.
STRIDES = {
    "freezing": 7,
    "id_lengths": 11,
    "token_ids": 17,
    "l0": 17,
    "l0_crowd": 101,
    "l1": 41,
    "l1_beginnings": 13,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the allocators that fail."""
    native()
    if sys.version_info[:2] != (3, 11):
        pytest.skip("checked on 3.11: every Python loses other blocks of its own without memory")
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the library replaces glibc's allocators")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    made = tmp_path_factory.mktemp("allocations") / "failing_allocations.so"
    flags = ["-O2", "-shared", "-fPIC", "-fno-builtin"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made)], check=True)  # noqa: S603
    return made


def run(library: Path, name: str, stride: int) -> subprocess.CompletedProcess[str]:
    first = stride // 2
    return subprocess.run(  # noqa: S603 (our own code)
        [
            sys.executable, "-X", "faulthandler", "-m", "tests.native.failing_allocations",
            name, str(first), str(stride),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"},
    )  # fmt: skip


@pytest.mark.parametrize("name", STRIDES)
def test_nothing_is_corrupted_or_lost_without_memory(library: Path, name: str) -> None:
    done = run(library, name, STRIDES[name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "allocations with all later ones" in done.stdout


@pytest.mark.parametrize(
    ("name", "found"), [("planted_leak", "leaks"), ("planted_count", "self.n == len")]
)
def test_planted_faults_are_found(library: Path, name: str, found: str) -> None:
    done = run(library, name, 1)
    assert done.returncode == 1
    assert found in done.stderr


def test_no_list_comprehension_is_compiled() -> None:
    # Cython 3.3.1 releases an item twice if the list can't grow (since cython/cython#7748). Only
    # the checks for tests may have some.
    function = re.compile(r"^ *(?:cdef|def) [^=\n]*?(\w+)\(", re.MULTILINE)
    inside = r"(?:[^\[\](){}]|\[[^\]]*\]|\([^()]*\))*"
    comprehension = re.compile(rf"(?:\[|\b(?:list|tuple|sorted|set|sum)\(){inside}\sfor \w+ in ")
    for path in sorted((ROOT / "ext").rglob("*.p[yx]*")):
        code = re.sub(r'#.*|"""(?s:.*?)"""', "", path.read_text())
        starts = [*function.finditer(code)]
        stops = [*(one.start() for one in starts[1:]), len(code)]
        for one, stop in zip(starts, stops, strict=False):
            found = comprehension.search(code[one.start() : stop])
            assert not found or "check" in one[1], f"{path}: {one[1]}: {found}"
