"""Make the tables that derive cuts from patterns: `python tools/pattern_tables.py`.

1. `regex/properties.py`: the code points by the properties that a pattern may name, from the
   tokenizers library itself (`--properties`, about a minute).
2. `regex/known.py`: the cuts of every pattern in `patterns.py`.

With --check nothing is written, and the exit code is 1 if a table differs.
"""

from __future__ import annotations

import argparse
import base64
import struct
import sys
import textwrap
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from tokcache.text.cuts.char_classes import RANGES, CharClass, class_of

FOLDER = Path(__file__).resolve().parents[1] / "tokcache" / "text" / "cuts" / "regex"

_CATEGORIES = (
    "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn"
)
_SCRIPTS = (
    "Han Hiragana Katakana Hangul Latin Cyrillic Greek Arabic Hebrew Thai Devanagari Common "
    "Inherited Armenian Georgian Bengali Tamil Telugu Bopomofo Lao Khmer Myanmar Tibetan Ethiopic "
    "Mongolian Sinhala Gujarati Gurmukhi Kannada Malayalam Oriya"
)
_OTHERS = (
    "Alphabetic Uppercase Lowercase White_Space Emoji Ideographic Cntrl Graph Print Punct XDigit "
    "Alnum"
)
_LINE_CHARS = 100  # as in pyproject.toml
_NAMES = f"{_CATEGORIES} {_SCRIPTS} {_OTHERS}".split()


def _code_points() -> list[int]:
    """Return the code points that are looked at: all but the inside of the unassigned planes."""
    planes = [plane + offset for plane in range(0x40000, 0x110000, 0x10000) for offset in
              [*range(0x400), *range(0xFFF0, 0x10000)]]  # fmt: skip
    return [*range(0xD800), *range(0xE000, 0x33500), *planes]


def properties_module() -> str:
    """Return the text of `properties.py`."""
    points = _code_points()
    text = "".join(map(chr, points))
    changes: dict[int, int] = defaultdict(int)
    for bit, query in enumerate([*(rf"\p{{{name}}}" for name in _NAMES), r"\s", r"\w", r"\d", "."]):
        split = Split(Regex(f"(?:{query})+"), "removed", invert=True)
        for _, (start, stop) in split.pre_tokenize_str(text):
            changes[start] ^= 1 << bit
            changes[stop] ^= 1 << bit
    # An interval ends where a property or the class changes, before a composition and after it.
    composed = dict(_compositions())
    ends = {text.index(chr(point + more)) for point in composed for more in (0, 1)}
    ends |= {text.index(chr(end)) for first, last, _ in RANGES for end in (first, last + 1)}
    kinds: dict[tuple[int, int | None, CharClass], int] = {}
    intervals: list[tuple[int, int]] = []
    properties = 0
    for at in sorted({0, *changes, *ends} - {len(points)}):
        properties ^= changes.get(at, 0)
        kind = properties, composed.get(points[at]), class_of(text[at])
        intervals.append((points[at], kinds.setdefault(kind, len(kinds))))
    names = "\n".join(f'    "{line} "' for line in textwrap.wrap(" ".join(_NAMES).lower(), 88))
    return f'''"""Code points by the properties that a pattern may name, and compositions.

Made by tools/pattern_tables.py with tokenizers {tokenizers.__version__}.
"""

# The names of the properties that every interval is alike in, in lower case.
NAMES = (
{names}
)

# The first code point of every interval (<I), then the kind of every interval (<H). Characters of
# one kind have the same properties, beyond ASCII the same class of the rules, and the same class in
# COMPOSITIONS. Compressed, then base64.
INTERVALS = (
{_packed("I", "H", intervals)}
)

# The code points below 0x3100 that NFC makes of a character of a rule's class and marks after it
# (<H), then the class of each (B). Later ones are compositions of Hangul, or excluded from NFC.
COMPOSITIONS = (
{_packed("H", "B", _compositions())}
)
'''


def _packed(first: str, second: str, rows: Iterable[tuple[int, int]]) -> str:
    """Return the lines of a literal that holds two columns, one after the other."""
    firsts, seconds = zip(*rows, strict=True)
    n = len(firsts)
    packed = struct.pack(f"<{n}{first}{n}{second}", *firsts, *seconds)
    encoded = base64.b64encode(zlib.compress(packed, 9)).decode()
    return "\n".join(f'    "{line}"' for line in textwrap.wrap(encoded, 90))


def _compositions() -> Iterator[tuple[int, int]]:
    for point in range(0xC0, 0x3100):
        char = chr(point)
        parts = unicodedata.normalize("NFD", char)
        if parts != char and unicodedata.normalize("NFC", char) == char:
            own = class_of(parts[0])
            if own is not CharClass.OTHER:
                yield point, own


def known_module() -> str:
    """Return the text of `known.py`."""
    from tokcache.text.cuts.patterns import KNOWN  # noqa: PLC0415 (after properties.py is made)
    from tokcache.text.cuts.regex.safety import derive  # noqa: PLC0415

    rows = [f'    "{name}": "{derive(pattern).packed()}",' for name, pattern in KNOWN.items()]
    # A longer line is broken as `ruff format` breaks it.
    rows = [
        row if len(row) <= _LINE_CHARS else row.replace(": ", ": (\n        ")[:-1] + "\n    ),"
        for row in rows
    ]
    lines = "\n".join(rows)
    return f'''"""The cuts of the known patterns, packed; made by tools/pattern_tables.py.

Made with tokenizers {tokenizers.__version__}. They hold for others, too: the characters of the
rules' classes have had their properties since Unicode 3.2.
"""

RESULTS = {{
{lines}
}}
'''


def _write(name: str, text: str, *, check: bool) -> bool:
    """Write a module, or compare it with `check`; return whether it differed."""
    path = FOLDER / name
    differs = not path.exists() or path.read_text() != text
    if differs and not check:
        path.write_text(text)
        print(f"wrote {path.name}")
    elif differs:
        print(f"{path.name} is out of date", file=sys.stderr)
    return differs


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--properties", action="store_true", help="make properties.py, too")
    options = parser.parse_args(None if arguments is None else list(arguments))
    differs = False
    if options.properties:
        differs = _write("properties.py", properties_module(), check=options.check)
    differs |= _write("known.py", known_module(), check=options.check)
    return 1 if options.check and differs else 0


if __name__ == "__main__":
    sys.exit(main())
