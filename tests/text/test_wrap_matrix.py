"""Random calls with every combination of arguments: wrapped and plain tokenizer answer alike.

Each call is made twice, so that the second answer comes from the cache. TOKCACHE_MATRIX is the
number of calls for each tokenizer, TOKCACHE_MATRIX_SEED the seed.
"""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

import tokcache
from tests.text.test_wrap_parity import REAL, real_tokenizer
from tests.text.tokenizers_made import MADE, TEXTS, fast
from tokcache.text.engines.copying import is_of_library

if TYPE_CHECKING:
    from tokcache.text.token_ids import TokenIds
    from tokcache.text.wrappers.batch_encoding import Truncation

N_CALLS = int(os.environ.get("TOKCACHE_MATRIX", "450"))
SEED = int(os.environ.get("TOKCACHE_MATRIX_SEED", "1"))
N_REAL_CALLS = max(1, N_CALLS // 3)

WORDS = [
    "hello",
    "world",
    "fox",
    "the quick",
    "brown <s>",
    "naïve",
    "東京",
    " lazy  dog",
    "<mask>",
    "",
]
CHOICES: dict[str, list[Any]] = {
    "add_special_tokens": [True, False],
    "padding": [False, True, "longest", "max_length", "do_not_pad"],
    "truncation": [None, False, True, "longest_first", "only_first", "only_second"],
    "max_length": [None, 1, 2, 3, 4, 5, 7, 12, 40],
    "pad_to_multiple_of": [None, 1, 4, 8],
    "padding_side": [None, "left", "right"],
    "return_tensors": [None, "np"],
    "return_token_type_ids": [None, True, False],
    "return_attention_mask": [None, True, False],
    "return_special_tokens_mask": [True, False],
    "return_length": [True, False],
    "verbose": [True, False],
    "return_overflowing_tokens": [True],
    "return_offsets_mapping": [True],
    "stride": [0, 1],
    "split_special_tokens": [True, False],
    "is_split_into_words": [True],
}
RARE = {"return_overflowing_tokens", "return_offsets_mapping", "stride", "split_special_tokens"}
RARE |= {"is_split_into_words"}


def bert_pairs() -> Tokenizer:
    made = MADE["word_piece"]()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return made


def roberta() -> Tokenizer:
    made = MADE["byte_level_bpe"]()
    made.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return made


def odd_template() -> Tokenizer:
    made = MADE["unigram"]()
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="$A:2 </s>:1 <s>:3",
                pair="$B:1 <s>:2 <s>:0 $A:0",
                special_tokens=[("<s>", 1), ("</s>", 2)],
            ),
        ]
    )
    return made


ALL_NAMES = ["input_ids", "token_type_ids", "attention_mask"]
MATRIX: dict[str, tuple[Callable[[], Tokenizer], dict[str, Any]]] = {
    "bpe": (MADE["byte_level_bpe"], {"pad_token": "</s>", "model_max_length": 25}),
    "bert": (MADE["word_piece"], {"pad_token": "[UNK]", "model_input_names": ALL_NAMES}),
    "bert_template": (bert_pairs, {"pad_token": "[SEP]", "model_input_names": ALL_NAMES}),
    "unigram": (MADE["unigram"], {"pad_token": "<unk>", "padding_side": "left"}),
    "roberta": (roberta, {"pad_token": "<s>", "truncation_side": "left"}),
    "word_level": (MADE["word_level"], {"pad_token": "?", "model_input_names": ALL_NAMES}),
    "odd_template": (odd_template, {"pad_token": "<s>", "model_input_names": ALL_NAMES}),
    "no_padding": (MADE["byte_level_bpe"], {}),
}


def a_text(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(TEXTS)
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, 9)))


def some_texts(rng: random.Random) -> list[str]:
    return [a_text(rng) for _ in range(rng.choice([1, 1, 2, 3]))]


def a_call(rng: random.Random) -> dict[str, Any]:
    """Return the arguments of one random call."""
    shape = rng.choice(["one", "one", "batch", "batch", "tuple", "pair", "pairs", "rows", "target"])
    first, second = some_texts(rng), some_texts(rng)
    second = (second * 3)[: len(first)] if rng.random() < 0.95 else second
    shapes: dict[str, dict[str, Any]] = {
        "one": {"text": first[0]},
        "batch": {"text": first},
        "tuple": {"text": tuple(first)},
        "pair": {"text": first[0], "text_pair": second[0]},
        "pairs": {"text": first, "text_pair": second},
        "rows": {"text": list(zip(first, second, strict=False))},
        "target": {"text": first, "text_target": second},
    }
    asked = shapes[shape]
    for name, values in CHOICES.items():
        if rng.random() < (0.03 if name in RARE else 0.35):
            asked[name] = rng.choice(values)
    return asked


