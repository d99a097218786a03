"""The types of the public API: mypy checks the assertions, pytest runs the code."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, assert_type

from tokenizers import Tokenizer, models

import tokcache
from tokcache import CacheStats, L0Cache, L0Stats, TokenIds

if TYPE_CHECKING:
    from tokcache import PrefixStateCache, StateStats


def test_l0_cache() -> None:
    cache = L0Cache(max_entries=10, max_bytes=1 << 20, sample_size=8)
    assert_type(cache.put("a", [1, 2]), bool)
    ids = cache.get("a", add_special_tokens=True)
    assert_type(ids, TokenIds | None)
    assert ids is not None
    assert_type(ids[0], int)
    assert_type(ids[1:], TokenIds)
    assert_type(ids.tolist(), list[int])
    assert_type(len(cache), int)
    assert_type(cache.stats(), L0Stats)
    assert_type(cache.stats().hit_rate, float)


def test_sizes_are_given_as_int_or_str_and_read_as_int() -> None:
    config = tokcache.CacheConfig(l0_max_bytes="64M", l1_max_bytes=1 << 20)
    assert_type(config.l0_max_bytes, int)
    assert config.l0_max_bytes == 64 << 20
    cache = L0Cache(max_bytes="1.5G", max_entries=10)
    assert_type(cache.max_bytes, int)
    assert cache.max_bytes == 3 << 29
    assert_type(bool(cache), bool)
    cache.clear(scope="tenant-a")


def test_wrapped_tokenizer() -> None:
    model = models.WordLevel({"a": 1, "[UNK]": 0}, unk_token="[UNK]")  # noqa: S106 (a token)
    tok = tokcache.wrap(Tokenizer(model), tokcache.CacheConfig(l0_max_entries=5))
    assert_type(tok.token_ids("a"), TokenIds)
    assert_type(tok.token_ids_batch(["a", "b"], add_special_tokens=False), list[TokenIds])
    assert_type(tok.cache_stats(), CacheStats)
    assert_type(asyncio.run(tok.atoken_ids("a", scope="tenant-a")), TokenIds)
    tok.cache_clear(scope="tenant-a")
    tok.cache_clear()


def states_are_typed(states: PrefixStateCache) -> StateStats:
    """Checked by mypy only: public classes used as types of parameters and results."""
    assert_type(states.memory_usage(), int)
    return states.stats()
