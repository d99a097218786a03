"""The states: a look-up among 10,000 prefixes, and a block saved and restored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokcache import PrefixStateCache

BLOCK, BLOCK_BYTES = 256, 2_400_000


@pytest.fixture(scope="module")
def prefixes() -> tuple[Any, list[Any]]:
    """Return a namespace with 10,000 prefixes of 512 tokens, and some of them."""
    cache = PrefixStateCache(ram_bytes=1 << 40, max_entries=1 << 30, block_tokens=BLOCK)
    states, rng = cache.namespace(b"model"), np.random.default_rng(1)
    kept = []
    for n in range(10_000):
        tokens = rng.integers(0, 150_000, 512, np.int32)
        states.save(tokens, lambda *_: None, lambda *_: 64)
        if n % 500 == 0:
            kept.append(np.concatenate([tokens, rng.integers(0, 150_000, 512, np.int32)]))
    return states, kept


def n_found(states: Any, tokens: Any) -> int:
    with states.plan(tokens) as plan:
        return int(plan.n_tokens)


@pytest.mark.parametrize("kind", ["known", "new"])
def test_look_up_among_10_000_prefixes(
    benchmark: Any, prefixes: tuple[Any, list[Any]], kind: str
) -> None:
    states, kept = prefixes
    tokens = kept[7] if kind == "known" else kept[7][::-1].copy()
    found = benchmark(n_found, states, tokens)
    assert found == 512 if kind == "known" else found < 8


def test_block_save(rounds: Any) -> None:
    cache = PrefixStateCache(ram_bytes=BLOCK_BYTES * 3 // 2, block_tokens=BLOCK)
    states, rng = cache.namespace(b"model"), np.random.default_rng(2)
    payload = rng.integers(0, 255, BLOCK_BYTES, np.uint8)

    def read(_start: int, _stop: int, buffer: memoryview) -> None:
        np.copyto(np.frombuffer(buffer, np.uint8), payload)

    def save(tokens: Any) -> int:
        return int(states.save(tokens, read, lambda *_: BLOCK_BYTES))

    saved = rounds(save, lambda: rng.integers(0, 150_000, BLOCK, np.int32), 100)
    assert saved == BLOCK


def test_block_restore(benchmark: Any) -> None:
    cache = PrefixStateCache(ram_bytes=BLOCK_BYTES * 3 // 2, block_tokens=BLOCK)
    states, target = cache.namespace(b"model"), np.zeros(BLOCK_BYTES, np.uint8)
    tokens = np.arange(BLOCK, dtype=np.int32)
    states.save(tokens, lambda _a, _b, buffer: buffer.__setitem__(0, 7), lambda *_: BLOCK_BYTES)

    def load(_start: int, _stop: int, payload: memoryview) -> None:
        np.copyto(target, np.frombuffer(payload, np.uint8))

    def restore() -> int:
        with states.plan(tokens) as plan:
            return int(plan.restore(load))

    assert benchmark(restore) == BLOCK
    assert target[0] == 7
