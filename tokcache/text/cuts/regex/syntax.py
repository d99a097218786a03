r"""Parses a pattern of a Split in the dialect that tokenizers uses: Oniguruma's Ruby syntax.

It differs from Python's: `a{1,3}+` repeats `a{1,3}`, `a{2}?` makes `a{2}` optional, `$` ends a
line, classes may be nested and intersected (`&&`), and `(?i:s)` also matches U+017F.

A class of characters stays text, because the library itself says which characters it holds
(`alphabet`). A construct whose meaning is not modelled is refused, with its name and place.

Source: doc/RE and src/regparse.c of Oniguruma 6.9.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import chain
from typing import NamedTuple

from tokcache.errors import Unrecognised
from tokcache.text.cuts.regex.properties import NAMES

_MAX_REPEATS = 1000
_INTERVAL = re.compile(r"\{(\d*)(,?)(\d*)\}")
_PLACES = {r"\b": "word", r"\B": "no_word", r"\z": "end"}
# The escapes that match one character, in a class and outside it. Two digits after `\x` are a byte,
# which from 80 on is only a part of a character.
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?([\w ]+)\}|x\{[0-9A-Fa-f]+\}|x[0-7][0-9A-Fa-f]|u[0-9A-Fa-f]{4}"
    r"|[rntfvaesSdDwWhH]|[^A-Za-z0-9])",
    re.ASCII | re.DOTALL,
)
_POSIX_CLASS = re.compile(r"\[:\^?([a-z]+):\]")
# The properties that `properties` knows, in lower case.
_ALIASES = {"l", "m", "n", "p", "s", "z", "c", "any", "assigned", "letter", "mark", "number"}
_ALIASES |= {"punctuation", "symbol", "separator", "alpha", "digit", "space", "upper", "lower"}
_ALIASES |= {"word", "blank"}
_KNOWN = _ALIASES | set(NAMES.split())
_BEYOND_ASCII = re.compile(r"\\[pPxu]|\[:|&&")
_GROUPS = {"(?:": "group", "(?=": "ahead", "(?!": "not_ahead", "(?i:": "ignore_case"}
_REFUSED_GROUPS = {
    "(?<=": "look-behind",
    "(?<!": "look-behind",
    "(?>": "atomic group",
    "(?<": "named group",
    "(?": "option",
}


class Chars(NamedTuple):
    """One character; `query` is a pattern that matches the same characters and nothing else."""

    query: str


class Row(NamedTuple):
    """One node after another."""

    parts: tuple[Node, ...]


class Choice(NamedTuple):
    """The first option that leads to a match."""

    options: tuple[Node, ...]


class Repeat(NamedTuple):
    """A node `low` to `high` times (None: without limit), as often or as rarely as possible."""

    node: Node
    low: int
    high: int | None
    is_greedy: bool = True


class Look(NamedTuple):
    """A look-ahead: the text here begins, or does not begin, with a match of the node."""

    node: Node
    is_negative: bool


class Place(NamedTuple):
    """A condition on the characters before and after: see `automaton.Program`."""

    kind: str


Node = Chars | Row | Choice | Repeat | Look | Place


def parse(pattern: str) -> Node:
    """Return the tree of a pattern.

    Errors: Unrecognised, with the name and place of the first construct that is not modelled.
    """
    parser = _Parser(pattern)
    node = parser.choice(ignore_case=False)
    if parser.at < len(pattern):
        raise parser.refusal("unmatched )")
    return node


def may_be_empty(node: Node) -> bool:
    """Return whether a node may match without reading a character."""
    if isinstance(node, Chars):
        return False
    if isinstance(node, Row):
        return all(map(may_be_empty, node.parts))
    if isinstance(node, Choice):
        return any(map(may_be_empty, node.options))
    if isinstance(node, Repeat):
        return node.low == 0 or may_be_empty(node.node)
    return True


class _Parser:
    """Recursive descent; `at` is the place of the next character."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.at = 0

    def refusal(self, name: str, at: int | None = None) -> Unrecognised:
        return Unrecognised(f"{name} at character {self.at if at is None else at}")

    def choice(self, *, ignore_case: bool) -> Node:
        options = [self._row(ignore_case)]
        while self._peek() == "|":
            self.at += 1
            options.append(self._row(ignore_case))
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _peek(self, n_chars: int = 1) -> str:
        return self._pattern[self.at : self.at + n_chars]

    def _row(self, ignore_case: bool) -> Node:
        parts: list[Node] = []
        literal = ""  # the last literal characters: one may equal several if case is ignored
        while self._peek() not in ("", "|", ")"):
            start = self.at
            node = self._atom(ignore_case)
            is_literal = isinstance(node, Chars) and self._pattern[start] not in ".["
            literal = literal + self._pattern[start : self.at] if is_literal else ""
            quantified = self._quantified(node)
            if ignore_case and is_literal:
                times = 2 if quantified is not node else 1
                text = literal + self._pattern[start : self.at] * (times - 1)
                folded = text.casefold()  # may it be equal to one character, as "ss" is to U+00DF?
                if len(folded) > len(text) or any(one in folded for one in _folds()):
                    raise self.refusal("ignored case of several characters", start)
            parts.append(quantified)
        return parts[0] if len(parts) == 1 else Row(tuple(parts))

    def _quantified(self, node: Node) -> Node:
        while True:
            start, found = self.at, self._quantifier()
            if found is None:
                return node
            low, high, is_interval = found
            if max(low, high or 0) > _MAX_REPEATS:
                raise self.refusal(f"more than {_MAX_REPEATS} repeats", start)
            if may_be_empty(node):
                raise self.refusal("repeat of an expression that may be empty", start)
            is_lazy = self._peek() == "?" and not (is_interval and low == high)
            is_possessive = self._peek() == "+" and not is_interval
            self.at += is_lazy or is_possessive
            if not is_possessive:
                node = Repeat(node, low, high, not is_lazy)
            elif not isinstance(node, Chars):
                raise self.refusal("possessive repeat of a group", start)
            else:
                # One that may not go back ends where no such character follows.
                ends = Look(node, is_negative=True)
                node = Choice((node, ends)) if high == 1 else Row((Repeat(node, low, high), ends))

    def _quantifier(self) -> tuple[int, int | None, bool] | None:
        """Read (low, high, whether it is written in braces), or None if there is no quantifier."""
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self._peek())
        if simple is not None:
            self.at += 1
            return (*simple, False)
        if self._peek() != "{":
            return None
        found = _INTERVAL.match(self._pattern, self.at)
        if found is None or found.group() in ("{}", "{,}"):
            raise self.refusal("brace that is no quantifier")
        first, comma, last = found.groups()
        low = int(first or 0)
        high = (int(last) if last else None) if comma else low
        if high is not None and (high < low or high == 0):
            raise self.refusal("quantifier with a wrong order")
        self.at = found.end()
        return low, high, True

    def _atom(self, ignore_case: bool) -> Node:
        char = self._peek()
        if char == "(":
            return self._group(ignore_case)
        if char == "\\":
            return self._escape(ignore_case)
        start = self.at
        if char == "[":
            self._skip_class()
            return self._chars(self._pattern[start : self.at], ignore_case)
        if char in "*+?{]":
            raise self.refusal(f"{char} without anything before it")
        self.at += 1
        if char in "^$":
            return Place("line_start" if char == "^" else "line_end")
        return self._chars("\\" + char if char in "}&-" else char, ignore_case)

    def _chars(self, query: str, ignore_case: bool) -> Chars:
        if not ignore_case:
            return Chars(query)
        # The alphabet knows which other characters are equal to ASCII letters, and no more.
        if not query.isascii() or _BEYOND_ASCII.search(query):
            raise self.refusal("ignored case of more than ASCII", self.at - len(query))
        return Chars(f"(?i:{query})")

    def _group(self, ignore_case: bool) -> Node:
        start = self.at
        if ignore_case:  # the library joins the literals of nested groups: "ss" is U+00DF, too
            raise self.refusal("group in a group that ignores case")
        kind = "group"
        if self._peek(2) == "(?":
            opening = next((one for one in _GROUPS if self._pattern.startswith(one, start)), None)
            if opening is None:
                names = _REFUSED_GROUPS.items()
                raise self.refusal(next(n for o, n in names if self._pattern.startswith(o, start)))
            kind = _GROUPS[opening]
            self.at += len(opening)
        else:
            self.at += 1
        node = self.choice(ignore_case=kind == "ignore_case")
        if self._peek() != ")":
            raise self.refusal("unclosed group", start)
        self.at += 1
        if kind in ("ahead", "not_ahead"):
            return Look(node, is_negative=kind == "not_ahead")
        return node

    def _escape(self, ignore_case: bool) -> Node:
        start = self.at
        if self._peek(2) in _PLACES:
            self.at += 2
            return Place(_PLACES[self._pattern[start : self.at]])
        self._skip_escape("")
        return self._chars(self._pattern[start : self.at], ignore_case)

    def _skip_escape(self, where: str) -> None:
        found = _ESCAPE.match(self._pattern, self.at)
        if found is None:
            raise self.refusal(f"escape {self._peek(2)}{where}")
        self._check_property(found[1])
        self.at = found.end()

    def _check_property(self, name: str | None) -> None:
        if name is not None and name.lower() not in _KNOWN:
            raise self.refusal(f"property {name}")

    def _skip_class(self) -> None:
        """Go on after a bracketed class, in which other classes may be nested."""
        start, depth = self.at, 0
        while True:
            char = self._peek()
            if char == "":
                raise self.refusal("unclosed class", start)
            if char == "\\":
                self._skip_escape(" in a class")
                continue
            if self._peek(2) == "[:":
                found = _POSIX_CLASS.match(self._pattern, self.at)
                if found is None:
                    raise self.refusal("[: that begins no POSIX class")
                self._check_property(found[1])
                self.at = found.end()
                continue
            self.at += 1
            if char == "[":
                depth += 1
                if self._peek() == "]" or self._peek(2) == "^]":
                    raise self.refusal("empty class")
            elif char == "]":
                depth -= 1
                if depth == 0:
                    return


@cache
def _folds() -> frozenset[str]:
    """Return the texts that one character equals without regard to case, as "ss" does U+00DF."""
    ranges = range(0x1E96, 0x1E9F), range(0x1F50, 0x1FFD), range(0xFB00, 0xFB18)
    points = chain((0xDF, 0x130, 0x149, 0x1F0, 0x390, 0x3B0, 0x587), *ranges)
    folded = (chr(point).casefold() for point in points)
    return frozenset(one for one in folded if len(one) > 1)
