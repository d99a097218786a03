"""The cut plan of one tokenizer: everything that the segment cache knows about the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache.text.cuts.char_classes import N_CLASSES, CharClass

if TYPE_CHECKING:
    from tokcache.text.cuts.rules import Affixes, Rule

VOCABULARY_PROOF = ("model", "BPE without a pre-tokenizer, the vocabulary as proof")


@dataclass(frozen=True, slots=True)
class Separator:
    """An added token that is found in the raw text and separates the text on its two sides.

    `lstrip`, `rstrip` and `single_word` are its flags. A token that is `in_piece` is found in the
    second phase, so its neighbours are the characters in its piece of the text. A token that
    `skips` is ordinary text, because of `encode_special_tokens`. A chunk may begin with a token
    that `opens`, whatever text stands before it.
    """

    content: str
    id: int
    lstrip: bool
    rstrip: bool
    single_word: bool
    in_piece: bool
    skips: bool
    opens: bool


@dataclass(frozen=True, slots=True)
class Variant:
    """The components that encode the segments of one kind, as JSON."""

    normalizer: str
    pre_tokenizer: str


@dataclass(frozen=True, slots=True)
class CutPlan:
    """The cuts that are safe for a tokenizer, and how the text between them is encoded.

    `off` is the reason why no text may be cut at all, or None. `refused` are sentences that say
    why components allow no cuts; `recognised` are pairs (part, name) of components.

    `coarse`, `fine` and `seams` are tables of 0 and 1, one byte for a pair of classes, at
    `left * N_CLASSES + right`. Chunks begin and end at coarse cuts, which also hold next to any
    added token. Fine cuts hold only in a text whose added tokens were found. Two segments that
    are not neighbours in their text may be joined for encoding at a pair of `seams`.

    `variants` are the distinct ways to encode a segment. `variant_of` has the index of the one
    for a segment at the beginning of a text, after an added token, and at a cut. With the variant
    for cuts, a space and a segment have the ids that the segment alone has with `space_variant`;
    -1 if there is no such variant. `affixes` are the ids put around a text without and with
    special tokens, or None where they are unknown.
    """

    off: str | None
    rules: tuple[Rule, ...] = ()
    refused: tuple[str, ...] = ()
    recognised: tuple[tuple[str, str], ...] = ()
    coarse: bytes = bytes(N_CLASSES * N_CLASSES)
    fine: bytes = bytes(N_CLASSES * N_CLASSES)
    seams: bytes = bytes(N_CLASSES * N_CLASSES)
    separators: tuple[Separator, ...] = ()
    variants: tuple[Variant, ...] = ()
    variant_of: tuple[int, int, int] = (0, 0, 0)
    space_variant: int = -1
    affixes: tuple[Affixes | None, ...] = (None, None)

    @property
    def piece_left(self) -> CharClass:
        """The class that is assumed on the left of a text, or of the text after an added token.

        A newline at the beginning counts as a newline after a visible character, unless the
        tokenizer puts something before the text.
        """
        return CharClass.LETTER if len(self.variants) == 1 else CharClass.OTHER

    def allows(self, left: CharClass, right: CharClass, *, fine: bool = True) -> bool:
        """Return whether a text may be cut between characters of these classes."""
        return bool((self.fine if fine else self.coarse)[left * N_CLASSES + right])
