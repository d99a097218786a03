"""Synthetic tokenizers: every component, flag and pair of flags that a safe cut depends on.

`SYNTHETIC` maps names to builders. Each kind is trained once; its builder then makes a new
tokenizer from the serialised form. Vocabularies depend on this file alone: the WordPiece and
Unigram trainers break ties at random, so they are not used, and a failing seed fails every time.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import combinations
from pathlib import Path
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
from tokenizers.trainers import BpeTrainer

Build = Callable[[], Tokenizer]

_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_KIMI_LETTERS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_KIMI_SMALL = r"\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The patterns after JSON decoding, from the tokenizer.json files that the comments name. The
# DeepSeek and Seed-Coder files contain the characters \r and \n themselves, not escapes.
PATTERNS = {
    # the pattern of ByteLevel(use_regex=True): GPT-2, GPT-NeoX, RoBERTa, Whisper
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3. Conversions of cl100k use the same pattern: Isolated in microsoft/phi-4, inverted
    # and Removed in Xenova/gpt-4, allenai/dolma2-tokenizer and ibm-granite/granite-4
    "llama3": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_ENDS}",
    # tiktoken's own cl100k_base
    "cl100k_tiktoken": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    # GSAI-ML/LLaDA, inclusionAI/Ling
    "bailing": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    # Qwen2, Qwen2.5, Qwen3
    "qwen2": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_ENDS}",
    # Qwen3.5
    "qwen35": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # openai/gpt-oss, Llama 4 (Isolated); MiniMaxAI/MiniMax-M2 (Removed + invert)
    "o200k": (
        _CASED_WORD % (f"{_CONTRACTION}?", f"{_CONTRACTION}?")
        + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # Mistral NeMo and newer (tekken), nvidia/Nemotron-3
    "tekken": (
        _CASED_WORD % ("", "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # moonshotai/Kimi-K2 and newer
    "kimi": (
        r"[\p{Han}]+"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_KIMI_LETTERS}]*[{_KIMI_SMALL}]+{_CONTRACTION}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_KIMI_LETTERS}]+[{_KIMI_SMALL}]*{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}{_ENDS}"
    ),
    # deepseek-ai/DeepSeek-V3, R1, V4: three Splits in this order, then ByteLevel
    "deepseek_v3_numbers": r"\p{N}{1,3}",
    "deepseek_v3_cjk": "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "deepseek_v3": (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+".replace('\\"', '"')
        + "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+"
        + r"|\s+(?!\S)|\s+"
    ),
    # deepseek-ai/DeepSeek-V2 and DeepSeek-LLM: five Splits, Digits, ByteLevel
    "deepseek_v2_newlines": "[\r\n]",
    "deepseek_v2_letters": (
        "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
        "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
        "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
        "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
        "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
        "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
        "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
        "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
        "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
        "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
        "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
        "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
        "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
    ),
    "deepseek_v2_punctuation": (
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
    ),
    "deepseek_v2_trailing": r"\s+$",
    "deepseek_v2_cjk": "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    # deepseek-ai/deepseek-coder: V2's newlines, these two, V2's cjk, Digits, ByteLevel
    "deepseek_coder_letters": r"\s?\p{L}+",
    "deepseek_coder_punctuation": r"\s?\p{P}+",
    # tiiuae/falcon-7b: Punctuation(Contiguous), ByteLevel, Digits, then this pattern
    "falcon_digits": "[0-9][0-9][0-9]",
    # openai/clip-vit: Removed + invert, then ByteLevel with its own regex
    "clip": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    # bigscience/bloom
    "bloom": " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
    # ByteDance-Seed/Seed-Coder
    "seed_coder": (
        f"{_CONTRACTION}|[^\r\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{{1}}"
        "| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    # poolside/Laguna: this pattern with MergedWithNext, then Qwen2's
    "laguna_lines": r"(?:\r?\n)+(?!\r?\n)",
    # CohereLabs/aya: this pattern, then o200k's
    "aya_digits": r"\d{1,3}(?=(?:\d{3})*\b)",
}

TRAINING = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind; it's fine.",
    "the of to and in is that it was for on are as with his they at be this have from or one had",
    "I'll say we've seen what they're doing: he'd go, she'd stay, I'm here. DON'T SHOUT, IT'S LATE",
    "Please list the names of all files in New York and of the last 10, 250, 1999 or 12345 days.",
    "user assistant system message content hello hello world worlds, helloworld HELLO Hello!",
    "def main(argv: list[str]) -> int:\n    for name in argv[1:]:\n        print(f'Hi, {name}!')\n",
    "    return 0\n\n\nif __name__ == '__main__':\n    sys.exit(main(sys.argv))\n",
    "\tif (x == NULL) {\n\t\treturn -1;\n\t}\n\n\t/* done */\r\n#include <stdio.h>\r\n\r\n",
    '{"id": 12, "name": "New York", "tags": ["a", "b"], "ok": true, "x": null}\n',
    "a  b   c    d     e        f                g\n\n\n\n\nh \n \n i\t\t\tj \t k",
    "Съешь ещё этих мягких булок, привет мир. Это тест: проверка, как в этом мире.",
    "你好，世界！今天天气很好。你好我们去北京吗？ 世界 你好",  # noqa: RUF001 (Chinese)
    "東京の天気はどうですか。テスト 한국어 텍스트",
    "naïve café ünïcöde à la façon, señor, Straße, \u0130stanbul, \ufb01",
    "e\u0301 a\u0300 \U0001f600\U0001f469\u200d\U0001f4bb \xbd \u2167 \u2014 \u2018x\u2019 \xa0",
    "https://example.org/a/b?c=d&e=f#g //comment\n/path/to/file;;; (((()))) --- ===== !!! ???",
    "The cat sat on the mat. The cat ran to the end of the road and back to the house of the man.",
]

_UNDERLINE = "\u2581"  # SentencePiece's mark for a space
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


# ---- vocabularies


def _byte_level(
    pre_tokenizer: Any, normalizer: Any = None, vocab_size: int = 640, **settings: Any
) -> Tokenizer:
    """Return BPE over bytes, trained on the words that `pre_tokenizer` makes."""
    made = Tokenizer(BPE(**settings))
    made.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        made.normalizer = normalizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    return _trained(made, TRAINING, vocab_size, specials, letters, **settings)


def _trained(
    made: Tokenizer,
    lines: list[str],
    vocab_size: int,
    specials: list[str],
    letters: list[str],
    **settings: Any,
) -> Tokenizer:
    """Train BPE such that ids and merges are the same in every process."""
    affixes = {
        name: settings[name]
        for name in ("continuing_subword_prefix", "end_of_word_suffix")
        if settings.get(name)
    }
    prefix, suffix = (
        affixes.get(name, "") for name in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    # The trainer numbers letters with a prefix or suffix in the order of a hash map, but special
    # tokens in the given order. So these letters are trained as special tokens, and taken out of
    # the added tokens afterwards.
    own = [prefix + letter for letter in letters if prefix]
    own += [letter + suffix for letter in letters if suffix]
    own += [prefix + letter + suffix for letter in letters if prefix and suffix]
    made.train_from_iterator(
        lines,
        BpeTrainer(
            vocab_size=vocab_size + len(own),
            special_tokens=[*specials, *own],
            initial_alphabet=letters,
            show_progress=False,
            **affixes,
        ),
    )
    data = json.loads(made.to_str())
    data["added_tokens"] = [
        one
        for one in data["added_tokens"]
        if one["content"] in specials and not one["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(data))


def _common(n_letters: int, lines: Iterable[str]) -> list[str]:
    """Return the `n_letters` most frequent letters, sorted."""
    counts = Counter("".join(lines))
    return sorted(sorted(counts, key=lambda one: (-counts[one], one))[:n_letters])


def _only(letters: list[str], lines: Iterable[str]) -> list[str]:
    """Return the lines without the letters that the tokenizer should not know."""
    return ["".join(one for one in line if one in letters) for line in lines]


def _split_bytes(*names: str, **how: Any) -> Any:
    """Return a pre-tokenizer that splits by the named patterns and then maps to bytes."""
    how.setdefault("behavior", "isolated")
    splits = [pre_tokenizers.Split(Regex(PATTERNS[name]), **how) for name in names]
    return pre_tokenizers.Sequence([*splits, _bytes()])


def _bytes(use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _sentence_piece(
    normalizer: Any,
    pre_tokenizer: Any = None,
    train_with: Any = None,
    byte_fallback: bool = True,
    **settings: Any,
) -> Tokenizer:
    """Return BPE over characters, trained with one pre-tokenizer and used with another."""
    specials = ["<unk>", "<s>", "</s>", *(_BYTE_TOKENS if byte_fallback else [])]
    settings = dict[str, Any](fuse_unk=True, unk_token="<unk>") | settings  # noqa: S106 (no password)
    made = Tokenizer(BPE(byte_fallback=byte_fallback, **settings))
    if normalizer is not None:
        made.normalizer = normalizer
    if train_with is not None:
        made.pre_tokenizer = train_with
    letters = _common(130, [line.replace(" ", _UNDERLINE) for line in TRAINING])
    lines = _only([*letters, " "], TRAINING)
    made = _without_pre_tokenizer(
        _trained(made, lines, len(specials) + 640, specials, letters, **settings)
    )
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


def _without_pre_tokenizer(made: Tokenizer) -> Tokenizer:
    data = json.loads(made.to_str())
    data["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(data))


@cache
def _pieces(is_split: bool) -> list[tuple[str, int]]:
    """Return substrings of the training text with their counts, sorted by coverage."""
    text = " ".join(TRAINING).replace(" ", _UNDERLINE)
    counts: Counter[str] = Counter()
    for start in range(len(text)):
        for end in range(start + 1, min(start + 9, len(text)) + 1):
            if is_split and _UNDERLINE in text[start + 1 : end]:
                break
            counts[text[start:end]] += 1
    return sorted(counts.items(), key=lambda one: (-one[1] * (len(one[0]) - 1), one[0]))


def _unigram_vocabulary(is_split: bool) -> list[tuple[str, float]]:
    pieces = _pieces(is_split)
    # Rare letters stay unknown. Scores from counts make many sums equal except for rounding.
    letters = [one for one in pieces if len(one[0]) == 1 and one[1] > 1]
    chosen = dict(letters + [one for one in pieces if len(one[0]) > 1][:500])
    total = sum(chosen.values())
    scores = [(piece, math.log(n_times / total)) for piece, n_times in chosen.items()]
    return [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *scores]


def _unigram(
    pre_tokenizer: Any, normalizer: Any = None, is_split: bool = True, **settings: Any
) -> Tokenizer:
    settings = {"unk_id": 0} | settings
    made = Tokenizer(Unigram(_unigram_vocabulary(is_split), **settings))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def _words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]


def _vocabulary(tokens: Iterable[str]) -> dict[str, int]:
    return {token: at for at, token in enumerate(dict.fromkeys(tokens))}


def _word_piece(normalizer: Any, pre_tokenizer: Any = None, **settings: Any) -> Tokenizer:
    words = Counter(_words(normalizer.normalize_str(" ".join(TRAINING)) if normalizer else ""))
    words.update(_words(" ".join(TRAINING)))
    heads = [word[:size] for word in sorted(words) for size in (1, 2, 3)]
    tails = ["##" + word[-size:] for word in sorted(words) for size in (1, 2, 3)]
    letters = ["##" + letter for word in sorted(words) for letter in word]
    common = sorted(word for word, n_times in words.items() if n_times > 1)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model = WordPiece(
        _vocabulary([*special, *common, *heads, *tails, *letters]),
        unk_token="[UNK]",  # noqa: S106 (no password)
        **settings,
    )
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(special)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def _word_level(pre_tokenizer: Any, *, has_unk: bool = True) -> Tokenizer:
    words = [w for line in TRAINING for w, _ in pre_tokenizer.pre_tokenize_str(line)]
    common = sorted({word for word in words if len(word) < 5})
    made = Tokenizer(WordLevel(_vocabulary(["?", *common]), unk_token="?" if has_unk else "none"))
    made.pre_tokenizer = pre_tokenizer
    return made


def _letters(pre_tokenizer: Any, **settings: Any) -> Tokenizer:
    """Return BPE over characters, many of them unknown, with any pre-tokenizer."""
    settings = {"unk_token": "<unk>"} | settings
    specials = ["<unk>", "<s>", "</s>"]
    made = Tokenizer(BPE(**settings))
    made.pre_tokenizer = pre_tokenizer
    letters = _common(70, TRAINING)
    return _trained(made, _only(letters, TRAINING), 480, specials, letters, **settings)


# ---- kinds of published tokenizers


def _gpt2() -> Tokenizer:
    return _byte_level(_bytes(use_regex=True))


def _llama3() -> Tokenizer:
    made = _byte_level(_split_bytes("llama3"), ignore_merges=True)
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _template("<s> $A", ("<s>", 0))]
    )
    return made


def _falcon() -> Tokenizer:
    return _byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                _bytes(use_regex=True),
                pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex(PATTERNS["falcon_digits"]), "isolated"),
            ]
        )
    )


def _deepseek(letters: str, punctuation: str, *, has_trailing: bool) -> Tokenizer:
    names = ["deepseek_v2_newlines", letters, punctuation]
    names += ["deepseek_v2_trailing"] if has_trailing else []
    splits = [
        pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")
        for name in [*names, "deepseek_v2_cjk"]
    ]
    digits = pre_tokenizers.Digits(individual_digits=True)
    return _byte_level(pre_tokenizers.Sequence([*splits, digits, _bytes()]))


def _clip() -> Tokenizer:
    made = _byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERNS["clip"]), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        ),
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
        unk_token="</s>",  # noqa: S106 (no password)
    )
    made.post_processor = processors.RobertaProcessing(
        ("</s>", 1), ("<s>", 0), trim_offsets=False, add_prefix_space=False
    )
    return made


def _prepend() -> Any:
    return normalizers.Sequence(
        [normalizers.Prepend(_UNDERLINE), normalizers.Replace(" ", _UNDERLINE)]
    )


def _metaspace(scheme: str = "always", split: bool = True) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


def _llama2() -> Tokenizer:
    made = _sentence_piece(_prepend(), train_with=_metaspace("never"))
    made.post_processor = _template("<s> $A", ("<s>", 1))
    return made


def _phi3() -> Tokenizer:
    made = _sentence_piece(_prepend(), train_with=_metaspace("never"))
    made.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    made.add_special_tokens([AddedToken("<|user|>", rstrip=True, normalized=False)])
    made.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    return made


def _ignore_merges(pre_tokenizer: Any) -> Tokenizer:
    """Return Llama 2 with `ignore_merges`, and with whole tokens that no merges produce."""
    data = json.loads(_llama2().to_str())
    vocabulary = data["model"]["vocab"]
    for word in ("grumble", _UNDERLINE + "grumble", f"{_UNDERLINE}The{_UNDERLINE}cat"):
        vocabulary[word] = len(vocabulary)
    data["model"]["ignore_merges"] = True
    if pre_tokenizer is not None:
        data["normalizer"] = None
    made = Tokenizer.from_str(json.dumps(data))
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


def _gemma(pattern: Any = " ") -> Tokenizer:
    return _sentence_piece(
        normalizers.Replace(" ", _UNDERLINE),
        pre_tokenizers.Split(pattern, "merged_with_previous"),
        train_with=_metaspace("never"),
    )


def _mistral() -> Tokenizer:
    unsplit = _metaspace("first", split=False)
    made = _sentence_piece(None, unsplit, train_with=_metaspace("never"))
    made.post_processor = _template("<s> $A", ("<s>", 1))
    return made


def _bert(**settings: Any) -> Tokenizer:
    return _word_piece(normalizers.BertNormalizer(**settings))


def _metaspace_first() -> Tokenizer:
    return _unigram(_metaspace("first"))


def _template(single: str, *tokens: tuple[str, int]) -> Any:
    return processors.TemplateProcessing(
        single=single, pair=f"{single} $B", special_tokens=list(tokens)
    )


def _sequence(*parts: Any) -> Any:
    return pre_tokenizers.Sequence(list(parts))


_SPLITS: dict[str, Build] = {
    "gpt2": _gpt2,
    "gpt2_prefix_space": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": _llama3,
    "llama3_isolated": lambda: _byte_level(_split_bytes("llama3")),
    "cl100k_removed": lambda: _byte_level(_split_bytes("llama3", behavior="removed", invert=True)),
    "cl100k_tiktoken": lambda: _byte_level(_split_bytes("cl100k_tiktoken")),
    "bailing": lambda: _byte_level(_split_bytes("bailing")),
    "qwen2": lambda: _byte_level(_split_bytes("qwen2"), normalizers.NFC()),
    "qwen35": lambda: _byte_level(_split_bytes("qwen35"), normalizers.NFC()),
    "o200k": lambda: _byte_level(_split_bytes("o200k")),
    "o200k_removed": lambda: _byte_level(_split_bytes("o200k", behavior="removed", invert=True)),
    "tekken": lambda: _byte_level(_split_bytes("tekken"), ignore_merges=True),
    "kimi": lambda: _byte_level(_split_bytes("kimi")),
    "deepseek_v3": lambda: _byte_level(
        _split_bytes("deepseek_v3_numbers", "deepseek_v3_cjk", "deepseek_v3")
    ),
    "deepseek_v2": lambda: _deepseek(
        "deepseek_v2_letters", "deepseek_v2_punctuation", has_trailing=True
    ),
    "deepseek_coder": lambda: _deepseek(
        "deepseek_coder_letters", "deepseek_coder_punctuation", has_trailing=False
    ),
    "falcon": _falcon,
    "starcoder": lambda: _byte_level(
        _sequence(pre_tokenizers.Digits(individual_digits=True), _bytes(use_regex=True))
    ),
    "clip": _clip,
    "bloom": lambda: _byte_level(_split_bytes("bloom")),
    "seed_coder": lambda: _byte_level(_split_bytes("seed_coder")),
    "aya": lambda: _byte_level(_split_bytes("aya_digits", "o200k"), normalizers.NFC()),
    "laguna": lambda: _byte_level(
        _sequence(
            pre_tokenizers.Split(Regex(PATTERNS["laguna_lines"]), "merged_with_next"),
            pre_tokenizers.Split(Regex(PATTERNS["qwen2"]), "isolated"),
            _bytes(),
        )
    ),
    # an unknown pattern close to a known one, and a known pattern with other behaviours
    "almost_qwen2": lambda: _byte_level(
        _sequence(
            pre_tokenizers.Split(
                Regex(PATTERNS["qwen2"].replace(r"\p{L}+", r"\p{L}+(?: \p{L}+)?")), "isolated"
            ),
            _bytes(),
        )
    ),
    "qwen2_not_inverted": lambda: _byte_level(_split_bytes("qwen2", behavior="removed")),
    "qwen2_merged_previous": lambda: _byte_level(
        _split_bytes("qwen2", behavior="merged_with_previous")
    ),
    "qwen2_merged_next": lambda: _byte_level(_split_bytes("qwen2", behavior="merged_with_next")),
    "qwen2_contiguous": lambda: _byte_level(_split_bytes("qwen2", behavior="contiguous")),
    "qwen2_two_regexes": lambda: _byte_level(
        _sequence(
            pre_tokenizers.Split(Regex(PATTERNS["qwen2"]), "isolated"), _bytes(use_regex=True)
        )
    ),
    "qwen2_prefix_spaces": lambda: _byte_level(
        _sequence(
            pre_tokenizers.Split(Regex(PATTERNS["qwen2"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        )
    ),
    "bytes_unsplit": lambda: _byte_level(_bytes()),
    "byte_normalizer": lambda: _byte_level(
        pre_tokenizers.WhitespaceSplit(), normalizers.ByteLevel()
    ),
}

_CLASSIC: dict[str, Build] = {
    "bert_uncased": _bert,
    "bert_cased": lambda: _bert(lowercase=False),
    "bert_accents_kept": lambda: _bert(strip_accents=False),
    "bert_accents_stripped": lambda: _bert(strip_accents=True, lowercase=False),
    "bert_unclean": lambda: _bert(clean_text=False),
    "bert_no_chinese": lambda: _bert(handle_chinese_chars=False),
    "bert_no_normalizer": lambda: _word_piece(None),
    "bert_short_words": lambda: _word_piece(
        normalizers.BertNormalizer(), max_input_chars_per_word=6
    ),
    "word_piece_whitespace": lambda: _word_piece(None, pre_tokenizers.Whitespace()),
    "word_level": lambda: _word_level(pre_tokenizers.Whitespace()),
    "word_level_without_unk": lambda: _word_level(pre_tokenizers.Whitespace(), has_unk=False),
    "whitespace": lambda: _letters(pre_tokenizers.Whitespace()),
    "whitespace_split": lambda: _letters(pre_tokenizers.WhitespaceSplit()),
    "whitespace_split_fused": lambda: _letters(pre_tokenizers.WhitespaceSplit(), fuse_unk=True),
    "without_unk": lambda: _letters(pre_tokenizers.WhitespaceSplit(), unk_token=None),
    "continuing_prefix": lambda: _letters(
        pre_tokenizers.Whitespace(), continuing_subword_prefix="##"
    ),
    "end_of_word": lambda: _letters(pre_tokenizers.Whitespace(), end_of_word_suffix="</w>"),
    "digits": lambda: _letters(pre_tokenizers.Digits(individual_digits=False)),
    "digits_individual": lambda: _letters(pre_tokenizers.Digits(individual_digits=True)),
    "char_delimiter": lambda: _letters(pre_tokenizers.CharDelimiterSplit("e")),
    "char_delimiter_space": lambda: _letters(pre_tokenizers.CharDelimiterSplit(" ")),
    "unicode_scripts": lambda: _letters(pre_tokenizers.UnicodeScripts()),
    "fixed_length": lambda: _letters(pre_tokenizers.FixedLength(5)),
    "whitespace_digits": lambda: _letters(
        _sequence(pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True))
    ),
    "whitespace_split_punctuation": lambda: _letters(
        _sequence(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation())
    ),
    "punctuation_digits_split": lambda: _letters(
        _sequence(
            pre_tokenizers.Punctuation("merged_with_next"),
            pre_tokenizers.Digits(),
            pre_tokenizers.WhitespaceSplit(),
        )
    ),
    "no_pre_tokenizer": lambda: _without_pre_tokenizer(_letters(pre_tokenizers.Whitespace())),
    "no_pre_tokenizer_fused": lambda: _without_pre_tokenizer(
        _letters(pre_tokenizers.Whitespace(), fuse_unk=True)
    ),
} | {
    f"punctuation_{behaviour}": lambda behaviour=behaviour: _letters(
        pre_tokenizers.Punctuation(behaviour)
    )
    for behaviour in (
        "isolated",
        "removed",
        "merged_with_previous",
        "merged_with_next",
        "contiguous",
    )
}


_MARKED: dict[str, Build] = {
    "llama2": _llama2,
    "llama2_spanning": lambda: _sentence_piece(_prepend()),
    "llama2_no_bytes": lambda: _sentence_piece(
        _prepend(), train_with=_metaspace("never"), byte_fallback=False
    ),
    "llama2_no_bytes_unfused": lambda: _sentence_piece(
        _prepend(), train_with=_metaspace("never"), byte_fallback=False, fuse_unk=False
    ),
    "llama2_no_prepend": lambda: _sentence_piece(
        normalizers.Replace(" ", _UNDERLINE), train_with=_metaspace("never")
    ),
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma_regex": lambda: _gemma(Regex(" ")),
    "mistral": _mistral,
    "nothing_at_all": lambda: _sentence_piece(None, train_with=None),
    "ignore_merges_unsplit": lambda: _ignore_merges(None),
    "ignore_merges_first": lambda: _ignore_merges(_metaspace("first", split=False)),
    "xlm_roberta": lambda: _unigram(
        _sequence(pre_tokenizers.WhitespaceSplit(), _metaspace("always")), normalizers.NFKC()
    ),
    "unigram_unsplit_words": lambda: _unigram(_metaspace("never", split=False)),
    "unigram_byte_fallback": lambda: _unigram(_metaspace("always"), byte_fallback=True),
    "unigram_without_unk": lambda: _unigram(_metaspace("always"), unk_id=None),
    "unigram_alone": lambda: _unigram(None, normalizers.Replace(" ", _UNDERLINE), is_split=False),
    "metaspace_other": lambda: _letters(
        pre_tokenizers.Metaspace(replacement="_", prepend_scheme="always")
    ),
}


def _metaspace_kind(model: str, scheme: str, *, split: bool) -> Tokenizer:
    marks = _metaspace(scheme, split=split)
    if model == "unigram":
        return _unigram(marks, is_split=split)
    return _sentence_piece(None, marks, train_with=_metaspace("never", split=split))


_MARKED |= {
    f"{model}_{scheme}_{'split' if split else 'unsplit'}": partial(
        _metaspace_kind, model, scheme, split=split
    )
    for model in ("unigram", "bpe")
    for scheme in ("always", "never", "first")
    for split in (True, False)
}


# ---- kinds with other normalizers, added tokens and post-processors, from the serialised form


def _normalized(base: Build, *parts: Any) -> Build:
    def made() -> Tokenizer:
        tokenizer = base()
        tokenizer.normalizer = normalizers.Sequence(list(parts)) if len(parts) > 1 else parts[0]
        return tokenizer

    return made


def _processed(base: Build, processor: Any) -> Build:
    def made() -> Tokenizer:
        tokenizer = base()
        tokenizer.post_processor = processor
        return tokenizer

    return made


def _added(base: Build, *tokens: AddedToken) -> Build:
    def made() -> Tokenizer:
        tokenizer = base()
        for token in tokens:  # one by one: the method decides whether a token is special
            add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
            add([token])
        return tokenizer

    return made


def _literal(base: Build) -> Build:
    """Return a builder of tokenizers that encode special tokens in a text as plain text."""

    def made() -> Tokenizer:
        tokenizer = base()
        tokenizer.encode_special_tokens = True
        return tokenizer

    return made


@cache
def _serialised(base: Build) -> str:
    return base().to_str()


def _from_serialised(base: Build) -> Build:
    return lambda: Tokenizer.from_str(_serialised(base))


def _tokens(*contents: str, **flags: bool) -> list[AddedToken]:
    flags = {"normalized": False, "special": True} | flags
    return [AddedToken(content, **flags) for content in contents]


_GPT2 = _from_serialised(_gpt2)
_QWEN2 = _from_serialised(_SPLITS["qwen2"])
_BERT = _from_serialised(_bert)
_FIRST = _from_serialised(_metaspace_first)
_LLAMA2 = _from_serialised(_llama2)
_MISTRAL = _from_serialised(_mistral)
_BASES = {"gpt2": _GPT2, "bert": _BERT, "first": _FIRST, "llama2": _LLAMA2}

_NORMALIZERS: dict[str, list[Any]] = {
    "nfc": [normalizers.NFC()],
    "nfd": [normalizers.NFD()],
    "nfkc": [normalizers.NFKC()],
    "nfkd": [normalizers.NFKD()],
    "lowercase": [normalizers.Lowercase()],
    "nmt": [normalizers.Nmt()],
    "bert_normalizer": [normalizers.BertNormalizer()],
    "strip": [normalizers.Strip()],
    "strip_left": [normalizers.Strip(left=True, right=False)],
    "strip_right": [normalizers.Strip(left=False, right=True)],
    "strip_accents": [normalizers.NFD(), normalizers.StripAccents()],
    "nfd_lowercase_strip": [
        normalizers.NFD(),
        normalizers.Lowercase(),
        normalizers.StripAccents(),
        normalizers.Strip(),
    ],
    "lowercase_nfc": [normalizers.Lowercase(), normalizers.NFC()],
    "prepend": [normalizers.Prepend("x")],
    "replace_newlines": [normalizers.Replace("\r\n", "\n")],
    "replace_quotes": [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')],
    "replace_grows": [normalizers.Replace(".", " . ")],
    "replace_spanning": [normalizers.Replace("e t", "E")],
    "replace_spaces": [normalizers.Replace(Regex(" {2,}"), " ")],
    "replace_whitespace_strip": [
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ],
    "replace_looking_around": [normalizers.Replace(Regex(r"(?<=[a-z]) (?=[a-z])"), "_")],
    "replace_anchored": [normalizers.Replace(Regex(r"^\s+|\s+$"), "#")],
    "replace_with_nothing": [normalizers.Replace(Regex(r"\p{M}|\p{Cf}"), "")],
}

_NORMALISED: dict[str, Build] = {
    f"{name}_{kind}": _normalized(base, *parts)
    for name, parts in _NORMALIZERS.items()
    for kind, base in (
        ("qwen2", _QWEN2),
        ("first", _FIRST),
        ("words", _from_serialised(_CLASSIC["whitespace"])),
    )
    if kind != "words" or name in {"nfkc", "strip", "replace_grows", "replace_spanning"}
}

_FLAGGED: dict[str, Build] = {
    f"added_{'_'.join(flags) or 'plain'}_{kind}": _added(
        base,
        *_tokens(
            "<|t|>",
            "wOrld",
            "\u4f60",
            **{flag: flag in flags for flag in _FLAGS},
        ),
    )
    for n_flags in (0, 1, 2)
    for flags in combinations(_FLAGS, n_flags)
    for kind, base in _BASES.items()
    if n_flags < 2 or kind in {"gpt2", "first"} or "normalized" in flags
}

_CONTENTS: dict[str, list[AddedToken]] = {
    "nested": _tokens("<s>", "<s>x", "<s>xy", "s>"),
    "overlapping": _tokens("ab|cd", "cd|ef", "|c"),
    "overlapping_phases": [*_tokens("ab|cd"), *_tokens("cd|ef", normalized=True, special=False)],
    "with_whitespace": _tokens("New York", "a\nb", "x  y", special=False),
    "with_whitespace_normalized": _tokens("New York", "a\nb", normalized=True, special=False),
    "one_space": _tokens(" ", special=False),
    "one_space_normalized": _tokens(" ", normalized=True, special=False),
    "whitespace_runs": _tokens("  ", "    ", "\n\n", "\t", special=False),
    "whitespace_ends": _tokens(" lead", "trail ", "\nline", "line\n", special=False),
    "ordinary_word": _tokens("the", "hello", special=False),
    "ordinary_single_word": _tokens("the", "a", single_word=True, special=False),
    "one_letter": _tokens("e", "\u4f60", normalized=True, special=False),
    "non_ascii": _tokens("\xe9", "\u4f60\u597d", "\U0001f600", "\u0301", special=False),
    "non_ascii_normalized": _tokens(
        "caf\xe9", "\ufb01", "\u0130", "e\u0301", normalized=True, special=False
    ),
    "capitals_normalized": _tokens("XAB", "Hello World", normalized=True, special=False),
    "chat": _tokens("<|im_start|>", "<|im_end|>", "<|im_start|>user\n"),
    "greedy_strips": [
        AddedToken("<mask>", lstrip=True, rstrip=True, special=True),
        AddedToken("<sep>", lstrip=True, special=True),
        AddedToken("<eot>", rstrip=True, special=True),
    ],
    "many": _tokens(*(f"<extra_id_{at}>" for at in range(40)), "<extra_id_"),
    "empty": _tokens("", "<|t|>"),
}

_CONTAINED: dict[str, Build] = {
    f"{name}_{kind}": _added(base, *tokens)
    for name, tokens in _CONTENTS.items()
    for kind, base in _BASES.items()
}

_S, _END = ("<s>", 0), ("</s>", 1)
_PROCESSED: dict[str, Build] = {
    "template_prefix": _processed(_GPT2, _template("<s> $A", _S)),
    "template_suffix": _processed(_GPT2, _template("$A </s>", _END)),
    "template_both": _processed(_GPT2, _template("<s> $A </s>", _S, _END)),
    "template_several": _processed(_GPT2, _template("<s> </s> <s> $A </s> </s>", _S, _END)),
    "template_nothing": _processed(_GPT2, _template("$A")),
    "template_types": _processed(_GPT2, _template("<s>:1 $A:2 </s>:3", _S, _END)),
    "template_several_ids": _processed(
        _GPT2,
        processors.TemplateProcessing(
            single="[two] $A",
            pair="[two] $A $B",
            special_tokens=[{"id": "[two]", "ids": [5, 9], "tokens": ["a", "b"]}],
        ),
    ),
    "bert_processing": _processed(_GPT2, processors.BertProcessing(_END, _S)),
    "roberta_processing": _processed(
        _from_serialised(_SPLITS["gpt2_prefix_space"]),
        processors.RobertaProcessing(_END, _S, trim_offsets=True, add_prefix_space=True),
    ),
    "byte_level_processing": _processed(_GPT2, processors.ByteLevel(trim_offsets=True)),
    "sequence_processing": _processed(
        _GPT2,
        processors.Sequence([_template("<s> $A </s>", _S, _END), processors.ByteLevel()]),
    ),
    "sequence_of_two_templates": _processed(
        _GPT2,
        processors.Sequence([_template("<s> $A", _S), _template("$A </s>", _END)]),
    ),
    "suffix_first": _processed(_FIRST, _template("$A </s>", ("</s>", 2))),
    "both_llama2": _processed(_LLAMA2, _template("<s> $A </s>", ("<s>", 1), ("</s>", 2))),
    "suffix_mistral": _processed(_MISTRAL, _template("$A </s>", ("</s>", 2))),
}


def _truncated(base: Build, direction: str, stride: int = 0) -> Build:
    def made() -> Tokenizer:
        tokenizer = base()
        tokenizer.enable_truncation(16, stride=stride, direction=direction)
        return tokenizer

    return made


def _padded(base: Build, **settings: Any) -> Build:
    def made() -> Tokenizer:
        tokenizer = base()
        tokenizer.enable_padding(**settings)
        return tokenizer

    return made


def _with_dropout(base: Build, dropout: float | None) -> Build:
    def made() -> Tokenizer:
        data = json.loads(base().to_str())
        data["model"]["dropout"] = dropout
        return Tokenizer.from_str(json.dumps(data))

    return made


_BOTH = _from_serialised(_PROCESSED["template_both"])
_SETTINGS: dict[str, Build] = {
    "truncation": _truncated(_BOTH, "right"),
    "truncation_left": _truncated(_BERT, "left", stride=2),
    "padding": _padded(_BOTH, length=3000, pad_id=1, pad_token="</s>"),  # noqa: S106 (no password)
    "padding_left": _padded(_LLAMA2, direction="left", pad_to_multiple_of=64),
    "truncation_padding": _padded(_truncated(_QWEN2, "right"), length=16),
    "dropout_zero": _with_dropout(_GPT2, 0.0),
    "dropout_one": _with_dropout(_GPT2, 1.0),
}

_LITERAL: dict[str, Build] = {
    f"literal_{name}": base
    for name, base in {
        "gpt2": _BOTH,
        "bert": _BERT,
        "llama2": _LLAMA2,
        "phi3": _from_serialised(_phi3),
        "first": _FIRST,
        "nested": _from_serialised(_CONTAINED["nested_gpt2"]),
        "greedy_strips": _from_serialised(_CONTAINED["greedy_strips_gpt2"]),
        "normalized": _from_serialised(_FLAGGED["added_normalized_special_bert"]),
    }.items()
}

SYNTHETIC: dict[str, Build] = {
    name: _from_serialised(build)
    for group in (
        _SPLITS,
        _CLASSIC,
        _MARKED,
        _NORMALISED,
        _FLAGGED,
        _CONTAINED,
        _PROCESSED,
        _SETTINGS,
    )
    for name, build in group.items()
} | {name: _literal(build) for name, build in _LITERAL.items()}  # not in the serialised form

RANDOM: dict[str, Build] = {
    "dropout_half": _from_serialised(_with_dropout(_GPT2, 0.5)),
    "dropout_half_llama2": _from_serialised(_with_dropout(_LLAMA2, 0.5)),
}

_MAPPED = ("always", "first", "spaces", "unsplit", "qwen2")
PRECOMPILED = [f"precompiled_{name}{more}" for name in _MAPPED for more in ("", "_added")]


def precompiled(t5_file: Path) -> dict[str, Build]:
    """Return builders of tokenizers with the character map of a T5 tokenizer.json."""
    charsmap = json.loads(t5_file.read_text())["normalizer"]
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}

    def with_map(base: Build, *more: dict[str, Any]) -> Build:
        def made() -> Tokenizer:
            data = json.loads(base().to_str())
            data["normalizer"] = {"type": "Sequence", "normalizers": [charsmap, *more]}
            return Tokenizer.from_str(json.dumps(data))

        return _from_serialised(made)

    made = {
        "precompiled_always": with_map(_MARKED["unigram_always_split"]),
        "precompiled_first": with_map(_FIRST),
        "precompiled_spaces": with_map(_MARKED["xlm_roberta"], spaces),
        "precompiled_unsplit": with_map(_MARKED["unigram_never_unsplit"]),
        "precompiled_qwen2": with_map(_QWEN2),
    }
    flagged = {
        f"{name}_added": _added(build, *_CONTENTS["non_ascii_normalized"], *_CONTENTS["nested"])
        for name, build in made.items()
    }
    return {name: _from_serialised(build) for name, build in (made | flagged).items()}


def plain(build: Build) -> Tokenizer:
    """Return the tokenizer without truncation and padding, as the cache sees it."""
    tokenizer = build()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def added_contents(tokenizer: Tokenizer) -> list[str]:
    """Return the strings of all added tokens."""
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]
