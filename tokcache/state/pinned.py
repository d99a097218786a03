"""PinnedPrefixes: prefixes whose blocks are evicted after all others, until their pins end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokcache.state.index import Node
    from tokcache.state.retention import Retention


class PinnedPrefixes:
    """The pinned prefixes, by the block that holds the last position of each.

    The store holds its lock.
    """

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._ends: dict[Node, set[int]] = {}

    def pin(self, nodes: list[Node], n_tokens: int) -> None:
        """Evict these blocks, which hold a prefix of `n_tokens`, after all that are not pinned."""
        for node in nodes:
            node.is_pinned = True
        if nodes:
            self._ends.setdefault(nodes[-1], set()).add(n_tokens)

    def unpin(self, nodes: list[Node], n_tokens: int) -> list[Node]:
        """End the pin of that prefix; return the blocks that no other pinned prefix needs."""
        ends = self._ends.get(nodes[-1], set()) if nodes else set()
        ends.discard(n_tokens)
        if nodes and not ends:
            self._ends.pop(nodes[-1], None)
        free: list[Node] = []
        for node in reversed(nodes):
            is_needed = any(child.is_pinned for child in node.children.values())
            if is_needed or node in self._ends:
                break
            node.is_pinned = False
            free.append(node)
        self._retention.unpinned()
        return free

    def removed(self, node: Node) -> None:
        """Note that a block was taken out."""
        self._ends.pop(node, None)

    def check(self) -> None:
        """Raise AssertionError if a block at the end of a pinned prefix is not pinned."""
        if any(end.is_dead or not end.is_pinned for end in self._ends):
            raise AssertionError("a pinned prefix ends at a block that is gone or not pinned")
