"""The cuts that the stages of a pre-tokenizer force.

A stage that splits by looking at two neighbouring characters leaves the other pairs to the next
stage. A pattern decides about every pair, so no stage after it is read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokcache.errors import Unrecognised
from tokcache.text.cuts.char_classes import VISIBLE, WHITESPACE
from tokcache.text.cuts.patterns import CJK, GPT2_RULES, NUMBERS, PATTERNS
from tokcache.text.cuts.rules import (
    DIGITS,
    LETTERS,
    NEWLINE,
    PUNCTUATION,
    SPACE,
    WHITESPACE_LEFT,
    C,
    Rule,
)
from tokcache.text.engines.components import MARKER

if TYPE_CHECKING:
    from tokcache.text.cuts.normalizers import Normalizer

Rules = tuple[Rule, ...]

_WHITESPACE_SPLIT = (
    Rule(
        "visible | whitespace",
        VISIBLE,
        WHITESPACE,
        "whitespace separates words and is dropped",
        is_apart=True,
    ),
    Rule(
        "whitespace | visible",
        WHITESPACE_LEFT,
        VISIBLE,
        "whitespace separates words and is dropped",
        is_apart=True,
    ),
)
_WORD_CLASSES = LETTERS | DIGITS | {C.UNDERSCORE}
_WORDS_APART = (
    Rule(
        "word | punctuation",
        _WORD_CLASSES,
        PUNCTUATION - {C.UNDERSCORE},
        "words and punctuation are matched apart",
    ),
    Rule(
        "punctuation | word",
        PUNCTUATION - {C.UNDERSCORE},
        _WORD_CLASSES,
        "words and punctuation are matched apart",
    ),
)
_NO_PUNCTUATION = LETTERS | DIGITS | WHITESPACE
_BEFORE_PUNCTUATION = Rule(
    "other | punctuation", _NO_PUNCTUATION, PUNCTUATION, "a part begins with each punctuation"
)
_AFTER_PUNCTUATION = Rule(
    "punctuation | other",
    PUNCTUATION,
    _NO_PUNCTUATION - NEWLINE,
    "a part ends with punctuation",
)
_NO_DIGITS = VISIBLE - DIGITS | WHITESPACE
_AROUND_DIGITS = (
    Rule("digit | other", DIGITS, _NO_DIGITS, "digits are parts of their own"),
    Rule(
        "other | digit",
        _NO_DIGITS | {C.NEWLINE_RUN},
        DIGITS,
        "digits are parts of their own",
    ),
)
_EACH_DIGIT = Rule("digit | digit", DIGITS, DIGITS, "every digit is a part of its own")

# The stages that look at two neighbouring characters alone; PUNCTUATION is by its behavior.
_BY_NEIGHBOURS: dict[str, Rules] = {
    "BertPreTokenizer": (*_WHITESPACE_SPLIT, _BEFORE_PUNCTUATION, _AFTER_PUNCTUATION),
    "WhitespaceSplit": _WHITESPACE_SPLIT,
    "Whitespace": (*_WHITESPACE_SPLIT, *_WORDS_APART),
    "Punctuation": (_BEFORE_PUNCTUATION, _AFTER_PUNCTUATION),
    "Digits": _AROUND_DIGITS,
}


def splitting_stages(stages: list[Any], normalizer: Normalizer) -> tuple[list[Any], Normalizer]:
    """Return the stages that may still split a text after the normalizer, and its reading.

    A Metaspace that does not split, as the last stage, replaces the spaces of each piece, which is
    then the normalizer's effect; the variants put its marker where it belongs.

    Errors: Unrecognised if the normalizer replaces the characters that the first of them splits at.
    """
    if normalizer.space == MARKER:
        by_space = {"String": " "}  # finds nothing: no space is left
        stages = [
            stage for stage in stages if stage["type"] != "Split" or stage["pattern"] != by_space
        ]
        if stages and stages[0]["type"] != "Metaspace":
            raise Unrecognised(f"{stages[0]['type']} after a normalizer that replaces spaces")
    if normalizer.marks_runs and (not stages or stages[0]["type"] != "Metaspace"):
        raise Unrecognised("finds no space where the normalizer replaced a run of them")
    if stages and _only_marks(stages[-1]):
        return stages[:-1], replace(normalizer, space=MARKER)
    return stages, normalizer


def _only_marks(stage: Any) -> bool:
    """Return whether a stage replaces spaces by SentencePiece's marker and splits nothing."""
    is_metaspace = stage["type"] == "Metaspace" and not stage.get("split", True)
    return is_metaspace and stage.get("replacement", MARKER) == MARKER


