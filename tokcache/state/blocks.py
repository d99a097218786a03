"""BlockCache: finds, saves and promotes the blocks of the longest prefix seen before.

1. A prompt is split in two: its public beginning, and the rest in its scope.
2. A look-up walks down the tree in memory, then asks the tiers below for the blocks that follow,
   and files those that memory has room for.
3. A save does the same, then reserves room, reads the new blocks without the lock, and takes the
   lock again to file them, unless another save filed other blocks first.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from tokcache._validate import MAX_INT, require_int
from tokcache.state.handles import BlockIO, RestorePlan, StoredBlock, Work
from tokcache.state.memory import NODE_BYTES
from tokcache.state.misses import MissFinder
from tokcache.state.names import TOKEN_BYTES, RootKey, rest_key
from tokcache.state.path import NewBlock, Path
from tokcache.state.promotion import Promotion
from tokcache.state.store import block_address

if TYPE_CHECKING:
    from tokcache.state.index import Node
    from tokcache.state.store import Store

_log = logging.getLogger("tokcache")

_TRIES = 3  # if another save files other blocks first, the save is planned again
_Part = tuple[RootKey, bytes, Work]  # a part of a prompt: root key, tokens, work


class BlockCache:
    """States in blocks: the common beginning of prefixes is held once, to the token.

    Threads: safe; the store's lock is never held while a state is copied or a tier is asked.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._memory = store, store.memory
        self._promotion = Promotion(store)
        self._misses = MissFinder(store)

    def _begun_parts(self, root_key: RootKey, wanted: bytes, n_public: int) -> list[_Part]:
        """Return the parts of a prompt: its public tokens, then all tokens; the lock is held.

        Clearing a part's scope from now on makes its work void.
        """
        clears = self._store.clears
        if root_key.scope is None or not n_public:
            return [(root_key, wanted, Work(clears, root_key.scope))]
        parts = [(root_key, wanted)]
        if n_public:
            public = self._whole_blocks(wanted[: n_public * TOKEN_BYTES], root_key)
            if public:
                parts = [(root_key._replace(scope=None), public)]
            if 0 < len(public) < len(wanted):
                parts.append((rest_key(root_key, public), wanted))
        return [(each, part, Work(clears, each.scope)) for each, part in parts]

    def _whole_blocks(self, wanted: bytes, root_key: RootKey) -> bytes:
        if root_key.kind != "aligned":
            return wanted
        block = self._memory.index.grain(root_key)
        return wanted[: len(wanted) // block * block]

    # Restoring

    def plan(
        self,
        root_key: RootKey,
        wanted: bytes,
        n_public: int,
        *,
        max_tokens: int | None,
        counts_tokens: bool,
        explain: bool,
        last_only: bool,
        n_known: int,
    ) -> RestorePlan:
        """Return the blocks of the longest stored prefix of `wanted`; empty on a miss."""
        n_tokens = len(wanted) // TOKEN_BYTES
        if max_tokens is not None:
            max_tokens = require_int("max_tokens", max_tokens, -sys.maxsize, sys.maxsize)
            wanted = wanted[: max(max_tokens, 0) * TOKEN_BYTES]
        with self._store.lock:
            self._store.settle()
            self._memory.counts["lookups"] += 1
            self._memory.counts["prompt_tokens"] += n_tokens * counts_tokens
            parts = self._begun_parts(root_key, self._whole_blocks(wanted, root_key), n_public)
        paths: list[Path] = []
        try:
            for part in parts:
                paths.append(self._found_anywhere(part, last_only=last_only))
                if last_only:
                    self._promotion.fill_last(paths[-1], n_known)
                if paths[-1].n_tokens * TOKEN_BYTES < len(part[1]):
                    break
        except BaseException:
            for path in paths:
                self._store.release_later(path.pinned())
            raise
        with self._store.lock:
            plan = self._planned(paths, counts_tokens=counts_tokens, last_only=last_only)
            if plan.n_tokens * TOKEN_BYTES < len(parts[-1][1]):
                n_asked = len(parts[-1][1]) // TOKEN_BYTES
                last, (_, sought, _) = paths[-1], parts[len(paths) - 1]
                plan.miss = self._misses.find(
                    last, sought, n_found=plan.n_tokens, n_asked=n_asked, explain=explain
                )
                if counts_tokens:
                    self._store.count_miss(plan.miss)
            return plan

    def _found_anywhere(self, part: _Part, *, last_only: bool) -> Path:
        """Return the blocks of a part that memory and the tiers below hold."""
        root_key, wanted, work = part
        with self._store.lock:
            path = Path.found(self._store, root_key, wanted, work)
            is_all = path.n_tokens * TOKEN_BYTES >= len(wanted)
            if is_all or not self._store.below or self._store.is_closed:
                return path
        try:
            self._promotion.extend(path, wanted, last_only=last_only)
        except BaseException:
            self._store.release_later(path.pinned())
            raise
        with self._store.lock:
            self._store.queue_blocks(path.nodes, root_key, last_only=last_only)
        return path

    def _planned(self, paths: list[Path], *, counts_tokens: bool, last_only: bool) -> RestorePlan:
        """Return the plan of the blocks that are still there; the lock is held.

        A plan ends before the first block that was lost or cleared since the look-up began.
        """
        blocks: list[tuple[int, int, memoryview]] = []
        n_tokens = 0
        for path in paths:
            is_complete = not path.work.is_void
            if not is_complete:
                path.cut(path.root_key.start)
            for node in path.nodes if is_complete else ():
                payload = self._memory.tier.get(node)
                if node.is_unread and not last_only:
                    path.cut(min(path.n_tokens, node.start))
                    is_complete = False
                    break
                if node is path.nodes[-1] and path.unread_state is not None:
                    payload = path.unread_state
                if payload is None:
                    self._memory.refusals["payload_lost"] += 1
                    path.cut(min(path.n_tokens, node.start))
                    is_complete = False
                    break
                blocks.append((node.start, node.stop, payload))
            blocks += path.loose
            n_tokens = path.n_tokens
            if not is_complete:
                break
        if n_tokens < self._store.min_tokens:
            blocks, n_tokens = [], 0
        self._memory.counts["hits"] += bool(blocks)
        if self._store.below:
            for path in paths:
                old = self._store.untouched(path.nodes)
                addresses = [block_address(self._memory.index, node, path.root_key) for node in old]
                self._store.touch_later(old, addresses)
        if len(paths) > 1:  # evict public blocks after those that follow them
            self._memory.retention.use(paths[0].nodes, time.monotonic())
        # Each block serves the positions up to the start of the next one.
        served: list[StoredBlock] = []
        until = min(n_tokens, blocks[-1][1]) if blocks else 0
        for start, stop, payload in reversed(blocks):
            served.append(StoredBlock(start, stop, payload.toreadonly(), until))
            until = start
        served.reverse()
        pinned: list[Node] = []
        works: list[Work] = []
        for path in paths:
            pinned += path.pinned()
            works.append(path.work)
        return RestorePlan(
            self._store, pinned, served, n_tokens, works, counts_tokens=counts_tokens
        )

    # Pinning

    def pin(
        self, root_key: RootKey, wanted: bytes, n_public: int, *, is_pinned: bool
    ) -> tuple[int, int]:
        """Evict the blocks of a prefix after all others, or as others again.

        Return how many of its tokens memory holds, and how many of these every tier has.
        """
        with self._store.lock:
            self._store.settle()
            parts = self._begun_parts(root_key, self._whole_blocks(wanted, root_key), n_public)
        n_held = n_below = 0
        for part in parts:
            part_key, tokens, work = part
            # The pin of a block that only a tier has may end, too.
            path = None if is_pinned else self._found_anywhere(part, last_only=False)
            with self._store.lock:
                path = path or Path.found(self._store, part_key, tokens, work)
                nodes, n_before = path.nodes, n_held
                n_held = path.n_tokens
                is_whole = n_held * TOKEN_BYTES == len(tokens)
                if is_pinned and not is_whole:
                    nodes = []
                elif is_pinned:
                    self._memory.pinned.pin(nodes, n_held)
                else:
                    nodes = self._memory.pinned.unpin(nodes, n_held)
                if n_below == n_before:
                    for node in path.nodes:
                        if not all(node.written & below.bit for below in self._store.below):
                            break
                        n_below = min(node.stop, n_held)
                index = self._memory.index
                addresses = [block_address(index, node, part_key) for node in nodes]
                for below in self._store.below:
                    below.pin_later(addresses, is_pinned=is_pinned)
                self._store.release_later(path.pinned())
            if not is_whole:
                break
        return n_held, n_below

    # Saving

    def save(
        self,
        root_key: RootKey,
        wanted: bytes,
        n_public: int,
        read: BlockIO,
        n_bytes: Callable[[int, int], int],
        *,
        priority: int,
        last_only: bool,
    ) -> int:
        """Store the positions of `wanted` that are not stored yet; return how many."""
        started = time.perf_counter()
        wanted = self._whole_blocks(wanted, root_key)
        priority = require_int("priority", priority, -MAX_INT)
        n_saved = 0
        if self._store.enabled and len(wanted) >= self._store.min_tokens * TOKEN_BYTES:
            with self._store.lock:
                first, *rest = self._begun_parts(root_key, wanted, n_public)
            n_saved = self._save_part(first, read, n_bytes, priority, last_only=last_only)
            for each in rest:
                with self._kept(first) as is_there:
                    if is_there:  # without it, the rest could not be found
                        n_saved += self._save_part(
                            each, read, n_bytes, priority, last_only=last_only
                        )
        with self._store.lock:
            self._store.settle()
            self._store.seconds["save"] += time.perf_counter() - started
        self._store.notices.log()
        return n_saved

    @contextmanager
    def _kept(self, public: _Part) -> Iterator[bool]:
        """Pin the public blocks while those that follow are saved; yield whether all are there."""
        root_key, tokens, work = public
        with self._store.lock:
            path = Path.found(self._store, root_key, tokens, work)
        try:
            yield path.n_tokens * TOKEN_BYTES == len(tokens)
        finally:
            with self._store.lock:
                self._memory.retention.use(path.nodes, time.monotonic())
            self._store.release_later(path.pinned())

    def _save_part(
        self,
        part: _Part,
        read: BlockIO,
        n_bytes: Callable[[int, int], int],
        priority: int,
        *,
        last_only: bool,
    ) -> int:
        """Store the new blocks of one part of a prompt; return their number of positions."""
        root_key, wanted, work = part
        n_saved, is_overtaken, n_tries_left = 0, True, _TRIES
        while is_overtaken and n_tries_left:
            n_tries_left -= 1
            with self._store.lock:
                self._store.settle()
                if work.is_void or self._store.is_closed:
                    break
                path = Path.found(self._store, root_key, wanted, work)
                path.last_only = last_only
                for node in path.nodes:
                    node.priority = max(node.priority, priority)
            try:
                if self._store.below:
                    # Promote blocks that others stored meanwhile, so that the new ones follow them.
                    self._promotion.extend(path, wanted, last_only=last_only)
                    if path.loose:  # memory has no room for them, so no block can follow them
                        path.cut(path.loose[0][0])
                path.refusal = ""
                blocks = self._reserved(path, wanted, n_bytes)
                n_new, is_overtaken = self._fill_and_file(path, blocks, read, priority)
                n_saved += n_new
                if path.refusal and not is_overtaken:
                    with self._store.lock:
                        path.note_refusal(wanted)
            finally:
                self._store.release_later(path.pinned())
        return n_saved

    def _reserved(
        self, path: Path, wanted: bytes, n_bytes: Callable[[int, int], int]
    ) -> list[NewBlock]:
        """Return buffers for the new blocks; fewer, or none, if memory has no room for them."""
        stop = len(wanted) // TOKEN_BYTES
        bounds = list(pairwise([*range(path.n_tokens, stop, self._store.block_tokens), stop]))
        if not bounds:
            return []
        try:
            sizes = [require_int("n_bytes", n_bytes(*each), 0, sys.maxsize) for each in bounds]
        except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
            _log.debug("the size of a state could not be read", exc_info=True)
            self._store.refuse("save_failed")
            path.refusal = "save_failed"
            return []
        overhead = len(bounds) * NODE_BYTES + (stop - path.n_tokens) * TOKEN_BYTES
        blocks: list[NewBlock] = []
        with self._store.lock:
            if path.is_void:
                return []
            n_total = path.held_bytes + overhead + sum(sizes)
            if n_total > self._store.ram_bytes:
                self._memory.refusals["over_budget"] += 1
                self._store.notices.oversize(path.root_key.fingerprint, stop, n_total)
                path.refusal = "over_budget"
                return []
            if not path.has_entry_room():
                if path.root is not None:  # the lack of a root was counted already
                    self._memory.refusals["entries_in_use"] += 1
                path.refusal = "blocks_in_use" if path.root is None else "entries_in_use"
                return []
            for (start, end), size in zip(bounds, sizes, strict=True):
                tokens = wanted[start * TOKEN_BYTES : end * TOKEN_BYTES]
                buffer = self._memory.take(size, NODE_BYTES + len(tokens))
                if buffer is None:
                    path.refusal = "blocks_in_use"
                    break
                blocks.append(NewBlock(tokens, start, end, buffer))
        return blocks

    def _fill_and_file(
        self, path: Path, blocks: list[NewBlock], read: BlockIO, priority: int
    ) -> tuple[int, bool]:
        """Return the number of new positions, and whether another save filed others first."""
        n_filled = n_filed = n_saved = n_bytes = 0
        try:
            for block in blocks:
                read(block.start, block.stop, block.buffer)
                n_filled += 1
        except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
            _log.debug("a block could not be read", exc_info=True)
            self._store.refuse("save_failed")
            path.refusal = "save_failed"
        finally:
            with self._store.lock:
                for block in blocks[:n_filled]:
                    node = path.file(block)
                    if node is None:
                        break
                    node.priority = priority
                    path.append(node, block.stop)
                    n_filed += 1
                    n_saved += block.stop - block.start
                    n_bytes += block.buffer.nbytes
                self._memory.counts["saved_blocks"] += n_filed
                self._memory.counts["saved_tokens"] += n_saved
                self._memory.counts["saved_bytes"] += n_bytes
                for block in blocks[n_filed:]:
                    self._memory.drop(block.buffer, block.overhead)
                self._store.queue_blocks(path.nodes, path.root_key, last_only=path.last_only)
                is_overtaken = n_filed < n_filled and path.in_the_way(blocks[n_filed]) is not None
        return n_saved, is_overtaken
