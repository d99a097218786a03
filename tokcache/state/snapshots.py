"""WholeStates: the cache as a plain store of opaque states, one for a prefix."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from tokcache._validate import MAX_INT, require_int, require_scope
from tokcache.errors import InvalidConfig, InvalidTokens
from tokcache.state.handles import StateHandle, Work
from tokcache.state.memory import whole_overhead
from tokcache.state.names import TOKEN_BYTES, Owner, root_name, token_bytes
from tokcache.state.snapshot_index import Whole, prefix_names
from tokcache.state.store import StateCore, checked_fingerprint
from tokcache.state.tiers import Address, StateRefused, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokcache.state.tiers.opening import Below


_log = logging.getLogger("tokcache")


class WholeStates(StateCore):
    """The part of a PrefixStateCache that knows states by what they are of, not what is in them."""

    # Storing

    def store(
        self,
        tokens: object,
        state: object,
        *,
        fingerprint: bytes,
        n_past: int | None = None,
        scope: str | None = None,
        public_tokens: int = 0,
        priority: int = 0,
        pin: bool = False,
    ) -> bool:
        """Store the bytes of the state after all of `tokens`; False if there is no room for it.

        The bytes are copied. What was stored for the same tokens with the same priority is
        replaced. `n_past` is the engine's own count of positions, by default the number of
        tokens. Of lower `priority` goes first; `pin` keeps the state from being evicted or
        expiring, until `remove`. A state of at most `public_tokens` tokens goes to the shared
        scope, whatever `scope` is.

        Errors: InvalidTokens for no tokens; InvalidConfig for a state that is no bytes-like
                object, and for numbers out of range.
        """
        whole = _whole(tokens, fingerprint, n_past, scope, priority, n_public=public_tokens)
        view = _checked_state(state)

        def copy(buffer: memoryview) -> None:
            buffer[:] = view

        return self._store(whole, view.nbytes, copy, pin=pin)

    def fill(
        self,
        tokens: object,
        n_bytes: int,
        read: Callable[[memoryview], object],
        *,
        fingerprint: bytes,
        scope: str | None = None,
    ) -> bool:
        """Store as `store` does what `read` copies into a buffer of `n_bytes`.

        If it raises, nothing is stored, and a counter tells.
        """
        whole = _whole(tokens, fingerprint, None, scope, 0)
        try:
            return self._store(whole, require_int("n_bytes", n_bytes, 0), read, pin=False)
        except Exception:  # noqa: BLE001  (the state is not stored, the request goes on)
            _log.debug("a state could not be read", exc_info=True)
            self.refuse("save_failed")
            return False

    def _store(
        self, whole: Whole, n_bytes: int, read: Callable[[memoryview], object], *, pin: bool
    ) -> bool:
        if not self.enabled:
            return False
        with self._lock:
            self._settle()
            work = self._begin(whole.owner.scope)
            buffer = self._buffer_for(whole, n_bytes)
        if buffer is None:
            self._tell_oversize()
            return False
        is_filed = False
        try:
            read(buffer)
            is_filed = True
        finally:
            with self._lock:
                # Cleared while the bytes were copied: then this comes too late.
                is_filed = is_filed and not (work.is_void or self._is_closed)
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
        if self._is_closed:
            return None
        if n_bytes + overhead > self.ram_bytes:
            n_total = n_bytes + overhead
            self._refuse_oversize(whole.owner.fingerprint, whole.n_tokens, n_total)
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
        self._queue_whole(whole, _address(whole.owner, whole.name, whole.n_tokens))

    # Finding

    def find(
        self,
        tokens: object,
        *,
        fingerprint: bytes,
        scope: str | None = None,
        public_tokens: int = 0,
        is_counted: bool = True,
    ) -> StateHandle | None:
        """Return the state of the longest stored prefix of `tokens`, None if there is none.

        Of equal length the one of the highest priority is returned. States of at most
        `public_tokens` tokens are looked for in the shared scope, too. Close the handle, or use
        it in a `with`: until then its state is not evicted. `is_counted=False` is for a part of
        a look-up that is counted elsewhere.
        """
        owner, wanted = _owner(fingerprint, scope), token_bytes(tokens)
        n_public = require_int("public_tokens", public_tokens, 0)
        if not is_counted:
            return self._find_both(owner, wanted, n_public)
        with self._lock:
            self._memory.counts["lookups"] += 1
            self._memory.counts["prompt_tokens"] += len(wanted) // TOKEN_BYTES
        found = self._find_both(owner, wanted, n_public)
        with self._lock:
            self._memory.counts["hits"] += found is not None
        return found

    def _find_both(self, owner: Owner, wanted: bytes, n_public: int) -> StateHandle | None:
        found = self._find(owner, wanted)
        n_found = 0 if found is None else found.n_tokens
        if n_found >= n_public or owner.scope is None:
            return found
        shared = self._find(owner._replace(scope=None), wanted[: n_public * TOKEN_BYTES])
        return shared if shared is not None and shared.n_tokens > n_found else found

    def handle(
        self, tokens: object, *, fingerprint: bytes, scope: str | None = None
    ) -> StateHandle | None:
        """Return the state in memory of exactly these tokens; counts as no look-up and no use."""
        owner, wanted = _owner(fingerprint, scope), token_bytes(tokens)
        with self._lock:
            self._settle()
            for _, name in prefix_names(owner, wanted, [len(wanted) // TOKEN_BYTES]):
                whole = self._live(owner, name, wanted)
                if whole is not None:
                    return self._handle(whole)
        return None

    def _find(self, owner: Owner, wanted: bytes) -> StateHandle | None:
        whole_of_it = self._all_of_it(owner, wanted) if self._below else None
        if whole_of_it is not None:  # nothing below is longer
            return whole_of_it
        work = self.begin(owner.scope)  # before a tier is asked: it may be cleared meanwhile
        worth = self._worth_asking(owner)
        lengths = [below.tier.lengths(owner) for below in worth]
        with self._lock:
            self._settle()
            if self._is_closed:
                return None
            everywhere = self._memory.wholes.lengths(owner).union(*lengths)
        usable = sorted(n for n in everywhere if self.min_tokens <= n <= len(wanted) // TOKEN_BYTES)
        names = dict(prefix_names(owner, wanted, usable))
        usable.reverse()
        asked = [
            (below, held, _ask(below, owner, wanted, {n: names[n] for n in usable if n in held}))
            for below, held in zip(worth, lengths, strict=True)
        ]
        for n_tokens in usable:
            tokens = wanted[: n_tokens * TOKEN_BYTES]
            with self._lock:
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
        with self._lock:
            self._settle()
            if self._is_closed or n_tokens not in self._memory.wholes.lengths(owner):
                return None
        ((_, name),) = prefix_names(owner, wanted, [n_tokens])
        with self._lock:
            whole = self._live(owner, name, wanted) if n_tokens >= self.min_tokens else None
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
        if whole.written and time.monotonic() - whole.touched_s > self._touch_s:
            self._touch_later([whole], [_address(whole.owner, whole.name, whole.n_tokens)])
        return self._handle(whole)

    def _handle(self, whole: Whole) -> StateHandle | None:
        payload = self._tier.view(whole)
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
            self._note_read(below, owner, handle.n_tokens, time.perf_counter() - began)
        return handle

    def _promoted(
        self, below: Below, owner: Owner, stored: Stored, work: Work
    ) -> StateHandle | None:
        record = stored.record
        whole = Whole(owner, record.name, record.tokens, record.n_past, record.priority)
        with self._lock:
            if work.is_void:
                return None
            has_room = stored.n_bytes + whole_overhead(whole) <= self.ram_bytes
            buffer = self._buffer_for(whole, stored.n_bytes) if has_room else None
        if buffer is None:
            return self._loose_handle(whole, stored.view(), work)
        is_read = False
        handle: StateHandle | None = None
        try:
            stored.read_into(buffer)
            is_read = True
        finally:
            with self._lock:
                is_filed = is_read and not (work.is_void or self._is_closed)
                is_filed = is_filed and self._memory.has_whole_room(self._n_replaced(whole))
                if is_filed:
                    self._memory.file_whole(whole, buffer)
                    whole.written |= below.bit
                    self._memory.counts["promoted_tokens"] += whole.n_tokens
                    handle = self._used(whole)
                    self._queue_whole(whole, _address(owner, whole.name, whole.n_tokens))
                else:
                    self._memory.drop(buffer, whole_overhead(whole))
        return handle

    def _loose_handle(self, whole: Whole, payload: memoryview, work: Work) -> StateHandle | None:
        """Return the handle of a state that memory has no room for."""
        whole.pins, whole.used_at, whole.hits = 1, time.time(), 1
        with self._lock:
            if work.is_void:
                return None
            self._loose.add(whole)
        return StateHandle(self, whole, payload)

    # Keeping and removing

    def touch(self, handle: StateHandle) -> bool:
        """Note that a state is in use now; False if it is gone, or another cache's."""
        with self._lock:
            if handle.is_stale or not handle.is_of(self):
                return False
            handle.whole.used_at = time.time()
            self._memory.use([handle.whole], time.monotonic())
            whole = handle.whole
            self._touch_later([whole], [_address(whole.owner, whole.name, whole.n_tokens)])
            return True

    def pin(self, handle: StateHandle, *, is_pinned: bool = True) -> bool:
        """Keep a state from being evicted or expiring, or let it go again; False as `touch`."""
        with self._lock:
            if handle.is_stale or not handle.is_of(self):
                return False
            self._set_kept(handle.whole, is_kept=is_pinned)
            return True

    def _set_kept(self, whole: Whole, *, is_kept: bool) -> None:
        whole.pins += is_kept - whole.is_kept
        whole.is_kept = is_kept

    def remove(self, handle: StateHandle) -> int:
        """Remove one state from every tier; return 1, or 0 if it was removed already.

        Where a tier fails to remove it, a counter and a line in the log say so. `clear(scope=…)`
        removes all of a tenant's.

        Errors: InvalidConfig for anything else than a handle, and for another cache's.
        """
        if not isinstance(handle, StateHandle):
            raise InvalidConfig(
                f"remove takes a handle that find() returned, not {type(handle).__name__}; "
                "clear(scope=…) removes all of a tenant's states"
            )
        if not handle.is_of(self):
            raise InvalidConfig("this handle is another cache's; ask that one to remove its state")
        whole = handle.whole
        self.flush()  # what waits would come back to the tiers after its removal
        with self._lock:
            self._settle()
            is_there = not whole.is_dead
            if is_there and whole not in self._loose:
                self._set_kept(whole, is_kept=False)
                self._memory.remove_whole(whole)
            whole.is_dead = True
        for below in self._below:
            if is_there:
                below.tier.remove(_address(whole.owner, whole.name, whole.n_tokens))
        return int(is_there)

    def whole_states(self) -> Iterator[StateHandle]:
        """Yield a handle of each whole state in memory, in no order; counts as no use."""
        with self._lock:
            self._settle()
            handles = [self._handle(whole) for whole in self._memory.wholes]
        yield from (handle for handle in handles if handle is not None)


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


