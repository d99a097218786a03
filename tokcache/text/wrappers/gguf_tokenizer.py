"""Builds a `tokenizers.Tokenizer` from a GGUF, and proves it equal to llama.cpp's own on a probe.

1. llama.cpp loads the vocabulary alone: the text, type and score of each token, and its flags.
2. The tokenizer is built for two kinds: byte-level BPE whose pattern is known by its name in the
   file, and SentencePiece BPE.
3. Both encode the probe: samples of many scripts, whitespace, digits and code, pieces of the
   vocabulary joined, random code points, and added tokens next to all of these. A difference
   refuses the file; so does a token that has another text.

Source: src/llama-vocab.cpp of llama.cpp, for the patterns and their names, and for the order in
        which SentencePiece pairs are merged.
"""

from __future__ import annotations

import random
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from tokcache._prefix import first_difference
from tokcache.errors import (
    InvalidModel,
    MissingExtra,
    MissingFile,
    TokcacheError,
    UnsupportedTokenizer,
)
from tokcache.text.engines.fast import probe_texts

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

# Bits of llama_token_attr.
_UNKNOWN, _CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = 1 << 0, 1 << 3, 1 << 4, 1 << 7, 1 << 8
# Types of GGUF's metadata, and the bytes of those of one size.
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
_CURE = "pass the model's own tokenizer.json"
_N_RANDOM = 200
_MARKER = "\u2581"

_SAMPLES = (
    " ", "  ", "   ", "a  b", " a", "a ", "\n", "\n\n\n", " \n \n", "\t\ta\t", "\r\n\r\n", "a\r\nb",
    "\u00a0\u2003\u3000x", "0", "007 1234567 3.14 1,000 \u0663\u0664 \u00bd \u216b",
    "don't DON'T I'LL we'Re 'tis", "def f(x):\n    return x[1:]  # 2**10\n\n\tif a!=b:\n",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155 \u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "e\u0301 \u00e9 \ufb01 \u01c4 \u1e9e", "\U0001f600\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "\u200b\u200d\ufeffx", "a" * 70, "\u2581 \u2581x", "<0x0A> <s> <unk> </s> [INST]", "\x01\x7f",
)  # fmt: skip
# ASCII, the planes' letters, CJK, emoji: the code points of which random texts are made.
_RANGES = ((32, 127), (0xA0, 0x250), (0x370, 0x590), (0x600, 0x700), (0x900, 0xD00), (0xE00, 0xE60),
           (0x3040, 0x3100), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x1F300, 0x1F650))  # fmt: skip

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_PATTERNS = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2 + _WHITESPACE),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _LLAMA3 + _WHITESPACE,
    ),
}
# A word that is a token is taken as it is, without merges.
_IGNORE_MERGES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"}
_GPT2 = {"gpt-2", "phi-2", "olmo", "jais", "mpt", "trillion"}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell"}


