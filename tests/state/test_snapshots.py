"""Snapshots: states of whole prefixes, opaque bytes of any engine."""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokcache.errors import InvalidConfig, InvalidTokens, StateError
from tokcache.state.cache import PrefixStateCache
from tokcache.state.reasons import MissReason
from tokcache.state.tiers.disk import DiskTier
from tokcache.state.tiers.disk.files import STEP_S


def hit(cache: PrefixStateCache, tokens: list[int], scope: str | None = None) -> bytes | None:
    handle = cache.namespace(b"m", scope=scope).find(tokens)
    if handle is None:
        return None
    with handle:
        return bytes(handle.state)


def test_the_longest_stored_prefix_is_found() -> None:
    cache = PrefixStateCache()
    assert len(cache) == 0
    for n_tokens in (2, 4, 6):
        assert cache.namespace(b"m").store(list(range(n_tokens)), b"%d" % n_tokens)
    cache.namespace(b"m").store([0, 1, 2, 9, 9, 9, 9, 9], b"longer, but diverging")
    assert hit(cache, list(range(100))) == b"6"
    assert hit(cache, list(range(5))) == b"4"
    assert hit(cache, [0, 1, 2, 3, 9]) == b"4"
    assert hit(cache, [0, 1, 7]) == b"2"
    assert hit(cache, [0]) is None
    assert hit(cache, []) is None
    assert hit(cache, [0, 1], scope="a") is None
    assert cache.namespace(b"n").find([0, 1]) is None
    assert len(cache) == 4
    assert len(cache) > 0
    cache._check()


def test_a_handle_describes_its_state() -> None:
    cache, before = PrefixStateCache(), time.time()
    cache.namespace(b"m").store([1, 2, 3], b"abc", n_past=7, priority=4)
    hit(cache, [1, 2, 3])
    with cache.namespace(b"m").find([1, 2, 3, 4]) as handle:  # type: ignore[union-attr]
        assert (handle.n_tokens, handle.n_past, handle.priority, handle.n_bytes) == (3, 7, 4, 3)
        assert handle.hits == 2
        assert before <= handle.last_used <= time.time()
        assert handle.state.readonly
        with pytest.raises(TypeError):
            handle.state[0] = 1
    stats = cache.stats()
    assert (stats.lookups, stats.hits, stats.prompt_tokens, stats.restored_tokens) == (2, 2, 7, 6)
    assert stats.hit_rate == 1.0
    assert stats.n_states == 1


def test_the_payload_is_not_copied_on_a_hit() -> None:
    cache = PrefixStateCache()
    cache.namespace(b"m").store([1], bytes(1 << 20))
    handles = [cache.namespace(b"m").find([1]) for _ in range(2)]
    addresses = {np.frombuffer(h.state, np.uint8).ctypes.data for h in handles if h}
    assert len(addresses) == 1


def test_later_changes_of_the_stored_buffer_are_not_seen() -> None:
    cache, state = PrefixStateCache(), bytearray(b"abc")
    cache.namespace(b"m").store([1], state)
    state[:] = b"xyz"
    assert hit(cache, [1]) == b"abc"


def test_the_same_tokens_replace_by_priority_and_the_highest_is_found() -> None:
    cache = PrefixStateCache()
    for priority, state in ((0, b"old"), (0, b"new"), (5, b"high"), (1, b"middle")):
        cache.namespace(b"m").store([1, 2], state, priority=priority)
    assert len(cache) == 3
    assert hit(cache, [1, 2]) == b"high"
    with cache.namespace(b"m").find([1, 2]) as handle:  # type: ignore[union-attr]
        assert handle.remove() == 1
    assert hit(cache, [1, 2]) == b"middle"
    cache._check()


def test_defaults_are_small_and_budgets_hold() -> None:
    cache = PrefixStateCache()
    assert (cache.max_entries, cache.ram_bytes) == (32, 256 << 20)
    for first in range(40):
        cache.namespace(b"m").store([first], bytes(10))
    assert len(cache) == 32
    small = PrefixStateCache(ram_bytes=100_000)
    assert not small.namespace(b"m").store([1], bytes(100_000))
    assert small.stats().refusals == {"over_budget": 1}
    for first in range(40):
        assert small.namespace(b"m").store([first], bytes(20_000))
        assert small.memory_usage() <= 100_000
    small._check()


