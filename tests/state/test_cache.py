"""Blocks in memory: look-ups, saves, budgets, scopes, threads and forks."""

from __future__ import annotations

import os
import threading
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.state.engine import Engine, restored, state_of
from tokcache.errors import InvalidConfig, InvalidTokens
from tokcache.state.cache import PrefixStateCache
from tokcache.state.index import root_bytes
from tokcache.state.memory import NODE_BYTES
from tokcache.state.names import RootKey

ROOT = root_bytes(RootKey(b"m", None, "free"))


def small(**settings: Any) -> PrefixStateCache:
    return PrefixStateCache(**{"block_tokens": 4, "ram_bytes": 1 << 20, **settings})


def found(
    cache: PrefixStateCache, tokens: list[int], max_tokens: int | None = None, **key: Any
) -> int:
    with cache.namespace(b"m", **key).plan(tokens, max_tokens=max_tokens) as plan:
        return restored(plan, tokens) if plan.blocks else 0


def test_longest_prefix_is_token_exact_and_the_last_block_is_trimmed() -> None:
    cache = small()
    Engine().save(cache, [1, 2, 3, 4, 5, 6, 7])
    assert found(cache, [1, 2, 3, 4, 5, 6, 9, 9]) == 6
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == 7
    assert found(cache, [1, 2, 3]) == 3
    assert found(cache, [2, 2, 3, 4]) == 0
    assert found(cache, []) == 0


def test_max_tokens_and_aligned_limit_the_prefix() -> None:
    cache = small()
    Engine().save(cache, list(range(10)))
    assert found(cache, list(range(10)), max_tokens=9) == 9
    assert found(cache, list(range(10)), max_tokens=0) == 0
    assert Engine().save(cache, list(range(10)), aligned=True) == 8
    assert found(cache, list(range(10)), max_tokens=9, aligned=True) == 8
    assert found(cache, list(range(8)), max_tokens=7, aligned=True) == 4
    assert found(cache, [0, 1, 2, 3, 4, 5, 9, 9, 9, 9], aligned=True) == 4
    cache._check()


def test_blocks_that_are_not_aligned_are_not_found_as_aligned() -> None:
    cache, tokens = small(), list(range(8))
    Engine().save(cache, tokens)
    assert found(cache, tokens, aligned=True) == 0
    Engine().save(cache, [*range(6), 9, 9], aligned=True)
    assert found(cache, tokens) == 8
    assert found(cache, tokens, aligned=True) == 4


def test_aligned_blocks_that_begin_alike_are_both_stored_whole() -> None:
    cache, engine = small(), Engine()
    first, second = [1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 3, 3]
    for tokens in (first, second):
        engine.save(cache, tokens, aligned=True)
    assert engine.reads == [(0, 4), (4, 8), (4, 8)]
    for tokens in (first, second):
        with cache.namespace(b"m", aligned=True).plan(tokens) as plan:
            assert [(b.start, b.stop, b.until) for b in plan.blocks] == [(0, 4, 4), (4, 8, 8)]
            assert restored(plan, tokens) == 8
    cache._check()


def test_branches_hold_their_shared_part_once_to_the_token() -> None:
    cache, engine = PrefixStateCache(block_tokens=256, max_entries=100), Engine()
    shared = list(range(2000))
    branches = [shared + [5000 + n] * 128 for n in range(50)]
    for tokens in branches:
        engine.save(cache, tokens)
    assert sum(stop - start for start, stop in engine.reads) == 2000 + 50 * 128
    assert cache.stats().saved_tokens == 2000 + 50 * 128
    assert len(cache) == 50
    for tokens in branches:
        assert found(cache, tokens) == 2128
    cache._check()


def test_a_chain_that_branches_off_inside_a_block_needs_a_trim() -> None:
    cache = small()
    Engine().save(cache, [1, 2, 3, 4])
    Engine().save(cache, [1, 2, 9, 9])
    with cache.namespace(b"m").plan([1, 2, 9, 9]) as plan:
        assert [(b.start, b.stop, b.until) for b in plan.blocks] == [(0, 4, 2), (2, 4, 4)]
        assert plan.start_beyond(1) == 0
        assert plan.start_beyond(2) == 2
        assert plan.restore(lambda *_: None) == 2  # an engine that can't trim
        assert plan.restore(lambda *_: None, trim=lambda _: False) == 2
        assert plan.restore(lambda *_: None, trim=lambda _: None) == 4
    assert cache.stats().refusals == {"restore_failed": 1}


