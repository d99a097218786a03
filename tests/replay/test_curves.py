"""Curves from one pass equal simulations of an LRU cache, and come close to the real classes."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokcache
from tokcache.replay.curves import StackDistances, _smaller_before, _stable_order, mixed
from tokcache.replay.prefixes import (
    BLOCKS,
    CONTINUES,
    DIFFERS,
    EVICTED,
    NEW,
    REST,
    SHARES,
    Prefixes,
    Prompts,
)
from tokcache.replay.texts import Encoder, TextReplay
from tokcache.replay.traces import Skipped, open_trace
from tokcache.replay.traces.chats import neutral_text
from tokcache.replay.traces.request import Request
from tokcache.samples import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

INFINITY = float("inf")


def lru_distances(keys: list[int], weights: list[int]) -> list[int]:
    """Return the distances by their definition: what was used since, and itself."""
    held: OrderedDict[int, int] = OrderedDict()
    found = []
    for key, weight in zip(keys, weights, strict=True):
        if key in held:
            younger = list(held)[list(held).index(key) :]
            found.append(sum(held[one] for one in younger))
            held.move_to_end(key)
        else:
            found.append(-1)
            held[key] = weight
    return found


def look_up(to: StackDistances, keys: list[int], weights: list[int]) -> list[float]:
    own = mixed(np.array(keys, np.uint64), 1)
    values = np.ones((1, len(keys)))
    index = to.sampled(own)
    if index is not None:
        own, values = own[index], values[:, index]
        weights = [weights[at] for at in index]
    found = to.look_up(own, np.array(weights, np.int64), values, np.array([float(len(keys))]))
    return [float(one) for one in found.distances]


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 20), st.randoms())
@settings(max_examples=100, deadline=None)
def test_distances_are_those_of_the_definition(
    keys: list[int], batch: int, rng: random.Random
) -> None:
    weight = {key: rng.randint(1, 9) for key in keys}
    weights = [weight[key] for key in keys]
    distances = StackDistances()
    found: list[float] = []
    for at in range(0, len(keys), batch):
        found += look_up(distances, keys[at : at + batch], weights[at : at + batch])
    assert found == lru_distances(keys, weights)
    assert distances.n_seen == len(set(keys))


@given(st.permutations(range(33)))
@settings(max_examples=50, deadline=None)
def test_earlier_smaller_elements_are_summed(values: list[int]) -> None:
    weights = [1 + value % 5 for value in values]
    found = _smaller_before(np.array(values), np.array(weights))
    expected = [
        sum(w for v, w in zip(values[:at], weights[:at], strict=True) if v < values[at])
        for at in range(len(values))
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("greatest", [1, 7, 1 << 10, (1 << 64) - 1])
def test_equal_keys_are_ordered_by_their_position(greatest: int) -> None:
    keys = np.random.default_rng(2).integers(0, greatest, 999, np.uint64, endpoint=True)
    keys[500:700] = keys[300:500]
    order, ordered = _stable_order(keys)
    assert (order == np.argsort(keys, kind="stable")).all()
    assert (ordered == np.sort(keys)).all()


def zipf(n: int, n_objects: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n_objects + 1)
    return rng.choice(n_objects, n, p=weights / weights.sum()).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("rate", "max_objects"), [(0.1, 1 << 20), (1.0, 2000)])
def test_a_sample_has_the_curve_of_all(rate: float, max_objects: int) -> None:
    keys = zipf(200_000, 30_000, 1)
    exact, sampled = StackDistances(), StackDistances(rate=rate, max_objects=max_objects)
    for at in range(0, len(keys), 5000):
        part = keys[at : at + 5000]
        look_up(exact, part, [1] * len(part))
        look_up(sampled, part, [1] * len(part))
        assert len(sampled._keys) <= max_objects
    assert sampled.rate < 0.2
    sizes = [100, 1000, 5000, 20_000, INFINITY]
    assert exact.hit_rates(sizes) == pytest.approx(sampled.hit_rates(sizes), abs=0.02)
    assert sampled.n_seen == pytest.approx(exact.n_seen, rel=0.1)


def test_a_curve_is_right_at_every_size() -> None:
    """Linear between the edges of buckets 2% wide: exact at the edges."""
    distances = StackDistances()
    look_up(distances, [1, 2, 1, 2, 3, 1], [10, 20, 10, 20, 40, 10])  # 30, 30 and 70
    found = distances.hit_rates([0, 29, 31, 69, 72, INFINITY])
    assert found == pytest.approx([0, 0, 2 / 6, 2 / 6, 3 / 6, 3 / 6])


# ---- prefixes


def replayed(prompts: list[list[int]], block_tokens: int = 4, **settings_: Any) -> Prefixes:
    made = Prefixes(block_tokens, **settings_)
    for at in range(0, len(prompts), 7):
        part = prompts[at : at + 7]
        keys = mixed(np.array([one for ids in part for one in ids], np.uint64), 5)
        lengths = np.array([len(ids) for ids in part])
        places = [f"p{at + n + 1}" for n in range(len(part))]
        made.add(Prompts(keys, lengths, lengths, lengths * block_tokens + 1, places))
    return made


def test_blocks_tokens_and_means_are_counted_apart() -> None:
    made = Prefixes(10)
    ids = mixed(np.array([1, 2, 1, 3, 1, 2], np.uint64), 5)
    n_blocks, n_tokens = np.array([2, 2, 2]), np.array([15, 20, 25])
    made.add(Prompts(ids, n_blocks, n_blocks, n_tokens, ["a", "b", "c"]))
    assert made.hit_rates([INFINITY], BLOCKS)[0] == pytest.approx(3 / 6)
    assert made.hit_rates([INFINITY])[0] == pytest.approx(30 / 60)
    assert made.hit_rates([INFINITY], SHARES)[0] == pytest.approx((0 + 10 / 20 + 20 / 25) / 3)


def test_misses_have_their_reason_and_costly_prompts_their_place() -> None:
    prompts = [[1, 2, 3], [9], [1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]
    made = replayed(prompts, size=2.0)
    # Two blocks: 1 and 2 of the first prompt stay, and 9 takes the place of 2.
    expected = {NEW: 13 + 5, CONTINUES: 5, DIFFERS: 5, REST: 1, EVICTED: 4 * (2 + 0 + 1)}
    assert made.missed_tokens == expected
    assert [one.place for one in made.costliest][:2] == ["p1", "p3"]
    assert made.costliest[0].n_reused == 0


def conversations(seed: int, n: int) -> list[list[int]]:
    """Return prompts of chats that share beginnings and take turns, as ids of blocks."""
    rng, ids = random.Random(seed), iter(range(1, 1 << 30))
    systems = [[next(ids) for _ in range(rng.randint(2, 12))] for _ in range(12)]
    chats: list[list[int]] = []
    found = []
    for _ in range(n):
        if chats and rng.random() < 0.7:
            chat = chats[-1 - min(int(rng.expovariate(0.05)), len(chats) - 1)]
        else:
            chat = list(systems[min(int(rng.expovariate(0.4)), 11)])
            chats.append(chat)
        chat += [next(ids) for _ in range(rng.randint(1, 5))]
        found.append(list(chat))
    return found


def simulated(prompts: list[list[int]], n_blocks: int) -> float:
    """Return the share of blocks that a real cache with room for `n_blocks` finds."""
    measured = _states(1 << 40)
    _save(measured, [1])
    with_one = measured.memory_usage()
    _save(measured, [1, 2])
    one_block = measured.memory_usage() - with_one
    states = _states(n_blocks * one_block)
    own = states.namespace(b"model")
    n_found = 0
    for ids in prompts:
        tokens = np.array(ids, np.int32)
        with own.plan(tokens) as plan:
            n_found += plan.n_tokens
        _save(states, ids)
    return n_found / sum(map(len, prompts))


def _states(ram_bytes: int) -> tokcache.PrefixStateCache:
    return tokcache.PrefixStateCache(ram_bytes=ram_bytes, max_entries=1 << 30, block_tokens=1)


def _save(states: tokcache.PrefixStateCache, ids: list[int]) -> None:
    states.namespace(b"model").save(np.array(ids, np.int32), _fill, lambda *_: 1024)


def _fill(start: int, _stop: int, buffer: memoryview) -> None:
    buffer[0] = start % 256


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.25, 0.6])
def test_the_curve_of_states_is_that_of_five_real_caches(share: float) -> None:
    prompts = conversations(3, 1500)
    made = replayed(prompts)
    size = int(share * made.distances.n_seen)
    assert made.hit_rates([size], BLOCKS)[0] == pytest.approx(simulated(prompts, size), abs=0.01)


def test_mooncake_has_both_published_figures(shared_data: Path) -> None:
    """36.6% of the blocks; the 40% of the paper (FAST'25, table 2) is a mean of the prompts."""
    from tokcache.replay.blocks import BlockReplay  # noqa: PLC0415

    path = str(shared_data / "traces/mooncake/conversation_trace.jsonl")
    trace = open_trace(path, Skipped())
    replay = BlockReplay(Prefixes)
    assert sum(replay.run(trace)) == 12_031
    trace.source.close()
    made = replay.prefixes
    assert made is not None
    assert made.hit_rates([INFINITY], BLOCKS)[0] == pytest.approx(0.3664, abs=0.0001)
    assert made.hit_rates([INFINITY], SHARES)[0] == pytest.approx(0.4094, abs=0.0001)


# ---- texts


def text_replay(**config: Any) -> TextReplay:
    from tokenizers import Tokenizer  # noqa: PLC0415

    plain = Tokenizer.from_file(str(tiny_tokenizer()))
    wrapped = tokcache.wrap(plain, tokcache.CacheConfig(**config))
    set_cut_seed(wrapped)
    encoder = Encoder("tiny", "plain labels", plain, wrapped, wrapped, neutral_text)
    return TextReplay(encoder, generated="ids", size=None, rate=1.0, max_objects=1 << 20)


def set_cut_seed(wrapped: Any) -> None:
    """Cut as in every run; another secret of the cache finds up to a point more or less."""
    cache = wrapped._tokcache.l1.cache
    cache.cut_seed = bytes(range(len(cache.cut_seed)))


def chats(n: int) -> list[str]:
    """Return the prompts of chats that take turns, with shared instructions and documents."""
    rng = random.Random(3)
    letters = "abcdefghijklmnop"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(2000)]

    def said(n_words: int) -> str:
        return " ".join(rng.choices(words, k=n_words))

    systems = [said(rng.randint(200, 900)) for _ in range(30)]
    documents = [said(300) for _ in range(40)]
    live: list[str] = []
    found = []
    for _ in range(n):
        if live and rng.random() < 0.75:
            at = len(live) - 1 - min(int(rng.expovariate(0.06)), len(live) - 1)
        else:
            live.append(systems[min(int(rng.expovariate(0.15)), 29)])
            at = len(live) - 1
        live[at] += f"\n\nuser: {said(rng.randint(5, 60))}"
        if rng.random() < 0.4:
            live[at] += f"\n\ntool: {documents[min(int(rng.expovariate(0.1)), 39)]}"
        found.append(live[at])
        live[at] += f"\n\nassistant: {said(rng.randint(5, 80))}"
        if rng.random() < 0.2:
            found.append(found[-1 - int(rng.random() * min(len(found), 60))])
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return chats(1200)


