"""Contexts that are not cached, and positions that something else than a token wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.integration.models import (
    BLOCK,
    GREEDY,
    decode_embeddings,
    llama,
    plain,
    store,
    text,
)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"logits_all": True}, "logits_all"), ({"embedding": True}, "embedding_context")],
)
def test_contexts_that_need_every_row_run_uncached(settings: Any, reason: str) -> None:
    llm = llama(store(), **settings)
    if reason == "embedding_context":
        assert len(llm.embed("Hello")) > 0
        assert llm._states.uncached == reason
        return
    for _ in range(2):
        answer = llm.create_completion("Hello " * 40, logprobs=2, **GREEDY)
        assert len(answer["choices"][0]["logprobs"]["tokens"]) == 6
        next(llm.generate([7] * 9, temp=0.0))
    assert llm.prefix_cache.stats().refusals == {reason: 4}


def test_speculative_decoding_runs_uncached_and_right() -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # noqa: PLC0415

    draft = LlamaPromptLookupDecoding(num_pred_tokens=4)
    ours, theirs = llama(store(), draft_model=draft), plain(draft_model=draft)
    for _ in range(2):
        answers = [text(x.create_completion("one two " * 30, **GREEDY)) for x in (ours, theirs)]
        assert answers[0] == answers[1]
    assert ours.prefix_cache.stats().refusals == {"draft_model": 2}


class ImageHandler:
    """Fills the context as llama_cpp's multimodal handlers do: text, image, text."""

    def __init__(self, n_positions: int = 40) -> None:
        self.n_positions = n_positions

    def __call__(self, *, llama: Any, messages: Any, stream: bool = False, **_: Any) -> Any:
        text_before, seed, text_after = messages[0]["content"]
        rows = np.random.default_rng(seed).normal(0, 1, (self.n_positions, llama.n_embd()))
        llama.reset()
        llama._ctx.kv_cache_clear()
        llama.eval(llama.tokenize(text_before.encode(), add_bos=True, special=True))
        decode_embeddings(llama, rows.astype(np.float32))
        llama.eval(llama.tokenize(text_after.encode(), add_bos=False, special=True))
        prompt = llama.input_ids[: llama.n_tokens].tolist()
        return llama.create_completion(prompt=prompt, stream=stream, **GREEDY)


def ask(llm: Any, seed: int, before: str = "Look at " * 30, after: str = " what is it?") -> str:
    return text(llm.create_chat_completion([{"role": "user", "content": (before, seed, after)}]))


@pytest.mark.parametrize("reproducible", [True, False])
def test_two_images_with_the_same_text_around_them(reproducible: bool) -> None:
    handler = ImageHandler()
    cached = llama(store(), chat_handler=handler, reproducible=reproducible)
    uncached = llama(chat_handler=handler, reproducible=reproducible)
    alone = []
    for seed in (1, 2):
        uncached.reset()
        uncached.input_ids.fill(0)
        alone.append(ask(uncached, seed))
    assert alone[0] != alone[1]  # the control: the image decides
    for _ in range(2):
        assert [ask(cached, seed) for seed in (1, 2)] == alone
    n_before = len(cached.tokenize(b"Look at " * 30, special=True))
    assert cached.prefix_cache.stats().saved_tokens <= n_before
    cached.prefix_cache._check()


def test_ids_of_an_earlier_prompt_at_image_positions_never_match_a_prompt() -> None:
    handler = ImageHandler()
    cached, uncached = llama(store(), chat_handler=handler), llama()
    # This prompt's ids are in input_ids where the image is written later.
    prompt = cached.tokenize(b"Look at " * 30 + b"the same words, over and over " * 12)
    next(cached.generate(prompt, temp=0.0))
    before = cached.tokenize(b"Look at " * 30, special=True)
    ask(cached, 1)
    assert (cached.input_ids[len(before) : len(before) + handler.n_positions] == -1).all()
    first = next(cached.generate(prompt, temp=0.0))
    assert cached.last_reuse.n_in_context <= len(before)
    assert first == next(uncached.generate(prompt, temp=0.0))


def test_a_handlers_stream_that_another_request_overtakes() -> None:
    cached = llama(store(), chat_handler=ImageHandler(), reproducible=True)
    alone = ask(cached, 1)
    message = [{"role": "user", "content": ("Look at " * 30, 1, " what is it?")}]
    streamed = cached.create_chat_completion(message, stream=True)
    # The context is filled, and another request comes before the first token is sampled.
    assert text(cached.create_completion("Hello " * 30, **GREEDY))
    assert "".join(text(part) for part in streamed) == alone


def test_positions_after_a_foreign_state_are_not_saved() -> None:
    llm = llama(store())
    other = llama()
    other.eval([5] * 50)
    llm.load_state(other.save_state())
    next(llm.generate([5] * 50 + [6] * 50, temp=0.0))
    assert llm.last_reuse.n_in_context == 50
    llm.close()
    assert llm.prefix_cache.stats().saved_tokens == 0


def test_a_state_that_can_not_be_loaded_leaves_an_empty_context() -> None:
    llm, other = llama(store()), llama()
    other.eval([5] * 50)
    state = other.save_state()
    state.llama_state = bytes(len(state.llama_state))
    llm.eval([7] * 20)
    with pytest.raises(RuntimeError, match="Failed to set llama state"):
        llm.load_state(state)
    assert llm.n_tokens == llm._sequence.end() == 0
    llm._record._check()
    assert next(llm.generate([5] * 60, temp=0.0)) == next(other.generate([5] * 60, temp=0.0))
    assert llm.last_reuse.n_decoded == 60


def test_a_restore_after_a_foreign_state_does_not_make_it_savable() -> None:
    llm, other = llama(store()), llama()
    next(llm.generate([5] * 100, temp=0.0))
    next(llm.generate([7] * 10, temp=0.0))
    other.eval([5] * 50)
    llm.load_state(other.save_state())
    next(llm.generate([5] * 100 + [6] * 50, temp=0.0))
    assert (llm.last_reuse.n_in_context, llm.last_reuse.n_restored) == (50, 50)
    assert llm._record.n_known == 0


def test_blocks_are_refused_where_llama_cpp_would_end_the_process() -> None:
    from tokcache.errors import StateError  # noqa: PLC0415
    from tokcache.llama.memory_type import MemoryType  # noqa: PLC0415
    from tokcache.llama.sequence import Sequence  # noqa: PLC0415

    single = plain()
    single.eval([5] * BLOCK)
    sequence = Sequence(single.ctx, MemoryType.of(single.ctx), is_unified=False)
    for use in (
        lambda: sequence.read_block(0, BLOCK, memoryview(bytearray(9))),
        lambda: sequence.write_block(0, BLOCK, memoryview(bytearray(9))),
        lambda: sequence.block_bytes(0, BLOCK),
    ):
        with pytest.raises(StateError, match="n_seq_max"):
            use()
