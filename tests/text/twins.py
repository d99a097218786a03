"""The native module and its plain-Python twin, side by side; tests of a face run on both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tokcache.text import _l0_py, _token_ids_py


@dataclass(frozen=True)
class Twin:
    token_ids: Any
    l0_cache: Any


PYTHON = Twin(_token_ids_py.TokenIds, _l0_py.L0Cache)


def native() -> Twin:
    try:
        from tokcache.text import _l0, _token_ids  # noqa: PLC0415 (may not be built)
    except ImportError:
        pytest.skip("REQUIRED: the native modules are not built")
    return Twin(_token_ids.TokenIds, _l0.L0Cache)


def twin(name: str) -> Twin:
    return PYTHON if name == "python" else native()


both = pytest.mark.parametrize("name", ["python", "native"])
