"""A wrapped tokenizer answers as the plain one, for real and synthetic tokenizers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import tokcache
from tests.text.implementations import implementation
from tests.text.tokenizers_made import MADE, TEXTS, fast

REAL = ["gpt2", "qwen2.5", "phi-3-mini", "t5-small", "bert-base-uncased", "minimind"]


@pytest.fixture(params=["reference", "native"])
def l0(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test once with the reference implementation and once with the native one."""
    chosen = implementation(request.param)
    chosen.use(monkeypatch)
    yield request.param
    made = tokcache.wrap(MADE["word_level"]())
    assert isinstance(made.token_ids("x"), chosen.token_ids)


@cache
def real_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)

    return AutoTokenizer.from_pretrained(folder)


@cache
def real_texts(shared: Path) -> list[str]:
    corpora = shared / "corpora"
    naughty = json.loads((corpora / "blns" / "blns.json").read_text())
    messages = [one for path in sorted((corpora / "i18n").iterdir()) for one in leaves(path)[:40]]
    with gzip.open(corpora / "human-eval" / "HumanEval.jsonl.gz", "rt") as lines:
        code = [json.loads(line)["prompt"] for line in lines][:60]
    return [*naughty, *messages, *code]


def leaves(path: Path) -> list[str]:
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, dict):
            for one in node.values():
                walk(one)

    walk(json.loads(path.read_text()))
    return found


def assert_same_answer(cached: Any, plain: Any) -> None:
    assert dict(cached) == dict(plain)
    assert list(cached) == list(plain)
    assert isinstance(cached, type(plain))
    for own, other in zip(cached.encodings, plain.encodings, strict=True):
        assert (own.ids, own.tokens, own.offsets) == (other.ids, other.tokens, other.offsets)
        assert own.special_tokens_mask == other.special_tokens_mask


@pytest.mark.usefixtures("l0")
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_give_equal_ids_on_misses_and_hits(shared_data: Path, name: str) -> None:
    plain = real_tokenizer(shared_data / "tokenizers" / name)
    wrapped = tokcache.wrap(plain)
    texts = real_texts(shared_data)
    for add_special_tokens in (True, False):
        expected = plain(texts, add_special_tokens=add_special_tokens)["input_ids"]
        for _ in range(2):
            got = wrapped.token_ids_batch(texts, add_special_tokens=add_special_tokens)
            assert [ids.tolist() for ids in got] == expected
        single = [
            wrapped.token_ids(text, add_special_tokens=add_special_tokens).tolist()
            for text in texts
        ]
        assert single == expected
    stats = wrapped.cache_stats()
    assert stats.encoded_texts == 2 * len(set(texts))
    assert stats.bypasses == {}


@pytest.mark.parametrize("name", REAL)
def test_from_pretrained_of_the_wrapped_class_loads_a_plain_tokenizer(
    shared_data: Path, name: str
) -> None:
    folder = shared_data / "tokenizers" / name
    plain = real_tokenizer(folder)
    wrapped_class: Any = type(tokcache.wrap(plain))
    loaded = wrapped_class.from_pretrained(folder)
    expected = type(plain).from_pretrained(folder)
    assert type(loaded) is type(expected)
    texts = real_texts(shared_data)
    assert loaded(texts)["input_ids"] == expected(texts)["input_ids"]


@pytest.mark.usefixtures("l0")
@pytest.mark.parametrize("name", REAL)
def test_calls_of_real_tokenizers_answer_as_the_plain_ones(shared_data: Path, name: str) -> None:
    plain = real_tokenizer(shared_data / "tokenizers" / name)
    wrapped = tokcache.wrap(plain)
    for text in [*real_texts(shared_data)[::29], real_texts(shared_data)[:3]]:
        for add_special_tokens in (True, False):
            expected = plain(text, add_special_tokens=add_special_tokens)
            for _ in range(2):
                assert_same_answer(wrapped(text, add_special_tokens=add_special_tokens), expected)
                ids = wrapped.encode(text, add_special_tokens=add_special_tokens)
                assert ids == expected["input_ids"]
    assert wrapped.cache_stats().bypasses == {}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizer_files_give_equal_ids_through_tokenizers(
    shared_data: Path, name: str
) -> None:
    plain = Tokenizer.from_file(str(shared_data / "tokenizers" / name / "tokenizer.json"))
    wrapped = tokcache.wrap(plain)
    for text in real_texts(shared_data)[::7]:
        assert wrapped.token_ids(text).tolist() == plain.encode(text).ids
        assert wrapped.token_ids(text).tolist() == wrapped.encode(text).ids


@pytest.mark.usefixtures("l0")
@pytest.mark.parametrize("name", MADE)
def test_small_tokenizers_give_equal_ids(name: str) -> None:
    plain = MADE[name]()
    wrapped = tokcache.wrap(plain)
    for add_special_tokens in (True, False):
        expected = [plain.encode(text, add_special_tokens=add_special_tokens).ids for text in TEXTS]
        for _ in range(2):
            got = wrapped.token_ids_batch(TEXTS, add_special_tokens=add_special_tokens)
            assert [ids.tolist() for ids in got] == expected
    assert wrapped.cache_stats().encoded_texts == 2 * len(TEXTS)


@pytest.mark.usefixtures("l0")
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("with_types", [False, True])
def test_calls_of_small_tokenizers_answer_as_the_plain_ones(name: str, *, with_types: bool) -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"] if with_types else ["input_ids"]
    plain = fast(MADE[name](), model_input_names=names)
    wrapped = tokcache.wrap(plain)
    for text in [*TEXTS, TEXTS, tuple(TEXTS), TEXTS[:1]]:
        expected = plain(text)
        for _ in range(2):
            assert_same_answer(wrapped(text), expected)
    assert wrapped.cache_stats().bypasses == {}
    if with_types and name == "word_level":
        assert set(wrapped("hello")["token_type_ids"]) == {1, 2}


def test_truncation_and_padding_in_tokenizer_json_do_not_apply_to_token_ids() -> None:
    plain = MADE["byte_level_bpe"]()
    whole = plain.encode("hello world hello").ids
    plain.enable_truncation(4)
    plain.enable_padding(length=30)
    stored = Tokenizer.from_str(plain.to_str())
    wrapped = tokcache.wrap(stored)
    assert wrapped.token_ids("hello world hello").tolist() == whole
    assert wrapped.encode("hello world hello").ids == stored.encode("hello world hello").ids
    assert len(wrapped.encode("hello world hello").ids) == 30
    assert wrapped.truncation == stored.truncation is not None
    through_transformers = fast(stored)
    assert_same_answer(tokcache.wrap(through_transformers)("hello"), through_transformers("hello"))
