"""Finds the cuts of a pattern: those of known patterns ship, those of others are derived once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tokcache.text.cuts.patterns import KNOWN
from tokcache.text.cuts.regex.known import RESULTS
from tokcache.text.cuts.regex.pattern_cuts import Outcome, PatternCuts

if TYPE_CHECKING:
    from tokcache.text.cuts.rules import Pair

_NAMES = {pattern: name for name, pattern in KNOWN.items()}


def cuts_of_pattern(pattern: str) -> PatternCuts:
    """Return the cuts that a pattern of a Split allows.

    Errors: Unrecognised, with the name and place of a construct that is not modelled.
    Cost:   some microseconds for a known pattern; for others some 5 to 15 milliseconds, once in a
            process.
    """
    name = name_of(pattern)
    if name in RESULTS:
        return PatternCuts.unpacked(RESULTS[name])
    from tokcache.text.cuts.regex.safety import derive  # noqa: PLC0415 (only for unknown patterns)

    return derive(pattern)


@lru_cache(maxsize=256)
def outcomes_of(
    pattern: str, behavior: str, *, invert: bool
) -> tuple[frozenset[Pair], frozenset[Pair]]:
    """Return the pairs at which a Split keeps its pieces apart, and those where it may join two.

    The second set contains the first.

    Errors: Unrecognised.
    """
    cuts = cuts_of_pattern(pattern)
    found = {pair: cuts.outcome(pair, behavior, invert=invert) for pair in cuts.kept}
    return frozenset(pair for pair, one in found.items() if one is Outcome.APART), frozenset(found)


def name_of(pattern: str) -> str | None:
    """Return the name of a known pattern, or None."""
    # Some files hold the characters themselves where others hold their escapes.
    return _NAMES.get(pattern) or _NAMES.get(pattern.replace("\r", r"\r").replace("\n", r"\n"))
