r"""Decides between which character classes a Split by a pattern may be taken apart.

A Split searches the text from left to right; the text between two matches is a gap. For all texts
`u` that end in a character of one class and `v` that begin with one of another, the matches in
`u + v` are those of `u` and those of `v`, if

(i) no match depends on the characters before it: look-behind, or `\b` at its beginning;
(ii) in every state that can be reached with the last character of `u`, the first of `v` ends all
     threads and decides the same match as the end of the text does.

Every suffix of `u` is itself such a text, so (ii) holds for the matches that begin anywhere in `u`.
Then only a gap can touch both sides:

(iii) the Split has a boundary there unless a gap may end `u` and another one begin `v`.

Where they may, the last piece of `u` and the first of `v` are one piece, and a later stage may
still split it: see `PatternCuts.outcome`, for condition (iv). (v) A newline after a visible
character is a separate class on the left: only there does GPT-2's pattern match it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, reduce
from operator import and_, or_

from tokcache.errors import Unrecognised
from tokcache.text.cuts.char_classes import CharClass
from tokcache.text.cuts.regex.alphabet import Alphabet, alphabet_of
from tokcache.text.cuts.regex.automaton import Program, State
from tokcache.text.cuts.regex.pattern_cuts import LEFTS, RIGHTS, PatternCuts
from tokcache.text.cuts.regex.syntax import (
    Chars,
    Choice,
    Look,
    Node,
    Repeat,
    Row,
    may_be_empty,
    parse,
)

MAX_STATES = 1200


def derive(pattern: str) -> PatternCuts:
    """Return the cuts that a pattern allows, or refuse it.

    Errors: Unrecognised, with the name and place of the construct, or the limit that is exceeded.
    Cost:   some 5 to 15 milliseconds, 35 for a pattern of many hundred states, after this module
            is imported (7); the result is remembered in the process, a refusal too.
    """
    found = _derived(pattern)
    if isinstance(found, str):
        raise Unrecognised(found)
    return found


@lru_cache(maxsize=256)
def _derived(pattern: str) -> PatternCuts | str:
    try:
        return cuts_of(program_of(pattern))
    except Unrecognised as refused:
        return str(refused)


def program_of(pattern: str) -> Program:
    """Return the automaton of a pattern.

    Errors: Unrecognised.
    """
    node = parse(pattern)
    if may_be_empty(node):
        raise Unrecognised("a match may be empty")
    return Program(node, alphabet_of(_queries(node)))


def _queries(node: Node) -> Iterator[str]:
    """Yield the classes of characters in a tree."""
    if isinstance(node, Chars):
        yield node.query
    elif isinstance(node, Row | Choice):
        for one in node.parts if isinstance(node, Row) else node.options:
            yield from _queries(one)
    elif isinstance(node, Repeat | Look):
        yield from _queries(node.node)
    elif node.kind in ("word", "no_word"):
        yield r"\w"


def cuts_of(program: Program) -> PatternCuts:
    """Return the cuts that a pattern allows.

    Errors: Unrecognised beyond the limits of states and threads.
    """
    alphabet = program.alphabet
    last_read = states_after(program)
    # The symbols that end a state as the end of the text does; then those that end all the states
    # with the same symbols before, and all that a left class leads to.
    ended_after: dict[int, int] = {}
    for state, symbols in last_read.items():
        ended = sum(own for one, own in program.groups(state) if is_ended(program, state, one))
        ended_after[symbols] = ended_after.get(symbols, -1) & ended
    masks = left_masks(alphabet)
    kept_by = {
        left: reduce(and_, (ended for last, ended in ended_after.items() if last & mask), -1)
        for left, mask in masks.items()
    }

    def is_kept(left: CharClass, right: CharClass) -> bool:
        return not alphabet.rights[right] & ~kept_by[left]

    reads = reduce(or_, last_read.values(), 0)
    alone = [
        (program.step(program.start, one).state, symbols)
        for one, symbols in program.groups(program.start)
    ]
    gaps_at_end = sum(
        symbols for state, symbols in alone if program.step(state, program.end_of_text).end is None
    )
    matched: set[State] = set()
    gaps_at_start = sum(
        symbols for state, symbols in alone if _may_end_unmatched(program, state, matched)
    )
    starts = sum(symbols for state, symbols in alone if state.threads)

    def ends_in(mask: int) -> frozenset[CharClass]:
        if mask & alphabet.newline:
            mask |= 1 << alphabet.n  # a newline after a visible character: see `states_after`
        return frozenset(one for one in LEFTS if masks[one] & mask)

    def begins_in(mask: int) -> frozenset[CharClass]:
        return frozenset(one for one in RIGHTS if alphabet.rights[one] & mask)

    return PatternCuts(
        kept=frozenset((left, right) for left in LEFTS for right in RIGHTS if is_kept(left, right)),
        gap_ends=ends_in(gaps_at_end),
        match_ends=ends_in(reads),
        gap_starts=begins_in(gaps_at_start),
        match_starts=begins_in(starts),
    )


def left_masks(alphabet: Alphabet) -> dict[CharClass, int]:
    """Return the symbols of each left class; `alphabet.n` is a newline after visible text."""
    masks = {one: alphabet.lefts[one] for one in LEFTS}
    masks[CharClass.NEWLINE] = 1 << alphabet.n
    masks[CharClass.NEWLINE_RUN] = alphabet.newline
    masks[CharClass.OTHER] = alphabet.visible
    return masks


def states_after(program: Program) -> dict[State, int]:
    """Return the states that a match may be in, and the symbols that each may have read last.

    The symbol `alphabet.n` stands for a newline that is the first character or follows a visible
    one.

    Errors: Unrecognised beyond `MAX_STATES`.
    """
    alphabet = program.alphabet
    last_read: dict[State, int] = {}
    rest = [program.start]
    while rest:
        state = rest.pop()
        for one, symbols in program.groups(state):
            reached = program.step(state, one).state
            if not reached.threads:
                continue
            if reached not in last_read:
                rest.append(reached)
            last_read[reached] = last_read.get(reached, 0) | symbols
            if len(last_read) >= MAX_STATES:
                raise Unrecognised(f"more than {MAX_STATES} states")
    newline = alphabet.newline.bit_length() - 1
    # `start` is one of these: a match that begins at the newline may have any character before it.
    visible = [state for state, symbols in last_read.items() if symbols & alphabet.visible]
    for state in (program.start, *visible):
        reached = program.step(state, newline).state
        if reached.threads:
            last_read[reached] |= 1 << alphabet.n
    return last_read


def is_ended(program: Program, state: State, symbol: int) -> bool:
    """Return whether a symbol decides the match as the end of the text does: condition (ii)."""
    step = program.step(state, symbol)
    return not step.state.threads and step.end == program.step(state, program.end_of_text).end


def _may_end_unmatched(program: Program, first: State, matched: set[State]) -> bool:
    """Return whether a text may end, or go on, so that the match in a state comes to nothing.

    A match in one of the states `matched` never does; others that are found are added.
    """
    found, rest = {first}, [first]
    while rest:
        state = rest.pop()
        if not state.threads or program.step(state, program.end_of_text).end is None:
            return True
        for one, _ in program.groups(state):
            step = program.step(state, one)
            if step.end is None and step.state not in found and step.state not in matched:
                found.add(step.state)
                rest.append(step.state)
    matched |= found
    return False
