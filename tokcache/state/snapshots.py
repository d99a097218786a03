"""SnapshotStore: one opaque state for a whole prefix, found again by the tokens that made it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from tokcache._validate import MAX_INT, require_int
from tokcache.errors import InvalidConfig, InvalidTokens
from tokcache.state.handles import StateHandle, Work
from tokcache.state.memory import snapshot_overhead
from tokcache.state.misses import reason_of_removal
from tokcache.state.names import TOKEN_BYTES, RootKey, root_name
from tokcache.state.reasons import Miss, MissReason, reason_of_tier
from tokcache.state.snapshot_index import Snapshot, prefix_names
from tokcache.state.tiers import Address, Stored
from tokcache.state.tiers.counters import take_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokcache.state.index import Node
    from tokcache.state.store import Store
    from tokcache.state.tiers.opening import Below


_log = logging.getLogger("tokcache")


class SnapshotStore:
    """Snapshots: states known by their tokens, never by their bytes.

    Threads: safe; the store's lock is never held while a state is copied or a tier is asked.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._memory = store, store.memory

    # Storing

    def store(
        self,
        root_key: RootKey,
        tokens: bytes,
        state: object,
        *,
        n_past: int | None,
        priority: int,
        pin: bool,
    ) -> bool:
        """Store a copy of the bytes of the state after all of `tokens`; False without room."""
        snapshot = _new_snapshot(root_key, tokens, n_past, priority)
        try:
            view = memoryview(state)  # type: ignore[arg-type]
            view = view.cast("B") if view.nbytes else memoryview(b"")
        except TypeError as error:
            raise InvalidConfig(
                "a state must be bytes, or a contiguous buffer of them, not "
                f"{type(state).__name__} ({error})"
            ) from None

        def copy(buffer: memoryview) -> None:
            buffer[:] = view

        return self._keep(snapshot, view.nbytes, copy, pin=pin)

    def fill(
        self,
        root_key: RootKey,
        tokens: bytes,
        n_bytes: int,
        read: Callable[[memoryview], object],
        *,
        n_opening: int,
    ) -> bool:
        """Store the state that `read` copies into a buffer; False, and counted, if it raises."""
        snapshot = _new_snapshot(root_key, tokens, None, 0)
        if n_opening:
            ((_, snapshot.conversation),) = prefix_names(root_key, tokens, [n_opening])
        try:
            return self._keep(snapshot, require_int("n_bytes", n_bytes, 0), read, pin=False)
        except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
            _log.debug("a state could not be read", exc_info=True)
            self._store.refuse("save_failed")
            with self._store.lock:
                self._memory.note_snapshot(snapshot, "save_failed")
            return False

    def _keep(
        self, snapshot: Snapshot, n_bytes: int, read: Callable[[memoryview], object], *, pin: bool
    ) -> bool:
        """Store the state that `read` copies into a buffer; False if there is no room for it."""
        if not self._store.enabled:
            return False
        with self._store.lock:
            self._store.settle()
            work = Work(self._store.clears, snapshot.root_key.scope)
            buffer = self._buffer_for(snapshot, n_bytes)
        if buffer is None:
            self._store.notices.log()
            return False
        memory, is_filed = self._memory, False
        try:
            read(buffer)
            is_filed = True
        finally:
            with self._store.lock:
                # Cleared while the bytes were copied: then this comes too late.
                is_filed = is_filed and not (work.is_void or self._store.is_closed)
                is_filed = is_filed and memory.has_snapshot_room(self._n_replaced(snapshot))
                if is_filed:
                    replaced = memory.snapshots.same(snapshot)
                    is_kept = pin or (replaced is not None and replaced.is_kept)
                    if replaced is not None and replaced.is_kept:
                        self._set_kept(replaced, is_kept=False)
                    snapshot.used_at = time.time()
                    snapshot.is_pinned = replaced is not None and replaced.is_pinned
                    memory.file_snapshot(snapshot, buffer)
                    self._set_kept(snapshot, is_kept=is_kept)
                    memory.counts["saved_blocks"] += 1
                    memory.counts["saved_tokens"] += snapshot.n_tokens
                    memory.counts["saved_bytes"] += n_bytes
                    self._store.queue_snapshot(snapshot, _address_of(snapshot))
                    self._bound_conversation(snapshot)
                else:
                    memory.drop(buffer, snapshot_overhead(snapshot))
        return is_filed

    def _bound_conversation(self, newest: Snapshot) -> None:
        """Remove the least recently used states of a conversation that has too many.

        The store's lock is held. States that are pinned, in use, or waiting to be written, stay
        until the next save. The files of a removed one go in the background.
        """
        held = self._memory.snapshots.of_conversation(newest)
        n_over = len(held) - self._store.conversation_snapshots
        if n_over <= 0:
            return
        free = [each for each in held if each is not newest and not (each.pins or each.is_pinned)]
        free.sort(key=lambda each: (each.priority, each.tick))
        for each in free[:n_over]:
            self._store.remove_later(each, _address_of(each))
            self._memory.evict(each, "conversation_snapshots")

    def _n_replaced(self, snapshot: Snapshot) -> int:
        return self._memory.snapshots.same(snapshot) is not None

    def _buffer_for(self, snapshot: Snapshot, n_bytes: int) -> memoryview | None:
        memory, overhead = self._memory, snapshot_overhead(snapshot)
        if self._store.is_closed:
            return None
        if n_bytes + overhead > self._store.ram_bytes:
            n_total = n_bytes + overhead
            memory.refusals["over_budget"] += 1
            memory.note_snapshot(snapshot, "over_budget")
            self._store.notices.oversize(snapshot.root_key.fingerprint, snapshot.n_tokens, n_total)
            return None
        if not memory.has_snapshot_room(self._n_replaced(snapshot)):
            memory.refusals["entries_in_use"] += 1
            memory.note_snapshot(snapshot, "entries_in_use")
            return None
        buffer = memory.take(n_bytes, overhead)
        if buffer is None:
            memory.note_snapshot(snapshot, "blocks_in_use")
        return buffer

    # Finding

    def find(
        self, root_key: RootKey, wanted: bytes, n_public: int, *, is_counted: bool
    ) -> StateHandle | None:
        """Return the state of the longest stored prefix of `wanted`, None if there is none."""
        if is_counted:
            if self._store.below:
                take_refusal()  # of an earlier look-up
            with self._store.lock:
                self._memory.counts["lookups"] += 1
                self._memory.counts["prompt_tokens"] += len(wanted) // TOKEN_BYTES
        found = self._find(root_key, wanted)
        n_found = 0 if found is None else found.n_tokens
        if n_found < n_public and root_key.scope is not None:
            # States of public tokens alone are in the shared scope.
            shared = self._find(root_key._replace(scope=None), wanted[: n_public * TOKEN_BYTES])
            if shared is not None and shared.n_tokens > n_found:
                found = shared
        if is_counted:
            with self._store.lock:
                self._memory.counts["hits"] += found is not None
            n_found = 0 if found is None else found.n_tokens
            if n_found * TOKEN_BYTES < len(wanted):
                refusal = take_refusal() if self._store.below else ""
                miss = self.miss(root_key, wanted, n_found=n_found, refusal=refusal)
                with self._store.lock:
                    self._store.count_miss(miss)
        return found

    def miss(self, root_key: RootKey, wanted: bytes, *, n_found: int, refusal: str = "") -> Miss:
        """Return why no snapshot of more than `n_found` tokens of `wanted` is held.

        `refusal` is that of a tier that was asked for one.

        Cost: at most 128 digests on the way through the tokens, and 16 comparisons.
        """
        n_wanted, store, memory = len(wanted) // TOKEN_BYTES, self._store, self._memory
        at, detail, found = n_found, "", None
        with store.lock:
            if not store.enabled or store.is_closed or n_wanted < store.min_tokens:
                refusals = {"disabled": not store.enabled, "closed": store.is_closed}
                detail = next((name for name, holds in refusals.items() if holds), "below_minimum")
                reason = MissReason.REFUSED
            elif refusal:
                reason, detail = reason_of_tier(refusal.rpartition(": ")[2]), refusal
            elif found := memory.removals.find_snapshot(root_key, wanted, n_found):
                reason, detail = reason_of_removal(store, root_key, found)
            else:
                nearest = memory.snapshots.nearest(root_key, wanted)
                at = max([n_found, *(n_same for n_same, _ in nearest)])
                resting = [each for each in store.below if each.worth.rests(root_key.fingerprint)]
                if any(n_same == at > 0 and goes_on for n_same, goes_on in nearest):
                    reason = MissReason.DIFFERENT_TEXT
                elif resting:
                    reason, detail = MissReason.SLOWER_THAN_PREFILL, resting[0].tier.label
                elif memory.removals.has_forgotten(root_key):
                    reason = MissReason.NOT_KNOWN
                else:
                    reason = MissReason.NEVER_STORED
            n_missed = n_wanted - n_found
            seconds = store.own_seconds(n_missed, root_key.fingerprint, root_key.scope)
            numbers = (found.n_tokens, found.removed_at) if found is not None else ()
            return Miss(reason, at, n_missed, seconds, detail, *numbers)

    def handle(self, root_key: RootKey, wanted: bytes) -> StateHandle | None:
        """Return the state in memory of exactly these tokens; counts as no look-up and no use."""
        with self._store.lock:
            self._store.settle()
            for _, name in prefix_names(root_key, wanted, [len(wanted) // TOKEN_BYTES]):
                snapshot = self._live(root_key, name, wanted)
                if snapshot is not None:
                    return self._handle(snapshot)
        return None

    def _find(self, root_key: RootKey, wanted: bytes) -> StateHandle | None:
        """Return the state of the longest stored prefix in the scope of `root_key`."""
        n_wanted = len(wanted) // TOKEN_BYTES
        if self._store.below and n_wanted >= self._store.min_tokens:
            # A state in memory of all tokens is as long as any that a tier has.
            with self._store.lock:
                self._store.settle()
                is_held = n_wanted in self._memory.snapshots.lengths(root_key)
            if is_held and not self._store.is_closed:
                ((_, name),) = prefix_names(root_key, wanted, [n_wanted])
                with self._store.lock:
                    snapshot = self._live(root_key, name, wanted)
                    longest = None if snapshot is None else self._used(snapshot)
                if longest is not None:
                    return longest
        work = Work(self._store.clears, root_key.scope)  # before a tier is asked
        worth = self._store.worth_asking(root_key)
        lengths = [below.tier.lengths(root_key) for below in worth]
        with self._store.lock:
            self._store.settle()
            if self._store.is_closed:
                return None
            everywhere = self._memory.snapshots.lengths(root_key).union(*lengths)
        usable = sorted(n for n in everywhere if self._store.min_tokens <= n <= n_wanted)
        names = dict(prefix_names(root_key, wanted, usable))
        usable.reverse()
        asked = [
            (below, held, _ask(below, root_key, wanted, {n: names[n] for n in usable if n in held}))
            for below, held in zip(worth, lengths, strict=True)
        ]
        for n_tokens in usable:
            tokens = wanted[: n_tokens * TOKEN_BYTES]
            with self._store.lock:
                snapshot = self._live(root_key, names[n_tokens], tokens)
                if snapshot is not None:
                    return self._used(snapshot)
            for below, held, found in asked:
                if n_tokens not in held:
                    continue
                handle = self._from_below(below, found, root_key, tokens, work)
                if handle is not None:
                    return handle
        return None

    def _live(self, root_key: RootKey, name: bytes, tokens: bytes) -> Snapshot | None:
        snapshot = self._memory.snapshots.get(root_key, name, tokens)
        while snapshot is not None and not snapshot.is_kept:
            if not self._memory.retention.is_expired(snapshot, time.monotonic()):
                return snapshot
            self._memory.expire_snapshot(snapshot)
            snapshot = self._memory.snapshots.get(root_key, name, tokens)
        return snapshot

    def _used(self, snapshot: Snapshot) -> StateHandle | None:
        snapshot.hits += 1
        snapshot.used_at = time.time()
        self._memory.retention.use([snapshot], time.monotonic())
        if snapshot.written and time.monotonic() - snapshot.touched_s > self._store.touch_s:
            self._store.touch_later([snapshot], [_address_of(snapshot)])
        return self._handle(snapshot)

    def _handle(self, snapshot: Snapshot) -> StateHandle | None:
        payload = self._memory.tier.view(snapshot)
        if payload is None:
            self._memory.refusals["payload_lost"] += 1
            return None
        snapshot.pins += 1
        return StateHandle(self, snapshot, payload)

    # Pinning

    def pin_exact(self, root_key: RootKey, wanted: bytes, *, is_pinned: bool) -> tuple[int, int]:
        """Evict the state of exactly these tokens after all others, or as others again.

        Return how many tokens memory holds, and how many the tiers: all or none.
        """
        n_tokens = len(wanted) // TOKEN_BYTES
        ((_, name),) = prefix_names(root_key, wanted, [n_tokens])
        with self._store.lock:
            self._store.settle()
            snapshot = self._live(root_key, name, wanted)
            tiers = self._store.below
            is_below = snapshot is not None and all(snapshot.written & each.bit for each in tiers)
            address = _address(root_key, name, n_tokens)
            if snapshot is not None:
                snapshot.is_pinned = is_pinned
                if is_pinned:  # a tier that could not take it may have room now
                    self._store.queue_snapshot(snapshot, address)
                else:
                    self._memory.retention.unpinned()
            for each in tiers:
                each.pin_later([address], is_pinned=is_pinned)
        return (n_tokens if snapshot is not None else 0), n_tokens * is_below

    # Finding below

    def _from_below(
        self,
        below: Below,
        found: Iterator[Stored | None],
        root_key: RootKey,
        tokens: bytes,
        work: Work,
    ) -> StateHandle | None:
        """Return the next state that a tier found, if it is of `tokens`."""
        began, handle = time.perf_counter(), None
        with below.counting_failures():
            stored = next(found, None)
            if stored is None:
                return None
            with stored:
                if stored.record.tokens == tokens:
                    handle = self._promoted(below, root_key, stored, work)
        if handle is not None:
            seconds = time.perf_counter() - began
            self._store.note_read(below, root_key, handle.n_tokens, seconds, handle.n_bytes)
        return handle

    def _promoted(
        self, below: Below, root_key: RootKey, stored: Stored, work: Work
    ) -> StateHandle | None:
        """Return a state from below, copied into memory if that has room; None if cleared."""
        record = stored.record
        snapshot = Snapshot(root_key, record.name, record.tokens, record.n_past, record.priority)
        with self._store.lock:
            if work.is_void:
                return None
            has_room = stored.n_bytes + snapshot_overhead(snapshot) <= self._store.ram_bytes
            buffer = self._buffer_for(snapshot, stored.n_bytes) if has_room else None
        if buffer is None:
            payload = stored.view()
            snapshot.pins, snapshot.used_at, snapshot.hits = 1, time.time(), 1
            with self._store.lock:
                if work.is_void:
                    return None
                self._store.loose.add(snapshot)
            return StateHandle(self, snapshot, payload)
        is_read = False
        handle: StateHandle | None = None
        try:
            stored.read_into(buffer)
            is_read = True
        finally:
            with self._store.lock:
                is_filed = is_read and not (work.is_void or self._store.is_closed)
                is_filed = is_filed and self._memory.has_snapshot_room(self._n_replaced(snapshot))
                if is_filed:
                    self._memory.file_snapshot(snapshot, buffer)
                    snapshot.written |= below.bit
                    self._memory.counts["promoted_tokens"] += snapshot.n_tokens
                    handle = self._used(snapshot)
                    self._store.queue_snapshot(snapshot, _address_of(snapshot))
                else:
                    self._memory.drop(buffer, snapshot_overhead(snapshot))
        return handle

    # For handles

    def refuse(self, reason: str) -> None:
        """Count a state that was not used."""
        self._store.refuse(reason)

    def count_restored(
        self, n_tokens: int, seconds: float, *, n_in_context: int = 0, is_hit: bool = False
    ) -> None:
        """Count restored positions."""
        self._store.count_restored(n_tokens, seconds, n_in_context=n_in_context, is_hit=is_hit)

    def release_later(self, held: list[Node] | list[Snapshot]) -> None:
        """Unpin `held` at the next operation; takes no lock."""
        self._store.release_later(held)

    def touch(self, snapshot: Snapshot) -> bool:
        """Note that a state is in use now; False if it is gone."""
        with self._store.lock:
            if snapshot.is_dead:
                return False
            snapshot.used_at = time.time()
            self._memory.retention.use([snapshot], time.monotonic())
            self._store.touch_later([snapshot], [_address_of(snapshot)])
            return True

    def pin(self, snapshot: Snapshot, *, is_pinned: bool) -> bool:
        """Keep a state from being evicted or expiring, or unpin it; False if it is gone."""
        with self._store.lock:
            if snapshot.is_dead:
                return False
            self._set_kept(snapshot, is_kept=is_pinned)
            return True

    def _set_kept(self, snapshot: Snapshot, *, is_kept: bool) -> None:
        snapshot.pins += is_kept - snapshot.is_kept
        snapshot.is_kept = is_kept

    def remove(self, snapshot: Snapshot) -> int:
        """Remove a state from every tier; return how many went."""
        self._store.flush()  # a waiting write would bring it back after its removal
        with self._store.lock:
            self._store.settle()
            is_there = not snapshot.is_dead
            if is_there and snapshot not in self._store.loose:
                self._set_kept(snapshot, is_kept=False)
                self._memory.remove_snapshot(snapshot)
            snapshot.is_dead = True
        for below in self._store.below:
            if is_there:
                below.tier.remove(_address_of(snapshot))
        return int(is_there)


def _ask(
    below: Below, root_key: RootKey, wanted: bytes, names: dict[int, bytes]
) -> Iterator[Stored | None]:
    """Ask a tier for the states of these lengths, in this order, when it is their turn."""
    return below.tier.find_each(
        (_address(root_key, name, n_tokens), wanted[: n_tokens * TOKEN_BYTES])
        for n_tokens, name in names.items()
    )


def _address_of(snapshot: Snapshot) -> Address:
    return _address(snapshot.root_key, snapshot.name, snapshot.n_tokens)


def _address(root_key: RootKey, name: bytes, n_tokens: int) -> Address:
    return Address(root_key, n_tokens, root_name(root_key), name)


def _new_snapshot(root_key: RootKey, tokens: bytes, n_past: int | None, priority: int) -> Snapshot:
    n_tokens = len(tokens) // TOKEN_BYTES
    if not n_tokens:
        raise InvalidTokens("a state is of at least one token; these are none")
    n_past = require_int("n_past", n_tokens if n_past is None else n_past, 0)
    priority = require_int("priority", priority, -MAX_INT)
    ((_, name),) = prefix_names(root_key, tokens, [n_tokens])
    return Snapshot(root_key, name, tokens, n_past, priority)