@pytest.fixture(scope="module")
def of_texts(texts: list[str]) -> TextReplay:
    made = text_replay(engine="tokenizers", l0_max_entries=1)
    for text in texts:
        assert made.add(Request(text=text), "here") is None
    made.flush()
    return made


@pytest.mark.parametrize("share", [0.2, 0.3, 0.45, 0.6, 0.8])
def test_the_curves_of_texts_are_those_of_five_real_caches(
    share: float, texts: list[str], of_texts: TextReplay
) -> None:
    l0, l1 = of_texts.l0.distances, of_texts.l1.distances
    n_bytes = int(share * l1.greatest_distance())
    real = tokcache.wrap(
        of_texts.encoder.plain,
        tokcache.CacheConfig(engine="tokenizers", l0_max_entries=1, l1_max_bytes=n_bytes),
    )
    set_cut_seed(real)
    exact = tokcache.L0Cache(max_entries=1 << 30, max_bytes=int(share * l0.greatest_distance()))
    n_hits = 0
    for text in texts:
        ids = real.token_ids(text)
        if exact.get(text) is None:
            exact.put(text, ids)
        else:
            n_hits += 1
    found = real.cache_stats().l1.char_hit_rate
    assert of_texts.l1_rates([n_bytes])[0] == pytest.approx(found, abs=0.01)
    assert l0.hit_rates([exact.max_bytes])[0] == pytest.approx(n_hits / len(texts), abs=0.01)


