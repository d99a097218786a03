"""StateCore: what blocks and whole states share: the lock, memory, lower tiers, counters."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from tokcache.config import require_int
from tokcache.errors import InvalidConfig, InvalidText
from tokcache.state.behind import Job, WriteBehind
from tokcache.state.blocks import Owner, child_name
from tokcache.state.forks import Forkable, tell_of_forks
from tokcache.state.memory import StateMemory
from tokcache.state.tiers import Address, Record
from tokcache.stats import StateStats, TierStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokcache.state.index import Node
    from tokcache.state.tiers.disk import DiskTier
    from tokcache.state.whole import Whole

DISK_BIT = 1
_MIN_QUEUE = 1 << 20
_COUNTED = (
    "lookups",
    "hits",
    "lookup_tokens",
    "reused_tokens",
    "saved_tokens",
    "saved_blocks",
    "evictions",
    "promoted_tokens",
    "expirations",
)


class StateCore(Forkable):
    """The lock, what is held in memory, the tier below and its queue.

    Units:   `_touch_s` seconds that the time of last use which other processes see may be old.

    Threads: safe; after a fork the child keeps what was stored and nothing that was in use.
    """

    _touch_s = 30.0

    def __init__(
        self,
        *,
        ram_bytes: int,
        max_entries: int,
        block_tokens: int,
        min_tokens: int,
        ttl_s: float | None,
        disk: str | os.PathLike[str] | DiskTier | None,
        queue_bytes: int | None,
        enabled: bool,
    ) -> None:
        self.ram_bytes = require_int("ram_bytes", ram_bytes, minimum=1)
        self.max_entries = require_int("max_entries", max_entries, minimum=1)
        self.block_tokens = require_int("block_tokens", block_tokens, minimum=1)
        self.min_tokens = require_int("min_tokens", min_tokens, minimum=1)
        if not isinstance(enabled, bool):
            raise InvalidConfig(f"enabled must be True or False, not {enabled!r}")
        self.enabled = enabled
        # What waits can't be evicted: it must leave room for what is to be saved meanwhile.
        queue = max(self.ram_bytes // 4, _MIN_QUEUE) if queue_bytes is None else queue_bytes
        require_int("queue_bytes", queue, minimum=1)
        self._memory = StateMemory(
            self.ram_bytes, self.max_entries, self.block_tokens, checked_ttl(ttl_s)
        )
        self._index, self._tier = self._memory.index, self._memory.tier
        self._lock = threading.Lock()
        self._released: deque[list[Node] | list[Whole]] = deque()
        self._is_closed = False
        self._removals = 0
        self._seconds = {"restore": 0.0, "save": 0.0}
        self._loose: weakref.WeakSet[Whole] = weakref.WeakSet()
        self._disk, self._owns_disk = _opened(disk if enabled else None)
        self._writer: WriteBehind | None = None
        if self._disk is not None:
            self._writer = WriteBehind(self._disk.label, queue)
            # Not waited for here: the garbage collector may run this under any lock.
            weakref.finalize(self, self._writer.end).atexit = False
        tell_of_forks(self)

    # Lower tiers

    @property
    def disk(self) -> DiskTier | None:
        """The disk tier, None without one."""
        return self._disk

    def _address(self, node: Node, owner: Owner) -> Address:
        head = node.tokens[: self._index.grain(owner)]
        return Address(owner, node.start, node.base, child_name(node.base, head))

    def _queue_blocks(self, nodes: list[Node], owner: Owner) -> None:
        """Queue what the disk does not have yet, parents first; the lock is held."""
        if self._disk is None:
            return
        for node in nodes:
            if node.written & DISK_BIT or node.is_dead:
                continue
            record = Record(node.name, node.tokens, priority=node.priority)
            if not self._queue(node, self._address(node, owner), record):
                self._memory.refusals["disk: queue_full"] += 1
                return  # without it, what follows would not be found

    def _queue(self, held: Node | Whole, address: Address, record: Record) -> bool:
        disk, writer = self._disk, self._writer
        payload = self._tier.get(held)
        if disk is None or writer is None or payload is None:
            return True
        released = self._released

        def run() -> None:
            # Not there: it is tried again with the next save that passes by.
            if not disk.write(address, record, payload):
                held.written &= ~DISK_BIT

        held.pins += 1
        held.written |= DISK_BIT
        held.touched_s = time.monotonic()
        job = Job(address.owner.scope, payload.nbytes, run, lambda: released.append([held]))  # type: ignore[arg-type]
        if writer.put(job):
            return True
        held.pins -= 1
        held.written &= ~DISK_BIT
        return False

    def _touch_later(self, held: Iterable[Node | Whole], addresses: list[Address]) -> None:
        """Tell the disk, off the request path, that these are in use; the lock is held."""
        if self._disk is None or self._writer is None or not addresses:
            return
        disk, now = self._disk, time.monotonic()
        for each in held:
            each.touched_s = now
        self._writer.put(Job(addresses[0].owner.scope, 0, lambda: disk.touch(addresses)))

    def _untouched(self, nodes: list[Node]) -> list[Node]:
        if self._disk is None:
            return []
        old = time.monotonic() - self._touch_s
        return [node for node in nodes if node.touched_s < old and node.written]

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was saved is in the lower tiers; False if that took too long.

        What a tier refused is counted, not waited for.
        """
        return self._writer is None or self._writer.flush(timeout_s)

    # Counting

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""
        with self._lock:
            self._memory.refusals[reason] += 1

    def count_restored(self, n_tokens: int, seconds: float, *, is_hit: bool = False) -> None:
        """Count positions that were restored instead of decoded, and a hit not counted yet."""
        with self._lock:
            self._memory.counts["reused_tokens"] += n_tokens
            self._memory.counts["hits"] += is_hit
            self._seconds["restore"] += seconds

    def release_later(self, held: list[Node] | list[Whole]) -> None:
        """Unpin `held` at the next operation; takes no lock."""
        self._released.append(held)

    def _settle(self) -> None:
        while self._released:
            for each in self._released.popleft():
                self._memory.release(each)

    def stats(self) -> StateStats:
        """Return the counters and what is held now."""
        disk = self._disk.stats() if self._disk is not None else TierStats()
        with self._lock:
            self._settle()
            counts, refusals = self._memory.counts, dict(self._memory.refusals)
            refusals |= {f"disk: {reason}": n for reason, n in disk.refusals.items()}
            return StateStats(
                **{name: counts[name] for name in _COUNTED},
                refusals=refusals,
                restore_seconds=self._seconds["restore"],
                save_seconds=self._seconds["save"],
                n_entries=self._memory.n_entries,
                n_blocks=self._index.n_nodes,
                n_bytes=self._memory.held_bytes(),
                n_states=self._memory.wholes.n_states,
                disk=disk,
            )

    def memory_usage(self) -> int:
        """Return the bytes retained: states, tokens, overhead and buffers for their next use."""
        with self._lock:
            self._settle()
            return self._memory.held_bytes()

    def __len__(self) -> int:
        """Return the number of entries in memory: stored prefixes that nothing continues."""
        with self._lock:
            return self._memory.n_entries

    @property
    def is_empty(self) -> bool:
        """Whether memory holds nothing."""
        return len(self) == 0

    def __bool__(self) -> bool:
        """Return True: an empty cache is a cache."""
        return True

    # Removing

    def remove_scope(self, scope: str | None) -> int:
        """Remove all that is stored for `scope` in every tier; return the states removed.

        What another process holds in its memory is that process's to remove.
        """
        scope = checked_scope(scope)
        if self._writer is not None:
            self._writer.discard(lambda each: each == scope)
        with self._lock:
            self._settle()
            self._removals += 1
            owners = [owner for owner in self._memory.owners() if owner.scope == scope]
            n_removed = self._memory.remove_all(owners)
            self._forget_loose(lambda whole: whole.owner.scope == scope)
        if self._writer is None or self._disk is None:
            return n_removed
        # What was saved between the two steps was filed before the lock was had.
        self._writer.discard(lambda each: each == scope)
        return max(n_removed, self._disk.remove_scope(scope))

    def _forget_loose(self, is_doomed: Callable[[Whole], bool]) -> None:
        for whole in list(self._loose):
            whole.is_dead = whole.is_dead or is_doomed(whole)

    def clear(self) -> None:
        """Remove everything from every tier, counters too.

        A disk tier's folder is emptied for all processes that share it.
        """
        if self._writer is not None:
            self._writer.discard(lambda _: True)
        with self._lock:
            self._clear()
        if self._writer is not None and self._disk is not None:
            self._writer.discard(lambda _: True)
            self._disk.clear()

    def _clear(self) -> None:
        self._settle()
        self._removals += 1
        self._memory.remove_all()
        self._forget_loose(lambda _: True)
        self._memory.counts.clear()
        self._memory.refusals.clear()
        self._seconds = {"restore": 0.0, "save": 0.0}

    def close(self) -> None:
        """Write what waits, then empty memory; from now on nothing is found and nothing stored.

        What the disk holds stays there; an ephemeral tier's folder goes with its tier.
        """
        with self._lock:
            self._is_closed = True
        if self._writer is not None:
            self._writer.close()
        with self._lock:
            self._clear()
        if self._owns_disk and self._disk is not None:
            self._disk.close()

    def _check(self) -> None:
        """Verify every invariant; for tests."""
        with self._lock:
            self._settle()
            self._memory.check()

    # Forks

    def before_fork(self) -> None:
        """Wait until no operation is half done."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Forget what the parent's threads use; they run on there only."""
        self._lock = threading.Lock()
        self._released.clear()
        self._memory.forget_users()