class GgufTokenizer(NamedTuple):
    """A tokenizer, and the `chat_template`, `bos_token` and `eos_token` of its file."""

    tokenizer: Tokenizer
    config: dict[str, Any]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a file that begins as a GGUF does."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf_tokenizer(path: str | os.PathLike[str]) -> GgufTokenizer:
    """Return the tokenizer of a GGUF, equal to llama.cpp's own on the probe.

    Errors: MissingFile; InvalidModel for a file that llama.cpp can't read; UnsupportedTokenizer
            if the kind is not known, or with the first difference from llama.cpp's ids;
            MissingExtra without llama-cpp-python.
    Cost:   a second at 2,000 tokens, some at 150,000.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"no such model file: {path}")
    try:
        import llama_cpp  # noqa: PLC0415 (an extra)
        from llama_cpp._internals import LlamaModel  # noqa: PLC0415 (loads without a context)
    except ImportError as error:
        raise MissingExtra(
            f"the tokenizer of {path.name} is read by llama.cpp: pip install 'tokcache[llama]', or "
            f"{_CURE} ({error})"
        ) from None
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    try:
        model = LlamaModel(path_model=str(path), params=parameters, verbose=False)
    except ValueError as error:
        raise InvalidModel(
            f"llama.cpp can't read the model file {path}: {error}; pass a whole GGUF, or the "
            "model's own tokenizer.json"
        ) from None
    try:
        file = _File(path, model.metadata(), llama_cpp, model.vocab)
        try:
            tokenizer = _build(file)
        except TokcacheError:
            raise
        except Exception as error:  # noqa: BLE001 (tokenizers raises Exception itself)
            raise UnsupportedTokenizer(
                f"no tokenizer can be built from {path.name}: {error}; {_CURE}"
            ) from None
        difference = _first_difference(file, tokenizer, model)
    finally:
        model.close()
    if difference is not None:
        raise UnsupportedTokenizer(
            f"the tokenizer built from {path.name} is not llama.cpp's: {difference}; {_CURE}"
        )
    return GgufTokenizer(tokenizer, file.config)


class _File:
    """The vocabulary of a file as llama.cpp reads it: texts, attributes and scores by token id."""

    def __init__(self, path: Path, metadata: dict[str, str], lib: Any, vocab: Any) -> None:
        self.path = path
        self.kind = metadata.get("tokenizer.ggml.model", "")
        self.pattern = metadata.get("tokenizer.ggml.pre", "default")
        # llama.cpp puts a space before a text unless the file forbids it.
        self.adds_space = metadata.get("tokenizer.ggml.add_space_prefix", "true") == "true"
        ids = range(lib.llama_vocab_n_tokens(vocab))
        try:
            self.texts = [lib.llama_vocab_get_text(vocab, index).decode() for index in ids]
        except UnicodeDecodeError as error:
            raise UnsupportedTokenizer(
                f"{path.name} has a token that is not UTF-8 ({error}); {_CURE}"
            ) from None
        self.attributes = [lib.llama_vocab_get_attr(vocab, index) for index in ids]
        self.scores = [lib.llama_vocab_get_score(vocab, index) for index in ids]
        self.before = [lib.llama_vocab_bos(vocab)] if lib.llama_vocab_get_add_bos(vocab) else []
        self.after = [lib.llama_vocab_eos(vocab)] if lib.llama_vocab_get_add_eos(vocab) else []
        ends = {"bos_token": lib.llama_vocab_bos(vocab), "eos_token": lib.llama_vocab_eos(vocab)}
        self.config = {name: self.texts[index] for name, index in ends.items() if index >= 0}
        if "tokenizer.chat_template" in metadata:
            self.config["chat_template"] = metadata["tokenizer.chat_template"]

    def added_tokens(self) -> Iterator[AddedToken]:
        """Yield the tokens that llama.cpp finds in a text before it applies the model."""
        for text, bits in zip(self.texts, self.attributes, strict=True):
            if bits & (_UNKNOWN | _CONTROL | _USER_DEFINED):
                yield AddedToken(
                    text,
                    lstrip=bool(bits & _LSTRIP),
                    rstrip=bool(bits & _RSTRIP),
                    normalized=False,
                    special=not bits & _USER_DEFINED,
                )


def _build(file: _File) -> Tokenizer:
    vocab = {text: index for index, text in enumerate(file.texts)}
    if file.kind == "gpt2":
        merges = _strings(file.path, "tokenizer.ggml.merges")
        # As in llama.cpp, a space at the start belongs to the left part.
        cuts = [merge.index(" ", 1) for merge in merges]
        pairs = [(one[:at], one[at + 1 :]) for one, at in zip(merges, cuts, strict=True)]
        model = BPE(vocab, pairs, ignore_merges=file.pattern in _IGNORE_MERGES)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = _byte_level(file)
        tokenizer.decoder = decoders.ByteLevel()
    elif file.kind == "llama":
        unknown = [text for text, bits in zip(file.texts, file.attributes, strict=True) if bits & 1]
        model = BPE(
            vocab,
            _merges_by_score(file, vocab),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = Tokenizer(model)
        marks = [normalizers.Prepend(_MARKER)] if file.adds_space else []
        tokenizer.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", _MARKER)])
        strip = [decoders.Strip(" ", 1, 0)] if file.adds_space else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(_MARKER, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    else:
        raise UnsupportedTokenizer(
            f"{file.path.name} has a tokenizer of the kind {file.kind!r}; only 'gpt2' (byte-level "
            f"BPE) and 'llama' (SentencePiece BPE) are read from a GGUF; {_CURE}"
        )
    added = list(file.added_tokens())
    tokenizer.add_special_tokens([one for one in added if one.special])
    tokenizer.add_tokens([one for one in added if not one.special])
    if file.before or file.after:
        before, after = ([file.texts[index] for index in ids] for ids in (file.before, file.after))
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", "$B", *after],
            special_tokens=[(text, tokenizer.token_to_id(text)) for text in {*before, *after}],
        )
    return tokenizer


def read_gguf_strings(path: Path, beginning: str) -> dict[str, str]:
    """Return the strings, not those in arrays, whose keys begin so; llama.cpp has read the file."""
    return {
        key: values[0].decode(errors="replace")
        for key, is_array, values in _string_entries(path)
        if not is_array and key.startswith(beginning)
    }


def _strings(path: Path, wanted: str) -> list[str]:
    """Return an array of strings in the metadata."""
    for key, is_array, values in _string_entries(path):
        if is_array and key == wanted:
            return [value.decode() for value in values]
    raise InvalidModel(f"{path} has no {wanted}, which its kind of tokenizer needs; {_CURE}")


def _string_entries(path: Path) -> Iterator[tuple[str, bool, list[bytes]]]:
    """Yield each entry of strings in the metadata, and whether it is an array.

    llama.cpp's API gives no arrays, and the gguf package takes 45 us a string. The file is sound:
    llama.cpp has read it.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        n_entries = int.from_bytes(data[16:24], "little")
        at = 24
        for _ in range(n_entries):
            key, at = _string(data, at)
            kind, at = int.from_bytes(data[at : at + 4], "little"), at + 4
            count = 1
            is_array = kind == _ARRAY
            if is_array:
                kind = int.from_bytes(data[at : at + 4], "little")
                count = int.from_bytes(data[at + 4 : at + 12], "little")
                at += 12
            if kind != _STRING:
                at += count * _SIZES[kind]  # no file has an array of arrays
                continue
            values = []
            for _ in range(count):
                value, at = _string(data, at)
                values.append(value)
            yield key.decode(), is_array, values


