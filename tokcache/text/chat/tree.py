"""The tree of rendered chats: messages, and the text and the template's state that they settle.

1. A chat is looked up by its messages as bytes, end to end. Messages that every known chat has in
   the same order share a node, so a chat that grows is one node, compared as one run of bytes.
2. `find` walks from a top as far as the chat is known, which may end within a node.
3. `add` extends the node at which the walk ended if nothing follows it. Otherwise it adds a node
   below; a walk that ended within a node splits it there first.

Implementation: a node's `Stretch` is immutable and is replaced, so another thread may go on with
one that it found while the tree changes. The caller holds the lock for every call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from sys import getsizeof
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokcache.text.chat.running import Head, Point

# Bytes of a node with its dict and its places in two more, and of one message in it; measured with
# sys.getsizeof. The text, the messages and the template's state come on top.
_NODE_BYTES, _MESSAGE_BYTES = 900, 260


class Stretch(NamedTuple):
    """Messages that follow one another, and the text that they settle.

    `first` is the number of messages up to and including the first one; a top has no message, but
    one entry with the state before the first message. For each entry `ends` is where its message
    ends in `keys`, `points` the last point that the chat settles up to there (None if not even the
    template's first part is settled) and `cuts` the length of the text up to that point.
    """

    first: int
    keys: bytes
    ends: tuple[int, ...]
    points: tuple[Point | None, ...]
    cuts: tuple[int, ...]
    text: str
    head: Head | None = None
    n_state_bytes: int = 0

    def n_common(self, keys: bytes, at: int) -> int:
        """Return how many of the messages a chat has whose messages are `keys` from `at` on."""

        def differs(n_messages: int) -> bool:
            return not keys.startswith(self.keys[: self.ends[n_messages - 1]], at)

        return bisect_right(range(1, len(self.ends)), 0, key=differs)


NO_MESSAGE = Stretch(first=0, keys=b"", ends=(0,), points=(None,), cuts=(0,), text="")


@dataclass(slots=True, eq=False)
class Node:
    """A stretch, and the nodes of the chats that go on in different ways after it.

    `name` is the node's key among its parent's children: its first message, or the result of a
    template's first part. `latest` is the child that was used last.
    """

    name: bytes
    stretch: Stretch
    parent: Node | None = None
    children: dict[bytes, Node] = field(default_factory=dict)
    latest: Node | None = None
    n_bytes: int = 0
    is_linked: bool = False


@dataclass(slots=True, eq=False)
class Root(Node):
    """The settings of a call; below it are the chats that were rendered with them.

    It is the top of its chats, unless it is `is_volatile`: then the first part of the template runs
    every time, and there is a top below for each of its results.
    """

    place: tuple[Any, bytes] = field(kw_only=True)
    names: dict[str, Any] = field(kw_only=True)
    scope: str | None = None
    is_volatile: bool = False


class Found(NamedTuple):
    """How far a chat is known.

    Its first `n_messages` are known; the last of them is entry `n_entries - 1` of `node`. `texts`,
    one after the other, are the text up to `point`. `n_changes` counts the changes of the tree up
    to this look-up.
    """

    node: Node
    n_entries: int
    n_messages: int
    head: Head | None
    point: Point | None
    texts: list[str]
    n_changes: int


class ChatTree:
    """Nodes within a budget of bytes; those that nothing follows are evicted, the oldest first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = self.n_entries = self.n_insertions = self.n_evictions = 0
        self._n_changes = 0
        self.roots: dict[tuple[Any, bytes], Root] = {}
        # The nodes that nothing follows, the least recently used first.
        self.leaves: OrderedDict[Node, None] = OrderedDict()

    def find(self, top: Node, keys: bytes, ends: tuple[int, ...]) -> Found:
        """Return how far a chat is known; its messages end at `ends` in `keys`."""
        node, stretch, at = top, top.stretch, 0
        texts: list[str] = []
        n_entries = len(stretch.ends)
        while (child := node.latest) is not None and at < len(keys):
            below = child.stretch
            if not keys.startswith(below.keys, at):
                other = node.children.get(keys[at : ends[below.first - 1]])
                if other is None:
                    break
                node.latest, below = other, other.stretch
                child = other
            texts.append(stretch.text)
            node, stretch = child, below
            if not keys.startswith(below.keys, at):
                n_entries = below.n_common(keys, at)
                break
            n_entries = len(below.ends)
            at += len(below.keys)
        if not node.children and node.is_linked:
            self.leaves.move_to_end(node)
        n_messages = stretch.first + n_entries - 1
        point = stretch.points[n_entries - 1]
        if point is None:
            return Found(node, n_entries, n_messages, None, None, [], self._n_changes)
        text = stretch.text
        if n_entries < len(stretch.ends):
            text = text[: stretch.cuts[n_entries - 1]]
        texts.append(text)
        return Found(node, n_entries, n_messages, stretch.head, point, texts, self._n_changes)

    def add(self, top: Node, found: Found, new: Stretch, keys: bytes, ends: tuple[int, ...]) -> str:
        """Add the messages that follow those found; return the reason if they are not kept."""
        if not top.is_linked:
            return "cleared"
        if found.n_changes != self._n_changes:
            found = self.find(top, keys, ends)
            if found.n_messages != new.first - 1:
                return "cleared" if found.n_messages < new.first - 1 else ""
        node, n_entries = found.node, found.n_entries
        is_within = n_entries < len(node.stretch.ends)
        is_end = not (is_within or node.children or node is top)
        stretch = _joined(node.stretch, new) if is_end else new
        n_bytes = _n_bytes(stretch) + len(node.name if is_end else new.keys)
        if n_bytes > self.max_bytes // 2:
            return "oversize"
        n_more = n_bytes - node.n_bytes if is_end else n_bytes
        if is_within:  # a split adds a node, and the name of the lower one
            n_more += _NODE_BYTES + len(node.stretch.keys)
        if self.n_bytes + n_more > self.max_bytes:
            self.make_room(n_more, but=node)
            if not node.is_linked:
                return "cleared"
        if is_end:
            self._n_changes += 1
            self._resize(node, stretch, n_bytes)
        else:
            above = self._split(node, n_entries) if is_within else node
            self._link(Node(new.keys[: new.ends[0]], new), above)
        self.n_entries += len(new.ends)
        self.n_insertions += len(new.ends)
        return ""

    def add_root(self, root: Root) -> str:
        """Put a new root into its place; return the reason if it is not kept."""
        n_bytes = _n_bytes(root.stretch) + len(root.name)
        if n_bytes > self.max_bytes // 2:
            return "oversize"
        self.make_room(n_bytes)
        self._link(root, None)
        self.n_entries += 1
        return ""

    def put_top(self, top: Node, root: Root, stretch: Stretch) -> str:
        """Give a top the state before the first message; a new one is put below the root.

        Return the reason if it is not kept. A root is its own top. One that was removed stays
        removed: its scope may have been cleared, and its place may have a new root.
        """
        if not root.is_linked:
            return "cleared"
        was_linked = top.is_linked
        if was_linked:
            if top.stretch.points[0] is not None:
                return ""
            n_bytes = top.stretch.n_state_bytes + stretch.n_state_bytes
            stretch = stretch._replace(n_state_bytes=n_bytes)
        elif top.name in root.children:
            return ""
        n_bytes = _n_bytes(stretch) + len(top.name)
        if n_bytes > self.max_bytes // 2:
            return "oversize"
        self.make_room(n_bytes - top.n_bytes, but=top if was_linked else root)
        if not root.is_linked or (was_linked and not top.is_linked):
            return "cleared"
        if was_linked:
            self._resize(top, stretch, n_bytes)
            return ""
        top.stretch = stretch
        self._link(top, root)
        self.n_entries += 1
        self.n_insertions += 1
        return ""

    def _link(self, node: Node, parent: Node | None) -> None:
        """Put a node below another, or a root into its place."""
        self._n_changes += 1
        node.parent, node.is_linked = parent, True
        if isinstance(node, Root):
            self.roots[node.place] = node
        elif parent is not None:
            parent.children[node.name] = parent.latest = node
            self.leaves.pop(parent, None)
        self.leaves[node] = None
        self._resize(node, node.stretch, _n_bytes(node.stretch) + len(node.name))

    def _resize(self, node: Node, stretch: Stretch, n_bytes: int) -> None:
        node.stretch = stretch
        self.n_bytes += n_bytes - node.n_bytes
        node.n_bytes = n_bytes

    def _split(self, node: Node, n_entries: int) -> Node:
        """Return a new node with the first entries of one, which keeps the others below it."""
        whole, parent = node.stretch, node.parent
        end, cut = whole.ends[n_entries - 1], whole.cuts[n_entries - 1]
        is_settled = whole.points[n_entries - 1] is not None
        upper = Node(
            node.name,
            Stretch(
                first=whole.first,
                keys=whole.keys[:end],
                ends=whole.ends[:n_entries],
                points=whole.points[:n_entries],
                cuts=whole.cuts[:n_entries],
                text=whole.text[:cut],
                head=whole.head if is_settled else None,
                n_state_bytes=whole.n_state_bytes // 2,
            ),
        )
        lower = Stretch(
            first=whole.first + n_entries,
            keys=whole.keys[end:],
            ends=tuple([each - end for each in whole.ends[n_entries:]]),
            points=whole.points[n_entries:],
            cuts=tuple([each - cut for each in whole.cuts[n_entries:]]),
            text=whole.text[cut:],
            head=whole.head,
            n_state_bytes=whole.n_state_bytes - whole.n_state_bytes // 2,
        )
        is_leaf = node in self.leaves
        self._link(upper, parent)
        del self.leaves[upper]
        node.name = lower.keys[: lower.ends[0]]
        node.parent = upper
        upper.children[node.name] = upper.latest = node
        if is_leaf:
            self.leaves[node] = None
        self._resize(node, lower, _n_bytes(lower) + len(node.name))
        return upper

    def make_room(self, n_bytes: int, but: Node | None = None) -> None:
        """Evict until `n_bytes` more fit; `but` is evicted only after all other leaves."""
        while self.leaves and self.n_bytes + n_bytes > self.max_bytes:
            oldest = next(iter(self.leaves))
            if oldest is but and len(self.leaves) > 1:
                self.leaves.move_to_end(oldest)
                continue
            self.remove(oldest)
            self.n_evictions += len(oldest.stretch.ends)

    def remove(self, node: Node) -> None:
        """Remove a node that nothing follows."""
        self._n_changes += 1
        del self.leaves[node]
        node.is_linked = False
        self.n_entries -= len(node.stretch.ends)
        self.n_bytes -= node.n_bytes
        node.n_bytes = 0
        parent = node.parent
        if isinstance(node, Root):
            del self.roots[node.place]
        elif parent is not None:
            del parent.children[node.name]
            if parent.latest is node:
                parent.latest = next(iter(parent.children.values()), None)
            if not parent.children:
                self.leaves[parent] = None
                self.leaves.move_to_end(parent, last=False)


def _joined(old: Stretch, new: Stretch) -> Stretch:
    end, cut = len(old.keys), len(old.text)
    return Stretch(
        first=old.first,
        keys=old.keys + new.keys,
        ends=old.ends + tuple([end + each for each in new.ends]),
        points=old.points + new.points,
        cuts=old.cuts + tuple([cut + each for each in new.cuts]),
        text=old.text + new.text,
        head=new.head,
        n_state_bytes=old.n_state_bytes + new.n_state_bytes,
    )


def _n_bytes(stretch: Stretch) -> int:
    n_bytes = _NODE_BYTES + _MESSAGE_BYTES * len(stretch.ends)
    return n_bytes + len(stretch.keys) + getsizeof(stretch.text) + stretch.n_state_bytes