def test_eviction_goes_by_priority_then_use_and_spares_pins() -> None:
    cache = PrefixStateCache(max_entries=3)
    cache.namespace(b"m").store([1], b"1", priority=-1, pin=True)
    cache.namespace(b"m").store([2], b"2", priority=9)
    cache.namespace(b"m").store([3], b"3")
    cache.namespace(b"m").store([4], b"4")
    assert [hit(cache, [n]) for n in (1, 2, 3, 4)] == [b"1", b"2", None, b"4"]
    handle = cache.namespace(b"m").handle([1])
    assert handle is not None
    assert handle.pin(is_pinned=False)
    handle.close()
    cache.namespace(b"m").store([5], b"5")
    assert [hit(cache, [n]) for n in (1, 2, 4, 5)] == [None, b"2", b"4", b"5"]
    cache._check()


def test_touch_makes_a_state_recent() -> None:
    cache = PrefixStateCache(max_entries=2)
    cache.namespace(b"m").store([1], b"1")
    cache.namespace(b"m").store([2], b"2")
    with cache.namespace(b"m").handle([1]) as handle:  # type: ignore[union-attr]
        assert handle.touch()
    cache.namespace(b"m").store([3], b"3")
    assert [hit(cache, [n]) for n in (1, 2, 3)] == [b"1", None, b"3"]
    assert not handle.touch()


def test_a_handle_in_use_keeps_its_state_and_goes_stale_when_that_is_removed() -> None:
    cache = PrefixStateCache(max_entries=1)
    cache.namespace(b"m").store([1], b"one")
    handle = cache.namespace(b"m").find([1])
    assert handle is not None
    assert not cache.namespace(b"m").store([2], b"two")
    assert cache.stats().refusals == {"entries_in_use": 1}
    view = handle.state
    cache.clear()
    assert handle.is_stale
    with pytest.raises(StateError, match="removed"):
        _ = handle.state
    assert cache.namespace(b"m").store([2], b"two")
    assert bytes(view) == b"one"  # a view keeps its bytes
    handle.close()
    with pytest.raises(StateError, match="closed"):
        _ = handle.state
    cache._check()


def test_a_collected_handle_releases_its_state() -> None:
    cache = PrefixStateCache(max_entries=1)
    cache.namespace(b"m").store([1], b"one")
    cache.namespace(b"m").find([1])
    gc.collect()
    assert cache.namespace(b"m").store([2], b"two")
    cache._check()


def test_blocks_and_snapshots_share_one_budget_and_never_mix() -> None:
    cache = PrefixStateCache(max_entries=2, block_tokens=4)
    args = (lambda *_: None, lambda a, b: b - a)
    cache.namespace(b"m").save([1, 2, 3, 4], *args)
    cache.namespace(b"m").store([1, 2, 3, 4], b"whole")
    assert hit(cache, [1, 2, 3, 4]) == b"whole"
    with cache.namespace(b"m").plan([1, 2, 3, 4]) as plan:
        assert [block.payload.nbytes for block in plan.blocks] == [4]
    cache.namespace(b"m").store([7], b"evicts the least recent")
    assert hit(cache, [1, 2, 3, 4]) is None
    cache._check()


def test_states_expire_but_pinned_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("tokcache.state.memory.time.monotonic", lambda: now[0])
    cache = PrefixStateCache(ttl_s=10)
    cache.namespace(b"m").store([1], b"1")
    cache.namespace(b"m").store([2], b"2", pin=True)
    now[0] += 11
    assert hit(cache, [1]) is None
    assert hit(cache, [2]) == b"2"
    assert cache.stats().expirations == 1
    cache._check()


@pytest.mark.parametrize("encryption_key", [None, b"e" * 32])
def test_after_a_restart_states_come_from_the_disk(
    tmp_path: Path, encryption_key: bytes | None
) -> None:
    tier = DiskTier(tmp_path, encryption_key=encryption_key)
    first = PrefixStateCache(disk=tier)
    for n_tokens in (2, 4):
        first.namespace(b"m").store(list(range(n_tokens)), b"%d" % n_tokens, n_past=9)
    first.namespace(b"m").store([7], b"")
    first.close()
    second = PrefixStateCache(disk=tier)
    assert hit(second, [0, 1, 2]) == b"2"
    with second.namespace(b"m").find(list(range(9))) as handle:  # type: ignore[union-attr]
        assert (bytes(handle.state), handle.n_tokens, handle.n_past) == (b"4", 4, 9)
        assert handle.remove() == 1
    assert hit(second, list(range(9))) == b"2"
    assert hit(second, [7]) == b""
    third = PrefixStateCache(disk=tier)
    assert hit(third, list(range(9))) == b"2"  # removed from the disk, too
    second._check()