@contextmanager
def transformers_messages() -> Iterator[list[str]]:
    """Collect the log messages and warnings of transformers."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield messages
            messages += [str(one.message) for one in warned]
    finally:
        logger.removeHandler(handler)


def described(value: Any) -> Any:
    """Return a value with the types of all its members, so that `==` compares both."""
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, described(value.tolist())
    if isinstance(value, list | tuple):
        return type(value).__name__, [described(one) for one in value]
    return type(value).__name__, value


def encoding(one: Any) -> Any:
    fields = ("ids", "type_ids", "tokens", "offsets", "attention_mask", "special_tokens_mask")
    more = [one.word_ids, one.sequence_ids, one.n_sequences, len(one.overflowing)]
    return [getattr(one, name) for name in fields] + more


def outcome(tokenizer: Any, asked: dict[str, Any], *, is_encode: bool) -> Any:
    """Return everything a caller can see of an answer or an error, as values to compare."""
    backend = tokenizer.backend_tokenizer
    with transformers_messages() as messages:
        try:
            answer = (tokenizer.encode if is_encode else tokenizer)(**asked)
        except BaseException as error:  # a panic of tokenizers is a BaseException
            if not is_of_library(error):
                raise
            return type(error).__name__, str(error), messages
    settings = backend.truncation, backend.padding, backend.encode_special_tokens
    if is_encode:
        return described(answer), settings, messages
    data = [(name, described(value)) for name, value in answer.items()]
    encodings = [encoding(one) for one in answer.encodings]
    kind = type(answer).__name__, type(answer).__module__, answer.is_fast, answer.n_sequences
    return kind, data, encodings, settings, messages


def n_from_cache_if_equal(
    tokenizer: Any, wrapped: Any, calls: list[tuple[dict[str, Any], bool]]
) -> int:
    """Compare every call, made twice; return the number of second answers from the cache."""
    n_from_cache = 0
    for asked, is_encode in calls:
        if is_encode and "text_target" in asked:
            continue
        expected = outcome(tokenizer, asked, is_encode=is_encode)
        for turn in ("first", "second"):
            tokenizer.deprecation_warnings.clear()
            wrapped.deprecation_warnings.clear()
            before = wrapped.cache_stats()
            found = outcome(wrapped, asked, is_encode=is_encode)
            assert found == expected, (turn, asked, is_encode)
        after = wrapped.cache_stats()
        is_hit = after.l0.hits > before.l0.hits and after.encoded_texts == before.encoded_texts
        n_from_cache += is_hit and after.bypasses == before.bypasses
    return n_from_cache


def random_calls(name: str, n_calls: int) -> list[tuple[dict[str, Any], bool]]:
    rng = random.Random(f"{name} {SEED}")
    return [(a_call(rng), rng.random() < 0.2) for _ in range(n_calls)]


@pytest.mark.parametrize("name", MATRIX)
def test_random_calls_are_answered_as_by_the_plain_tokenizer(name: str) -> None:
    make, settings = MATRIX[name]
    plain = fast(make(), **settings)
    n_from_cache = n_from_cache_if_equal(plain, tokcache.wrap(plain), random_calls(name, N_CALLS))
    print(f"{name}: {N_CALLS} calls (seed {SEED}), {n_from_cache} of the second from the cache")  # noqa: T201
    assert n_from_cache > N_CALLS // (8 if name == "no_padding" else 3)


@pytest.mark.parametrize("name", REAL)
def test_random_calls_of_real_tokenizers_are_answered_as_by_the_plain_ones(
    name: str, shared_data: Path
) -> None:
    plain = real_tokenizer(shared_data / "tokenizers" / name)
    n_from_cache = n_from_cache_if_equal(
        plain, tokcache.wrap(plain), random_calls(name, N_REAL_CALLS)
    )
    print(f"{name}: {N_REAL_CALLS} calls (seed {SEED}), {n_from_cache} from the cache")  # noqa: T201
    assert n_from_cache > N_REAL_CALLS // 4


def cut_at_the_wrong_side(_self: Truncation, ids: TokenIds, length: int) -> TokenIds:
    return ids[len(ids) - length :]


def truncate_the_other_text(first: int, second: int, _room: int) -> tuple[int, int]:
    return second, first


@pytest.mark.parametrize(
    ("name", "place", "wrong"),
    [
        ("bpe", "Truncation.cut", cut_at_the_wrong_side),
        ("bert", "_both", truncate_the_other_text),
        ("bert_template", "_is_wanted", lambda *_: True),
        ("unigram", "Padding.width", lambda *_: 0),
    ],
)
def test_random_calls_find_an_injected_error(
    name: str, place: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, settings = MATRIX[name]
    plain = fast(make(), **settings)
    monkeypatch.setattr(f"tokcache.text.wrappers.batch_encoding.{place}", wrong)
    with pytest.raises(AssertionError, match=r"first|second"):
        n_from_cache_if_equal(plain, tokcache.wrap(plain), random_calls(name, N_CALLS))
