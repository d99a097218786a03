"""transformers' data collators make equal batches from a wrapped and a plain tokenizer.

The batches are NumPy arrays, because the collators' other kind needs PyTorch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import tokcache
from tests.text.tokenizers_made import MADE, TEXTS, fast
from tokcache.samples import tiny_tokenizer

CONFIG = tokcache.CacheConfig(engine="tokenizers")
LINES = [text for text in TEXTS if text.strip()] + ["The quick brown fox", "42 hellos, 東京!"]


def masked_bpe() -> Any:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "mask_token": "<mask>"}
    return fast(MADE["byte_level_bpe"](), **special)


def word_piece() -> Any:
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[UNK]"}
    return fast(MADE["word_piece"](), mask_token="<mask>", **special)  # noqa: S106 (no password)


def sample() -> Any:
    made = Tokenizer.from_file(str(tiny_tokenizer()))
    return fast(made, pad_token="<|endoftext|>", mask_token="<|im_start|>")  # noqa: S106


@pytest.fixture(params=[masked_bpe, word_piece, sample], ids=lambda make: make.__name__)
def plain(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def wrapped(plain: Any) -> Any:
    return tokcache.wrap(plain, CONFIG)


def collator(name: str, tokenizer: Any, **settings: Any) -> Any:
    import transformers  # noqa: PLC0415 (seconds to import)

    return getattr(transformers, name)(tokenizer, return_tensors="np", **settings)


def comparable(batch: Any) -> Any:
    return {key: (str(value.dtype), value.tolist()) for key, value in batch.items()}


def assert_equal(
    name: str, plain: Any, wrapped: Any, features: Callable[[Any], list[Any]], **settings: Any
) -> None:
    """Compare a collator's batches from both tokenizers twice; the second time from the cache."""
    given = features(plain)
    expected = comparable(seeded(collator(name, plain, **settings))(copy.deepcopy(given)))
    assert expected["input_ids"][1]
    for _ in range(2):
        answers = features(wrapped)
        assert [dict(one) for one in answers] == [dict(one) for one in given]
        own = seeded(collator(name, wrapped, **settings))(answers)
        assert comparable(own) == expected
        assert type(own) is type(seeded(collator(name, plain, **settings))(copy.deepcopy(given)))


def seeded(made: Any) -> Any:
    np.random.seed(7)  # noqa: NPY002 (collators without a seed of their own draw from it)
    random.seed(7)
    return made


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 64}],
    ids=str,
)
def test_padding(plain: Any, wrapped: Any, settings: dict[str, Any], side: str) -> None:
    plain.padding_side = wrapped.padding_side = side

    def features(tok: Any) -> list[Any]:
        return [tok(line) for line in LINES if len(line) < 60]

    assert_equal("DataCollatorWithPadding", plain, wrapped, features, **settings)
    assert wrapped.cache_stats().l0.hits > 0


@pytest.mark.parametrize("settings", [{"mlm": False}, {"mlm": True, "seed": 3}], ids=str)
@pytest.mark.parametrize("kind", ["encodings", "ids"])
def test_language_modeling(plain: Any, wrapped: Any, settings: dict[str, Any], kind: str) -> None:
    def features(tok: Any) -> list[Any]:
        return [tok(one) for one in LINES] if kind == "encodings" else [
            {"input_ids": tok.encode(one)} for one in LINES
        ]  # fmt: skip

    assert_equal("DataCollatorForLanguageModeling", plain, wrapped, features, **settings)


def test_language_modeling_with_special_tokens_masks(plain: Any, wrapped: Any) -> None:
    def features(tok: Any) -> list[Any]:
        return [tok(line, return_special_tokens_mask=True) for line in LINES]

    assert_equal("DataCollatorForLanguageModeling", plain, wrapped, features, mlm=True, seed=3)


def test_whole_words(wrapped: Any, plain: Any) -> None:
    def features(tok: Any) -> list[Any]:
        # The collator takes offsets of one length only.
        padding = {"padding": "max_length", "max_length": 320}
        return [tok(line, return_offsets_mapping=True, **padding) for line in LINES]

    masks = {"whole_word_mask": True, "mask_replace_prob": 1.0, "random_replace_prob": 0.0}
    assert_equal(
        "DataCollatorForLanguageModeling", plain, wrapped, features, mlm=True, seed=3, **masks
    )


@pytest.mark.parametrize(
    "settings", [{"padding": True}, {"padding": "max_length", "max_length": 64}], ids=str
)
def test_sequence_to_sequence(plain: Any, wrapped: Any, settings: dict[str, Any]) -> None:
    def features(tok: Any) -> list[Any]:
        short = [line for line in LINES if len(line) < 60]
        return [
            {**tok(one), "labels": tok(text_target=other)["input_ids"]}
            for one, other in zip(short, short[::-1], strict=True)
        ]

    assert_equal(
        "DataCollatorForSeq2Seq", plain, wrapped, features, label_pad_token_id=-1, **settings
    )


def test_token_classification(plain: Any, wrapped: Any) -> None:
    def features(tok: Any) -> list[Any]:
        answers = [tok(line.split(), is_split_into_words=True) for line in LINES]
        return [{**one, "labels": [w or 0 for w in one.word_ids()]} for one in answers]

    assert_equal("DataCollatorForTokenClassification", plain, wrapped, features)


def test_flattening(plain: Any, wrapped: Any) -> None:
    import transformers  # noqa: PLC0415 (seconds to import)

    kind: Any = transformers.DataCollatorWithFlattening
    made = kind(return_tensors="np")
    expected = comparable(made([plain(line) for line in LINES]))
    for _ in range(2):
        assert comparable(made([wrapped(line) for line in LINES])) == expected


def test_a_data_set_that_is_mapped_and_collated(shared_data: Path) -> None:
    """Collate the columns of a real tokenizer, truncated as for training."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)

    plain: Any = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "bert-base-uncased")
    wrapped = tokcache.wrap(plain, CONFIG)

    def features(tok: Any) -> list[Any]:
        columns = tok(LINES * 3, truncation=True, max_length=24)
        return [
            {name: column[n] for name, column in columns.items()} for n in range(len(LINES) * 3)
        ]

    assert_equal("DataCollatorWithPadding", plain, wrapped, features)
    settings = {"mlm": True, "seed": 1}
    assert_equal("DataCollatorForLanguageModeling", plain, wrapped, features, **settings)
