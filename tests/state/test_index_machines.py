"""The block index, the snapshot index and retention alone, each against a plain model."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.machines import assert_fails, effort
from tokcache import _prefix
from tokcache.state import index as index_module
from tokcache.state.index import BlockIndex, Node, Root
from tokcache.state.names import RootKey
from tokcache.state.retention import Retention
from tokcache.state.snapshot_index import Snapshot, SnapshotIndex, prefix_names

if TYPE_CHECKING:
    import pytest

BLOCK = 3
_PARTS = st.tuples(
    st.sampled_from([b"m", b"n"]),
    st.sampled_from([None, "a"]),
    st.sampled_from(["free", "aligned"]),
)
# `builds` would draw a start, too.
KEYS = _PARTS.map(lambda drawn: RootKey(drawn[0], drawn[1], cast("Any", drawn[2])))
TOKENS = st.lists(st.integers(0, 2), max_size=10)
Tokens = tuple[int, ...]


def packed(tokens: Any) -> bytes:
    return array("i", tokens).tobytes()


@dataclass(eq=False, repr=False)
class Block:
    """The model of one block: all tokens before it, and its own."""

    root_key: RootKey
    before: Tokens
    own: Tokens
    above: Block | None
    node: Node
    has_given_up: bool = False

    def prefixes(self) -> list[Tokens]:
        """Return the prefixes that can be used thanks to this block."""
        stops = [len(self.own)] if self.root_key.kind == "aligned" else range(len(self.own) + 1)
        return [self.before + self.own[:stop] for stop in stops]


class BlockMachine(RuleBasedStateMachine):
    """Chains of blocks that are added, and removed from their leaves on."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(BLOCK)
        self.blocks: list[Block] = []
        self.of_node: dict[Node, Block] = {}

    def best(self, key: RootKey, tokens: Tokens) -> int:
        held = [one for block in self.blocks if block.root_key == key for one in block.prefixes()]
        return max((len(one) for one in held if tokens[: len(one)] == one), default=0)

    @rule(key=KEYS, drawn=TOKENS, n_at_once=st.integers(1, BLOCK))
    def save(self, key: RootKey, drawn: list[int], n_at_once: int) -> None:
        tokens = tuple(drawn)
        if key.kind == "aligned":
            n_at_once = BLOCK
            tokens = tokens[: len(tokens) // BLOCK * BLOCK]
        root = self.index.root(key) or self.index.add_root(key)
        match = self.index.longest(root, packed(tokens))
        at = match.n_tokens
        parent: Node = match.nodes[-1] if match.nodes else root
        if key.kind == "aligned" and parent.stop > at:  # it differs within the last block
            parent, at = match.nodes[-2] if match.nodes[1:] else root, parent.start
        while at < len(tokens):
            own = tokens[at : at + n_at_once]
            if self.index.child(root, parent, at, packed(own)) is not None:
                break  # another aligned block begins with the same tokens
            above = self.of_node.get(parent)
            parent = self.index.add(root, parent, at, packed(own), 100)
            block = self.of_node[parent] = Block(key, tokens[:at], own, above, parent)
            self.blocks.append(block)
            at += len(own)
        if not root.children:
            self.index.remove_root(root)

    @rule(key=KEYS, drawn=TOKENS)
    def find(self, key: RootKey, drawn: list[int]) -> None:
        tokens = tuple(drawn)
        root = self.index.root(key)
        best = self.best(key, tokens)
        if root is None:
            assert best == 0
            return
        match = self.index.longest(root, packed(tokens))
        if key.kind == "aligned":  # the last block may be one that differs
            assert match.n_tokens // BLOCK * BLOCK == best
        else:
            assert match.n_tokens == best
        starts = [node.start for node in match.nodes]
        assert starts == sorted(set(starts))

    def leaves(self) -> list[Block]:
        above = {id(each.above) for each in self.blocks}
        return [each for each in self.blocks if id(each) not in above]

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.leaves()))
        parent = block.node.parent
        self.index.remove(block.node)
        self.blocks.remove(block)
        if block.above is not None and all(each.above is not block.above for each in self.blocks):
            block.above.has_given_up = False
        if isinstance(parent, Root) and not parent.children:
            self.index.remove_root(parent)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """A block that others branch off from, and that none continues, is no longer an entry."""
        above, continued = {id(each.above) for each in self.blocks}, self.continued()
        branched = [one for one in self.blocks if id(one) in above - continued]
        if branched:
            block = data.draw(st.sampled_from(branched))
            self.index.give_up(block.node)
            block.has_given_up = True

    def continued(self) -> set[int]:
        """Return the ids of the blocks whose last token another block follows."""
        pairs = ((each.above, len(each.before)) for each in self.blocks)
        return {id(one) for one, at in pairs if one and at == len(one.before + one.own)}

    @invariant()
    def holds(self) -> None:
        self.index._check()
        assert set(self.index.nodes()) == {block.node for block in self.blocks}
        assert set(self.index.roots) == {block.root_key for block in self.blocks}
        continued = self.continued()
        ends = [one for one in self.blocks if not (one.has_given_up or id(one) in continued)]
        assert self.index.n_ends == len(ends)


