"""The translation of tokenizers 1.0's format of a tokenizer.json, in tools/tokenizer_formats.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from tests.text.tokenizers_synthetic import SYNTHETIC
from tokcache.text.cuts.patterns import GPT2

TOOL = Path(__file__).parents[2] / "tools" / "tokenizer_formats.py"
TEXTS = ("", "Hello  world, it's 12 o'clock.\n", "<s>caf\xe9 \u4e16\u754c<s> a", "  x\t\ny ")


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("tokenizer_formats", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_format_2(tokenizer: Tokenizer, **instead: Any) -> dict[str, Any]:
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    description |= {"version": "2.0", "role_to_token": {}, "post_processor": None}
    return description | instead


def ids(description: dict[str, Any]) -> list[list[int]]:
    tokenizer = Tokenizer.from_str(json.dumps(description))
    return [tokenizer.encode(text).ids for text in TEXTS]


def test_format_1_is_left_as_it_is(tool: Any) -> None:
    description = json.loads(SYNTHETIC["gpt2"]().to_str())
    assert tool.as_format_1(description) is description


def test_bytes_are_translated(tool: Any) -> None:
    tokenizer = SYNTHETIC["gpt2"]()
    tokenizer.add_tokens([AddedToken("<s>", special=True)])
    split = {"type": "Split", "pattern": {"Regex": GPT2}, "behavior": "Isolated", "invert": False}
    theirs = of_format_2(tokenizer, pre_tokenizer=split, decoder=None)
    theirs["model"] = {**theirs["model"], "byte_level": True}
    plain = json.loads(tokenizer.to_str()) | {"post_processor": None}
    assert ids(tool.as_format_1(theirs)) == ids(plain)


def test_a_metaspace_is_put_together(tool: Any) -> None:
    tokenizer = SYNTHETIC["xlm_roberta"]()
    plain = json.loads(tokenizer.to_str()) | {"normalizer": None, "post_processor": None}
    plain["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True,
    }  # fmt: skip
    marks = {
        "type": "MetaspaceNormalizer", "replacement": "\u2581", "prepend": "always",
        "drop_whitespace": False,
    }  # fmt: skip
    split = {
        "type": "Split", "pattern": {"String": "\u2581"}, "behavior": "MergedWithNext",
        "invert": False,
    }  # fmt: skip
    theirs = of_format_2(tokenizer, normalizer=marks, pre_tokenizer=split)
    assert ids(tool.as_format_1(theirs)) == ids(plain)
    alone = theirs | {"pre_tokenizer": None}
    with pytest.raises(ValueError, match="MetaspaceNormalizer is known only"):
        tool.as_format_1(alone)


def test_a_template_gets_the_names_of_its_tokens(tool: Any) -> None:
    tokenizer = SYNTHETIC["gpt2"]()
    tokenizer.add_tokens([AddedToken("<s>", special=True)])
    index = tokenizer.token_to_id("<s>")
    both = [{"ids": [index]}, {"seq": "A"}, {"seq": "B", "type_id": 1}]
    template = {"type": "TemplateProcessing", "single": both[:2], "pair": both}
    found = tool.as_format_1(of_format_2(tokenizer, post_processor=template))
    plain = json.loads(tokenizer.to_str()) | {"post_processor": None}
    assert ids(found) == [[index, *own] for own in ids(plain)]


@pytest.mark.parametrize(
    ("instead", "why"),
    [
        ({"version": "3.0"}, "format '3.0'"),
        ({"post_processor": {"type": "Other"}}, "post-processor 'Other'"),
        (
            {
                "model": {
                    "type": "BPE", "byte_level": True, "vocab": {"a": 0, "b": 1},
                    "merges": [["a", "b"]],
                },
            },
            "lacks 'ab'",
        ),
    ],
)  # fmt: skip
def test_a_description_that_is_not_known_is_refused(
    tool: Any, instead: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        tool.as_format_1(of_format_2(SYNTHETIC["gpt2"](), **instead))
