"""The native module and its plain-Python twin, side by side; tests of a face run on both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tokcache.text import _l0_py, _token_ids_py
from tokcache.text.engines.fast import agreed_code_points
from tokcache.text.segments import _reference


@dataclass(frozen=True)
class Twin:
    token_ids: Any
    l0_cache: Any
    l1: Any

    def use_for_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have L0 and L1 keep what they know in this twin."""
        monkeypatch.setattr("tokcache.text.segments.cache.TokenIds", self.token_ids)
        monkeypatch.setattr("tokcache.text.segments.cache.SegmentCache", self.l1.SegmentCache)
        monkeypatch.setattr("tokcache.text.segments.cache.Walk", self.l1.Walk)
        monkeypatch.setattr("tokcache.text.segments.id_lengths.TokenBytes", self.l1.TokenBytes)
        agreed = self.l1.CodePoints(agreed_code_points())
        monkeypatch.setattr("tokcache.text.segments.cache._agreed", lambda: agreed)
        monkeypatch.setattr("tokcache.text.tokenizer.Walk", self.l1.Walk)
        monkeypatch.setattr("tokcache.text.tokenizer.TokenIds", self.token_ids)
        monkeypatch.setattr("tokcache.text.tokenizer.L0Cache", self.l0_cache)


PYTHON = Twin(_token_ids_py.TokenIds, _l0_py.L0Cache, _reference)


def native() -> Twin:
    try:
        from tokcache.text import _l0, _token_ids  # noqa: PLC0415 (may not be built)
        from tokcache.text.segments import _l1  # noqa: PLC0415 (may not be built)
    except ImportError:
        pytest.skip("REQUIRED: the native modules are not built")
    return Twin(_token_ids.TokenIds, _l0.L0Cache, _l1)


def twin(name: str) -> Twin:
    return PYTHON if name == "python" else native()


both = pytest.mark.parametrize("name", ["python", "native"])