# ---- snapshots

STATES = st.tuples(TOKENS.filter(bool), st.integers(-1, 1), st.sampled_from([b"", b"x", b"y"]))


class SnapshotMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = SnapshotIndex()
        self.held: list[Snapshot] = []  # in the order in which they were added

    @rule(key=KEYS, drawn=STATES)
    def add(self, key: RootKey, drawn: tuple[list[int], int, bytes]) -> None:
        tokens, priority, conversation = packed(drawn[0]), drawn[1], drawn[2]
        ((_, name),) = prefix_names(key, tokens, [len(drawn[0])])
        made = Snapshot(key, name, tokens, len(drawn[0]), priority)
        made.conversation = conversation
        same = [
            each
            for each in self.held
            if (each.root_key, each.tokens, each.priority) == (key, tokens, priority)
        ]
        assert self.index.same(made) is (same[0] if same else None)
        if same:
            self.index.remove(same[0])
            self.held.remove(same[0])
        self.index.add(made)
        self.held.append(made)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.held))
        self.index.remove(gone)
        self.held.remove(gone)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), priority=st.integers(-1, 1))
    def add_again(self, data: st.DataObject, priority: int) -> None:
        """Add a state of tokens that are held, maybe with another priority."""
        held = data.draw(st.sampled_from(self.held))
        tokens = memoryview(held.tokens).cast("i").tolist()
        self.add(held.root_key, (tokens, priority, b""))
        self.get(held.root_key, tokens)

    @rule(key=KEYS, drawn=TOKENS.filter(bool))
    def get(self, key: RootKey, drawn: list[int]) -> None:
        tokens = packed(drawn)
        ((_, name),) = prefix_names(key, tokens, [len(drawn)])
        own = [each for each in self.held if (each.root_key, each.tokens) == (key, tokens)]
        best = max(own, key=lambda each: each.priority, default=None)
        assert self.index.get(key, name, tokens) is best

    @invariant()
    def holds(self) -> None:
        self.index._check()
        assert self.index.n_states == len(self.held)
        assert set(self.index) == set(self.held)
        for key in {each.root_key for each in self.held}:
            own = [each for each in self.held if each.root_key == key]
            assert self.index.lengths(key) == {each.n_tokens for each in own}
            wanted = own[0].tokens[:8]
            nearest = self.index.nearest(key, wanted)
            assert len(nearest) == min(len(own), 16)
            for (n_same, goes_on), each in zip(nearest, reversed(own), strict=False):
                pairs = zip(wanted[::4], each.tokens[::4], strict=False)  # small ids: the low byte
                n_plain = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
                n_plain = min(len(wanted), len(each.tokens)) // 4 if n_plain is None else n_plain
                assert (n_same, goes_on) == (n_plain, n_plain < each.n_tokens)
        for each in self.held:
            talk = [one for one in self.held if one.conversation == each.conversation]
            assert set(self.index.of_conversation(each)) == set(talk if each.conversation else [])


# ---- retention


@dataclass(eq=False, repr=False)
class Item:
    """A state as retention sees it; `above` depends on it, as a block depends on its parent."""

    priority: int
    above: Item | None = None
    pins: int = 0
    tick: int = 0
    used_s: float = 0.0
    is_dead: bool = False
    is_queued: bool = False
    is_pinned: bool = False
    children: list[Item] = field(default_factory=list)


