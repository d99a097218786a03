"""PrefixStateCache: finds, restores and saves the state of the longest prefix seen before.

It knows neither text nor the engine: tokens come as int32 ids, and the engine's state goes in and
out through two functions that copy the positions [start, stop) from and to a buffer.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING, Self

from tokcache.config import require_int
from tokcache.errors import InvalidConfig, InvalidText
from tokcache.state.blocks import TOKEN_BYTES, token_bytes
from tokcache.state.index import BlockIndex, Match, Node, Root, root_bytes
from tokcache.state.retention import LeastRecentLeaf
from tokcache.state.tiers.ram import RamTier
from tokcache.stats import StateStats

if TYPE_CHECKING:
    from types import TracebackType

_log = logging.getLogger("tokcache")

# Python objects of one block: node, digest, heap item, places in dict, list and tier. Its tokens
# are added. Checked against tracemalloc by tests/state/test_cache.py::test_overhead_is_counted.
NODE_BYTES = 1200

BlockIO = Callable[[int, int, memoryview], None]
"""Copies the state of positions [start, stop) into or out of the buffer; raises if it can't."""


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block of a plan: positions [start, stop) and their state."""

    start: int
    stop: int
    payload: memoryview


class RestorePlan:
    """The blocks of the longest usable prefix; in use, hence not evicted, until it is closed.

    Units:  `n_tokens` positions that the blocks serve; the last block may reach further, what it
            holds from `n_tokens` on belongs to other tokens and has to be trimmed.
    Threads: one at a time; closing takes no lock, so the garbage collector may do it.
    """

    def __init__(
        self,
        cache: PrefixStateCache,
        nodes: list[Node],
        blocks: list[StoredBlock],
        n_tokens: int,
    ) -> None:
        self._cache = cache
        self._nodes = nodes
        self.blocks = blocks
        self.n_tokens = n_tokens

    def start_beyond(self, n_tokens: int) -> int:
        """Return where to restore from if `n_tokens` positions are in place: a block's start."""
        for block in self.blocks:
            if block.stop > n_tokens:
                return block.start
        return n_tokens

    def restore(self, load: BlockIO, *, start: int = 0) -> int:
        """Load the blocks from position `start` on; return how many positions now hold.

        A block that fails ends the restore: what came before it stays, a counter tells.
        """
        began, reached = time.perf_counter(), start
        for block in self.blocks:
            if block.start < start:
                continue
            try:
                load(block.start, block.stop, block.payload)
            except Exception:  # noqa: BLE001  (whatever it is, the prompt can be decoded instead)
                _log.debug("a block could not be restored", exc_info=True)
                self._cache.refuse("restore_failed")
                break
            reached = min(block.stop, self.n_tokens)
        self._cache.count_restored(reached - start, time.perf_counter() - began)
        return reached

    def close(self) -> None:
        """Let the blocks go."""
        nodes, self._nodes, self.blocks = self._nodes, [], []
        if nodes:
            self._cache.release_later(nodes)

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


@dataclass(slots=True)
class _NewBlock:
    tokens: bytes
    start: int
    stop: int
    buffer: memoryview