def test_a_state_larger_than_memory_is_served_from_its_file(tmp_path: Path) -> None:
    state = os.urandom(1 << 20)
    writer = PrefixStateCache(disk=tmp_path)
    writer.namespace(b"m").store([1, 2], state)
    writer.close()
    reader = PrefixStateCache(disk=tmp_path, ram_bytes=10_000)
    with reader.namespace(b"m").find([1, 2, 3]) as handle:  # type: ignore[union-attr]
        assert handle.state == state
        assert reader.memory_usage() == 0
        reader.clear()
        assert handle.is_stale
    assert reader.namespace(b"m").find([1, 2, 3]) is None


def test_a_state_stored_by_another_process_meanwhile_is_found(tmp_path: Path) -> None:
    ours, theirs = PrefixStateCache(disk=tmp_path), PrefixStateCache(disk=tmp_path)
    assert hit(ours, [1, 2]) is None
    theirs.namespace(b"m").store([1], b"1")
    theirs.flush()
    assert hit(ours, [1, 2]) == b"1"
    theirs.namespace(b"m").store([1, 2], b"2")
    theirs.flush()
    assert hit(ours, [1, 2]) == b"2"


def test_a_folder_whose_time_was_set_back_is_listed_again(tmp_path: Path) -> None:
    ours, theirs = PrefixStateCache(disk=tmp_path), PrefixStateCache(disk=tmp_path)
    theirs.namespace(b"m").store([1], b"1")
    theirs.flush()
    (folder,) = {path.parent for path in tmp_path.rglob("*.0")}
    before = folder.stat()
    time.sleep(2 * STEP_S)  # after that a listing is remembered
    assert hit(ours, [1, 2, 3]) == b"1"
    theirs.namespace(b"m").store([1, 2], b"2")
    theirs.flush()
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and tar leave it
    assert hit(ours, [1, 2, 3]) == b"2"


def test_a_closed_store_finds_and_stores_nothing() -> None:
    cache = PrefixStateCache()
    cache.namespace(b"m").store([1], b"1")
    cache.close()
    assert not cache.namespace(b"m").store([1], b"1")
    assert hit(cache, [1]) is None


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"tokens": []}, InvalidTokens),
        ({"state": "text"}, InvalidConfig),
        ({"state": np.zeros((4, 4))[:, ::2]}, InvalidConfig),
        ({"n_past": -1}, InvalidConfig),
        ({"n_past": "3"}, InvalidConfig),
        ({"priority": 1.5}, InvalidConfig),
        ({"fingerprint": "m"}, InvalidConfig),
    ],
)
def test_an_invalid_argument_of_store_is_a_clear_error(
    settings: Any, error: type[Exception]
) -> None:
    cache = PrefixStateCache()
    given = {"tokens": [1], "state": b"x", "fingerprint": b"m", **settings}
    with pytest.raises(error):
        cache.namespace(given.pop("fingerprint")).store(**given)
    assert len(cache) == 0


@pytest.mark.parametrize("n_opening", [0, 4])
def test_overhead_is_counted(n_opening: int) -> None:
    cache = PrefixStateCache(ram_bytes=1 << 30, max_entries=100_000)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for first in range(3000):
        tokens = range(first, first + 40)
        cache.namespace(b"m").fill(tokens, 300, lambda _: None, n_opening=n_opening)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown, counted = after - before, cache.memory_usage()
    assert 0.65 * counted < grown < 1.05 * counted  # 0.699 if NumPy was imported before
    cache._check()


def test_fill_stores_the_bytes_that_the_caller_copies() -> None:
    cache = PrefixStateCache()

    def read(buffer: memoryview) -> None:
        buffer[:] = b"abc"

    assert cache.namespace(b"m", scope="a").fill([1, 2], 3, read)
    assert hit(cache, [1, 2, 3], scope="a") == b"abc"
    assert hit(cache, [1, 2, 3]) is None
    for wrong in (lambda _: 1 / 0, lambda buffer: buffer.__setitem__(slice(0, 9), b"x" * 9)):
        assert not cache.namespace(b"m").fill([4, 5], 3, wrong)
    assert not cache.namespace(b"m").fill([4, 5], 1 << 40, read)
    assert not cache.namespace(b"m").fill([4, 5], -1, read)
    assert cache.stats().refusals == {"save_failed": 3, "over_budget": 1}
    assert hit(cache, [4, 5]) is None
    with pytest.raises(InvalidTokens):
        cache.namespace(b"m").fill([], 3, read)
    assert not PrefixStateCache(enabled=False).namespace(b"m").fill([1], 3, read)
    cache._check()