def forced_cuts(stages: list[Any], normalizer: Normalizer) -> Rules:
    """Return the cuts that the stages force, whatever the model is.

    Errors: Unrecognised for a stage that no rule knows, or a setting of it that none knows.
    """
    rules: Rules = ()
    for index, stage in enumerate(stages):
        if _hides_whitespace(stage) and index + 1 < len(stages):
            raise Unrecognised("ByteLevel replaces spaces before the next stage sees them")
        own, is_last = _stage_rules(stage, is_first=index == 0)
        if normalizer.composes and stage["type"] in _BY_NEIGHBOURS:
            own = tuple(map(_without_marked_punctuation, own))
        rules += own
        if is_last:
            break
    return rules


def _hides_whitespace(stage: Any) -> bool:
    """Return whether a stage turns whitespace into other characters and splits nothing."""
    return bool(stage["type"] == "ByteLevel" and not stage.get("use_regex", True))


def _without_marked_punctuation(rule: Rule) -> Rule:
    """Return a rule that holds even if a mark after punctuation makes another character of it."""
    return rule if rule.is_apart else replace(rule, right=rule.right - {C.PUNCTUATION})


def _stage_rules(stage: Any, *, is_first: bool) -> tuple[Rules, bool]:
    """Return the rules of one stage, and whether it decides about every pair of characters."""
    kind = stage["type"]
    if kind == "Punctuation":
        behavior = stage.get("behavior", "Isolated").lower().replace("_", "")
        if behavior == "mergedwithprevious":
            return (_AFTER_PUNCTUATION,), False
        if behavior == "mergedwithnext":
            return (_BEFORE_PUNCTUATION,), False
    if kind == "Digits" and stage.get("individual_digits"):
        return (*_AROUND_DIGITS, _EACH_DIGIT), False
    if kind in _BY_NEIGHBOURS:
        return _BY_NEIGHBOURS[kind], False
    if kind == "Metaspace":
        if stage.get("replacement", MARKER) != MARKER:
            raise Unrecognised(f"Metaspace with {stage['replacement']!r} is not known")
        if not stage.get("split", True):
            raise Unrecognised("Metaspace replaces spaces before the next stage sees them")
        why = "a part begins with every space"
        return (Rule("visible | space", VISIBLE, SPACE, why, is_apart=True),), True
    if kind == "ByteLevel":
        if stage.get("add_prefix_space") and not is_first:
            raise Unrecognised("ByteLevel puts a space before every part of a text")
        return (GPT2_RULES, True) if stage.get("use_regex", True) else ((), False)
    if kind == "Split":
        return _split(stage)
    raise Unrecognised(f"{kind} is not known")


def _split(stage: Any) -> tuple[Rules, bool]:
    pattern = stage["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
    way = stage["behavior"], bool(stage.get("invert"))
    # A pattern of PATTERNS matches every character, so keeping only the matches drops nothing.
    if way != ("Isolated", False) and (way != ("Removed", True) or pattern not in PATTERNS):
        raise Unrecognised(f"Split by {stage['pattern']} ({stage['behavior']}) is not known")
    if pattern == NUMBERS:  # DeepSeek: one to three digits at a time
        return _AROUND_DIGITS, False
    if pattern == CJK:  # only non-ASCII letters, and a run of them ends before anything else
        return (), False
    if pattern not in PATTERNS:
        raise Unrecognised(f"Split by {pattern or stage['pattern']!r} is not known")
    return PATTERNS[pattern], True
