"""The type of a rule, which allows cuts between character classes, and the sets of classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

from tokcache.text.cuts.char_classes import VISIBLE, WHITESPACE, CharClass, class_of
from tokcache.text.engines.components import MARKER

C = CharClass
Pair = tuple[CharClass, CharClass]
Affixes = tuple[tuple[int, ...], tuple[int, ...]]  # the ids before a text, and after it

LETTERS = frozenset({C.LETTER, C.NON_ASCII_LETTER})
DIGITS = frozenset({C.DIGIT})
PUNCTUATION = frozenset(
    {C.PUNCTUATION, C.STOP, C.UNDERSCORE, C.APOSTROPHE, C.SLASH, C.NON_ASCII_PUNCTUATION}
)
NON_ASCII = frozenset({C.NON_ASCII_LETTER, C.NON_ASCII_PUNCTUATION})
SPACE = frozenset({C.SPACE})
NEWLINE = frozenset({C.NEWLINE})
LINE_ENDS = frozenset({C.NEWLINE, C.NEWLINE_RUN, C.RETURN})
WHITESPACE_LEFT = WHITESPACE | {C.NEWLINE_RUN}  # the whitespace classes on the left of a cut


@dataclass(frozen=True, slots=True)
class Rule:
    """Cuts between any class of `left` and any class of `right`, and the reason they are safe.

    A rule that `is_apart` holds even if the normalizer turns the left character into several
    characters, or into whitespace.
    """

    name: str
    left: frozenset[CharClass]
    right: frozenset[CharClass]
    reason: str
    is_apart: bool = False

    def pairs(self) -> Iterator[Pair]:
        """Yield every pair of classes between which the rule allows a cut."""
        return ((left, right) for left in self.left for right in self.right)


@dataclass(frozen=True, slots=True)
class Findings:
    """The rules found, the components that were recognised, and why others allow no cut."""

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
    """Yield the pairs of neighbouring classes in a text, for any text that may stand before it.

    The text before decides whether a newline at the beginning is a NEWLINE or a NEWLINE_RUN, so
    both are yielded for every newline.
    """
    for left, right in pairwise(map(class_of, text.replace(MARKER, " "))):
        yield left, right
        if left is C.NEWLINE:
            yield C.NEWLINE_RUN, right


def pairs_in_any(texts: Iterable[str]) -> set[Pair]:
    """Return the pairs of neighbouring classes in any of the texts.

    Cost: a pass over the texts; the classes of each pair of characters are looked up once.
    """
    distinct = set(chain.from_iterable(map(pairwise, texts)))
    return {pair for left, right in distinct for pair in pairs_in(left + right)}


def is_coarse(pair: Pair) -> bool:
    """Return whether a chunk may begin at a cut between these classes, not only a segment."""
    left, right = pair
    return (left in VISIBLE and right is C.SPACE) or (left in LINE_ENDS and right in VISIBLE)
