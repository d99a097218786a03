"""Translates a tokenizer.json into the `tokenizer.ggml.*` values of a GGUF."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokcache.errors import MissingFile, UnsupportedTokenizer
from tokcache.samples.tokenizer import CHAT_TEMPLATE, IM_END, IM_START, QWEN2_PATTERN

if TYPE_CHECKING:
    from pathlib import Path

# llama.cpp's llama_token_type (gguf.TokenType has the same numbers)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# BOS is named even if the tokenizer adds none: without it llama.cpp takes id 11 in a BPE model.
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>")
_EOS_NAMES = (IM_END, "</s>", "<eos>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
_PAD_NAMES = ("<pad>", "<|endoftext|>")
# The pre-tokenizer's pattern and llama.cpp's name for it.
_PRE_BY_PATTERN = {
    QWEN2_PATTERN: "qwen2",
    QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokenizer's values in a GGUF; the lists are indexed by token id."""

    model: str
    tokens: list[str]
    types: list[int]
    pre: str | None = None
    scores: list[float] | None = None
    merges: list[str] | None = None
    special_ids: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    charsmap: bytes | None = None
    chat_template: str | None = None


def read_vocabulary(tokenizer_json: Path) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json (and of the tokenizer_config.json next to it).

    Errors: MissingFile; UnsupportedTokenizer if llama.cpp has no tokenizer of that kind.
    """
    description = _read_json(tokenizer_json)
    config_path = tokenizer_json.with_name("tokenizer_config.json")
    config = _read_json(config_path) if config_path.exists() else {}
    model = description.get("model") or {}
    kind = _kind(model)
    if kind == "byte-level BPE":
        return _byte_level(description, config)
    if kind == "BPE with byte fallback":
        return _sentencepiece_bpe(description, config)
    if kind == "Unigram":
        return _unigram(description, config)
    raise UnsupportedTokenizer(
        f"{tokenizer_json.name} holds a {kind} tokenizer; a GGUF can be made for byte-level BPE,"
        " BPE with byte fallback, and Unigram"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingFile(f"no such file: {path}") from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UnsupportedTokenizer(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise UnsupportedTokenizer(f"{path} holds a {type(found).__name__}, not a JSON object")
    return found


def _kind(model: dict[str, Any]) -> str:
    # Old files lack "type"; the model's fields show its kind.
    name = model.get("type")
    if name is None and isinstance(model.get("vocab"), list):
        name = "Unigram"
    if name == "BPE" or (name is None and "merges" in model):
        return "BPE with byte fallback" if model.get("byte_fallback") else "byte-level BPE"
    return str(name or "WordPiece or WordLevel")


def _byte_level(description: dict[str, Any], config: dict[str, Any]) -> Vocabulary:
    parts = _components(description.get("pre_tokenizer"))
    byte_level = next((part for part in parts if part["type"] == "ByteLevel"), None)
    if byte_level is None:
        raise UnsupportedTokenizer(
            "llama.cpp has no counterpart of a BPE tokenizer with neither a ByteLevel pre-tokenizer"
            " nor byte fallback"
        )
    # llama.cpp's name for the pre-tokenizer.
    pattern = next(
        (part["pattern"].get("Regex") for part in parts if part["type"] == "Split"), None
    )
    if pattern is None:
        pre = "gpt-2" if byte_level.get("use_regex", True) else "default"
    else:
        pre = _PRE_BY_PATTERN.get(pattern, "default")
    tokens, types = _table(description["model"]["vocab"], description)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[f"{left} {right}" for left, right in _pairs(description["model"]["merges"])],
        **_common(description, config, tokens),
    )


def _sentencepiece_bpe(description: dict[str, Any], config: dict[str, Any]) -> Vocabulary:
    tokens, types = _table(description["model"]["vocab"], description)
    # llama.cpp merges the pair with the highest score first: the negative rank of a token's first
    # merge as its score gives HuggingFace's order.
    scores = [0.0] * len(tokens)
    ids = {token: number for number, token in enumerate(tokens)}
    for rank, merge in reversed(list(enumerate(_pairs(description["model"]["merges"])))):
        scores[ids["".join(merge)]] = -float(rank)
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=types,
        scores=scores,
        add_space_prefix='"Prepend"' in json.dumps(description.get("normalizer")),
        **_common(description, config, tokens),
    )


def _unigram(description: dict[str, Any], config: dict[str, Any]) -> Vocabulary:
    entries = description["model"]["vocab"]
    vocab = {token: number for number, (token, _) in enumerate(entries)}
    tokens, types = _table(vocab, description)
    unk = description["model"].get("unk_id")
    if unk is not None:
        types[unk] = UNKNOWN
    scores = [float(score) for _, score in entries]
    return Vocabulary(
        model="t5",
        tokens=tokens,
        types=types,
        scores=scores + [0.0] * (len(tokens) - len(scores)),
        add_space_prefix=True,
        remove_extra_whitespaces="WhitespaceSplit"
        in {part["type"] for part in _components(description.get("pre_tokenizer"))},
        charsmap=_charsmap(description.get("normalizer")),
        **_common(description, config, tokens),
    )


def _charsmap(normalizer: object) -> bytes | None:
    if isinstance(normalizer, dict):
        if normalizer.get("type") == "Precompiled":
            return base64.b64decode(normalizer["precompiled_charsmap"] or "")
        parts = normalizer.get("normalizers", [])
        return next((found for part in parts if (found := _charsmap(part))), None)
    return None


def _table(vocab: dict[str, int], description: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return token strings and types by id; an id without a token is UNUSED."""
    added = description.get("added_tokens") or []
    size = 1 + max([*vocab.values(), *(token["id"] for token in added)])
    tokens = [f"[UNUSED{number}]" for number in range(size)]
    types = [UNUSED] * size
    unknown = description["model"].get("unk_token")
    for token, number in vocab.items():
        tokens[number] = token
        types[number] = BYTE if _BYTE_TOKEN.fullmatch(token) else NORMAL
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    return tokens, types