def test_a_leaf_is_evicted_before_the_block_it_branched_off_from() -> None:
    cache = small(max_entries=2)
    Engine().save(cache, [1, 2, 3, 4])
    Engine().save(cache, [1, 2, 8])
    Engine().save(cache, [1, 2, 9])
    assert len(cache) == 2
    assert [found(cache, [1, 2, last]) for last in (8, 9)] == [2, 3]
    cache._check()


def test_with_one_entry_a_branch_replaces_the_end_of_the_stored_prompt() -> None:
    cache = small(max_entries=1)
    Engine().save(cache, [1, 2, 3, 4])
    assert Engine().save(cache, [1, 2, 9, 9]) == 2
    assert found(cache, [1, 2, 9, 9]) == 4
    assert len(cache) == 1
    cache._check()
    assert Engine().save(cache, [1, 2, 7, 7]) == 2
    assert [found(cache, [1, 2, last, last]) for last in (7, 9)] == [4, 2]
    assert len(cache) == 1
    cache._check()


def test_a_save_that_another_overtakes_stores_the_rest() -> None:
    cache = small()
    has_run: list[int] = []

    def read(start: int, stop: int, buffer: memoryview) -> None:
        if not has_run:
            has_run.append(1)
            Engine().save(cache, [1, 2, 3, 7, 7])
        buffer[:] = state_of([1, 2, 3, 4, 5], start, stop)

    tokens = [1, 2, 3, 4, 5]
    assert cache.namespace(b"m").save(tokens, read, lambda a, b: 4 * (b - a)) == 2
    assert found(cache, tokens) == 5
    assert found(cache, [1, 2, 3, 7, 7]) == 5
    cache._check()


def test_a_longer_diverging_entry_never_shadows_a_shorter_one() -> None:
    cache = small()
    Engine().save(cache, [1, 2, 3, 4, 5, 6])
    Engine().save(cache, [1, 2, 3, 4, 5, 9, 9, 9, 9, 9])
    assert found(cache, [1, 2, 3, 4, 5, 6, 9]) == 6
    assert found(cache, [1, 2, 3, 4, 5, 9, 9, 1]) == 7


def test_only_new_blocks_are_read() -> None:
    cache, engine = small(), Engine()
    assert engine.save(cache, list(range(10))) == 10
    assert engine.save(cache, list(range(14))) == 4
    assert engine.reads == [(0, 4), (4, 8), (8, 10), (10, 14)]
    assert engine.save(cache, list(range(13))) == 0
    cache._check()
    assert cache.stats().n_blocks == 4
    assert len(cache) == 1


def test_scopes_and_fingerprints_share_nothing() -> None:
    cache, tokens = small(), list(range(8))
    scopes = [None, "", "a", "None", "a\0", "\ud800", "a" * 1000]
    for scope in scopes:
        assert found(cache, tokens, scope=scope) == 0
        Engine().save(cache, tokens, scope=scope)
        assert found(cache, tokens, scope=scope) == 8
    with cache.namespace(b"other").plan(tokens) as plan:
        assert plan.n_tokens == 0
    # The fingerprint's end and the scope's beginning must not run together.
    with cache.namespace(b"ma", scope="").plan(tokens) as plan:
        assert plan.n_tokens == 0
    cache._check()


def test_clear_removes_one_scope_and_keeps_the_others() -> None:
    cache, tokens = small(), list(range(9))
    for scope in (None, "a", "b"):
        Engine().save(cache, tokens, scope=scope)
    assert cache.clear(scope="a") == 3
    assert cache.clear(scope="a") == 0
    assert found(cache, tokens, scope="a") == 0
    assert found(cache, tokens, scope="b") == found(cache, tokens) == 9
    cache._check()


def test_memory_trusts_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokcache.state.index.root_name", lambda *_: b"same")
    monkeypatch.setattr("tokcache.state.index.child_name", lambda *_: b"same")
    cache = small()
    Engine().save(cache, [1, 2, 3, 4], scope="a")
    assert found(cache, [1, 2, 3, 4], scope="b") == 0
    Engine().save(cache, [1, 2, 7, 7], scope="b")
    assert found(cache, [1, 2, 3, 4], scope="a") == 4
    assert found(cache, [1, 2, 7, 7], scope="b") == 4
    cache._check()


