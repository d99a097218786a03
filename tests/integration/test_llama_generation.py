from __future__ import annotations

import gc
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.integration.models import GREEDY, llama, llama_cpp, plain, store, text
from tokcache.errors import InvalidTokens, ModelClosed, StateError
from tokcache.llama import gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPTS = [
    "The import system of Python: " * 12,
    "class Cache:\n    def get(self, key):\n" * 9,
    "The import system of Python: " * 11 + "the finder",
    "Hello",
]


@pytest.fixture
def llm() -> Iterator[Any]:
    made = llama(store(), reproducible=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    uncached, answers = llama(reproducible=True), {}
    for prompt in PROMPTS:
        uncached.reset()
        answers[prompt] = text(uncached.create_completion(prompt, **LONG))
    return answers


LONG: dict[str, Any] = {**GREEDY, "max_tokens": 16}


def stream(llm: Any, prompt: str) -> Iterator[str]:
    return (text(part) for part in llm.create_completion(prompt, stream=True, **LONG))


def test_completion_and_stream_give_the_uncached_text(llm: Any, expected: dict[str, str]) -> None:
    for _ in range(2):
        for prompt in PROMPTS:
            assert text(llm.create_completion(prompt, **LONG)) == expected[prompt]
            assert "".join(stream(llm, prompt)) == expected[prompt]
            assert llm(prompt, **LONG)["choices"][0]["text"] == expected[prompt]
    assert llm.prefix_cache.stats().hits > 0


def test_sampling_with_a_seed_is_the_same_cached_or_not(llm: Any) -> None:
    uncached = llama(reproducible=True)
    for _ in range(2):
        for prompt in PROMPTS:
            uncached.reset()
            drawn = [
                text(x.create_completion(prompt, max_tokens=12, seed=7)) for x in (llm, uncached)
            ]
            assert drawn[0] == drawn[1]


def test_a_stream_is_saved_when_it_ends_is_closed_or_fails(llm: Any) -> None:
    long = [PROMPTS[0] + str(i) for i in range(4)]
    assert "".join(stream(llm, long[0]))
    saved = [llm.prefix_cache.stats().saved_tokens]
    closed = llm.create_completion(PROMPTS[1] + "closed", stream=True, **LONG)
    next(closed)
    closed.close()
    saved.append(llm.prefix_cache.stats().saved_tokens)
    thrown = llm.create_completion("thrown " * 80, stream=True, **LONG)
    next(thrown)
    with pytest.raises(KeyError):
        thrown.throw(KeyError("consumer"))
    saved.append(llm.prefix_cache.stats().saved_tokens)
    assert 0 < saved[0] < saved[1] < saved[2]
    with pytest.raises(StopIteration):
        next(closed)


def test_an_abandoned_stream_blocks_no_other_and_is_saved(
    llm: Any, expected: dict[str, str]
) -> None:
    abandoned = llm.create_completion(PROMPTS[0], stream=True, **LONG)
    next(abandoned)
    del abandoned
    gc.collect()
    assert text(llm.create_completion(PROMPTS[1], **LONG)) == expected[PROMPTS[1]]
    assert text(llm.create_completion(PROMPTS[0], **LONG)) == expected[PROMPTS[0]]
    assert llm.last_reuse.n_restored > 0


def test_a_stream_that_is_kept_but_not_read_blocks_no_other(
    llm: Any, expected: dict[str, str]
) -> None:
    kept = stream(llm, PROMPTS[0])
    first = next(kept)
    answers: list[str] = []

    def other() -> None:
        answers.append(text(llm.create_completion(PROMPTS[1], **LONG)))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(30)
    assert answers == [expected[PROMPTS[1]]]
    assert first + "".join(kept) == expected[PROMPTS[0]]


@pytest.mark.parametrize("reproducible", [True, False])
def test_interleaved_streams_give_the_same_as_alone(reproducible: bool) -> None:
    alone, llm = llama(reproducible=reproducible), llama(store(), reproducible=reproducible)
    answers = []
    for prompt in PROMPTS[1:]:
        alone.reset()
        answers.append("".join(stream(alone, prompt)))
    parts: list[list[str]] = [[] for _ in answers]
    streams = [stream(llm, prompt) for prompt in PROMPTS[1:]]
    began = time.monotonic()
    for _ in range(40):
        for part, one in zip(parts, streams, strict=True):
            part.append(next(one, ""))
    assert ["".join(part) for part in parts] == answers
    assert time.monotonic() - began < 5  # one thread does not wait for itself


def test_interleaved_sampling_keeps_each_streams_sampler() -> None:
    settings = {"max_tokens": 14, "temperature": 1.5, "seed": 3, "repeat_penalty": 1.3}
    alone, llm = llama(reproducible=True), llama(store(), reproducible=True)
    answers = []
    for prompt in PROMPTS[:2]:
        alone.reset()
        answers.append(text(alone.create_completion(prompt, **settings)))
    streams = [llm.create_completion(p, stream=True, **settings) for p in PROMPTS[:2]]
    parts = ["", ""]
    for _ in range(20):
        for i, one in enumerate(streams):
            part = next(one, None)
            parts[i] += text(part) if part else ""
    assert parts == answers


def test_threads_take_turns(llm: Any, expected: dict[str, str]) -> None:
    failures: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(6):
            prompt = PROMPTS[rng.integers(len(PROMPTS))]
            kind = rng.integers(3)
            try:
                if kind == 0:
                    got = text(llm.create_completion(prompt, **LONG))
                elif kind == 1:
                    got = "".join(stream(llm, prompt))
                else:
                    next(stream(llm, prompt))  # abandoned
                    continue
                if got != expected[prompt]:
                    failures.append((prompt, got))
            except Exception as error:  # noqa: BLE001
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)
    llm.prefix_cache._check()


