"""Store: the lock, memory, tiers below and counters that blocks and snapshots share."""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

from cachetools import LRUCache

from tokcache._validate import (
    require_bool,
    require_int,
    require_scope,
    require_seconds,
    require_size,
)
from tokcache.errors import InvalidConfig
from tokcache.state.handles import Clears, Work
from tokcache.state.locked import Locked
from tokcache.state.memory import StateMemory
from tokcache.state.memory_notices import MemoryNotices
from tokcache.state.names import RootKey, child_name
from tokcache.state.tiers import Address, Record
from tokcache.state.tiers.backoff import Speed
from tokcache.state.tiers.opening import Below, open_tiers
from tokcache.state.write_behind import Job
from tokcache.stats import StateStats, TierStats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokcache.state.index import BlockIndex, Node
    from tokcache.state.reasons import Miss
    from tokcache.state.snapshot_index import Snapshot
    from tokcache.state.tiers.disk import DiskTier
    from tokcache.state.tiers.redis import RedisTier

_log = logging.getLogger("tokcache")

_MIN_QUEUE = 1 << 20
_MAX_SPEEDS, _MAX_PARTS = 1024, 64
_COUNTED = (
    "lookups",
    "hits",
    "prompt_tokens",
    "context_tokens",
    "restored_tokens",
    "saved_tokens",
    "saved_blocks",
    "saved_bytes",
    "evictions",
    "promoted_tokens",
    "expirations",
)


class FingerprintParts:
    """The parts that fingerprints were made of, to say later in which two differ.

    The store holds its lock.
    """

    def __init__(self) -> None:
        self._parts: LRUCache[bytes, dict[str, str]] = LRUCache(_MAX_PARTS)

    def note(self, fingerprint: bytes, parts: Mapping[str, object]) -> None:
        """Note the parts of a fingerprint."""
        self._parts[fingerprint] = {name: repr(part) for name, part in parts.items()}

    def differing(self, left: bytes, right: bytes) -> str:
        """Return the names of the parts in which two fingerprints differ, "" if not known."""
        known = self._parts.get(left), self._parts.get(right)
        if known[0] is None or known[1] is None:
            return ""
        names = {**known[0], **known[1]}
        return ", ".join(name for name in names if known[0].get(name) != known[1].get(name))


