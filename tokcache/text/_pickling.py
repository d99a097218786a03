"""The function that a pickle of TokenIds names: processes with either implementation have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# The TokenIds class of this process. `_implementation` sets it, because the modules of both classes
# import `unpickle` and so this module can't import the choice between them.
token_ids: Callable[[memoryview], Any]


def unpickle(data: bytes) -> Any:
    """Return the ids in a pickle of either implementation; `data` is in native byte order."""
    return token_ids(memoryview(data).cast("i"))  # noqa: F821 (set by `_implementation`)
