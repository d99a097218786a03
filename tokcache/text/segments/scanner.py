"""Scans a text for added tokens, character classes and cuts, as the native scanner does.

Native builds use it too, for a part that is encoded again from a cache file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache.errors import Unsure
from tokcache.text.segments.char_classes import ASCII_CLASSES, WHITESPACE, CharClass, class_of

if TYPE_CHECKING:
    from tokcache.text.segments.cuts.plan import CutPlan, Separator

_WHITE_SPACE = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
    + "".join(map(chr, range(0x2000, 0x200B)))
)
_WORDS = frozenset({CharClass.LETTER, CharClass.DIGIT, CharClass.UNDERSCORE})
_IN_RUN = WHITESPACE | {CharClass.NEWLINE_RUN, CharClass.OTHER}


@dataclass(frozen=True, slots=True)
class Match:
    """An added token in a text; the search goes on at `end`, whatever its flags took more."""

    token: Separator
    start: int
    stop: int
    end: int
    is_text: bool


def class_behind(char: str, left: CharClass) -> CharClass:
    """Return the class of a character whose left neighbour has the class `left`."""
    own = class_of(char)
    return CharClass.NEWLINE_RUN if own is CharClass.NEWLINE and left in _IN_RUN else own


class Scanner:
    """Finds added tokens as the tokenizers library does: leftmost, longest, then their flags."""

    def __init__(self, plan: CutPlan) -> None:
        self._by_first: dict[str, list[Separator]] = {}
        for one in sorted(plan.separators, key=lambda one: -len(one.content)):
            self._by_first.setdefault(one.content[0], []).append(one)

    def match(self, text: str, i: int, piece: int) -> Match | None:
        """Return the added token at `i`; `piece` is where the text since the last one begins."""
        for one in self._by_first.get(text[i], ()):
            if text.startswith(one.content, i):
                return self._judged(text, one, i, piece)
        return None

    def opens(self, text: str, i: int) -> bool:
        """Return whether an added token starts at `i` that a chunk may begin with."""
        match = self.match(text, i, i)
        return match is not None and not match.is_text and match.token.opens

    def _judged(self, text: str, one: Separator, i: int, piece: int) -> Match:
        start, end = i, i + len(one.content)
        stop = end
        is_text = one.skips or (one.single_word and self._touches_word(text, one, i, piece))
        if is_text:
            return Match(one, start, stop, end, is_text=True)
        if one.lstrip:
            while start > 0 and text[start - 1] in _WHITE_SPACE:
                start -= 1
            start = max(start, piece)
        if one.rstrip:
            while stop < len(text) and text[stop] in _WHITE_SPACE:
                stop += 1
        return Match(one, start, stop, end, is_text=False)

    def _touches_word(self, text: str, one: Separator, i: int, piece: int) -> bool:
        end = i + len(one.content)
        touches = False
        if i > 0 and not (one.in_piece and i == piece):
            touches = _is_word(text[i - 1])
        if end < len(text):
            if text[end] in self._by_first:
                raise Unsure
            touches = _is_word(text[end]) or touches
        if touches and i == piece and piece > 0:
            raise Unsure  # as text it must be encoded together with what it touches
        return touches


def _is_word(char: str) -> bool:
    if ord(char) >= len(ASCII_CLASSES):
        raise Unsure
    return class_of(char) in _WORDS


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a text: an added token, or text between two safe places."""

    start: int
    stop: int
    token: Separator | None
    variant: int


def parts_of(
    plan: CutPlan, scanner: Scanner, text: str, span: tuple[int, int], variant: int, *, fine: bool
) -> Iterator[Part]:
    """Yield the parts of a chunk: added tokens, and what lies between fine cuts."""
    i = start = span[0]
    left = CharClass.LETTER if i else plan.piece_left
    while i < span[1]:
        match = scanner.match(text, i, start)
        if match is not None and not match.is_text:
            if match.start > start:
                yield Part(start, match.start, None, variant)
            yield Part(match.start, match.stop, match.token, 0)
            start, i = match.stop, match.end
            left, variant = plan.piece_left, plan.variant_of[1]
            continue
        stop = i + 1 if match is None else match.end
        if i >= start:
            for at in range(i, stop):
                own = class_behind(text[at], left)
                if fine and match is None and at > start and plan.allows(left, own):
                    yield Part(start, at, None, variant)
                    start, variant = at, plan.variant_of[2]
                left = own
        i = stop
    if span[1] > start:
        yield Part(start, span[1], None, variant)