class PrefixStateCache:
    """States of token prefixes, in blocks, in memory.

    Units:  `ram_bytes` bytes of all that is retained (states, tokens, overhead, buffers waiting
            for their next use); `max_entries` stored prefixes (chains that nothing continues);
            `block_tokens` positions a block.
    Errors: InvalidConfig for anything below 1, and for a fingerprint or max_tokens of another
            type; InvalidTokens for what are no int32 ids. A state that can't
            be stored or read costs a miss and a counter, never an exception.
    Cost:   a look-up costs the prompt's length, not the number of entries.
    Threads: safe; after a fork the child keeps what was stored and nothing that was in use.
    """

    def __init__(
        self,
        *,
        ram_bytes: int = 256 << 20,
        max_entries: int = 32,
        block_tokens: int = 256,
    ) -> None:
        self.ram_bytes = require_int("ram_bytes", ram_bytes, minimum=1)
        self.max_entries = require_int("max_entries", max_entries, minimum=1)
        self.block_tokens = require_int("block_tokens", block_tokens, minimum=1)
        self._lock = threading.Lock()
        self._released: deque[list[Node]] = deque()
        self._is_closed = False
        self._index = BlockIndex(self.block_tokens)
        self._recent = LeastRecentLeaf()
        self._tier = RamTier()
        self._overhead = 0
        self._dead: dict[int, memoryview] = {}
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._seconds = {"restore": 0.0, "save": 0.0}
        _LIVING.add(self)

    # Restoring

    def plan(
        self,
        tokens: object,
        *,
        fingerprint: bytes,
        scope: str | None = None,
        max_tokens: int | None = None,
        aligned: bool = False,
    ) -> RestorePlan:
        """Return the blocks of the longest stored prefix of `tokens`; empty on a miss.

        `max_tokens` bounds the prefix (an engine must decode at least the last token itself);
        `aligned` takes whole blocks only, so that the prefix ends at a multiple of `block_tokens`.
        """
        wanted, fingerprint = token_bytes(tokens), _checked_fingerprint(fingerprint)
        n_tokens = len(wanted) // TOKEN_BYTES
        if max_tokens is not None:
            wanted = wanted[: _checked_bound(max_tokens) * TOKEN_BYTES]
        with self._lock:
            self._settle()
            self._counts["lookups"] += 1
            self._counts["lookup_tokens"] += n_tokens
            return self._pinned(self._find(wanted, fingerprint, scope, aligned))

    def _find(self, wanted: bytes, fingerprint: bytes, scope: str | None, aligned: bool) -> Match:
        root = self._index.root(fingerprint, _checked_scope(scope))
        match = self._index.longest(root, wanted, is_whole=aligned) if root else Match()
        # A short block at the end of a prompt was not cut at a multiple of block_tokens.
        if aligned and match.nodes and match.n_tokens % self.block_tokens:
            match.n_tokens = match.nodes.pop().start
        return match

    def _pinned(self, match: Match) -> RestorePlan:
        self._recent.use(match.nodes)
        blocks: list[StoredBlock] = []
        for node in match.nodes:
            payload = self._tier.get(node.name)
            if payload is None:  # the tier lost it: serve what comes before
                self._refusals["payload_lost"] += 1
                break
            node.pins += 1
            blocks.append(StoredBlock(node.start, node.stop, payload.toreadonly()))
        self._counts["hits"] += bool(blocks)
        n_tokens = min(match.n_tokens, blocks[-1].stop) if blocks else 0
        return RestorePlan(self, match.nodes[: len(blocks)], blocks, n_tokens)

    def count_restored(self, n_tokens: int, seconds: float) -> None:
        """Count positions that were restored instead of decoded."""
        with self._lock:
            self._counts["reused_tokens"] += n_tokens
            self._seconds["restore"] += seconds

    # Saving

    def save(
        self,
        tokens: object,
        read: BlockIO,
        n_bytes: Callable[[int, int], int],
        *,
        fingerprint: bytes,
        scope: str | None = None,
        aligned: bool = False,
    ) -> int:
        """Store the state of `tokens` where it is not stored yet; return the new positions.

        `n_bytes(start, stop)` tells the size of the state of these positions, `read(start, stop,
        buffer)` copies it into a buffer of that size: only the new blocks are read. `aligned`
        leaves out the tokens beyond the last multiple of `block_tokens`.
        """
        wanted, started = token_bytes(tokens), time.perf_counter()
        fingerprint = _checked_fingerprint(fingerprint)
        if aligned:
            block = self.block_tokens * TOKEN_BYTES
            wanted = wanted[: len(wanted) // block * block]
        with self._lock:
            self._settle()
            path, pieces = self._unsaved(wanted, fingerprint, _checked_scope(scope))
        try:
            owner = (fingerprint, scope)
            blocks = self._reserve(path, wanted, pieces, n_bytes, owner) if pieces else []
            n_saved = self._fill_and_file(path, blocks, read)
        finally:
            self.release_later(path)
        with self._lock:
            self._settle()
            self._seconds["save"] += time.perf_counter() - started
        return n_saved

    def _unsaved(
        self, wanted: bytes, fingerprint: bytes, scope: str | None
    ) -> tuple[list[Node], list[tuple[int, int]]]:
        """Return the blocks that are there, pinned, and the [start, stop) that are not."""
        root = self._index.root(fingerprint, scope)
        match = self._index.longest(root, wanted, is_whole=False) if root else Match()
        self._recent.use(match.nodes)
        n_tokens = len(wanted) // TOKEN_BYTES
        if self._is_closed or match.n_tokens == n_tokens:
            return [], []
        # A short or diverging block at the end does not carry on: its place is written anew.
        path = [node for node in match.nodes if self._carries_on(node, match)]
        for node in path:
            node.pins += 1
        return path, self._cut(path[-1].stop if path else 0, n_tokens)

    def _carries_on(self, node: Node, match: Match) -> bool:
        return node.stop <= match.n_tokens and node.stop % self.block_tokens == 0

    def _cut(self, start: int, end: int) -> list[tuple[int, int]]:
        cuts = [*range(start, end, self.block_tokens), end]
        return list(pairwise(cuts))

    def _reserve(
        self,
        path: list[Node],
        wanted: bytes,
        pieces: list[tuple[int, int]],
        n_bytes: Callable[[int, int], int],
        owner: tuple[bytes, str | None],
    ) -> list[_NewBlock]:
        """Return buffers for the new blocks, none where they can't fit the budget."""
        try:
            sizes = [_checked_size(n_bytes(start, stop)) for start, stop in pieces]
        except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
            _log.debug("the size of a state could not be read", exc_info=True)
            self.refuse("save_failed")
            return []
        overhead = len(pieces) * NODE_BYTES + (pieces[-1][1] - pieces[0][0]) * TOKEN_BYTES
        with self._lock:
            if self._is_closed:
                return []
            held = root_bytes(*owner) + sum(node.n_bytes for node in path)
            if held + overhead + sum(sizes) > self.ram_bytes:
                self._refusals["over_budget"] += 1
                return []
            if not path and not self._pin_root(path, owner):
                return []
            if not self._has_entry_room(path[-1], wanted[path[-1].stop * TOKEN_BYTES :]):
                self._refusals["entries_in_use"] += 1
                return []
            return self._take_all(wanted, pieces, sizes)

    def _pin_root(self, path: list[Node], owner: tuple[bytes, str | None]) -> bool:
        """Put the root of a new chain into `path`, in use; False if there is no room for it."""
        root = self._index.root(*owner)
        if root is None:
            n_bytes = root_bytes(*owner)
            if not self._has_room(0, n_bytes):
                self._refusals["blocks_in_use"] += 1
                return False
            root = self._index.add_root(*owner)
            self._overhead += root.n_bytes
        root.pins += 1
        path.append(root)
        return True

    def _take_all(
        self, wanted: bytes, pieces: list[tuple[int, int]], sizes: list[int]
    ) -> list[_NewBlock]:
        blocks: list[_NewBlock] = []
        for (start, stop), size in zip(pieces, sizes, strict=True):
            tokens = wanted[start * TOKEN_BYTES : stop * TOKEN_BYTES]
            buffer = self._take(size, NODE_BYTES + len(tokens))
            if buffer is None:
                break
            self._overhead += NODE_BYTES + len(tokens)
            blocks.append(_NewBlock(tokens, start, stop, buffer))
        return blocks

    def _take(self, size: int, overhead: int) -> memoryview | None:
        if not self._has_room(size, overhead):
            self._refusals["blocks_in_use"] += 1
            return None
        try:
            return self._tier.take(size)
        except MemoryError:
            self._refusals["no_memory"] += 1
            return None

    def _fill_and_file(
        self,
        path: list[Node],
        blocks: list[_NewBlock],
        read: BlockIO,
    ) -> int:
        n_filled = 0
        try:
            n_filled = self._fill(blocks, read)
        finally:
            with self._lock:
                n_saved = self._file_all(path, blocks[:n_filled])
                for block in blocks[n_filled:]:
                    self._drop(block)
        return n_saved

    def _fill(self, blocks: list[_NewBlock], read: BlockIO) -> int:
        """Read the blocks in order, without the lock; return how many came."""
        for n_filled, block in enumerate(blocks):
            try:
                read(block.start, block.stop, block.buffer)
            except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
                _log.debug("a block could not be read", exc_info=True)
                self.refuse("save_failed")
                return n_filled
        return len(blocks)

    def _file_all(self, path: list[Node], blocks: list[_NewBlock]) -> int:
        n_saved = 0
        parent: Node | None = path[-1] if path else None
        for block in blocks:
            # Dead: removed or cleared while its continuation was being read.
            if parent is None or parent.is_dead:
                self._drop(block)
                continue
            node = self._file(parent, block)
            n_saved += (block.stop - block.start) if node is not None else 0
            parent = node or self._index.covering(parent, block.tokens)
        return n_saved

    def _file(self, parent: Node, block: _NewBlock) -> Node | None:
        """Put the block into the tree; None if another thread was faster, or took the room."""
        is_there = self._index.covering(parent, block.tokens) is not None
        if is_there or not self._has_entry_room_still(parent, block):
            self._drop(block)
            return None
        shorter = self._index.superseded(parent, block.tokens)
        size = block.buffer.nbytes + NODE_BYTES + len(block.tokens)
        node = self._index.add(parent, block.tokens, size)
        self._tier.put(node.name, block.buffer)
        if shorter is not None:
            self._remove(shorter)
        self._recent.use([node])
        self._recent.watch(node)
        self._counts["saved_blocks"] += 1
        self._counts["saved_tokens"] += block.stop - block.start
        return node

    def _has_entry_room_still(self, parent: Node, block: _NewBlock) -> bool:
        # Others may have filed their chains while this one was being read.
        parent.pins += 1
        has_room = self._has_entry_room(parent, block.tokens)
        parent.pins -= 1
        if not has_room:
            self._refusals["entries_in_use"] += 1
        return has_room

    def _drop(self, block: _NewBlock) -> None:
        self._overhead -= NODE_BYTES + len(block.tokens)
        self._tier.give_back(block.buffer)

    # Room

    def _has_room(self, size: int, overhead: int) -> bool:
        """Make room for one block; False if all that is left is in use."""
        while True:
            fresh = 0 if self._tier.has_pooled(size) else size
            if self._held_bytes() + fresh + overhead <= self.ram_bytes:
                return True
            if not self._tier.drop_pooled() and not self._evict_leaf():
                return False

    def _has_entry_room(self, parent: Node, rest: bytes) -> bool:
        """Make room for a chain that carries on after `parent`, which is in use, with `rest`."""
        while self._index.n_leaves + self._is_new_leaf(parent, rest) > self.max_entries:
            if not self._evict_entry():
                return False
        return True

    def _is_new_leaf(self, parent: Node, rest: bytes) -> bool:
        if not parent.children:
            return parent.parent is None
        first = rest[: self.block_tokens * TOKEN_BYTES]
        return self._index.superseded(parent, first) is None

    def _evict_entry(self) -> bool:
        """Evict a leaf and what was last used together with it."""
        victim = step = self._recent.victim()
        if victim is None:
            return False
        while step is not None and step.parent is not None and not (step.children or step.pins):
            if step.tick != victim.tick:
                break
            parent = step.parent
            self._evict(step)
            step = parent
        return True

    def _evict_leaf(self) -> bool:
        victim = self._recent.victim()
        if victim is None:
            return False
        self._evict(victim)
        return True

    def _evict(self, node: Node) -> None:
        self._remove(node)
        self._counts["evictions"] += 1

    def _remove(self, node: Node) -> None:
        parent = node.parent
        self._index.remove(node)
        self._overhead -= NODE_BYTES + len(node.tokens)
        if node.pins:
            payload = self._tier.lend(node.name)
            if payload is not None:
                self._dead[id(node)] = payload
        else:
            self._tier.remove(node.name)
        if isinstance(parent, Root):
            self._remove_if_idle(parent)
        elif parent is not None and not parent.children:
            self._recent.watch(parent)

    def _remove_if_idle(self, root: Root) -> None:
        # Below 0: a save that began before a fork ended in the child, where nothing is in use.
        if not (root.is_dead or root.children or root.pins > 0):
            self._remove_root(root)

    def _remove_root(self, root: Root) -> None:
        self._index.remove_root(root)
        self._overhead -= root.n_bytes

    def release_later(self, nodes: list[Node]) -> None:
        """Unpin `nodes` at the next operation; takes no lock."""
        self._released.append(nodes)

    def _settle(self) -> None:
        while self._released:
            for node in self._released.popleft():
                node.pins -= 1
                if isinstance(node, Root):
                    self._remove_if_idle(node)
                if node.is_dead and not node.pins and id(node) in self._dead:
                    self._tier.give_back(self._dead.pop(id(node)))

    # The whole

    def remove(self, *, scope: str | None) -> int:
        """Remove all that was stored for `scope`, whatever the model; return the blocks removed."""
        scope = _checked_scope(scope)
        with self._lock:
            self._settle()
            roots = [root for root in self._index.roots.values() if root.scope == scope]
            return self._remove_all(roots)

    def _remove_all(self, roots: list[Root]) -> int:
        doomed = [node for root in roots for node in self._index.below(root)]
        for node in doomed:
            self._remove(node)
        for root in roots:
            if not root.is_dead:  # a save is at work: what it still files goes nowhere
                self._remove_root(root)
        while self._tier.drop_pooled():
            pass  # a tenant's bytes don't wait in the pool
        return len(doomed)

    def clear(self) -> None:
        """Remove everything, counters too."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._settle()
        self._remove_all(list(self._index.roots.values()))
        self._counts.clear()
        self._refusals.clear()
        self._seconds = {"restore": 0.0, "save": 0.0}

    def close(self) -> None:
        """Remove everything; from now on nothing is found and nothing stored."""
        with self._lock:
            self._is_closed = True
            self._clear()

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""
        with self._lock:
            self._refusals[reason] += 1

    def stats(self) -> StateStats:
        """Return the counters and what is held now."""
        with self._lock:
            self._settle()
            names = ("lookups", "hits", "lookup_tokens", "reused_tokens")
            saved = ("saved_tokens", "saved_blocks", "evictions")
            return StateStats(
                **{name: self._counts[name] for name in names + saved},
                refusals=dict(self._refusals),
                restore_seconds=self._seconds["restore"],
                save_seconds=self._seconds["save"],
                n_entries=self._index.n_leaves,
                n_blocks=self._index.n_nodes,
                n_bytes=self._held_bytes(),
            )

    def memory_usage(self) -> int:
        """Return the bytes retained: states, tokens, overhead and buffers for their next use."""
        with self._lock:
            self._settle()
            return self._held_bytes()

    def _held_bytes(self) -> int:
        return self._overhead + self._tier.memory_usage()

    def __len__(self) -> int:
        """Return the number of entries: stored prefixes that nothing continues."""
        with self._lock:
            return self._index.n_leaves

    def __bool__(self) -> bool:
        """Return True: an empty cache is a cache."""
        return True

    def _check(self) -> None:
        """Verify every invariant; for tests."""
        with self._lock:
            self._settle()
            self._index._check()  # noqa: SLF001
            self._tier._check()  # noqa: SLF001
            nodes = list(self._index.nodes())
            if {node.name for node in nodes} != self._tier.names():
                raise AssertionError("tree and tier hold different blocks")
            if self._counted_overhead() > self._overhead:
                raise AssertionError("overhead undercounted")
            if self._held_bytes() > self.ram_bytes or self._index.n_leaves > self.max_entries:
                raise AssertionError("over budget")

    def _counted_overhead(self) -> int:
        blocks = sum(NODE_BYTES + len(node.tokens) for node in self._index.nodes())
        return blocks + sum(root.n_bytes for root in self._index.roots.values())

    # Forks

    def _before_fork(self) -> None:
        self._lock.acquire()

    def _after_fork_in_parent(self) -> None:
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._released.clear()
        for root in list(self._index.roots.values()):
            root.pins = 0  # by saves of the parent's threads
            self._remove_if_idle(root)
        in_use = [n for n in self._index.nodes() if any(s.pins for s in _with_ancestors(n))]
        for node in in_use:  # their users run on in the parent only
            self._remove(node)
        self._dead.clear()
        self._tier.forget_lent()
        self._overhead = self._counted_overhead()


def _with_ancestors(node: Node) -> Iterator[Node]:
    step: Node | None = node
    while step is not None:
        yield step
        step = step.parent


def _checked_scope(scope: object) -> str | None:
    if scope is not None and not isinstance(scope, str):
        raise InvalidText(f"scope must be a str or None, not {type(scope).__name__}")
    return scope


def _checked_fingerprint(fingerprint: object) -> bytes:
    if not isinstance(fingerprint, bytes):
        raise InvalidConfig(f"fingerprint must be bytes, not {type(fingerprint).__name__}")
    return fingerprint


def _checked_bound(max_tokens: object) -> int:
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise InvalidConfig(f"max_tokens must be an int or None, not {max_tokens!r}")
    return max(max_tokens, 0)


def _checked_size(size: object) -> int:
    """Return a size in bytes that memory could have."""
    n_bytes = index(size)  # type: ignore[arg-type]
    if not 0 <= n_bytes <= sys.maxsize:
        raise ValueError(f"a state can't have {n_bytes} bytes")
    return n_bytes


# Forked while another thread is inside, a lock would stay locked in the child for ever.
_LIVING: weakref.WeakSet[PrefixStateCache] = weakref.WeakSet()
_forking: list[PrefixStateCache] = []


def _before_fork() -> None:
    _forking.extend(_LIVING)
    for cache in _forking:
        cache._before_fork()  # noqa: SLF001


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop()._after_fork_in_parent()  # noqa: SLF001


def _after_fork_in_child() -> None:
    while _forking:
        _forking.pop()._after_fork_in_child()  # noqa: SLF001


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
