"""Promotion: blocks of the tiers below extend a path, and are copied into memory.

1. Each tier is asked for the blocks that follow, as if each of them were a whole block; a shorter
   one makes the tier be asked again from its end.
2. A block is read into a buffer of memory without the lock, then filed under it.
3. If memory has no room, the block and all that follow stay loose: they serve this look-up only.
4. Where a block's state stands for all positions before it (`last_only`), only the tokens of blocks
   are read and filed; the last block's state follows once the whole path is known.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tokcache._prefix import common_tokens
from tokcache.state.memory import NODE_BYTES
from tokcache.state.names import TOKEN_BYTES, child_name
from tokcache.state.path import NewBlock
from tokcache.state.store import block_address
from tokcache.state.tiers import Address
from tokcache.state.tiers.counters import take_refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokcache.state.index import Node
    from tokcache.state.path import Path
    from tokcache.state.store import Store
    from tokcache.state.tiers import Stored
    from tokcache.state.tiers.opening import Below


class Promotion:
    """Extends paths by blocks of the tiers below.

    Threads: safe; the store's lock is never held while a tier is asked.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._memory = store, store.memory

    def extend(self, path: Path, wanted: bytes, *, last_only: bool = False) -> None:
        """Add the blocks of the tiers below that follow those in memory.

        With `last_only` their states are not read; `fill_last` reads that of the last one.
        """
        before = path.n_tokens
        ended: dict[Below, int] = {}
        asked = self._store.worth_asking(path.root_key)
        while any(self._extend_from(below, path, wanted, ended, last_only) for below in asked):
            pass
        with self._store.lock:
            self._memory.counts["promoted_tokens"] += path.n_tokens - before

    def fill_last(self, path: Path, n_known: int) -> None:
        """Read the state of the path's last block, if the path serves more than `n_known` tokens.

        A block whose state is gone ends the path before it: then the one before that is read.
        """
        if not (path.nodes and path.nodes[-1].is_unread and path.n_tokens > n_known):
            return
        asked = self._store.worth_asking(path.root_key)
        while path.nodes and path.nodes[-1].is_unread and path.n_tokens > n_known:
            node = path.nodes[-1]
            if any(self._fill_from(below, path, node) for below in asked):
                return
            with self._store.lock:
                path.nodes.pop()
                path.cut(node.start)
                self._memory.release(node)
                is_free = not (node.is_dead or node.children or node.pins)
                if is_free and node.is_unread and len(asked) == len(self._store.below):
                    self._memory.remove(node)  # no tier has its state any more

    def _fill_from(self, below: Below, path: Path, node: Node) -> bool:
        """Read the state of an unread block from one tier; False if it has none."""
        with self._store.lock:
            address = block_address(self._memory.index, node, path.root_key)
        began, is_filled, n_bytes = time.perf_counter(), False, 0
        with below.counting_failures():
            stored = next(below.tier.find_each([(address, node.tokens)]), None)
            if stored is None or path.work.is_void:
                return False
            with stored:
                if stored.record.tokens != node.tokens:
                    return False
                n_bytes = stored.n_bytes
                with self._store.lock:
                    buffer = self._memory.take(n_bytes, 0)
                if buffer is None:  # it serves this look-up only
                    path.unread_state = stored.view()
                    is_filled = True
                else:
                    is_filled = self._read_into(node, stored, buffer)
        if is_filled:
            seconds = time.perf_counter() - began
            self._store.note_read(below, path.root_key, path.n_tokens, seconds, n_bytes)
        return is_filled

    def _read_into(self, node: Node, stored: Stored, buffer: memoryview) -> bool:
        is_read = False
        try:
            stored.read_into(buffer)
            is_read = True
        finally:
            with self._store.lock:
                if is_read and node.is_unread and not node.is_dead:
                    self._memory.fill(node, buffer)
                else:  # another thread may have been faster
                    self._memory.drop(buffer, 0)
        return not (node.is_unread or node.is_dead)

    def _extend_from(
        self, below: Below, path: Path, wanted: bytes, ended: dict[Below, int], last_only: bool
    ) -> bool:
        """Add the blocks of one tier, up to the first partial one; False if it had none.

        `ended`: the position from which each tier is known to have no blocks.
        """
        before = path.n_tokens
        if before * TOKEN_BYTES >= len(wanted) or ended.get(below, -1) >= before:
            return False
        take_refusal()  # of an earlier look-up
        found = below.tier.find_each(self._ahead(path, wanted))
        foreseen = before
        while path.n_tokens == foreseen:
            foreseen += self._store.block_tokens
            began, start, is_more = time.perf_counter(), path.n_tokens, False
            n_bytes = 0
            with below.counting_failures():
                stored = next(found, None)
                if stored is not None:
                    with stored:
                        n_bytes = stored.n_bytes
                        rest = wanted[path.n_tokens * TOKEN_BYTES :]
                        is_more = self._promote(path, below, stored, rest, last_only)
            seconds = time.perf_counter() - began
            n_new, goes_on = path.n_tokens - start, True
            if not last_only:
                goes_on = self._store.note_read(below, path.root_key, n_new, seconds, n_bytes)
            if not (is_more and goes_on):
                # It has no more blocks, or it rests from now on whatever other tiers add.
                ended[below] = path.n_tokens if goes_on else len(wanted)
                break
        refusal = take_refusal()
        if refusal or path.n_tokens > before:
            path.refusal = f"{below.tier.label}: {refusal}" if refusal else ""
        return path.n_tokens > before

    def _ahead(self, path: Path, wanted: bytes) -> Iterator[tuple[Address, bytes]]:
        """Yield where the next blocks are if each is whole, and the tokens from there on."""
        at, point = path.n_tokens, path.point()
        grain, block = (
            self._memory.index.grain(path.root_key),
            self._store.block_tokens * TOKEN_BYTES,
        )
        while rest := wanted[at * TOKEN_BYTES :]:
            yield Address(path.root_key, at, point, child_name(point, rest[:grain])), rest
            at, point = at + self._store.block_tokens, child_name(point, rest[:block])

    def _promote(
        self, path: Path, below: Below, stored: Stored, rest: bytes, last_only: bool
    ) -> bool:
        """Add a block that was found below; False if it shares no tokens with the prompt."""
        tokens = stored.record.tokens
        n_shared = common_tokens(tokens, rest)
        if not n_shared or (
            path.root_key.kind == "aligned" and n_shared != self._store.block_tokens
        ):
            return False
        start, stop = path.n_tokens, path.n_tokens + len(tokens) // TOKEN_BYTES
        buffer = None
        with self._store.lock:
            if path.work.is_void:
                return False
            overhead = NODE_BYTES + len(tokens)
            size = 0 if last_only else stored.n_bytes
            n_bytes = path.held_bytes + overhead + size
            has_room = not path.loose and n_bytes <= self._store.ram_bytes and not path.is_void
            if has_room and path.has_entry_room():
                buffer = self._memory.take(size, overhead)
        if buffer is not None:
            block = NewBlock(tokens, start, stop, buffer, is_unread=last_only)
            return self._fill(path, below, block, stored, n_shared)
        if last_only:
            below.tier.refuse("no_room")
            return False
        n_loose = sum(payload.nbytes for _, _, payload in path.loose)
        if not below.tier.is_mapped and n_loose + stored.n_bytes > self._store.ram_bytes:
            below.tier.refuse("no_room")
            return False
        point = path.point()
        path.loose = [*path.loose, (start, stop, stored.view())]
        path.loose_point = child_name(point, tokens[: n_shared * TOKEN_BYTES])
        path.n_tokens += n_shared
        return True

    def _fill(
        self, path: Path, below: Below, block: NewBlock, stored: Stored, n_shared: int
    ) -> bool:
        """Read a block from below and file it; False if it could not be read or filed."""
        is_read = False
        node = None
        try:
            if not block.is_unread:
                stored.read_into(block.buffer)
            is_read = True
        finally:
            with self._store.lock:
                node = path.file(block) if is_read else None
                if node is None:
                    self._memory.drop(block.buffer, block.overhead)
                    # Another thread may have been faster to file the same block.
                    other = path.in_the_way(block) if is_read else None
                    node = other if other is not None and other.tokens == block.tokens else None
                if node is not None:
                    node.written |= below.bit
                    node.priority = max(node.priority, stored.record.priority)
                    path.append(node, path.n_tokens + n_shared)
        return node is not None
