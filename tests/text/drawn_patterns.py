"""Random patterns of Split, texts for them, and a plain matcher that runs their automaton."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from tokcache.text.cuts.char_classes import class_of
from tokcache.text.cuts.regex.automaton import HERE, Program

if TYPE_CHECKING:
    from tokcache.text.cuts.regex.alphabet import Alphabet

# Characters of every class in the rules, and some that patterns treat apart.
CHARS = "asStT1.,(-_'/ \t\r\n\xe9\u4e2d\u3042\u2019\u3002\u0301\xa0\xbd\x0b\u017f\u0130\U0001f600$"
FEW = "as1.' \n\u4e2d\xe9"

_ATOMS = (
    *[r"\p{L}", r"\p{N}", r"\p{P}", r"\s", r"\S", r"\d", r"\w", r"[^\s\p{L}\p{N}]", r"[\r\n]"],
    *[r"[^\r\n\p{L}\p{N}]", r"[A-Za-z]", r"[\p{L}&&[^\p{Han}]]", r"[^(\s|[.,])]", r"\p{Lu}"],
    *[r"[\p{Ll}\p{M}]", "[\u4e00-\u9fa5\u3040-\u309f]", ".", "a", "s", " ", "'", r"\n", r"\.", "1"],
    *[r"[[:punct:]]", "(?i:s)", "(?i:[sdmt])", r"\r?\n", "'s", "(?i:'s|'re)", r"[^\n]", r"\x{20}"],
)
_QUANTIFIERS = ("", "", "", "+", "+", "*", "?", "{1,3}", "{2}", "+?", "*?", "??", "{2,}", "{,2}")
_ONE_CHAR_ONLY = ("++", "*+", "?+")
_AFTER_INTERVAL = ("{1,3}+", "{2}?", "{1,2}?", "{2}+")
_CONDITIONS = (
    *[r"(?!\S)", r"(?=\s)", "$", r"\b", r"(?!\p{L})", r"(?=(?:\d{3})*\b)", r"(?!\r?\n)"],
    *[r"(?=\s*[\r\n])", r"(?!a+s)", r"\B", r"\z", r"(?=\d\d(?!\d))", "^"],
)


def pattern(rng: random.Random) -> str:
    """Return a random pattern; the library or the parser may refuse it."""
    return "|".join(_row(rng, 0) for _ in range(rng.choice((1, 1, 2, 2, 3, 4))))


def _row(rng: random.Random, depth: int) -> str:
    parts = [_part(rng, depth) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    if rng.random() < 0.25:
        parts.insert(rng.randint(1 if rng.random() < 0.8 else 0, len(parts)), _condition(rng))
    return "".join(parts)


def _condition(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(_CONDITIONS)
    return f"({rng.choice(('?=', '?!'))}{_row(rng, 2)})"


def _part(rng: random.Random, depth: int) -> str:
    if depth < 2 and rng.random() < 0.15:
        inner = "|".join(_row(rng, depth + 1) for _ in range(rng.choice((1, 2))))
        return f"(?:{inner}){rng.choice(_QUANTIFIERS)}"
    atom = rng.choice(_ATOMS)
    draw = rng.random()
    if draw < 0.08 and (len(atom) == 1 or atom[0] in "\\[") and atom != r"\r?\n":
        return atom + rng.choice(_ONE_CHAR_ONLY)
    if draw < 0.14:
        return f"(?:{atom}){rng.choice(_AFTER_INTERVAL)}"
    if (len(atom) > 1 and atom[0] not in "\\[") or atom == r"\r?\n":
        atom = f"(?:{atom})"
    return atom + rng.choice(_QUANTIFIERS)


def text(rng: random.Random, low: int = 1, high: int = 9) -> str:
    """Return a short random text."""
    return "".join(rng.choices(rng.choice((CHARS, FEW)), k=rng.randint(low, high)))


def symbol_of(alphabet: Alphabet, char: str) -> int:
    """Return the symbol of a character: that of a sample in exactly the same classes."""
    if char in alphabet.samples:
        return alphabet.samples.index(char)
    held = [
        (mask, bool(Split(Regex(query), "removed", invert=True).pre_tokenize_str(char)))
        for query, mask in alphabet.chars.items()
    ]
    (found, *_) = (
        symbol
        for symbol, sample in enumerate(alphabet.samples)
        if class_of(sample) is class_of(char)
        and all(bool(mask >> symbol & 1) is is_held for mask, is_held in held)
    )
    return found


def matches(program: Program, text: str) -> Iterator[tuple[int, int]]:
    """Yield the place of each match in a text."""
    symbols = [symbol_of(program.alphabet, char) for char in text]
    start = 0
    while start < len(text):
        state, at, stop = program.start, start, None
        ends: list[int] = []  # the places of the ends that the state numbers
        while state.threads and at <= len(text):
            step = program.step(state, symbols[at] if at < len(text) else program.end_of_text)
            if step.end is not None:
                stop = at if step.end == HERE else ends[step.end]
            ends = [at if end == HERE else ends[end] for end in step.ends]
            state = step.state
            at += 1
        if stop is None:
            start += 1
        else:
            yield start, stop
            start = stop
