"""Operations under way: which clears make them void."""

from __future__ import annotations

import pytest

from tokcache.errors import InvalidScope
from tokcache.state.cache import PrefixStateCache
from tokcache.state.handles import Clears, Work


def test_a_clear_makes_the_work_of_its_scope_void_and_no_other() -> None:
    clears = Clears()
    before = {scope: Work(clears, scope) for scope in ("a", "b", None)}
    clears.add("a")
    after = {scope: Work(clears, scope) for scope in ("a", "b", None)}
    assert [work.is_void for work in before.values()] == [True, False, False]
    assert not any(work.is_void for work in after.values())
    clears.add("b")
    assert [work.is_void for work in before.values()] == [True, True, False]
    assert [work.is_void for work in after.values()] == [False, True, False]
    clears.add(None)
    assert all(work.is_void for work in [*before.values(), *after.values()])
    assert not Work(clears, "a").is_void


def test_work_is_void_after_more_clears_than_are_remembered() -> None:
    clears = Clears()
    early, other = Work(clears, "scope 0"), Work(clears, "other")
    clears.add("scope 0")
    for n in range(1, 1024):
        clears.add(f"scope {n}")
    assert early.is_void
    assert not other.is_void
    late = Work(clears, "scope 1024")
    clears.add("scope 1024")  # one more than are remembered: all work is void from here on
    assert early.is_void
    assert other.is_void
    assert late.is_void
    assert not Work(clears, "other").is_void
    assert len(clears._of_scope) <= 1024


def test_the_cache_makes_work_void() -> None:
    cache = PrefixStateCache()
    a, b, shared = cache.begin("a"), cache.begin("b"), cache.begin(None)
    cache.clear(scope="a")
    assert (a.is_void, b.is_void, shared.is_void) == (True, False, False)
    cache.clear()
    assert b.is_void
    assert shared.is_void
    last = cache.begin("a")
    cache.close()
    assert last.is_void
    with pytest.raises(InvalidScope):
        cache.begin(1)  # type: ignore[arg-type]
