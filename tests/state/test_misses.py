"""Each look-up that ends early says where, why, and at which cost."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.state.engine import Engine
from tests.state.test_cost import SlowDisk
from tokcache.reasons import MISSES
from tokcache.state.cache import PrefixStateCache
from tokcache.state.reasons import Miss, MissReason
from tokcache.state.removals import N_ROWS
from tokcache.state.write_behind import Job
from tokcache.stats import StateStats

if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST, OTHER = list(range(100, 140)), list(range(100, 120)) + list(range(500, 520))


def miss(cache: PrefixStateCache, tokens: Sequence[int], **settings: Any) -> Miss:
    explain = settings.pop("explain", False)
    ns = cache.namespace(settings.pop("fingerprint", b"m"), **settings)
    with ns.plan(tokens, explain=explain) as plan:
        assert plan.miss is not None
        assert plan.miss.n_missed == len(tokens) - plan.n_tokens
        return plan.miss


def test_every_reason_is_in_the_table() -> None:
    assert set(MISSES) == {str(reason) for reason in MissReason}


def test_a_prompt_that_is_found_whole_has_no_miss() -> None:
    cache = PrefixStateCache()
    Engine().save(cache, FIRST)
    with cache.namespace(b"m").plan(FIRST) as plan:
        assert plan.miss is None
    with cache.namespace(b"m").plan([*FIRST, 1], max_tokens=len(FIRST)) as plan:
        assert plan.miss is None
    assert cache.stats().misses == cache.stats().missed_tokens == {}


def test_a_new_prompt_was_never_stored() -> None:
    cache = PrefixStateCache()
    assert miss(cache, FIRST) == Miss(MissReason.NEVER_STORED, 0, 40)
    Engine().save(cache, FIRST)
    assert miss(cache, [*FIRST, 7, 8]) == Miss(MissReason.NEVER_STORED, 40, 2)
    assert miss(cache, [7, *FIRST]) == Miss(MissReason.NEVER_STORED, 0, 41)
    assert cache.stats().misses == {"never_stored": 3}
    assert cache.stats().missed_tokens == {"never_stored": 40 + 2 + 41}


@pytest.mark.parametrize("block_tokens", [8, 256], ids=["at a block's end", "inside a block"])
@pytest.mark.parametrize("n_same", [16, 20, 24])
def test_a_different_text_is_located_to_the_token(block_tokens: int, n_same: int) -> None:
    cache = PrefixStateCache(block_tokens=block_tokens)
    Engine().save(cache, FIRST)
    other = FIRST[:n_same] + list(range(900, 920))
    found = miss(cache, other, explain=True)
    assert (found.reason, found.at_token) == (MissReason.DIFFERENT_TEXT, n_same)
    assert found.held_tokens[:2] == tuple(FIRST[n_same : n_same + 2])
    assert miss(cache, other).held_tokens == ()
    assert "held" not in repr(found)


def test_of_aligned_blocks_the_place_is_inside_the_block() -> None:
    cache = PrefixStateCache(block_tokens=8)
    Engine().save(cache, FIRST, aligned=True)
    found = miss(cache, FIRST[:20] + list(range(900, 920)), aligned=True)
    assert found == Miss(MissReason.DIFFERENT_TEXT, 20, 24)  # two blocks of 8 are reused


def evicting(max_entries: int = 1, **settings: Any) -> PrefixStateCache:
    return PrefixStateCache(max_entries=max_entries, **settings)


@pytest.mark.parametrize("n_asked", [40, 20], ids=["the whole prompt", "its first half"])
@pytest.mark.parametrize("budget", ["max_entries", "ram_bytes"])
def test_an_evicted_state_names_tier_budget_and_time(budget: str, n_asked: int) -> None:
    settings: Any = {"max_entries": 1} if budget == "max_entries" else {"ram_bytes": 3000}
    cache = PrefixStateCache(**settings)
    began = time.time()
    Engine().save(cache, FIRST)
    Engine().save(cache, range(1000, 1040))
    found = miss(cache, FIRST[:n_asked])
    assert (found.reason, found.detail) == (MissReason.EVICTED, f"ram: {budget}")
    assert found.n_removed == (40 if n_asked == 40 else 16)
    assert began <= (found.removed_at or 0.0) <= time.time()
    assert cache.stats().misses == {"evicted": 1}
    Engine().save(cache, FIRST)
    with cache.namespace(b"m").plan(FIRST) as plan:
        assert plan.miss is None


def test_blocks_that_were_evicted_one_after_the_other_are_counted_together() -> None:
    cache = evicting(block_tokens=8)
    Engine().save(cache, FIRST)
    Engine().save(cache, range(1000, 1040))
    found = miss(cache, [*FIRST, 1, 2, 3])
    assert (found.reason, found.n_removed, found.n_missed) == (MissReason.EVICTED, 40, 43)


def test_an_evicted_state_is_found_where_a_later_one_has_its_place() -> None:
    cache = evicting()
    Engine().save(cache, FIRST)
    Engine().save(cache, range(1000, 1040))
    Engine().save(cache, [*FIRST[:5], *range(900, 920)])
    found = miss(cache, FIRST)
    assert (found.reason, found.at_token, found.n_removed) == (MissReason.EVICTED, 5, 35)


def test_a_common_beginning_of_an_evicted_prompt_is_no_eviction() -> None:
    cache = evicting()
    Engine().save(cache, [1, 2, 3, *FIRST])  # a BOS and a role
    Engine().save(cache, range(1000, 1040))
    found = miss(cache, [1, 2, 3, *range(2000, 2040)])
    assert found == Miss(MissReason.NOT_KNOWN, 0, 43)


def test_after_too_many_evictions_nothing_is_claimed() -> None:
    cache = evicting()
    for n in range(N_ROWS + 2):
        Engine().save(cache, range(1000 * n, 1000 * n + 20))
    assert miss(cache, range(1000, 1020)).reason is MissReason.EVICTED
    assert miss(cache, range(20)).reason is MissReason.NOT_KNOWN
    assert miss(cache, FIRST).reason is MissReason.NOT_KNOWN


def test_an_expired_state_is_not_called_evicted() -> None:
    cache = PrefixStateCache(ttl_s=0.02)
    Engine().save(cache, FIRST)
    time.sleep(0.05)
    found = miss(cache, FIRST)
    assert (found.reason, found.detail) == (MissReason.EXPIRED, "ram: ttl_s")


def test_a_state_that_could_not_be_stored_says_why() -> None:
    cache = PrefixStateCache(ram_bytes=3000)
    Engine().save(cache, range(1000))
    assert miss(cache, range(1000)).detail == "over_budget"
    cache = PrefixStateCache()
    Engine(fail_at=0).save(cache, FIRST)
    found = miss(cache, FIRST)
    assert (found.reason, found.detail) == (MissReason.REFUSED, "save_failed")
    cache = PrefixStateCache(max_entries=1)
    Engine().save(cache, FIRST)
    with cache.namespace(b"m").plan(FIRST):
        Engine().save(cache, range(1000, 1040))
    assert miss(cache, range(1000, 1040)).detail == "entries_in_use"


@pytest.mark.parametrize(
    ("settings", "detail"),
    [({"min_tokens": 50}, "below_minimum"), ({"enabled": False}, "disabled")],
    ids=["too short", "disabled"],
)
def test_a_look_up_that_can_find_nothing_says_so(settings: Any, detail: str) -> None:
    cache = PrefixStateCache(**settings)
    Engine().save(cache, FIRST)
    found = miss(cache, FIRST)
    assert (found.reason, found.detail) == (MissReason.REFUSED, detail)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache = PrefixStateCache(disk=tmp_path)
    Engine().save(cache, FIRST)
    cache.close()
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 300)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    cache = PrefixStateCache(disk=tmp_path)
    found = miss(cache, FIRST)
    assert (found.reason, found.detail) == (MissReason.DAMAGED, "disk: damaged")
    assert miss(cache, FIRST).reason is MissReason.NEVER_STORED  # it was removed
    cache.close()


def test_a_file_that_was_on_disk_too_names_both_tiers(tmp_path: Path) -> None:
    cache = PrefixStateCache(max_entries=1, disk=tmp_path)
    Engine().save(cache, FIRST)
    cache.flush()
    Engine().save(cache, range(1000, 1040))
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        if file.stat().st_size > 300:
            file.unlink()
    assert miss(cache, FIRST).detail == "ram, disk: max_entries"
    cache.close()


def test_a_tier_that_rests_is_named(tmp_path: Path) -> None:
    tier = SlowDisk(tmp_path)
    cache = PrefixStateCache(disk=tier, max_entries=1)
    cache.namespace(b"m").note_prefill(100, 0.001)
    Engine().save(cache, FIRST)
    Engine().save(cache, OTHER)
    cache.flush()
    tier.delay_s = 0.3
    Engine().save(cache, range(1000, 1040))
    with cache.namespace(b"m").plan(FIRST):  # slow: from now on the disk rests
        pass
    Engine().save(cache, range(2000, 2040))
    found = miss(cache, range(1000, 1040))
    assert (found.reason, found.detail) == (MissReason.SLOWER_THAN_PREFILL, "disk")
    assert miss(cache, range(5000, 5040)).reason is MissReason.SLOWER_THAN_PREFILL
    cache.close()


def test_another_fingerprint_names_the_parts_that_differ() -> None:
    cache = PrefixStateCache()
    cache.name_model(b"m", "model", {"model": "a", "context": 512, "build": 1})
    cache.name_model(b"n", "model", {"model": "a", "context": 1024, "build": 2})
    Engine().save(cache, FIRST, b"n")
    assert miss(cache, FIRST) == Miss(MissReason.OTHER_FINGERPRINT, 0, 40, detail="context, build")
    Engine().save(cache, FIRST[:10])
    assert miss(cache, FIRST).reason is MissReason.NEVER_STORED  # the first block alone is compared
    assert miss(cache, FIRST, fingerprint=b"of unknown parts").detail == ""


def test_the_cost_is_measured_in_the_scope_itself() -> None:
    cache = PrefixStateCache()
    cache.namespace(b"m", scope="b").note_prefill(100, 2.0)
    assert miss(cache, FIRST, scope="a").seconds is None
    cache.namespace(b"m", scope="a").note_prefill(100, 1.0)
    assert miss(cache, FIRST, scope="a").seconds == pytest.approx(0.4)


def test_a_clear_forgets_the_removals_of_a_scope() -> None:
    cache = evicting()
    for scope in ("a", "b"):
        Engine().save(cache, FIRST, scope=scope)
        Engine().save(cache, range(1000, 1040), scope=scope)
    cache.clear(scope="a")
    assert miss(cache, FIRST, scope="a").reason is MissReason.NEVER_STORED
    assert miss(cache, FIRST, scope="b").reason is MissReason.EVICTED
    cache.clear()
    assert miss(cache, FIRST, scope="b").reason is MissReason.NEVER_STORED


def test_public_tokens_have_the_reason_of_the_shared_scope() -> None:
    cache = PrefixStateCache()
    Engine().save(cache, FIRST, scope="a", public_tokens=20)
    mine = {"scope": "b", "public_prefix": FIRST[:20]}
    assert miss(cache, FIRST, **mine) == Miss(MissReason.NEVER_STORED, 20, 20)
    Engine().save(cache, FIRST, scope="b", public_tokens=20)
    found = miss(cache, [*FIRST[:30], 1, 2], **mine)
    assert (found.reason, found.at_token) == (MissReason.DIFFERENT_TEXT, 30)


def test_a_look_up_counts_its_miss_unless_the_caller_counts() -> None:
    cache = PrefixStateCache()
    with cache.namespace(b"m").plan(FIRST, counts_tokens=False) as plan:
        assert cache.stats().misses == {}
    cache.count_prompt(40, miss=plan.miss)
    assert cache.stats().misses == {"never_stored": 1}
    assert isinstance(cache.stats(), StateStats)
    cache.clear()
    assert cache.stats().misses == {}


def snapshot_miss(cache: PrefixStateCache, tokens: Sequence[int], **settings: Any) -> Miss:
    """Return why `find` returned nothing, and check that it counts the same reason."""
    ns = cache.namespace(b"m", **settings)
    before = cache.stats().misses
    assert ns.find(tokens) is None
    found = ns.find_miss(tokens)
    counted = cache.stats().misses
    assert counted[found.reason] == before.get(found.reason, 0) + 1
    assert found.n_missed == len(tokens)
    return found


@pytest.mark.parametrize("budget", ["max_entries", "ram_bytes"])
def test_an_evicted_snapshot_names_tier_budget_and_time(budget: str) -> None:
    settings: Any = {"max_entries": 1} if budget == "max_entries" else {"ram_bytes": 5000}
    cache = PrefixStateCache(**settings)
    ns = cache.namespace(b"m", scope="a")
    assert snapshot_miss(cache, FIRST, scope="a") == Miss(MissReason.NEVER_STORED, 0, 40)
    began = time.time()
    ns.store(FIRST[:30], bytes(2000))
    ns.store(range(1000, 1040), bytes(2000))
    found = snapshot_miss(cache, FIRST, scope="a")
    assert (found.reason, found.detail) == (MissReason.EVICTED, f"ram: {budget}")
    assert found.n_removed == 30
    assert began <= (found.removed_at or 0.0) <= time.time()
    assert snapshot_miss(cache, FIRST[:29], scope="a").reason is MissReason.NEVER_STORED
    assert snapshot_miss(cache, OTHER, scope="a").reason is not MissReason.EVICTED
    assert snapshot_miss(cache, FIRST, scope="b").reason is MissReason.NEVER_STORED
    assert snapshot_miss(cache, FIRST).reason is MissReason.NEVER_STORED
    ns.store(FIRST[:30], bytes(2000))
    with ns.find(FIRST) as handle:  # type: ignore[union-attr]
        assert handle.n_tokens == 30
    assert ns.find_miss(FIRST, n_found=30).reason is MissReason.NEVER_STORED


def test_a_snapshot_that_goes_on_in_another_way_is_a_different_text() -> None:
    cache = PrefixStateCache()
    cache.namespace(b"m").store(FIRST, b"x")
    found = snapshot_miss(cache, OTHER)
    assert (found.reason, found.at_token) == (MissReason.DIFFERENT_TEXT, 20)
    assert snapshot_miss(cache, OTHER, scope="a").reason is MissReason.NEVER_STORED


def test_snapshots_that_expired_or_were_not_stored_say_why() -> None:
    cache = PrefixStateCache(ttl_s=0.02)
    cache.namespace(b"m").store(FIRST, b"x")
    time.sleep(0.05)
    assert snapshot_miss(cache, FIRST).reason is MissReason.EXPIRED
    cache = PrefixStateCache(ram_bytes=3000, max_entries=1)
    cache.namespace(b"m").store(FIRST, bytes(5000))
    assert snapshot_miss(cache, FIRST).detail == "over_budget"
    assert cache.namespace(b"m").fill(OTHER, 7, lambda _: 1 / 0) is False
    assert snapshot_miss(cache, OTHER).detail == "save_failed"
    cache.namespace(b"m").store([1, 2], b"x", pin=True)
    cache.namespace(b"m").store(FIRST, b"x")
    assert snapshot_miss(cache, FIRST).detail == "entries_in_use"
    assert snapshot_miss(PrefixStateCache(enabled=False), FIRST).detail == "disabled"
    assert snapshot_miss(PrefixStateCache(min_tokens=41), FIRST).detail == "below_minimum"


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    cache = PrefixStateCache(disk=tmp_path)
    cache.namespace(b"m").store(FIRST, bytes(500))
    cache.close()
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 300)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    cache = PrefixStateCache(disk=tmp_path)
    assert cache.namespace(b"m").find(FIRST) is None
    assert cache.stats().misses == {"damaged": 1}
    cache.close()


@pytest.mark.parametrize("kind", ["blocks", "snapshot"])
def test_a_state_that_a_full_queue_kept_from_the_tier_says_so(tmp_path: Path, kind: str) -> None:
    cache = PrefixStateCache(disk=tmp_path, max_entries=1, queue_bytes=1)
    gate = threading.Event()
    cache._store.below[0].writer.put(Job(None, 10, lambda: gate.wait(10)))
    ns = cache.namespace(b"m")
    if kind == "blocks":
        Engine().save(cache, FIRST)
        assert ns.plan(FIRST).miss is None  # still in memory
        Engine().save(cache, range(1000, 1040))
        found = miss(cache, FIRST)
    else:
        ns.store(FIRST, b"state")
        ns.store(range(1000, 1040), b"other")
        found = snapshot_miss(cache, FIRST)
    assert (found.reason, found.detail) == (MissReason.REFUSED, "queue_full")
    gate.set()
    cache.flush()
    # Now the queue takes it, so its eviction has no other cause.
    if kind == "blocks":
        Engine().save(cache, FIRST)
        cache.flush()
        Engine().save(cache, range(1000, 1040))
    else:
        ns.store(FIRST, b"state")
        cache.flush()
        ns.store(range(1000, 1040), b"other")
    cache.flush()
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        file.unlink()
    found = miss(cache, FIRST) if kind == "blocks" else snapshot_miss(cache, FIRST)
    assert (found.reason, found.detail) == (MissReason.EVICTED, "ram, disk: max_entries")
    cache.close()


def test_another_tenant_changes_nothing_that_a_tenant_sees_of_snapshots() -> None:
    """Scope "a" makes the same calls with and without scope "b", which has the same prompts."""
    prompts = [FIRST, OTHER, FIRST[:30], [*FIRST, 1, 2], list(range(1000, 1020))]
    rng = random.Random(8)
    calls = [(rng.choice(prompts), rng.random() < 0.4) for _ in range(60)]
    seen = []
    for has_other in (False, True):
        cache = PrefixStateCache(max_entries=1000)
        found = []
        for tokens, is_stored in calls:
            for scope in ("b", "a") if has_other else ("a",):
                ns = cache.namespace(b"m", scope=scope)
                handle = ns.find(tokens)
                n_found = 0 if handle is None else handle.n_tokens
                if scope == "a":
                    found.append((n_found, ns.find_miss(tokens, n_found=n_found)))
                if is_stored or scope == "b":
                    ns.store(tokens, b"state")
        seen.append(found)
    assert seen[0] == seen[1]
    assert len({told.reason for _, told in seen[0]}) > 1
