"""A tier that is slower than prefilling is neither asked nor written; it is tried now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.state.engine import Engine, restored
from tokcache.errors import InvalidConfig
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.backoff import Speed, Worth
from tokcache.state.tiers.disk import DiskTier

N, BLOCK = 80, 8


class SlowDisk(DiskTier):
    """A disk tier whose reads take `delay_s` longer."""

    delay_s = 0.1
    n_reads = 0

    def find_each(self, wanted: Iterable[Any]) -> Iterator[Any]:
        for stored in super().find_each(wanted):
            if stored is not None:
                self.n_reads += 1
                time.sleep(self.delay_s)
            yield stored


def prompt(first: int) -> list[int]:
    return list(range(first, first + N))


def filled(path: Path, n_prompts: int) -> SlowDisk:
    cache = PrefixStateCache(disk=DiskTier(path), block_tokens=BLOCK)
    for first in range(n_prompts):
        Engine().save(cache, prompt(1000 * first))
        cache.namespace(b"m").store(prompt(1000 * first), b"whole")
    cache.close()
    return SlowDisk(path)


def on(tier: DiskTier, prefill_s: float | None, fingerprint: bytes = b"m") -> PrefixStateCache:
    """Return a cache that knows the time that a token takes to prefill."""
    cache = PrefixStateCache(disk=tier, block_tokens=BLOCK)
    if prefill_s is not None:
        cache.namespace(fingerprint).note_prefill(100, 100 * prefill_s)
    return cache


def found(cache: PrefixStateCache, tokens: list[int]) -> int:
    with cache.namespace(b"m").plan(tokens) as plan:
        assert restored(plan, tokens) == plan.n_tokens
        return plan.n_tokens


def test_a_slow_tier_is_not_asked_after_a_loss_of_a_quarter_of_a_second(tmp_path: Path) -> None:
    tier = filled(tmp_path, 3)
    cache = on(tier, 0.001)
    assert found(cache, prompt(0)) == 3 * BLOCK  # each read 0.09 s slower: the third was too much
    assert found(cache, prompt(1000)) == 0
    assert found(cache, prompt(2000)) == 0
    assert tier.n_reads == 3
    assert found(cache, prompt(0)) == 3 * BLOCK  # from memory
    assert cache.stats().refusals == {"disk: slower_than_prefill": 3}
    Engine().save(cache, prompt(1000))  # before a save it is not read either
    assert tier.n_reads == 3
    assert found(cache, prompt(1000)) == N
    cache._check()
    cache.close()


@pytest.mark.parametrize(
    ("delay_s", "prefill_s"),
    [(0.0, 0.001), (0.02, 0.01), (0.04, None)],
    ids=["fast", "faster than prefill", "prefill not known"],
)
def test_a_tier_that_is_faster_is_used(
    tmp_path: Path, delay_s: float, prefill_s: float | None
) -> None:
    tier = filled(tmp_path, 2)
    tier.delay_s = delay_s
    cache = on(tier, prefill_s)
    assert [found(cache, prompt(first)) for first in (0, 1000)] == [N, N]
    assert cache.stats().refusals == {}
    cache.close()


def test_one_slow_read_is_forgiven(tmp_path: Path) -> None:
    tier = filled(tmp_path, 3)
    cache = on(tier, 0.001)
    tier.delay_s = 0.2
    assert found(cache, prompt(0)[:BLOCK]) == BLOCK
    tier.delay_s = 0.0
    assert [found(cache, prompt(first)) for first in (0, 1000, 2000)] == [N, N, N]
    assert cache.stats().refusals == {}
    cache.close()


def test_after_a_rest_a_slow_tier_is_tried_again(tmp_path: Path) -> None:
    tier = filled(tmp_path, 4)
    cache = on(tier, 0.001)
    (below,) = cache._store.below
    below.worth.rest_s = 0.3
    tier.delay_s = 0.3
    assert found(cache, prompt(0)) == BLOCK
    assert found(cache, prompt(1000)) == 0
    time.sleep(0.35)
    assert found(cache, prompt(1000)) == BLOCK  # still slow: one read, and it rests again
    assert found(cache, prompt(2000)) == 0
    tier.delay_s = 0.0
    time.sleep(0.35)
    assert [found(cache, prompt(first)) for first in (2000, 3000)] == [N, N]
    cache.close()


def test_each_model_has_its_own_measure(tmp_path: Path) -> None:
    tier = filled(tmp_path, 2)
    tier.delay_s = 0.04
    cache = on(tier, 0.001, fingerprint=b"a fast model")
    cache.namespace(b"m").note_prefill(10, 100.0)
    assert [found(cache, prompt(first)) for first in (0, 1000)] == [N, N]
    assert cache.stats().refusals == {}
    cache.close()


def test_a_slow_tier_is_not_asked_for_snapshots_either(tmp_path: Path) -> None:
    tier = filled(tmp_path, 3)
    cache = on(tier, 0.001)
    tier.delay_s = 0.5
    assert cache.namespace(b"m").find(prompt(0)) is not None  # 0.42 s slower
    assert cache.namespace(b"m").find(prompt(1000)) is None
    assert cache.namespace(b"m").find(prompt(0)) is not None  # from memory
    assert tier.n_reads == 1
    assert cache.stats().refusals == {"disk: slower_than_prefill": 1}
    cache.close()


def refused_writes(cache: PrefixStateCache) -> int:
    assert cache.flush(10)
    return cache.stats().refusals.get("disk: not_worth_writing", 0)


def test_states_are_not_written_to_a_tier_that_gives_them_back_slower(tmp_path: Path) -> None:
    tier = filled(tmp_path, 2)
    cache = on(tier, 0.001)
    assert found(cache, prompt(0)) == 3 * BLOCK  # three reads of 0.1 s for 8 tokens each
    Engine().save(cache, prompt(5000))
    assert refused_writes(cache) == 1
    assert tier.stats().writes == 0
    assert found(cache, prompt(5000)) == N  # it is in memory nevertheless
    cache._check()
    cache.close()


def test_each_state_is_written_by_its_own_cost(tmp_path: Path) -> None:
    tier = filled(tmp_path, 3)
    cache = on(tier, 0.001)
    states = cache.namespace(b"m")
    for first in (0, 1000, 2000):  # 0.1 s for five bytes of 80 tokens
        assert states.find(prompt(first)) is not None
    states.store(range(20), b"short")
    assert (refused_writes(cache), tier.stats().writes) == (1, 0)
    states.store(range(400), b"a long one"[:5])
    assert (refused_writes(cache), tier.stats().writes) == (1, 1)
    states.store(range(300), bytes(50))  # ten times the bytes
    assert (refused_writes(cache), tier.stats().writes) == (2, 1)
    cache.namespace(b"another model").store(range(20), b"short")
    assert (refused_writes(cache), tier.stats().writes) == (2, 2)
    cache.close()


def test_a_slow_tier_is_given_a_state_now_and_then(tmp_path: Path) -> None:
    tier = filled(tmp_path, 1)
    cache = on(tier, 0.001)
    (below,) = cache._store.below
    assert found(cache, prompt(0)) == 3 * BLOCK
    below.worth.rest_s = 0.3
    time.sleep(0.35)
    for first in (5000, 6000, 7000):
        Engine().save(cache, prompt(first))
    assert (refused_writes(cache), tier.stats().writes) == (2, N // BLOCK)
    cache.close()


def test_one_slow_read_does_not_keep_states_from_a_tier(tmp_path: Path) -> None:
    tier = filled(tmp_path, 3)
    cache = on(tier, 0.001)
    tier.delay_s = 0.2
    assert found(cache, prompt(0)[:BLOCK]) == BLOCK
    Engine().save(cache, prompt(5000))
    tier.delay_s = 0.0
    assert [found(cache, prompt(first)) for first in (0, 1000)] == [N, N]
    Engine().save(cache, prompt(6000))
    assert (refused_writes(cache), tier.stats().writes) == (0, 2 * N // BLOCK)
    cache.close()


def test_the_last_measurements_count_most() -> None:
    speed = Speed()
    speed.note(100, 1.0)
    assert speed.seconds(200) == pytest.approx(2.0)
    for _ in range(30):
        speed.note(100, 10.0)
    assert speed.seconds(100) == pytest.approx(10.0, rel=0.01)


def test_fast_reads_give_no_credit() -> None:
    worth = Worth()
    for _ in range(100):
        worth.note(b"m", 0.001, 1.0, 100)
    worth.note(b"m", 0.2, 0.0, 100)
    assert not worth.rests(b"m")
    worth.note(b"m", 0.1, 0.0, 100)
    assert worth.rests(b"m")
    assert not worth.rests(b"n")


@pytest.mark.parametrize(
    ("n_tokens", "seconds"),
    [(0, 1.0), (-1, 1.0), (1.5, 1.0), (10, -1.0), (10, math.nan), (10, math.inf), (10, "1")],
)
def test_an_invalid_measurement_is_refused(n_tokens: Any, seconds: Any) -> None:
    with pytest.raises(InvalidConfig):
        PrefixStateCache().namespace(b"m").note_prefill(n_tokens, seconds)
