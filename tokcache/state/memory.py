"""StateMemory: all states in memory, and their budgets."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from tokcache.state.index import BlockIndex, Match, Node, Root, root_bytes
from tokcache.state.pinned import PinnedPrefixes
from tokcache.state.removals import Removals
from tokcache.state.retention import Retention
from tokcache.state.snapshot_index import SNAPSHOT_BYTES, Snapshot, SnapshotIndex
from tokcache.state.tiers.ram import RamTier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tokcache.state.names import RootKey
    from tokcache.state.retention import Held

# Python objects of one block: node, heap item, dict and tier entries, name. Its tokens are
# added. Checked against tracemalloc by tests/state/test_cache.py::test_overhead_is_counted.
NODE_BYTES = 1160
_SWEEPS = 8  # sweeps for expired states in each `ttl_s`


class StateMemory:
    """Blocks, snapshots, their buffers and budgets; not thread-safe: the store holds its lock.

    Units: `ram_bytes` bytes of all that is retained, `max_entries` stored prefixes (ends of chains,
           and snapshots), `ttl_s` seconds after the last use.
    """

    def __init__(
        self, ram_bytes: int, max_entries: int, block_tokens: int, ttl_s: float | None
    ) -> None:
        self.ram_bytes, self.max_entries, self.ttl_s = ram_bytes, max_entries, ttl_s
        self.index = BlockIndex(block_tokens)
        self.snapshots = SnapshotIndex()
        self.tier = RamTier()
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.missed_tokens: Counter[str] = Counter()
        self.removals = Removals()
        self.overhead = 0
        self.retention = Retention(ttl_s)
        self.pinned = PinnedPrefixes(self.retention)
        self._dead: dict[int, memoryview] = {}
        self._swept_s = time.monotonic()

    # Finding

    def find(self, root_key: RootKey, tokens: bytes) -> tuple[Root | None, Match]:
        """Return the longest stored prefix of `tokens`, and note that it is used now."""
        now = time.monotonic()
        if self.ttl_s is not None and now - self._swept_s >= self.ttl_s / _SWEEPS:
            self._swept_s = now
            self._expire(
                [node for node in self.index.nodes() if self.retention.is_expired(node, now)]
            )
            for snapshot in self.snapshots:
                if self.retention.is_expired(snapshot, now) and not snapshot.is_kept:
                    self.expire_snapshot(snapshot)
        root = self.index.root(root_key)
        if root is None:
            return None, Match(n_tokens=root_key.start)
        match = self.index.longest(root, tokens)
        for n_good, node in enumerate(match.nodes if self.ttl_s is not None else ()):
            if self.retention.is_expired(node, now):
                match.n_tokens = node.start
                del match.nodes[n_good:]
                self._expire([*self.index.below(node), node])
                break
        self.retention.use(match.nodes, now)
        return (None if root.is_dead else root), match

    def _expire(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not node.children and not node.is_dead:
                self._note_removal(node, "ttl_s")
                self.remove(node)
                self.counts["expirations"] += 1

    @property
    def n_entries(self) -> int:
        """The number of stored prefixes."""
        return self.index.n_ends + self.snapshots.n_states

    def held_bytes(self) -> int:
        """Return the bytes of all that is retained."""
        return self.overhead + self.tier.memory_usage()

    # Room

    def pin_root(self, root_key: RootKey) -> Root | None:
        """Return the root with this key, in use; None if there is no room for a new one."""
        root = self.index.root(root_key)
        if root is None:
            n_bytes = root_bytes(root_key)
            if not self.has_room(0, n_bytes):
                self.refusals["blocks_in_use"] += 1
                return None
            root = self.index.add_root(root_key)
            self.overhead += n_bytes
        root.pins += 1
        return root

    def take(self, size: int, overhead: int) -> memoryview | None:
        """Return a buffer to fill, counted with its overhead; None if there is no room."""
        if not self.has_room(size, overhead):
            self.refusals["blocks_in_use"] += 1
            return None
        try:
            buffer = self.tier.take(size)
        except MemoryError:
            self.refusals["no_memory"] += 1
            return None
        self.overhead += overhead
        return buffer

    def drop(self, buffer: memoryview, overhead: int) -> None:
        """Take back a buffer that `take` returned."""
        self.overhead -= overhead
        self.tier.give_back(buffer)

    def has_room(self, size: int, overhead: int) -> bool:
        """Make room for one payload; False if all states that are left are in use."""
        while True:
            fresh = 0 if self.tier.has_pooled(size) else size
            if self.held_bytes() + fresh + overhead <= self.ram_bytes:
                return True
            if self.tier.drop_pooled():
                continue
            victim = self.retention.victim()
            if victim is None:
                return False
            self.evict(victim, "ram_bytes")

    def has_entry_room(self, parent: Node, at: int) -> bool:
        """Make room for a chain that follows position `at` of `parent`, which is in use."""
        while self.n_entries + 1 - (parent.is_end and at == parent.stop) > self.max_entries:
            if self._evict_entry():
                continue
            if not parent.is_end:
                return False
            # The only entry left shares its beginning with the new chain.
            self.index.give_up(parent)
        return True

    def has_snapshot_room(self, n_replaced: int) -> bool:
        """Make room for one more snapshot."""
        while self.n_entries + 1 - n_replaced > self.max_entries:
            if not self._evict_entry():
                return False
        return True

    def _evict_entry(self) -> bool:
        """Evict an entry: a leaf and the blocks last used together with it, or a snapshot."""
        victim = self.retention.victim()
        if victim is None:
            return False
        step: Node | None = victim if isinstance(victim, Node) else None
        if step is None:
            self.evict(victim, "max_entries")
        while step is not None and step.parent is not None and not (step.children or step.pins):
            # Blocks before a pinned one are pinned too; those that follow may not be.
            if step.tick != victim.tick or step.is_pinned != victim.is_pinned:
                break
            parent = step.parent
            self.evict(step, "max_entries")
            step = parent
        return True

    def evict(self, held: Held, budget: str) -> None:
        """Remove a state, and remember which budget it was over."""
        if isinstance(held, Node):
            self._note_removal(held, budget)
            self.remove(held)
        elif isinstance(held, Snapshot):
            self.note_snapshot(held, budget)
            self.remove_snapshot(held)
        self.counts["evictions"] += 1

    def _note_removal(self, node: Node, cause: str) -> None:
        """Remember why a block is removed, for look-ups that end at its start."""
        step = node
        while step.parent is not None:
            step = step.parent
        if isinstance(step, Root):
            place = step.root_key, node.base, node.tokens
            self.removals.note(*place, cause, grain=step.grain, written=node.written)

    def expire_snapshot(self, snapshot: Snapshot) -> None:
        """Take out a snapshot that was not used for `ttl_s`."""
        self.note_snapshot(snapshot, "ttl_s")
        self.remove_snapshot(snapshot)
        self.counts["expirations"] += 1

    def note_snapshot(self, snapshot: Snapshot, cause: str) -> None:
        """Remember why a snapshot is removed or not stored."""
        name = snapshot.root_key, snapshot.name, snapshot.n_tokens
        self.removals.note_snapshot(*name, cause, written=snapshot.written)

    def note_unwritten(self, node: Node, root_key: RootKey) -> None:
        """Remember that the queue of a tier had no room for a block."""
        grain = self.index.grain(root_key)
        place = root_key, node.base, node.tokens
        self.removals.note(*place, "queue_full", grain=grain, written=node.written)

    # Filing and removing

    def file(self, root: Root, parent: Node, at: int, tokens: bytes, buffer: memoryview) -> Node:
        """Put a block into the tree; its place must be free."""
        n_bytes = buffer.nbytes + NODE_BYTES + len(tokens)
        node = self.index.add(root, parent, at, tokens, n_bytes)
        self.tier.put(node, buffer)
        self.retention.use([node], time.monotonic())
        return node

    def fill(self, node: Node, buffer: memoryview) -> None:
        """Give a block that is unread its state."""
        self.tier.remove(node)
        self.tier.put(node, buffer)
        node.n_bytes += buffer.nbytes
        node.is_unread = False

    def file_snapshot(self, snapshot: Snapshot, buffer: memoryview) -> None:
        """Put a snapshot into its place, and remove the one that was there."""
        replaced = self.snapshots.same(snapshot)
        if replaced is not None:
            self.remove_snapshot(replaced)
        snapshot.n_bytes = buffer.nbytes + snapshot_overhead(snapshot)
        self.snapshots.add(snapshot)
        self.tier.put(snapshot, buffer)
        self.retention.use([snapshot], time.monotonic())
        self.retention.watch(snapshot)

    def remove(self, node: Node) -> None:
        """Take a leaf out of the tree."""
        parent = node.parent
        self.index.remove(node)
        self.pinned.removed(node)
        self.overhead -= NODE_BYTES + len(node.tokens)
        self._drop_payload(node)
        if isinstance(parent, Root):
            self.remove_root(parent)
        elif parent is not None and not parent.children:
            self.retention.watch(parent)

    def remove_snapshot(self, snapshot: Snapshot) -> None:
        """Take out a snapshot."""
        self.snapshots.remove(snapshot)
        self.overhead -= snapshot_overhead(snapshot)
        self._drop_payload(snapshot)

    def _drop_payload(self, held: Node | Snapshot) -> None:
        if not held.pins:
            self.tier.remove(held)
            return
        payload = self.tier.lend(held)  # a reader still has it
        if payload is not None:
            self._dead[id(held)] = payload

    def remove_root(self, root: Root, *, is_idle: bool = True) -> None:
        """Take out a root without chains; with `is_idle`, only if it is not in use."""
        # Pins are below 0 after a save that began before a fork and ended in the child.
        if not (root.is_dead or root.children or (is_idle and root.pins > 0)):
            self.index.remove_root(root)
            self.overhead -= root.n_bytes

    def release(self, held: Node | Snapshot) -> None:
        """Note that one user fewer needs it."""
        held.pins -= 1
        if isinstance(held, Root):
            self.remove_root(held)
        elif held.is_dead and not held.pins and id(held) in self._dead:
            self.tier.give_back(self._dead.pop(id(held)))

    def remove_all(self, is_doomed: Callable[[str | None], bool]) -> int:
        """Remove the states of these scopes; return the states removed."""
        self.removals.forget(is_doomed)
        roots = [root for root in self.index.roots.values() if is_doomed(root.root_key.scope)]
        doomed = [node for root in roots for node in self.index.below(root)]
        for node in doomed:
            self.remove(node)
        for root in roots:  # a save that uses one is under way: it can't file blocks any more
            self.remove_root(root, is_idle=False)
        snapshots = [each for each in self.snapshots if is_doomed(each.root_key.scope)]
        for snapshot in snapshots:
            self.remove_snapshot(snapshot)
        while self.tier.drop_pooled():
            pass  # a tenant's bytes must not stay in the pool
        return len(doomed) + len(snapshots)

    # Forks

    def drop_users(self) -> None:
        """Remove states that were in use: their users exist only in the parent of the fork."""
        for root in list(self.index.roots.values()):
            root.pins = 0
            self.remove_root(root)
        in_use: list[Node] = []
        for node in self.index.nodes():
            step: Node | None = node
            while step is not None and not step.pins:  # its own, or an ancestor's
                step = step.parent
            if step is not None:
                in_use.append(node)
        for node in in_use:
            self.remove(node)
        for snapshot in self.snapshots:
            if snapshot.pins > snapshot.is_kept:
                self.remove_snapshot(snapshot)
        self.removals.reset(has_dropped=True)
        self._dead.clear()
        self.tier.drop_lent()
        self.overhead = self.counted_overhead()

    def counted_overhead(self) -> int:
        """Return the overhead of all states, counted again."""
        blocks = sum(NODE_BYTES + len(node.tokens) for node in self.index.nodes())
        roots = sum(root.n_bytes for root in self.index.roots.values())
        return blocks + roots + sum(snapshot_overhead(each) for each in self.snapshots)

    def check(self) -> None:
        """Verify every invariant; for tests."""
        self.index._check()  # noqa: SLF001
        self.snapshots._check()  # noqa: SLF001
        self.tier._check()  # noqa: SLF001
        if {*self.index.nodes(), *self.snapshots} != self.tier.names():
            raise AssertionError("tree and tier hold different states")
        for node in self.index.nodes():
            before = node.parent
            has_block_before = before is not None and before.parent is not None
            if node.is_pinned and has_block_before and not (before and before.is_pinned):
                raise AssertionError("a pinned block follows one that is not pinned")
        self.pinned.check()
        if self.counted_overhead() > self.overhead:
            raise AssertionError("overhead undercounted")
        if self.held_bytes() > self.ram_bytes or self.n_entries > self.max_entries:
            raise AssertionError("over budget")


def snapshot_overhead(snapshot: Snapshot) -> int:
    """Return the bytes of a snapshot besides its payload."""
    return SNAPSHOT_BYTES + len(snapshot.tokens) + root_bytes(snapshot.root_key)
