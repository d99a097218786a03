"""L0 against a plain dict: random sequences of calls, with every invariant checked after each."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.machines import assert_fails, effort
from tests.text.implementations import REFERENCE, native


# Short texts, long texts that a digest of samples can't distinguish, and strings of two and four
# bytes a character.
def one_letter_among_many(where: int, letter: str) -> str:
    return "s" * where + letter + "s" * (700 - where)


TEXTS = st.one_of(
    st.text(max_size=3),
    st.builds(one_letter_among_many, st.integers(0, 700), st.sampled_from("ab")),
    st.builds(lambda p: "\u6c49" * p + "x" + "\u6c49" * (400 - p), st.integers(0, 400)),
    st.sampled_from(["", "x" * 512, "x" * 513, "\ud800", "\U0001f600" * 200]),
)
SCOPES = st.sampled_from([None, "", "a", "b", "\u4141"])
IDS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30)


class _Machine(RuleBasedStateMachine):
    cache_class: Any

    @initialize(
        max_entries=st.sampled_from([1, 2, 5, 1000]),
        max_bytes=st.sampled_from([2_000, 20_000, 1 << 30]),
        sample_size=st.sampled_from([1, 8]),
    )
    def make(self, max_entries: int, max_bytes: int, sample_size: int) -> None:
        self.cache = self.cache_class(
            max_entries=max_entries, max_bytes=max_bytes, sample_size=sample_size
        )
        self.roomy = max_entries == 1000 and max_bytes == 1 << 30
        self.model: dict[tuple[str, bool, str | None], list[int]] = {}
        self.once_put: set[tuple[str, bool, str | None]] = set()  # since the last clear
        self.n_gets = 0

    @rule(text=TEXTS, flag=st.booleans(), scope=SCOPES, ids=IDS)
    def put(self, text: str, flag: bool, scope: str | None, ids: list[int]) -> None:
        stored = self.cache.put(text, ids, add_special_tokens=flag, scope=scope)
        assert stored or not self.roomy
        if stored:
            self.once_put.add((text, flag, scope))
            self.model[text, flag, scope] = ids
            assert self.cache.get(text, add_special_tokens=flag, scope=scope) == ids
            self.n_gets += 1
        else:
            self.model.pop((text, flag, scope), None)

    @rule(text=TEXTS, flag=st.booleans(), scope=SCOPES)
    def get_any(self, text: str, flag: bool, scope: str | None) -> None:
        self._get(text, flag, scope)

    @rule(data=st.data())
    def get_known(self, data: st.DataObject) -> None:
        if self.model:
            self._get(*data.draw(st.sampled_from(sorted(self.model, key=repr))))

    @rule(data=st.data(), scope=SCOPES)
    def get_known_elsewhere(self, data: st.DataObject, scope: str | None) -> None:
        if self.model:
            text, flag, _ = data.draw(st.sampled_from(sorted(self.model, key=repr)))
            self._get(text, flag, scope)

    def _get(self, text: str, flag: bool, scope: str | None) -> None:
        before = self.cache.stats().misses_by_reason
        got = self.cache.get((text + "\0")[:-1], add_special_tokens=flag, scope=scope)
        self.n_gets += 1
        expected = self.model.get((text, flag, scope))
        if got is None:  # fewer entries than the cache remembers; refused ones can't be told apart
            after = self.cache.stats().misses_by_reason
            assert after["not_known"] == 0
            if (text, flag, scope) not in self.once_put:
                assert after["new"] == before["new"] + 1
            elif (text, flag, scope) in self.model:
                assert after["evicted"] == before["evicted"] + 1
        if got is not None or self.roomy:
            assert got == expected if expected is not None else got is None

    @rule(scope=SCOPES.filter(lambda scope: scope is not None))
    def clear_scope(self, scope: str) -> None:
        before = self.cache.stats()
        n_held = sum(key[2] == scope for key in self.model)
        self.cache.clear(scope=scope)
        self.model = {key: ids for key, ids in self.model.items() if key[2] != scope}
        self.once_put = {key for key in self.once_put if key[2] != scope}
        after = self.cache.stats()
        assert before.n_entries - after.n_entries <= n_held
        assert (before.hits, before.insertions) == (after.hits, after.insertions)
        assert scope not in {row[3] for row in self.cache.held()}

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.clear()
        self.once_put.clear()
        self.n_gets = 0

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache._check()
        assert len(self.cache) <= len(self.model)
        stats = self.cache.stats()
        assert stats.hits + stats.misses == self.n_gets
        assert stats.misses == sum(stats.misses_by_reason.values())
        if self.roomy:
            assert len(self.cache) == len(self.model)


class NativeMachine(_Machine):
    def __init__(self) -> None:
        super().__init__()
        self.cache_class = native().l0_cache


class ReferenceMachine(_Machine):
    def __init__(self) -> None:
        super().__init__()
        self.cache_class = REFERENCE.l0_cache


TestNative = NativeMachine.TestCase
TestNative.settings = effort(50, 35)
TestReference = ReferenceMachine.TestCase
TestReference.settings = effort(25, 35)


# ---- planted faults


class WithoutScopes(REFERENCE.l0_cache):  # type: ignore[misc,name-defined]
    """Finds the entries of every scope in the shared one."""

    def get(self, text: str, *, add_special_tokens: bool = True, scope: str | None = None) -> Any:
        found = super().get(text, add_special_tokens=add_special_tokens, scope=scope)
        others = [row for row in self.held() if row[:2] == (text, add_special_tokens)]
        return others[0][2] if found is None and others and scope is None else found


class UncountedMisses(REFERENCE.l0_cache):  # type: ignore[misc,name-defined]
    """Counts the misses of short texts only."""

    def get(self, text: str, *, add_special_tokens: bool = True, scope: str | None = None) -> Any:
        found = super().get(text, add_special_tokens=add_special_tokens, scope=scope)
        if found is None and len(text) > 600:
            self._misses["new"] = max(0, self._misses["new"] - 1)
        return found


@pytest.mark.parametrize("faulty", [WithoutScopes, UncountedMisses])
def test_a_planted_fault_is_found(faulty: Any) -> None:
    class Faulty(_Machine):
        def __init__(self) -> None:
            super().__init__()
            self.cache_class = faulty

    assert_fails(Faulty)