class RetentionMachine(RuleBasedStateMachine):
    """A victim is always one of the lowest priority, and of these the least recently used."""

    def __init__(self) -> None:
        super().__init__()
        self.retention = Retention(10.0)
        self.items: list[Item] = []
        self.now = 0.0

    def chain(self, item: Item) -> list[Item]:
        found = [item]
        while found[-1].above is not None:
            found.append(found[-1].above)
        return found

    @rule(data=st.data(), priority=st.integers(0, 2))
    def add(self, data: st.DataObject, priority: int) -> None:
        above = data.draw(st.sampled_from([None, *self.items]))
        # A block is never worth more than those that it needs.
        priority = priority if above is None else min(priority, above.priority)
        item = Item(priority, above)
        if above is not None:
            above.children.append(item)
        self.items.append(item)
        self.retention.use(self.chain(item), self.now)
        self.retention.watch(item)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        self.retention.use(self.chain(data.draw(st.sampled_from(self.items))), self.now)

    @precondition(lambda self: self.items)
    @rule(data=st.data(), n=st.sampled_from([-1, 1]))
    def pin(self, data: st.DataObject, n: int) -> None:
        item = data.draw(st.sampled_from(self.items))
        item.pins = max(0, item.pins + n)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def prefer(self, data: st.DataObject) -> None:
        """Pin a prefix: its blocks are the last victims, and do not expire."""
        for item in self.chain(data.draw(st.sampled_from(self.items))):
            item.is_pinned = True

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def end_preference(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.items))
        for one in self.items:
            one.is_pinned &= item not in self.chain(one)
        self.retention.unpinned()

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def raise_priority(self, data: st.DataObject) -> None:
        for item in self.chain(data.draw(st.sampled_from(self.items))):
            item.priority = max(item.priority, 2)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Remove a leaf otherwise than as a victim."""
        self.take_out(data.draw(st.sampled_from([one for one in self.items if not one.children])))

    def take_out(self, item: Item) -> None:
        item.is_dead = True
        self.items.remove(item)
        if item.above is not None:
            item.above.children.remove(item)
            if not item.above.children:
                self.retention.watch(item.above)

    @rule()
    def evict(self) -> None:
        free = [one for one in self.items if not one.children and not one.pins]
        victim = self.retention.victim()
        if victim is None:
            assert not free
            return
        assert isinstance(victim, Item)
        assert victim in free
        ranks = {id(one): (one.is_pinned, one.priority, one.tick) for one in free}
        assert ranks[id(victim)] == min(ranks.values())
        self.take_out(victim)

    @rule(seconds=st.floats(0, 8))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def holds(self) -> None:
        queued = [item[-1] for item in self.retention._heap]
        assert len(set(map(id, queued))) == len(queued)
        for item in self.items:
            assert item.children or item.is_queued
            is_old = self.now - item.used_s > 10.0 and not item.is_pinned
            assert self.retention.is_expired(item, self.now) == is_old

    def teardown(self) -> None:
        for item in self.items:
            item.pins = 0
        while self.items:
            self.evict()
        assert self.retention.victim() is None


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = effort(40, 30)
TestSnapshotMachine = SnapshotMachine.TestCase
TestSnapshotMachine.settings = effort(30, 25)
TestRetentionMachine = RetentionMachine.TestCase
TestRetentionMachine.settings = effort(40, 30)


# ---- planted faults


def test_a_common_prefix_that_is_one_token_too_long_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = _prefix.common_tokens

    def one_more(left: Any, right: Any) -> int:
        return common(left, right) + (len(right) > 8)

    monkeypatch.setattr(index_module, "common_tokens", one_more)
    assert_fails(BlockMachine)


def test_an_end_that_is_not_counted_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent whose last child is gone is the end of an entry again."""
    remove = BlockIndex.remove

    def without_parent(self: BlockIndex, node: Node) -> None:
        parent = node.parent
        was_end = parent is not None and parent.is_end
        remove(self, node)
        self.n_ends -= parent is not None and parent.is_end and not was_end

    monkeypatch.setattr(BlockIndex, "remove", without_parent)
    assert_fails(BlockMachine)


def test_a_priority_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(
        self: SnapshotIndex, root_key: RootKey, name: bytes, tokens: bytes
    ) -> Snapshot | None:
        held = self._named.get((root_key, name))
        found = [*held.values()][-1] if held else None
        return found if found is not None and found.tokens == tokens else None

    monkeypatch.setattr(SnapshotIndex, "get", newest)
    assert_fails(SnapshotMachine)


def test_a_victim_whose_last_use_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(self: Retention, in_use: list[Any]) -> Any:
        while self._heap:
            held = self._heap.pop(0)[-1]
            held.is_queued = False
            if not held.is_dead and not held.children and not held.pins:
                return held
            if held.pins:
                in_use.append(held)
        return None

    monkeypatch.setattr(Retention, "_next", first)
    assert_fails(RetentionMachine)
