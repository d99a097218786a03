"""With layers on a GPU only the speed changes; skipped where llama.cpp can't use one."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.integration.models import BLOCK, llama_cpp, store
from tests.integration.test_llama_memories import Pair, every_memory, fresh

needs_gpu = pytest.mark.skipif(
    not llama_cpp.llama_supports_gpu_offload(),
    reason="this build of llama-cpp-python can't offload layers to a GPU",
)


@needs_gpu
@every_memory
@pytest.mark.parametrize("flash_attn", [True, False])
def test_logits_on_a_gpu_are_equal_bit_for_bit(memory: str, flash_attn: bool) -> None:
    offloaded: dict[str, Any] = {"n_gpu_layers": -1, "flash_attn": flash_attn}
    pair = Pair(memory, **offloaded)
    rng = random.Random(1)
    a, b = fresh(rng, 4 * BLOCK + 7), fresh(rng, 3 * BLOCK)
    for _ in range(3):
        a += pair.ask(a, 6) + fresh(rng, 11)
        b += pair.ask(b, BLOCK + 3) + fresh(rng, 2 * BLOCK)
    assert pair.restored() > 0
    assert pair.cached.prefix_cache.stats().refusals == {}
    pair.close()


@needs_gpu
def test_states_of_a_gpu_and_of_a_cpu_never_meet() -> None:
    cache, prompt = store(), fresh(random.Random(2), 3 * BLOCK)
    for n_gpu_layers in (-1, 0):
        pair = Pair("attention", cache, n_gpu_layers=n_gpu_layers)
        pair.ask(prompt)
        assert pair.restored() == 0
        pair.close()
