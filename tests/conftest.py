"""Fixtures for all tests: the folder of real tokenizers and corpora."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.machines import NIGHTLY

# Before a test module is imported, which asks for the profile.
settings.register_profile(NIGHTLY, deadline=None)

# OpenMP threads spin while they wait for each other; on a busy machine a decode of milliseconds
# then takes seconds. OpenMP reads this variable when llama.cpp is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests wait for an engine: a proof in the background would end at another moment in each run, and
# the counters would differ.
# Nor may the outcome of one run decide about another: the proof would not be tested again.
os.environ.setdefault("TOKCACHE_WAIT_FOR_ENGINE", "1")
os.environ.setdefault("TOKCACHE_REMEMBER_ENGINES", "0")

_NEXT_TO_THE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real tokenizers and corpora, which the project does not contain."""
    path = Path(os.environ.get("TOKCACHE_SHARED_DATA") or _NEXT_TO_THE_REPOSITORY)
    if not (path / "tokenizers").is_dir():
        pytest.skip(f"no real tokenizers at {path}; TOKCACHE_SHARED_DATA names their folder")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse tests that are named by an object's repr.

    The processes of pytest-xdist must collect the same names, and a repr may hold an address or
    a dict whose order differs from one process to the next.
    """
    for item in items:
        if len(item.nodeid) > 300 or " object at 0x" in item.nodeid:
            raise pytest.UsageError(f"a test is named by an object's repr: {item.nodeid:.200}")
