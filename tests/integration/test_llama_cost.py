"""Llama tells its cache how long prefilling takes; a disk that is slower is not asked."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.integration.models import BLOCK, GREEDY, llama, store, text
from tests.state.test_cost import SlowDisk
from tokcache import samples

RNG = random.Random(6)
LONG, OTHER = RNG.choices(range(3, 500), k=5 * BLOCK + 7), RNG.choices(range(3, 500), k=100)


@pytest.mark.parametrize(("delay_s", "n_blocks"), [(0.0, 5), (0.5, 1)], ids=["fast", "slow"])
def test_a_disk_is_used_if_it_is_faster_than_prefilling(
    tmp_path: Path, delay_s: float, n_blocks: int
) -> None:
    def made() -> tuple[SlowDisk, Any, Any]:
        disk = SlowDisk(tmp_path)
        disk.delay_s = 0.0
        cache = store(disk=disk)
        return disk, cache, llama(cache, reproducible=True)

    _, cache, llm = made()
    expected = text(llm.create_completion(LONG, **GREEDY))
    llm.close()
    cache.close()
    disk, cache, llm = made()
    llm.create_completion(OTHER, **GREEDY)
    disk.delay_s = delay_s
    assert text(llm.create_completion(LONG, **GREEDY)) == expected
    assert llm.last_reuse.n_restored == n_blocks * BLOCK
    assert disk.n_reads == n_blocks
    llm.close()
    cache.close()


def test_the_cache_learns_how_long_this_model_takes_to_prefill() -> None:
    cache = store()
    llm = llama(cache)
    llm.create_completion(OTHER, **GREEDY)
    ((fingerprint, speed),) = cache._store._prefill.items()
    assert fingerprint == llm._states._key()
    assert speed._n_tokens == len(OTHER)  # the answer's tokens, one by one, are not counted
    assert 0 < speed.seconds(1) < 1
    llm.close()


@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
@pytest.mark.parametrize("is_reproducible", [False, True])
def test_a_recurrent_model_reads_only_the_last_state_from_disk(
    tmp_path: Path, arch: str, is_reproducible: bool
) -> None:
    def made() -> tuple[Any, Any]:
        cache = store(disk=tmp_path / "states")
        model = samples.tiny_model(architecture=arch)
        return cache, llama(cache, model=model, reproducible=is_reproducible, n_ctx=1024)

    cache, llm = made()
    prompt = RNG.choices(range(3, 500), k=12 * BLOCK + 7)
    expected = text(llm.create_completion(prompt, **GREEDY))
    llm.close()
    cache.close()
    sizes = {path.stat().st_size for path in (tmp_path / "states").rglob("*.0")}
    assert len(list((tmp_path / "states").rglob("*.0"))) >= 12  # a state at each block's end
    cache, llm = made()
    assert text(llm.create_completion(prompt, **GREEDY)) == expected
    n_restored = 12 * BLOCK if is_reproducible else len(prompt) - 1
    assert llm.last_reuse.n_restored == n_restored
    assert 0 < cache.stats().disk.read_bytes < max(sizes)
    llm.close()
    cache.close()
