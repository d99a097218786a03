"""TokenIds: native where it was built, else the plain-Python twin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokcache.text._native import is_native

if TYPE_CHECKING or is_native():
    from tokcache.text._token_ids import TokenIds
else:
    from tokcache.text._token_ids_py import TokenIds

__all__ = ["TokenIds"]


def unpickle(data: bytes) -> TokenIds:
    """Return the ids that either twin pickled (native byte order)."""
    return TokenIds(memoryview(data).cast("i"))
