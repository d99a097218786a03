"""The cuts that the stages of a pre-tokenizer force.

Each stage splits the pieces of the stage before it. A pair of classes is a cut if one stage always
splits there, and no earlier stage changes another piece because of the characters on the other
side: it may only keep the last piece before the cut and the first one after it together. A stage
that splits by looking at two neighbouring characters never changes other pieces; for a pattern,
`regex` decides. The stages after the one that splits are not read for that pair, because each works
on one piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from tokcache.errors import Unrecognised
from tokcache.text.cuts.char_classes import VISIBLE, WHITESPACE
from tokcache.text.cuts.patterns import GPT2
from tokcache.text.cuts.regex.lookup import outcomes_of
from tokcache.text.cuts.regex.pattern_cuts import LEFTS, RIGHTS
from tokcache.text.cuts.rules import (
    DIGITS,
    LETTERS,
    NEWLINE,
    NON_ASCII,
    PUNCTUATION,
    SPACE,
    WHITESPACE_LEFT,
    C,
    Findings,
    Pair,
    Rule,
    pairs_in,
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
    "other | punctuation", _NO_PUNCTUATION, PUNCTUATION, "a pre-token begins with each punctuation"
)
_AFTER_PUNCTUATION = Rule(
    "punctuation | other",
    PUNCTUATION,
    _NO_PUNCTUATION - NEWLINE,
    "a pre-token ends with punctuation",
)
_NO_DIGITS = VISIBLE - DIGITS | WHITESPACE
_AROUND_DIGITS = (
    Rule("digit | other", DIGITS, _NO_DIGITS, "digits are pre-tokens of their own"),
    Rule(
        "other | digit",
        _NO_DIGITS | {C.NEWLINE_RUN},
        DIGITS,
        "digits are pre-tokens of their own",
    ),
)
_EACH_DIGIT = Rule("digit | digit", DIGITS, DIGITS, "every digit is a pre-token of its own")

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
    last = stages[-1] if stages else {}
    # A last stage that replaces spaces by SentencePiece's marker and splits nothing.
    marks = last.get("type") == "Metaspace" and last.get("replacement", MARKER) == MARKER
    if marks and not last.get("split", True):
        return stages[:-1], replace(normalizer, space=MARKER)
    return stages, normalizer


def forced_cuts(stages: list[Any], normalizer: Normalizer) -> Findings:
    """Return the cuts that the stages force, whatever the model is, and why a stage is not read.

    Errors: Unrecognised if the first stage that is not known comes before any that forces a cut.
    """
    rules: list[Rule] = []
    # The pairs that no stage has decided about, without those inside a string that is replaced.
    rest = _ALL.difference(pair for one in normalizer.replaced for pair in pairs_in(one))
    for index, stage in enumerate(stages):
        context = _Context(normalizer, rest, index == 0, index == len(stages) - 1)
        try:
            own, passed = _stage_rules(stage, context)
        except Unrecognised as unknown:
            if not rules or stage["type"] not in _ONE_PIECE_AT_A_TIME:
                raise
            return Findings(tuple(rules), (), (f"pre-tokenizer {unknown}: {_AFTERWARDS}",))
        rules += (kept for rule in own for kept in _only(rule, rest))
        if not passed or index == len(stages) - 1:
            break
        rest = rest & passed - {pair for rule in own for pair in rule.pairs()}
    return Findings(tuple(rules))


@dataclass(frozen=True, slots=True)
class _Context:
    """The context of a stage; `pairs` are those that no earlier stage decided."""

    normalizer: Normalizer
    pairs: frozenset[Pair]
    is_first: bool
    is_last: bool


_ALL = frozenset(product(LEFTS, RIGHTS))
_AFTERWARDS = "only the cuts that the stages before it force"
# Each of these splits a piece without regard to the others, whatever its settings are.
_ONE_PIECE_AT_A_TIME = {*_BY_NEIGHBOURS, "ByteLevel", "CharDelimiterSplit", "FixedLength"}
_ONE_PIECE_AT_A_TIME |= {"Metaspace", "Split", "UnicodeScripts"}


def _only(rule: Rule, pairs: frozenset[Pair]) -> list[Rule]:
    """Return rules that allow the cuts of `rule` that are among the pairs."""
    rights: dict[frozenset[C], set[C]] = {}  # the left classes by the right ones
    for left in rule.left:
        own = frozenset(right for right in rule.right if (left, right) in pairs)
        rights.setdefault(own, set()).add(left)
    return [
        replace(rule, left=frozenset(left), right=right) for right, left in rights.items() if right
    ]


def _without_marked_punctuation(rule: Rule) -> Rule:
    """Return a rule that holds even if a mark after punctuation makes another character of it."""
    return rule if rule.is_apart else replace(rule, right=rule.right - {C.PUNCTUATION})


def _stage_rules(stage: Any, context: _Context) -> tuple[Rules, frozenset[Pair]]:
    """Return the rules of one stage, and the pairs at which it changes no other piece.

    Errors: Unrecognised.
    """
    rules = _neighbour_rules(stage)
    if rules is not None:
        if context.normalizer.composes:
            rules = tuple(map(_without_marked_punctuation, rules))
        return rules, _ALL
    kind = stage["type"]
    if kind == "Metaspace":
        if stage.get("replacement", MARKER) != MARKER:
            raise Unrecognised(f"Metaspace with {stage['replacement']!r} is not known")
        if not stage.get("split", True):
            raise Unrecognised("Metaspace replaces spaces before the next stage sees them")
        why = "a pre-token begins with every space"
        return (Rule("visible | space", VISIBLE, SPACE, why, is_apart=True),), frozenset()
    if kind == "ByteLevel":
        if stage.get("add_prefix_space") and not context.is_first:
            raise Unrecognised("ByteLevel puts a space before every pre-token")
        if stage.get("use_regex", True):
            # It replaces whitespace, too, which a later stage looks for.
            return _by_pattern(GPT2, "Isolated", context)[0], frozenset()
        if not context.is_last:
            raise Unrecognised("ByteLevel replaces spaces before the next stage sees them")
        return (), _ALL
    if kind == "CharDelimiterSplit":
        stage = {"pattern": {"String": stage["delimiter"]}, "behavior": "Removed"}
    elif kind != "Split":
        raise Unrecognised(f"{kind} is not known")

    string = stage["pattern"].get("String")
    if string is None:
        pattern = stage["pattern"]["Regex"]
    else:
        pattern = "".join(f"\\x{{{ord(char):x}}}" for char in string)
    try:
        return _by_pattern(pattern, stage["behavior"], context, invert=bool(stage.get("invert")))
    except Unrecognised as unknown:
        # Backslashes are shown once, so that a place counts the characters that a reader sees.
        shown = repr(pattern if string is None else string).replace("\\\\", "\\")
        raise Unrecognised(f"Split by {shown}: {unknown}") from None


def _neighbour_rules(stage: Any) -> Rules | None:
    """Return the rules of a stage that splits by two neighbouring characters, else None."""
    kind = stage["type"]
    if kind == "Punctuation":
        behavior = stage.get("behavior", "Isolated").lower().replace("_", "")
        if behavior == "mergedwithprevious":
            return (_AFTER_PUNCTUATION,)
        if behavior == "mergedwithnext":
            return (_BEFORE_PUNCTUATION,)
    if kind == "Digits" and stage.get("individual_digits"):
        return (*_AROUND_DIGITS, _EACH_DIGIT)
    return _BY_NEIGHBOURS.get(kind)


def _by_pattern(
    pattern: str, behavior: str, context: _Context, *, invert: bool = False
) -> tuple[Rules, frozenset[Pair]]:
    """Return the rules of a Split by a pattern, and the pairs at which it changes no other piece.

    Errors: Unrecognised.
    """
    apart, passed = outcomes_of(pattern, behavior, invert=invert)
    normal = context.normalizer
    if not (normal.keeps_non_ascii and normal.keeps_lines and not normal.replaced):
        apart, passed = (
            frozenset(pair for pair in pairs if all(one in pairs for one in _become(pair, normal)))
            for pairs in (apart, passed)
        )
    return _rules_of(apart & context.pairs), passed


def _become(pair: Pair, normalizer: Normalizer) -> Iterator[Pair]:
    """Yield the pairs that a normalizer may make of a pair, besides the pair itself."""
    left, right = pair
    if not normalizer.keeps_non_ascii and left in NON_ASCII:
        yield C.OTHER, right  # it may become any visible characters
    if not normalizer.keeps_lines and left in WHITESPACE_LEFT:
        yield C.SPACE, right
    if not normalizer.keeps_lines and right in WHITESPACE:
        yield left, C.SPACE
    if "''" in normalizer.replaced and left is C.APOSTROPHE:
        yield C.PUNCTUATION, right
    if "''" in normalizer.replaced and right is C.APOSTROPHE:
        yield left, C.PUNCTUATION


@lru_cache(maxsize=64)
def _rules_of(pairs: frozenset[Pair]) -> Rules:
    """Return rules that allow exactly these pairs, without OTHER."""
    # A rule has visible characters or whitespace on each side, so that a normalizer that changes
    # one of them does not forbid the rest.
    lefts: dict[tuple[bool, C], set[C]] = {}
    for left, right in pairs:
        # A newline after whitespace is a class on the left only.
        if left is not C.OTHER and not (left in WHITESPACE_LEFT and right is C.NEWLINE):
            lefts.setdefault((left in VISIBLE, right), set()).add(left)
    rights: dict[tuple[frozenset[C], bool], set[C]] = {}
    for (_, right), own in lefts.items():
        rights.setdefault((frozenset(own), right in VISIBLE), set()).add(right)
    return tuple(
        Rule(f"{_named(left)} | {_named(right)}", left, frozenset(right), _DERIVED)
        for (left, _), right in sorted(rights.items(), key=lambda one: sorted(one[1]))
    )


_DERIVED = "derived from the pattern: its matches on each side are the same without the other"
_SETS = {
    "visible": VISIBLE,
    "letter": LETTERS,
    "punctuation": PUNCTUATION,
    "whitespace": WHITESPACE,
}


def _named(classes: Iterable[C]) -> str:
    """Return a short name of a set of classes."""
    rest, names = set(classes), []
    for name, members in _SETS.items():
        if members <= rest:
            names.append(name)
            rest -= members
    return ", ".join([*names, *(one.name.lower().replace("_", " ") for one in sorted(rest))])
