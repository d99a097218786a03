"""Random tokenizers: any combination of normalizers, pre-tokenizers, model, flags and template.

`combination(rng)` draws one; the same seed gives the same tokenizer. Most draws are tokenizers
for which cuts can be proven, because a wrong proof can only be found there. The models are made
such that ids show every wrong boundary. A combination that the library refuses is drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from tests.text.tokenizers_synthetic import PATTERNS

_MARKER = "\u2581"
_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
_NON_ASCII = "\xe9\xc9\xe4\u2260\u226e\u0430\u4f60\u2026\u0301\u0338\u0120\u010a\u0109\u3002"
_ALPHABET = [*_VISIBLE, " ", "\n", "\t", _MARKER, *_NON_ASCII]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_MERGED = ["a", "b", "e", "1", "2", "!", "_", "'", "=", ".", "`", '"', " ", _MARKER, "\n", "\xe9"]
_MERGED += ["\u2260", "<0x5F>", "<0x3D>"]

_CONTENTS = (
    *["ab", "aa", "a", "b1", "1", "=", "\xe9", "1\xe9", "new york", "AB", "e\u0301", "\u4f60"],
    *["<x>", "<y>", "<x>a", "x>b", " ", "\n", "\n\n", " ab", "ab ", "<s>", "</s>", "a\nb", "_"],
    *["'s", "``", "a=", "=b"],
)

Draw = Callable[[random.Random], Any]


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: at for at, token in enumerate(dict.fromkeys(tokens))}


# ---- models


def _marks_every_boundary(rng: random.Random) -> Any:
    """Return a model in which a letter at the start, or at the end, of a word has another id."""
    letters = [*_ALPHABET, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if rng.random() < 0.5:
        marked, settings = [f"##{one}" for one in letters], {"continuing_subword_prefix": "##"}
    else:
        marked, settings = [f"{one}</w>" for one in letters], {"end_of_word_suffix": "</w>"}
    return BPE(
        vocab=_numbered(["?", *letters, *marked]),
        merges=[],
        unk_token="?",  # noqa: S106 (no password)
        **settings,
    )


def _merging(rng: random.Random) -> Any:
    """Return BPE over letters with a few merges, so that any two classes may form a token."""
    letters = [one for one in _ALPHABET if rng.random() < 0.97]
    byte_fallback = rng.random() < 0.4
    if byte_fallback:
        letters = [one for one in letters if one not in "_=" or rng.random() < 0.5] + _BYTES
    known = set(letters)
    pairs: list[tuple[str, str]] = []
    for _ in range(rng.randint(0, 12)):
        one, other = (rng.choice([*_MERGED, *(a + b for a, b in pairs)]) for _ in range(2))
        if {one, other} <= known | {a + b for a, b in pairs} and (one, other) not in pairs:
            pairs.append((one, other))
    vocabulary = _numbered(["?", *letters, *(one + other for one, other in pairs)])
    if rng.random() < 0.1:
        vocabulary["!"] = vocabulary.get("a", 0)  # two tokens, one id
    return BPE(
        vocab=vocabulary,
        merges=pairs,
        unk_token=rng.choice(["?", None]),
        fuse_unk=rng.random() < 0.4,
        byte_fallback=byte_fallback,
        ignore_merges=rng.random() < 0.1,
    )


def _words(rng: random.Random) -> Any:
    some = ["ab", "a", "b", "1", "12", "=", "!", "new", "york", "a_b", "\xe9", "\u2260", "'"]
    ids = _numbered(["?", *some, *(_MARKER + one for one in some), *("##" + one for one in some)])
    if rng.random() < 0.3:
        ids = {word: at * 2 + at % 3 for word, at in ids.items()}  # ids with gaps
    if rng.random() < 0.5:
        return WordLevel(ids, unk_token="?")  # noqa: S106 (no password)
    return WordPiece(ids, unk_token="?", max_input_chars_per_word=rng.choice([5, 100]))  # noqa: S106


def _unigram(_: random.Random) -> Any:
    some = ["ab", "a", "b", "1", "12", "=", "!", "new", "york", "_", "\xe9", "\u2260", "\n", "'"]
    pieces = ["?", *some, _MARKER, *(_MARKER + one for one in some)]
    return Unigram([(one, -1.0 - at / 8) for at, one in enumerate(pieces)], unk_id=0)


_MODELS: list[tuple[int, Draw]] = [
    (5, _marks_every_boundary),
    (5, _merging),
    (2, _words),
    (1, _unigram),
]

# ---- normalizers


def _replaces(rng: random.Random) -> Any:
    return rng.choice(
        [
            normalizers.Replace(" ", _MARKER),
            normalizers.Replace(" ", _MARKER),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(" {2,}"), _MARKER),
            normalizers.Replace(Regex("  +"), _MARKER),
            normalizers.Replace("``", '"'),
            normalizers.Replace("''", '"'),
            normalizers.Replace("e", "ee"),
            normalizers.Replace(Regex(r"\s+"), " "),
        ]
    )


def _bert_normalizer(rng: random.Random) -> Any:
    clean, chinese, lower = (rng.random() < 0.5 for _ in range(3))
    accents = rng.choice([None, True, False])
    return normalizers.BertNormalizer(
        clean_text=clean, handle_chinese_chars=chinese, strip_accents=accents, lowercase=lower
    )


_NORMALIZERS: list[Draw] = [
    lambda _: normalizers.NFC(),
    lambda _: normalizers.NFC(),
    lambda _: normalizers.NFKC(),
    lambda rng: rng.choice([normalizers.NFD(), normalizers.NFKD()]),
    lambda _: normalizers.StripAccents(),
    lambda _: normalizers.Lowercase(),
    lambda _: normalizers.Nmt(),
    lambda rng: normalizers.Strip(left=rng.random() < 0.5, right=rng.random() < 0.5),
    lambda rng: normalizers.Prepend(rng.choice([_MARKER, " ", "x", "``"])),
    _replaces,
    _replaces,
    _bert_normalizer,
]

# ---- pre-tokenizers

_BEHAVIORS = ("removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous")


def _split(rng: random.Random) -> Any:
    pattern: Any = Regex(rng.choice(list(PATTERNS.values())))
    if rng.random() < 0.15:
        pattern = rng.choice([" ", "a", "1"])
    if rng.random() < 0.7:
        return pre_tokenizers.Split(pattern, "isolated")
    if rng.random() < 0.5:
        return pre_tokenizers.Split(pattern, "removed", invert=True)
    return pre_tokenizers.Split(pattern, rng.choice(_BEHAVIORS), invert=rng.random() < 0.5)


def _byte_level(rng: random.Random) -> Any:
    return pre_tokenizers.ByteLevel(
        add_prefix_space=rng.random() < 0.4, use_regex=rng.random() < 0.5
    )


def _metaspace(rng: random.Random) -> Any:
    return pre_tokenizers.Metaspace(
        replacement=_MARKER if rng.random() < 0.9 else "_",
        prepend_scheme=rng.choice(["always", "never", "first"]),
        split=rng.random() < 0.8,
    )


_PRE_TOKENIZERS: list[Draw] = [
    lambda _: pre_tokenizers.BertPreTokenizer(),
    lambda _: pre_tokenizers.Whitespace(),
    lambda _: pre_tokenizers.WhitespaceSplit(),
    lambda rng: pre_tokenizers.Punctuation(rng.choice(_BEHAVIORS)),
    lambda rng: pre_tokenizers.Digits(individual_digits=rng.random() < 0.5),
    _split,
    _split,
    _byte_level,
    _byte_level,
    _metaspace,
    _metaspace,
    lambda rng: rng.choice(
        [
            pre_tokenizers.CharDelimiterSplit("e"),
            pre_tokenizers.UnicodeScripts(),
            pre_tokenizers.FixedLength(3),
        ]
    ),
]

# ---- added tokens and templates


def _added(rng: random.Random) -> list[AddedToken]:
    found = []
    for content in rng.sample(_CONTENTS, rng.choice([0, 0, 1, 2, 2, 3])):
        flags = rng.sample(["lstrip", "rstrip", "single_word"], rng.choice([0, 0, 1, 2]))
        settings = dict.fromkeys(flags, True)
        settings |= {"normalized": rng.random() < 0.4, "special": rng.random() < 0.4}
        found.append(AddedToken(content, **settings))
    return found


def _template(rng: random.Random) -> Any:
    single = rng.choice(["<s> $A", "$A </s>", "<s> $A </s>", "$A"])
    return processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def _some(rng: random.Random, draws: list[Draw], sizes: list[int], sequence: Any) -> Any:
    parts = [rng.choice(draws)(rng) for _ in range(rng.choice(sizes))]
    return sequence(parts) if len(parts) > 1 else parts[0] if parts else None


def combination(rng: random.Random) -> Tokenizer:
    """Return a random tokenizer that the library can build and encode a short text with."""
    while True:
        try:
            made = _draw_once(rng)
            made.encode("ab 1")
        except BaseException as error:  # the library panics over some combinations
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            continue
        return made


def _normalized_content(token: AddedToken, normalizer: Any) -> str:
    is_normalized = token.normalized and normalizer is not None
    return normalizer.normalize_str(token.content) if is_normalized else token.content


def _draw_once(rng: random.Random) -> Tokenizer:
    model = rng.choices([draw for _, draw in _MODELS], [weight for weight, _ in _MODELS])[0]
    made = Tokenizer(model(rng))
    normalizer = _some(rng, _NORMALIZERS, [0, 0, 1, 1, 2, 3], normalizers.Sequence)
    if normalizer is not None:
        made.normalizer = normalizer
    sizes = [0, 0, 0, 1] if model is _merging else [0, 1, 1, 1, 2, 2, 3]
    pre_tokenizer = _some(rng, _PRE_TOKENIZERS, sizes, pre_tokenizers.Sequence)
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    seen = {""}  # the library would search for an empty token forever
    for token in _added(rng):
        name = _normalized_content(token, normalizer)
        if name in seen:
            continue  # of two tokens that are equal after normalization, a random one is found
        seen.add(name)
        add = made.add_special_tokens if token.special else made.add_tokens
        add([token])
    if rng.random() < 0.3:
        made.post_processor = _template(rng)
    made.encode_special_tokens = rng.random() < 0.1
    return made
