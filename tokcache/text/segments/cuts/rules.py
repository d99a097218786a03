"""A rule allows cuts between classes of characters; every module of rules builds on this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from tokcache.text.segments.char_classes import VISIBLE, WHITESPACE, CharClass, class_of
from tokcache.text.segments.components import MARKER

C = CharClass
Pair = tuple[CharClass, CharClass]
Affixes = tuple[tuple[int, ...], tuple[int, ...]]  # ids before and after a text

LETTERS = frozenset({C.LETTER, C.NON_ASCII_LETTER})
DIGITS = frozenset({C.DIGIT})
PUNCTUATION = frozenset(
    {C.PUNCTUATION, C.UNDERSCORE, C.APOSTROPHE, C.SLASH, C.NON_ASCII_PUNCTUATION}
)
NON_ASCII = frozenset({C.NON_ASCII_LETTER, C.NON_ASCII_PUNCTUATION})
SPACE = frozenset({C.SPACE})
NEWLINE = frozenset({C.NEWLINE})
LINE_ENDS = frozenset({C.NEWLINE, C.NEWLINE_RUN, C.RETURN})
WHITESPACE_LEFT = WHITESPACE | {C.NEWLINE_RUN}  # on the left of a cut


@dataclass(frozen=True, slots=True)
class Rule:
    """Cuts between any class of `left` and any of `right`, with the reason they are safe."""

    name: str
    left: frozenset[CharClass]
    right: frozenset[CharClass]
    reason: str
    is_apart: bool = False  # holds even if the left character becomes several, or whitespace

    def pairs(self) -> Iterator[Pair]:
        """Yield every pair of classes that the rule allows a cut between."""
        return ((left, right) for left in self.left for right in self.right)


@dataclass(frozen=True, slots=True)
class Findings:
    """Rules found in components, the components they come from, and why others gave none."""

    rules: tuple[Rule, ...] = ()
    recognised: tuple[tuple[str, str], ...] = ()
    refused: tuple[str, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            self.rules + other.rules,
            self.recognised + other.recognised,
            self.refused + other.refused,
        )


def pairs_in(text: str) -> Iterator[Pair]:
    """Yield the pairs of classes inside a text, with every class its left one may have."""
    for left, right in pairwise(map(class_of, text.replace(MARKER, " "))):
        yield left, right
        if left is C.NEWLINE:
            yield C.NEWLINE_RUN, right
        if right is C.NEWLINE_RUN:
            yield left, C.NEWLINE


def is_coarse(pair: Pair) -> bool:
    """Return whether a cut may be looked for outside chunks too, where they begin and end."""
    left, right = pair
    return (left in VISIBLE and right is C.SPACE) or (left in LINE_ENDS and right in VISIBLE)
