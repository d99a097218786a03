"""The cuts that the stages of a pre-tokenizer force.

Stages that split by neighbouring characters alone leave the other pairs to the next stage; a
pattern ends the search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokcache.errors import Unrecognised
from tokcache.text.segments.char_classes import VISIBLE, WHITESPACE
from tokcache.text.segments.components import MARKER
from tokcache.text.segments.cuts.patterns import CJK, GPT2_RULES, NUMBERS, PATTERNS
from tokcache.text.segments.cuts.rules import (
    DIGITS,
    LETTERS,
    NEWLINE,
    PUNCTUATION,
    SPACE,
    WHITESPACE_LEFT,
    C,
    Rule,
)

if TYPE_CHECKING:
    from tokcache.text.segments.cuts.normalizers import Normalizer

Rules = tuple[Rule, ...]


def splitting_stages(stages: list[Any], normalizer: Normalizer) -> list[Any]:
    """Return the stages that still find something after the normalizer.

    Errors: Unrecognised if the normalizer hides from the first of them what it looks for.
    """
    if normalizer.space == MARKER:
        stages = [stage for stage in stages if not _splits_at_space_only(stage)]
        if stages and stages[0]["type"] != "Metaspace":
            raise Unrecognised(f"{stages[0]['type']} behind a normalizer that hides blanks")
    if normalizer.marks_runs and (not stages or stages[0]["type"] != "Metaspace"):
        raise Unrecognised("finds no blank where the normalizer marked a run of them")
    return stages


def forced_cuts(stages: list[Any], normalizer: Normalizer) -> Rules:
    """Return the cuts that the stages force, whatever the model is.

    Errors: Unrecognised for a stage or a form of it that no rule knows.
    """
    rules: Rules = ()
    for index, stage in enumerate(stages):
        if _hides_whitespace(stage) and index + 1 < len(stages):
            raise Unrecognised("ByteLevel hides blanks from the stages behind it")
        own, is_last = _stage_rules(stage, is_first=index == 0)
        if normalizer.composes and stage["type"] in _BY_NEIGHBOURS:
            own = tuple(map(_without_marked_punctuation, own))
        rules += own
        if is_last:
            break
    return rules


def _splits_at_space_only(stage: Any) -> bool:
    """Return whether a stage finds nothing where no space is left."""
    return bool(stage["type"] == "Split" and stage["pattern"] == {"String": " "})


def _hides_whitespace(stage: Any) -> bool:
    """Return whether a stage turns whitespace into other characters and splits nothing."""
    return bool(stage["type"] == "ByteLevel" and not stage.get("use_regex", True))


def _stage_rules(stage: Any, *, is_first: bool) -> tuple[Rules, bool]:
    """Return the rules of one stage, and whether it ends the search for more."""
    kind = stage["type"]
    if kind in _BY_NEIGHBOURS:
        return _BY_NEIGHBOURS[kind](stage), False
    if kind == "Metaspace":
        return _metaspace(stage), True
    if kind == "ByteLevel":
        if stage.get("add_prefix_space") and not is_first:
            raise Unrecognised("ByteLevel puts a blank before every part of a text")
        return (GPT2_RULES, True) if stage.get("use_regex", True) else ((), False)
    if kind == "Split":
        return _split(stage)
    raise Unrecognised(f"{kind} is not known")


def _without_marked_punctuation(rule: Rule) -> Rule:
    """Return a rule that holds even if a mark after punctuation makes another character of it."""
    return rule if rule.is_apart else replace(rule, right=rule.right - {C.PUNCTUATION})


# ---- stages that split by neighbouring characters alone


def _whitespace_split(_stage: Any = None) -> Rules:
    why = "whitespace separates words and is dropped"
    return (
        Rule("visible | whitespace", VISIBLE, WHITESPACE, why, is_apart=True),
        Rule("whitespace | visible", WHITESPACE_LEFT, VISIBLE, why, is_apart=True),
    )


def _bert(_stage: Any) -> Rules:
    return (*_whitespace_split(), *_punctuation_by("isolated"))


def _whitespace(_stage: Any) -> Rules:
    words = LETTERS | DIGITS | {C.UNDERSCORE}
    others = PUNCTUATION - {C.UNDERSCORE}
    why = "words and punctuation are matched apart"
    return (
        *_whitespace_split(),
        Rule("word | punctuation", words, others, why),
        Rule("punctuation | word", others, words, why),
    )


def _punctuation(stage: Any) -> Rules:
    return _punctuation_by(stage.get("behavior", "Isolated").lower().replace("_", ""))


def _punctuation_by(behavior: str) -> Rules:
    others = LETTERS | DIGITS | WHITESPACE
    before = Rule("other | punctuation", others, PUNCTUATION, "a part begins with each punctuation")
    after = Rule(
        "punctuation | other", PUNCTUATION, others - NEWLINE, "a part ends with punctuation"
    )
    if behavior == "mergedwithprevious":
        return (after,)
    return (before,) if behavior == "mergedwithnext" else (before, after)


def _digits(stage: Any) -> Rules:
    others = VISIBLE - DIGITS | WHITESPACE
    why = "digits are parts of their own"
    rules = (
        Rule("digit | other", DIGITS, others, why),
        Rule("other | digit", others | {C.NEWLINE_RUN}, DIGITS, why),
    )
    if not stage.get("individual_digits"):
        return rules
    return (*rules, Rule("digit | digit", DIGITS, DIGITS, "every digit is a part of its own"))


_BY_NEIGHBOURS: dict[str, Callable[[Any], Rules]] = {
    "BertPreTokenizer": _bert,
    "WhitespaceSplit": _whitespace_split,
    "Whitespace": _whitespace,
    "Punctuation": _punctuation,
    "Digits": _digits,
}


# ---- stages that end the search


def _metaspace(stage: Any) -> Rules:
    if stage.get("replacement", MARKER) != MARKER:
        raise Unrecognised(f"Metaspace with {stage['replacement']!r} is not known")
    if not stage.get("split", True):
        raise Unrecognised("Metaspace without split forces no boundary")
    why = "a part begins with every space"
    return (Rule("visible | space", VISIBLE, SPACE, why, is_apart=True),)


def _split(stage: Any) -> tuple[Rules, bool]:
    pattern = stage["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
    way = stage["behavior"], bool(stage.get("invert"))
    # A pattern of PATTERNS leaves nothing unmatched, so keeping the matches is the same.
    if way != ("Isolated", False) and (way != ("Removed", True) or pattern not in PATTERNS):
        raise Unrecognised(f"Split by {stage['pattern']} ({stage['behavior']}) is not known")
    if pattern == NUMBERS:  # DeepSeek: one to three digits at a time
        return _digits({}), False
    if pattern == CJK:  # only non-ASCII letters, and a run of them ends before anything else
        return (), False
    if pattern not in PATTERNS:
        raise Unrecognised(f"Split by {pattern or stage['pattern']!r} is not known")
    return PATTERNS[pattern], True
