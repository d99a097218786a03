"""L0 alone, both implementations: keys, budgets, eviction, scopes, memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.text.implementations import both, implementation, native
from tokcache.errors import InvalidConfig, InvalidScope, InvalidText, InvalidTokens


def copy_of(text: str) -> str:
    return (text + "\0")[:-1]


@both
def test_get_returns_the_stored_ids(name: str) -> None:
    cache = implementation(name).l0_cache()
    assert cache.get("hello") is None
    assert cache.put("hello", [1, 2, 3]) is True
    assert cache.get(copy_of("hello")) == [1, 2, 3]
    assert cache.get("hello", add_special_tokens=False) is None
    assert cache.get("hello ") is None
    assert cache.put("hello", [4]) is True
    assert cache.get("hello") == [4]
    assert len(cache) == 1
    cache._check()


@both
def test_statistics_count_calls_and_clear_resets_them(name: str) -> None:
    cache = implementation(name).l0_cache()
    cache.put("a", [1, 2])
    cache.put("a", [2], add_special_tokens=False)
    for text in ("a", "a", "b"):
        cache.get(text)
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.insertions, stats.evictions) == (2, 1, 2, 0)
    assert (stats.hit_tokens, stats.n_entries, stats.hit_rate) == (4, 2, 2 / 3)
    assert stats.n_bytes == cache.memory_usage() > 0
    cache.clear()
    assert len(cache) == cache.memory_usage() == 0
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.insertions, stats.hit_rate) == (0, 0, 0, 0.0)
    assert cache.get("a") is None


TRICKY = [
    "", "\0", "A", "AA", "\u4141", "\U00004141A", "é", "e\u0301", "\u00ff", "\u0100", "\U0001f600",
    "\ud800", "x" * 511, "x" * 512, "x" * 513, "x" * 514, "x" * 600, "\u6c49" * 256,
    "\u6c49" * 257, "\U0001f600" * 200, "\u6c49" * 5000, "a" * 100_000, "a" * 99_999 + "b",
]  # fmt: skip


@both
def test_every_kind_of_string_is_its_own_key(name: str) -> None:
    cache = implementation(name).l0_cache()
    for number, text in enumerate(TRICKY):
        assert cache.put(text, [number])
    cache._check()
    for number, text in enumerate(TRICKY):
        assert cache.get(text) == [number]
        assert cache.get(copy_of(text)) == [number]
    assert len(cache) == len(TRICKY)


@both
def test_a_str_subclass_is_keyed_by_its_content(name: str) -> None:
    class Prompt(str):
        __slots__ = ()

        def __str__(self) -> str:
            return "something else"

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    cache = implementation(name).l0_cache()
    cache.put(Prompt("hello"), [1])
    assert cache.get("hello") == [1]
    assert cache.get("something else") is None
    assert cache.get(Prompt("hello")) == [1]
    assert cache.get(Prompt("bye")) is None


@both
@pytest.mark.parametrize("text", [b"hello", None, 5, ["hello"]])
def test_invalid_texts_scopes_and_ids_are_refused(name: str, text: Any) -> None:
    cache = implementation(name).l0_cache()
    with pytest.raises(InvalidText, match=type(text).__name__):
        cache.get(text)
    with pytest.raises(InvalidText):
        cache.put(text, [1])
    with pytest.raises(InvalidScope, match="scope"):
        cache.get("a", scope=7)
    with pytest.raises(InvalidTokens):
        cache.put("a", ["x"])
    assert len(cache) == 0
    assert cache.put("a", [1])
    assert cache.get("a") == [1]


@both
def test_scope_and_add_special_tokens_are_keyword_only_and_checked(name: str) -> None:
    cache = implementation(name).l0_cache()
    cache.put("secret", [1, 2], scope="tenant-a")
    calls: list[Callable[[], Any]] = [
        lambda: cache.get("secret", "tenant-a"),
        lambda: cache.put("secret", [1, 2], "tenant-a"),
        lambda: implementation(name).l0_cache(10),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="positional"):
            call()
    flag: Any
    for flag in ("tenant-a", 1, 0, None, []):
        with pytest.raises(InvalidConfig, match="add_special_tokens must be True or False"):
            cache.get("secret", add_special_tokens=flag)
        with pytest.raises(InvalidConfig, match="add_special_tokens must be True or False"):
            cache.put("secret", [1, 2], add_special_tokens=flag)
    assert cache.get("secret") is None
    assert len(cache) == 1


@both
def test_keywords_come_in_any_order_and_may_be_made_when_called(name: str) -> None:
    cache = implementation(name).l0_cache()
    # Strings that are made at run time have other addresses than those in the code.
    made: dict[str, Any] = {copy_of("add_special_tokens"): False, copy_of("scope"): "a"}
    assert cache.put("text", [1], add_special_tokens=False, scope="a")
    assert cache.put("text", [2], scope=None, add_special_tokens=True)
    assert cache.put("text", [3], scope="b")
    for found in (
        cache.get("text", scope="a", add_special_tokens=False),
        cache.get("text", add_special_tokens=False, scope="a"),
        cache.get("text", **made),
        cache.get(text="text", **made),
    ):
        assert found == [1]
    assert cache.get("text") == cache.get("text", scope=None) == cache.get(text="text") == [2]
    assert cache.get("text", scope="b") == [3]
    assert cache.put("text", [4], **made)
    assert cache.put(ids=[5], text="more", scope="a")
    assert cache.get("text", **made) == [4]
    assert cache.get("more", scope="a") == [5]


@both
def test_wrong_arguments_are_errors(name: str) -> None:
    cache = implementation(name).l0_cache()
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("argument", cache.get),
        ("argument", lambda: cache.get(scope="a")),
        ("argument", lambda: cache.put("a")),
        ("argument", lambda: cache.put("a", scope="a")),
        ("unexpected keyword argument", lambda: cache.get("a", scopes="a")),
        ("unexpected keyword argument", lambda: cache.put("a", [1], scope="a", pin=True)),
        ("multiple values", lambda: cache.get("a", text="a")),
    ]
    for words, call in calls:
        with pytest.raises(TypeError, match=words):
            call()
    assert len(cache) == 0


def test_calls_with_keywords_don_t_go_through_cython() -> None:
    native()
    from tokcache.text import _l0  # noqa: PLC0415 (may not be built)

    assert _l0.has_quick_calls


@both
@pytest.mark.parametrize("setting", ["max_entries", "max_bytes", "sample_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "7x", None, True])
def test_invalid_budgets_are_refused(name: str, setting: str, value: Any) -> None:
    with pytest.raises(InvalidConfig, match=setting):
        implementation(name).l0_cache(**{setting: value})


@both
def test_settings_over_their_maximum_are_refused(name: str) -> None:
    for setting, value in (
        ("sample_size", 1 << 32),
        ("sample_size", 1025),
        ("max_entries", 1 << 70),
        ("max_bytes", 1 << 63),
    ):
        with pytest.raises(InvalidConfig, match=f"{setting} must be at most"):
            implementation(name).l0_cache(**{setting: value})
    cache = implementation(name).l0_cache(max_entries=2, sample_size=1024)
    for i in range(20):
        cache.put(str(i), [i])
    cache._check()


@both
def test_scope_names_count_towards_the_byte_budget(name: str) -> None:
    cache = implementation(name).l0_cache(max_bytes=1 << 20)
    for i in range(30):
        assert cache.put("text", [i], scope=f"{i:06d}" + "s" * 100_000)
        cache._check()
    assert len(cache) <= 10
    assert cache.put("text", [1], scope="s" * (1 << 20)) is False
    cache._check()
    cache.clear()
    assert cache.memory_usage() == 0


@both
def test_threads_may_get_and_put_at_the_same_time(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=20)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(2000):
                number = rng.randrange(60)
                ids = cache.get(f"text {number}")
                assert ids is None or ids == [number]
                cache.put(f"text {number}", [number])
        except BaseException as error:  # noqa: BLE001 (asserted below)
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    cache._check()


@both
def test_the_entry_budget_holds_over_both_maps(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=10)
    for i in range(100):
        cache.put(f"text {i}", [i], add_special_tokens=i % 2 == 0)
        assert len(cache) == min(i + 1, 10)
    cache._check()
    assert cache.stats().evictions == 90


@both
@pytest.mark.parametrize("max_bytes", [2_000, 2_500, 3_000, 1 << 20])
def test_every_insertion_is_held_or_counted_as_an_eviction(name: str, max_bytes: int) -> None:
    """Whether the budget of bytes is full before the number of entries is reached, or not."""
    cache = implementation(name).l0_cache(max_entries=10, max_bytes=max_bytes)
    for i in range(200):
        cache.put(f"text {i} {'x' * (i * 7 % 150)}", [i] * (i % 5), add_special_tokens=i % 3 == 0)
        stats = cache.stats()
        assert stats.insertions - stats.evictions == len(cache)
    assert cache.stats().evictions > 100
    cache._check()


@both
def test_the_victim_comes_from_the_larger_map(name: str) -> None:
    """Texts with and without special tokens are in two maps with one budget."""
    cache = implementation(name).l0_cache(max_entries=10)
    for i in range(3):
        cache.put(f"few {i}", [i])
    for i in range(200):
        cache.put(f"many {i}", [i], add_special_tokens=False)
    assert [cache.get(f"few {i}") for i in range(3)] == [[0], [1], [2]]


@both
def test_with_a_sample_of_all_entries_the_least_recently_used_is_evicted(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=4, sample_size=200)
    for text in "abcd":
        cache.put(text, [1])
    cache.get("a")
    cache.put("c", [1])
    cache.put("e", [1])  # 200 draws from 4 entries miss the oldest once in 10**25
    assert cache.get("b") is None
    assert all(cache.get(text) for text in "acde")


@both
def test_victims_are_drawn_at_random_from_all_entries(name: str) -> None:
    evicted = set()
    for _ in range(60):
        cache = implementation(name).l0_cache(max_entries=20, sample_size=1)
        for i in range(21):
            cache.put(str(i), [i])
        evicted |= {i for i in range(20) if cache.get(str(i)) is None}
    # Each round evicts one of 20 entries; a given one is never evicted with a chance of 5 %.
    assert len(evicted) >= 15


@both
def test_frequently_used_entries_are_rarely_evicted(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=100)
    for i in range(50):
        cache.put(f"hot {i}", [i])
    kept = 0
    for i in range(1000):
        cache.put(f"cold {i}", [i])
        for j in range(50):
            kept += cache.get(f"hot {j}") is not None
    assert kept > 0.8 * 50_000


@both
def test_the_byte_budget_holds_and_oversized_entries_are_refused(name: str) -> None:
    cache = implementation(name).l0_cache(max_bytes=100_000)
    rng = random.Random(1)
    for i in range(300):
        cache.put(
            f"{i}" + "x" * rng.randrange(5000),
            range(rng.randrange(500)),
            add_special_tokens=i % 3 == 0,
        )
        assert cache.memory_usage() <= 100_000
        cache._check()
    held = len(cache)
    assert held > 5
    assert cache.put("y" * 100_001, [1]) is False
    assert cache.put("z", range(25_000)) is False
    assert len(cache) == held
    assert cache.stats().refusals == {"oversize": 2}


@both
def test_a_refused_put_removes_the_previous_entry(name: str) -> None:
    cache = implementation(name).l0_cache(max_bytes=10_000)
    cache.put("a", [1])
    assert cache.put("a", range(10_000)) is False
    assert cache.get("a") is None


@both
def test_a_budget_of_one_byte_refuses_every_entry(name: str) -> None:
    cache = implementation(name).l0_cache(max_bytes=1)
    assert cache.put("a", [1]) is False
    assert cache.get("a") is None
    assert len(cache) == cache.memory_usage() == 0


@both
def test_scopes_share_nothing(name: str) -> None:
    cache = implementation(name).l0_cache()
    scopes = [None, "", "a", "b", "None", "a\0", "\u4141", "AA"]
    for number, scope in enumerate(scopes):
        assert all(cache.get("text", scope=other) is None for other in scopes[number:])
        cache.put("text", [number], scope=scope)
    for number, scope in enumerate(scopes):
        assert cache.get("text", scope=scope) == [number]
        assert cache.get("text", add_special_tokens=False, scope=scope) is None
    cache._check()


@both
def test_scopes_without_entries_take_no_memory(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=10)
    for i in range(1000):
        cache.put("text", [i], scope=f"tenant {i}")
        cache.get("text", scope=f"unused {i}")
    cache._check()
    assert len(cache) == 10
    assert cache.memory_usage() < 20_000


def template(i: int, position: int, n_chars: int = 4000) -> str:
    return "t" * position + f"{i:06d}" + "t" * (n_chars - position - 6)


@pytest.mark.parametrize("position", [0, 33, 200, 1000, 2500, 3930, 3994])
def test_texts_of_one_template_do_not_collide(position: int) -> None:
    cache = native().l0_cache()
    for i in range(500):
        cache.put(template(i, position), [i])
    cache._check()
    assert all(cache.get(template(i, position)) == [i] for i in range(500))
    assert all(cache.get(template(i, position)) is None for i in range(500, 600))


def test_long_texts_that_differ_in_one_character_do_not_collide() -> None:
    """A digest of samples does not see every character; after a collision a full hash is used."""
    cache = native().l0_cache()
    positions = range(32, 3900, 7)
    for wide in ("", "\u6c49", "\U0001f600"):
        for p in positions:
            cache.put("t" * p + "X" + "t" * (3999 - p) + wide, [p])
        cache._check()
        for p in positions:
            assert cache.get("t" * p + "X" + "t" * (3999 - p) + wide) == [p]


def test_records_of_collisions_are_removed_with_their_entries() -> None:
    cache = native().l0_cache(max_entries=50)
    rng = random.Random(2)
    for step in range(5000):
        text = template(rng.randrange(100), rng.choice([33, 200, 1000]))
        cache.put(text, [1])
        if step % 100 == 0:
            cache._check()
    for i in range(50):
        cache.put(str(i), [1])
    for i in range(1000):  # these evict all texts of the template
        cache.put(f"{i}", [1])
    cache._check()


@pytest.mark.parametrize("wide", ["", "\u6c49", "\U0001f600"])
def test_the_native_cache_releases_its_keys(wide: str) -> None:
    cache = native().l0_cache(max_entries=3)
    text = copy_of("y" * 1000 + wide)
    before = sys.getrefcount(text)
    cache.put(text, [1])
    assert sys.getrefcount(text) == before + (0 if wide else 1)
    cache.clear()
    assert sys.getrefcount(text) == before
    ids = native().token_ids([1, 2, 3])
    cache.put(text, ids)
    del cache
    assert sys.getrefcount(text) == before


def test_a_cached_slice_does_not_keep_the_whole_array_alive() -> None:
    """The cache would otherwise use more memory than it counts."""
    whole = native().token_ids(range(100_000))
    cache = native().l0_cache(max_bytes=10_000)
    assert cache.put("a", whole[5:8])
    assert cache.get("a") == [5, 6, 7]
    assert cache.memory_usage() < 1000


def test_changing_the_callers_list_does_not_change_the_cache() -> None:
    cache = native().l0_cache()
    values = [1, 2, 3]
    cache.put("a", values)
    values[0] = 9
    assert cache.get("a") == [1, 2, 3]


@both
@pytest.mark.parametrize("n_entries", [1, 2, 5, 8])
def test_the_oldest_is_evicted_if_the_sample_covers_all_entries(name: str, n_entries: int) -> None:
    rng = random.Random(n_entries)
    cache = implementation(name).l0_cache(max_entries=n_entries, sample_size=8)
    by_age: list[str] = []
    for n in range(500):
        cache.put(f"{n}", [n])
        by_age = [*by_age, f"{n}"][-n_entries:]
        used = rng.choice(by_age)
        assert cache.get(used) == [int(used)]
        by_age.append(by_age.pop(by_age.index(used)))
        assert [text for text, *_ in cache.held()] == by_age[::-1]


@both
def test_a_sample_never_contains_an_entry_twice(name: str) -> None:
    places = []  # position of each victim, counted from the oldest entry
    cache = implementation(name).l0_cache(max_entries=9, sample_size=8)
    for n in range(1000):
        before = [text for text, *_ in cache.held()][::-1]
        cache.put(f"{n}", [n])
        gone = {*before} - {text for text, *_ in cache.held()}
        places += [before.index(text) for text in gone]
    assert {*places} == {0, 1}  # 8 of 9 are drawn, so at least one of the two oldest
    assert 50 < sum(places) < 200  # one time in 9 the oldest is not drawn


@both
def test_an_empty_cache_is_truthy_and_repr_shows_sizes_only(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=1000, max_bytes="2M")
    assert cache
    assert len(cache) == 0
    assert repr(cache) == "<L0Cache: 0 of 1,000 entries, 0 of 2,097,152 bytes>"
    cache.put("secret", [1], scope="tenant-a")
    n_bytes = cache.memory_usage()
    assert repr(cache) == f"<L0Cache: 1 of 1,000 entries, {n_bytes:,} of 2,097,152 bytes>"


@both
def test_reported_bytes_equal_the_growth_of_resident_memory(name: str) -> None:
    if name == "native":
        native()
    code = """