def _whole(
    tokens: object,
    fingerprint: object,
    n_past: int | None,
    scope: object,
    priority: int,
    *,
    n_public: int = 0,
) -> Whole:
    owner, held = _owner(fingerprint, scope), token_bytes(tokens)
    if not held:
        raise InvalidTokens("a state is of at least one token; these are none")
    if len(held) <= require_int("public_tokens", n_public, 0) * TOKEN_BYTES:
        owner = owner._replace(scope=None)
    n_past = require_int("n_past", len(held) // TOKEN_BYTES if n_past is None else n_past, 0)
    priority = require_int("priority", priority, -MAX_INT)
    ((_, name),) = prefix_names(owner, held, [len(held) // TOKEN_BYTES])
    return Whole(owner, name, held, n_past, priority)


def _owner(fingerprint: object, scope: object) -> Owner:
    return Owner(checked_fingerprint(fingerprint), require_scope(scope), "whole")


def _checked_state(state: object) -> memoryview:
    try:
        view = memoryview(state)  # type: ignore[arg-type]
        return view.cast("B") if view.nbytes else memoryview(b"")
    except TypeError as error:
        raise InvalidConfig(
            f"a state must be bytes, or a contiguous buffer of them, not {type(state).__name__} "
            f"({error})"
        ) from None
