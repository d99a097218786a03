"""The layout of an encoding: the special tokens around one or two texts, and the type ids.

The result of a post-processor of the tokenizers library depends only on the number of texts and on
whether special tokens are added. So a layout is learnt from a few texts and holds for all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Run:
    """`n_times` times the same value."""

    value: int
    n_times: int

    def __len__(self) -> int:
        return self.n_times


Segment = Collection[int] | Run
Segments = Sequence[Segment]

_PROBES = (("a", "b"), ("Hello, world", "a"), ("x 1 y", "Hello\nyou  there"))


@dataclass(frozen=True, slots=True)
class Piece:
    """One run of an encoding: the ids of text number `text`, or special tokens (None)."""

    text: int | None
    ids: tuple[int, ...]
    type_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of texts and special tokens; the piece of a text has no ids and one type id.

    The first and the last piece are special tokens, and may be empty.

    Units: `n_special` is the number of special tokens, `n_before` how many of them come first.
    """

    pieces: tuple[Piece, ...]
    n_special: int

    @property
    def n_before(self) -> int:
        """The number of special tokens before the first text."""
        return len(self.pieces[0].ids)

    @property
    def is_type_zero(self) -> bool:
        """Whether every type id is 0."""
        return not any(chain.from_iterable(piece.type_ids for piece in self.pieces))

    def segments(self, contents: Sequence[Collection[int]]) -> list[Collection[int]]:
        """Return the ids of the texts and of the special tokens, in order."""
        return [
            piece.ids if piece.text is None else contents[piece.text]
            for piece in self.pieces
            if piece.text is not None or piece.ids
        ]

    def type_ids(self, lengths: Sequence[int]) -> list[tuple[int, ...] | Run]:
        """Return the type ids of texts with these numbers of tokens."""
        return [
            piece.type_ids if piece.text is None else Run(piece.type_ids[0], lengths[piece.text])
            for piece in self.pieces
        ]

    def special_tokens_mask(self, lengths: Sequence[int]) -> list[Run]:
        """Return 1 for every special token, 0 for every token of the texts."""
        return [
            Run(1, len(piece.ids)) if piece.text is None else Run(0, lengths[piece.text])
            for piece in self.pieces
        ]


def learn(tokenizer: Tokenizer, n_texts: int, add_special_tokens: bool) -> Layout | None:
    """Return the layout of encodings of one or two texts; None if it differs between texts.

    Truncation and padding must be off in `tokenizer`.

    Cost: a few dozen microseconds.
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
    """Return the pieces of one encoding; None if they are not whole texts and special tokens."""
    # A batch would start threads, after which the children of a fork encode without threads.
    text, pair = texts if len(texts) > 1 else (texts[0], None)
    encoding = tokenizer.encode(text, pair, add_special_tokens=add_special_tokens)
    ids, types, sources = encoding.ids, encoding.type_ids, encoding.sequence_ids

    pieces = []
    for _, run in groupby(range(len(sources)), sources.__getitem__):
        places = list(run)
        source = sources[places[0]]
        mask = {encoding.special_tokens_mask[place] for place in places}
        piece_ids = tuple(ids[place] for place in places)
        type_ids = tuple(types[place] for place in places)
        if source is None:
            if mask != {1}:
                return None
            pieces.append(Piece(None, piece_ids, type_ids))
            continue
        alone = tokenizer.encode(texts[source], add_special_tokens=False).ids
        if mask != {0} or list(piece_ids) != alone or len(set(type_ids)) != 1:
            return None
        pieces.append(Piece(source, (), type_ids[:1]))

    if sorted(piece.text for piece in pieces if piece.text is not None) != [*range(len(texts))]:
        return None
    edge = Piece(None, (), ())
    first, last = pieces[0], pieces[-1]
    return (*[edge] * (first.text is not None), *pieces, *[edge] * (last.text is not None))
