"""The tree of blocks: which stored tokens a prompt begins with.

A node is one block: 1 to `block_tokens` tokens that follow its parent's. Children are kept in
the order of their token bytes, so that the child that shares the most with a prompt stands next
to the place where the prompt would be inserted: a look-up costs the prompt's length, however
many entries there are. Siblings are prefix-free (a block that another one continues is replaced
by it), hence at most one child can match whole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from sys import getsizeof
from typing import TYPE_CHECKING

from tokcache.state.blocks import TOKEN_BYTES, child_name, root_name

if TYPE_CHECKING:
    from collections.abc import Iterator


class Node:
    """One block of a chain, or the root of a chain (no tokens, no parent)."""

    __slots__ = (
        "children",
        "is_dead",
        "is_queued",
        "n_bytes",
        "name",
        "order",
        "parent",
        "pins",
        "start",
        "stop",
        "tick",
        "tokens",
    )

    def __init__(self, name: bytes, parent: Node | None, tokens: bytes, n_bytes: int) -> None:
        self.name = name
        self.parent = parent
        self.tokens = tokens
        self.n_bytes = n_bytes
        self.start: int = parent.stop if parent else 0
        self.stop: int = self.start + len(tokens) // TOKEN_BYTES
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []
        self.pins = 0
        self.tick = 0
        self.is_dead = False
        self.is_queued = False


# Python objects of one root: node, digest, places in dicts and list. Its names are added. Checked
# against tracemalloc by tests/state/test_cache.py::test_names_of_scopes_are_counted.
ROOT_BYTES = 500


def root_bytes(fingerprint: bytes, scope: str | None) -> int:
    """Return what the root of this fingerprint and scope costs; the caller chooses both names."""
    return ROOT_BYTES + getsizeof(fingerprint) + getsizeof(scope)


class Root(Node):
    """The start of all chains of one fingerprint and scope; in use while a save extends it."""

    __slots__ = ("fingerprint", "scope")

    def __init__(self, name: bytes, fingerprint: bytes, scope: str | None) -> None:
        super().__init__(name, None, b"", root_bytes(fingerprint, scope))
        self.fingerprint = fingerprint
        self.scope = scope


@dataclass(slots=True)
class Match:
    """The blocks of the longest usable prefix, from position 0 on.

    Units: `n_tokens` positions that match; the last block may reach further and be trimmed.
    """

    nodes: list[Node] = field(default_factory=list)
    n_tokens: int = 0


def common_tokens(left: bytes, right: bytes) -> int:
    """Return how many leading tokens two int32 byte strings share."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # [0, low) is equal; each step compares half of what is left, at C speed
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low // TOKEN_BYTES


