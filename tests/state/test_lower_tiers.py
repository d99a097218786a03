"""Every tier below memory: processes find each other's states, and only those of their scope."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.state.engine import Engine, state_of
from tests.state.test_disk import IDS, KEYS, SECRET, found, int32
from tokcache.state.names import RootKey
from tokcache.state.write_behind import Job

if TYPE_CHECKING:
    from tests.state.media import Medium


@pytest.mark.parametrize("keys", KEYS, ids=IDS)
@pytest.mark.parametrize("aligned", [False, True])
def test_after_a_restart_the_first_prompt_comes_from_below(
    medium: Medium, keys: Any, aligned: bool
) -> None:
    first = medium.cache(medium.tier(**keys))
    Engine().save(first, SECRET, aligned=aligned)
    branch = [*SECRET[:21], *range(20)]
    Engine().save(first, branch, aligned=aligned)
    first.close()
    second = medium.cache(medium.tier(**keys))
    for tokens in (SECRET, branch):
        expected = len(tokens) // 8 * 8 if aligned else len(tokens)
        assert found(second, tokens, aligned=aligned) == expected
    second._check()
    assert second.stats().promoted_tokens == (40 + 24 if aligned else 40 + 20)
    assert found(second, SECRET, scope="a", aligned=aligned) == 0
    assert found(second, SECRET, fingerprint=b"n", aligned=aligned) == 0
    assert found(second, SECRET, aligned=not aligned) == 0
    assert second.stats().refusals == {}
    second.close()


def test_another_process_finds_short_blocks_and_points_inside_blocks(medium: Medium) -> None:
    ours, theirs = medium.cache(), medium.cache()
    Engine().save(ours, [1, 2, 3])
    Engine().save(ours, [1, 2, 3, 4, 5, 6])
    Engine().save(ours, [1, 2, 3, 4, 9, 9, 9])
    assert ours.flush()
    assert found(theirs, [1, 2, 3, 4, 9, 9, 9]) == 7
    assert found(theirs, [1, 2, 3, 4, 5, 6]) == 6
    # The second cache extends a chain of the first, and the first finds that.
    Engine().save(theirs, [1, 2, 3, 4, 9, 9, 9, 8, 8])
    assert theirs.flush()
    assert found(ours, [1, 2, 3, 4, 9, 9, 9, 8, 8]) == 9
    assert getattr(ours.stats(), medium.label).hits > 0
    for cache in (ours, theirs):
        cache._check()
        cache.close()


def test_blocks_that_two_processes_store_at_once_both_get_a_place(medium: Medium) -> None:
    caches = [medium.cache() for _ in range(2)]
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 7, 7]]
    both_saved = threading.Event()
    for cache, tokens in zip(caches, prompts, strict=True):
        cache._store.below[0].writer.put(Job("other", 0, lambda: both_saved.wait(10)))
        Engine().save(cache, tokens)
    both_saved.set()
    for cache in caches:
        cache.close()
    assert [found(medium.cache(), tokens) for tokens in prompts] == [6, 6]
    # A cache that has the first block in memory extends that one.
    both = medium.cache()
    assert [found(both, tokens) for tokens in prompts] == [6, 3]
    Engine().save(both, prompts[1])
    both.close()
    fresh = medium.cache()
    assert [found(fresh, tokens) for tokens in prompts] == [6, 6]
    fresh._check()


def test_a_longer_block_replaces_the_shorter_and_keeps_its_followers(
    medium: Medium,
) -> None:
    writer = medium.cache()
    Engine().save(writer, [1, 2, 3])
    Engine().save(writer, [1, 2, 3, 9, 9])
    writer.close()
    # Saved by a process that has not looked below: the block [1, 2, 3, 4, 5].
    blind = medium.cache()
    blind._store.below, below = (), blind._store.below
    Engine().save(blind, [1, 2, 3, 4, 5])
    blind._store.below = below
    Engine().save(blind, [1, 2, 3, 4, 5])  # only the missing part is written
    blind.close()
    fresh = medium.cache()
    assert found(fresh, [1, 2, 3, 4, 5]) == 5
    assert found(fresh, [1, 2, 3, 9, 9]) == 5
    assert len(medium.states()) == 2
    fresh.close()


def test_evicted_blocks_are_served_from_below(medium: Medium) -> None:
    cache = medium.cache(max_entries=2)
    prompts = [[first] * 20 for first in range(10)]
    for tokens in prompts:
        Engine().save(cache, tokens)
        cache.flush()
    assert [found(cache, tokens) for tokens in prompts] == [20] * 10
    assert cache.stats().evictions > 0
    cache._check()
    cache.close()


@pytest.mark.parametrize("keys", KEYS, ids=IDS)
def test_blocks_without_room_in_memory_are_served_from_below(medium: Medium, keys: Any) -> None:
    writer = medium.cache(medium.tier(**keys))
    Engine().save(writer, SECRET)
    writer.namespace(b"m").store([1, 2], bytes(9000))
    writer.close()
    tiny = medium.cache(medium.tier(**keys), ram_bytes=3000)
    assert found(tiny, SECRET) == 40
    with tiny.namespace(b"m").find([1, 2]) as handle:  # type: ignore[union-attr]
        assert bytes(handle.state) == bytes(9000)
        assert handle.state.readonly
    tiny._check()
    assert tiny.memory_usage() <= 3000
    tiny.close()


@pytest.mark.parametrize("keys", [{}, {"encryption_key": b"e" * 16}], ids=["plain", "encrypted"])
def test_views_of_blocks_stay_within_the_memory_budget(medium: Medium, keys: Any) -> None:
    block_bytes = 3000

    def read(start: int, _stop: int, buffer: memoryview) -> None:
        buffer[:] = bytes([start]) * len(buffer)

    writer = medium.cache(medium.tier(**keys))
    writer.namespace(b"m").save(SECRET, read, lambda *_: block_bytes)
    writer.close()
    tiny = medium.cache(medium.tier(**keys), ram_bytes=7000)
    user = tiny.namespace(b"m").plan(SECRET[:1])  # blocks in use leave no room
    with user, tiny.namespace(b"m").plan(SECRET) as plan:
        for block in plan.blocks:
            assert block.payload == bytes([block.start]) * block_bytes
        is_mapped = medium.label == "disk" and not keys
        assert plan.n_tokens == (40 if is_mapped else 24)
    label = medium.label
    assert tiny.stats().refusals.get(f"{label}: no_room") == (None if is_mapped else 1)
    tiny._check()
    tiny.close()


def test_encrypted_states_show_neither_tokens_nor_states(medium: Medium) -> None:
    secrets = int32(SECRET[:8]), state_of(SECRET, 0, 8)
    for keys, shows in (({"encryption_key": b"e" * 32}, False), ({}, True)):
        cache = medium.cache(medium.tier(**keys))
        Engine().save(cache, SECRET)
        cache.close()
        held = medium.all_bytes()
        assert [secret in held for secret in secrets] == [shows, shows]


@pytest.mark.parametrize("keys", KEYS, ids=IDS)
def test_clearing_a_scope_removes_its_bytes(medium: Medium, keys: Any) -> None:
    cache = medium.cache(medium.tier(**keys))
    other = list(range(9001, 9041))
    Engine().save(cache, SECRET, scope="a")
    Engine().save(cache, other, scope="b")
    Engine().save(cache, other)
    cache.namespace(b"m", scope="a").store(SECRET, b"the state of a")
    cache.flush()
    held = medium.all_bytes()
    secrets = int32(SECRET[:8]), state_of(SECRET, 8, 16), b"the state of a"
    names = [medium.tier(**keys).codec.scope(scope).hex().encode() for scope in ("a", "b")]
    assert [name in held for name in names] == [True, True]
    assert [secret in held for secret in secrets] == ["encryption_key" not in keys] * 3
    n_before = len(medium.states())
    assert cache.clear(scope="a") == 6
    assert len(medium.states()) == n_before - 6
    held = medium.all_bytes()
    assert not any(secret in held for secret in secrets)
    assert [name in held for name in names] == [False, True]
    assert found(cache, SECRET, scope="a") == 0
    assert cache.namespace(b"m", scope="a").find(SECRET) is None
    assert found(cache, other, scope="b") == found(cache, other) == 40
    assert found(medium.cache(medium.tier(**keys)), other, scope="b") == 40
    assert cache.clear(scope="a") == 0
    cache.clear()
    assert medium.states() == {}
    assert found(cache, other) == 0
    cache.close()


def test_a_waiting_write_is_dropped_when_its_scope_is_cleared(medium: Medium) -> None:
    cache = medium.cache()
    gate = threading.Event()
    cache._store.below[0].writer.put(Job("other", 0, lambda: gate.wait(10)))
    Engine().save(cache, SECRET, scope="a")
    assert cache.clear(scope="a") == 5
    gate.set()
    assert cache.flush()
    assert medium.states() == {}
    cache._check()
    cache.close()


def test_another_key_finds_nothing_and_destroys_nothing(medium: Medium) -> None:
    good = medium.cache(medium.tier(hmac_key=b"a" * 32))
    Engine().save(good, SECRET, scope="a")
    good.close()
    before = medium.states()
    for keys in ({"hmac_key": b"b" * 32}, {}, {"encryption_key": b"a" * 32}):
        bad = medium.cache(medium.tier(**keys))
        assert found(bad, SECRET, scope="a") == 0
        assert bad.clear(scope="a") == 0
        bad.close()
    assert medium.states() == before
    assert found(medium.cache(medium.tier(hmac_key=b"a" * 32)), SECRET, scope="a") == 40


def test_a_state_with_the_mac_of_another_key_is_refused(medium: Medium) -> None:
    for key in (b"a" * 32, b"b" * 32):
        cache = medium.cache(medium.tier(hmac_key=key))
        Engine().save(cache, [1, 2, 3])
        cache.close()
        if key == b"a" * 32:
            (ours,) = medium.states()
    (forged,) = (state for name, state in medium.states().items() if name != ours)
    medium.put(ours, forged)
    cache = medium.cache(medium.tier(hmac_key=b"a" * 32))
    assert found(cache, [1, 2, 3]) == 0
    assert cache.stats().refusals == {f"{medium.label}: forged": 1}
    assert ours not in medium.states()
    cache.close()


def test_a_state_copied_to_another_scope_is_refused(medium: Medium) -> None:
    cache = medium.cache()
    Engine().save(cache, [1, 2, 3], scope="a")
    Engine().save(cache, [1, 2, 3], scope="b")
    Engine().save(cache, [1, 2, 3], fingerprint=b"n", scope="a")
    cache.close()
    everyone = medium.states()
    assert len(everyone) == 3
    for name, own in everyone.items():
        for state in everyone.values():
            if state == own:
                continue
            medium.put(name, state)
            root_keys = (b"m", "a"), (b"m", "b"), (b"n", "a")
            fresh = medium.cache()
            hits = [found(fresh, [1, 2, 3], fingerprint=f, scope=s) for f, s in root_keys]
            assert sorted(hits) == [0, 3, 3]
            assert fresh.stats().refusals == {f"{medium.label}: misfiled": 1}
            medium.put(name, own)


@pytest.mark.parametrize("scope", ["*", "[a-z]", "a:b", "{a}", "tenant-a", "\r\nFLUSHALL\r\n"])
def test_scopes_are_apart_and_their_names_are_not_stored(medium: Medium, scope: str) -> None:
    cache = medium.cache()
    Engine().save(cache, [1, 2, 3], scope=scope)
    Engine().save(cache, [1, 2, 3], scope="b")
    Engine().save(cache, [1, 2, 3])
    cache.flush()
    if len(scope) > 5:  # a shorter one may occur in a digest by chance
        assert scope.encode() not in medium.all_bytes()
    fresh = medium.cache()
    assert found(fresh, [1, 2, 3], scope=scope) == 3
    assert found(fresh, [1, 2, 3], scope=scope + "x") == 0
    assert cache.clear(scope=scope) == 1
    assert len(medium.states()) == 2
    assert found(medium.cache(), [1, 2, 3], scope="b") == 3
    cache.close()


def test_a_full_queue_drops_and_counts_and_the_next_save_writes_the_rest(
    medium: Medium,
) -> None:
    cache = medium.cache(queue_bytes=100)
    gate = threading.Event()
    cache._store.below[0].writer.put(Job(None, 0, lambda: gate.wait(10)))
    assert Engine().save(cache, SECRET) == 40  # 32 bytes a block: three wait, two are dropped
    assert cache.stats().refusals == {f"{medium.label}: queue_full": 1}
    gate.set()
    assert cache.flush()
    assert len(medium.states()) == 3
    Engine().save(cache, SECRET)
    assert cache.flush()
    assert len(medium.states()) == 5
    cache._check()
    cache.close()


def test_the_writes_of_a_collected_cache_are_done(medium: Medium) -> None:
    cache = medium.cache()
    writer = cache._store.below[0].writer
    writer.put(Job(None, 0, lambda: time.sleep(0.2)))
    Engine().save(cache, SECRET)
    began = time.perf_counter()
    del cache
    assert time.perf_counter() - began < 0.15  # releasing a cache does not wait
    assert writer.flush(10)
    assert not writer.put(Job(None, 0, list))
    assert found(medium.cache(), SECRET) == 40


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_and_its_parent_both_write(medium: Medium) -> None:
    cache = medium.cache()
    Engine().save(cache, [1] * 8)
    cache.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            Engine().save(cache, [2] * 8)
            code = 0 if cache.flush(10) and found(cache, [1] * 8) == 8 else 2
        finally:
            os._exit(code)
    Engine().save(cache, [3] * 8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert cache.flush(10)
    fresh = medium.cache()
    assert [found(fresh, [first] * 8) for first in (1, 2, 3)] == [8, 8, 8]
    assert cache.stats().refusals == {}
    cache.close()


def test_a_state_of_higher_priority_stays(medium: Medium) -> None:
    for priority, state in ((1, b"one"), (2, b"two"), (0, b"none")):
        cache = medium.cache()
        cache.namespace(b"m").store([1, 2], state, priority=priority)
        cache.close()
    with medium.cache().namespace(b"m").find([1, 2, 3]) as handle:  # type: ignore[union-attr]
        assert (bytes(handle.state), handle.priority) == (b"two", 2)
    assert len(medium.states()) == 1


def test_the_longest_snapshot_below_is_found(medium: Medium) -> None:
    cache = medium.cache()
    for n_tokens in (*range(1, 40), 60):
        cache.namespace(b"m").store(SECRET[:n_tokens], b"%d" % n_tokens)
        cache.namespace(b"m").store([9] * n_tokens, b"of others")
    cache.close()
    fresh = medium.cache()
    for n_tokens in (40, 39, 17, 1):
        with fresh.namespace(b"m").find(SECRET[:n_tokens]) as handle:  # type: ignore[union-attr]
            assert handle.n_tokens == min(n_tokens, 40)
            assert bytes(handle.state) in (b"%d" % n_tokens, b"60")
    assert fresh.namespace(b"m").find([7, 7]) is None
    removed = fresh.namespace(b"m").find(SECRET[:17])
    assert removed is not None
    assert removed.remove() == 1
    with medium.cache().namespace(b"m").find(SECRET[:17]) as handle:  # type: ignore[union-attr]
        assert handle.n_tokens == 16
    fresh.close()


def test_an_empty_state_and_one_of_many_chunks(medium: Medium) -> None:
    states = {(1,): b"", (2,): os.urandom(1), (3,): os.urandom((3 << 20) + 5)}
    cache = medium.cache()
    for tokens, state in states.items():
        assert cache.namespace(b"m").store(list(tokens), state)
    cache.close()
    fresh = medium.cache()
    for tokens, state in states.items():
        with fresh.namespace(b"m").find(list(tokens)) as handle:  # type: ignore[union-attr]
            assert handle.state == state
    assert fresh.stats().refusals == {}
    fresh.close()


def test_names_depend_on_everything_that_makes_states_differ(medium: Medium) -> None:
    tier = medium.tier(hmac_key=b"k" * 32)
    root_keys = [
        RootKey(b"m", None, "free"),
        RootKey(b"m", "", "free"),
        RootKey(b"m", "a", "free"),
        RootKey(b"ma", "", "free"),
        RootKey(b"m", "a", "aligned"),
        RootKey(b"m", "a", "snapshot"),
    ]
    assert len({tier.codec.root(root_key) for root_key in root_keys}) == len(root_keys)


def test_states_that_a_tier_has_lost_are_written_again(medium: Medium) -> None:
    cache = medium.cache()
    cache._store.touch_s = 0.0
    Engine().save(cache, SECRET)
    cache.namespace(b"m").store([1], b"x")
    cache.flush()
    medium.cache().clear()
    assert medium.states() == {}
    Engine().save(cache, SECRET)
    assert cache.flush()
    assert medium.states() == {}  # the cache does not know yet that the tier lost them
    assert found(cache, SECRET) == 40  # the use is reported to the tier
    assert cache.flush()
    Engine().save(cache, SECRET)
    cache.namespace(b"m").store([1], b"x")
    assert cache.flush()
    assert len(medium.states()) == 6
    cache._check()
    cache.close()