def _opened(disk: str | os.PathLike[str] | DiskTier | None) -> tuple[DiskTier | None, bool]:
    if disk is None:
        return None, False
    from tokcache.state.tiers.disk import DiskTier  # noqa: PLC0415 (only where it is used)

    if isinstance(disk, DiskTier):
        return disk, False
    if isinstance(disk, str | os.PathLike):
        return DiskTier.open(disk), True
    raise InvalidConfig(f"disk must be a path, a DiskTier or None, not {type(disk).__name__}")


def checked_scope(scope: object) -> str | None:
    """Return `scope` if it can be one.

    Errors: InvalidText.
    """
    if scope is not None and not isinstance(scope, str):
        raise InvalidText(f"scope must be a str or None, not {type(scope).__name__}")
    return scope


def checked_fingerprint(fingerprint: object) -> bytes:
    """Return `fingerprint` if it can be one.

    Errors: InvalidConfig.
    """
    if not isinstance(fingerprint, bytes):
        raise InvalidConfig(f"fingerprint must be bytes, not {type(fingerprint).__name__}")
    return fingerprint


def checked_ttl(ttl_s: object) -> float | None:
    """Return `ttl_s` if it can be one.

    Errors: InvalidConfig.
    """
    if ttl_s is None:
        return None
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not ttl_s > 0:
        raise InvalidConfig(f"ttl_s must be a number of seconds above 0 or None, not {ttl_s!r}")
    return float(ttl_s)
