"""RestorePlan: the blocks that serve a prompt, in use until the plan is closed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from types import TracebackType

    from tokcache.state.cache import PrefixStateCache
    from tokcache.state.core import Work
    from tokcache.state.index import Node

_log = logging.getLogger("tokcache")

BlockIO = Callable[[int, int, memoryview], None]
"""Copies the state of positions [start, stop) into or out of the buffer; raises if it can't."""
Trim = Callable[[int], object]
"""Removes the positions from `n_tokens` on from what was loaded; False or raises if it can't."""


class StoredBlock(NamedTuple):
    """One block of a plan: positions [start, stop) and their state; it serves [start, until)."""

    start: int
    stop: int
    payload: memoryview
    until: int


class RestorePlan:
    """The blocks of the longest usable prefix; in use, hence not evicted, until it is closed.

    Units:  `n_tokens` positions that the blocks serve; the last block may reach further, what it
            holds from `n_tokens` on belongs to other tokens and has to be trimmed.
    Threads: one at a time; closing takes no lock, so the garbage collector may do it.
    """

    def __init__(
        self,
        cache: PrefixStateCache,
        nodes: list[Node],
        blocks: list[StoredBlock],
        n_tokens: int,
        works: list[Work],
        *,
        counts_tokens: bool,
    ) -> None:
        self._cache = cache
        self._nodes = nodes
        self._works = works
        self._counts_tokens = counts_tokens
        self._counts_context = counts_tokens
        self.blocks = blocks
        self.n_tokens = n_tokens

    def start_beyond(self, n_tokens: int) -> int:
        """Return where to restore from if `n_tokens` positions are in place: a block's start."""
        for block in self.blocks:
            if block.until > n_tokens:
                return block.start
        return n_tokens

    @property
    def is_cleared(self) -> bool:
        """Whether what the blocks hold was cleared since they were found: then none is restored."""
        return any(work.is_void for work in self._works)

    def restore(self, load: BlockIO, *, start: int = 0, trim: Trim | None = None) -> int:
        """Load the blocks from position `start` on; return how many positions now hold.

        What comes before `start` is in the engine's context, and counted as kept there. Where this
        chain left another one inside a block, `trim` removes what the block holds beyond that point
        before the next is loaded; without `trim` the restore ends there. A block that fails ends
        the restore: what came before it stays, a counter tells. So does clearing the cache or the
        scope.
        """
        began, reached = time.perf_counter(), start
        for block in self.blocks:
            if block.start < start:
                continue
            if self.is_cleared:
                self._cache.refuse("cleared")
                break
            try:
                load(block.start, block.stop, block.payload)
                reached = block.until
                if block.until < min(block.stop, self.n_tokens):
                    if trim is None:
                        break
                    _trim(trim, block.until)
            except Exception:  # noqa: BLE001  (whatever it is, the prompt can be decoded instead)
                _log.debug("a block could not be restored", exc_info=True)
                self._cache.refuse("restore_failed")
                break
        n_restored = (reached - start) * self._counts_tokens
        n_in_context, self._counts_context = start * self._counts_context, False
        seconds = time.perf_counter() - began
        self._cache.count_restored(n_restored, seconds, n_in_context=n_in_context)
        return reached

    def close(self) -> None:
        """Release the blocks."""
        nodes, self._nodes, self.blocks = self._nodes, [], []
        if nodes:
            self._cache.release_later(nodes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _trim(trim: Trim, n_tokens: int) -> None:
    if trim(n_tokens) is False:
        raise ValueError(f"what was loaded can't be trimmed to {n_tokens} positions")
