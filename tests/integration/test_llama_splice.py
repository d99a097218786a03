"""`Llama(splice=True)`: sampled answers are reused to their ends, each condition by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.integration.models import llama, store
from tokcache import samples
from tokcache.errors import InvalidConfig

from llama_cpp import LogitsProcessorList  # isort: skip (models skips without it)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

START, END = "<|im_start|>", "<|im_end|>"
# The tokenizer has merges for these letters: a text in single letters has fewer ids read again.
LETTERS = "etaoinsr"


def turn(role: str, text: str) -> str:
    return f"{START}{role}\n{text}{END}\n"


OPENER = f"{START}assistant\n"
ASKED = turn("user", "How far is it to the moon?") + OPENER
MORE = f"{END}\n" + turn("user", "And back?") + OPENER


def spell(llm: Any, *allowed: str | int) -> LogitsProcessorList:
    """Let a model sample these ids or single letters alone; several groups one after the other."""
    groups = [
        [each]
        if isinstance(each, int)
        else [i for c in each for i in llm.tokenize(c.encode(), False)]
        for each in allowed
    ]
    n_asked: list[int] = []

    def process(input_ids: Sequence[int], scores: Any) -> Any:
        n_asked[:] = n_asked or [len(input_ids)]
        group = groups[min(len(input_ids) - n_asked[0], len(groups) - 1)]
        kept = np.full_like(scores, -np.inf)
        kept[group] = scores[group]
        return kept

    return LogitsProcessorList([process])


def answer(llm: Any, prompt: Any, *allowed: str | int, n: int = 16, **settings: Any) -> str:
    processors = spell(llm, *(allowed or (LETTERS,)))
    settings = {"max_tokens": n, "temperature": 1.0, "seed": 3, **settings}
    found = llm.create_completion(prompt, logits_processor=processors, **settings)
    return str(found["choices"][0]["text"])


def held_text(llm: Any) -> bytes:
    """Return the text of the ids of the last prompt, as the context holds them."""
    text: bytes = llm.detokenize(llm.input_ids[: llm.last_reuse.n_prompt].tolist(), special=True)
    return text


def asked_again(llm: Any, prompt: str, **settings: Any) -> tuple[int, str]:
    """Ask for one token more; return how many ids were spliced, and the refusal."""
    answer(llm, prompt, n=1, **settings)
    assert held_text(llm) == prompt.encode()
    reuse = llm.last_reuse
    return reuse.n_spliced, reuse.splice_refusal


@pytest.fixture
def llm() -> Any:
    made = llama(store(), splice=True)
    yield made
    made.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba", "lfm2"])
@pytest.mark.parametrize("place", ["context", "cache"])
def test_a_sampled_answer_is_reused_to_its_end_with_splice_and_not_without(
    architecture: str, place: str
) -> None:
    model = samples.tiny_model(architecture=architecture)
    decoded: dict[bool, int] = {}
    texts: set[str] = set()
    for is_on in (True, False):
        llm = llama(store(), model=model, splice=is_on)
        assert llm.splice is is_on
        text = answer(llm, ASKED)
        texts.add(text)
        held = llm.input_ids[: llm.n_tokens].tolist()
        if place == "cache":
            answer(llm, turn("user", "Something else") + OPENER)
        prompt = ASKED + text + MORE
        n_again = len(llm.tokenize(prompt.encode(), False, True))
        answer(llm, prompt, n=1)
        reuse = llm.last_reuse
        decoded[is_on] = reuse.n_decoded
        assert held_text(llm) == prompt.encode()
        if is_on:
            assert (reuse.n_spliced, reuse.splice_refusal) == (16, "")
            assert llm.input_ids[: len(held)].tolist() == held
            assert reuse.n_prompt > n_again
            # The last generated token was not decoded; nothing else is decoded twice.
            assert reuse.n_in_context + reuse.n_restored == len(held)
        else:
            assert (reuse.n_spliced, reuse.splice_refusal) == (0, "")
            assert reuse.n_prompt == n_again
            assert reuse.n_in_context + reuse.n_restored < len(held)
        llm.close()
    assert len(texts) == 1  # the same answer, so only the ids differ
    assert decoded[True] < decoded[False]


def test_every_answer_of_a_chat_is_spliced(llm: Any) -> None:
    prompt, n_spliced = ASKED, 0
    n_more = len(llm.tokenize(MORE.encode(), False, True))
    for n in range(5):
        text = answer(llm, prompt, n=10 + n, seed=n)
        assert held_text(llm) == prompt.encode()
        assert llm.last_reuse.n_spliced == n_spliced
        if n:
            assert llm.last_reuse.splice_refusal == ""
            assert llm.last_reuse.n_decoded == n_more + 1  # the last generated token, too
        n_spliced += 10 + n
        prompt += text + MORE
    assert llm.prefix_cache.stats().refusals == {"splice_no_answer": 1}  # the first prompt


def test_a_chat_completion_is_spliced_in_its_model_s_template(llm: Any) -> None:
    chat = [{"role": "user", "content": "How far is it?"}]
    for n in range(3):
        found = llm.create_chat_completion(
            chat, max_tokens=12, temperature=1.0, seed=n, logits_processor=spell(llm, LETTERS)
        )
        assert llm.last_reuse.n_spliced == 12 * n
        assert found["usage"]["prompt_tokens"] == llm.last_reuse.n_prompt
        content = found["choices"][0]["message"]["content"]
        chat += [{"role": "assistant", "content": content}, {"role": "user", "content": "Sure?"}]


def test_a_streamed_answer_is_spliced_also_if_its_stream_was_closed(llm: Any) -> None:
    stream = llm.create_completion(
        ASKED, max_tokens=30, temperature=1.0, stream=True, logits_processor=spell(llm, LETTERS)
    )
    text = "".join(next(stream)["choices"][0]["text"] for _ in range(12))
    stream.close()
    assert asked_again(llm, ASKED + text + MORE) == (12, "")


def byte_ids(llm: Any, text: str) -> list[int]:
    """Return the ids of the single bytes of a text."""
    of = {llm.detokenize([each], special=True): each for each in range(llm.n_vocab())}
    return [of[bytes([each])] for each in text.encode()]


def test_text_in_bytes_is_spliced_byte_for_byte(llm: Any) -> None:
    word = "\u00e9\u65e5 there"
    generated = byte_ids(llm, word)
    text = answer(llm, ASKED, *generated, n=len(generated))
    assert text == word
    assert len(llm.tokenize(word.encode(), False)) < len(generated)
    assert asked_again(llm, ASKED + text + MORE) == (len(generated), "")


def test_tokens_of_byte_fallback_are_spliced_by_their_bytes(
    tmp_path: Path, shared_data: Path
) -> None:
    source = shared_data / "tokenizers" / "phi-3-mini" / "tokenizer.json"
    sizes: dict[str, Any] = {"n_layers": 1, "n_embd": 32, "n_heads": 1, "n_kv_heads": 1, "n_ff": 32}
    model = samples.tiny_model(source, folder=tmp_path, **sizes)
    llm = llama(store(), model=model, splice=True)
    plain: Any = Tokenizer.from_file(str(source))
    names = [f"<0x{each:02X}>" for each in "\u65e5".encode()] + list("there")
    generated = [plain.token_to_id(name) for name in names]
    asked = "<|user|>\nWhich day?<|end|>\n<|assistant|>\n"
    text = answer(llm, asked, *generated, n=8)
    assert text == "\u65e5there"
    prompt = f"{asked}{text}<|end|>\n<|user|>\nAnd then?<|end|>\n<|assistant|>\n"
    answer(llm, prompt, n=1)
    assert (llm.last_reuse.n_spliced, llm.last_reuse.splice_refusal) == (8, "")
    again = llm.tokenize(prompt.encode(), True, True)
    assert held_text(llm) == llm.detokenize(again, special=True)
    assert len(again) < llm.last_reuse.n_prompt
    llm.close()


def test_an_answer_that_its_end_token_ended_is_spliced_without_it(llm: Any) -> None:
    text = answer(llm, ASKED, "t", "h", "e", *llm.tokenize(END.encode(), False, True))
    assert text == "the"
    assert asked_again(llm, ASKED + text + MORE) == (3, "")


def test_a_wrapped_tokenizer_is_spliced_and_its_added_tokens_count() -> None:
    tokenizer = Tokenizer.from_file(str(samples.tiny_tokenizer()))
    llm = llama(store(), tokenizer=tokenizer, splice=True)
    text = answer(llm, ASKED)
    assert asked_again(llm, ASKED + text + MORE) == (16, "")
    llm.close()


# Each condition broken by itself


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda text: ASKED.replace("moon", "sun") + text + MORE, "splice_no_answer"),
        (lambda text: ASKED + text[:-1] + "Q" + MORE, "splice_other_text"),
        (lambda text: ASKED + text[3:] + MORE, "splice_trimmed"),
        (lambda text: ASKED + text[:-3] + MORE, "splice_trimmed"),
        (lambda text: ASKED + text + " Indeed." + MORE, "splice_no_added_token_follows"),
        (lambda text: ASKED + text + "\n" + MORE, "splice_no_added_token_follows"),
        (lambda text: ASKED + text, "splice_no_added_token_follows"),
        (lambda text: ASKED + text[:5] + START + text[5:] + MORE, "splice_trimmed"),
    ],
    ids=[
        "another beginning",
        "edited",
        "trimmed at its start",
        "trimmed at its end",
        "text follows",
        "a line end follows",
        "nothing follows",
        "an added token in the text",
    ],
)
def test_an_answer_that_stands_otherwise_keeps_the_ids_of_its_text(
    llm: Any, change: Callable[[str], str], refusal: str
) -> None:
    text = answer(llm, ASKED)
    assert asked_again(llm, change(text)) == (0, refusal)
    assert llm.prefix_cache.stats().refusals[refusal] >= 1
    assert asked_again(llm, ASKED + text + MORE) == (16, "")  # unchanged, it is spliced


def test_a_control_token_in_an_answer_refuses_it(llm: Any) -> None:
    start = llm.tokenize(START.encode(), False, True)
    assert len(start) == 1
    text = answer(llm, ASKED, "e", "t", start[0], LETTERS)
    assert len(text) == 15  # llama_cpp shows no control token
    for shown in (text, text[:2] + START + text[2:]):
        assert asked_again(llm, ASKED + shown + MORE) == (0, "splice_added_token")


def test_an_answer_that_ended_within_a_character_is_refused(llm: Any) -> None:
    half = byte_ids(llm, "\u65e5")[:2]
    end = llm.tokenize(END.encode(), False, True)
    text = answer(llm, ASKED, "e", "t", *half, *end)
    assert text == "et"
    assert asked_again(llm, ASKED + text + MORE) == (0, "splice_partial_character")


def test_an_answer_that_a_stop_text_cut_is_refused(llm: Any) -> None:
    text = answer(llm, ASKED, "e", "t", "o", "n", "Q", n=9, stop=["nQ"])
    assert text == "eto"
    assert asked_again(llm, ASKED + text + MORE) == (0, "splice_trimmed")


def test_an_answer_is_spliced_in_its_own_scope_alone(llm: Any) -> None:
    text = answer(llm, ASKED, scope="a")
    prompt = ASKED + text + MORE
    for scope in ("b", None):
        assert asked_again(llm, prompt, scope=scope) == (0, "splice_no_answer")
    assert asked_again(llm, prompt, scope="a") == (16, "")


@pytest.mark.parametrize("how", ["cache_clear", "prefix_cache.clear", "prefix_cache"])
def test_cleared_answers_are_forgotten(llm: Any, how: str) -> None:
    texts = {scope: answer(llm, ASKED, scope=scope) for scope in ("a", "b")}
    if how == "cache_clear":
        llm.cache_clear(scope="a")
        assert len(llm._splicer.answers) == 1
    elif how == "prefix_cache.clear":
        llm.prefix_cache.clear(scope="a")
    else:
        llm.prefix_cache = store()
        assert len(llm._splicer.answers) == 0
    assert asked_again(llm, ASKED + texts["a"] + MORE, scope="a") == (0, "splice_no_answer")
    if how != "prefix_cache":
        assert asked_again(llm, ASKED + texts["b"] + MORE, scope="b") == (16, "")
    llm.cache_clear()
    assert len(llm._splicer.answers) == 0


@pytest.mark.parametrize("how", ["cache_clear", "prefix_cache.clear"])
def test_an_answer_whose_scope_is_cleared_while_it_is_generated_is_forgotten(
    llm: Any, how: str
) -> None:
    stream = llm.create_completion(
        ASKED, max_tokens=8, stream=True, scope="a", logits_processor=spell(llm, LETTERS)
    )
    text = next(stream)["choices"][0]["text"]
    (llm.cache_clear if how == "cache_clear" else llm.prefix_cache.clear)(scope="a")
    text += "".join(each["choices"][0]["text"] for each in stream)
    assert asked_again(llm, ASKED + text + MORE, scope="a") == (0, "splice_no_answer")


def test_a_call_that_needs_the_prompt_s_own_text_is_not_spliced(llm: Any) -> None:
    text = answer(llm, ASKED)
    prompt = ASKED + text + MORE
    assert asked_again(llm, prompt, echo=True) == (0, "splice_call_form")
    assert asked_again(llm, prompt) == (16, "")


def test_tokens_that_the_caller_sends_make_no_answer() -> None:
    llm = llama(logits_all=True, splice=True)  # llama.cpp has no other way to take them
    ids = llm.tokenize(ASKED.encode(), False, True)
    generation = llm.generate(ids, temp=0.0)
    taken = [next(generation), generation.send([70, 71]), next(generation)]
    generation.close()
    assert len(taken) == 3
    assert len(llm._splicer.answers) == 0
    answer(llm, ASKED)
    assert len(llm._splicer.answers) == 1
    llm.close()


def test_a_failed_call_leaves_no_splice_for_the_next_prompt(llm: Any) -> None:
    text = answer(llm, ASKED)
    long = ASKED + text + MORE + "word " * 2000
    with pytest.raises(ValueError, match="exceed context"):
        answer(llm, long)
    llm.generate(llm.tokenize(b"hello", False), temp=0.0).__next__()
    assert (llm.last_reuse.n_spliced, llm.last_reuse.splice_refusal) == (0, "")


def test_splice_is_off_by_default_and_must_be_a_bool() -> None:
    llm = llama(store())
    assert not llm.splice
    assert "spliced" not in repr(llm)
    llm.close()
    with pytest.raises(InvalidConfig, match="splice"):
        llama(store(), splice="yes")
