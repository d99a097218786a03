"""Tokenizers read from a GGUF give llama.cpp's own ids, or are refused."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

import tokcache
from tests.text.tokenizers_made import unigram
from tokcache import cli, samples
from tokcache.config import CacheConfig
from tokcache.errors import InvalidModel, MissingExtra, MissingFile, UnsupportedTokenizer
from tokcache.text.wrappers import gguf_tokenizer
from tokcache.text.wrappers.gguf_tokenizer import read_gguf_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp's own ids are compared")
pytest.importorskip("gguf", reason="tiny models are written with gguf")

REAL_MODEL = os.environ.get("TOKCACHE_REAL_MODEL", "")
CONFIG = CacheConfig(engine="tokenizers")
SIZES: dict[str, Any] = {"n_layers": 1, "n_embd": 32, "n_heads": 1, "n_kv_heads": 1, "n_ff": 32}
TEXTS = [
    "",
    "Hello world, it's 2024-05-17 and 1,234,567 of them don't fit.",
    "  two\n\n\tspaces  \r\n and \u00a0others ",
    "def f(x):\n    return [y**2 for y in x]  # squares\n",
    "Привет! こんにちは世界 안녕 مرحبا नमस्ते 👍🏽",
    "<|im_start|>user\nhi<|im_end|>\n<s> </s><unk>",
    "<|im_start|> <|im_end|>x<|endoftext|>",
]


def own_ids(path: Path) -> Any:
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def assert_equal(tokenizer: Any, path: Path) -> None:
    llm = own_ids(path)
    for text in TEXTS:
        expected = llm.tokenize(text.encode(), add_bos=False, special=True)
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text
        assert list(tokenizer.token_ids(text, add_special_tokens=False)) == expected, text
        expected = llm.tokenize(text.encode(), add_bos=True, special=True)
        assert tokenizer.encode(text).ids == expected, text


@pytest.mark.parametrize("as_path", [str, Path])
def test_wrap_reads_the_tokenizer_of_a_model_file(as_path: Any) -> None:
    model = samples.tiny_model(**SIZES)
    tokenizer = tokcache.wrap(as_path(model), CONFIG)
    assert isinstance(tokenizer, Tokenizer)
    assert_equal(tokenizer, model)
    plain = Tokenizer.from_file(str(samples.tiny_tokenizer()))
    assert tokenizer.get_vocab() == plain.get_vocab()
    assert tokenizer.decode(tokenizer.encode(TEXTS[1]).ids) == TEXTS[1]


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "minimind", "phi-3-mini", "qwen2.5"])
def test_every_kind_gives_the_ids_of_llama_cpp(
    name: str, tmp_path: Path, shared_data: Path
) -> None:
    source = shared_data / "tokenizers" / name / "tokenizer.json"
    model = samples.tiny_model(source, folder=tmp_path, **SIZES)
    assert_equal(tokcache.wrap(model, CONFIG), model)


@pytest.mark.skipif(not REAL_MODEL, reason="TOKCACHE_REAL_MODEL does not name a GGUF")
@pytest.mark.timeout(300)
def test_the_tokenizer_of_a_real_model_gives_the_ids_of_llama_cpp() -> None:
    assert_equal(tokcache.wrap(REAL_MODEL, CONFIG), Path(REAL_MODEL))


def test_a_difference_from_llama_cpp_is_named_and_refuses_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Spaces apart from words, where the file's pattern joins them.
    monkeypatch.setitem(gguf_tokenizer._PATTERNS, "qwen2", " |[^ ]+")
    message = r"differs at token \d+: .* llama.cpp has .*; pass the model's own tokenizer.json"
    with pytest.raises(UnsupportedTokenizer, match=message):
        read_gguf_tokenizer(samples.tiny_model(**SIZES))


def model_of_pattern(name: str, tmp_path: Path) -> Path:
    """Return a model whose file names another pattern; no merge makes its token "quxyz"."""
    tokenizer = Tokenizer.from_file(str(samples.tiny_tokenizer()))
    state = json.loads(tokenizer.to_str())
    removed = next(text for text in state["model"]["vocab"] if text.isascii() and len(text) == 5)
    state["model"]["vocab"]["quxyz"] = state["model"]["vocab"].pop(removed)
    state["model"]["merges"] = [
        pair for pair in state["model"]["merges"] if removed not in ("".join(pair), *pair)
    ]
    source = tmp_path / "tokenizer.json"
    source.write_text(json.dumps(state))
    model = samples.tiny_model(source, folder=tmp_path, **SIZES)

    key = b"tokenizer.ggml.pre" + struct.pack("<I", 8)
    before, after = model.read_bytes().split(key)
    length = struct.unpack("<Q", after[:8])[0]
    named = before + key + struct.pack("<Q", len(name)) + name.encode() + after[8 + length :]
    path = tmp_path / "named.gguf"
    path.write_bytes(named + bytes(64))  # the longer name may move the aligned tensors
    return path


# One name of each set, and the names that were missing in one of them.
@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "lfm2", "jina-v5-nano", "olmo", "smollm"])
def test_a_named_pattern_gives_the_ids_of_llama_cpp(name: str, tmp_path: Path) -> None:
    path = model_of_pattern(name, tmp_path)
    read = read_gguf_tokenizer(path).tokenizer
    llm = own_ids(path)
    for text in [*TEXTS, "quxyz and quxyz quxyzz"]:
        expected = llm.tokenize(text.encode(), add_bos=False, special=True)
        assert read.encode(text, add_special_tokens=False).ids == expected, text


def test_a_name_whose_words_skip_the_merges_is_not_read_as_one_whose_words_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tokenizer, "_IGNORE_MERGES", ())
    with pytest.raises(UnsupportedTokenizer, match=r"differs at token .*pass the model's own"):
        read_gguf_tokenizer(model_of_pattern("lfm2", tmp_path))


def test_other_kinds_and_patterns_are_refused(tmp_path: Path) -> None:
    unigram().save(str(tmp_path / "tokenizer.json"))
    model = samples.tiny_model(tmp_path / "tokenizer.json", folder=tmp_path, **SIZES)
    with pytest.raises(UnsupportedTokenizer, match=r"kind 't5'.*pass the model's own"):
        tokcache.wrap(model)
    data = samples.tiny_model(**SIZES).read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(b"qwen2", b"bloom", 1))
    with pytest.raises(UnsupportedTokenizer, match="by the pattern 'bloom'; known are"):
        tokcache.wrap(other)


def test_paths_of_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"no such model file: absent\.gguf"):
        tokcache.wrap("absent.gguf")
    with pytest.raises(UnsupportedTokenizer, match=r"is not a GGUF; load a tokenizer\.json"):
        tokcache.wrap(samples.tiny_tokenizer())
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(samples.tiny_model().read_bytes()[:5000])
    with pytest.raises(InvalidModel, match=r"llama\.cpp can't read .*damaged\.gguf"):
        tokcache.wrap(damaged)


def test_without_llama_cpp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = samples.tiny_model(**SIZES)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tokcache\[llama\]'"):
        tokcache.wrap(model)


def test_explain_and_demo_take_a_model_file(tmp_path: Path) -> None:
    model = str(samples.tiny_model())
    done = CliRunner().invoke(cli.app, ["explain", model, "--engine", "tokenizers"])
    assert done.exit_code == 0, done.output
    assert "ids compared with the plain tokenizer's" in done.stdout
    prompts = tmp_path / "chats.jsonl"
    prompts.write_text('[{"role": "user", "content": "Which rule applies?"}]')
    for option in ("--model", "--tokenizer"):
        arguments = ["demo", option, model, "--prompts", str(prompts), "--max-tokens", "1"]
        done = CliRunner().invoke(cli.app, [*arguments, "--backend", "inprocess"])
        assert done.exit_code == 0, done.output
        assert "the tokenizer's template" in done.stdout
        assert Path(model).name in done.stdout
