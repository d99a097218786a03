"""Finds the cuts of a pattern: shipped for a known one, derived and remembered for another."""

from __future__ import annotations

from functools import cache

from tokcache.text.cuts.patterns import KNOWN
from tokcache.text.cuts.regex.known import RESULTS
from tokcache.text.cuts.regex.pattern_cuts import PatternCuts

_NAMES = {pattern: name for name, pattern in KNOWN.items()}


def cuts_of_pattern(pattern: str) -> PatternCuts:
    """Return the cuts that a pattern of a Split allows.

    Errors: Unrecognised, with the name and place of a construct that is not modelled.
    Cost:   some microseconds for a known pattern; for others some hundred milliseconds, once in a
            process.
    """
    # Some files hold the characters themselves where others hold their escapes.
    name = _NAMES.get(pattern) or _NAMES.get(pattern.replace("\r", r"\r").replace("\n", r"\n"))
    if name in RESULTS:
        return _shipped(name)
    from tokcache.text.cuts.regex.safety import derive  # noqa: PLC0415 (only for unknown patterns)

    return derive(pattern)


@cache
def _shipped(name: str) -> PatternCuts:
    return PatternCuts.unpacked(RESULTS[name])
