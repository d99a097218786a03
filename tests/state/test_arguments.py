"""Arguments of the state classes: token ids, sizes and counts that are accepted, and errors."""

from __future__ import annotations

import ctypes
from array import array
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.state.engine import state_of
from tokcache.errors import InvalidConfig, InvalidTokens
from tokcache.state.cache import PrefixStateCache
from tokcache.state.names import token_bytes
from tokcache.state.tiers.disk import DiskTier
from tokcache.text.token_ids import TokenIds

IDS = [7, 8, 9, 70_000, 0, 5]
FORMS: dict[str, Any] = {
    "list": IDS,
    "tuple": tuple(IDS),
    "deque": deque(IDS),
    "keys": dict.fromkeys(IDS).keys(),
    "generator": (each for each in IDS),
    "TokenIds": TokenIds(IDS),
    "array": array("i", IDS),
    "array of 8 bytes": array("q", IDS),
    "ctypes": (ctypes.c_int * 6)(*IDS),
    "int32": np.array(IDS, np.int32),
    "int64": np.array(IDS, np.int64),
    "uint32": np.array(IDS, np.uint32),
    "uint64": np.array(IDS, np.uint64),
    "big-endian": np.array(IDS, ">i4"),
    "strided": np.repeat(np.array(IDS, np.int64), 2)[::2],
    "objects": np.array(IDS, object),
    "NumPy integers": [np.int64(each) for each in IDS],
    "mixed": [np.int32(7), 8, *np.array(IDS[2:], np.uint32)],
    "memoryview": np.array(IDS, np.int64).data,
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_accepted_ids_are_those_of_token_ids(form: str) -> None:
    tokens = list(FORMS[form]) if form == "generator" else FORMS[form]
    held = (each for each in tokens) if form == "generator" else tokens
    assert token_bytes(held) == memoryview(TokenIds(tokens)).tobytes()
    assert token_bytes(held if form != "generator" else iter(tokens)) == array("i", IDS).tobytes()


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"generator"}))
def test_every_method_accepts_the_same_ids(form: str) -> None:
    tokens, cache = FORMS[form], PrefixStateCache(block_tokens=4)
    key: dict[str, Any] = {"fingerprint": b"m"}

    def read(start: int, stop: int, buffer: memoryview) -> None:
        buffer[:] = state_of(IDS, start, stop)

    assert cache.namespace(**key).store(tokens, b"state")
    assert cache.namespace(**key).find(tokens) is not None
    assert cache.namespace(**key).handle(tokens) is not None
    assert cache.namespace(**key).fill(tokens, 3, lambda _: None)
    assert cache.namespace(**key).save(tokens, read, lambda a, b: 4 * (b - a)) == 6
    with cache.namespace(**key).plan(tokens) as plan:
        assert plan.n_tokens == 6


WRONG: dict[str, tuple[Any, str]] = {
    "text": ("a secret", "not str; encode a text first"),
    "bytes": (b"a secret", "not bytes"),
    "bytearray": (bytearray(b"a secret"), "not bytearray"),
    "nothing": (None, "a sequence of integers, not NoneType"),
    "a number": (7, "a sequence of integers, not int"),
    "a NumPy number": (np.int64(7), "one-dimensional, not 0-dimensional"),
    "words": ([1, "a secret"], "at position 1 there is a str"),
    "an encoding": ({"input_ids": [1]}, "at position 0 there is a str"),
    "floats": ([1, 2, 3.0], "at position 2 there is a float"),
    "None inside": ((1, None), "at position 1 there is a NoneType"),
    "a batch": ([[1, 2]], "at position 0 there is a list"),
    "a batch in an array": (np.ones((2, 3), np.int32), "one-dimensional, not 2-dimensional"),
    "an array of floats": (np.ones(3), "not an array of float64"),
    "an array of bools": (np.ones(3, bool), "not an array of bool"),
    "times": (np.array(["2026-01-01"], "datetime64[D]"), "at position 0 there is a date"),
    "too large": ([1, 2**31], "at position 1 there is 2,147,483,648"),
    "too small": ([1, 2, -(2**31) - 1], "at position 2 there is -2,147,483,649"),
    "too large in an array": (np.array([1, 5 * 10**9]), "at position 1 there is 5,000,000,000"),
    "too small in an array": (np.array([-5 * 10**9]), "at position 0 there is -5,000,000,000"),
    "too large without a sign": (
        np.array([0, 0, 2**64 - 1], np.uint64),
        "at position 2 there is 18,446,744,073,709,551,615",
    ),
    "a NumPy integer": ([np.int64(2**40)], "at position 0 there is 1,099,511,627,776"),
}


