"""The native modules and the reference implementation; most tests run on both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tokcache.text import _implementation
from tokcache.text._reference import freezing, l0, segments, token_ids


@dataclass(frozen=True)
class Implementation:
    """The classes and functions of one implementation.

    `l1` is the module with the classes of L1, `freezing` the one that freezes chats.
    """

    token_ids: Any
    l0_cache: Any
    l1: Any
    freezing: Any

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Build all tokenizers that are wrapped from now on with these classes."""
        freezing = self.freezing
        own = {"TokenIds": self.token_ids, "L0Cache": self.l0_cache}
        own |= {"freeze": freezing.freeze, "freeze_messages": freezing.freeze_messages}
        for name in _implementation.__all__:
            value = own[name] if name in own else getattr(self.l1, name)
            monkeypatch.setattr(_implementation, name, value)


REFERENCE = Implementation(token_ids.TokenIds, l0.L0Cache, segments, freezing)


def native() -> Implementation:
    try:
        from tokcache.text import _l0, _token_ids  # noqa: PLC0415 (may not be built)
        from tokcache.text.chat import _freezing  # noqa: PLC0415 (may not be built)
        from tokcache.text.segments import _l1  # noqa: PLC0415 (may not be built)
    except ImportError:
        pytest.skip("REQUIRED: the native modules are not built")
    return Implementation(_token_ids.TokenIds, _l0.L0Cache, _l1, _freezing)


def implementation(name: str) -> Implementation:
    return REFERENCE if name == "reference" else native()


both = pytest.mark.parametrize("name", ["reference", "native"])