@pytest.mark.parametrize("n_kib", [192, 384, 768])
def test_a_small_l1_has_up_to_four_points_less_than_its_curve(
    n_kib: int, texts: list[str], of_texts: TextReplay
) -> None:
    """All of a text is looked up before any of it is stored; the oldest of eight is evicted."""
    config = tokcache.CacheConfig(engine="tokenizers", l0_max_entries=1, l1_max_bytes=n_kib << 10)
    real = tokcache.wrap(of_texts.encoder.plain, config)
    set_cut_seed(real)
    for text in texts:
        real.token_ids(text)
    less = of_texts.l1_rates([n_kib << 10])[0] - real.cache_stats().l1.char_hit_rate
    assert -0.01 < less < 0.04


def test_generated_text_counts_only_with_ids_or_on_request() -> None:
    made = text_replay()
    prompt, reply = list(range(100, 132)), list(range(200, 232))
    again = [*prompt, *reply, *range(16)]
    for with_ids in (reply, None):
        made.add(Request(prompt_ids=[with_ids is None, *prompt], reply_ids=with_ids), "x")
        made.add(Request(prompt_ids=[with_ids is None, *again]), "x")
    made.flush()
    # 33 and 81 tokens: of the second prompt four blocks, or two without the reply.
    assert made.prefixes.hit_rates([INFINITY], BLOCKS)[0] == pytest.approx(6 / 14)
    assert (made.n_replies, made.n_reply_tokens) == (1, 32)


def test_a_text_that_can_not_be_encoded_is_named_without_its_words() -> None:
    made = text_replay()
    why = made.add(Request(text="a secret \ud800"), "here")
    assert why is not None
    assert "surrogate" in why
    assert "secret" not in why
    assert made.add(Request(prompt_ids=[1 << 40]), "here") == "its token ids are no 32-bit integers"