def test_bytes_are_bounded_and_leaves_go_first() -> None:
    block = 4 * 4 + NODE_BYTES + 16
    cache = small(ram_bytes=3 * block + ROOT)
    Engine().save(cache, [1, 1, 1, 1, 2, 2, 2, 2])
    Engine().save(cache, [1, 1, 1, 1, 3, 3, 3, 3])
    Engine().save(cache, [1, 1, 1, 1, 4, 4, 4, 4])  # evicts the leaf 2, not the shared block
    assert found(cache, [1, 1, 1, 1, 2, 2, 2, 2]) == 4
    assert found(cache, [1, 1, 1, 1, 3, 3, 3, 3]) == 8
    assert cache.stats().evictions == 1
    assert cache.memory_usage() <= 3 * block + ROOT
    cache._check()


def test_a_prompt_larger_than_the_budget_is_refused_and_evicts_nothing() -> None:
    cache = small(ram_bytes=2 * (NODE_BYTES + 32) + ROOT)
    Engine().save(cache, [1, 2, 3, 4])
    engine = Engine()
    assert engine.save(cache, list(range(100, 200))) == 0
    assert engine.reads == []
    assert cache.stats().refusals == {"over_budget": 1}
    assert found(cache, [1, 2, 3, 4]) == 4


def test_entries_are_bounded_and_the_least_recently_used_is_evicted() -> None:
    cache = small(max_entries=2)
    for first in (1, 2, 3):
        Engine().save(cache, [first] * 9)
        if first == 2:
            found(cache, [1] * 9)
    assert len(cache) == 2
    assert found(cache, [2] * 9) == 0
    assert found(cache, [1] * 9) == found(cache, [3] * 9) == 9
    cache._check()


def test_a_shorter_prefix_that_was_used_later_outlives_its_entry() -> None:
    cache = small(max_entries=2)
    Engine().save(cache, [1] * 9)
    Engine().save(cache, [2] * 9)
    assert found(cache, [1] * 4) == 4
    Engine().save(cache, [3] * 9)
    assert [found(cache, [first] * 9) for first in (1, 2, 3)] == [4, 0, 9]
    cache._check()


def test_one_growing_conversation_is_one_entry() -> None:
    cache = small(max_entries=1)
    for n_tokens in (3, 5, 6, 7, 12, 13):
        assert Engine().save(cache, list(range(n_tokens))) > 0
        assert len(cache) == 1
        assert found(cache, list(range(n_tokens))) == n_tokens
    assert cache.stats().refusals == {}


def test_blocks_in_use_are_not_evicted() -> None:
    cache = small(ram_bytes=2 * (NODE_BYTES + 32) + ROOT)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    Engine().save(cache, tokens)
    plan = cache.namespace(b"m").plan(tokens)
    assert Engine().save(cache, [9, 9, 9, 9]) == 0
    assert cache.stats().refusals == {"blocks_in_use": 1}
    assert restored(plan, tokens) == 8
    plan.close()
    assert Engine().save(cache, [9, 9, 9, 9]) == 4
    cache._check()


def test_a_plan_yields_nothing_once_cleared_and_its_buffers_are_not_used_again() -> None:
    cache, tokens = small(), [1, 2, 3, 4, 5, 6, 7, 8]
    Engine().save(cache, tokens)
    plan = cache.namespace(b"m").plan(tokens)
    cache.clear()
    assert cache.memory_usage() == 32  # a load may still read it: still counted
    Engine().save(cache, [9] * 8)
    assert b"".join(block.payload for block in plan.blocks) == state_of(tokens, 0, 8)
    assert plan.is_cleared
    assert restored(plan, tokens) == 0
    assert cache.stats().refusals == {"cleared": 1}
    del plan
    assert cache.stats().n_blocks == 2
    cache._check()


def test_a_failing_reader_costs_its_block_and_a_counter() -> None:
    cache, tokens = small(), list(range(12))
    assert Engine(fail_at=9).save(cache, tokens) == 8
    assert cache.stats().refusals == {"save_failed": 1}
    assert found(cache, tokens) == 8
    assert Engine().save(cache, tokens) == 4
    cache._check()


def test_a_failing_loader_keeps_the_blocks_before() -> None:
    cache, tokens = small(), list(range(12))
    Engine().save(cache, tokens)

    def load(start: int, _stop: int, _payload: memoryview) -> None:
        if start == 4:
            raise RuntimeError("rejected")

    with cache.namespace(b"m").plan(tokens) as plan:
        assert plan.restore(load) == 4
    assert cache.stats().refusals == {"restore_failed": 1}
    assert cache.stats().restored_tokens == 4


