"""Snapshots of a cache against a plain dict: priorities, pins, handles in use, a time to live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.machines import assert_fails, effort
from tokcache.state.cache import PrefixStateCache
from tokcache.state.memory import StateMemory
from tokcache.state.snapshot_index import SNAPSHOT_BYTES, Snapshot
from tokcache.state.snapshots import SnapshotStore

if TYPE_CHECKING:
    import pytest

    from tokcache.state.handles import StateHandle

KEYS = st.tuples(st.sampled_from([b"m", b"n"]), st.sampled_from([None, "a"]))
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)
Key = tuple[bytes, str | None]
TTL_S = 100.0


class SnapshotsMachine(RuleBasedStateMachine):
    """With room for all states none may be missing."""

    max_entries = 10_000
    ram_bytes = 1 << 30

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixStateCache(
            ram_bytes=self.ram_bytes, max_entries=self.max_entries, ttl_s=TTL_S
        )
        # The states by key, tokens and priority; the pinned ones of them.
        self.stored: dict[tuple[Key, tuple[int, ...]], dict[int, bytes]] = {}
        self.pinned: set[tuple[Key, tuple[int, ...], int]] = set()
        self.handles: list[tuple[StateHandle, bytes]] = []
        self.n_states = 0

    @rule(key=KEYS, drawn=TOKENS, priority=st.integers(-1, 1), pin=st.booleans())
    def store(self, key: Key, drawn: list[int], priority: int, pin: bool) -> None:
        self.n_states += 1
        state = b"%d" % self.n_states
        pin = pin and len(self.pinned) < 2  # pinned states alone must not fill the cache
        tokens = tuple(drawn)
        where = key, tokens, priority
        namespace = self.cache.namespace(key[0], scope=key[1])
        is_stored = namespace.store(tokens, state, priority=priority, pin=pin)
        if is_stored:
            self.stored.setdefault((key, tokens), {})[priority] = state
            self.pinned |= {where} if pin else set()
        else:
            assert not self.has_room

    @rule(key=KEYS, drawn=TOKENS)
    def find(self, key: Key, drawn: list[int]) -> None:
        self.check_find(key, tuple(drawn))

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), more=TOKENS)
    def find_stored(self, data: st.DataObject, more: list[int]) -> None:
        key, tokens = data.draw(st.sampled_from(sorted(self.stored, key=repr)))
        self.check_find(key, (*tokens, *more))
        self.check_find((key[0], None if key[1] else "a"), tokens)

    def check_find(self, key: Key, tokens: tuple[int, ...]) -> None:
        handle = self.cache.namespace(key[0], scope=key[1]).find(tokens)
        held = [n for n in range(1, len(tokens) + 1) if (key, tokens[:n]) in self.stored]
        kept = [n for n in held if any((key, tokens[:n], p) in self.pinned for p in (-1, 0, 1))]
        if handle is None:
            assert not kept
            assert not held or not self.has_room
            return
        with handle:
            states = self.stored[key, tokens[: handle.n_tokens]]
            assert bytes(handle.state) in states.values()
            assert handle.n_tokens >= max(kept, default=0)
            if self.has_room:
                assert handle.n_tokens == held[-1]
                assert bytes(handle.state) == states[max(states)]

    @rule(key=KEYS, drawn=TOKENS)
    def hold(self, key: Key, drawn: list[int]) -> None:
        handle = self.cache.namespace(key[0], scope=key[1]).find(drawn)
        if handle is not None:
            self.handles.append((handle, bytes(handle.state)))

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        handle, state = self.handles.pop(data.draw(st.integers(0, len(self.handles) - 1)))
        assert bytes(handle.state) == state
        handle.close()

    @rule()
    def expire(self) -> None:
        """Let more time than a state's life pass: only pinned states stay."""
        memory = self.cache._store.memory
        for each in memory.snapshots:
            each.used_s -= 2 * TTL_S
        memory._swept_s -= 2 * TTL_S
        with self.cache.namespace(b"other").plan([1]):  # the sweep
            pass
        for (key, tokens), states in list(self.stored.items()):
            for priority in list(states):
                if (key, tokens, priority) not in self.pinned:
                    del states[priority]
            if not states:
                del self.stored[key, tokens]

    @rule()
    def clear_scope(self) -> None:
        self.forget("a")
        self.cache.clear(scope="a")

    @rule()
    def clear(self) -> None:
        self.forget("a", None)
        self.cache.clear()

    def forget(self, *scopes: str | None) -> None:
        self.stored = {each: s for each, s in self.stored.items() if each[0][1] not in scopes}
        self.pinned = {each for each in self.pinned if each[0][1] not in scopes}
        for handle, _ in self.handles:
            handle.close()
        self.handles.clear()

    @property
    def has_room(self) -> bool:
        return self.max_entries == 10_000

    @invariant()
    def holds(self) -> None:
        self.cache._check()
        for handle, state in self.handles:
            assert bytes(handle.state) == state  # though it may be evicted or replaced by now
        n_stored = sum(map(len, self.stored.values()))
        stats = self.cache.stats()
        assert stats.n_states <= n_stored
        if self.has_room:
            assert stats.n_states == n_stored

    def teardown(self) -> None:
        for handle, _ in self.handles:
            handle.close()
        self.cache._check()


class TightSnapshotsMachine(SnapshotsMachine):
    max_entries = 5
    ram_bytes = 7 * (SNAPSHOT_BYTES + 800)


TestSnapshotsMachine = SnapshotsMachine.TestCase
TestSnapshotsMachine.settings = effort(25, 30)
TestTightSnapshotsMachine = TightSnapshotsMachine.TestCase
TestTightSnapshotsMachine.settings = effort(25, 30)


# ---- planted faults


def test_a_pin_that_does_not_hold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpinned(_self: Any, snapshot: Snapshot, *, is_kept: bool) -> None:
        snapshot.is_kept = is_kept and snapshot.pins > 0

    monkeypatch.setattr(SnapshotStore, "_set_kept", unpinned)
    assert_fails(TightSnapshotsMachine)


def test_a_buffer_that_is_given_back_while_it_is_read_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drop(self: StateMemory, held: Any) -> None:
        self.tier.remove(held)

    monkeypatch.setattr(StateMemory, "_drop_payload", drop)
    assert_fails(TightSnapshotsMachine)


def test_scopes_that_share_states_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    find = SnapshotStore._find

    def shared(self: SnapshotStore, root_key: Any, wanted: bytes) -> Any:
        own = find(self, root_key, wanted)
        return own or find(self, root_key._replace(scope=None), wanted)

    monkeypatch.setattr(SnapshotStore, "_find", shared)
    assert_fails(SnapshotsMachine)
