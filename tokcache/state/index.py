"""BlockIndex: the tree of blocks, which finds the stored tokens that a prompt begins with.

A node is one block. Its tokens follow all of its parent's tokens or, where a prompt diverged inside
the parent, the first of them. The common part of two chains is therefore held once, to the token,
and two children of one point never begin with the same token: a look-up walks down one path and
costs the prompt's length, however many entries there are.

Aligned blocks all have the same length and are used as a whole: a block's children follow its end,
and two of them may begin with the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from sys import getsizeof
from typing import TYPE_CHECKING

from tokcache._prefix import common_tokens
from tokcache.state.names import TOKEN_BYTES, RootKey, child_name, root_name

if TYPE_CHECKING:
    from collections.abc import Iterator


class Node:
    """One block of a chain, or the root of a chain (no tokens, no parent).

    Units: positions [start, stop); `n_after` children that follow its last token.
    """

    __slots__ = (
        "_name",
        "children",
        "has_given_up",
        "is_dead",
        "is_pinned",
        "is_queued",
        "is_unread",
        "n_after",
        "n_bytes",
        "parent",
        "pins",
        "priority",
        "start",
        "stop",
        "tick",
        "tokens",
        "touched_s",
        "used_s",
        "written",
    )

    def __init__(self, parent: Node | None, start: int, tokens: bytes, n_bytes: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.n_bytes = n_bytes
        self.start = start
        self.stop: int = start + len(tokens) // TOKEN_BYTES
        self.children: dict[tuple[int, bytes], Node] = {}
        self.n_after = 0
        self.pins = 0
        self.priority = 0
        self.tick = 0
        self.used_s = 0.0  # when it served last
        self.touched_s = 0.0  # when that was last reported to the tiers below
        self.is_dead = False
        self.is_pinned = False  # evicted after all others that are not
        self.is_queued = False
        self.is_unread = False  # a tier below has its state, and memory only its tokens
        self.written = 0  # tiers below that have it, or are about to: one bit each
        self.has_given_up = False  # its end is not an entry: another chain took that place
        self._name: bytes | None = None

    @property
    def is_end(self) -> bool:
        """Whether a stored prefix ends here that no block continues."""
        return self.parent is not None and not self.n_after and not self.has_given_up

    @property
    def name(self) -> bytes:
        """The name of the block; computed on first use, because memory does not need it."""
        unnamed: list[Node] = []
        node = self
        while node._name is None and node.parent is not None:
            unnamed.append(node)
            node = node.parent
        for each in reversed(unnamed):
            each._name = child_name(each.base, each.tokens)  # noqa: SLF001 (a node's own)
        if self._name is None:
            raise AssertionError("a root has its name from the start")
        return self._name

    @property
    def base(self) -> bytes:
        """The name of the point where the block starts."""
        if self.parent is None:
            raise AssertionError("a root has no start")
        return self.parent.point(self.start)

    def point(self, at: int) -> bytes:
        """Return the name of the prefix that ends at position `at` of this block."""
        if at == self.stop:
            return self.name
        return child_name(self.base, self.tokens[: (at - self.start) * TOKEN_BYTES])


# Python objects of one root: node, places in dicts. Its names are added. Checked against
# tracemalloc by tests/state/test_cache.py::test_names_of_scopes_are_counted.
ROOT_BYTES = 700


def root_bytes(root_key: RootKey) -> int:
    """Return the bytes of the root with this key; the caller chooses the length of its names."""
    n_after = getsizeof(root_key.after) if root_key.after else 0  # b"" is shared by all
    return ROOT_BYTES + getsizeof(root_key.fingerprint) + getsizeof(root_key.scope) + n_after


class Root(Node):
    """The start of all chains of one root key; in use while a save extends it.

    Units: the first `grain` bytes of their tokens distinguish children; the `start` positions
           before the first are public, and held elsewhere.
    """

    __slots__ = ("grain", "root_key")

    def __init__(self, root_key: RootKey, grain: int) -> None:
        super().__init__(None, root_key.start, b"", root_bytes(root_key))
        self.root_key = root_key
        self.grain = grain

    @property
    def name(self) -> bytes:
        """The name that the chains start from."""
        if self._name is None:
            self._name = root_name(self.root_key)
        return self._name


@dataclass(slots=True)
class Match:
    """The blocks of the longest stored prefix, from the root's first position on.

    Units: `n_tokens` positions that match. A block may extend beyond the start of the next one, and
           the last one beyond `n_tokens`: those positions belong to other tokens.
    """

    nodes: list[Node] = field(default_factory=list)
    n_tokens: int = 0


class BlockIndex:
    """All chains, by root key; not thread-safe: the store locks.

    `firsts` are the roots of each scope whose chains start at position 0.

    Units: `block_tokens` positions of an aligned block; `n_ends` prefixes that no block
           continues.
    """

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.roots: dict[RootKey, Root] = {}
        self.firsts: dict[str | None, list[Root]] = {}
        self.n_nodes = 0
        self.n_ends = 0

    def grain(self, root_key: RootKey) -> int:
        """Return how many bytes of tokens distinguish two children of one point."""
        return TOKEN_BYTES * (self.block_tokens if root_key.kind == "aligned" else 1)

    def root(self, root_key: RootKey) -> Root | None:
        """Return the root with this key, None if it has no blocks."""
        return self.roots.get(root_key)

    def add_root(self, root_key: RootKey) -> Root:
        """Add the root with this key and return it."""
        root = self.roots[root_key] = Root(root_key, self.grain(root_key))
        if not root_key.start:
            self.firsts.setdefault(root_key.scope, []).append(root)
        return root

    def remove_root(self, root: Root) -> None:
        """Take out a root that has no chains."""
        if root.children:
            raise AssertionError("only an empty root can be removed")
        del self.roots[root.root_key]
        if not root.root_key.start:
            firsts = self.firsts[root.root_key.scope]
            firsts.remove(root)
            if not firsts:
                del self.firsts[root.root_key.scope]
        root.is_dead = True

    def longest(self, root: Root, tokens: bytes) -> Match:
        """Return the longest stored prefix of `tokens`."""
        nodes: list[Node] = []
        node: Node | None = root
        at, grain = root.start, root.grain
        while node is not None:
            offset = at * TOKEN_BYTES
            node = node.children.get((at, tokens[offset : offset + grain]))
            if node is None:
                break
            nodes.append(node)
            if tokens.startswith(node.tokens, offset):
                at = node.stop
            else:
                at += common_tokens(node.tokens, tokens[offset : offset + len(node.tokens)])
        return Match(nodes, at)

    def child(self, root: Root, parent: Node, at: int, tokens: bytes) -> Node | None:
        """Return the child at position `at` of `parent` that has the place of `tokens`."""
        return parent.children.get((at, tokens[: root.grain]))

    def add(self, root: Root, parent: Node, at: int, tokens: bytes, n_bytes: int) -> Node:
        """Add a block that follows position `at` of `parent`, and return it."""
        node = Node(parent, at, tokens, n_bytes)
        if at == parent.stop:
            # The parent was the end of an entry; now the new block is.
            self.n_ends -= parent.is_end
            parent.n_after += 1
        parent.children[at, tokens[: root.grain]] = node
        self.n_ends += 1
        self.n_nodes += 1
        return node

    def remove(self, node: Node) -> None:
        """Take out a block that has no children."""
        parent = node.parent
        if parent is None or node.children:
            raise AssertionError("only a leaf can be removed")
        step = parent
        while step.parent is not None:
            step = step.parent
        if not isinstance(step, Root):
            raise AssertionError("a chain without a root")  # noqa: TRY004 (no argument is wrong)
        del parent.children[node.start, node.tokens[: step.grain]]
        node.is_dead = True
        self.n_nodes -= 1
        self.n_ends -= node.is_end
        was_end = parent.is_end
        parent.n_after -= node.start == parent.stop
        parent.has_given_up &= bool(parent.children)
        self.n_ends += parent.is_end - was_end

    def give_up(self, node: Node) -> None:
        """Stop counting the end of a block, which others branch off from, as an entry."""
        self.n_ends -= node.is_end
        node.has_given_up = True

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
        if sum(node.is_end for node in nodes) != self.n_ends:
            raise AssertionError("ends miscounted")
        firsts = [
            root
            for scope, each in self.firsts.items()
            for root in each
            if scope == root.root_key.scope
        ]
        if set(firsts) != {root for key, root in self.roots.items() if not key.start}:
            raise AssertionError("the roots by scope are not those of the index")
        for root_key, root in self.roots.items():
            if root.is_dead or root.root_key != root_key or root.grain != self.grain(root_key):
                raise AssertionError("a dead or misfiled root")
            if not (root.children or root.pins):
                raise AssertionError("an empty root that is not in use")
            for node in [root, *self.below(root)]:
                self._check_node(root, node)

    def _check_node(self, root: Root, node: Node) -> None:
        if node.n_after != sum(child.start == node.stop for child in node.children.values()):
            raise AssertionError("children miscounted")
        if node.is_dead or node.pins < 0 or (node.has_given_up and not node.children):
            raise AssertionError("a dead block, or one with impossible pins")
        if node.parent is not None and node.stop <= node.start:
            raise AssertionError("a block without tokens")
        for (at, head), child in node.children.items():
            if child.start != at or child.tokens[: root.grain] != head or child.parent is not node:
                raise AssertionError("a block is filed in another's place")
            if not (node.start < at <= node.stop or (node is root and at == root.start)):
                raise AssertionError("a block follows a point outside its parent")
            offset = (at - node.start) * TOKEN_BYTES
            if root.root_key.kind == "aligned":
                if at != node.stop or len(child.tokens) != root.grain:
                    raise AssertionError("an aligned chain holds another block")
            elif at < node.stop and head == node.tokens[offset : offset + TOKEN_BYTES]:
                raise AssertionError("a block begins with the token that continues its parent")
