"""What a tokenizer's post-processor puts around the ids of a text, or of two; learnt from itself.

A post-processor of the tokenizers library looks at how many texts there are and whether special
tokens are wanted, at nothing else: what it did to a few texts it does to all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True, slots=True)
class Run:
    """The same value so many times."""

    value: int
    n_times: int

    def __len__(self) -> int:
        return self.n_times


Segment = Collection[int] | Run
Segments = Sequence[Segment]

_PROBES = (("a", "b"), ("Hello, world", "a"), ("x 1 y", "Hello\nyou  there"))


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of an encoding: the ids of text number `text`, or special tokens (None)."""

    text: int | None
    ids: tuple[int, ...]
    type_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of texts and special tokens; a text's own piece has no ids and one type id.

    Units: `n_special` token ids beside those of the texts, `n_before` of them at the beginning.
    """

    pieces: tuple[Piece, ...]
    n_special: int

    @property
    def n_before(self) -> int:
        """Return how many special tokens come before the first text."""
        return len(self.pieces[0].ids)

    @property
    def n_after(self) -> int:
        """Return how many special tokens come after the last text."""
        return len(self.pieces[-1].ids)

    @property
    def is_type_zero(self) -> bool:
        """Return whether every type id is 0."""
        return not any(chain.from_iterable(piece.type_ids for piece in self.pieces))

    def segments(self, contents: Sequence[Collection[int]]) -> list[Collection[int]]:
        """Return the ids of the texts and what stands around them, in order."""
        return [
            piece.ids if piece.text is None else contents[piece.text]
            for piece in self.pieces
            if piece.text is not None or piece.ids
        ]

    def type_ids(self, lengths: Sequence[int]) -> list[tuple[int, ...] | Run]:
        """Return the type ids of texts that have so many tokens."""
        return [
            piece.type_ids if piece.text is None else Run(piece.type_ids[0], lengths[piece.text])
            for piece in self.pieces
        ]

    def special_tokens_mask(self, lengths: Sequence[int]) -> list[Run]:
        """Return 1 for every special token that was added, 0 for the others."""
        return [
            Run(1, len(piece.ids)) if piece.text is None else Run(0, lengths[piece.text])
            for piece in self.pieces
        ]


def learn(tokenizer: Tokenizer, n_texts: int, add_special_tokens: bool) -> Layout | None:
    """Return the layout of encodings of one or two texts; None if it is not the same for all.

    Cost: a few dozen microseconds. `tokenizer` must have neither truncation nor padding.
    """
    found = {_read(tokenizer, probe[:n_texts], add_special_tokens) for probe in _PROBES}
    pieces = found.pop()
    if found or pieces is None:
        return None
    n_special = sum(len(piece.ids) for piece in pieces)
    n_declared = tokenizer.num_special_tokens_to_add(n_texts > 1) if add_special_tokens else 0
    return Layout(pieces, n_special) if n_special == n_declared else None


def _read(
    tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool
) -> tuple[Piece, ...] | None:
    # `encode`, not a batch: a batch starts threads, and after that forked children stay serial.
    text, pair = texts if len(texts) > 1 else (texts[0], None)
    encoding = tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)
    pieces = [_piece(encoding, places) for places in _runs(encoding)]
    if sorted(piece.text for piece in pieces if piece.text is not None) != [*range(len(texts))]:
        return None
    alone = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    if not all(_is_regular(piece, alone) for piece in pieces):
        return None
    regular = [piece if piece.text is None else _without_ids(piece) for piece in pieces]
    edge = Piece(None, (), ())  # so that the first and the last piece are special tokens
    first, last = regular[0], regular[-1]
    return (*[edge] * (first.text is not None), *regular, *[edge] * (last.text is not None))


def _runs(encoding: Encoding) -> list[list[int]]:
    sources = encoding.sequence_ids
    return [list(places) for _, places in groupby(range(len(sources)), sources.__getitem__)]


def _piece(encoding: Encoding, places: list[int]) -> Piece:
    mask = {encoding.special_tokens_mask[place] for place in places}
    text = encoding.sequence_ids[places[0]]
    ids, types = encoding.ids, encoding.type_ids
    is_marked = mask == ({1} if text is None else {0})
    return Piece(
        text if is_marked else -1,
        tuple(ids[place] for place in places),
        tuple(types[place] for place in places),
    )


def _is_regular(piece: Piece, alone: list[list[int]]) -> bool:
    if piece.text is None:
        return True
    return list(piece.ids) == alone[piece.text] and len(set(piece.type_ids)) == 1


def _without_ids(piece: Piece) -> Piece:
    return Piece(piece.text, (), piece.type_ids[:1])
