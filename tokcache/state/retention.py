"""Which block goes when room is needed: the leaf that was used longest ago."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokcache.state.index import Node

_MIN_HEAP = 64


class LeastRecentLeaf:
    """LRU over the leaves of the tree; not thread-safe, the cache locks.

    A block is never less recent than those below it, so taking leaves first takes the least
    recent first too. Each block has at most one place in the heap; one that was used meanwhile,
    or is a leaf no more, is put right when it comes up: using a block costs no heap operation.

    Cost: O(1) a use, O(log n) a victim.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._heap: list[tuple[int, int, Node]] = []
        self._compact_at = _MIN_HEAP

    def use(self, nodes: Iterable[Node]) -> None:
        """Note that these blocks serve a request now."""
        self._clock += 1
        for node in nodes:
            node.tick = self._clock

    def watch(self, node: Node) -> None:
        """Note that `node` is a leaf and may become a victim."""
        if not node.is_queued and not node.is_dead:
            node.is_queued = True
            heapq.heappush(self._heap, (node.tick, id(node), node))
            if len(self._heap) > self._compact_at:
                self._compact()

    def _compact(self) -> None:
        # Blocks that were removed otherwise than as victims would stay here for ever.
        self._heap = [item for item in self._heap if not item[2].is_dead]
        heapq.heapify(self._heap)
        self._compact_at = max(_MIN_HEAP, 2 * len(self._heap))

    def victim(self) -> Node | None:
        """Return the least recent leaf that nobody uses, None if there is none."""
        in_use: list[Node] = []
        found = self._next(in_use)
        for node in in_use:
            self.watch(node)
        return found

    def _next(self, in_use: list[Node]) -> Node | None:
        while self._heap:
            tick, _, node = heapq.heappop(self._heap)
            node.is_queued = False
            if node.is_dead or node.children:
                continue  # gone, or a leaf no more: watched again when it becomes one
            if tick != node.tick:
                self.watch(node)
            elif node.pins:
                in_use.append(node)
            else:
                return node
        return None
