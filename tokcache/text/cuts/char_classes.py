"""The classes of characters that the rules for cuts speak of.

A class is narrow on purpose: a character that could behave otherwise under some normalizer,
pattern or newer Unicode table is `OTHER`, and no text is ever cut beside one of those.
"""

from __future__ import annotations

from enum import IntEnum

N_CLASSES = 16


class CharClass(IntEnum):
    """What a cut may stand between; the last two are seen on the left of a cut only."""

    OTHER = 0
    LETTER = 1  # a-z, A-Z
    DIGIT = 2  # 0-9
    PUNCTUATION = 3  # the other visible ASCII characters
    UNDERSCORE = 4
    APOSTROPHE = 5
    SLASH = 6
    SPACE = 7
    TAB = 8
    RETURN = 9
    NEWLINE = 10  # on the left of a cut: one newline behind a visible character
    NON_ASCII_LETTER = 11  # letters of the scripts in `NON_ASCII_LETTER_RANGES`
    NON_ASCII_PUNCTUATION = 12  # `NON_ASCII_PUNCTUATION_RANGES`
    NEWLINE_RUN = 13  # a newline behind white space
    TOKEN_END = 14  # whatever ends an added token


# Letters in Unicode 3.2 and ever since, of combining class 0: under NFC none of them turns into
# something else than a letter, and none combines with a space or with punctuation behind it.
NON_ASCII_LETTER_RANGES: tuple[tuple[int, int], ...] = (
    (0x00C0, 0x00D6),
    (0x00D8, 0x00F6),
    (0x00F8, 0x012F),
    (0x0131, 0x017E),  # without the dotted capital I, which two characters make in lower case
    (0x0391, 0x03A1),
    (0x03A3, 0x03CE),
    (0x0400, 0x0481),
    (0x0531, 0x0556),
    (0x0561, 0x0586),
    (0x05D0, 0x05EA),
    (0x0621, 0x063A),
    (0x0641, 0x064A),
    (0x0E01, 0x0E30),
    (0x3041, 0x3094),
    (0x30A1, 0x30FA),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
)

# Punctuation in Unicode 3.2 and ever since that no composition begins or ends with.
NON_ASCII_PUNCTUATION_RANGES: tuple[tuple[int, int], ...] = (
    (0x2013, 0x2014),
    (0x2018, 0x201E),
    (0x2026, 0x2026),
    (0x3001, 0x3002),
    (0x300A, 0x300F),
    (0xFF01, 0xFF01),
    (0xFF0C, 0xFF0C),
    (0xFF1A, 0xFF1B),
    (0xFF1F, 0xFF1F),
)

_SINGLE = {
    "_": CharClass.UNDERSCORE,
    "'": CharClass.APOSTROPHE,
    "/": CharClass.SLASH,
    " ": CharClass.SPACE,
    "\t": CharClass.TAB,
    "\r": CharClass.RETURN,
    "\n": CharClass.NEWLINE,
}


def _ascii_class(char: str) -> CharClass:
    if char in _SINGLE:
        return _SINGLE[char]
    if char.isalpha():
        return CharClass.LETTER
    if char.isdigit():
        return CharClass.DIGIT
    return CharClass.PUNCTUATION if "!" <= char <= "~" else CharClass.OTHER


ASCII_CLASSES = bytes(_ascii_class(chr(point)) for point in range(128))

# (first, last, class) of the non-ASCII ranges, in order.
RANGES: tuple[tuple[int, int, CharClass], ...] = tuple(
    sorted(
        [(first, last, CharClass.NON_ASCII_LETTER) for first, last in NON_ASCII_LETTER_RANGES]
        + [
            (first, last, CharClass.NON_ASCII_PUNCTUATION)
            for first, last in NON_ASCII_PUNCTUATION_RANGES
        ]
    )
)


def _bmp_classes() -> bytes:
    classes = bytearray(ASCII_CLASSES) + bytes([CharClass.OTHER]) * (0x10000 - len(ASCII_CLASSES))
    for first, last, char_class in RANGES:
        classes[first : last + 1] = bytes([char_class]) * (last + 1 - first)
    return bytes(classes)


# Of every code point below 0x10000; all others are OTHER.
BMP_CLASSES = _bmp_classes()

VISIBLE = frozenset(
    {
        CharClass.LETTER,
        CharClass.DIGIT,
        CharClass.PUNCTUATION,
        CharClass.UNDERSCORE,
        CharClass.APOSTROPHE,
        CharClass.SLASH,
        CharClass.NON_ASCII_LETTER,
        CharClass.NON_ASCII_PUNCTUATION,
    }
)
WHITESPACE = frozenset({CharClass.SPACE, CharClass.TAB, CharClass.RETURN, CharClass.NEWLINE})


def class_of(char: str) -> CharClass:
    """Return the class of a character, without what its left neighbour adds."""
    point = ord(char)
    return CharClass(BMP_CLASSES[point]) if point < len(BMP_CLASSES) else CharClass.OTHER
