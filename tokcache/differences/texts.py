"""Classifies the first difference between two texts."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from tokcache.differences.alignment import WORDS, equal_runs
from tokcache.differences.classes import Difference, DifferenceClass
from tokcache.differences.values import changed_value

if TYPE_CHECKING:
    from tokcache.differences.alignment import Run

_THINKING = re.compile(
    r"<(think|thinking|reasoning|thought)>.*?(?:</\1>|\Z)\s*"
    r"|\[THINK\].*?(?:\[/THINK\]|\Z)\s*"
    r"|<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>|\Z)",
    re.DOTALL,
)
# The ends of a thinking block: one of them stands in the text that was dropped or added.
_THINKING_ENDS = re.compile(
    r"</?(?:think|thinking|reasoning|thought)>|\[/?THINK\]|<\|channel\|>analysis"
)
# Spaces of all kinds, and characters that are not seen: joiners, marks of direction, BOM.
_UNSEEN = re.compile("[\\s\u200b-\u200f\u2028-\u202f\u2060\ufeff\u00ad]+")
_BRACKETS = re.compile(r"[\[\]{}]")
_N_BRACKETS = 4096  # looked at in front of a difference
_N_ENCLOSING = 32  # JSON values around a difference that are read
_N_IN_THINKING = 4  # equal runs, such as a line break, inside a dropped block
_SIMILAR = 0.3  # share of the earlier rest from which on a text was edited, not replaced
_N_VALUE = 60  # code points of the longest value
_TAIL = re.compile(r"<[|/\w\uff5c]|\[/?[A-Z]")  # opens a marker of a chat template
_N_TAIL = 64
_N_CHANGES = 64  # changes that may together be one reordering


def classify(before: str, after: str) -> Difference:
    """Return the first difference between two texts, an earlier prompt and a later one.

    Cost: O(n log n) for n words; two JSON values around the difference are parsed.
    """
    runs = equal_runs(before, after)
    position = start = runs[0].length
    # The next equal run ends the difference; without one, both differ to their ends.
    stops = (runs[1].before, runs[1].after) if len(runs) > 1 else (len(before), len(after))
    n_lost = sum(run.length for run in runs[1:])
    kind: DifferenceClass | None
    if before == after:
        kind = DifferenceClass.SAME
    elif position == len(before):
        kind = DifferenceClass.APPENDED
    elif position == len(after):
        kind = DifferenceClass.SHORTENED
    else:
        old, new = before[position : stops[0]], after[position : stops[1]]
        # A dropped or inserted passage may begin where a value does, and is more than a value.
        is_passage = not (old and new) and len(old + new) > _N_VALUE
        value = None if is_passage else changed_value(before, after, position)
        kind = _kind_of_order(before, after, runs) or (value and value.kind)
        if value is not None and kind is value.kind:
            start = value.start
            stops = max(stops[0], value.before_stop), max(stops[1], value.after_stop)
        if kind is None:
            kind = DifferenceClass.EDITED
            if not old or not new:
                kind = DifferenceClass.INSERTED if new else DifferenceClass.DROPPED
            # A chat template ends every prompt alike, which makes no two questions similar.
            tail = _TAIL.search(before, max(position, len(before) - _N_TAIL))
            n_tail = len(before) - tail.start() if tail and len(runs) > 1 else 0
            n_tail = n_tail if n_tail <= runs[-1].length else 0
            is_similar = n_lost - n_tail >= _SIMILAR * (len(before) - position - n_tail)
            if len(runs) == 1 or (old and new and not is_similar):
                kind = DifferenceClass.OTHER_TEXT
    return Difference(
        kind,
        position,
        *stops,
        start=start,
        n_shared=position,
        n_lost=n_lost,
        before_text=before,
        after_text=after,
    )


def _kind_of_order(before: str, after: str, runs: list[Run]) -> DifferenceClass | None:
    """Return the class of a change of white space, thinking or order, None for other changes."""
    position = runs[0].length
    stops = (runs[1].before, runs[1].after) if len(runs) > 1 else (len(before), len(after))
    texts = before[position : stops[0]], after[position : stops[1]]
    if _UNSEEN.sub("", texts[0]) == _UNSEEN.sub("", texts[1]):
        return DifferenceClass.WHITE_SPACE
    if is_thinking_change(before, after, runs):
        return DifferenceClass.THINKING
    if _is_reordered_json(before, after, position) or _is_reordered_text(before, after, runs):
        return DifferenceClass.REORDERED
    return None


def is_thinking_change(before: str, after: str, runs: list[Run]) -> bool:
    """Return whether the first change drops or adds a block of thinking and no more than that."""
    position = runs[0].length
    # The common prefix may hold the first characters of the block, such as "<".
    opened = before.rfind("<", max(0, position - 32), position + 1)
    starts = {position, opened if opened >= 0 else position}
    for run in runs[1:_N_IN_THINKING]:
        texts = before[position : run.before], after[position : run.after]
        if not any(_THINKING_ENDS.search(text) for text in texts):
            break
        for start in starts:
            old, new = (
                "".join(_THINKING.sub("", text[start:stop]).split())
                for text, stop in ((before, run.before), (after, run.after))
            )
            if old == new:
                return True
    return False


def _is_reordered_json(before: str, after: str, position: int) -> bool:
    """Return whether a JSON value around `position` is the same except for its order."""
    opened: list[int] = []
    n_closed = 0
    found = [match.start() for match in _BRACKETS.finditer(before, 0, position)][-_N_BRACKETS:]
    for at in reversed(found):
        if before[at] in "]}":
            n_closed += 1
        elif n_closed:
            n_closed -= 1
        else:
            opened.append(at)
    decoder = json.JSONDecoder()
    for at in opened[:_N_ENCLOSING]:
        try:
            old, new = decoder.raw_decode(before, at)[0], decoder.raw_decode(after, at)[0]
            if canonical(old) == canonical(new):
                return True
        except (ValueError, RecursionError):  # not JSON: a template's or a program's brackets
            continue
    return False


def canonical(value: Any) -> str:
    """Return a JSON value as a text that does not depend on the order of keys and lists."""
    if isinstance(value, dict):
        inner = sorted(f"{json.dumps(str(key))}:{canonical(each)}" for key, each in value.items())
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ",".join(sorted(map(canonical, value))) + "]"
    return json.dumps(value)


def _is_reordered_text(before: str, after: str, runs: list[Run]) -> bool:
    """Return whether the first changes put the same lines or words in another order."""
    start = runs[0].length
    line = before.rfind("\n", 0, start) + 1
    ends = [(run.before, run.after) for run in runs[1:_N_CHANGES]]
    for old_stop, new_stop in [*ends, (len(before), len(after))]:
        old, new = before[start:old_stop], after[start:new_stop]
        if (
            len(old) == len(new)
            and old != new
            and Counter(WORDS.findall(old)) == Counter(WORDS.findall(new))
        ):
            return True
        lines = []
        for text, stop in ((before, old_stop), (after, new_stop)):
            at_start = stop == 0 or text[stop - 1 : stop] == "\n"
            end = stop if at_start else text.find("\n", stop)
            lines.append(text[line : end if end >= 0 else len(text)].splitlines())
        if len(lines[0]) > 1 and lines[0] != lines[1] and Counter(lines[0]) == Counter(lines[1]):
            return True
    return False
