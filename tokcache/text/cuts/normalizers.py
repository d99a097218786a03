"""The effects of a normalizer on characters, and the rules that stay safe after it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from tokcache.errors import Unrecognised
from tokcache.text.cuts.char_classes import VISIBLE, WHITESPACE, class_of
from tokcache.text.cuts.rules import (
    NON_ASCII,
    SPACE,
    WHITESPACE_LEFT,
    C,
    Pair,
    Rule,
)
from tokcache.text.engines.components import MARKER

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Normalizer:
    """The effects of a normalizer on the characters of the classes in rules.

    `space` is the string that replaces a space, `prefix` the string put before a text.
    `strips`: whitespace at the ends of a text is removed. `lowers`: letters become lower case.
    `keeps_non_ascii`: non-ASCII letters and punctuation keep their class. `keeps_lines`: newlines
    and tabs stay as they are. `pads_non_ascii`: spaces may appear around a non-ASCII character.
    `composes`: a mark after punctuation may make another character of it (`=` and U+0338 become
    U+2260, which is not punctuation). `marks_runs`: a run of spaces becomes a marker.
    `replaced`: strings of visible characters or spaces that become one other string.
    `rewritten`: pairs (string, content) of any other replacement, next to which no cut is safe.
    `is_read`: it is known which characters may become a given one (`left_of`, `right_of`).
    """

    name: str = "none"
    space: str = " "
    prefix: str = ""
    strips: bool = False
    lowers: bool = False
    keeps_non_ascii: bool = True
    keeps_lines: bool = True
    pads_non_ascii: bool = False
    composes: bool = False
    marks_runs: bool = False
    joins_whitespace: bool = False
    replaced: tuple[str, ...] = ()
    rewritten: tuple[tuple[str, str], ...] = ()
    is_read: bool = True

    def left_of(self, char: str) -> frozenset[C]:
        """Return the classes of the last characters of texts whose normalised form ends in `char`.

        OTHER may be missing, because no text is ever cut next to such a character.
        """
        own = class_of(" " if char == MARKER else char)
        found = {own}
        if own is C.NEWLINE:
            found.add(C.NEWLINE_RUN)
        if own in WHITESPACE and not self.keeps_lines:
            found |= WHITESPACE_LEFT
        if not self.keeps_non_ascii:
            found |= NON_ASCII
        if char in self.replaced:  # a quotation mark that was made of two other characters
            found |= {class_of(one) for string in self.replaced for one in string}
        return frozenset(found)

    def right_of(self, char: str) -> frozenset[C]:
        """Return the classes of the first characters of texts whose normalised form begins with it.

        OTHER may be missing, as in `left_of`.
        """
        found = self.left_of(char) - {C.NEWLINE_RUN}
        if self.composes:  # a letter and the marks after it may have become this character
            base = unicodedata.normalize("NFD", char)[0]
            found |= {class_of(base)} if base == char else {class_of(base), C.NON_ASCII_LETTER}
        return found


def read_normalizer(tokenizer: Tokenizer, state: Any) -> Normalizer:
    """Return the effects of the normalizer of `tokenizer`, which is serialised as `state`.

    They are verified by running the normalizer over every visible ASCII character.

    Errors: Unrecognised if the normalizer may do more than is known.
    """
    found = _read(state)
    component = tokenizer.normalizer
    if component is None:
        return found

    visible = "".join(map(chr, range(0x21, 0x7F)))
    rewritten = {char for string, _ in found.rewritten for char in string}
    sample = "".join(char for char in f"a{visible} {visible}a" if char not in rewritten)
    want = sample.replace(" ", found.space)
    got = component.normalize_str(sample).removeprefix(found.prefix)
    if found.lowers:
        want = want.lower()
    for string in found.replaced:
        want, got = want.replace(string, ""), got.replace(string, "")
    if want != got:
        raise Unrecognised("changes visible ASCII characters")

    # A precompiled map of characters can't be read: whitespace must come out as whitespace.
    if "Precompiled" in found.name:
        lines = "a\ta\na\ra"
        marked = "".join(f"a {chr(mark)}" for mark in range(0x300, 0x370)) + "a"
        for sample in (lines, marked):
            got = component.normalize_str(sample).removeprefix(found.prefix)
            kept = sum(char in f"\t\n\r {found.space}" for char in got)
            if kept != sum(map(sample.count, "\t\n\r ")):
                raise Unrecognised("changes whitespace into something else")
    return found


def rewritten_pairs(normalizer: Normalizer) -> set[Pair]:
    """Return the pairs of classes at which a replacement makes a cut unsafe.

    A replaced string may lie across the cut, or it may end or begin there, so that the pattern
    sees another character than the text has. A newline that follows a string which becomes
    whitespace, or nothing, may belong to a longer run of whitespace.
    """
    found: set[Pair] = set()
    if normalizer.joins_whitespace:
        found |= set(product(WHITESPACE_LEFT, WHITESPACE))
    for string, content in normalizer.rewritten:
        for left, right in pairwise(string):
            found |= set(product(normalizer.left_of(left), normalizer.right_of(right)))
        found |= set(product(normalizer.left_of(string[-1]), C))
        found |= set(product(C, normalizer.right_of(string[0])))
        if not content or content[-1].isspace():
            found |= set(product([C.NEWLINE], C))
    return found


def narrowed(rules: Iterable[Rule], normalizer: Normalizer) -> tuple[Rule, ...]:
    """Return the rules without the classes that the normalizer may turn into others."""
    kept = []
    for rule in rules:
        left, right = rule.left, rule.right
        if normalizer.strips:
            # Between a visible character and a space, stripping changes neither of the segments.
            left, right = left & VISIBLE, right & SPACE
        if not normalizer.keeps_lines:  # a newline becomes a space
            left = left if C.SPACE in left else left - WHITESPACE_LEFT
            right = right if C.SPACE in right else right - WHITESPACE
        if not normalizer.keeps_non_ascii:
            right = right - NON_ASCII
            if not rule.is_apart and (normalizer.pads_non_ascii or not right <= WHITESPACE):
                left = left - NON_ASCII
            if normalizer.strips and normalizer.pads_non_ascii:
                left = left - NON_ASCII  # the space put after such a character is stripped
        if left and right:
            kept.append(replace(rule, left=left, right=right))
    return tuple(kept)


# ---- reading


def _read(state: Any) -> Normalizer:
    if state is None:
        return Normalizer()
    kind = state["type"]
    if kind == "Sequence":
        parts = [_read(one) for one in state["normalizers"]]
        spaces = [one.space for one in parts if one.space != " "]
        return Normalizer(
            name=", ".join(one.name for one in parts) or "none",
            space=spaces[0] if spaces else " ",
            prefix="".join(one.prefix for one in parts),
            strips=any(one.strips for one in parts),
            lowers=any(one.lowers for one in parts),
            keeps_non_ascii=all(one.keeps_non_ascii for one in parts),
            keeps_lines=all(one.keeps_lines for one in parts),
            pads_non_ascii=any(one.pads_non_ascii for one in parts),
            composes=any(one.composes for one in parts),
            marks_runs=any(one.marks_runs for one in parts),
            joins_whitespace=any(one.joins_whitespace for one in parts),
            replaced=tuple(string for one in parts for string in one.replaced),
            rewritten=tuple(pair for one in parts for pair in one.rewritten),
            is_read=all(one.is_read for one in parts),
        )
    if kind not in READERS:
        raise Unrecognised(f"{kind} is not known")
    return READERS[kind](kind, state)


READERS: dict[str, Callable[[str, Any], Normalizer]] = {
    "NFC": lambda kind, _: Normalizer(kind, composes=True),
    "NFKC": lambda kind, _: Normalizer(kind, keeps_non_ascii=False, composes=True),
    **dict.fromkeys(
        ("NFD", "NFKD", "StripAccents"), lambda kind, _: Normalizer(kind, keeps_non_ascii=False)
    ),
    # It removes control characters, and makes spaces of line ends and of other characters that no
    # class has: tokenizers/src/normalizers/unicode.rs.
    "Nmt": lambda kind, _: Normalizer(kind, keeps_lines=False),
    **dict.fromkeys(
        ("Precompiled", "BertNormalizer"),
        lambda kind, state: Normalizer(
            kind,
            lowers=state.get("lowercase", False),
            keeps_non_ascii=False,
            keeps_lines=False,
            pads_non_ascii=True,
            composes=kind == "Precompiled",
            is_read=kind != "Precompiled",
        ),
    ),
    "Lowercase": lambda kind, _: Normalizer(kind, lowers=True),
    "Strip": lambda kind, _: Normalizer(kind, strips=True),
    "Prepend": lambda kind, state: Normalizer(kind, prefix=state["prepend"]),
    "Replace": lambda _, state: _read_replace(state["pattern"], state["content"]),
}


def _read_replace(pattern: dict[str, str], content: str) -> Normalizer:
    string, regex = pattern.get("String"), pattern.get("Regex")
    if string == " " and content == MARKER:
        return Normalizer("Replace", space=MARKER, keeps_non_ascii=False)
    if regex in (" {2,}", "  +") and content in (" ", MARKER):
        # A run becomes one character. A forced boundary is never inside a run; a cut that only
        # the vocabulary proves could be.
        return Normalizer("Replace", marks_runs=content == MARKER, replaced=("  ",))
    if regex == r"\s+" and content == " ":
        return Normalizer("Replace", joins_whitespace=True, keeps_lines=False, replaced=("  ",))
    if string in ("``", "''") and content == '"':
        return Normalizer("Replace", replaced=(string, '"'))
    if string:
        return Normalizer("Replace", replaced=(string,), rewritten=((string, content),))
    raise Unrecognised(f"Replace of {string or regex!r} by {content!r} is not known")
