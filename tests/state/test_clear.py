"""`clear(scope)`: a tenant's states leave every tier, and nothing under way brings them back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.state.engine import Engine, restored, state_of
from tests.state.test_disk import SECRET, found, int32
from tokcache.errors import InvalidScope, StateError
from tokcache.state.cache import PrefixStateCache
from tokcache.state.write_behind import Job

if TYPE_CHECKING:
    from tests.state.media import Medium

PUBLIC, REST = list(range(100, 120)), list(range(200, 220))


def snapshot_of(
    cache: PrefixStateCache, scope: str | None, tokens: list[int] = SECRET
) -> bytes | None:
    with cache.namespace(b"m", scope=scope).find(tokens) or memoryview(b"") as found_state:
        return None if isinstance(found_state, memoryview) else bytes(found_state.state)


def filled(medium: Medium) -> PrefixStateCache:
    cache = medium.cache()
    for scope in ("a", "b", None):
        Engine().save(cache, SECRET, scope=scope)
        cache.namespace(b"m", scope=scope).store(SECRET, b"state")
    cache.flush()
    return cache


def test_a_tenant_is_cleared_and_counters_stay(medium: Medium) -> None:
    cache = filled(medium)
    before = cache.stats()
    assert cache.clear(scope="a") == 6
    after = cache.stats()
    assert after.saved_tokens == before.saved_tokens > 0
    assert after.n_bytes < before.n_bytes
    for each in (cache, medium.cache()):
        assert [found(each, SECRET, scope=scope) for scope in ("a", "b", None)] == [0, 40, 40]
        assert [snapshot_of(each, scope) for scope in ("a", "b", None)] == [
            None,
            b"state",
            b"state",
        ]
        each._check()
    cache.close()


def test_without_a_scope_everything_is_cleared_counters_too(medium: Medium) -> None:
    cache = filled(medium)
    assert cache.clear() == 18
    assert medium.states() == {}
    assert cache.stats().saved_tokens == 0
    assert cache.clear() == 0
    cache.close()


@pytest.mark.parametrize("scope", [5, b"a", ["a"], True])
def test_a_scope_is_a_str(medium: Medium, scope: Any) -> None:
    tier = medium.tier()
    cache = medium.cache(tier)
    for call in (
        lambda: cache.clear(scope=scope),
        lambda: tier.clear(scope=scope),
        lambda: cache.begin(scope),
        lambda: cache.namespace(b"m", scope=scope).plan(SECRET),
        lambda: cache.namespace(b"m", scope=scope).find(SECRET),
        lambda: cache.namespace(b"m", scope=scope).handle(SECRET),
        lambda: cache.namespace(b"m", scope=scope).store(SECRET, b""),
        lambda: cache.namespace(b"m", scope=scope).fill(SECRET, 0, bytes),
        lambda: Engine().save(cache, SECRET, scope=scope),
    ):
        with pytest.raises(InvalidScope, match="scope must be a str or None"):
            call()
    cache.close()


def test_a_handle_removes_its_state_and_nothing_else(medium: Medium) -> None:
    cache = filled(medium)
    with cache.namespace(b"m", scope="a").find(SECRET) as handle:  # type: ignore[union-attr]
        assert handle.remove() == 1
        assert handle.remove() == 0
    assert snapshot_of(cache, "a") is None
    assert found(cache, SECRET, scope="a") == 40
    cache.close()


def test_public_states_stay(medium: Medium) -> None:
    cache = medium.cache()
    for scope in ("a", "b"):
        Engine().save(cache, PUBLIC + REST, scope=scope, public_tokens=20)
        cache.namespace(b"m", scope=scope, public_prefix=PUBLIC).store(PUBLIC, b"public")
    cache.flush()
    cache.clear(scope="a")
    for each in (cache, medium.cache()):
        hits = [
            found(each, PUBLIC + REST, scope=scope, public_prefix=PUBLIC)
            for scope in ("a", "b", "c")
        ]
        assert hits == [20, 40, 20]
        with each.namespace(b"m", scope="a", public_prefix=PUBLIC).find(PUBLIC) as handle:  # type: ignore[union-attr]
            assert bytes(handle.state) == b"public"
        each._check()
    assert int32(REST[:8]) in medium.all_bytes()  # of tenant b
    cache.clear(scope="b")
    assert int32(REST[:8]) not in medium.all_bytes()
    cache.close()


# Handles and plans that are open


def test_open_handles_and_plans_yield_nothing_more(medium: Medium) -> None:
    cache = filled(medium)
    kept: dict[str, Any] = {}
    for scope in ("a", "b"):
        kept[f"handle of {scope}"] = cache.namespace(b"m", scope=scope).find(SECRET)
        kept[f"plan of {scope}"] = cache.namespace(b"m", scope=scope).plan(SECRET)
    cache.clear(scope="a")
    assert kept["handle of a"].is_stale
    with pytest.raises(StateError, match="removed"):
        _ = kept["handle of a"].state
    assert restored(kept["plan of a"], SECRET) == 0
    assert bytes(kept["handle of b"].state) == b"state"
    assert restored(kept["plan of b"], SECRET) == 40
    for each in kept.values():
        each.close()
    cache._check()
    cache.close()


def test_states_served_from_below_are_cleared_too(medium: Medium) -> None:
    cache = filled(medium)
    cache.close()
    tiny = medium.cache(ram_bytes=1000)  # memory has no room for any state
    handle = tiny.namespace(b"m", scope="a").find(SECRET)
    plan = tiny.namespace(b"m", scope="a").plan(SECRET)
    assert handle is not None
    assert bytes(handle.state) == b"state"
    assert plan.n_tokens > 0
    tiny.clear(scope="a")
    assert handle.is_stale
    assert restored(plan, SECRET) == 0
    tiny.close()


def test_a_plan_that_is_cleared_while_it_is_restored_ends_there() -> None:
    cache = PrefixStateCache(block_tokens=8)
    Engine().save(cache, SECRET, scope="a")
    loaded: list[int] = []

    def load(start: int, _stop: int, _payload: memoryview) -> None:
        loaded.append(start)
        if start == 8:
            cache.clear(scope="a")

    with cache.namespace(b"m", scope="a").plan(SECRET) as plan:
        assert plan.restore(load) == 16
    assert loaded == [0, 8]
    assert cache.stats().refusals == {"cleared": 1}


# Operations under way


def state_bytes(start: int, stop: int) -> int:
    return (stop - start) * 4


def saving(cache: PrefixStateCache, meanwhile: Callable[[], object]) -> Callable[[], object]:
    def read(start: int, stop: int, buffer: memoryview) -> None:
        meanwhile()
        buffer[:] = state_of(SECRET, start, stop)

    return lambda: cache.namespace(b"m", scope="a").save(SECRET, read, state_bytes)


def sizing(cache: PrefixStateCache, meanwhile: Callable[[], object]) -> Callable[[], object]:
    """A save that has found no blocks yet, and has no root when its scope is cleared."""

    def n_bytes(start: int, stop: int) -> int:
        meanwhile()
        return state_bytes(start, stop)

    def read(start: int, stop: int, buffer: memoryview) -> None:
        buffer[:] = state_of(SECRET, start, stop)

    return lambda: cache.namespace(b"m", scope="a").save(SECRET, read, n_bytes)


def saving_the_public_part(
    cache: PrefixStateCache, meanwhile: Callable[[], object]
) -> Callable[[], object]:
    """A save whose private part has not begun when it is cleared."""

    def read(start: int, stop: int, buffer: memoryview) -> None:
        if start == 0:
            meanwhile()
        buffer[:] = state_of(SECRET, start, stop)

    ns = cache.namespace(b"m", scope="a", public_prefix=SECRET[:8])
    return lambda: ns.save(SECRET, read, state_bytes)


def filling(cache: PrefixStateCache, meanwhile: Callable[[], object]) -> Callable[[], object]:
    def read(buffer: memoryview) -> None:
        meanwhile()
        buffer[:] = bytes(len(buffer))

    return lambda: cache.namespace(b"m", scope="a").fill(SECRET, 100, read)


@pytest.mark.parametrize("operation", [saving, sizing, saving_the_public_part, filling])
@pytest.mark.parametrize("cleared", ["a", None, "b"])
def test_a_save_under_way_stores_nothing_of_a_cleared_scope(
    medium: Medium, operation: Any, cleared: str | None
) -> None:
    cache = medium.cache()
    calls: list[int] = []

    def clear_once() -> None:
        if not calls:
            calls.append(cache.clear(scope=cleared))

    operation(cache, clear_once)()
    assert calls
    cache.flush()
    public = SECRET[:8] if operation is saving_the_public_part else []
    is_kept, is_snapshot = cleared == "b", operation is filling
    expected = 40 * (not is_snapshot) if is_kept else len(public) * (cleared == "a")
    for each in (cache, medium.cache()):
        assert found(each, SECRET, scope="a", public_prefix=public) == expected
        handle = each.namespace(b"m", scope="a").find(SECRET)
        assert (handle is not None) == (is_kept and is_snapshot)
        each._check()
    cache.close()


class _Held:
    """A tier that finds a state, then waits with its answer until it is released."""

    def __init__(self, cache: PrefixStateCache, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_found, self.goes_on = threading.Event(), threading.Event()
        tier = cache._store.below[0].tier
        find_each = tier.find_each

        def held(wanted: Any) -> Iterator[Any]:
            for stored in find_each(wanted):
                if stored is not None and not self.goes_on.is_set():
                    self.is_found.set()
                    assert self.goes_on.wait(20)
                yield stored

        monkeypatch.setattr(tier, "find_each", held)


@pytest.mark.parametrize("kind", ["blocks", "snapshot"])
@pytest.mark.parametrize("cleared", ["a", None, "b"])
def test_a_promotion_under_way_brings_nothing_back(
    medium: Medium, monkeypatch: pytest.MonkeyPatch, kind: str, cleared: str | None
) -> None:
    writer = filled(medium)
    writer.close()
    cache = medium.cache()
    held = _Held(cache, monkeypatch)

    def ask() -> object:
        return found(cache, SECRET, scope="a") if kind == "blocks" else snapshot_of(cache, "a")

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        try:
            assert held.is_found.wait(20)
            cache.clear(scope=cleared)
        finally:
            held.goes_on.set()
        answer = asked.result(20)
    cache.flush()
    if cleared == "b":
        assert answer == (40 if kind == "blocks" else b"state")
    else:
        assert answer in (0, None)
        assert len(cache) == 0
        assert found(cache, SECRET, scope="a") == 0
        assert snapshot_of(cache, "a") is None
    cache._check()
    cache.close()


def test_operations_of_another_tenant_continue(medium: Medium) -> None:
    cache = medium.cache()
    gate = threading.Event()
    cache._store.below[0].writer.put(Job("other", 0, lambda: gate.wait(10)))
    for scope in ("a", "b"):
        Engine().save(cache, SECRET, scope=scope)
        cache.namespace(b"m", scope=scope).store(SECRET, b"state")
    assert cache.clear(scope="a") == 6
    gate.set()
    assert cache.flush()
    assert len(medium.states()) == 6
    fresh = medium.cache()
    assert [found(fresh, SECRET, scope=scope) for scope in ("a", "b")] == [0, 40]
    cache.close()


def test_tenants_are_cleared_while_many_save_and_find(tmp_path: Path) -> None:
    """After the last clear no tier has a state of the tenant, even with operations under way."""
    cache = PrefixStateCache(block_tokens=8, max_entries=1000, disk=tmp_path)
    stop = threading.Event()

    def work(scope: str) -> int:
        n_found = 0
        while not stop.is_set():
            Engine().save(cache, SECRET, scope=scope)
            cache.namespace(b"m", scope=scope).store(SECRET, b"state")
            n_found += found(cache, SECRET, scope=scope)
        return n_found

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work, scope) for scope in ("a", "a", "b")]
        for _ in range(30):
            cache.clear(scope="a")
        stop.set()
        assert working[2].result(20) > 0
        for each in working:
            each.result(20)
    cache.clear(scope="a")
    cache.flush()
    fresh = PrefixStateCache(block_tokens=8, disk=tmp_path)
    assert [found(fresh, SECRET, scope=scope) for scope in ("a", "b")] == [0, 40]
    cache._check()
    cache.close()
