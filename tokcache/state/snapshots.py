"""SnapshotStore: one opaque state for a whole prefix, found again by the tokens that made it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from tokcache._validate import MAX_INT, require_int
from tokcache.errors import InvalidConfig, InvalidTokens
from tokcache.state.handles import StateHandle, Work
from tokcache.state.memory import whole_overhead
from tokcache.state.names import TOKEN_BYTES, Owner, root_name
from tokcache.state.snapshot_index import Whole, prefix_names
from tokcache.state.tiers import Address, StateRefused, Stored

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
        owner: Owner,
        tokens: bytes,
        state: object,
        *,
        n_past: int | None,
        priority: int,
        pin: bool,
    ) -> bool:
        """Store a copy of the bytes of the state after all of `tokens`; False without room."""
        whole = _whole(owner, tokens, n_past, priority)
        view = _checked_state(state)

        def copy(buffer: memoryview) -> None:
            buffer[:] = view

        return self._keep(whole, view.nbytes, copy, pin=pin)

    def fill(
        self, owner: Owner, tokens: bytes, n_bytes: int, read: Callable[[memoryview], object]
    ) -> bool:
        """Store what `read` copies into a buffer of `n_bytes`; False, and counted, if it raises."""
        whole = _whole(owner, tokens, None, 0)
        try:
            return self._keep(whole, require_int("n_bytes", n_bytes, 0), read, pin=False)
        except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
            _log.debug("a state could not be read", exc_info=True)
            self._store.refuse("save_failed")
            return False

    def _keep(
        self, whole: Whole, n_bytes: int, read: Callable[[memoryview], object], *, pin: bool
    ) -> bool:
        if not self._store.enabled:
            return False
        with self._store.lock:
            self._store.settle()
            work = self._store.begun(whole.owner.scope)
            buffer = self._buffer_for(whole, n_bytes)
        if buffer is None:
            self._store.log_oversize()
            return False
        is_filed = False
        try:
            read(buffer)
            is_filed = True
        finally:
            with self._store.lock:
                # Cleared while the bytes were copied: then this comes too late.
                is_filed = is_filed and not (work.is_void or self._store.is_closed)
                is_filed = is_filed and self._memory.has_whole_room(self._n_replaced(whole))
                if is_filed:
                    self._file_whole(whole, buffer, pin=pin)
                else:
                    self._memory.drop(buffer, whole_overhead(whole))
        return is_filed

    def _n_replaced(self, whole: Whole) -> int:
        return self._memory.wholes.same(whole) is not None

    def _buffer_for(self, whole: Whole, n_bytes: int) -> memoryview | None:
        memory, overhead = self._memory, whole_overhead(whole)
        if self._store.is_closed:
            return None
        if n_bytes + overhead > self._store.ram_bytes:
            n_total = n_bytes + overhead
            self._store.refuse_oversize(whole.owner.fingerprint, whole.n_tokens, n_total)
            return None
        if not memory.has_whole_room(self._n_replaced(whole)):
            memory.refusals["entries_in_use"] += 1
            return None
        return memory.take(n_bytes, overhead)

    def _file_whole(self, whole: Whole, buffer: memoryview, *, pin: bool) -> None:
        replaced = self._memory.wholes.same(whole)
        is_kept = pin or (replaced is not None and replaced.is_kept)
        if replaced is not None and replaced.is_kept:
            self._set_kept(replaced, is_kept=False)
        whole.used_at = time.time()
        self._memory.file_whole(whole, buffer)
        self._set_kept(whole, is_kept=is_kept)
        self._memory.counts["saved_blocks"] += 1
        self._memory.counts["saved_tokens"] += whole.n_tokens
        self._store.queue_snapshot(whole, _address(whole.owner, whole.name, whole.n_tokens))

    # Finding

    def find(
        self, owner: Owner, wanted: bytes, n_public: int, *, is_counted: bool
    ) -> StateHandle | None:
        """Return the state of the longest stored prefix of `wanted`, None if there is none."""
        if not is_counted:
            return self._find_both(owner, wanted, n_public)
        with self._store.lock:
            self._memory.counts["lookups"] += 1
            self._memory.counts["prompt_tokens"] += len(wanted) // TOKEN_BYTES
        found = self._find_both(owner, wanted, n_public)
        with self._store.lock:
            self._memory.counts["hits"] += found is not None
        return found

    def _find_both(self, owner: Owner, wanted: bytes, n_public: int) -> StateHandle | None:
        found = self._find(owner, wanted)
        n_found = 0 if found is None else found.n_tokens
        if n_found >= n_public or owner.scope is None:
            return found
        shared = self._find(owner._replace(scope=None), wanted[: n_public * TOKEN_BYTES])
        return shared if shared is not None and shared.n_tokens > n_found else found

    def handle(self, owner: Owner, wanted: bytes) -> StateHandle | None:
        """Return the state in memory of exactly these tokens; counts as no look-up and no use."""
        with self._store.lock:
            self._store.settle()
            for _, name in prefix_names(owner, wanted, [len(wanted) // TOKEN_BYTES]):
                whole = self._live(owner, name, wanted)
                if whole is not None:
                    return self._handle(whole)
        return None

    def _find(self, owner: Owner, wanted: bytes) -> StateHandle | None:
        whole_of_it = self._all_of_it(owner, wanted) if self._store.below else None
        if whole_of_it is not None:  # nothing below is longer
            return whole_of_it
        work = self._store.begin(owner.scope)  # before a tier is asked: it may be cleared meanwhile
        worth = self._store.worth_asking(owner)
        lengths = [below.tier.lengths(owner) for below in worth]
        with self._store.lock:
            self._store.settle()
            if self._store.is_closed:
                return None
            everywhere = self._memory.wholes.lengths(owner).union(*lengths)
        usable = sorted(
            n for n in everywhere if self._store.min_tokens <= n <= len(wanted) // TOKEN_BYTES
        )
        names = dict(prefix_names(owner, wanted, usable))
        usable.reverse()
        asked = [
            (below, held, _ask(below, owner, wanted, {n: names[n] for n in usable if n in held}))
            for below, held in zip(worth, lengths, strict=True)
        ]
        for n_tokens in usable:
            tokens = wanted[: n_tokens * TOKEN_BYTES]
            with self._store.lock:
                whole = self._live(owner, names[n_tokens], tokens)
                if whole is not None:
                    return self._used(whole)
            for below, held, found in asked:
                if n_tokens not in held:
                    continue
                handle = self._from_below(below, found, owner, tokens, work)
                if handle is not None:
                    return handle
        return None

    def _all_of_it(self, owner: Owner, wanted: bytes) -> StateHandle | None:
        """Return the state in memory of exactly these tokens."""
        n_tokens = len(wanted) // TOKEN_BYTES
        with self._store.lock:
            self._store.settle()
            if self._store.is_closed or n_tokens not in self._memory.wholes.lengths(owner):
                return None
        ((_, name),) = prefix_names(owner, wanted, [n_tokens])
        with self._store.lock:
            whole = self._live(owner, name, wanted) if n_tokens >= self._store.min_tokens else None
            return self._used(whole) if whole is not None else None

    def _live(self, owner: Owner, name: bytes, tokens: bytes) -> Whole | None:
        whole = self._memory.wholes.get(owner, name, tokens)
        while whole is not None and not whole.is_kept:
            if not self._memory.is_expired(whole, time.monotonic()):
                return whole
            self._memory.remove_whole(whole)
            self._memory.counts["expirations"] += 1
            whole = self._memory.wholes.get(owner, name, tokens)
        return whole

    def _used(self, whole: Whole) -> StateHandle | None:
        whole.hits += 1
        whole.used_at = time.time()
        self._memory.use([whole], time.monotonic())
        if whole.written and time.monotonic() - whole.touched_s > self._store.touch_s:
            self._store.touch_later([whole], [_address(whole.owner, whole.name, whole.n_tokens)])
        return self._handle(whole)

    def _handle(self, whole: Whole) -> StateHandle | None:
        payload = self._memory.tier.view(whole)
        if payload is None:
            self._memory.refusals["payload_lost"] += 1
            return None
        whole.pins += 1
        return StateHandle(self, whole, payload)

    # Finding below

    def _from_below(
        self,
        below: Below,
        found: Iterator[Stored | None],
        owner: Owner,
        tokens: bytes,
        work: Work,
    ) -> StateHandle | None:
        """Return the next that a tier found, if it is of `tokens`."""
        began, handle = time.perf_counter(), None
        try:
            stored = next(found, None)
            if stored is None:
                return None
            with stored:
                if stored.record.tokens == tokens:
                    handle = self._promoted(below, owner, stored, work)
        except StateRefused as refusal:
            below.tier.refuse(str(refusal))
        except Exception:  # noqa: BLE001  (whatever it is, it is a miss)
            _log.warning("the %s tier failed", below.tier.label, exc_info=True)
            below.tier.refuse("error")
        if handle is not None:
            self._store.note_read(below, owner, handle.n_tokens, time.perf_counter() - began)
        return handle

    def _promoted(
        self, below: Below, owner: Owner, stored: Stored, work: Work
    ) -> StateHandle | None:
        record = stored.record
        whole = Whole(owner, record.name, record.tokens, record.n_past, record.priority)
        with self._store.lock:
            if work.is_void:
                return None
            has_room = stored.n_bytes + whole_overhead(whole) <= self._store.ram_bytes
            buffer = self._buffer_for(whole, stored.n_bytes) if has_room else None
        if buffer is None:
            return self._loose_handle(whole, stored.view(), work)
        is_read = False
        handle: StateHandle | None = None
        try:
            stored.read_into(buffer)
            is_read = True
        finally:
            with self._store.lock:
                is_filed = is_read and not (work.is_void or self._store.is_closed)
                is_filed = is_filed and self._memory.has_whole_room(self._n_replaced(whole))
                if is_filed:
                    self._memory.file_whole(whole, buffer)
                    whole.written |= below.bit
                    self._memory.counts["promoted_tokens"] += whole.n_tokens
                    handle = self._used(whole)
                    self._store.queue_snapshot(whole, _address(owner, whole.name, whole.n_tokens))
                else:
                    self._memory.drop(buffer, whole_overhead(whole))
        return handle

    def _loose_handle(self, whole: Whole, payload: memoryview, work: Work) -> StateHandle | None:
        """Return the handle of a state that memory has no room for."""
        whole.pins, whole.used_at, whole.hits = 1, time.time(), 1
        with self._store.lock:
            if work.is_void:
                return None
            self._store.loose.add(whole)
        return StateHandle(self, whole, payload)

    # For handles

    def refuse(self, reason: str) -> None:
        """Count a state that was not used."""
        self._store.refuse(reason)

    def count_restored(
        self, n_tokens: int, seconds: float, *, n_in_context: int = 0, is_hit: bool = False
    ) -> None:
        """Count restored positions."""
        self._store.count_restored(n_tokens, seconds, n_in_context=n_in_context, is_hit=is_hit)

    def release_later(self, held: list[Node] | list[Whole]) -> None:
        """Unpin `held` at the next operation; takes no lock."""
        self._store.release_later(held)

    def touch(self, whole: Whole) -> bool:
        """Note that a state is in use now; False if it is gone."""
        with self._store.lock:
            if whole.is_dead:
                return False
            whole.used_at = time.time()
            self._memory.use([whole], time.monotonic())
            address = _address(whole.owner, whole.name, whole.n_tokens)
            self._store.touch_later([whole], [address])
            return True

    def pin(self, whole: Whole, *, is_pinned: bool) -> bool:
        """Keep a state from being evicted or expiring, or unpin it; False if it is gone."""
        with self._store.lock:
            if whole.is_dead:
                return False
            self._set_kept(whole, is_kept=is_pinned)
            return True

    def _set_kept(self, whole: Whole, *, is_kept: bool) -> None:
        whole.pins += is_kept - whole.is_kept
        whole.is_kept = is_kept

    def remove(self, whole: Whole) -> int:
        """Remove a state from every tier; return how many went."""
        self._store.flush()  # what waits would come back to the tiers after its removal
        with self._store.lock:
            self._store.settle()
            is_there = not whole.is_dead
            if is_there and whole not in self._store.loose:
                self._set_kept(whole, is_kept=False)
                self._memory.remove_whole(whole)
            whole.is_dead = True
        for below in self._store.below:
            if is_there:
                below.tier.remove(_address(whole.owner, whole.name, whole.n_tokens))
        return int(is_there)


def _ask(
    below: Below, owner: Owner, wanted: bytes, names: dict[int, bytes]
) -> Iterator[Stored | None]:
    """Ask a tier for the states of these lengths, in this order, when it is their turn."""
    return below.tier.find_each(
        (_address(owner, name, n_tokens), wanted[: n_tokens * TOKEN_BYTES])
        for n_tokens, name in names.items()
    )


def _address(owner: Owner, name: bytes, n_tokens: int) -> Address:
    return Address(owner, n_tokens, root_name(owner), name)


def _whole(owner: Owner, tokens: bytes, n_past: int | None, priority: int) -> Whole:
    n_tokens = len(tokens) // TOKEN_BYTES
    if not n_tokens:
        raise InvalidTokens("a state is of at least one token; these are none")
    n_past = require_int("n_past", n_tokens if n_past is None else n_past, 0)
    priority = require_int("priority", priority, -MAX_INT)
    ((_, name),) = prefix_names(owner, tokens, [n_tokens])
    return Whole(owner, name, tokens, n_past, priority)


def _checked_state(state: object) -> memoryview:
    try:
        view = memoryview(state)  # type: ignore[arg-type]
        return view.cast("B") if view.nbytes else memoryview(b"")
    except TypeError as error:
        raise InvalidConfig(
            f"a state must be bytes, or a contiguous buffer of them, not {type(state).__name__} "
            f"({error})"
        ) from None