@pytest.mark.parametrize("form", sorted(WRONG))
def test_the_error_names_the_position_of_the_first_wrong_id(form: str) -> None:
    tokens, expected = WRONG[form]
    cache = PrefixStateCache()
    key: dict[str, Any] = {"fingerprint": b"m"}
    calls: list[Any] = [
        lambda: token_bytes(tokens),
        lambda: cache.namespace(**key).store(tokens, b""),
        lambda: cache.namespace(**key).find(tokens),
        lambda: cache.namespace(**key).handle(tokens),
        lambda: cache.namespace(**key).fill(tokens, 0, bytes),
        lambda: cache.namespace(**key).plan(tokens),
        lambda: cache.namespace(**key).save(tokens, lambda *_: None, lambda *_: 1),
    ]
    for call in calls:
        with pytest.raises(InvalidTokens) as caught:
            call()
        assert expected in str(caught.value)
        assert "secret" not in str(caught.value)
    assert len(cache) == 0


# Sizes and counts


@pytest.mark.parametrize("size", ["1M", "1024 K", "1MiB", 1 << 20, np.int64(1 << 20)])
def test_sizes_have_units(tmp_path: Path, size: Any) -> None:
    tier = DiskTier(tmp_path, max_bytes=size)
    cache = PrefixStateCache(ram_bytes=size, queue_bytes=size, disk=tier)
    assert cache.ram_bytes == tier.max_bytes == 1 << 20
    assert cache._store.below[0].writer.max_bytes == 1 << 20
    assert type(cache.ram_bytes) is type(tier.max_bytes) is int
    cache.namespace(b"m").store([1], bytes(1000))
    cache.flush()
    assert tier.prune("2K") > 0
    assert tier.prune("100%") > 0
    assert tier.prune("0") == 0
    cache.close()


@pytest.mark.parametrize("size", ["4GB", "", "much", "-1", 0, "0", 1.5, None, True])
@pytest.mark.parametrize("name", ["ram_bytes", "queue_bytes", "max_bytes"])
def test_invalid_sizes_are_refused(tmp_path: Path, name: str, size: Any) -> None:
    if (name, size) == ("queue_bytes", None):
        return  # a share of ram_bytes
    make: Any = DiskTier if name == "max_bytes" else PrefixStateCache
    args = (tmp_path,) if name == "max_bytes" else ()
    with pytest.raises(InvalidConfig, match=name):
        make(*args, **{name: size})


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16])
def test_counts_may_be_numpy_integers(tmp_path: Path, kind: Any) -> None:
    cache = PrefixStateCache(
        max_entries=kind(9), block_tokens=kind(4), min_tokens=kind(1), disk=tmp_path
    )
    key: dict[str, Any] = {"fingerprint": b"m", "public_prefix": [kind(each) for each in IDS[:2]]}
    assert cache.namespace(**key).store(IDS, b"s", n_past=kind(6), priority=kind(1))
    saved = cache.namespace(**key).save(
        IDS, lambda *_: None, lambda a, b: kind(b - a), priority=kind(1)
    )
    assert saved == 6
    cache.namespace(b"m").note_prefill(kind(100), 0.1)
    cache.count_prompt(kind(9), context_tokens=kind(3), restored_tokens=kind(1))
    cache.flush()
    assert cache.stats().refusals == {}
    fresh = PrefixStateCache(block_tokens=4, disk=tmp_path)
    with fresh.namespace(**key).find(IDS) as handle:  # type: ignore[union-attr]
        assert (handle.n_past, handle.priority) == (6, 1)
        assert type(handle.n_past) is int
    with fresh.namespace(**key).plan(IDS, max_tokens=kind(5)) as plan:
        assert plan.n_tokens == 5
    cache.close()
    fresh.close()