def _pairs(merges: list[Any]) -> list[tuple[str, str]]:
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]


def _components(component: object) -> list[dict[str, Any]]:
    """Return a pre-tokenizer or post-processor as the flat list of its parts."""
    if not isinstance(component, dict):
        return []
    inner = component.get("pretokenizers") or component.get("processors")
    return [part for each in inner for part in _components(each)] if inner else [component]


def _common(
    description: dict[str, Any], config: dict[str, Any], tokens: list[str]
) -> dict[str, Any]:
    ids = {token: number for number, token in enumerate(tokens)}
    # The ids that the post-processor puts before and after a text.
    before: int | None = None
    after: int | None = None
    for part in _components(description.get("post_processor")):
        if part["type"] == "TemplateProcessing":
            names = [(piece.get("SpecialToken") or {}).get("id") for piece in part["single"]]
            before, after = ids.get(names[0] or ""), ids.get(names[-1] or "")
            break
    special = {
        "bos": before if before is not None else _special(config, "bos_token", _BOS_NAMES, ids),
        "eos": after if after is not None else _special(config, "eos_token", _EOS_NAMES, ids),
        "pad": _special(config, "pad_token", _PAD_NAMES, ids),
        "unk": _special(config, "unk_token", ("<unk>",), ids),
    }
    template = config.get("chat_template")
    if not isinstance(template, str):
        template = CHAT_TEMPLATE if IM_START in ids and IM_END in ids else None
    return {
        "special_ids": {name: number for name, number in special.items() if number is not None},
        "add_bos": before is not None,
        "add_eos": after is not None,
        "chat_template": template,
    }


def _special(
    config: dict[str, Any], key: str, names: tuple[str, ...], ids: dict[str, int]
) -> int | None:
    named = config.get(key)
    named = named.get("content") if isinstance(named, dict) else named
    return next((ids[name] for name in (named, *names) if name in ids), None)
