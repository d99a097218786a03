"""The alphabet of a pattern: sets of code points that neither it nor the rules tell apart.

1. Each class of characters in the pattern is asked of the tokenizers library, over one string.
2. The string has a character of every kind: each interval of `properties` is cut at the code points
   that the pattern names and at the ends of the rules' character classes, and one character stands
   for all of the same kind between two such cuts.
3. Characters with the same answers, in the same character class, are one symbol.
"""

from __future__ import annotations

import base64
import re
import sys
import unicodedata
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from tokcache.errors import Unrecognised
from tokcache.text.cuts.char_classes import RANGES, CharClass, class_of
from tokcache.text.cuts.regex.properties import INTERVALS, NAMES

_PROPERTY = re.compile(r"\\[pP]\{\^?([\w ]+)\}|\[:\^?(\w+):\]")
_POINT = re.compile(r"\\x\{([0-9A-Fa-f]+)\}|\\x([0-7][0-9A-Fa-f])|\\u([0-9A-Fa-f]{4})")
_ALIASES = {"l", "m", "n", "p", "s", "z", "c", "any", "assigned", "letter", "mark", "number"}
_ALIASES |= {"punctuation", "symbol", "separator", "alpha", "digit", "space", "upper", "lower"}
_ALIASES |= {"word", "blank"}
_KNOWN = _ALIASES | set(NAMES.split())
_VISIBLE = frozenset("LMNPS")  # the first letters of the categories of visible characters


@dataclass(frozen=True, slots=True)
class Alphabet:
    """The symbols 0 to `n` - 1, and sets of them as masks of bits.

    `samples` has a character of each symbol. `chars` are the symbols that each query matches.
    `lefts` and `rights` are those of a class on the left and on the right of a cut: on the right,
    a class also has the characters that NFC makes of one of its own and the marks after it.
    """

    n: int
    samples: str
    chars: dict[str, int]
    lefts: dict[CharClass, int]
    rights: dict[CharClass, int]
    visible: int
    word: int
    newline: int


def alphabet_of(queries: Iterable[str]) -> Alphabet:
    """Return the alphabet of a pattern whose classes of characters are `queries`.

    Errors: Unrecognised for a property that `properties` does not have.
    """
    asked = dict.fromkeys([*queries, r"\w"])
    for query in asked:
        for found in _PROPERTY.finditer(query):
            name = found[1] or found[2]
            if name.lower() not in _KNOWN:
                raise Unrecognised(f"property {name}")
    chars = _characters(asked)
    answers = [_matched(query, chars) for query in asked]
    ignoring = [i for i, query in enumerate(asked) if query.startswith("(?i:")]

    held: dict[_Kind, str] = {}  # with the first character of each
    for at, char in enumerate(chars):
        kind = _Kind(
            tuple(at in answer for answer in answers),
            class_of(char),
            _composed_from(char),
            unicodedata.category(char)[0] in _VISIBLE,
        )
        held.setdefault(kind, char)
        if len(char.casefold()) > 1 and any(kind.answers[i] for i in ignoring):
            raise Unrecognised(f"ignored case of {char!a}, which stands for several characters")

    def mask(is_in: Iterable[bool]) -> int:
        return sum(1 << symbol for symbol, one in enumerate(is_in) if one)

    by_query = {query: mask(kind.answers[i] for kind in held) for i, query in enumerate(asked)}
    return Alphabet(
        n=len(held),
        samples="".join(held.values()),
        chars=by_query,
        lefts={one: mask(kind.own is one for kind in held) for one in CharClass},
        rights={
            one: mask(one in (kind.own, kind.composed_from) for kind in held) for one in CharClass
        },
        visible=mask(kind.is_visible for kind in held),
        word=by_query[r"\w"],
        newline=mask(kind.own is CharClass.NEWLINE for kind in held),
    )


class _Kind(NamedTuple):
    """All that is known of a character; characters of one kind are one symbol."""

    answers: tuple[bool, ...]  # whether it is matched, for each query
    own: CharClass
    composed_from: CharClass | None
    is_visible: bool


# ---- characters


@cache
def _intervals() -> tuple[list[int], list[int]]:
    """Return the first code point and the kind of every interval."""
    numbers = [int(one, 16) for one in zlib.decompress(base64.b64decode(INTERVALS)).split()]
    return numbers[::2], numbers[1::2]


def _characters(queries: Iterable[str]) -> str:
    """Return a character of every kind that the queries or the rules may tell apart."""
    named = {ord(char) for query in queries for char in query}
    for query in queries:
        named |= {int(next(filter(None, found)), 16) for found in _POINT.findall(query)}
    # Without regard to case, 0x130, 0x131, 0x17F and 0x212A may be equal to ASCII letters.
    named |= {*range(0x80), 0x130, 0x131, 0x17F, 0x212A, 0x2028, 0x2029}
    named |= {end for first, last, _ in RANGES for end in (first, last)}
    cuts = sorted(named | {point + 1 for point in named})
    found: dict[tuple[int, int, object], int] = {}
    starts, kinds = _intervals()
    for point in sorted({*cuts, *starts, *_compositions()}):
        if point > sys.maxunicode or 0xD800 <= point < 0xE000:  # noqa: PLR2004 (surrogates)
            continue
        kind = kinds[bisect_right(starts, point) - 1]
        found.setdefault((bisect_right(cuts, point), kind, _composed_from(chr(point))), point)
    return "".join(map(chr, sorted(found.values())))


@cache
def _compositions() -> dict[int, CharClass]:
    """Return the characters that NFC makes of a character of a rule's class and marks after it."""
    found: dict[int, CharClass] = {}
    for point in range(0xC0, 0x3100):  # later ones are compositions of Hangul, or excluded
        char = chr(point)
        parts = unicodedata.normalize("NFD", char)
        if parts != char and unicodedata.normalize("NFC", char) == char:
            own = class_of(parts[0])
            if own is not CharClass.OTHER:
                found[point] = own
    return found


def _composed_from(char: str) -> CharClass | None:
    return _compositions().get(ord(char))


def _matched(query: str, chars: str) -> set[int]:
    """Return the places of the characters that a query matches.

    Errors: Unrecognised if the library can't compile it alone.
    """
    try:
        split = Split(Regex(f"(?:{query})+"), "removed", invert=True)
    except Exception as error:  # noqa: BLE001 (the library raises Exception)
        raise Unrecognised(f"class {query} ({error})") from None
    found = split.pre_tokenize_str(chars)
    return {at for _, (start, stop) in found for at in range(start, stop)}
