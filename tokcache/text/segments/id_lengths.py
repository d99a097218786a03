"""The length in bytes of each token id's text, where it is certain.

Segments of a text can then be encoded together without a separator: the lengths show where the ids
of each segment end. An id that crosses such a place shows that the cut was wrong.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tokcache.text import _implementation as implementation
from tokcache.text.engines.components import (
    BYTE_NAME,
    BYTE_NAMES,
    MARKER,
    MARKS_BLANKS,
    has_all_bytes,
    stages_of,
)
from tokcache.text.engines.fast import agreed_code_points

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.text._implementation import CodePoints, IdLengths
    from tokcache.text.cuts.plan import Variant

__all__ = ["id_lengths"]

_AFTER_LATIN_1 = 0x100
_VOWELS = "\u09be\u09d7\u0bbe\u0bd7"  # the only code points that compose without being marks
_N_SAMPLES = 500


def id_lengths(own: Tokenizer, variant: Variant, known: Mapping[int, bytes]) -> IdLengths | None:
    """Return the lengths of the ids that `own`, made for `variant`, encodes texts to.

    None if tokens may not contain all bytes of a text, or are not known to. `known` are the bytes
    of tokens from another encoder; they are used if a sample of them is right.

    Cost: a pass over `known`; any other id is looked up when it first occurs.
    """
    model = own.model
    if not isinstance(model, BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    has = model.token_to_id
    normalizers = stages_of(json.loads(variant.normalizer))
    stages = stages_of(json.loads(variant.pre_tokenizer))
    if _is_byte_level(normalizers, stages):
        if any(has(char) is None for char in ByteLevel.alphabet()):
            return None
        exact = partial(_unchanged_by_nfc, implementation.CodePoints) if normalizers else None
        return _made(own, len, exact, known, len)
    # The marker must be a token, or it would be encoded as bytes itself. No merge may make the
    # token of a byte from the characters of its name.
    halves = ((name[:at], name[at:]) for name in BYTE_NAMES for at in range(1, len(name)))
    if (
        _is_marked(normalizers, stages)
        and has(MARKER) is not None
        and has_all_bytes(model)
        and not any(has(left) is not None and has(right) is not None for left, right in halves)
    ):
        exact = partial(_all_but_marker, implementation.CodePoints)
        return _made(own, _marked_length, exact, known, _unmarked_length)
    return None


def _made(
    own: Tokenizer,
    length_of_token: Callable[[str], int],
    exact: Callable[[], CodePoints] | None,
    known: Mapping[int, bytes],
    length_of_bytes: Callable[[bytes], int],
) -> IdLengths | None:
    in_model = own.model.id_to_token
    added: dict[int, int] = {}
    for index, one in own.get_added_tokens_decoder().items():
        n_bytes, token = len(one.content.encode()), in_model(index)
        if token is not None and length_of_token(token) != n_bytes:
            return None  # one id for two strings
        is_unsure = one.lstrip or one.rstrip or _is_changed(own, one)
        added[index] = 0 if is_unsure else n_bytes

    def length_of(index: int) -> int:
        if index in added:
            return added[index]
        token = in_model(index)
        return 0 if token is None else length_of_token(token)

    made = implementation.IdLengths(
        2 * own.get_vocab_size(with_added_tokens=True), length_of, exact
    )
    lengths = [
        length_of_bytes(known.get(index, b"")) for index in range(max(known, default=-1) + 1)
    ]
    for index in added.keys() & set(range(len(lengths))):
        lengths[index] = length_of(index)
    step = max(1, len(lengths) // _N_SAMPLES)
    if all(length_of(index) == lengths[index] for index in range(0, len(lengths), step)):
        made.fill(lengths)
    return made


def _is_changed(own: Tokenizer, token: Any) -> bool:
    """Return whether an added token may stand for other characters than those of its content."""
    if not token.normalized or own.normalizer is None:
        return False
    return MARKER in token.content or own.normalizer.normalize_str(token.content) != token.content


def _is_byte_level(normalizers: list[Any], stages: list[Any]) -> bool:
    """Return whether each character of a token is one byte of the text, and no byte is lost."""
    of_bytes = [one for one in stages if one["type"] == "ByteLevel"]
    return (
        all(one["type"] == "NFC" for one in normalizers)
        and len(of_bytes) == 1
        and not of_bytes[0]["add_prefix_space"]
        and all(one in of_bytes or _keeps_all(one) for one in stages)
    )


def _is_marked(normalizers: list[Any], stages: list[Any]) -> bool:
    """Return whether spaces become markers, and nothing else changes."""
    if normalizers == [MARKS_BLANKS]:
        return all(map(_keeps_all, stages))
    is_metaspace = len(stages) == 1 and stages[0]["type"] == "Metaspace"
    return (
        not normalizers
        and is_metaspace
        and stages[0]["replacement"] == MARKER
        and stages[0]["prepend_scheme"] == "never"
    )


def _keeps_all(stage: Any) -> bool:
    is_split = stage["type"] in ("Split", "Punctuation")
    return stage["type"] == "Digits" or (is_split and stage["behavior"] != "Removed")


def _marked_length(token: str) -> int:
    if token in BYTE_NAMES:
        return 1
    # In a longer token, a name may stand for its byte or for itself.
    return 0 if BYTE_NAME.search(token) else len(token.replace(MARKER, " ").encode())


def _unmarked_length(token: bytes) -> int:
    return len(token.replace(MARKER.encode(), b" "))


@cache
def _all_but_marker(kind: type[CodePoints]) -> CodePoints:
    return kind([(0, ord(MARKER) - 1), (ord(MARKER) + 1, sys.maxunicode)])


@cache
def _unchanged_by_nfc(kind: type[CodePoints]) -> CodePoints:
    """Return code points that NFC leaves unchanged, whichever of them are adjacent.

    They are Latin-1, and the code points on which all versions of Unicode agree, except marks,
    vowel signs that compose with the character before them, and code points that NFC replaces.
    """
    fixed = [(0, _AFTER_LATIN_1 - 1)]
    for first, last in agreed_code_points():
        points = range(max(first, _AFTER_LATIN_1), last + 1)
        if points and _are_fixed(points):
            fixed.append((points[0], last))
        else:
            fixed += [(point, point) for point in points if _are_fixed([point])]
    return kind(fixed)


def _are_fixed(points: Sequence[int]) -> bool:
    chars = [*map(chr, points)]
    return (
        unicodedata.is_normalized("NFC", "\n".join(chars))  # none adjacent to another
        and not any(map(unicodedata.combining, chars))
        and not any(map(_VOWELS.__contains__, chars))
    )
