"""A synthetic trace through the cache, as `python -m bench run replay-mooncake` runs a real one."""

from __future__ import annotations

import random

import pytest

cachetools = pytest.importorskip("cachetools")

from bench.replay_mooncake import (  # noqa: E402
    STATE_BYTES,
    TOKENS,
    UNBOUNDED,
    Prompt,
    cached,
    classic,
    make_cache,
    ratios,
    seen,
)
from tokcache.state.index import root_bytes  # noqa: E402
from tokcache.state.memory import NODE_BYTES  # noqa: E402
from tokcache.state.names import TOKEN_BYTES, RootKey  # noqa: E402

ROOT = root_bytes(RootKey(b"mooncake", None, "free"))


def trace(n_prompts: int, seed: int) -> list[Prompt]:
    """Return prompts that continue or leave one of the latest; all have the same first block."""
    rng, made, n_ids = random.Random(seed), [Prompt([0], 512)], 1
    for _ in range(n_prompts):
        parent = rng.choice(made[-12:]).ids
        kept = parent[: rng.randint(1, len(parent))]
        n_new = rng.randint(0, 6)
        ids = [*kept, *range(n_ids, n_ids + n_new)][:40]
        n_ids += n_new
        made.append(Prompt(ids, 512 * len(ids) - rng.randint(0, 511)))
    return made


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_blocks", [45, 60, 100, 300])
def test_the_least_recently_used_goes_first_as_in_an_exact_lru(n_blocks: int, seed: int) -> None:
    prompts = trace(400, seed)
    cache = make_cache(ROOT + n_blocks * (NODE_BYTES + TOKENS * TOKEN_BYTES + STATE_BYTES))
    ours = list(cached(cache, prompts))
    cache._check()
    assert ours == list(classic(cachetools.LRUCache(n_blocks), prompts))
    # The trace distinguishes the policies.
    assert ours != list(classic(cachetools.FIFOCache(n_blocks), prompts))
    assert cache.stats().evictions > 0


def test_without_a_limit_every_seen_prefix_is_found() -> None:
    prompts = trace(400, 7)
    found = list(cached(make_cache(UNBOUNDED), prompts))
    assert found == list(seen(prompts))
    assert ratios(prompts, found) == ratios(prompts, list(seen(prompts)))


def test_a_shorter_last_block_counts_its_tokens() -> None:
    prompts = [Prompt([1, 2], 600), Prompt([1, 2], 600), Prompt([1, 3], 1024)]
    assert list(seen(prompts)) == [0, 2, 1]
    assert ratios(prompts, [0, 2, 1]) == {
        "a prompt": pytest.approx(50.0),
        "tokens": pytest.approx(100 * 1112 / 2224),
        "blocks": pytest.approx(50.0),
    }
