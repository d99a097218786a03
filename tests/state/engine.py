"""An engine double: the state of a position is a digest of all tokens up to it."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokcache.state.cache import PrefixStateCache
    from tokcache.state.handles import RestorePlan

POSITION_BYTES = 4


def state_of(tokens: Sequence[int], start: int, stop: int) -> bytes:
    state, out = 0, bytearray()
    for position, token in enumerate(tokens[:stop]):
        state = zlib.crc32(token.to_bytes(4, "little"), state)
        if position >= start:
            out += state.to_bytes(POSITION_BYTES, "little")
    return bytes(out)


class Engine:
    """Counts the positions that it copies, and fails at a chosen one."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.reads: list[tuple[int, int]] = []

    def save(
        self,
        cache: PrefixStateCache,
        tokens: Sequence[int],
        fingerprint: bytes = b"m",
        scope: str | None = None,
        *,
        aligned: bool = False,
        public_tokens: int = 0,
    ) -> int:
        def read(start: int, stop: int, buffer: memoryview) -> None:
            if self.fail_at is not None and start <= self.fail_at < stop:
                raise RuntimeError("no state here")
            self.reads.append((start, stop))
            buffer[:] = state_of(tokens, start, stop)

        def n_bytes(start: int, stop: int) -> int:
            return (stop - start) * POSITION_BYTES

        return cache.namespace(
            fingerprint, scope=scope, public_prefix=tokens[:public_tokens], aligned=aligned
        ).save(tokens, read, n_bytes)


def restored(plan: RestorePlan, tokens: Sequence[int]) -> int:
    """Restore `plan`, compare every position that it serves, and return their number."""

    until = {block.start: block.until for block in plan.blocks}
    loaded: list[int] = [0]

    def load(start: int, stop: int, payload: memoryview) -> None:
        assert start == loaded[-1]  # the blocks before end here, or were trimmed to here
        n_bytes = (until[start] - start) * POSITION_BYTES
        assert len(payload) == (stop - start) * POSITION_BYTES
        assert bytes(payload[:n_bytes]) == state_of(tokens, start, until[start])
        loaded.append(stop)

    def trim(n_tokens: int) -> None:
        assert n_tokens < loaded[-1]
        loaded[-1] = n_tokens

    return plan.restore(load, trim=trim)
