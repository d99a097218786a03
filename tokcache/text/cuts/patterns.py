"""The known patterns of Split and ByteLevel, and the cuts that each of them forces.

A pattern is recognised by its text: one that differs in a single character has no rules.
Source: the tokenizer.json files of the models after which the patterns are named.
"""

from __future__ import annotations

from dataclasses import replace

from tokcache.text.cuts.char_classes import VISIBLE
from tokcache.text.cuts.rules import (
    DIGITS,
    LETTERS,
    LINE_ENDS,
    NEWLINE,
    PUNCTUATION,
    C,
    Rule,
)

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_RUN = r" ?[^\s\p{L}\p{N}]+"
_POSSESSIVE = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_PUNCTUATION_RUN}[\r\n]*|{_WHITESPACE}"
CL100K_POSSESSIVE = (
    rf"{_POSSESSIVE}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TIKTOKEN = (
    rf"{_POSSESSIVE}++|\p{{N}}{{1,3}}+| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
BAILING = rf"{_POSSESSIVE}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
QWEN2 = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}|{_PUNCTUATION_RUN}[\r\n]*|{_WHITESPACE}"
SEED = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_WHITESPACE}"
QWEN3_5 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_WHITESPACE}"
)
O200K = (
    rf"{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_PUNCTUATION_RUN}[\r\n/]*|{_WHITESPACE}"
)
TEKKEN = rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}|{_PUNCTUATION_RUN}[\r\n/]*|{_WHITESPACE}"
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_WHITESPACE}"
)
# Two stages of DeepSeek that come before its pattern and leave the rest of the text to it.
NUMBERS = r"\p{N}{1,3}"
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

_LINES = frozenset({C.NEWLINE, C.RETURN})
_ENDS = (  # rules that every pattern of the GPT family has
    Rule(
        "visible | space",
        VISIBLE,
        frozenset({C.SPACE, C.TAB}),
        "no alternative goes on from a visible character over whitespace",
    ),
    Rule(
        "digit | other",
        DIGITS,
        LETTERS | PUNCTUATION | _LINES,
        "a run of digits ends before anything else",
    ),
)
_LETTER = Rule(
    "letter | other",
    LETTERS,
    PUNCTUATION | DIGITS | _LINES,
    "a run of letters ends before anything else, and no alternative looks further",
)
_NEWLINE_VISIBLE = Rule(
    "newline | visible",
    LINE_ENDS,
    VISIBLE,
    "whitespace up to its last newline is one part, whatever comes next",
)

GPT2_RULES = (
    *_ENDS,
    _LETTER,
    Rule("punctuation | newline", PUNCTUATION, _LINES, "punctuation ends before whitespace"),
    Rule(
        "punctuation | word",
        PUNCTUATION - {C.APOSTROPHE},
        LETTERS | DIGITS,
        "punctuation ends before a letter or digit; only an apostrophe can begin with one",
    ),
    Rule(
        "newline | visible",
        NEWLINE,
        VISIBLE,
        "one newline after a visible character is a part of its own, whatever comes next",
    ),
)
_PUNCTUATION_DIGIT = Rule(
    "punctuation | digit", PUNCTUATION, DIGITS, "punctuation ends before a digit"
)
CL100K_RULES = (*_ENDS, _LETTER, _PUNCTUATION_DIGIT, _NEWLINE_VISIBLE)
QWEN_RULES = (
    *CL100K_RULES,
    Rule("digit | digit", DIGITS, DIGITS, "every digit is a part of its own"),
)
# A contraction belongs to the word before it, and a run of punctuation may have slashes after its
# newlines.
O200K_RULES = (
    *_ENDS,
    replace(_LETTER, right=_LETTER.right - {C.APOSTROPHE}),
    _PUNCTUATION_DIGIT,
    replace(_NEWLINE_VISIBLE, right=VISIBLE - {C.SLASH}),
)
# A word may begin with a digit. Where an earlier stage splits off the numbers, it forces the cut.
DEEPSEEK_RULES = tuple(
    replace(rule, right=rule.right - LETTERS) if rule.left == DIGITS else rule
    for rule in CL100K_RULES
)

PATTERNS: dict[str, tuple[Rule, ...]] = {
    GPT2: GPT2_RULES,
    CL100K: CL100K_RULES,
    CL100K_POSSESSIVE: CL100K_RULES,
    TIKTOKEN: CL100K_RULES,
    BAILING: QWEN_RULES,
    QWEN2: QWEN_RULES,
    SEED: QWEN_RULES,
    QWEN3_5: QWEN_RULES,
    O200K: O200K_RULES,
    TEKKEN: O200K_RULES,
    DEEPSEEK: DEEPSEEK_RULES,
}
