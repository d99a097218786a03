"""Blocks whose last state stands for all positions before it: only that one is read from a tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.disk import DiskTier

BLOCK, SIZE = 8, 1000
TOKENS = list(range(10 * BLOCK))


def made(path: Path, **settings: Any) -> PrefixStateCache:
    return PrefixStateCache(disk=DiskTier(path), block_tokens=BLOCK, max_entries=100, **settings)


def state_at(tokens: list[int]) -> bytes:
    return np.random.default_rng(tokens).bytes(SIZE)


def save(cache: PrefixStateCache, tokens: list[int]) -> int:
    """Save the state at each block's end as it is reached, as a recurrent memory must."""
    n_saved = 0
    for stop in range(BLOCK, len(tokens) + 1, BLOCK):

        def read(_: int, end: int, buffer: memoryview) -> None:
            buffer[:] = state_at(tokens[:end])

        states = cache.namespace(b"m", aligned=True)
        n_saved += states.save(tokens[:stop], read, lambda *_: SIZE, last_only=True)
    return n_saved


def found(cache: PrefixStateCache, tokens: list[int], n_known: int = 0) -> int:
    """Return the position of the last state, after comparing its bytes."""
    states, loaded = cache.namespace(b"m", aligned=True), b""

    def load(_: int, __: int, payload: memoryview) -> None:
        nonlocal loaded
        loaded = bytes(payload)

    with states.plan(tokens, last_only=True, n_known=n_known) as plan:
        if plan.n_tokens > n_known:
            assert plan.restore(load, start=plan.blocks[-1].start) == plan.n_tokens
            assert loaded == state_at(tokens[: plan.n_tokens])
        return plan.n_tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cache = made(tmp_path)
    assert save(cache, TOKENS) == len(TOKENS)
    cache.close()
    return tmp_path


def test_only_the_last_state_is_read(folder: Path) -> None:
    cache = made(folder)
    for n_read, n_tokens in ((1, 80), (1, 80), (2, 48), (2, 48), (3, 24), (3, 80)):
        assert found(cache, TOKENS[:n_tokens]) == n_tokens
        assert cache.stats().disk.read_bytes == n_read * SIZE  # then it is in memory
    cache._check()
    cache.close()


def test_no_state_is_read_for_a_plan_that_serves_no_more_than_is_known(folder: Path) -> None:
    cache = made(folder)
    assert found(cache, TOKENS, n_known=80) == 80
    assert cache.stats().disk.read_bytes == 0
    assert found(cache, TOKENS, n_known=79) == 80
    assert cache.stats().disk.read_bytes == SIZE
    cache.close()


def test_new_blocks_follow_unread_ones(folder: Path) -> None:
    cache = made(folder)
    longer = TOKENS + [7] * 3 * BLOCK
    other = TOKENS[: 5 * BLOCK] + [9] * 2 * BLOCK
    assert save(cache, longer) == 3 * BLOCK
    assert save(cache, other) == 2 * BLOCK
    cache.flush()
    assert cache.stats().disk.read_bytes == 0
    cache._check()
    cache.close()
    fresh = made(folder)
    assert (found(fresh, longer), found(fresh, other)) == (len(longer), len(other))
    assert fresh.stats().disk.read_bytes == 2 * SIZE
    fresh.close()


def test_a_lost_state_serves_the_one_before_it(folder: Path) -> None:
    cache = made(folder)
    files = {int(path.name.split("-")[0], 16): path for path in folder.rglob("*.0")}
    files[9 * BLOCK].unlink()
    data = bytearray(files[8 * BLOCK].read_bytes())
    data[-100] ^= 1
    files[8 * BLOCK].write_bytes(data)
    assert found(cache, TOKENS) == 8 * BLOCK
    assert cache.stats().refusals == {"disk: damaged": 1}
    assert cache.stats().disk.read_bytes == SIZE
    assert save(cache, TOKENS) == 2 * BLOCK  # they are stored again
    assert found(cache, TOKENS) == 10 * BLOCK
    cache._check()
    cache.close()


def test_a_state_that_went_after_its_tokens_were_read_is_a_miss(folder: Path) -> None:
    cache = made(folder)
    assert found(cache, TOKENS) == 80
    for path in folder.rglob("*.0"):
        path.unlink()
    assert found(cache, TOKENS) == 80  # in memory
    assert found(cache, TOKENS[:48]) == 0
    cache._check()
    cache.close()


def test_a_plan_of_all_blocks_ends_before_an_unread_one(folder: Path) -> None:
    cache = made(folder)
    assert found(cache, TOKENS) == 80
    with cache.namespace(b"m", aligned=True).plan(TOKENS) as plan:
        assert (plan.n_tokens, plan.blocks) == (0, [])
    cache._check()
    cache.close()


def test_memory_without_room_serves_the_state_from_the_tier(folder: Path) -> None:
    cache = made(folder, ram_bytes=19_600)
    cache.namespace(b"other").store([1], bytes(4000), pin=True)
    assert found(cache, TOKENS) == 80
    assert found(cache, TOKENS) == 80
    assert cache.stats().disk.read_bytes == 2 * SIZE
    cache._check()
    cache.close()


def test_a_cleared_scope_leaves_no_unread_block(folder: Path) -> None:
    cache = made(folder)
    assert found(cache, TOKENS) == 80
    cache.clear()
    assert found(cache, TOKENS) == 0
    assert cache._store.memory.index.n_nodes == 0
    cache._check()
    cache.close()


def test_the_last_state_is_written_if_it_is_read_faster_than_the_prefix_is_prefilled(
    tmp_path: Path,
) -> None:
    cache = made(tmp_path)
    states = cache.namespace(b"m", aligned=True)
    states.note_prefill(100, 0.1)
    (below,) = cache._store.below
    for _ in range(3):  # a state takes 20 ms to read: as long as 20 tokens to prefill
        below.worth.note(b"m", 0.02, 1.0, SIZE)
    assert save(cache, TOKENS[: 2 * BLOCK]) == 2 * BLOCK
    cache.flush()
    assert cache.stats().disk.writes == 0
    assert cache.stats().refusals == {"disk: not_worth_writing": 2}
    assert save(cache, TOKENS[: 3 * BLOCK]) == BLOCK
    cache.flush()
    assert cache.stats().disk.writes == 3  # with those before it, by whose tokens it is found
    cache.close()