def test_the_blocks_before_a_lost_payload_are_served() -> None:
    cache, tokens = small(), list(range(12))
    Engine().save(cache, tokens)
    with cache.namespace(b"m").plan(tokens) as plan:
        lost = plan._nodes[-2]
    cache._store.memory.tier.lend(lost)
    assert found(cache, tokens) == 4
    assert cache.stats().refusals == {"payload_lost": 1}


@pytest.mark.parametrize("size", [-1, None, 1.5, "4", 1 << 65])
@pytest.mark.parametrize("ram_bytes", [1 << 20, 1 << 62])
def test_an_invalid_size_costs_a_counter(size: Any, ram_bytes: int) -> None:
    cache = small(ram_bytes=ram_bytes)
    sizes = {0: 4, 4: size}
    saved = cache.namespace(b"m").save(range(6), lambda *_: None, lambda start, _: sizes[start])
    assert (saved, len(cache), cache.memory_usage()) == (0, 0, 0)
    assert cache.stats().refusals == {"save_failed": 1}
    cache._check()


def test_an_interrupt_while_reading_gives_everything_back() -> None:
    cache = small()

    def read(_start: int, _stop: int, _buffer: memoryview) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.namespace(b"m").save([1, 2, 3, 4, 5], read, lambda a, b: 4 * (b - a))
    cache._check()
    assert (len(cache), cache._store.memory.overhead) == (0, 0)


def test_a_restore_starts_from_the_first_needed_block() -> None:
    cache, tokens = small(), list(range(12))
    Engine().save(cache, tokens)
    with cache.namespace(b"m").plan(tokens) as plan:
        starts: list[int] = []
        assert plan.start_beyond(5) == 4
        assert plan.start_beyond(12) == 12
        assert plan.restore(lambda start, _stop, _p: starts.append(start), start=4) == 12
    assert starts == [4, 8]
    assert cache.stats().restored_tokens == 8


def test_buffers_of_evicted_blocks_are_used_again() -> None:
    cache = PrefixStateCache(ram_bytes=200_000, block_tokens=4)

    def n_bytes(_start: int, _stop: int) -> int:
        return 90_000

    addresses = []
    for first in range(5):

        def read(_start: int, _stop: int, buffer: memoryview) -> None:
            addresses.append(np.frombuffer(buffer, np.uint8).ctypes.data)

        cache.namespace(b"m").save([first] * 4, read, n_bytes)
        cache._check()
    assert len(set(addresses)) == 2


def test_overhead_is_counted() -> None:
    cache = PrefixStateCache(ram_bytes=1 << 30, max_entries=100_000, block_tokens=16)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for first in range(3000):
        tokens = array("i", range(first * 50, first * 50 + 40))
        cache.namespace(b"m").save(tokens, lambda *_: None, lambda a, b: 64 * (b - a))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown, counted = after - before, cache.memory_usage()
    assert 0.8 * counted < grown < 1.05 * counted


def test_the_memory_of_names_is_counted() -> None:
    cache = PrefixStateCache(ram_bytes=1 << 30, max_entries=100_000, block_tokens=16)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for n in range(2000):
        Engine().save(cache, [1, 2, 3], b"m" * (n % 90), f"{n:04}" * (n % 70))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown, counted = after - before, cache.memory_usage()
    assert 0.8 * counted < grown < 1.05 * counted


def test_scopes_with_long_names_stay_within_the_budget() -> None:
    cache = small(max_entries=1000)
    for n in range(40):
        Engine().save(cache, [1, 2, 3], b"m" * 1000, f"{n}" + "s" * 100_000)
        assert cache.memory_usage() <= cache.ram_bytes
    assert 5 <= len(cache) <= 10
    cache._check()
    for root in list(cache._store.memory.index.roots.values()):
        cache.clear(scope=root.root_key.scope)
    assert cache.memory_usage() == 0


@pytest.mark.parametrize(("fingerprint", "scope"), [(b"m", "s" * (1 << 20)), (bytes(1 << 20), "s")])
def test_names_larger_than_the_budget_are_refused(fingerprint: bytes, scope: str) -> None:
    cache = small()
    Engine().save(cache, [1, 2, 3])
    assert Engine().save(cache, [1, 2, 3], fingerprint, scope) == 0
    assert cache.stats().refusals == {"over_budget": 1}
    assert found(cache, [1, 2, 3]) == 3
    cache._check()


