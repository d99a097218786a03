"""The character classes between which the rules allow cuts, and the class of each character.

The classes are narrow on purpose. A character that another normalizer, pattern or Unicode version
could treat differently is `OTHER`, and no text is ever cut next to such a character.
"""

from __future__ import annotations

from enum import IntEnum

N_CLASSES = 16


class CharClass(IntEnum):
    """The class of the character on one side of a cut.

    NEWLINE_RUN and TOKEN_END occur on the left only.
    """

    OTHER = 0
    LETTER = 1  # a-z, A-Z
    DIGIT = 2  # 0-9
    PUNCTUATION = 3  # the other visible ASCII characters, without those of STOP
    UNDERSCORE = 4
    APOSTROPHE = 5
    SLASH = 6
    SPACE = 7
    TAB = 8
    RETURN = 9
    NEWLINE = 10  # on the left of a cut: a newline that follows a visible character
    NON_ASCII_LETTER = 11  # letters of the scripts in `NON_ASCII_LETTER_RANGES`
    NON_ASCII_PUNCTUATION = 12  # `NON_ASCII_PUNCTUATION_RANGES`
    NEWLINE_RUN = 13  # a newline that follows whitespace
    TOKEN_END = 14  # the last character of an added token, of any class
    STOP = 15  # . , ! ? ( ) |, which BLOOM's pattern does not match


# Letters since Unicode 3.2, of combining class 0: NFC turns each of them into letters only, and
# none of them combines with a space or a punctuation character that follows it.
NON_ASCII_LETTER_RANGES: tuple[tuple[int, int], ...] = (
    (0x00C0, 0x00D6),
    (0x00D8, 0x00F6),
    (0x00F8, 0x012F),
    (0x0131, 0x017E),  # without the dotted capital I: its lower case is two characters
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

# Punctuation since Unicode 3.2 with which no composition begins or ends.
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
    **dict.fromkeys(".,!?()|", CharClass.STOP),
}


# (first, last, class) of each non-ASCII range, in order of code points.
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
    classes = bytearray([CharClass.OTHER]) * 0x10000
    for point in range(ord("!"), ord("~") + 1):
        char = chr(point)
        if char.isalpha():
            classes[point] = CharClass.LETTER
        else:
            classes[point] = CharClass.DIGIT if char.isdigit() else CharClass.PUNCTUATION
    for char, char_class in _SINGLE.items():
        classes[ord(char)] = char_class
    for first, last, char_class in RANGES:
        classes[first : last + 1] = bytes([char_class]) * (last + 1 - first)
    return bytes(classes)


_MEMBERS = tuple(CharClass)  # a look-up by number, ten times as fast as a call of the class

# The class of every code point below 0x10000; every code point above it is OTHER.
BMP_CLASSES = _bmp_classes()
ASCII_CLASSES = BMP_CLASSES[:128]

VISIBLE = frozenset(
    {
        CharClass.LETTER,
        CharClass.DIGIT,
        CharClass.PUNCTUATION,
        CharClass.STOP,
        CharClass.UNDERSCORE,
        CharClass.APOSTROPHE,
        CharClass.SLASH,
        CharClass.NON_ASCII_LETTER,
        CharClass.NON_ASCII_PUNCTUATION,
    }
)
WHITESPACE = frozenset({CharClass.SPACE, CharClass.TAB, CharClass.RETURN, CharClass.NEWLINE})


def class_of(char: str) -> CharClass:
    """Return the class of a character, whatever its left neighbour is: never NEWLINE_RUN."""
    point = ord(char)
    return _MEMBERS[BMP_CLASSES[point]] if point < len(BMP_CLASSES) else CharClass.OTHER
