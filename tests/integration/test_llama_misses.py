"""Why a `Llama` decodes tokens: each reason with a real model, and the same for each tenant."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.models import BLOCK, GREEDY, llama, store
from tokcache import samples
from tokcache.llama import Explanation
from tokcache.state.reasons import Miss, MissReason

if TYPE_CHECKING:
    from tokcache.llama.inprocess import Reuse

RNG = random.Random(17)
A, B = RNG.choices(range(3, 250), k=100), RNG.choices(range(250, 500), k=60)


def ask(llm: Any, prompt: Any, **settings: Any) -> Reuse:
    llm.create_completion(prompt, **GREEDY, **settings)
    reuse: Reuse = llm.last_reuse
    return reuse


def miss(llm: Any, prompt: Any, **settings: Any) -> Miss:
    reuse = ask(llm, prompt, **settings)
    assert reuse.miss is not None
    assert reuse.miss.n_missed == reuse.n_decoded - 1  # the last token is always decoded
    assert reuse.miss.held_tokens == ()
    return reuse.miss


def test_prompts_that_are_known_whole_have_no_miss() -> None:
    cache = store()
    llm = llama(cache)
    assert miss(llm, A).reason is MissReason.NEVER_STORED
    assert ask(llm, A).miss is None  # in the context
    ask(llm, B)
    assert ask(llm, A).miss is None  # restored
    assert llm.explain_miss() is None
    assert cache.stats().misses == {"never_stored": 2}
    llm.close()


def test_a_prompt_that_grows_was_never_stored_further() -> None:
    llm = llama(store())
    ask(llm, A)
    grown = [*A, *llm.input_ids[100:105].tolist(), *B]
    found = miss(llm, grown)
    assert (found.reason, found.at_token) == (MissReason.NEVER_STORED, 105)
    assert found.seconds is not None
    assert found.seconds > 0
    llm.close()


@pytest.mark.parametrize("place", ["the context", "the cache"])
def test_a_different_text_is_located_and_shown_to_its_scope_alone(place: str) -> None:
    llm = llama(store(), scope="a")
    first = "The time is 10:15:00 now. " + "Please answer in one sentence. " * 4
    other = first.replace("10:15:00", "10:16:30")
    ask(llm, first)
    if place == "the cache":
        ask(llm, B)
    ids = [llm.tokenize(each.encode()) for each in (first, other)]
    n_same = next(n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    found = miss(llm, other)
    assert (found.reason, found.at_token) == (MissReason.DIFFERENT_TEXT, n_same)
    shown = llm.explain_miss()
    assert isinstance(shown, Explanation)
    assert other.encode()[: shown.at_character].decode() in shown.shared
    assert (shown.shared + shown.new)[: len(other)].strip() in other
    assert shown.difference is not None
    assert shown.difference.kind == "date_or_clock"
    assert "10:1" not in repr(shown) + repr(llm.last_reuse)
    assert llm.explain_miss(scope="b") is None
    assert llm.explain_miss(scope=None) is None
    llm.prefix_cache.clear(scope="a")
    assert llm.explain_miss() is None
    llm.close()


def test_an_answer_that_is_encoded_again_is_no_different_text() -> None:
    llm = llama(store())
    for first in A:  # until the answer begins with an id of several bytes
        llm.reset()
        ask(llm, [1, first])
        held = llm.input_ids[: llm.n_tokens].tolist()
        if len(llm.detokenize(held[2:3], special=True)) > 1:
            break
    answer, n_prompt = llm.detokenize(held[2:], special=True), 2
    again = [*held[:2], *(llm.tokenize(bytes([each]), False)[0] for each in answer[:8])]
    assert llm.detokenize(again[2:]) == answer[:8]
    found = miss(llm, again)
    assert (found.reason, found.at_token) == (MissReason.RE_ENCODING, n_prompt)
    shown = llm.explain_miss()
    assert shown is not None
    assert shown.miss.reason is MissReason.RE_ENCODING
    assert llm.prefix_cache.stats().misses["re_encoding"] == 1
    other = [*held[:n_prompt], *llm.tokenize(b" quite another answer", False)]
    ask(llm, held[:n_prompt])
    assert miss(llm, other).reason is MissReason.DIFFERENT_TEXT
    llm.close()


@pytest.mark.parametrize("is_thinking", [True, False], ids=["thinking dropped", "another text"])
def test_an_earlier_turn_that_is_rendered_in_another_way_is_the_templates(
    is_thinking: bool,
) -> None:
    llm = llama(store())
    head, tail = "<|user|>\nHow far is it?\n<|assistant|>\n", "About 384 km.\n<|user|>\nAnd back?\n"
    thought = "<think>\nIt is about 384 km.\n</think>\n" if is_thinking else "It is not far. "
    ask(llm, head + thought + tail)
    found = miss(llm, head + tail + "<|assistant|>\n")
    assert found.reason is MissReason.DIFFERENT_TEXT  # found when it is read
    shown = llm.explain_miss()
    assert shown is not None
    assert shown.miss.reason is (MissReason.TEMPLATE if is_thinking else MissReason.DIFFERENT_TEXT)
    llm.close()


@pytest.mark.parametrize("architecture", ["mamba", "lfm2"])
def test_an_evicted_tail_says_so(architecture: str) -> None:
    cache = store(max_entries=4)
    llm = llama(cache, model=samples.tiny_model(architecture=architecture))
    short = A[: BLOCK - 2]  # no whole block: a tail alone
    ask(llm, short)
    for n in range(4):
        ask(llm, B[n : n + BLOCK - 2])
    found = miss(llm, short)
    assert (found.reason, found.detail) == (MissReason.EVICTED, "ram: max_entries")
    assert found.n_removed == BLOCK - 3  # it was saved before the last token
    llm.close()


def test_an_evicted_state_says_so() -> None:
    cache = store(max_entries=1)
    llm = llama(cache)
    ask(llm, A)
    ask(llm, B)
    ask(llm, B[:30])
    found = miss(llm, A)
    assert (found.reason, found.detail) == (MissReason.EVICTED, "ram: max_entries")
    assert found.n_removed >= 96
    llm.close()


def test_another_context_length_is_another_fingerprint() -> None:
    cache = store()
    for n_ctx in (1024, 2048):
        llm = llama(cache, n_ctx=n_ctx)
        found = miss(llm, A)
        llm.close()
    assert (found.reason, found.detail) == (MissReason.OTHER_FINGERPRINT, "context.n_ctx")


def test_a_model_that_runs_uncached_says_why() -> None:
    llm = llama(store(), logits_all=True)
    found = miss(llm, A)
    assert (found.reason, found.detail) == (MissReason.REFUSED, "logits_all")
    llm.close()
    llm = llama(store(ram_bytes=10_000))
    ask(llm, A)
    ask(llm, B)
    assert miss(llm, A).detail == "over_budget"
    llm.close()
    llm = llama(store(min_tokens=500))
    ask(llm, A)
    assert miss(llm, B).detail == "below_minimum"
    llm.close()


def test_without_a_cache_the_context_alone_decides() -> None:
    llm = llama()
    assert miss(llm, A) == Miss(MissReason.NEVER_STORED, 0, 99)
    assert miss(llm, [*A[:50], *B]) == Miss(MissReason.DIFFERENT_TEXT, 50, 59)
    llm.close()


@pytest.mark.parametrize("architecture", ["gemma3", "mamba", "lfm2"])
def test_other_memories_give_the_place_where_the_texts_part(architecture: str) -> None:
    llm = llama(store(), model=samples.tiny_model(architecture=architecture))
    ask(llm, A)
    reuse = ask(llm, [*A[:70], *B])
    assert reuse.miss is not None
    assert (reuse.miss.reason, reuse.miss.at_token) == (MissReason.DIFFERENT_TEXT, 70)
    assert reuse.miss.n_missed == reuse.n_decoded - 1 >= 59
    llm.close()


def test_reproducible_mode_misses_whole_blocks_only() -> None:
    llm = llama(store(), reproducible=True)
    ask(llm, A)
    assert ask(llm, A).miss is None  # 96 of 100 tokens are whole blocks
    reuse = ask(llm, [*A[: BLOCK + 10], *B])
    assert reuse.miss is not None
    assert (reuse.miss.at_token, reuse.miss.n_missed) == (BLOCK + 10, 2 * BLOCK)
    llm.close()


def test_another_tenant_changes_nothing_that_a_tenant_sees(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Scope "a" makes the same calls with and without scope "b", which has the same prompts."""
    seen: list[list[Any]] = []
    for has_other in (False, True):
        llm = llama(store())
        found: list[Any] = []
        for prompt in (A, [*A[:50], *B], B, [*A, 7, 8], A):
            if has_other:
                for other in (A, [*A[:70], *B], prompt, [*prompt, 1, 2, 3]):
                    ask(llm, other, scope="b")
            reuse = ask(llm, prompt, scope="a")
            # Where the states were held, in the context or the cache, depends on who came last.
            n_reused = reuse.n_in_context + reuse.n_restored
            miss_of = reuse.miss
            shown = llm.explain_miss(scope="a")
            found.append((n_reused, miss_of and miss_of._replace(seconds=None)))
            found.append(shown and (shown.at_character, shown.held[:20], shown.new))
            assert llm.explain_miss(scope="b") is None
        seen.append(found)
        llm.close()
    assert seen[0] == seen[1]
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
