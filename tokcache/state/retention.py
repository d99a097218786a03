"""Retention: chooses the state to evict: unpinned, of the lowest priority, least recently used."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sized

_MIN_HEAP = 64


class Held(Protocol):
    """A block, or a snapshot, which never has children."""

    pins: int
    priority: int
    tick: int
    is_dead: bool
    is_queued: bool
    is_pinned: bool
    used_s: float

    @property
    def children(self) -> Sized:
        """Blocks that depend on it: it stays as long as there are any."""


class Retention:
    """Pinned last, then priority, then LRU, leaves first, and a time to live.

    The store holds its lock.

    A block is never less recent than those below it, so taking leaves first takes the least
    recent first too. Each block has at most one place in the heap. A block that was used after it
    was pushed, or is no longer a leaf, is corrected when it is popped: using a block costs no heap
    operation.

    Units: `ttl_s` seconds after its last use a state is expired, unless it is pinned; None: never.
    Cost:  O(1) a use, O(log n) a victim.
    """

    def __init__(self, ttl_s: float | None) -> None:
        self.ttl_s = ttl_s
        self._clock = 0
        self._heap: list[tuple[bool, int, int, int, Held]] = []
        self._compact_at = _MIN_HEAP

    def use(self, held: Iterable[Held], now: float) -> None:
        """Note that these serve a request now."""
        self._clock += 1
        for each in held:
            each.tick = self._clock
        if self.ttl_s is not None:  # a float takes 24 bytes, which the overhead does not count
            for each in held:
                each.used_s = now

    def is_expired(self, held: Held, now: float) -> bool:
        """Return whether the last use was longer ago than `ttl_s`; never for a pinned state."""
        is_old = self.ttl_s is not None and now - held.used_s > self.ttl_s
        return is_old and not held.is_pinned

    def watch(self, held: Held) -> None:
        """Note that `held` has no children and may become a victim."""
        if not held.is_queued and not held.is_dead:
            held.is_queued = True
            item = (held.is_pinned, held.priority, held.tick, id(held), held)
            heapq.heappush(self._heap, item)
            if len(self._heap) > self._compact_at:
                # Blocks that were removed otherwise than as victims would stay here forever.
                self._heap = [item for item in self._heap if not item[-1].is_dead]
                heapq.heapify(self._heap)
                self._compact_at = max(_MIN_HEAP, 2 * len(self._heap))

    def unpinned(self) -> None:
        """Note that states are no longer pinned: they may be victims before others in the heap."""
        held = [item[-1] for item in self._heap if not item[-1].is_dead]
        self._heap = [(each.is_pinned, each.priority, each.tick, id(each), each) for each in held]
        heapq.heapify(self._heap)

    def victim(self) -> Held | None:
        """Return the first that may be evicted, None if all are in use."""
        in_use: list[Held] = []
        found = self._next(in_use)
        for held in in_use:
            self.watch(held)
        return found

    def _next(self, in_use: list[Held]) -> Held | None:
        while self._heap:
            *rank, _, held = heapq.heappop(self._heap)
            held.is_queued = False
            if held.is_dead or held.children:
                continue  # removed, or no longer a leaf: watched again when it becomes one
            if rank != [held.is_pinned, held.priority, held.tick]:
                self.watch(held)
            elif held.pins:
                in_use.append(held)
            else:
                return held
        return None