def test_a_stream_may_move_from_thread_to_thread(llm: Any, expected: dict[str, str]) -> None:
    parts: list[str] = []
    moving = stream(llm, PROMPTS[0])
    while not parts or parts[-1] is not None:
        thread = threading.Thread(target=lambda: parts.append(next(moving, None)))  # type: ignore[arg-type]
        thread.start()
        thread.join(30)
    assert "".join(parts[:-1]) == expected[PROMPTS[0]]


def test_a_stream_whose_state_is_lost_says_so(
    llm: Any, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory() -> None:
        raise MemoryError

    kept = stream(llm, PROMPTS[0])
    next(kept)
    monkeypatch.setattr(llm._sequence, "snapshot", no_memory)
    assert text(llm.create_completion(PROMPTS[1], **LONG)) == expected[PROMPTS[1]]
    with pytest.raises(StateError, match="suspended"):
        next(kept)
    assert text(llm.create_completion(PROMPTS[1], **LONG)) == expected[PROMPTS[1]]


def test_a_prompt_longer_than_the_context_is_llama_cpps_error(
    llm: Any, expected: dict[str, str]
) -> None:
    text(llm.create_completion(PROMPTS[0], **LONG))
    with pytest.raises(ValueError, match="exceed context window"):
        llm.create_completion("far too long " * 2000, **LONG)
    with pytest.raises(ValueError, match="exceed context window"):
        next(llm.create_completion("far too long " * 2000, stream=True, **LONG))
    assert text(llm.create_completion(PROMPTS[2], **LONG)) == expected[PROMPTS[2]]
    llm.prefix_cache._check()


def test_a_failing_decode_leaves_the_context_right(
    llm: Any, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = llm._ctx.decode, []

    def decode(batch: Any) -> None:
        calls.append(batch)
        whole(batch)
        if len(calls) == 3:
            raise RuntimeError("llama_decode returned -3")

    monkeypatch.setattr(llm._ctx, "decode", decode)
    with pytest.raises(RuntimeError, match="returned -3"):
        llm.create_completion(PROMPTS[0], **LONG)
    assert llm._sequence.end() == llm.n_tokens
    for prompt in PROMPTS:
        assert text(llm.create_completion(prompt, **LONG)) == expected[prompt]


def test_after_a_token_outside_the_vocabulary_the_model_still_answers(
    llm: Any, expected: dict[str, str]
) -> None:
    with pytest.raises(InvalidTokens, match="token 1,000,000 at position 3 is not in the model's"):
        llm.create_completion([5, 6, 7, 10**6], **LONG)
    # Chat handlers of llama-cpp-python pass negative ids for images: llama.cpp is to judge them.
    with pytest.raises(RuntimeError, match="llama_decode"):
        llm.create_completion([5, 6, 7, -1], **LONG)
    assert text(llm.create_completion(PROMPTS[0], **LONG)) == expected[PROMPTS[0]]


def test_a_closed_model_says_so(llm: Any) -> None:
    going = llm.create_completion(PROMPTS[0], stream=True, **LONG)
    next(going)
    llm.close()
    llm.close()
    uses: tuple[Callable[[], Any], ...] = (
        lambda: llm.create_completion("x"),
        lambda: llm.create_chat_completion([{"role": "user", "content": "x"}]),
        lambda: llm.tokenize(b"x"),
        lambda: llm.detokenize([5]),
        lambda: llm.eval([5]),
        lambda: next(llm.generate([5])),
        llm.reset,
        lambda: next(going),
    )
    for use in uses:
        with pytest.raises(ModelClosed, match="closed"):
            use()
    assert llm.prefix_cache.stats().saved_tokens > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_a_clear_error_and_exits(llm: Any) -> None:
    going = llm.create_completion(PROMPTS[0], stream=True, **LONG)
    next(going)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            uses: tuple[Callable[[], Any], ...] = (
                lambda: llm.create_completion("x"),
                lambda: next(going),
            )
            for use in uses:
                with pytest.raises(ModelClosed, match="parent process"):
                    use()
            going.close()
            llm.close()
            llm.__del__()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0
    assert "".join(text(part) for part in going)


def test_the_low_level_calls_work_as_before(llm: Any) -> None:
    ours, theirs = llm, plain()
    for one in (ours, theirs):
        one.reset()
        one.eval([5, 6, 7])
    tokens = [one.sample(temp=0.0) for one in (ours, theirs)]
    assert tokens[0] == tokens[1]
    assert list(ours._input_ids) == [5, 6, 7]
    state = ours.save_state()
    ours.reset()
    ours.load_state(state)
    assert ours.n_tokens == 3
    assert list(ours._input_ids) == [5, 6, 7]


def test_llama_cpps_own_cache_still_works() -> None:
    llm = llama(store())
    llm.set_cache(llama_cpp.LlamaRAMCache())
    for prompt in (*PROMPTS, *PROMPTS):
        assert text(llm.create_completion(prompt, **LONG))
    llm.prefix_cache._check()


def test_no_generation_waits_for_ever_when_a_consumer_is_slow(llm: Any) -> None:
    slow = stream(llm, PROMPTS[0])
    next(slow)
    began = time.monotonic()
    thread = threading.Thread(target=lambda: list(stream(llm, PROMPTS[1])))
    thread.start()
    thread.join(30)
    assert gate.IDLE_S * 0.5 < time.monotonic() - began < 10