def test_an_uncounted_lookup_leaves_the_counters_alone() -> None:
    cache = PrefixStateCache()
    cache.namespace(b"m").store([1, 2], b"abc")
    with cache.namespace(b"m").find([1, 2, 3], is_counted=False) as handle:  # type: ignore[union-attr]
        assert handle.payload() == b"abc"
    with pytest.raises(StateError, match="closed"):
        handle.payload()
    stats = cache.stats()
    assert (stats.lookups, stats.hits, stats.prompt_tokens, stats.restored_tokens) == (0, 0, 0, 0)
    cache.namespace(b"m").count_restored(2, 0.5, is_hit=True)
    stats = cache.stats()
    assert (stats.hits, stats.restored_tokens, stats.restore_seconds) == (1, 2, 0.5)


@pytest.mark.parametrize("keep", [lambda view: view, lambda view: view[10:20], np.frombuffer])
def test_a_kept_view_never_shows_another_state(keep: Any) -> None:
    cache = PrefixStateCache(ram_bytes=1 << 20, max_entries=4)
    cache.namespace(b"m", scope="a").store([1], b"A" * 100_000)
    with cache.namespace(b"m", scope="a").find([1]) as handle:  # type: ignore[union-attr]
        kept = keep(handle.state) if keep is not np.frombuffer else keep(handle.state, np.uint8)
    for number in range(50):
        cache.namespace(b"m", scope="b").store([100 + number], b"B" * 100_000)
        assert set(bytes(kept)) == {ord("A")}
        cache._check()
    assert cache.memory_usage() <= 1 << 20


def test_a_buffer_without_views_is_used_again() -> None:
    cache = PrefixStateCache(ram_bytes=1 << 20, max_entries=1)
    cache.namespace(b"m").store([0], b"A" * 100_000)
    for number in range(1, 20):
        hit(cache, [number - 1])
        cache.namespace(b"m").store([number], b"B" * 100_000)
    assert cache.memory_usage() < 250_000
    cache._check()


def test_the_least_recently_used_states_of_a_conversation_go_first() -> None:
    cache = PrefixStateCache(max_entries=100, conversation_snapshots=3)
    states = cache.namespace(b"m", scope="a")
    opening = [1, 2, 3]

    def fill(tokens: list[int], n_opening: int = 3) -> None:
        assert states.fill(
            tokens, 3, lambda buffer: buffer.__setitem__(slice(None), b"abc"), n_opening=n_opening
        )

    def held(tokens: list[int]) -> bool:
        found = states.handle(tokens)
        if found is not None:
            found.close()
        return found is not None

    prompts = [[*opening, *range(10, 10 + n)] for n in range(1, 6)]
    fill(prompts[0])
    fill(prompts[1])
    found = states.find(prompts[0])  # used after the second was stored
    assert found is not None
    found.close()
    fill(prompts[2])
    fill(prompts[3])
    assert [held(each) for each in prompts] == [True, False, True, True, False]
    fill([7, 8, 9, 10])  # another conversation, and one that is not known
    fill([*opening, 99], n_opening=0)
    assert [held(each) for each in prompts] == [True, False, True, True, False]
    miss = states.find_miss(prompts[1])
    assert (miss.reason, miss.detail) == (MissReason.EVICTED, "ram: conversation_snapshots")
    in_use = states.handle(prompts[0])
    assert in_use is not None
    fill(prompts[4])  # the next one goes
    in_use.close()
    assert [held(each) for each in prompts] == [True, False, False, True, True]
    stats = cache.stats()
    assert (stats.evictions, stats.saved_bytes, stats.n_states) == (2, 21, 5)
    cache._check()


def test_a_conversation_has_at_most_half_of_all_entries() -> None:
    cache = PrefixStateCache(max_entries=4, conversation_snapshots=100)
    states = cache.namespace(b"m")
    for n in range(1, 5):
        states.fill([1, 2, 3, *range(n)], 3, lambda _: None, n_opening=3)
    assert cache.stats().n_states == 2