def _string(data: mmap, at: int) -> tuple[bytes, int]:
    start = at + 8
    stop = start + int.from_bytes(data[at:start], "little")
    return data[start:stop], stop


def _byte_level(file: _File) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that the file names."""
    by_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if file.pattern in _GPT2:
        return by_gpt2
    if file.pattern in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_gpt2])
    if file.pattern in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[file.pattern]), "isolated")
        raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, raw])
    known = ", ".join(sorted({*_GPT2, *_DIGITS_APART, *_PATTERNS}))
    raise UnsupportedTokenizer(
        f"{file.path.name} splits texts by the pattern {file.pattern!r}; known are {known}; {_CURE}"
    )


def _merges_by_score(file: _File, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that make a token, the highest score of the made token first."""
    found: list[tuple[float, int, str, str]] = []
    for index, (text, score) in enumerate(zip(file.texts, file.scores, strict=True)):
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in vocab and right in vocab:
                found.append((-score, index, left, right))
    found.sort(key=lambda pair: pair[:2])
    return [(left, right) for _, _, left, right in found]


def _first_difference(file: _File, tokenizer: Tokenizer, model: Any) -> str | None:
    """Compare every token's text, then the ids of the probe with and without BOS and EOS."""
    for index, text in enumerate(file.texts):
        if tokenizer.token_to_id(text) != index:
            return f"{text!r} is token {index} and also {tokenizer.token_to_id(text)}"
    for text in probe_of(tokenizer):
        for special in (False, True):
            wanted = model.tokenize(text.encode(), special, True)
            found = tokenizer.encode(text, add_special_tokens=special).ids
            at = first_difference(wanted, found)
            if at is not None:
                return (
                    f"{text!r} differs at token {at}: {found[max(0, at - 2) : at + 3]}, "
                    f"llama.cpp has {wanted[max(0, at - 2) : at + 3]}"
                )
    return None


def probe_of(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the probe: the same for the same vocabulary."""
    rng = random.Random(0)  # noqa: S311 (the same texts every time)
    texts = ["", *_SAMPLES, *probe_texts(tokenizer)]
    for _ in range(_N_RANDOM):
        points = [rng.choice(_RANGES) for _ in range(12)]
        texts.append("".join(chr(rng.randrange(*points_of)) for points_of in points))
    return texts
