"""Builds a `tokenizers.Tokenizer` from a GGUF, and proves it equal to llama.cpp's own on a probe.

1. llama.cpp loads the vocabulary alone: the text, type and score of each token, and its flags.
2. The tokenizer is built for two kinds: byte-level BPE whose pattern is known by its name in the
   file, and SentencePiece BPE.
3. Both encode the probe: samples of many scripts, whitespace, digits and code, pieces of the
   vocabulary joined, tokens that merges don't make, random code points, and added tokens next to
   all of these. A difference refuses the file, and so does a text that is the text of two tokens.

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
    Damaged,
    InvalidModel,
    MissingExtra,
    MissingFile,
    TokcacheError,
    UnsupportedTokenizer,
)
from tokcache.text.cuts.patterns import KNOWN
from tokcache.text.engines.fast import probe_texts

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

# Bits of llama_token_attr.
_UNKNOWN, _CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = 1 << 0, 1 << 3, 1 << 4, 1 << 7, 1 << 8
# Types of values in GGUF's metadata, and how many bytes a value takes, for types of fixed size.
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
_CURE = "pass the model's own tokenizer.json"
_N_RANDOM_TEXTS = 200
_N_UNMERGED = 1000
_SPACE_MARK = "\u2581"  # how SentencePiece writes a space

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
# ASCII, letters of many scripts, CJK, emoji: random texts are made of these code points.
_RANGES = ((32, 127), (0xA0, 0x250), (0x370, 0x590), (0x600, 0x700), (0x900, 0xD00), (0xE00, 0xE60),
           (0x3040, 0x3100), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x1F300, 0x1F650))  # fmt: skip

# With these a word that is a token is taken as it is, without merges.
_IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0",
                  "lfm2", "jina-v5-nano")  # fmt: skip
# Patterns, by their names in llama.cpp (`tokenizer.ggml.pre`).
_PATTERNS = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), KNOWN["qwen2"]),
    **dict.fromkeys(_IGNORE_MERGES, KNOWN["cl100k"]),
}
# Names for GPT-2's pattern, and for the same after every digit was split off.
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
    Cost:   about 1 s at 2,000 tokens, several seconds at 150,000.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"no such model file: {path}")
    try:
        import llama_cpp  # noqa: PLC0415 (an extra)
        from llama_cpp._internals import LlamaModel  # noqa: PLC0415 (Llama would make a context)
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
        difference = _why_not_equal(file, tokenizer, model)
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
            self.texts = [lib.llama_vocab_get_text(vocab, token_id).decode() for token_id in ids]
        except UnicodeDecodeError as error:
            raise UnsupportedTokenizer(
                f"{path.name} has a token that is not UTF-8 ({error}); {_CURE}"
            ) from None
        self.attributes = [lib.llama_vocab_get_attr(vocab, token_id) for token_id in ids]
        self.scores = [lib.llama_vocab_get_score(vocab, token_id) for token_id in ids]
        self.ids_before = [lib.llama_vocab_bos(vocab)] if lib.llama_vocab_get_add_bos(vocab) else []
        self.ids_after = [lib.llama_vocab_eos(vocab)] if lib.llama_vocab_get_add_eos(vocab) else []
        special_ids = {
            "bos_token": lib.llama_vocab_bos(vocab),
            "eos_token": lib.llama_vocab_eos(vocab),
        }
        self.config = {
            name: self.texts[token_id] for name, token_id in special_ids.items() if token_id >= 0
        }
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
    if file.kind == "gpt2":
        tokenizer = _byte_level_bpe(file)
    elif file.kind == "llama":
        tokenizer = _sentencepiece_bpe(file)
    else:
        raise UnsupportedTokenizer(
            f"{file.path.name} has a tokenizer of the kind {file.kind!r}; only 'gpt2' (byte-level "
            f"BPE) and 'llama' (SentencePiece BPE) are read from a GGUF; {_CURE}"
        )
    added = list(file.added_tokens())
    tokenizer.add_special_tokens([one for one in added if one.special])
    tokenizer.add_tokens([one for one in added if not one.special])
    if file.ids_before or file.ids_after:
        before = [file.texts[token_id] for token_id in file.ids_before]
        after = [file.texts[token_id] for token_id in file.ids_after]
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", "$B", *after],
            special_tokens=[(text, tokenizer.token_to_id(text)) for text in {*before, *after}],
        )
    return tokenizer


def _byte_level_bpe(file: _File) -> Tokenizer:
    key = "tokenizer.ggml.merges"
    strings = _string_entries(file.path)
    found = next((each for name, is_array, each in strings if is_array and name == key), None)
    if found is None:
        raise InvalidModel(f"{file.path} has no {key}, which byte-level BPE needs; {_CURE}")
    merges = [merge.decode() for merge in found]
    # As in llama.cpp, a space at the start belongs to the left part.
    cuts = [merge.index(" ", 1) for merge in merges]
    pairs = [(one[:at], one[at + 1 :]) for one, at in zip(merges, cuts, strict=True)]
    vocab = {text: token_id for token_id, text in enumerate(file.texts)}
    tokenizer = Tokenizer(BPE(vocab, pairs, ignore_merges=file.pattern in _IGNORE_MERGES))
    tokenizer.pre_tokenizer = _byte_level(file)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(file: _File) -> Tokenizer:
    vocab = {text: token_id for token_id, text in enumerate(file.texts)}
    attributes = zip(file.texts, file.attributes, strict=True)
    model = BPE(
        vocab,
        _merges_by_score(file, vocab),
        unk_token=next((text for text, bits in attributes if bits & _UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prepend = [normalizers.Prepend(_SPACE_MARK)] if file.adds_space else []
    replace = normalizers.Replace(" ", _SPACE_MARK)
    tokenizer.normalizer = normalizers.Sequence([*prepend, replace])
    strip_decoder = [decoders.Strip(" ", 1, 0)] if file.adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE_MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *strip_decoder,
        ]
    )
    return tokenizer


def read_gguf_strings(path: Path, beginning: str) -> dict[str, str]:
    """Return the metadata's strings (not those in arrays) whose key starts with `beginning`.

    Errors: InvalidModel for a file that is cut off or damaged.
    """
    try:
        return {
            key: values[0].decode(errors="replace")
            for key, is_array, values in _string_entries(path)
            if not is_array and key.startswith(beginning)
        }
    except Damaged as damage:
        raise InvalidModel(f"{path} {damage}; pass a whole GGUF") from None


def _string_entries(path: Path) -> Iterator[tuple[str, bool, list[bytes]]]:
    """Yield each entry of strings in the metadata, and whether it is an array.

    llama.cpp's API gives no arrays, and the gguf package takes 45 us a string.

    Errors: Damaged, if an entry does not end within the file or has an unknown type.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        n_entries = int.from_bytes(data[16:24], "little")
        at = 24
        for _ in range(n_entries):
            key, at = _read_string(data, at)
            value_type, at = int.from_bytes(data[at : at + 4], "little"), at + 4
            count = 1
            is_array = value_type == _ARRAY
            if is_array:
                value_type = int.from_bytes(data[at : at + 4], "little")
                count = int.from_bytes(data[at + 4 : at + 12], "little")
                at += 12
            if value_type != _STRING:
                if value_type not in _SIZES:  # also an array of arrays, which llama.cpp refuses
                    raise Damaged(f"has metadata of the unknown type {value_type}")
                at += count * _SIZES[value_type]
                continue
            values = []
            for _ in range(count):
                value, at = _read_string(data, at)
                values.append(value)
            yield key.decode(errors="replace"), is_array, values


