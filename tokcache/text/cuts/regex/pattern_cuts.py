"""The cuts that a pattern allows: the pairs of classes, and the pieces that a Split makes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from tokcache.text.cuts.char_classes import VISIBLE, WHITESPACE, CharClass

if TYPE_CHECKING:
    from tokcache.text.cuts.rules import Pair

LEFTS = (*sorted(VISIBLE | WHITESPACE), CharClass.NEWLINE_RUN, CharClass.OTHER)
RIGHTS = tuple(sorted(VISIBLE | WHITESPACE))


class Outcome(Enum):
    """The effect of one stage on the last piece of `u` and the first of `v`."""

    APART = "apart"  # they stay two pieces
    MAY_JOIN = "may join"  # they stay two, or become one
    CHANGED = "changed"  # other pieces may change


@dataclass(frozen=True, slots=True)
class PatternCuts:
    """The pairs of classes at which no match of a pattern changes, and where its gaps may be.

    OTHER on the left stands for every visible character, of any class. `gap_ends` and `match_ends`
    are the classes in which a gap, or a match, may end; `gap_starts` and `match_starts` those in
    which one may begin.
    """

    kept: frozenset[Pair]
    gap_ends: frozenset[CharClass]
    match_ends: frozenset[CharClass]
    gap_starts: frozenset[CharClass]
    match_starts: frozenset[CharClass]

    def packed(self) -> str:
        """Return the cuts as five hexadecimal numbers, whose bits follow LEFTS and RIGHTS."""
        bits = (
            [(left, right) in self.kept for left in LEFTS for right in RIGHTS],
            [one in self.gap_ends for one in LEFTS],
            [one in self.match_ends for one in LEFTS],
            [one in self.gap_starts for one in RIGHTS],
            [one in self.match_starts for one in RIGHTS],
        )
        return " ".join(f"{sum(bit << at for at, bit in enumerate(own)):x}" for own in bits)

    @classmethod
    def unpacked(cls, text: str) -> PatternCuts:
        """Return the cuts that `packed` wrote."""
        kept, *sides = (int(number, 16) for number in text.split())

        def chosen(bits: int, classes: Sequence[CharClass]) -> frozenset[CharClass]:
            return frozenset(one for at, one in enumerate(classes) if bits >> at & 1)

        pairs = [(left, right) for left in LEFTS for right in RIGHTS]
        return cls(
            frozenset(pair for at, pair in enumerate(pairs) if kept >> at & 1),
            chosen(sides[0], LEFTS),
            chosen(sides[1], LEFTS),
            chosen(sides[2], RIGHTS),
            chosen(sides[3], RIGHTS),
        )

    def outcome(self, pair: Pair, behavior: str, *, invert: bool) -> Outcome:
        """Return the effect of a Split with this pattern on the pieces next to a cut."""
        if pair not in self.kept:
            return Outcome.CHANGED
        left, right = pair
        ends = [left in self.gap_ends, left in self.match_ends]
        starts = [right in self.gap_starts, right in self.match_starts]
        for end, start in ((0, 0), (0, 1), (1, 0), (1, 1)):
            if ends[end] and starts[start] and joins(behavior, end == 1, start == 1, invert=invert):
                return Outcome.MAY_JOIN
        return Outcome.APART


def joins(behavior: str, left_matched: bool, right_matched: bool, *, invert: bool) -> bool:
    """Return whether a Split may join the pieces on the two sides of a cut.

    Source: `NormalizedString::split` of the tokenizers library. Two gaps are one from the start;
    otherwise `invert` exchanges matches and gaps before `behavior` joins them.
    """
    is_one_gap = not left_matched and not right_matched
    left, right = left_matched != invert, right_matched != invert
    if behavior == "Removed":
        return is_one_gap and not invert
    return (
        is_one_gap
        or {
            "Isolated": False,
            "Contiguous": left == right,
            "MergedWithPrevious": right and not left,
            "MergedWithNext": left and not right,
        }[behavior]
    )
