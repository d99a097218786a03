"""Equal runs of two texts, in time that grows with their length only.

1. The common prefix and suffix are set apart.
2. Of the rest, the lines that occur once in each text are anchors; the longest chain of anchors
   that has one order in both texts is kept.
3. Between two anchors, equal text next to them joins their runs; in what is left, steps 1 and 2 are
   done once more with words in place of lines.

Source: patience diff (Bram Cohen). It has no quadratic case, and repeated lines, such as the
        markers of a chat template, never become anchors.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple

from tokcache._prefix import n_common

LINES = re.compile(r"[^\n]*\n|[^\n]+")
WORDS = re.compile(r"\w+|\s+|[^\w\s]")


class Run(NamedTuple):
    """Equal text: `length` code points from `before` of one text and from `after` of the other."""

    before: int
    after: int
    length: int


def n_common_end(before: str, after: str, limit: int) -> int:
    """Return the length of the common suffix, at most `limit`."""
    return n_common(before[len(before) - limit :][::-1], after[len(after) - limit :][::-1])


def equal_runs(
    before: str, after: str, grains: tuple[re.Pattern[str], ...] = (LINES, WORDS)
) -> list[Run]:
    """Return the equal runs in order; the first is the common prefix, which may be empty.

    `grains` are the patterns of pieces that may be anchors, the largest first.

    Cost: O(n log n) for n pieces.
    """
    runs = _runs(before, after, grains)
    joined = [Run(0, 0, runs[0].length if runs and runs[0][:2] == (0, 0) else 0)]
    for run in runs:
        last = joined[-1]
        if (run.before, run.after) == (last.before + last.length, last.after + last.length):
            joined[-1] = last._replace(length=last.length + run.length)
        elif run.length and run[:2] != (0, 0):
            joined.append(run)
    return joined


def _runs(before: str, after: str, grains: tuple[re.Pattern[str], ...]) -> list[Run]:
    start = n_common(before, after)
    limit = min(len(before), len(after)) - start
    end = n_common_end(before, after, limit)
    found = [Run(0, 0, start)]
    left, right = before[start : len(before) - end], after[start : len(after) - end]
    if left and right and grains:
        anchors = _anchors(left, right, grains[0])
        ends = [Run(0, 0, 0), *anchors, Run(len(left), len(right), 0)]
        for last, run in pairwise(ends):
            at, other = last.before + last.length, last.after + last.length
            gap = _runs(left[at : run.before], right[other : run.after], grains[1:])
            found += [
                Run(one.before + at + start, one.after + other + start, one.length) for one in gap
            ]
            found.append(Run(run.before + start, run.after + start, run.length))
    found.append(Run(len(before) - end, len(after) - end, end))
    return found


def _anchors(left: str, right: str, grain: re.Pattern[str]) -> list[Run]:
    """Return the longest chain of pieces that occur once in each text, in one order in both."""
    places: list[dict[str, int]] = []
    for text in (left, right):
        once: dict[str, int] = {}
        for piece in grain.finditer(text):
            once[piece[0]] = -1 if piece[0] in once else piece.start()
        places.append(once)
    pairs = [
        (at, places[1][piece], len(piece))
        for piece, at in places[0].items()
        if at >= 0 and places[1].get(piece, -1) >= 0 and not piece.isspace()
    ]
    pairs.sort()
    # The longest increasing chain: `tails[n]` is the smallest end of a chain of n + 1 pairs.
    tails: list[int] = []
    ends: list[int] = []
    previous: list[int] = []
    for index, (_, at, _) in enumerate(pairs):
        depth = bisect_left(tails, at)
        tails[depth : depth + 1] = [at]
        ends[depth : depth + 1] = [index]
        previous.append(ends[depth - 1] if depth else -1)
    chain = []
    index = ends[-1] if ends else -1
    while index >= 0:
        chain.append(Run(*pairs[index]))
        index = previous[index]
    return chain[::-1]
