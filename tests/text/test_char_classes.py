"""The character classes against Python's Unicode tables, version 3.2 and the current one."""

from __future__ import annotations

import string
import sys
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tokcache.text.cuts.char_classes import (
    ASCII_CLASSES,
    N_CLASSES,
    NON_ASCII_LETTER_RANGES,
    NON_ASCII_PUNCTUATION_RANGES,
    VISIBLE,
    WHITESPACE,
    CharClass,
    class_of,
)

OLD = unicodedata.ucd_3_2_0
C = CharClass
RANGES = sorted([*NON_ASCII_LETTER_RANGES, *NON_ASCII_PUNCTUATION_RANGES])


def chars_of(ranges: tuple[tuple[int, int], ...]) -> Iterator[str]:
    return (chr(point) for first, last in ranges for point in range(first, last + 1))


LETTERS = list(chars_of(NON_ASCII_LETTER_RANGES))
PUNCTUATION = list(chars_of(NON_ASCII_PUNCTUATION_RANGES))


def canonical_pairs() -> list[tuple[str, str]]:
    """Return the two parts of each character that has a canonical decomposition into two."""
    found = []
    for point in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            first, second = (chr(int(part, 16)) for part in parts)
            found.append((first, second))
    return found


PAIRS = canonical_pairs()


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# ---- letters


@pytest.mark.parametrize("tables", [OLD, unicodedata], ids=["unicode_3_2", "unicode_now"])
def test_letters_are_uncombining_letters_in_old_and_new_unicode(tables: unicodedata.UCD) -> None:
    for char in LETTERS:
        assert tables.category(char) in {"Lu", "Ll", "Lt", "Lm", "Lo"}, ascii(char)
        assert tables.combining(char) == 0, ascii(char)


def test_a_letter_stays_a_letter_under_nfc() -> None:
    changed = [char for char in LETTERS if nfc(char) != char]
    assert changed == []


def test_a_letter_and_a_following_mark_compose_to_a_letter() -> None:
    letters = frozenset(LETTERS)
    composed = [nfc(first + second) for first, second in PAIRS if first in letters]
    assert len(composed) > 100
    for text in composed:
        assert unicodedata.category(text[0]).startswith("L"), ascii(text)


def test_no_letter_composes_with_the_character_before_it() -> None:
    letters = frozenset(LETTERS) | frozenset(string.ascii_letters)
    assert [pair for pair in PAIRS if pair[1] in letters] == []


def test_no_letter_composes_with_following_ascii_or_punctuation() -> None:
    following = [char for char in map(chr, range(128)) if class_of(char) is not C.OTHER]
    for char in LETTERS:
        text = char + char.join([*following, *PUNCTUATION])
        assert nfc(text) == text, ascii(char)


def test_the_lower_case_of_a_letter_is_one_letter() -> None:
    for char in LETTERS:
        assert len(char.lower()) == 1, ascii(char)
        assert unicodedata.category(char.lower()).startswith("L"), ascii(char)
    assert len("\u0130".lower()) == 2
    assert class_of("\u0130") is C.OTHER


# ---- punctuation


@pytest.mark.parametrize("tables", [OLD, unicodedata], ids=["unicode_3_2", "unicode_now"])
def test_non_ascii_punctuation_is_punctuation(tables: unicodedata.UCD) -> None:
    for char in PUNCTUATION:
        assert tables.category(char).startswith("P"), ascii(char)
        assert tables.combining(char) == 0, ascii(char)


def test_no_composition_begins_or_ends_with_non_ascii_punctuation() -> None:
    punctuation = frozenset(PUNCTUATION)
    assert [pair for pair in PAIRS if punctuation.intersection(pair)] == []
    assert [char for char in PUNCTUATION if nfc(char) != char] == []


# ---- ASCII


def test_no_mark_composes_with_a_stop() -> None:
    """So a cut before one holds under NFC, where one before `=` and U+0338 does not."""
    first = {pair[0] for pair in PAIRS}
    assert not first & {*".,!?()|"}
    assert "=" in first


def test_every_ascii_character_has_the_class_of_its_name() -> None:
    assert len(ASCII_CLASSES) == 128
    assert [class_of(char) for char in "_'/ \t\r\n"] == [
        C.UNDERSCORE, C.APOSTROPHE, C.SLASH, C.SPACE, C.TAB, C.RETURN, C.NEWLINE,
    ]  # fmt: skip
    for char in map(chr, range(128)):
        if char in "_'/ \t\r\n":
            continue
        if char in string.ascii_letters:
            wanted = C.LETTER
        elif char in string.digits:
            wanted = C.DIGIT
        else:
            wanted = C.PUNCTUATION if char in string.punctuation else C.OTHER
            wanted = C.STOP if char in ".,!?()|" else wanted
        assert class_of(char) is wanted, ascii(char)


def test_every_character_is_visible_whitespace_or_other() -> None:
    assert not VISIBLE & WHITESPACE
    only_on_the_left = {C.NEWLINE_RUN, C.TOKEN_END}
    assert set(C) == VISIBLE | WHITESPACE | only_on_the_left | {C.OTHER}
    for char in map(chr, range(128)):
        assert (class_of(char) in VISIBLE) == (char.isprintable() and char != " "), ascii(char)
    assert {class_of(char) for char in map(chr, range(0x10000))} == VISIBLE | WHITESPACE | {C.OTHER}
    assert max(C) < N_CLASSES


# ---- ranges


def test_ranges_are_sorted_disjoint_and_non_ascii() -> None:
    assert RANGES[0][0] >= 128
    assert all(first <= last for first, last in RANGES)
    assert all(last < first for (_, last), (first, _) in pairwise(RANGES))
    assert len(LETTERS) + len(PUNCTUATION) == sum(last - first + 1 for first, last in RANGES)


@pytest.mark.parametrize(
    ("ranges", "wanted"),
    [
        (NON_ASCII_LETTER_RANGES, C.NON_ASCII_LETTER),
        (NON_ASCII_PUNCTUATION_RANGES, C.NON_ASCII_PUNCTUATION),
    ],
    ids=["letters", "punctuation"],
)
def test_characters_next_to_a_range_are_in_class_other(
    ranges: tuple[tuple[int, int], ...], wanted: C
) -> None:
    inside = {point for first, last in RANGES for point in range(first, last + 1)}
    for first, last in ranges:
        assert class_of(chr(first)) is class_of(chr(last)) is wanted
        for point in (first - 1, last + 1):
            assert point in inside or class_of(chr(point)) is C.OTHER, hex(point)


def test_characters_whose_properties_vary_are_in_class_other() -> None:
    for char in "\x00\x0b\x0c\x1c\x7f\x85\xa0\xd7\xf7\u0130\u017f\u0301\u0e31\u0e33\u200b\u2028":
        assert class_of(char) is C.OTHER, ascii(char)
    for char in "\u3000\u3099\u309b\u30fb\ufeff\uffff\U0001f600\U00020000\U0010ffff\ud800":
        assert class_of(char) is C.OTHER, ascii(char)
