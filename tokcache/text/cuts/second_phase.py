"""The cuts that are safe although added tokens are searched for in the normalised text.

The scanner does not see those tokens: the library finds them in each segment, as it would in the
whole text, if four things hold.

1. The normalised form of a text is that of its two sides, one after the other. The rules of the
   normalizer already say so: see `normalizers`.
2. No token lies across the cut. Then each match is inside one side, and of matches that overlap
   the library chooses the same ones (leftmost, then longest) on each side alone.
3. No flag looks over the cut: `single_word` at the character next to a token, `lstrip` and `rstrip`
   at the whitespace next to it.
4. The variants of the components find the same tokens, and put nothing before a text that follows
   such a token inside a segment.

2. and 3. are about characters of the normalised text, and cuts are chosen by those of the raw text:
`Normalizer.left_of` and `right_of` say which classes may become a given character.
"""

from __future__ import annotations

from itertools import chain, compress, pairwise, product
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from tokcache.text.cuts.char_classes import WHITESPACE
from tokcache.text.cuts.rules import NON_ASCII, WHITESPACE_LEFT, C, Pair
from tokcache.text.engines.copying import normalized_forms, with_components

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokcache.text.cuts.normalizers import Normalizer
    from tokcache.text.cuts.plan import Variant

_SOUGHT = "added tokens are searched for in the normalised text"
_ENDS = "cuts at added tokens of the raw text only"


def normalized_contents(tokens: Sequence[Any], variants: Sequence[Variant]) -> list[list[str]]:
    """Return the contents of tokens as the normalizer of each variant makes them.

    The first list is that of a whole text; normalizers that are equal make one list.
    """
    states = dict.fromkeys(one.normalizer for one in variants)
    normalizers = [with_components(normalizer=state).normalizer for state in states]
    contents = [token.content for token in tokens]
    return [normalized_forms(one, contents) for one in normalizers]


def why_no_cut_inside(
    contents: Sequence[list[str]],
    normalizer: Normalizer,
    variants: tuple[Variant, Variant, Variant],
) -> str | None:
    """Return why no cut is safe except at the added tokens of the raw text, None if some are.

    `contents` as `normalized_contents` returns those of the tokens of the second phase; `variants`
    as `affixes.find_variants` returns them.
    """
    if not normalizer.is_read:
        return f"{_SOUGHT}, and a precompiled map may make any character of them: {_ENDS}"
    if any(other != contents[0] for other in contents):
        return f"{_SOUGHT}, which begins with more than the text itself: {_ENDS}"
    _, later, inside = variants
    if later.pre_tokenizer != inside.pre_tokenizer:
        return f"{_SOUGHT}, and the text after each of them begins with a space put there: {_ENDS}"
    return None


def unsafe_pairs(tokens: Sequence[Any], contents: Sequence[str], reading: Normalizer) -> set[Pair]:
    """Return the pairs of classes at which a token of the second phase makes a cut unsafe.

    `contents` are those of the tokens, normalised.

    Cost: a pass over them.
    """
    found: set[Pair] = set()
    for left, right in set(chain.from_iterable(map(pairwise, contents))):
        found |= set(product(reading.left_of(left), reading.right_of(right)))

    # A character of a class that is padded may become whitespace at either end.
    padded = NON_ASCII if reading.pads_non_ascii else frozenset[C]()
    before, after = WHITESPACE_LEFT | padded, WHITESPACE | padded
    for flag in ("lstrip", "rstrip", "single_word"):
        is_flagged = map(attrgetter(flag), tokens)
        flagged = [one for one in compress(contents, is_flagged) if one]
        if not flagged:
            continue
        firsts = set[C]().union(*map(reading.right_of, {one[0] for one in flagged}))
        lasts = set[C]().union(*map(reading.left_of, {one[-1] for one in flagged}))
        if flag == "lstrip":  # it takes the whitespace before it: no cut in there
            found |= set(product(before, firsts | after))
        elif flag == "rstrip":
            found |= set(product(lasts | before, after))
        else:  # its neighbours decide whether it is found: no cut between
            found |= {
                (left, right) for left in C for right in firsts if left not in WHITESPACE_LEFT
            }
            found |= {(left, right) for left in lasts for right in C if right not in WHITESPACE}
    return found
