"""Path: the blocks that a prompt begins with, while a look-up or save uses and extends them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tokcache.state.index import Root, root_bytes
from tokcache.state.memory import NODE_BYTES
from tokcache.state.names import TOKEN_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokcache.state.handles import Work
    from tokcache.state.index import Node
    from tokcache.state.names import RootKey
    from tokcache.state.store import Store


@dataclass(slots=True)
class NewBlock:
    """A block that is to be filed: positions [start, stop), and a buffer for their state.

    `is_unread`: its state stays in a tier below, and the buffer is empty.
    """

    tokens: bytes
    start: int
    stop: int
    buffer: memoryview
    is_unread: bool = False

    @property
    def overhead(self) -> int:
        """The bytes that the block takes besides its state."""
        return NODE_BYTES + len(self.tokens)


@dataclass(slots=True)
class Path:
    """The blocks that a prompt begins with, in use until they are released.

    `nodes` are in memory. `loose` blocks follow them: tiers below have them, and memory no room;
    `loose_point` is the name of the prefix at their end. `refusal` is why the
    block that follows is missing: the tier and its reason, or that of a save. `unread_state` is the
    state of the last block where memory has no room for it. `last_only`: each block's state stands
    for all positions before it.

    Units:  `n_tokens` positions that the blocks serve.
    Threads: the store's lock is held, except for reading.
    """

    store: Store
    root_key: RootKey
    work: Work
    root: Root | None
    nodes: list[Node]
    n_tokens: int
    loose: Sequence[tuple[int, int, memoryview]] = ()
    loose_point: bytes = b""
    refusal: str = ""
    unread_state: memoryview | None = None
    last_only: bool = False

    @classmethod
    def found(cls, store: Store, root_key: RootKey, wanted: bytes, work: Work) -> Self:
        """Return the blocks in memory that `wanted` begins with."""
        root, match = store.memory.find(root_key, wanted)
        path = cls(store, root_key, work, root, match.nodes, match.n_tokens)
        for node in path.pinned():
            node.pins += 1
        return path

    @property
    def last(self) -> Node:
        """The last block in memory, or the root."""
        if self.nodes:
            return self.nodes[-1]
        if self.root is None:
            raise AssertionError("this path has no root")
        return self.root

    @property
    def is_void(self) -> bool:
        """Whether nothing may be filed any more: cleared meanwhile, or closed."""
        return self.work.is_void or self.store.is_closed

    @property
    def held_bytes(self) -> int:
        """The bytes of memory that the path takes already."""
        return root_bytes(self.root_key) + sum(node.n_bytes for node in self.nodes)

    def point(self) -> bytes:
        """Return the name of the prefix that the blocks hold."""
        if self.loose:
            return self.loose_point
        if self.root is None:
            return Root(self.root_key, 0).name
        return self.last.point(self.n_tokens)

    def pinned(self) -> list[Node]:
        """Return the nodes to release in the end."""
        return self.nodes if self.root is None else [self.root, *self.nodes]

    def has_entry_room(self) -> bool:
        """Make room for a chain that continues the path, and its root; False if there is none."""
        if self.root is None:
            self.root = self.store.memory.pin_root(self.root_key)
        return self.root is not None and self.store.memory.has_entry_room(self.last, self.n_tokens)

    def in_the_way(self, block: NewBlock) -> Node | None:
        """Return the block that has the place of `block`, None if it is free or gone."""
        root = self.root
        if root is None or root.is_dead:
            return None
        last = self.last
        if last.is_dead:
            return None
        return self.store.memory.index.child(root, last, block.start, block.tokens)

    def file(self, block: NewBlock) -> Node | None:
        """Put a block at the end; None if that is gone, or if its place or the room is taken."""
        root, memory = self.root, self.store.memory
        if root is None or root.is_dead or self.is_void:
            return None
        last = self.last
        if last.is_dead or memory.index.child(root, last, block.start, block.tokens) is not None:
            return None
        if not memory.has_entry_room(last, block.start):
            memory.refusals["entries_in_use"] += 1
            self.refusal = "entries_in_use"
            return None
        node = memory.file(root, last, block.start, block.tokens, block.buffer)
        node.is_unread = block.is_unread
        return node

    def append(self, node: Node, n_tokens: int) -> None:
        """Extend the path by a block in memory, up to `n_tokens` positions."""
        node.pins += 1
        self.store.memory.retention.watch(node)
        self.nodes.append(node)
        self.n_tokens = n_tokens

    def note_refusal(self, wanted: bytes) -> None:
        """Remember why the block of `wanted` that follows the path was not stored."""
        if self.is_void or (self.root is not None and self.root.is_dead):
            return
        index, start = self.store.memory.index, self.n_tokens * TOKEN_BYTES
        block = wanted[start : start + self.store.block_tokens * TOKEN_BYTES]
        grain = index.grain(self.root_key)
        place = self.root_key, self.point(), block
        self.store.memory.removals.note(*place, self.refusal, grain=grain)

    def cut(self, n_tokens: int) -> None:
        """Let the path end at `n_tokens`; loose blocks go."""
        self.n_tokens, self.loose = n_tokens, ()