def _read_string(data: mmap, at: int) -> tuple[bytes, int]:
    start = at + 8
    stop = start + int.from_bytes(data[at:start], "little")
    if start > len(data) or stop > len(data):
        raise Damaged("ends within its metadata")
    return data[start:stop], stop


def _byte_level(file: _File) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that the file names."""
    gpt2_split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if file.pattern in _GPT2:
        return gpt2_split
    if file.pattern in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_split])
    if file.pattern in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[file.pattern]), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, bytes_only])
    known = ", ".join(sorted({*_GPT2, *_DIGITS_APART, *_PATTERNS}))
    raise UnsupportedTokenizer(
        f"{file.path.name} splits texts by the pattern {file.pattern!r}; known are {known}; {_CURE}"
    )


def _merges_by_score(file: _File, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that make a token, the highest score of the made token first."""
    found: list[tuple[float, int, str, str]] = []
    for token_id, (text, score) in enumerate(zip(file.texts, file.scores, strict=True)):
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in vocab and right in vocab:
                found.append((-score, token_id, left, right))
    found.sort(key=lambda pair: pair[:2])
    return [(left, right) for _, _, left, right in found]


def _why_not_equal(file: _File, tokenizer: Tokenizer, model: Any) -> str | None:
    """Compare every token's text, then the ids of the probe with and without BOS and EOS."""
    for token_id, text in enumerate(file.texts):
        if tokenizer.token_to_id(text) != token_id:
            return f"{text!r} is token {token_id} and also {tokenizer.token_to_id(text)}"
    for text in gguf_probe_texts(tokenizer):
        for adds_special in (False, True):
            wanted = model.tokenize(text.encode(), add_bos=adds_special, special=True)
            found = tokenizer.encode(text, add_special_tokens=adds_special).ids
            at = first_difference(wanted, found)
            if at is not None:
                return (
                    f"{text!r} differs at token {at}: {found[max(0, at - 2) : at + 3]}, "
                    f"llama.cpp has {wanted[max(0, at - 2) : at + 3]}"
                )
    return None


def gguf_probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the probe: the same for the same vocabulary."""
    rng = random.Random(0)  # noqa: S311 (the same texts every time)
    texts = ["", *_SAMPLES, *probe_texts(tokenizer)]
    for _ in range(_N_RANDOM_TEXTS):
        ranges = [rng.choice(_RANGES) for _ in range(12)]
        texts.append("".join(chr(rng.randrange(*code_points)) for code_points in ranges))
    unmerged = _unmerged_tokens(tokenizer)
    some = rng.sample(unmerged, min(len(unmerged), _N_UNMERGED))
    return texts + ["\n".join(some[at : at + 25]) for at in range(0, len(some), 25)]


def _unmerged_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of tokens that merges don't make, to show whether words skip merges."""
    merging = Tokenizer.from_str(tokenizer.to_str())
    model = merging.model
    if not isinstance(model, BPE):
        return []
    model.ignore_merges = False
    merging.model = model
    ids = range(tokenizer.get_vocab_size())
    texts = tokenizer.decode_batch([[token_id] for token_id in ids], skip_special_tokens=False)
    encoded = merging.encode_batch_fast(texts, add_special_tokens=False)
    return [
        text
        for text, encoding in zip(texts, encoded, strict=True)
        if len(encoding.ids) > 1 and "\ufffd" not in text
    ]