class Store(Locked):
    """The lock, memory, the tiers below, nearest first, their queues, and the counters.

    Units:   `touch_s` seconds by which the time of last use in the tiers below may lag.
    Threads: safe; after a fork the child keeps stored states, except those in use at the fork.
    """

    touch_s = 30.0

    def __init__(
        self,
        *,
        ram_bytes: int | str,
        max_entries: int,
        block_tokens: int,
        conversation_snapshots: int,
        min_tokens: int,
        ttl_s: float | None,
        disk: str | os.PathLike[str] | DiskTier | None,
        disk_bytes: int | str | None,
        redis: str | RedisTier | None,
        queue_bytes: int | str | None,
        enabled: bool,
    ) -> None:
        self.ram_bytes = require_size("ram_bytes", ram_bytes)
        self.max_entries = require_int("max_entries", max_entries, minimum=1)
        self.block_tokens = require_int("block_tokens", block_tokens, minimum=1)
        # One conversation must leave room for another.
        most = require_int("conversation_snapshots", conversation_snapshots, minimum=1)
        self.conversation_snapshots = min(most, max(self.max_entries // 2, 1))
        self.min_tokens = require_int("min_tokens", min_tokens, minimum=1)
        self.enabled = require_bool("enabled", enabled)
        # States that wait to be written can't be evicted; they must leave room for the next saves.
        queue = max(self.ram_bytes // 4, _MIN_QUEUE)
        if queue_bytes is not None:
            queue = require_size("queue_bytes", queue_bytes)
        self.memory = StateMemory(
            self.ram_bytes,
            self.max_entries,
            self.block_tokens,
            None if ttl_s is None else require_seconds("ttl_s", ttl_s),
        )
        self._released: deque[list[Node] | list[Snapshot]] = deque()
        self._unwritten: deque[tuple[Node | Snapshot, int]] = deque()
        self.is_closed = False
        self.notices = MemoryNotices(self.ram_bytes)
        self.clears = Clears()
        self.seconds = {"restore": 0.0, "save": 0.0}
        self._prefill: dict[bytes, Speed] = {}
        # What a miss costs is measured in each scope alone: it must not show that others decode.
        self._own_prefill: LRUCache[tuple[bytes, str | None], Speed] = LRUCache(_MAX_SPEEDS)
        self.parts = FingerprintParts()
        self.loose: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self.below: tuple[Below, ...] = ()
        if enabled:
            self.below = open_tiers(disk, disk_bytes, redis, queue)
        for below in self.below:
            # It must not wait: the garbage collector may run this while any lock is held.
            weakref.finalize(self, below.writer.end).atexit = False
        super().__init__()

    # Lower tiers

    def note_prefill(
        self, n_tokens: int, seconds: float, fingerprint: bytes, scope: str | None
    ) -> None:
        """Note how long the engine took to prefill `n_tokens` of a model, for a scope.

        Errors: InvalidConfig.
        """
        n_tokens = require_int("n_tokens", n_tokens, minimum=1)
        if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise InvalidConfig(f"seconds must be a number from 0 on, not {seconds!r}")
        with self.lock:
            self._prefill.setdefault(fingerprint, Speed()).note(n_tokens, seconds)
            self._own_prefill.setdefault((fingerprint, scope), Speed()).note(n_tokens, seconds)

    def own_seconds(self, n_tokens: int, fingerprint: bytes, scope: str | None) -> float | None:
        """Return how long prefilling takes as measured in one scope, or None; the lock is held."""
        speed = self._own_prefill.get((fingerprint, scope)) if self._prefill else None
        return None if speed is None else speed.seconds(n_tokens)

    def worth_asking(self, root_key: RootKey) -> list[Below]:
        """Return the tiers that may be faster than prefilling; count the others."""
        with self.lock:
            resting = [each for each in self.below if each.worth.rests(root_key.fingerprint)]
        for below in resting:
            below.tier.refuse("slower_than_prefill")
        return [each for each in self.below if each not in resting]

    def note_read(
        self, below: Below, root_key: RootKey, n_tokens: int, seconds: float, n_bytes: int
    ) -> bool:
        """Note how long a tier took for a state; return whether to go on asking it.

        Units: `n_bytes` of the state, of which `n_tokens` were useful.
        """
        with self.lock:
            speed = self._prefill.get(root_key.fingerprint)
            if speed is not None and n_tokens:
                below.worth.note(root_key.fingerprint, seconds, speed.seconds(n_tokens), n_bytes)
            return not below.worth.rests(root_key.fingerprint)

    def _pays(
        self, below: Below, root_key: RootKey, held: Sequence[Node | Snapshot], n_tokens: int
    ) -> bool:
        """Return whether a tier gives states back faster than `n_tokens` are prefilled.

        The lock is held. If not, they are not written there, which is counted.
        """
        speed = self._prefill.get(root_key.fingerprint)
        if speed is None or not held:
            return True
        payloads = [self.memory.tier.get(each) for each in held]
        n_bytes = sum(payload.nbytes for payload in payloads if payload is not None)
        if below.worth.pays(root_key.fingerprint, speed.seconds(n_tokens), n_bytes):
            return True
        self.memory.refusals[f"{below.tier.label}: not_worth_writing"] += 1
        return False

    def queue_blocks(
        self, nodes: list[Node], root_key: RootKey, *, last_only: bool = False
    ) -> None:
        """Queue the blocks that each tier lacks, parents first; the lock is held.

        With `last_only` the state of the last one stands for all positions before it.
        """
        for below in self.below:
            is_full = False
            # Blocks that follow one whose state another tier has can't be found in this one.
            read = takewhile(lambda node: node.written & below.bit or not node.is_unread, nodes)  # noqa: B023
            lacking = [node for node in read if not (node.written & below.bit or node.is_dead)]
            useful = lacking[-1:] if last_only else lacking
            n_tokens = sum(node.stop - (0 if last_only else node.start) for node in useful)
            if not self._pays(below, root_key, useful, n_tokens):
                continue
            for node in lacking:
                if is_full:  # without the one before it, it would not be found
                    self.memory.note_unwritten(node, root_key)
                    continue
                record = Record(node.name, node.tokens, priority=node.priority)
                address = block_address(self.memory.index, node, root_key)
                is_full = not self._queue(below, node, address, record)
                if is_full:
                    self.memory.note_unwritten(node, root_key)

    def queue_snapshot(self, snapshot: Snapshot, address: Address) -> None:
        """Queue a snapshot for each tier that does not have it yet; the lock is held."""
        record = Record(snapshot.name, snapshot.tokens, snapshot.n_past, snapshot.priority)
        for below in self.below:
            if snapshot.written & below.bit:
                continue
            if not self._pays(below, snapshot.root_key, [snapshot], snapshot.n_tokens):
                continue
            if self._queue(below, snapshot, address, record):
                continue
            self.memory.note_snapshot(snapshot, "queue_full")

    def remove_later(self, snapshot: Snapshot, address: Address) -> None:
        """Remove a snapshot from the tiers that have it, in the background; the lock is held."""
        for below in self.below:
            if snapshot.written & below.bit:
                remove = partial(below.tier.remove, address)
                below.writer.put(Job(address.root_key.scope, 0, remove))

    def _queue(self, below: Below, held: Node | Snapshot, address: Address, record: Record) -> bool:
        tier, bit, payload = below.tier, below.bit, self.memory.tier.get(held)
        if payload is None:
            return True
        released, unwritten = self._released, self._unwritten

        def run() -> None:
            is_there = False
            try:
                is_there = tier.write(address, record, payload)
            finally:
                if not is_there:  # the next save of these tokens tries again
                    unwritten.append((held, bit))

        done = lambda: released.append([held])  # type: ignore[arg-type]  # noqa: E731
        if below.write(held, Job(address.root_key.scope, payload.nbytes, run, done)):
            return True
        self.memory.refusals[f"{tier.label}: queue_full"] += 1
        return False

    def touch_later(self, held: Sequence[Node | Snapshot], addresses: list[Address]) -> None:
        """Report to the tiers, off the request path, that these are in use; the lock is held."""
        if not self.below or not addresses:
            return
        now = time.monotonic()
        for each in held:
            each.touched_s = now
        for below in self.below:
            touch = partial(_touch, below, addresses, held, self._unwritten)
            below.writer.put(Job(addresses[0].root_key.scope, 0, touch))

    def untouched(self, nodes: list[Node]) -> list[Node]:
        """Return the blocks whose last use was not reported to the tiers for `touch_s`."""
        if not self.below:
            return []
        old = time.monotonic() - self.touch_s
        return [node for node in nodes if node.touched_s < old and node.written]

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was saved is in the lower tiers; False if that took too long.

        Writes that a tier refused are counted, not waited for.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        return all(each.writer.flush(_left(until)) for each in self.below)

    # Counting

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""
        with self.lock:
            self.memory.refusals[reason] += 1

    def count_miss(self, miss: Miss) -> None:
        """Count a prompt that was reused no further; the lock is held."""
        self.memory.misses[miss.reason] += 1
        self.memory.missed_tokens[miss.reason] += miss.n_missed

    def count_prompt(
        self, n_tokens: int, *, context_tokens: int, restored_tokens: int, miss: Miss | None
    ) -> None:
        """Count a prompt, and its tokens that were in the engine's context or were restored.

        Errors: InvalidConfig.
        """
        n_tokens = require_int("n_tokens", n_tokens, minimum=0)
        context_tokens = require_int("context_tokens", context_tokens, minimum=0)
        restored_tokens = require_int("restored_tokens", restored_tokens, minimum=0)
        with self.lock:
            counts = self.memory.counts
            counts["prompt_tokens"] += n_tokens
            counts["context_tokens"] += context_tokens
            counts["restored_tokens"] += restored_tokens
            if miss is not None:
                self.count_miss(miss)

    def count_restored(
        self, n_tokens: int, seconds: float, *, n_in_context: int = 0, is_hit: bool = False
    ) -> None:
        """Count positions restored after `n_in_context` that were there, and an uncounted hit."""
        with self.lock:
            self.memory.counts["restored_tokens"] += n_tokens
            self.memory.counts["context_tokens"] += n_in_context
            self.memory.counts["hits"] += is_hit
            self.seconds["restore"] += seconds

    def release_later(self, held: list[Node] | list[Snapshot]) -> None:
        """Unpin `held` at the next operation; takes no lock."""
        self._released.append(held)

    def settle(self) -> None:
        """Unpin released states, and note failed writes; the lock is held."""
        while self._unwritten:
            held, bit = self._unwritten.popleft()
            held.written &= ~bit
        while self._released:
            for each in self._released.popleft():
                self.memory.release(each)

    def stats(self) -> StateStats:
        """Return the counters and the states held now."""
        below = {each.tier.label: each.tier.stats() for each in self.below}
        with self.lock:
            self.settle()
            counts, refusals = self.memory.counts, dict(self.memory.refusals)
            for label, tier in below.items():
                refusals |= {f"{label}: {reason}": n for reason, n in tier.refusals.items()}
            return StateStats(
                **{name: counts[name] for name in _COUNTED},
                refusals=refusals,
                misses=_plain(self.memory.misses),
                missed_tokens=_plain(self.memory.missed_tokens),
                restore_seconds=self.seconds["restore"],
                save_seconds=self.seconds["save"],
                n_entries=self.memory.n_entries,
                n_blocks=self.memory.index.n_nodes,
                n_bytes=self.memory.held_bytes(),
                n_states=self.memory.snapshots.n_states,
                disk=below.get("disk", TierStats()),
                redis=below.get("redis", TierStats()),
            )

    def memory_usage(self) -> int:
        """Return the bytes retained: states, tokens, overhead and buffers for their next use."""
        with self.lock:
            self.settle()
            return self.memory.held_bytes()

    # Clearing

    def begin(self, scope: str | None) -> Work:
        """Return an object that becomes void when `scope` is cleared.

        Errors: InvalidScope.
        """
        return Work(self.clears, require_scope(scope))

    def clear(self, *, scope: str | None = None) -> int:
        """Remove a scope's states from every tier, or everything; return the states removed.

        Errors: InvalidScope.
        """
        scope = require_scope(scope)

        def is_doomed(each: str | None) -> bool:
            return scope is None or each == scope

        for below in self.below:
            below.writer.discard(is_doomed)
        with self.lock:
            self.clears.add(scope)
            n_removed = self._clear_memory(is_doomed, is_all=scope is None)
        # A save between the two steps filed its blocks before this thread had the lock.
        for below in self.below:
            below.writer.discard(is_doomed)
        return max([n_removed, *(each.tier.clear(scope=scope) for each in self.below)])

    def _clear_memory(self, is_doomed: Callable[[str | None], bool], *, is_all: bool) -> int:
        """Remove the states in memory of these scopes."""
        self.settle()
        for snapshot in list(self.loose):
            snapshot.is_dead = snapshot.is_dead or is_doomed(snapshot.root_key.scope)
        for key in [key for key in self._own_prefill if is_doomed(key[1])]:
            del self._own_prefill[key]
        n_removed = self.memory.remove_all(is_doomed)
        if is_all:
            self.memory.counts.clear()
            self.memory.refusals.clear()
            self.memory.misses.clear()
            self.memory.missed_tokens.clear()
            self.memory.removals.reset()
            self.notices = MemoryNotices(self.ram_bytes)
            self.seconds = {"restore": 0.0, "save": 0.0}
        return n_removed

    def close(self) -> None:
        """Finish waiting writes, then empty memory; after that nothing is found or stored."""
        with self.lock:
            self.is_closed = True
        for below in self.below:
            below.writer.close()
        with self.lock:
            self.clears.add(None)
            self._clear_memory(lambda _: True, is_all=True)
        for below in self.below:
            if below.is_owned:
                below.tier.close()

    def check(self) -> None:
        """Verify every invariant; for tests."""
        with self.lock:
            self.settle()
            self.memory.check()

    # Forks

    def after_fork_in_child(self) -> None:
        """Drop the states that the parent's threads use: the child has no such threads."""
        super().after_fork_in_child()
        self._released.clear()
        self._unwritten.clear()
        self.memory.drop_users()


def block_address(index: BlockIndex, node: Node, root_key: RootKey) -> Address:
    """Return the address of a block in the tiers."""
    head = node.tokens[: index.grain(root_key)]
    return Address(root_key, node.start, node.base, child_name(node.base, head))


def _touch(
    below: Below,
    addresses: list[Address],
    held: Sequence[Node | Snapshot],
    unwritten: deque[tuple[Node | Snapshot, int]],
) -> None:
    # A state that a tier has lost is written again by the next save of its tokens.
    unwritten.extend((held[n], below.bit) for n in below.tier.touch(addresses))


def _plain(counts: Mapping[str, int]) -> dict[str, int]:
    return {str(reason): n for reason, n in counts.items()}


def _left(until: float | None) -> float | None:
    return None if until is None else max(until - time.monotonic(), 0.0)
