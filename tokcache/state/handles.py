"""Results of a look-up: a RestorePlan of blocks, or a StateHandle of a snapshot.

Both are in use, so not evicted, until closed. They know their store by a protocol (Holder).
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from tokcache.errors import StateError

if TYPE_CHECKING:
    from types import TracebackType

    from tokcache.state.index import Node
    from tokcache.state.reasons import Miss
    from tokcache.state.snapshot_index import Snapshot

_log = logging.getLogger("tokcache")

_MAX_CLEARED = 1024  # scopes whose last clear is remembered; one more makes all work void

BlockIO = Callable[[int, int, memoryview], None]
"""Copies the state of positions [start, stop) into or out of a buffer; raises if it fails."""
Trim = Callable[[int], object]
"""Removes the restored positions from `n_tokens` on; returns False or raises if it fails."""


class Clears:
    """When each scope was cleared last, as the number of clears up to then.

    Units:   `n` clears, of one scope or of all.
    Threads: the store's lock is held for `add`; reading needs none.
    """

    def __init__(self) -> None:
        self.n = 0
        self._all = 0
        self._of_scope: dict[str | None, int] = {}

    def add(self, scope: str | None) -> None:
        """Count a clear of `scope`, or of everything."""
        n = self.n + 1
        if scope is not None and len(self._of_scope) < _MAX_CLEARED:
            self._of_scope[scope] = n
        else:
            self._all = n
            self._of_scope = {}
        self.n = n  # last: work that began with the number before sees the clear

    def has(self, scope: str | None, since: int) -> bool:
        """Return whether `scope` was cleared after the first `since` clears."""
        cleared = self._of_scope.get(scope, 0)  # before `_all`, which `add` sets before it
        return self._all > since or cleared > since


class Work:
    """An operation under way for one scope: void from the moment that the scope is cleared."""

    __slots__ = ("_clears", "_since", "scope")

    def __init__(self, clears: Clears, scope: str | None) -> None:
        self._clears, self._since, self.scope = clears, clears.n, scope

    @property
    def is_void(self) -> bool:
        """Whether the scope was cleared since the operation began."""
        return self._since != self._clears.n and self._clears.has(self.scope, self._since)


class Holder(Protocol):
    """The store that a plan or handle belongs to.

    Threads: safe; `release_later` takes no lock, so that the garbage collector may call it.
    """

    def refuse(self, reason: str) -> None:
        """Count a state that was not used."""

    def count_restored(
        self, n_tokens: int, seconds: float, *, n_in_context: int = 0, is_hit: bool = False
    ) -> None:
        """Count restored positions and those that were in the engine's context."""

    def release_later(self, held: list[Node] | list[Snapshot]) -> None:
        """Unpin `held` at the next operation."""


class InUse(ABC):
    """A result of a look-up that keeps its states from being evicted until it is closed.

    Threads: one at a time; closing takes no lock, so that the garbage collector may do it.
    """

    @abstractmethod
    def close(self) -> None:
        """Release the states."""

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


class SnapshotHolder(Holder, Protocol):
    """The snapshot store that a handle belongs to."""

    def touch(self, snapshot: Snapshot) -> bool:
        """Note that a state is in use now; False if it is gone."""

    def pin(self, snapshot: Snapshot, *, is_pinned: bool) -> bool:
        """Keep a state from being evicted or expiring, or unpin it; False if it is gone."""

    def remove(self, snapshot: Snapshot) -> int:
        """Remove a state from every tier; return how many went."""


class StoredBlock(NamedTuple):
    """One block of a plan: positions [start, stop) and their state; it serves [start, until)."""

    start: int
    stop: int
    payload: memoryview
    until: int


