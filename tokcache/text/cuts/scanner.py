"""Finds the added tokens, character classes and cuts in a text, as the native scanner does.

The reference implementation uses this scanner for every text. Builds with native modules use it
to verify segments of a cache file, which are encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache.errors import Unsure
from tokcache.text.cuts.char_classes import ASCII_CLASSES, WHITESPACE, CharClass, class_of

if TYPE_CHECKING:
    from tokcache.text.cuts.plan import CutPlan, Separator

_WHITESPACE_CHARS = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    + "".join(map(chr, range(0x2000, 0x200B)))
)
_WORDS = frozenset({CharClass.LETTER, CharClass.DIGIT, CharClass.UNDERSCORE})
_IN_RUN = WHITESPACE | {CharClass.NEWLINE_RUN, CharClass.OTHER}


@dataclass(frozen=True, slots=True)
class Match:
    """An added token found in a text.

    [`start`, `stop`) is its place, with the whitespace that its flags `lstrip` and `rstrip` add.
    `end` is the end of its content, where the search goes on. `is_text` is true if the token is
    ordinary text here.
    """

    token: Separator
    start: int
    stop: int
    end: int
    is_text: bool


def class_behind(char: str, left: CharClass) -> CharClass:
    """Return the class of a character, given the class `left` of the character before it."""
    own = class_of(char)
    return CharClass.NEWLINE_RUN if own is CharClass.NEWLINE and left in _IN_RUN else own


class Scanner:
    """Finds added tokens as the tokenizers library does: leftmost, longest, then their flags."""

    def __init__(self, plan: CutPlan) -> None:
        self._by_first: dict[str, list[Separator]] = {}
        for one in sorted(plan.separators, key=lambda one: -len(one.content)):
            self._by_first.setdefault(one.content[0], []).append(one)

    def match(self, text: str, i: int, piece: int) -> Match | None:
        """Return the added token at `i`; `piece` is the end of the added token before it, or 0.

        Errors: Unsure.
        """
        candidates = self._by_first.get(text[i], ())
        one = next((one for one in candidates if text.startswith(one.content, i)), None)
        if one is None:
            return None
        start, end = i, i + len(one.content)
        stop = end
        if one.skips or (one.single_word and self._touches_word(text, one, i, piece)):
            return Match(one, start, stop, end, is_text=True)
        if one.lstrip:
            while start > 0 and text[start - 1] in _WHITESPACE_CHARS:
                start -= 1
            start = max(start, piece)
        if one.rstrip:
            while stop < len(text) and text[stop] in _WHITESPACE_CHARS:
                stop += 1
        return Match(one, start, stop, end, is_text=False)

    def opens(self, text: str, i: int) -> bool:
        """Return whether an added token starts at `i` that a chunk may begin with."""
        match = self.match(text, i, i)
        return match is not None and not match.is_text and match.token.opens

    def _touches_word(self, text: str, one: Separator, i: int, piece: int) -> bool:
        """Return whether the token `one` at `i` has a word's character before or after it."""
        end = i + len(one.content)
        neighbours = []
        if i > 0 and not (one.in_piece and i == piece):
            neighbours.append(text[i - 1])
        if end < len(text):
            if text[end] in self._by_first:
                raise Unsure  # another added token may begin there
            neighbours.append(text[end])
        if any(ord(char) >= len(ASCII_CLASSES) for char in neighbours):
            raise Unsure
        touches = any(class_of(char) in _WORDS for char in neighbours)
        if touches and i == piece and piece > 0:
            raise Unsure  # as text it must be encoded together with the token that it touches
        return touches


@dataclass(frozen=True, slots=True)
class Span:
    """A segment of a text: one added token, or the text between two cuts (`token` is None)."""

    start: int
    stop: int
    token: Separator | None
    variant: int


def spans_of(
    plan: CutPlan, scanner: Scanner, text: str, span: tuple[int, int], variant: int, *, fine: bool
) -> Iterator[Span]:
    """Yield the added tokens of a chunk, and the segments between them or between fine cuts.

    `span` is the chunk's place in the text. The first segment is encoded with `variant`.

    Errors: Unsure.
    """
    i = start = span[0]
    left = CharClass.LETTER if i else plan.piece_left
    while i < span[1]:
        match = scanner.match(text, i, start)
        if match is not None and not match.is_text:
            if match.start > start:
                yield Span(start, match.start, None, variant)
            yield Span(match.start, match.stop, match.token, 0)
            start, i = match.stop, match.end
            left, variant = plan.piece_left, plan.variant_of[1]
            continue
        stop = i + 1 if match is None else match.end
        if i >= start:
            for at in range(i, stop):
                own = class_behind(text[at], left)
                if fine and match is None and at > start and plan.allows(left, own):
                    yield Span(start, at, None, variant)
                    start, variant = at, plan.variant_of[2]
                left = own
        i = stop
    if span[1] > start:
        yield Span(start, span[1], None, variant)
