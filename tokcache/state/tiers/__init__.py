"""Where the bytes of blocks are kept; every tier has one face."""

from __future__ import annotations

from typing import Protocol


class Tier(Protocol):
    """A store of payloads by block name.

    Errors: a tier that fails raises; the cache counts it and treats it as a miss.
    """

    def get(self, name: bytes) -> memoryview | None:
        """Return the payload of a block, None if it is not held; not a copy where possible."""

    def put(self, name: bytes, payload: memoryview) -> None:
        """Hold `payload` as the block's."""

    def remove(self, name: bytes) -> None:
        """Let the block's payload go; unknown names are fine."""

    def memory_usage(self) -> int:
        """Return the bytes held."""
