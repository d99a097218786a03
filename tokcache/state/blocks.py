"""BlockCache: finds, saves and promotes the blocks of the longest prefix seen before.

1. A prompt is split into parts: its public beginning, and the rest in its scope.
2. A look-up walks down the tree in memory, then asks the tiers below for the blocks that follow,
   and files those that memory has room for.
3. A save does the same, then reserves room, reads the new blocks without the lock, and files them
   under it where nobody was faster.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING

from tokcache._prefix import common_tokens
from tokcache._validate import MAX_INT, require_int
from tokcache.errors import InvalidConfig, StateRefused
from tokcache.state.handles import BlockIO, RestorePlan, StoredBlock, Work
from tokcache.state.index import Node, Root, root_bytes
from tokcache.state.memory import NODE_BYTES
from tokcache.state.names import TOKEN_BYTES, Owner, child_name, rest_owner
from tokcache.state.store import block_address
from tokcache.state.tiers import Address, Stored

if TYPE_CHECKING:
    from tokcache.state.store import Store
    from tokcache.state.tiers.opening import Below

_log = logging.getLogger("tokcache")

_TRIES = 3  # a save that another one overtook is planned again
_Part = tuple[Owner, bytes, Work]  # the owner of a prompt's beginning, its tokens, the work on it


@dataclass(slots=True)
class _Path:
    """The blocks that a prompt begins with, in use: `n_tokens` positions, the last at `point`."""

    owner: Owner
    work: Work
    root: Root | None
    nodes: list[Node]
    n_tokens: int
    loose: list[tuple[int, int, memoryview]] = field(default_factory=list)
    loose_point: bytes = b""

    @property
    def last(self) -> Node:
        if not self.nodes:
            if self.root is None:
                raise AssertionError("nothing is held for this owner")
            return self.root
        return self.nodes[-1]

    def point(self) -> bytes:
        """Return the name of the prefix that the blocks hold."""
        if self.loose:
            return self.loose_point
        if self.root is None:
            return Root(self.owner, 0).name
        return self.last.point(self.n_tokens)

    def pinned(self) -> list[Node]:
        return self.nodes if self.root is None else [self.root, *self.nodes]


@dataclass(slots=True)
class _NewBlock:
    tokens: bytes
    start: int
    stop: int
    buffer: memoryview

    @property
    def overhead(self) -> int:
        return NODE_BYTES + len(self.tokens)


class BlockCache:
    """States in blocks: the common beginning of prefixes is held once, to the token.

    Threads: safe; the store's lock is never held while a state is copied or a tier is asked.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._memory = store, store.memory

    # Restoring

    def plan(
        self,
        owner: Owner,
        wanted: bytes,
        n_public: int,
        *,
        max_tokens: int | None,
        counts_tokens: bool,
    ) -> RestorePlan:
        """Return the blocks of the longest stored prefix of `wanted`; empty on a miss."""
        n_tokens = len(wanted) // TOKEN_BYTES
        if max_tokens is not None:
            wanted = wanted[: _checked_bound(max_tokens) * TOKEN_BYTES]
        with self._store.lock:
            self._store.settle()
            self._memory.counts["lookups"] += 1
            self._memory.counts["prompt_tokens"] += n_tokens * counts_tokens
            parts = self._begun_parts(owner, self._whole_blocks(wanted, owner), n_public)
        paths: list[_Path] = []
        try:
            for each, part, work in parts:
                paths.append(self._found_anywhere(each, part, work))
                if paths[-1].n_tokens * TOKEN_BYTES < len(part):
                    break
        except BaseException:
            for path in paths:
                self._store.release_later(path.pinned())
            raise
        with self._store.lock:
            return self._planned(paths, counts_tokens=counts_tokens)

    def _begun_parts(self, owner: Owner, wanted: bytes, n_public: int) -> list[_Part]:
        """Return the parts of a prompt, noted as begun: a clear from now on makes them void."""
        parts = self._parts(owner, wanted, n_public)
        return [(each, part, self._store.begun(each.scope)) for each, part in parts]

    def _parts(self, owner: Owner, wanted: bytes, n_public: int) -> Iterator[tuple[Owner, bytes]]:
        """Yield the owner of each beginning of a prompt: first of the public part, then of all."""
        public = self._whole_blocks(wanted[: n_public * TOKEN_BYTES], owner)
        if owner.scope is None or not public:
            yield owner, wanted
            return
        yield owner._replace(scope=None), public
        if len(public) < len(wanted):
            yield rest_owner(owner, public), wanted

    def _found_anywhere(self, owner: Owner, wanted: bytes, work: Work) -> _Path:
        """Return the blocks of a part that memory and the tiers below hold."""
        with self._store.lock:
            path = self._found(owner, wanted, work)
            is_all = path.n_tokens * TOKEN_BYTES >= len(wanted)
            if is_all or not self._store.below or self._store.is_closed:
                return path
        try:
            self._extend(path, wanted)
        except BaseException:
            self._store.release_later(path.pinned())
            raise
        with self._store.lock:
            self._store.queue_blocks(path.nodes, owner)
        return path

    def _whole_blocks(self, wanted: bytes, owner: Owner) -> bytes:
        if owner.kind != "aligned":
            return wanted
        block = self._memory.index.grain(owner)
        return wanted[: len(wanted) // block * block]

    def _found(self, owner: Owner, wanted: bytes, work: Work) -> _Path:
        root, match = self._memory.find(owner, wanted)
        path = _Path(owner, work, root, match.nodes, match.n_tokens)
        for node in path.pinned():
            node.pins += 1
        return path

    def _planned(self, paths: list[_Path], *, counts_tokens: bool) -> RestorePlan:
        blocks: list[tuple[int, int, memoryview]] = []
        n_tokens = 0
        for path in paths:
            is_complete = self._collect(path, blocks)
            n_tokens = path.n_tokens
            if not is_complete:
                break
        if n_tokens < self._store.min_tokens:
            blocks, n_tokens = [], 0
        self._memory.counts["hits"] += bool(blocks)
        for path in paths:
            old = self._store.untouched(path.nodes)
            addresses = [block_address(self._memory.index, node, path.owner) for node in old]
            self._store.touch_later(old, addresses)
        if len(paths) > 1:  # public blocks are never older than those that need them
            self._memory.use(paths[0].nodes, time.monotonic())
        pinned = [node for path in paths for node in path.pinned()]
        served = _served(blocks, n_tokens)
        works = [path.work for path in paths]
        return RestorePlan(
            self._store, pinned, served, n_tokens, works, counts_tokens=counts_tokens
        )

    def _collect(self, path: _Path, blocks: list[tuple[int, int, memoryview]]) -> bool:
        """Add a path's blocks; False where one was lost or cleared: those before it are served."""
        if path.work.is_void:  # cleared since the look-up began
            path.n_tokens, path.loose = path.owner.start, []
            return False
        get = self._memory.tier.get
        for node in path.nodes:
            payload = get(node)
            if payload is None:
                self._memory.refusals["payload_lost"] += 1
                path.n_tokens, path.loose = min(path.n_tokens, node.start), []
                return False
            blocks.append((node.start, node.stop, payload))
        blocks += path.loose
        return True

    # Restoring from below

    def _extend(self, path: _Path, wanted: bytes) -> None:
        """Add the blocks of the tiers below that follow those in memory; the lock is not held."""
        before = path.n_tokens
        ended: dict[Below, int] = {}
        asked = self._store.worth_asking(path.owner)
        while any(self._extend_from(below, path, wanted, ended) for below in asked):
            pass
        with self._store.lock:
            self._memory.counts["promoted_tokens"] += path.n_tokens - before

    def _extend_from(
        self, below: Below, path: _Path, wanted: bytes, ended: dict[Below, int]
    ) -> bool:
        """Add the blocks of one tier, up to the first partial one; False if it had none.

        `ended`: the position from which each tier is known to hold nothing.
        """
        before = path.n_tokens
        if before * TOKEN_BYTES >= len(wanted) or ended.get(below, -1) >= before:
            return False
        found = below.tier.find_each(self._ahead(path, wanted))
        foreseen = before
        while path.n_tokens == foreseen:
            foreseen += self._store.block_tokens
            began, start = time.perf_counter(), path.n_tokens
            is_more = self._extend_by_one(path, below, found, wanted)
            seconds = time.perf_counter() - began
            goes_on = self._store.note_read(below, path.owner, path.n_tokens - start, seconds)
            if not (is_more and goes_on):
                # It holds nothing more, or it rests from now on, whatever others still bring.
                ended[below] = path.n_tokens if goes_on else len(wanted)
                break
        return path.n_tokens > before

    def _ahead(self, path: _Path, wanted: bytes) -> Iterator[tuple[Address, bytes]]:
        """Yield where the next blocks are if each is whole, and the tokens from there on."""
        at, point = path.n_tokens, path.point()
        grain, block = self._memory.index.grain(path.owner), self._store.block_tokens * TOKEN_BYTES
        while rest := wanted[at * TOKEN_BYTES :]:
            yield Address(path.owner, at, point, child_name(point, rest[:grain])), rest
            at, point = at + self._store.block_tokens, child_name(point, rest[:block])

    def _extend_by_one(
        self, path: _Path, below: Below, found: Iterator[Stored | None], wanted: bytes
    ) -> bool:
        try:
            stored = next(found, None)
            if stored is None:
                return False
            with stored:
                return self._promote(path, below, stored, wanted[path.n_tokens * TOKEN_BYTES :])
        except StateRefused as refusal:
            below.tier.refuse(str(refusal))
        except Exception:  # noqa: BLE001  (any failure is a miss: the prompt is decoded)
            _log.warning("the %s tier failed", below.tier.label, exc_info=True)
            below.tier.refuse("error")
        return False

    def _promote(self, path: _Path, below: Below, stored: Stored, rest: bytes) -> bool:
        """Add a block that was found below; False if it brings nothing."""
        tokens = stored.record.tokens
        n_shared = common_tokens(tokens, rest)
        if not n_shared or (path.owner.kind == "aligned" and n_shared != self._store.block_tokens):
            return False
        with self._store.lock:
            if path.work.is_void:
                return False
            buffer = None if path.loose else self._buffer_below(path, stored)
        if buffer is None:
            n_loose = sum(payload.nbytes for _, _, payload in path.loose)
            if not below.tier.is_mapped and n_loose + stored.n_bytes > self._store.ram_bytes:
                below.tier.refuse("no_room")
                return False
            start, point = path.n_tokens, path.point()
            stop = start + len(tokens) // TOKEN_BYTES
            path.loose.append((start, stop, stored.view()))
            path.loose_point = child_name(point, tokens[: n_shared * TOKEN_BYTES])
            path.n_tokens += n_shared
            return True
        block = _NewBlock(tokens, path.n_tokens, path.n_tokens + len(tokens) // TOKEN_BYTES, buffer)
        return self._fill_promoted(path, below, block, stored, n_shared)

    def _buffer_below(self, path: _Path, stored: Stored) -> memoryview | None:
        """Return a buffer for a block from below; None where it has to be served from there."""
        memory, tokens = self._memory, stored.record.tokens
        held = root_bytes(path.owner) + sum(node.n_bytes for node in path.nodes)
        overhead = NODE_BYTES + len(tokens)
        if held + overhead + stored.n_bytes > self._store.ram_bytes or self._store.is_closed:
            return None
        if path.root is None:
            path.root = memory.pin_root(path.owner)
        if path.root is None or not memory.has_entry_room(path.last, path.n_tokens):
            return None
        return memory.take(stored.n_bytes, overhead)

    def _fill_promoted(
        self, path: _Path, below: Below, block: _NewBlock, stored: Stored, n_shared: int
    ) -> bool:
        is_read = False
        try:
            stored.read_into(block.buffer)
            is_read = True
        finally:
            with self._store.lock:
                node = self._file(path, block) if is_read else None
                if node is None:
                    self._memory.drop(block.buffer, block.overhead)
                    node = self._filed_meanwhile(path, block) if is_read else None
                if node is not None:
                    node.pins += 1
                    node.written |= below.bit
                    node.priority = max(node.priority, stored.record.priority)
                    self._memory.watch(node)
                    path.nodes.append(node)
                    path.n_tokens += n_shared
        return node is not None

    def _file(self, path: _Path, block: _NewBlock) -> Node | None:
        """Put a block at the end of a path; None if that is gone, or the place or the room is."""
        parent, root, memory = path.last, path.root, self._memory
        if root is None or root.is_dead or parent.is_dead:
            return None
        if path.work.is_void or self._store.is_closed:
            return None
        if self._memory.index.child(root, parent, block.start, block.tokens) is not None:
            return None
        if not memory.has_entry_room(parent, block.start):
            memory.refusals["entries_in_use"] += 1
            return None
        return memory.file(root, parent, block.start, block.tokens, block.buffer)

    def _filed_meanwhile(self, path: _Path, block: _NewBlock) -> Node | None:
        """Return the same block where another thread was faster to file it."""
        if path.root is None or path.root.is_dead or path.last.is_dead:
            return None
        node = self._memory.index.child(path.root, path.last, block.start, block.tokens)
        return node if node is not None and node.tokens == block.tokens else None

    # Saving

    def save(
        self,
        owner: Owner,
        wanted: bytes,
        n_public: int,
        read: BlockIO,
        n_bytes: Callable[[int, int], int],
        *,
        priority: int,
    ) -> int:
        """Store the state of `wanted` where it is not stored yet; return the new positions."""
        started = time.perf_counter()
        wanted = self._whole_blocks(wanted, owner)
        priority = require_int("priority", priority, -MAX_INT)
        n_saved = 0
        if self._store.enabled and len(wanted) >= self._store.min_tokens * TOKEN_BYTES:
            with self._store.lock:
                first, *rest = self._begun_parts(owner, wanted, n_public)
            n_saved = self._save_part(first, read, n_bytes, priority)
            for each in rest:
                with self._kept(first) as is_there:
                    if is_there:  # without it, the rest could not be found
                        n_saved += self._save_part(each, read, n_bytes, priority)
        with self._store.lock:
            self._store.settle()
            self._store.seconds["save"] += time.perf_counter() - started
        self._store.log_oversize()
        return n_saved

    @contextmanager
    def _kept(self, public: _Part) -> Iterator[bool]:
        """Keep the public blocks, if they are there, while those that follow are saved."""
        _, tokens, _ = public
        with self._store.lock:
            path = self._found(*public)
        try:
            yield path.n_tokens * TOKEN_BYTES == len(tokens)
        finally:
            with self._store.lock:
                self._memory.use(path.nodes, time.monotonic())
            self._store.release_later(path.pinned())

    def _save_part(
        self, part: _Part, read: BlockIO, n_bytes: Callable[[int, int], int], priority: int
    ) -> int:
        n_saved = 0
        for _ in range(_TRIES):
            n_new, is_overtaken = self._save(part, read, n_bytes, priority)
            n_saved += n_new
            if not is_overtaken:
                break
        return n_saved

    def _save(
        self, part: _Part, read: BlockIO, n_bytes: Callable[[int, int], int], priority: int
    ) -> tuple[int, bool]:
        _, wanted, work = part
        with self._store.lock:
            self._store.settle()
            if work.is_void or self._store.is_closed:
                return 0, False
            path = self._found(*part)
            for node in path.nodes:
                node.priority = max(node.priority, priority)
        try:
            self._learn_from_below(path, wanted)
            stop = len(wanted) // TOKEN_BYTES
            pieces = list(pairwise([*range(path.n_tokens, stop, self._store.block_tokens), stop]))
            blocks = self._reserve(path, wanted, pieces, n_bytes) if pieces else []
            return self._fill_and_file(path, blocks, read, priority)
        finally:
            self._store.release_later(path.pinned())

    def _learn_from_below(self, path: _Path, wanted: bytes) -> None:
        """Take over the blocks that others stored meanwhile, so that new ones follow theirs."""
        if not self._store.below:
            return
        self._extend(path, wanted)
        if path.loose:  # memory had no room for it: nothing can follow it there
            path.n_tokens = path.loose[0][0]
            path.loose = []

    def _reserve(
        self,
        path: _Path,
        wanted: bytes,
        pieces: list[tuple[int, int]],
        n_bytes: Callable[[int, int], int],
    ) -> list[_NewBlock]:
        """Return buffers for the new blocks, none where they can't fit the budget."""
        try:
            sizes = [_checked_size(n_bytes(start, stop)) for start, stop in pieces]
        except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
            _log.debug("the size of a state could not be read", exc_info=True)
            self._store.refuse("save_failed")
            return []
        overhead = len(pieces) * NODE_BYTES + (pieces[-1][1] - pieces[0][0]) * TOKEN_BYTES
        memory = self._memory
        with self._store.lock:
            if path.work.is_void or self._store.is_closed:
                return []
            held = root_bytes(path.owner) + sum(node.n_bytes for node in path.nodes)
            n_total = held + overhead + sum(sizes)
            if n_total > self._store.ram_bytes:
                self._store.refuse_oversize(path.owner.fingerprint, pieces[-1][1], n_total)
                return []
            if path.root is None:
                path.root = memory.pin_root(path.owner)
            if path.root is None:
                return []
            if not memory.has_entry_room(path.last, path.n_tokens):
                memory.refusals["entries_in_use"] += 1
                return []
            return list(self._take_all(wanted, pieces, sizes))

    def _take_all(
        self, wanted: bytes, pieces: list[tuple[int, int]], sizes: list[int]
    ) -> Iterator[_NewBlock]:
        for (start, stop), size in zip(pieces, sizes, strict=True):
            tokens = wanted[start * TOKEN_BYTES : stop * TOKEN_BYTES]
            buffer = self._memory.take(size, NODE_BYTES + len(tokens))
            if buffer is None:
                return
            yield _NewBlock(tokens, start, stop, buffer)

    def _fill_and_file(
        self, path: _Path, blocks: list[_NewBlock], read: BlockIO, priority: int
    ) -> tuple[int, bool]:
        """Return the new positions, and whether another save was faster and had other blocks."""
        n_filled = 0
        try:
            n_filled = self._fill(blocks, read)
        finally:
            with self._store.lock:
                n_filed = self._file_all(path, blocks[:n_filled], priority)
                for block in blocks[n_filed:]:
                    self._memory.drop(block.buffer, block.overhead)
                self._store.queue_blocks(path.nodes, path.owner)
                is_overtaken = n_filed < n_filled and self._is_in_the_way(path, blocks[n_filed])
        n_saved = sum(block.stop - block.start for block in blocks[:n_filed])
        return n_saved, is_overtaken

    def _is_in_the_way(self, path: _Path, block: _NewBlock) -> bool:
        if path.root is None or path.root.is_dead or path.last.is_dead:
            return False
        return self._memory.index.child(path.root, path.last, block.start, block.tokens) is not None

    def _fill(self, blocks: list[_NewBlock], read: BlockIO) -> int:
        """Read the blocks in order, without the lock; return how many came."""
        for n_filled, block in enumerate(blocks):
            try:
                read(block.start, block.stop, block.buffer)
            except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
                _log.debug("a block could not be read", exc_info=True)
                self._store.refuse("save_failed")
                return n_filled
        return len(blocks)

    def _file_all(self, path: _Path, blocks: list[_NewBlock], priority: int) -> int:
        """File the blocks and make them the path's; return how many found their place."""
        for n_filed, block in enumerate(blocks):
            node = self._file(path, block)
            if node is None:
                return n_filed
            node.pins += 1
            node.priority = priority
            self._memory.watch(node)
            path.nodes.append(node)
            path.n_tokens = block.stop
            self._memory.counts["saved_blocks"] += 1
            self._memory.counts["saved_tokens"] += block.stop - block.start
        return len(blocks)


def _served(blocks: list[tuple[int, int, memoryview]], n_tokens: int) -> list[StoredBlock]:
    """Return the blocks with the position that each of them serves up to."""
    ends = [start for start, _, _ in blocks[1:]]
    ends.append(min(n_tokens, blocks[-1][1]) if blocks else 0)
    return [
        StoredBlock(start, stop, payload.toreadonly(), until)
        for (start, stop, payload), until in zip(blocks, ends, strict=False)
    ]


def _checked_bound(max_tokens: object) -> int:
    if isinstance(max_tokens, bool) or not hasattr(max_tokens, "__index__"):
        raise InvalidConfig(f"max_tokens must be an int or None, not {max_tokens!r}")
    return max(index(max_tokens), 0)


def _checked_size(size: object) -> int:
    """Return a size in bytes that memory could have."""
    n_bytes = index(size)  # type: ignore[arg-type]
    if not 0 <= n_bytes <= sys.maxsize:
        raise ValueError(f"a state can't have {n_bytes} bytes")
    return n_bytes
