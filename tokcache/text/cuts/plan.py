"""The plan of the cuts for one tokenizer: everything that the segment cache knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache.text.cuts.char_classes import N_CLASSES, CharClass

if TYPE_CHECKING:
    from tokcache.text.cuts.rules import Affixes, Rule

VOCABULARY_PROOF = ("model", "BPE without a pre-tokenizer, the vocabulary as proof")


@dataclass(frozen=True, slots=True)
class Separator:
    """An added token that is found in the raw text and separates what stands around it.

    `skips` says that it is passed over and becomes text (`encode_special_tokens`); `opens` that a
    chunk may begin with it whatever stands before.
    """

    content: str
    id: int
    lstrip: bool
    rstrip: bool
    single_word: bool
    in_piece: bool  # found in the second phase: its neighbours are those in its piece
    skips: bool
    opens: bool


@dataclass(frozen=True, slots=True)
class Variant:
    """The components that encode a part of a text, as JSON."""

    normalizer: str
    pre_tokenizer: str


@dataclass(frozen=True, slots=True)
class CutPlan:
    """The cuts that are safe for a tokenizer, and how the text between them is encoded.

    `off` is the reason why no text may be cut at all, else None. `coarse` and `fine` are rows of
    bytes, [left * N_CLASSES + right]; fine cuts are looked for only where added tokens were found,
    coarse ones hold next to any added token. `variants` encode a part that begins the text, one
    after an added token and one at a cut; equal ones are listed once, `variant_of` names each
    one's. Parts that don't stand side by side may be joined at a pair of `seams`; the variant for
    cuts encodes a space and a part as `blank_variant` the part alone (-1: there is no such
    variant). `affixes` are the ids put before and after a text, by add_special_tokens, or None if
    unknown.
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
    blank_variant: int = -1
    affixes: tuple[Affixes | None, ...] = (None, None)

    @property
    def piece_left(self) -> CharClass:
        """The class taken to stand before a piece.

        A newline that begins one is like a newline after a visible character, unless something
        is put before the piece.
        """
        return CharClass.LETTER if len(self.variants) == 1 else CharClass.OTHER

    def allows(self, left: CharClass, right: CharClass, *, fine: bool = True) -> bool:
        """Return whether a text may be cut between characters of these classes."""
        return bool((self.fine if fine else self.coarse)[left * N_CLASSES + right])