def test_a_scope_removed_while_it_is_saved_stays_removed() -> None:
    cache = small()

    def read(_start: int, _stop: int, _buffer: memoryview) -> None:
        cache._check()
        cache.clear(scope="a")

    assert cache.namespace(b"m", scope="a").save([1, 2, 3], read, lambda a, b: b - a) == 0
    cache._check()
    assert (len(cache), cache._store.memory.overhead) == (0, 0)


@pytest.mark.parametrize("ids", [array("i", [1, 2, 3]), np.array([1, 2, 3], np.int32), (1, 2, 3)])
def test_any_int32_buffer_or_sequence_is_accepted(ids: object) -> None:
    cache = small()
    Engine().save(cache, [1, 2, 3, 4])
    with cache.namespace(b"m").plan(ids) as plan:
        assert plan.n_tokens == 3


@pytest.mark.parametrize("ids", [["a"], [2**31], b"abcd", np.zeros((2, 2), np.int32), 7])
def test_ids_that_are_not_int32_are_a_clear_error(ids: object) -> None:
    cache = small()
    with pytest.raises(InvalidTokens):
        cache.namespace(b"m").plan(ids)
    cache._check()


@pytest.mark.parametrize("name", ["ram_bytes", "max_entries", "block_tokens"])
def test_budgets_of_zero_or_below_are_refused(name: str) -> None:
    for value in (0, -1, 1.5, True, None):
        with pytest.raises(InvalidConfig, match=name):
            PrefixStateCache(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("fingerprint", ["m", None, 7, bytearray(b"m")])
def test_a_fingerprint_is_bytes(fingerprint: Any) -> None:
    cache = small()
    with pytest.raises(InvalidConfig, match="fingerprint"):
        cache.namespace(fingerprint).plan([1])
    with pytest.raises(InvalidConfig, match="fingerprint"):
        cache.namespace(fingerprint).save([1], lambda *_: None, lambda *_: 4)
    cache._check()


@pytest.mark.parametrize("max_tokens", ["3", 1.5, True])
def test_max_tokens_is_an_int(max_tokens: Any) -> None:
    with pytest.raises(InvalidConfig, match="max_tokens"):
        small().namespace(b"m").plan([1], max_tokens=max_tokens)


def test_a_save_while_the_cache_closes_leaves_nothing() -> None:
    cache = small()

    class Lock:
        """Runs a save as soon as the lock is free: between any two steps of `close`."""

        def __init__(self, lock: threading.Lock) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            cache._store.lock = self.lock
            Engine().save(cache, [1, 2, 3, 4])

    cache._store.lock = Lock(cache._store.lock)  # type: ignore[assignment]
    cache.close()
    assert (len(cache), cache.memory_usage()) == (0, 0)


def test_a_save_that_ends_after_the_cache_closed_leaves_nothing() -> None:
    cache = small()
    saved = cache.namespace(b"m").save([1, 2], lambda *_: cache.close(), lambda a, b: b - a)
    assert (saved, len(cache)) == (0, 0)
    saved = small().namespace(b"m").save([1, 2], lambda *_: None, lambda a, b: b - a)
    assert saved == 2


def test_a_cache_that_closes_while_sizes_are_asked_for_stores_nothing() -> None:
    cache = small()

    def n_bytes(start: int, stop: int) -> int:
        cache.close()
        return stop - start

    assert cache.namespace(b"m").save([1, 2], lambda *_: None, n_bytes) == 0
    assert len(cache) == 0
    cache._check()


def test_a_closed_cache_finds_and_stores_nothing() -> None:
    cache = small()
    Engine().save(cache, [1, 2, 3, 4])
    cache.close()
    assert Engine().save(cache, [1, 2, 3, 4]) == 0
    assert found(cache, [1, 2, 3, 4]) == 0
    assert cache.memory_usage() == 0


def test_many_threads_save_and_restore_the_right_states() -> None:
    cache, failures = small(ram_bytes=40 * NODE_BYTES, max_entries=8), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            tokens = rng.integers(0, 2, rng.integers(1, 20)).tolist()
            try:
                with cache.namespace(b"m").plan(tokens) as plan:
                    restored(plan, tokens)
                Engine().save(cache, tokens)
            except Exception as error:  # noqa: BLE001
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache._check()
    assert failures == []
    assert {node.pins for node in cache._store.memory.index.nodes()} <= {0}


@pytest.mark.parametrize("stem", [[], [7, 7, 7, 7]])
def test_saves_that_end_together_stay_within_max_entries(stem: list[int]) -> None:
    cache, barrier = small(max_entries=1), threading.Barrier(8)
    Engine().save(cache, stem)

    def read(_start: int, _stop: int, _buffer: memoryview) -> None:
        barrier.wait(10)

    def work(token: int) -> None:
        cache.namespace(b"m").save([*stem, token], read, lambda a, b: b - a)

    threads = [threading.Thread(target=work, args=(token,)) for token in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache._check()
    assert len(cache) == 1
    stats = cache.stats()
    assert stats.evictions + stats.refusals.get("entries_in_use", 0) == 7


def test_a_save_is_refused_if_all_entries_came_into_use_meanwhile() -> None:
    cache, plans = small(max_entries=1), []

    def read(_start: int, _stop: int, _buffer: memoryview) -> None:
        Engine().save(cache, [1, 2, 3])
        plans.append(cache.namespace(b"m").plan([1, 2, 3]))

    assert cache.namespace(b"m").save([9, 9, 9], read, lambda a, b: b - a) == 0
    assert cache.stats().refusals == {"entries_in_use": 1}
    assert found(cache, [1, 2, 3]) == 3
    cache._check()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_keeps_the_states_that_were_not_in_use() -> None:
    cache = small()
    Engine().save(cache, [1, 2, 3, 4])
    Engine().save(cache, [5, 6, 7, 8])
    plan = cache.namespace(b"m").plan([1, 2, 3, 4])
    cache._store.lock.acquire()
    cache._store.lock.release()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            cache._check()
            kept = (found(cache, [1, 2, 3, 4]), found(cache, [5, 6, 7, 8]))
            Engine().save(cache, [9] * 8)
            cache._check()
            code = 0 if kept == (0, 4) and found(cache, [9] * 8) == 8 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert restored(plan, [1, 2, 3, 4]) == 4
    plan.close()
    cache._check()


def test_states_of_lower_priority_are_evicted_first() -> None:
    cache = small(max_entries=2)
    for first, priority in ((1, 5), (2, 0)):
        cache.namespace(b"m").save(
            [first] * 4, lambda *_: None, lambda a, b: b - a, priority=priority
        )
    with cache.namespace(b"m").plan([2] * 4) as plan:  # used last, but of lower priority
        assert plan.n_tokens == 4
    Engine().save(cache, [3] * 4)
    with cache.namespace(b"m").plan([1] * 4) as plan:
        assert plan.n_tokens == 4
    with cache.namespace(b"m").plan([2] * 4) as plan:
        assert plan.n_tokens == 0


def test_states_unused_for_ttl_s_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tokcache.state.memory.time.monotonic", lambda: now[0])
    cache = small(ttl_s=10)
    Engine().save(cache, [1] * 8)
    Engine().save(cache, [2] * 4)
    now[0] += 9
    assert found(cache, [1] * 4) == 4  # restarts the time of this block, not of the next one
    now[0] += 2
    assert found(cache, [1] * 8) == 4
    cache._check()
    assert cache.stats().n_blocks == 1  # the other prompt expired without a look-up
    assert cache.stats().expirations == 2


def test_an_expired_block_that_is_in_use_stays_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tokcache.state.memory.time.monotonic", lambda: now[0])
    cache = small(ttl_s=10)
    Engine().save(cache, [1] * 8)
    plan = cache.namespace(b"m").plan([1] * 8)
    now[0] += 11
    assert found(cache, [1] * 8) == 0
    assert restored(plan, [1] * 8) == 8
    plan.close()
    cache._check()


def test_prefixes_below_min_tokens_are_neither_saved_nor_used() -> None:
    cache = small(min_tokens=5)
    assert Engine().save(cache, [1] * 4) == 0
    assert Engine().save(cache, [1] * 5) == 5
    assert found(cache, [1] * 4) == 0
    assert found(cache, [1] * 5) == 5
    cache._check()


def test_a_cache_that_is_switched_off_does_nothing(tmp_path: Path) -> None:
    cache = small(enabled=False, disk=tmp_path / "d")
    assert Engine().save(cache, [1] * 5) == 0
    assert found(cache, [1] * 5) == 0
    assert not cache.namespace(b"m").store([1], b"x")
    assert cache.namespace(b"m").find([1]) is None
    assert len(cache) == 0
    assert cache.memory_usage() == 0
    assert not (tmp_path / "d").exists()