class RestorePlan(InUse):
    """The blocks of the longest usable prefix; in use, hence not evicted, until it is closed.

    `miss` says why they serve no more of the tokens that were asked for; None if they serve all.

    Units:  `n_tokens` positions that the blocks serve; the last block may reach further, its
            positions from `n_tokens` on belong to other tokens and have to be trimmed.
    """

    miss: Miss | None = None

    def __init__(
        self,
        cache: Holder,
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
        """Return the position to restore from, a block's start, if `n_tokens` are in place."""
        for block in self.blocks:
            if block.until > n_tokens:
                return block.start
        return n_tokens

    @property
    def is_cleared(self) -> bool:
        """Whether the blocks were cleared since they were found: then none is restored."""
        return any(work.is_void for work in self._works)

    def restore(self, load: BlockIO, *, start: int = 0, trim: Trim | None = None) -> int:
        """Load the blocks from position `start` on; return the number of positions in place.

        Positions before `start` are in the engine's context, and counted as kept there. Where this
        chain branches off inside a block, `trim` removes the block's positions beyond that point
        before the next is loaded; without `trim` the restore ends there. A block that fails, or a
        clear of the cache or scope, ends the restore: the blocks before it stay, and a counter goes
        up.
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
            except Exception:  # noqa: BLE001  (any failure is a miss: the prompt is decoded)
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


def _trim(trim: Trim, n_tokens: int) -> None:
    if trim(n_tokens) is False:
        raise ValueError(f"the restored blocks can't be trimmed to {n_tokens} positions")


class StateHandle(InUse):
    """A state that was found; not evicted until the handle is closed or collected.

    Units:  `n_tokens` tokens of the prefix, `n_past` positions as they were stored, `n_bytes`
            bytes of the state, `last_used` seconds since the epoch, `hits` look-ups that found it.
    Errors: StateError from `state` once the state was removed or cleared, or the handle closed.
    """

    def __init__(self, cache: SnapshotHolder, snapshot: Snapshot, payload: memoryview) -> None:
        self._cache, self.snapshot = cache, snapshot
        self._payload: memoryview | None = payload
        self._is_counted = False
        self.n_bytes = payload.nbytes
        self.hits, self.last_used = snapshot.hits, snapshot.used_at

    @property
    def n_tokens(self) -> int:
        """The number of tokens of the prefix."""
        return self.snapshot.n_tokens

    @property
    def n_past(self) -> int:
        """The engine's own count of positions, as it was stored."""
        return self.snapshot.n_past

    @property
    def priority(self) -> int:
        """The priority given to `store`: states of the lowest are evicted first."""
        return self.snapshot.priority

    @property
    def is_stale(self) -> bool:
        """Whether the state was removed, or the handle closed."""
        return self._payload is None or self.snapshot.is_dead

    @property
    def state(self) -> memoryview:
        """The bytes that were stored, read-only, not a copy; valid while the handle is open."""
        payload = self.payload()
        if not self._is_counted:
            self._is_counted = True
            self._cache.count_restored(self.n_tokens, 0.0)
        return payload

    def payload(self) -> memoryview:
        """Return `state` without counting its tokens as restored."""
        if self._payload is None or self.snapshot.is_dead:
            why = "its handle was closed" if self._payload is None else "it was removed"
            raise StateError(f"this state is gone: {why}; ask find() again")
        return self._payload

    def touch(self) -> bool:
        """Note that the state is in use now; False if it is gone."""
        return not self.is_stale and self._cache.touch(self.snapshot)

    def pin(self, *, is_pinned: bool = True) -> bool:
        """Keep the state from being evicted or expiring, or unpin it; False if it is gone."""
        return not self.is_stale and self._cache.pin(self.snapshot, is_pinned=is_pinned)

    def remove(self) -> int:
        """Remove the state from every tier; return 1, or 0 if it was removed already.

        Where a tier fails to remove it, a counter and a line in the log say so. `clear(scope=…)` of
        the cache removes all of a tenant's.
        """
        return self._cache.remove(self.snapshot)

    def close(self) -> None:
        """Release the state."""
        payload, self._payload = self._payload, None
        if payload is not None:
            self._cache.release_later([self.snapshot])
