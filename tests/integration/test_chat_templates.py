"""apply_chat_template with the templates of seven families: equal to the plain one, then cached."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

import tokcache
from tests.integration.chat_templates import SPECIAL_TOKENS, TEMPLATES
from tests.text.tokenizers_made import fast
from tokcache.samples import tiny_tokenizer

CONFIG = tokcache.CacheConfig(engine="tokenizers")


def weather(city: str, days: int = 1) -> str:
    """Return the weather forecast.

    Args:
        city: The city.
        days: The number of days.
    """
    return f"{city}: rain for {days} days"


SCHEMA = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers: 1 < 2 & 'so on'.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}

PLAIN_CHAT = [
    {"role": "user", "content": "  What is a prefix cache?\n"},
    {"role": "assistant", "content": "It keeps what was computed; naïvely, <|im_end|> too. "},
    {"role": "user", "content": "And 東京? [INST] <s> 123,456"},
]
CHATS: dict[str, Any] = {
    "plain": PLAIN_CHAT,
    "one": PLAIN_CHAT[:1],
    "answered": PLAIN_CHAT[:2],
    "system": [{"role": "system", "content": "Be brief, and exact."}, *PLAIN_CHAT],
    "tool": [
        PLAIN_CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"rain": true}'},
        {"role": "assistant", "content": "<think>rain</think>Take an umbrella."},
    ],
    "batch": [PLAIN_CHAT, PLAIN_CHAT[:1], PLAIN_CHAT],
    "empty": [],
    "no such role": [{"role": "narrator", "content": "Meanwhile …"}],
}

# A second call with these arguments is answered from the cache; OTHERS need not be.
CACHED: dict[str, dict[str, Any]] = {
    "": {},
    "generation prompt": {"add_generation_prompt": True},
    "ids": {"return_dict": False},
    "tools": {"tools": [SCHEMA, weather], "add_generation_prompt": True},
    "documents": {"documents": [{"title": "One", "text": "alpha"}, {"text": "beta"}]},
    "continued": {"continue_final_message": True},
    "other template": {"chat_template": "{{ messages[0].content }}|{{ extra }}", "extra": "more"},
    "switch": {"add_generation_prompt": True, "enable_thinking": False},
}
MASK = {"return_assistant_tokens_mask": True}
ALL_SPECIAL = {"return_special_tokens_mask": True}
OTHERS: dict[str, dict[str, Any]] = {
    "text": {"tokenize": False},
    "text to answer": {"tokenize": False, "add_generation_prompt": True},
    "text continued": {"tokenize": False, "continue_final_message": True},
    "assistant mask": MASK,
    "cut assistant mask": {**MASK, "truncation": True, "max_length": 30},
    "truncated": {"truncation": True, "max_length": 12},
    "padded": {"padding": "max_length", "max_length": 300},
    "arrays": {"return_tensors": "np", "padding": True},
    "more output": {"tokenizer_kwargs": {**ALL_SPECIAL, "return_length": True}},
    "offsets": {"tokenizer_kwargs": {"return_offsets_mapping": True}},
    "sanitized": {"sanitize_control_tokens": True},
    "sanitized batch": {"sanitize_control_tokens": True, "padding": True},
    "contradiction": {"continue_final_message": True, "add_generation_prompt": True},
    "mask of nothing": {**MASK, "return_dict": False},
}  # fmt: skip


def tokenizer(template: str) -> Any:
    made = Tokenizer.from_file(str(tiny_tokenizer()))
    made.add_special_tokens([AddedToken(one, normalized=False) for one in SPECIAL_TOKENS])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    return fast(made, chat_template=template, **names)


@pytest.fixture(scope="module", params=TEMPLATES)
def plain(request: pytest.FixtureRequest) -> Any:
    return tokenizer(TEMPLATES[request.param])


def comparable(answer: Any) -> Any:
    """Return an answer in a form that compares by type and value, also arrays and encodings."""
    if hasattr(answer, "encodings"):
        tokens = [(one.ids, one.offsets, one.word_ids) for one in answer.encodings or []]
        return type(answer).__name__, comparable(dict(answer)), tokens
    if isinstance(answer, dict):
        return {key: comparable(value) for key, value in answer.items()}
    if isinstance(answer, np.ndarray):
        return "array", str(answer.dtype), answer.tolist()
    return type(answer), answer


def outcome(ask: Callable[[], Any]) -> Any:
    try:
        return comparable(ask())
    except Exception as error:  # noqa: BLE001 (any error of the plain tokenizer)
        return type(error), str(error)


@pytest.mark.parametrize("arguments", [*CACHED, *OTHERS])
def test_every_chat_has_the_plain_tokenizers_result(plain: Any, arguments: str) -> None:
    given = {**CACHED, **OTHERS}[arguments]
    wrapped = tokcache.wrap(plain, CONFIG)
    n_answers = 0
    for name, chat in CHATS.items():
        before = copy.deepcopy(chat)
        expected = outcome(partial(plain.apply_chat_template, chat, **given))
        for _ in range(2):
            assert outcome(partial(wrapped.apply_chat_template, chat, **given)) == expected, name
        assert chat == before
        n_answers += not isinstance(expected[0], type) or not issubclass(expected[0], Exception)
    assert n_answers > 0 or arguments in ("contradiction", "mask of nothing")


def tokenized(plain: Any, given: dict[str, Any]) -> Iterator[Any]:
    """Yield the chats that a template takes with these arguments."""
    for chat in CHATS.values():
        try:
            plain.apply_chat_template(chat, tokenize=False, **given)
        except Exception:  # noqa: BLE001, S112 (this template refuses it)
            continue
        yield chat


@pytest.mark.parametrize("arguments", CACHED)
def test_a_second_call_is_answered_from_the_cache(plain: Any, arguments: str) -> None:
    given = CACHED[arguments]
    wrapped = tokcache.wrap(plain, CONFIG)
    chats = list(tokenized(plain, {k: v for k, v in given.items() if k != "return_dict"}))
    assert len(chats) >= 3
    for chat in chats:
        wrapped.apply_chat_template(chat, **given)
    before = wrapped.cache_stats()
    for chat in chats:
        wrapped.apply_chat_template(chat, **given)
    after = wrapped.cache_stats()
    assert after.encoded_texts == before.encoded_texts > 0
    assert after.l0.hits >= before.l0.hits + len(chats)
    assert after.bypasses == before.bypasses == {}


def test_the_assistants_tokens_are_marked(plain: Any) -> None:
    wrapped = tokcache.wrap(plain, CONFIG)
    for _ in range(2):
        answer = wrapped.apply_chat_template(CHATS["answered"], return_assistant_tokens_mask=True)
        marked = [
            one
            for one, is_marked in zip(answer["input_ids"], answer["assistant_masks"], strict=True)
            if is_marked
        ]
        assert "It keeps what was computed" in wrapped.decode(marked)
        assert "prefix cache" not in wrapped.decode(marked)


def test_changing_an_answer_does_not_change_the_cache(plain: Any) -> None:
    wrapped = tokcache.wrap(plain, CONFIG)
    expected = wrapped.apply_chat_template(PLAIN_CHAT, return_dict=False).copy()
    wrapped.apply_chat_template(PLAIN_CHAT, return_dict=False).append(9)
    wrapped.apply_chat_template(PLAIN_CHAT)["input_ids"].clear()
    assert wrapped.apply_chat_template(PLAIN_CHAT, return_dict=False) == expected


def test_another_template_is_used_at_once(plain: Any) -> None:
    wrapped = tokcache.wrap(plain, CONFIG)
    other = copy.deepcopy(plain)
    for template in (*TEMPLATES.values(), {"default": "{{ messages }}", "tool_use": "{{ tools }}"}):
        wrapped.chat_template = other.chat_template = template
        for given in ({}, {"tools": [SCHEMA]}):
            ask = partial(other.apply_chat_template, PLAIN_CHAT, **given)
            expected = outcome(ask)
            for _ in range(2):
                own = partial(wrapped.apply_chat_template, PLAIN_CHAT, **given)
                assert outcome(own) == expected
    assert plain.chat_template in TEMPLATES.values()


@pytest.mark.parametrize("name", ["bert-base-uncased", "minimind", "phi-3-mini", "qwen2.5"])
def test_the_templates_of_real_tokenizers(name: str, shared_data: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)

    plain: Any = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    wrapped = tokcache.wrap(plain, CONFIG)
    n_compared = 0
    for given in {**CACHED, **OTHERS}.values():
        for chat in CHATS.values():
            expected = outcome(partial(plain.apply_chat_template, chat, **given))
            for _ in range(2):
                own = partial(wrapped.apply_chat_template, chat, **given)
                assert outcome(own) == expected
                n_compared += 1
    assert n_compared == 2 * len(CHATS) * len({**CACHED, **OTHERS})
    assert wrapped.cache_stats().l0.hits > len(CHATS) * len(CACHED)
