"""Pickles of TokenIds, which processes with either implementation read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# The class that this process uses. `_implementation` sets it: the classes that are chosen between
# name `unpickle` in their pickles, and so can't depend on the choice.
token_ids: Callable[[memoryview], Any]


def unpickle(data: bytes) -> Any:
    """Return the ids that either implementation pickled (native byte order)."""
    return token_ids(memoryview(data).cast("i"))  # noqa: F821 (set by `_implementation`)
