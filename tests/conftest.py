"""Fixtures for all tests: the folder of real tokenizers and corpora."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# OpenMP threads spin while they wait for each other; on a busy machine a decode of milliseconds
# then takes seconds. OpenMP reads this variable when llama.cpp is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_NEXT_TO_THE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real tokenizers and corpora, which the project does not contain."""
    path = Path(os.environ.get("TOKCACHE_SHARED_DATA") or _NEXT_TO_THE_REPOSITORY)
    if not (path / "tokenizers").is_dir():
        pytest.skip(f"no real tokenizers at {path}; TOKCACHE_SHARED_DATA names their folder")
    return path
