"""Reproducible mode against plain llama_cpp.Llama, bit for bit, at every position.

A plain one with `n_batch=block_tokens` decodes the same pieces from an empty context. Where both
keep all positions, their logits are equal. A window has n_swa cells for each of n_seq_max sequences
and n_ubatch more, rounded up to 256 (llama_kv_cache_iswa of llama.cpp); states are copied through a
second sequence, so ours has more. From the position on at which plain llama_cpp writes into the
first cells again, the same numbers are added up in another order.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.integration.models import BLOCK, GREEDY, keep_logits, llama, plain, store, text
from tests.integration.test_llama_memories import MEMORIES, WINDOWED, answer, differences, fresh
from tokcache import samples

N_PLAIN_CELLS = 256  # a window of 32 and batches of 32, rounded up
SMALL_WINDOWS = sorted(name for name in WINDOWED if not MEMORIES[name][1])


def pair(memory: str, **settings: Any) -> tuple[Any, Any]:
    """Return a cached reproducible Llama and a plain one that decodes batches of BLOCK."""
    architecture, swa_full = MEMORIES[memory]
    settings |= {"model": samples.tiny_model(architecture=architecture), "swa_full": swa_full}
    theirs = plain(**{"n_batch": BLOCK, **settings})
    return llama(store(), reproducible=True, **settings), theirs


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("flash_attn", [False, True], ids=["no flash", "flash"])
def test_reproducible_logits_are_those_of_plain_llama_cpp(memory: str, flash_attn: bool) -> None:
    cached, theirs = pair(memory, flash_attn=flash_attn)
    for llm in (cached, theirs):
        keep_logits(llm)
    n_equal = N_PLAIN_CELLS if memory in SMALL_WINDOWS else cached.n_ctx()
    rng = random.Random(1)
    prompt: list[int] = []
    for n_kept, n_new in ((0, 1), (0, 31), (31, 1), (20, 90), (100, 95), (64, 140), (150, 450)):
        prompt = prompt[:n_kept] + fresh(rng, n_new)
        cached.reset()
        theirs.reset()
        answers = [answer(llm, prompt, 8) for llm in (cached, theirs)]
        first, stop = len(prompt) - cached.last_reuse.n_decoded, min(n_equal, cached.n_tokens)
        assert differences(cached, theirs, first, stop) == 0.0
        if len(prompt) + 8 <= n_equal:
            assert answers[0] == answers[1]
    stats = cached.prefix_cache.stats()
    assert stats.restored_tokens > 6 * BLOCK
    assert stats.refusals == {}


@pytest.mark.parametrize("memory", SMALL_WINDOWS)
def test_a_small_window_differs_from_where_plain_llama_cpp_uses_its_cells_again(
    memory: str,
) -> None:
    ours, theirs = pair(memory, flash_attn=True)
    prompt = fresh(random.Random(2), 600)
    for llm in (ours, theirs):
        keep_logits(llm)
        llm.eval(prompt)
    differs = (ours.scores[:600].view(np.int32) != theirs.scores[:600].view(np.int32)).any(axis=1)
    assert differs.argmax() == N_PLAIN_CELLS
    # With larger batches it has as many cells as ours; the same pieces are then equal throughout.
    ours, theirs = pair(memory, flash_attn=True, n_batch=512)
    for llm in (ours, theirs):
        keep_logits(llm)
    ours.eval(prompt)
    for start in range(0, len(prompt), BLOCK):
        theirs.eval(prompt[start : start + BLOCK])
    assert differences(ours, theirs, 0) == 0.0


def test_texts_are_those_of_plain_llama_cpp_with_batches_of_a_block() -> None:
    cached, theirs = pair("attention")
    larger = plain()
    prompts = ["The import system of Python: " * 12, "Hello " * 40, "The import system " * 20]
    for prompt in (*prompts, *prompts):
        theirs.reset()
        texts = [text(llm.create_completion(prompt, **GREEDY)) for llm in (cached, theirs)]
        assert texts[0] == texts[1]
    assert cached.last_reuse.n_restored > 0
    # Negative control: other batches give other last bits, so the comparison can fail.
    prompt_ids = larger.tokenize(prompts[0].encode())
    for llm in (theirs, larger):
        llm.reset()
        keep_logits(llm)
        llm.eval(prompt_ids)
    assert differences(theirs, larger, 0) > 0.0