class BlockIndex:
    """All chains, by root; not thread-safe, the cache locks.

    Units: `block_tokens` positions; `n_leaves` chains that nothing continues.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.roots: dict[bytes, Root] = {}
        self.n_nodes = 0
        self.n_leaves = 0

    def root(self, fingerprint: bytes, scope: str | None) -> Root | None:
        """Return the root of a fingerprint and scope, None where nothing is stored."""
        root = self.roots.get(root_name(fingerprint, scope))
        if root is None or root.fingerprint != fingerprint or root.scope != scope:
            return None
        return root

    def add_root(self, fingerprint: bytes, scope: str | None) -> Root:
        """Add the root of a fingerprint and scope and return it."""
        name = root_name(fingerprint, scope)
        root = self.roots[name] = Root(name, fingerprint, scope)
        return root

    def remove_root(self, root: Root) -> None:
        """Take out a root that has no chains."""
        if root.children:
            raise AssertionError("only an empty root can be removed")
        del self.roots[root.name]
        root.is_dead = True

    def longest(self, root: Root, tokens: bytes, *, is_whole: bool) -> Match:
        """Return the longest usable prefix of `tokens`.

        `is_whole` leaves out a last block that would have to be trimmed.
        """
        match, node = Match(), self._full_child(root, tokens)
        last: Node = root
        while node is not None:
            match.nodes.append(node)
            last = node
            node = self._full_child(node, tokens)
        match.n_tokens = last.stop
        if not is_whole:
            self._add_partial(match, last, tokens)
        return match

    def _rest(self, node: Node, tokens: bytes) -> bytes:
        start = node.stop * TOKEN_BYTES
        return tokens[start : start + self.block_tokens * TOKEN_BYTES]

    def _full_child(self, node: Node, tokens: bytes) -> Node | None:
        rest = self._rest(node, tokens)
        child = node.children.get(rest)
        if child is not None or not node.order:
            return child
        # The one key that is a prefix of the rest is the largest that is not above it.
        place = bisect_left(node.order, rest)
        if place and rest.startswith(node.order[place - 1]):
            return node.children[node.order[place - 1]]
        return None

    def _add_partial(self, match: Match, node: Node, tokens: bytes) -> None:
        rest = self._rest(node, tokens)
        place = bisect_left(node.order, rest)
        whole = tuple(match.nodes)
        for key in node.order[max(place - 1, 0) : place + 1]:
            reach = node.stop + common_tokens(key, rest)
            if reach > match.n_tokens:
                match.nodes = [*whole, node.children[key]]
                match.n_tokens = reach

    def add(self, parent: Node, tokens: bytes, n_bytes: int) -> Node:
        """Add a block after `parent` and return it."""
        node = Node(child_name(parent.name, tokens), parent, tokens, n_bytes)
        # A parent that was a leaf hands that on to its first child.
        self.n_leaves += bool(parent.children) or parent.parent is None
        parent.children[tokens] = node
        insort(parent.order, tokens)
        self.n_nodes += 1
        return node

    def covering(self, parent: Node, tokens: bytes) -> Node | None:
        """Return the child that begins with `tokens`, if there is one."""
        place = bisect_left(parent.order, tokens)
        if place < len(parent.order) and parent.order[place].startswith(tokens):
            return parent.children[parent.order[place]]
        return None

    def superseded(self, parent: Node, tokens: bytes) -> Node | None:
        """Return the child that `tokens` continues, if there is one."""
        place = bisect_left(parent.order, tokens)
        if place and tokens.startswith(parent.order[place - 1]):
            return parent.children[parent.order[place - 1]]
        return None

    def remove(self, node: Node) -> None:
        """Take a leaf out of the tree."""
        parent = node.parent
        if parent is None or node.children:
            raise AssertionError("only a leaf can be removed")
        del parent.children[node.tokens]
        del parent.order[bisect_left(parent.order, node.tokens)]
        node.is_dead = True
        self.n_nodes -= 1
        self.n_leaves -= bool(parent.children) or parent.parent is None

    def below(self, node: Node) -> Iterator[Node]:
        """Yield every block below `node`, children before their parents."""
        stack: list[Node] = [node]
        found: list[Node] = []
        while stack:
            step = stack.pop()
            found.extend(step.children.values())
            stack.extend(step.children.values())
        return reversed(found)

    def nodes(self) -> Iterator[Node]:
        """Yield every block, children before their parents."""
        for root in list(self.roots.values()):
            yield from self.below(root)

    def _check(self) -> None:
        nodes = list(self.nodes())
        if len(nodes) != self.n_nodes or len(set(map(id, nodes))) != self.n_nodes:
            raise AssertionError(f"{self.n_nodes} blocks counted, {len(nodes)} found")
        if sum(not node.children for node in nodes) != self.n_leaves:
            raise AssertionError("leaves miscounted")
        for root in self.roots.values():
            if root.is_dead or root.name != root_name(root.fingerprint, root.scope):
                raise AssertionError("a dead or misnamed root")
            if not (root.children or root.pins):
                raise AssertionError("an empty root that nobody uses")
            if root.n_bytes < len(root.fingerprint) + len(root.scope or ""):
                raise AssertionError("a root's names are not counted")
        for node in [*self.roots.values(), *nodes]:
            self._check_children(node)

    def _check_children(self, node: Node) -> None:
        if node.order != sorted(node.children) or len(node.order) != len(node.children):
            raise AssertionError("children out of order")
        for left, right in zip(node.order, node.order[1:], strict=False):
            if right.startswith(left):
                raise AssertionError("a sibling continues another")
        for key, child in node.children.items():
            self._check_node(node, key, child)

    def _check_node(self, parent: Node, key: bytes, node: Node) -> None:
        n_tokens = len(key) // TOKEN_BYTES
        if node.tokens != key or node.parent is not parent or node.is_dead:
            raise AssertionError("a block is filed under other tokens")
        if node.start != parent.stop or node.stop - node.start != n_tokens:
            raise AssertionError("a chain has a gap")
        if not 1 <= n_tokens <= self.block_tokens or node.pins < 0:
            raise AssertionError("a block of impossible length or pins")
        if node.name != child_name(parent.name, key):
            raise AssertionError("a block has another block's name")