import gc, sys
from tokcache import L0Cache, TokenIds
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
cache = L0Cache(max_entries=10**6, max_bytes=1 << 40)
TokenIds(range(300)).tolist()
gc.collect()
before = resident()
for i in range(60_000):
    cache.put(f"{i:0200d}", TokenIds([i] * (i % 100)), add_special_tokens=i % 2 == 0)
gc.collect()
print(cache.memory_usage() / (resident() - before))
"""
    off = {"TOKCACHE_NO_EXTENSIONS": "1" if name == "reference" else "0"}
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={**os.environ, **off},
    )  # fmt: skip
    slack = 0.05 if name == "native" else 0.25  # the reference implementation estimates the sizes
    assert abs(float(done.stdout) - 1) < slack, done.stdout


@both
def test_a_miss_of_an_evicted_text_is_told_from_a_new_one(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=1)
    for n in range(5):
        cache.put(f"text {n}", [n], scope="a")
    assert cache.stats().evictions == 4
    for text, scope in (("text 0", "b"), ("text 0", None), ("text 7", "a")):
        assert cache.get(text, scope=scope) is None
    assert cache.get("text 0", add_special_tokens=False, scope="a") is None
    assert cache.stats().misses_by_reason == {"new": 4, "evicted": 0, "not_known": 0}
    assert cache.get(copy_of("text 0"), scope="a") is None
    assert cache.get("text 0", scope="a") is None  # until it is put again
    assert cache._get_again("text 0", True, "a") is None  # counted before
    assert cache.stats().misses_by_reason == {"new": 4, "evicted": 2, "not_known": 0}
    cache.put("text 9", [9], scope="b")  # scope a is empty now
    cache.put("text 8", [8], scope="c")  # has the number that a had
    assert cache.get("text 4", scope="c") is None
    assert cache.get("text 4", scope="a") is None
    assert cache.stats().misses_by_reason == {"new": 5, "evicted": 3, "not_known": 0}
    cache.clear(scope="a")
    assert cache.get("text 1", scope="a") is None
    assert cache.get("text 9", scope="b") is None
    assert cache.stats().misses_by_reason == {"new": 6, "evicted": 4, "not_known": 0}
    assert cache.stats().misses == 10
    cache.clear()
    assert cache.stats().misses_by_reason == {"new": 0, "evicted": 0, "not_known": 0}
    assert cache.get("text 9", scope="b") is None
    assert cache.stats().misses_by_reason == {"new": 1, "evicted": 0, "not_known": 0}


@both
@pytest.mark.parametrize(("owner", "other"), [(None, ""), ("", None), ("a", "A")])
def test_an_eviction_is_told_to_its_scope_alone(
    name: str, owner: str | None, other: str | None
) -> None:
    cache = implementation(name).l0_cache(max_entries=1)
    cache.put("text", [1], scope=owner)
    cache.put("another", [2], scope=owner)
    assert cache.get("text", scope=other) is None
    assert cache.stats().misses_by_reason == {"new": 1, "evicted": 0, "not_known": 0}
    if other is not None:
        cache.clear(scope=other)
    assert cache.get("text", scope=owner) is None
    assert cache.stats().misses_by_reason == {"new": 1, "evicted": 1, "not_known": 0}


@both
def test_no_text_is_wrongly_counted_as_new_or_evicted(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=8)
    texts = ["x" * 2000 + f"{n:06}" + "y" * 2000 for n in range(400)]
    for text in texts[:200]:
        cache.put(text, [1])
    for text in texts[200:]:
        assert cache.get(text) is None
    assert cache.stats().misses_by_reason["evicted"] == 0
    n_new = cache.stats().misses_by_reason["new"]
    assert n_new == 200 or name == "native"  # a few sets of rows may have forgotten an eviction
    assert n_new > 150
    assert sum(cache.get(text) is None for text in texts[:200]) == 192
    assert cache.stats().misses_by_reason["new"] == n_new
    assert cache.stats().misses_by_reason["evicted"] > 150
    for n in range(10_000):  # more than are remembered
        cache.put(f"{n}", [1])
    before = cache.stats().misses_by_reason
    for n in range(100):
        assert cache.get(f"new {n}") is None
        assert cache.get(f"{n}") is None
    after = cache.stats().misses_by_reason
    n_known = 200 - (after["not_known"] - before["not_known"])
    assert n_known == 0 or name == "native"  # a few sets of rows may have forgotten no eviction
    assert n_known < 50


@both
def test_evicted_texts_above_16_kib_are_not_known(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=1)
    long, longest = "x" * 16_384, "x" * 16_385
    for text in (long, longest, "short"):
        cache.put(text, [1])
    for text in (long, longest, longest + "x"):
        assert cache.get(text) is None
    assert cache.stats().misses_by_reason == {"new": 1, "evicted": 1, "not_known": 1}


@both
def test_a_map_evicts_from_the_other_to_get_its_first_places(name: str) -> None:
    for n_ids in range(300):  # some budgets leave room for the entry, but not for its table
        cache = implementation(name).l0_cache(max_bytes=6_000)
        for at in range(60):
            cache.put(f"text {at}", [at])
        assert cache.put("other", [1] * n_ids, add_special_tokens=False)
        assert cache.get("other", add_special_tokens=False) == [1] * n_ids
        cache._check()
