"""The added tokens that separate a text, the cuts they forbid, and when they forbid every cut.

The tokenizers library finds added tokens in two phases: first those that are not `normalized`, in
the raw text; then the others, in the normalised pieces of text between them. Without a normalizer
the scanner finds the tokens of both phases in one pass over the raw text, provided that the order
of the phases makes no difference. With one, it leaves the second phase to the library, which finds
those tokens inside the segments that it encodes (`second_phase`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from tokcache.text.cuts.char_classes import WHITESPACE, class_of
from tokcache.text.cuts.plan import Separator
from tokcache.text.cuts.rules import DIGITS, LETTERS, WHITESPACE_LEFT, C, Pair, pairs_in_any
from tokcache.text.engines.copying import free_edge

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_LONGEST_TOKEN = 256  # characters; a text may match almost all of a long one at every position
_MAX_SUBSTRINGS = 2_000_000  # substrings of added tokens that are compared with each other
_MAYBE_WORDS = LETTERS | DIGITS | {C.UNDERSCORE, C.NON_ASCII_PUNCTUATION, C.OTHER}


@dataclass(frozen=True, slots=True)
class Phases:
    """The added tokens by the phase that finds them: in raw text, or in normalised pieces."""

    raw: list[AddedToken]
    normalized: list[AddedToken]
    ids: dict[str, int]  # by content

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Phases:
        """Return the added tokens of a tokenizer, each phase in the order of ids."""
        phases = cls([], [], {})
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items()):
            (phases.normalized if token.normalized else phases.raw).append(token)
            phases.ids[token.content] = index
        return phases

    @property
    def all(self) -> list[AddedToken]:
        """The tokens of both phases."""
        return self.raw + self.normalized


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no text of a tokenizer may be cut: the reason that is counted, and a sentence."""

    reason: str
    sentence: str


def why_no_cuts(
    phases: Phases, contents: Sequence[list[str]], *, is_normalized: bool
) -> Refusal | None:
    """Return why added tokens make every cut unsafe, None if they don't.

    `contents` are those of the second phase, as the normalizer of each variant makes them.
    """
    refusal = _why_not_found(phases, is_normalized=is_normalized)
    if refusal is not None or not phases.normalized:
        return refusal
    if not is_normalized:
        first, second = (
            [token.content for token in each] for each in (phases.raw, phases.normalized)
        )
        if _meet(first, second) or _meet(second, first):
            return Refusal("added_tokens_overlap", "added tokens of the two phases may overlap")
        return None
    if any(len(set(one)) < len(one) for one in contents):  # which of them a copy finds is random
        sentence = "two added tokens are equal once normalised"
        return Refusal("normalized_tokens_alike", sentence)
    return None


def _why_not_found(phases: Phases, *, is_normalized: bool) -> Refusal | None:
    """Return why the scanner can't find added tokens as the library does, None if it can."""
    tokens = phases.raw if is_normalized else phases.all
    if any(len(token.content) > _LONGEST_TOKEN for token in tokens):
        return Refusal(
            "long_added_token", f"an added token is longer than {_LONGEST_TOKEN} characters"
        )
    if free_edge(phases.all) is None:
        return Refusal(
            "no_separator",
            "added tokens hold every character with which a separator could begin",
        )
    takes_whitespace = any(token.lstrip or token.rstrip for token in tokens)
    if takes_whitespace and any(token.content != token.content.strip() for token in tokens):
        return Refusal(
            "added_tokens_overlap",
            "an added token includes the whitespace next to it, which may belong to another one",
        )
    return None


def separators(
    tokenizer: Tokenizer, phases: Phases, *, is_normalized: bool
) -> tuple[Separator, ...]:
    """Return the added tokens that the scanner finds in a raw text."""
    found = phases.raw + ([] if is_normalized else phases.normalized)
    contents = [token.content for token in found]
    overlapped = _overlapped(contents)
    is_nested = any(b.startswith(a) for a, b in pairwise(sorted(contents)))
    skip = tokenizer.encode_special_tokens
    # The scanner ends a piece at each token of the second phase. The library does not, so the last
    # character of such a token is a neighbour of the next token. That makes a difference only if
    # the character may belong to a word; then no token counts as `in_piece`.
    ends = {*map(class_of, {token.content[-1] for token in phases.normalized})}
    in_second = set() if ends & _MAYBE_WORDS else {id(token) for token in phases.normalized}
    return tuple(
        Separator(
            content=token.content,
            id=phases.ids[token.content],
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            in_piece=id(token) in in_second,
            skips=skip and token.special,
            opens=not (
                token.lstrip
                or token.single_word
                or (skip and token.special)
                or token.content in overlapped
                or is_nested
            ),
        )
        for token in found
    )


def without_unsafe(pairs: set[Pair], tokens: Sequence[Separator]) -> set[Pair]:
    """Return the pairs without those at which an added token makes a cut unsafe."""
    pairs = set(pairs)
    for one in tokens:
        first, last = class_of(one.content[0]), class_of(one.content[-1])
        if one.lstrip:  # it takes the whitespace before it: no cut in there
            pairs -= {(left, right) for left in WHITESPACE_LEFT for right in {first, *WHITESPACE}}
        if one.single_word:  # its neighbours decide whether it is found: no cut between
            pairs -= {(left, first) for left in C if left not in WHITESPACE_LEFT}
            ends = {last, C.NEWLINE_RUN} if last is C.NEWLINE else {last}
            pairs -= {(end, right) for end in ends for right in C if right not in WHITESPACE}
    return pairs - pairs_in_any(one.content for one in tokens if one.skips or one.single_word)


def pairs_inside(phases: Phases) -> set[Pair]:
    """Return the pairs of classes inside the tokens of the second phase."""
    return pairs_in_any(token.content for token in phases.normalized)


# ---- tokens that overlap


def _are_many(contents: Iterable[str]) -> bool:
    """Return whether the strings have too many substrings to compare them all."""
    return sum(len(content) ** 2 for content in contents) > _MAX_SUBSTRINGS


def _meet(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether one of `first` and one of `second` may overlap in some text.

    That is so if a text of `first` contains a text of `second`, or ends as one of them begins.
    """
    if first and second and _are_many([*first, *second]):
        return True
    prefixes = {text[:end] for text in second for end in range(1, len(text) + 1)}
    whole, begins = set(second), {text[0] for text in second}
    return any(
        text[start:end] in prefixes and (end == len(text) or text[start:end] in whole)
        for text in first
        for start in range(len(text))
        if text[start] in begins
        for end in range(start + 1, len(text) + 1)
    )


def _overlapped(contents: list[str]) -> set[str]:
    """Return the contents that may begin inside an occurrence of another one.

    It lies inside the other one, or begins with a suffix (`rest`) of it. The contents that begin
    with a suffix are a range of the sorted contents.
    """
    if _are_many(contents):
        return set(contents)
    ordered, whole = sorted(contents), set(contents)
    begins = {content[0] for content in contents}
    rests = {
        content[start:]
        for content in contents
        for start in range(1, len(content))
        if content[start] in begins
    }
    inside = {rest[:end] for rest in rests for end in range(1, len(rest) + 1)} & whole
    n_open = [0] * (len(ordered) + 1)  # at each index, the ranges that begin minus those that end
    for rest in rests:
        n_open[bisect_left(ordered, rest)] += 1
        n_open[bisect_right(ordered, rest, key=lambda one: one[: len(rest)])] -= 1
    goes_on = {one for one, n in zip(ordered, accumulate(n_open), strict=False) if n}
    return inside | goes_on
