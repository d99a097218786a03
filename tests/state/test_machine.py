"""The cache against a plain set of prefixes; every invariant is checked after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.machines import assert_fails, effort
from tests.state.engine import Engine, restored
from tokcache import _prefix
from tokcache.state import index
from tokcache.state.cache import PrefixStateCache
from tokcache.state.memory import NODE_BYTES, StateMemory

if TYPE_CHECKING:
    import pytest

    from tokcache.state.handles import RestorePlan

TOKENS = st.lists(st.integers(0, 2), max_size=14)
KEYS = st.tuples(st.sampled_from([b"m", b"n"]), st.sampled_from([None, "a"]))
Key = tuple[bytes, str | None]


class CacheMachine(RuleBasedStateMachine):
    """Subclasses set the budgets: with room for all states none may be missing."""

    max_entries = 10_000
    ram_bytes = 1 << 30

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixStateCache(
            ram_bytes=self.ram_bytes, max_entries=self.max_entries, block_tokens=4
        )
        self.stored: dict[Key, set[tuple[int, ...]]] = {}
        self.aligned: dict[Key, set[tuple[int, ...]]] = {}
        self.plans: list[tuple[RestorePlan, list[int], str | None]] = []

    def best(self, key: Key, tokens: list[int]) -> int:
        prefixes = self.stored.get(key, set())
        return max((n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in prefixes), default=0)

    @rule(key=KEYS, tokens=TOKENS)
    def save(self, key: Key, tokens: list[int]) -> None:
        before = self.best(key, tokens)
        n_saved = Engine().save(self.cache, tokens, *key)
        assert n_saved <= len(tokens)
        known = self.stored.setdefault(key, set())
        known.update(tuple(tokens[: n + 1]) for n in range(len(tokens)))
        if self.has_room:
            assert n_saved == len(tokens) - before  # the shared part is held once, to the token

    @rule(key=KEYS, tokens=TOKENS)
    def save_aligned(self, key: Key, tokens: list[int]) -> None:
        known = self.aligned.setdefault(key, set())
        before = len(known)
        n_saved = Engine().save(self.cache, tokens, *key, aligned=True)
        known.update(tuple(tokens[: n + 4]) for n in range(0, len(tokens) - 3, 4))
        if self.has_room:
            assert n_saved == 4 * (len(known) - before)

    @rule(key=KEYS, tokens=TOKENS, fail_at=st.integers(0, 13))
    def save_that_fails(self, key: Key, tokens: list[int], fail_at: int) -> None:
        Engine(fail_at).save(self.cache, tokens, *key)
        with self.cache.namespace(key[0], scope=key[1]).plan(tokens) as plan:
            known = self.stored.setdefault(key, set())
            known.update(tuple(tokens[: n + 1]) for n in range(plan.n_tokens))

    @rule(key=KEYS, tokens=TOKENS)
    def find(self, key: Key, tokens: list[int]) -> None:
        with self.cache.namespace(key[0], scope=key[1]).plan(tokens) as plan:
            assert restored(plan, tokens) == plan.n_tokens
            best = self.best(key, tokens)
            assert plan.n_tokens <= best
            if self.has_room:
                assert plan.n_tokens == best

    @rule(key=KEYS, tokens=TOKENS)
    def find_aligned(self, key: Key, tokens: list[int]) -> None:
        with self.cache.namespace(key[0], scope=key[1], aligned=True).plan(tokens) as plan:
            assert restored(plan, tokens) == plan.n_tokens
            known = self.aligned.get(key, set())
            best = max((len(one) for one in known if tuple(tokens[: len(one)]) == one), default=0)
            assert plan.n_tokens <= best
            if self.has_room:
                assert plan.n_tokens == best

    @rule(key=KEYS, tokens=TOKENS, is_pinned=st.booleans())
    def pin(self, key: Key, tokens: list[int], *, is_pinned: bool) -> None:
        states = self.cache.namespace(key[0], scope=key[1])
        n_held, n_below = states.pin(tokens, is_pinned=is_pinned)
        assert n_held == n_below <= len(tokens)
        if self.has_room:
            assert n_held == self.best(key, tokens)

    @rule(key=KEYS, tokens=TOKENS)
    def hold(self, key: Key, tokens: list[int]) -> None:
        plan = self.cache.namespace(key[0], scope=key[1]).plan(tokens)
        self.plans.append((plan, tokens, key[1]))

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        plan, tokens, _ = self.plans.pop(data.draw(st.integers(0, len(self.plans) - 1)))
        assert restored(plan, tokens) == plan.n_tokens
        plan.close()

    @rule()
    def clear_scope(self) -> None:
        before = self.cache.stats()
        self.cache.clear(scope="a")
        assert self.cache.stats().saved_tokens == before.saved_tokens
        for stored in (self.stored, self.aligned):
            for key in [key for key in stored if key[1] == "a"]:
                del stored[key]
        self.end_plans("a")

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.stored.clear()
        self.aligned.clear()
        self.end_plans("a", None)

    def end_plans(self, *scopes: str | None) -> None:
        """Check that open plans restore no states that were cleared."""
        for plan, tokens, scope in self.plans:
            if scope in scopes:
                assert restored(plan, tokens) == 0
                plan.close()
        self.plans = [each for each in self.plans if each[2] not in scopes]

    @property
    def has_room(self) -> bool:
        return self.max_entries == 10_000

    @invariant()
    def holds(self) -> None:
        self.cache._check()
        for plan, tokens, _ in self.plans:
            assert restored(plan, tokens) == plan.n_tokens

    def teardown(self) -> None:
        for plan, _, _ in self.plans:
            plan.close()
        self.cache._check()
        assert all(not node.pins for node in self.cache._store.memory.index.nodes())


class TightMachine(CacheMachine):
    max_entries = 3
    ram_bytes = 6 * (NODE_BYTES + 32) + 700


TestRoomForAll = CacheMachine.TestCase
TestRoomForAll.settings = effort(25, 35)
TestTight = TightMachine.TestCase
TestTight.settings = effort(25, 35)


def test_a_prefix_that_is_one_token_too_short_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    common = _prefix.common_tokens
    monkeypatch.setattr(index, "common_tokens", lambda *given: max(0, common(*given) - 1))
    assert_fails(CacheMachine)


def test_a_scope_that_is_not_cleared_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateMemory, "remove_all", lambda *_: 0)
    assert_fails(CacheMachine)
