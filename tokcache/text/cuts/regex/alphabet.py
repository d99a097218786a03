"""The alphabet of a pattern: sets of code points that neither it nor the rules tell apart.

1. Each class of characters in the pattern is asked of the tokenizers library, over one string.
2. The string has a character of every kind: each interval of `properties` is cut at the code points
   that the pattern names, and one character stands for all of the same kind between two such cuts.
3. Characters with the same answers, in the same character class, are one symbol. The pattern can't
   tell symbols with the same answers apart, so its automaton runs over one of them (`alike`).
"""

from __future__ import annotations

import base64
import re
import struct
import sys
import unicodedata
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from tokcache.errors import Unrecognised
from tokcache.text.cuts.char_classes import CharClass, class_of
from tokcache.text.cuts.regex.properties import COMPOSITIONS, INTERVALS

_POINT = re.compile(r"\\x\{([0-9A-Fa-f]+)\}|\\x([0-7][0-9A-Fa-f])|\\u([0-9A-Fa-f]{4})")
_IGNORED_LETTER = re.compile(r"\(\?i:[A-Za-z]\)")
_SURROGATES = range(0xD800, 0xE000)
_VISIBLE = frozenset("LMNPS")  # the first letters of the categories of visible characters


class Alphabet(NamedTuple):
    """The symbols 0 to `n` - 1, and sets of them as masks of bits.

    `samples` has a character of each symbol. `alike` are, for a symbol of each set that the pattern
    can't tell apart, the symbols of the set. `chars` are the symbols that each query matches.
    `lefts` and `rights` are those of a class on the left and on the right of a cut: on the right,
    a class also has the characters that NFC makes of one of its own and the marks after it.
    """

    n: int
    samples: str
    alike: dict[int, int]
    chars: dict[str, int]
    lefts: dict[CharClass, int]
    rights: dict[CharClass, int]
    visible: int
    word: int
    newline: int


def alphabet_of(queries: Iterable[str]) -> Alphabet:
    """Return the alphabet of a pattern whose classes of characters are `queries`.

    Errors: Unrecognised for a class that the library can't compile alone, or one that ignores the
            case of a character that stands for several.
    """
    asked = [*dict.fromkeys([*queries, r"\n"])]  # the condition `$` needs the newline
    chars = _characters(asked)
    answers = _answers(asked, chars)
    ignoring = sum(1 << i for i, query in enumerate(asked) if query.startswith("(?i:"))

    # (answers, class, class of a composition, whether it is visible), and the first such character:
    # this is all that is known of a character, and characters that are alike in it are one symbol.
    held: dict[tuple[int, CharClass, int | None, bool], str] = {}
    composed = _compositions()
    for char, answer in zip(chars, answers, strict=True):
        is_visible = unicodedata.category(char)[0] in _VISIBLE
        held.setdefault((answer, class_of(char), composed.get(ord(char)), is_visible), char)
        if answer & ignoring and len(char.casefold()) > 1:
            raise Unrecognised(f"ignored case of {char!a}, which stands for several characters")

    by_answer: dict[int, int] = {}
    lefts = dict.fromkeys(CharClass, 0)
    composing = dict.fromkeys(CharClass, 0)
    visible = 0
    for symbol, (answer, own, base, is_visible) in enumerate(held):
        bit = 1 << symbol
        by_answer[answer] = by_answer.get(answer, 0) | bit
        lefts[own] |= bit
        visible |= bit * is_visible
        if base is not None:
            composing[CharClass(base)] |= bit
    by_query = {
        query: sum(symbols for answer, symbols in by_answer.items() if answer >> i & 1)
        for i, query in enumerate(asked)
    }
    return Alphabet(
        n=len(held),
        samples="".join(held.values()),
        alike={(own & -own).bit_length() - 1: own for own in by_answer.values()},
        chars=by_query,
        lefts=lefts,
        rights={one: lefts[one] | composing[one] for one in CharClass},
        visible=visible,
        word=by_query.get(r"\w", 0),  # asked only if there is a condition `\b`
        newline=by_query[r"\n"],
    )


# ---- characters


def _characters(queries: Iterable[str]) -> str:
    """Return a character of every kind that the queries or the rules may tell apart."""
    named = {ord(char) for query in queries for char in query}
    for query in queries:
        named |= {int(next(filter(None, found)), 16) for found in _POINT.findall(query)}
    # Without regard to case, 0x130, 0x131, 0x17F and 0x212A may be equal to ASCII letters.
    named |= {*range(0x80), 0x130, 0x131, 0x17F, 0x212A, 0x2028, 0x2029}
    cuts = [*sorted(named | {point + 1 for point in named}), sys.maxunicode + 1]
    starts, kinds = _intervals()
    found: list[int] = []
    for first, stop in pairwise(cuts):
        at, end = bisect_right(starts, first), bisect_left(starts, stop)
        # The first of each kind between the two cuts: where a key is repeated, the last one stays.
        points = [first, *starts[at:end]]
        found += dict(zip(kinds[at - 1 : end][::-1], points[::-1], strict=True)).values()
    return "".join(chr(point) for point in sorted(found) if point not in _SURROGATES)


@cache
def _intervals() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first code point of every interval, in order, and the kind of each."""
    return _unpacked("I", "H", INTERVALS)


@cache
def _compositions() -> dict[int, int]:
    """Return the class of the first of the characters of which NFC makes a character.

    Only for those that it makes of a character of a rule's class and marks after it.
    """
    return dict(zip(*_unpacked("H", "B", COMPOSITIONS), strict=True))


def _unpacked(first: str, second: str, packed: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return two columns of numbers, packed one after the other as tools/pattern_tables.py does."""
    raw = zlib.decompress(base64.b64decode(packed))
    n = len(raw) // struct.calcsize(f"<{first}{second}")
    numbers = struct.unpack(f"<{n}{first}{n}{second}", raw)
    return numbers[:n], numbers[n:]


def _answers(queries: Sequence[str], chars: str) -> list[int]:
    """Return for each character the queries that match it, one bit for each query.

    Errors: Unrecognised if the library can't compile a query alone.
    """
    answers = [0] * len(chars)
    # Without regard to case, a letter is equal only to characters that casefolding relates to it.
    foldable = [at for at, char in enumerate(chars) if any(map(str.isascii, char.casefold()))]
    folding = "".join(chars[at] for at in foldable)
    for i, query in enumerate(queries):
        if len(query) == 1 and query not in ".\n":
            at = chars.find(query)  # `_characters` has every character that a query names
            answers[at] |= 1 << i
            continue
        text = folding if _IGNORED_LETTER.fullmatch(query) else chars
        try:
            split = Split(Regex(f"(?:{query})+"), "removed", invert=True)
        except Exception as error:  # noqa: BLE001 (the library raises Exception)
            raise Unrecognised(f"class {query} ({error})") from None
        for _, (start, stop) in split.pre_tokenize_str(text):
            for at in range(start, stop):
                answers[foldable[at] if text is folding else at] |= 1 << i
    return answers
