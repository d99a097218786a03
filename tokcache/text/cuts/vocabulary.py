"""The cuts that a BPE vocabulary proves where nothing else forces one: no token spans the pair."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers.models import BPE

from tokcache.text.cuts.char_classes import VISIBLE, CharClass, class_of
from tokcache.text.cuts.plan import VOCABULARY_PROOF
from tokcache.text.cuts.rules import NON_ASCII, C, Findings, Pair, Rule, pairs_in
from tokcache.text.engines.components import BYTE_NAME, BYTE_NAMES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.text.cuts.normalizers import Normalizer


def cuts_of_vocabulary(tokenizer: Tokenizer, normalizer: Normalizer) -> Findings:
    """Return the pairs that no token of a tokenizer without a pre-tokenizer spans.

    Cost: a pass over the vocabulary.
    """
    if normalizer.replaced or normalizer.composes:
        return proves_none("the normalizer makes one character of several")
    model = tokenizer.model
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    why = _why_merges_tell_nothing(model, vocabulary)
    if why is not None:
        return proves_none(why)
    known = _known_classes(vocabulary, byte_fallback=model.byte_fallback, normalizer=normalizer)
    spanned = _spanned_pairs(vocabulary, normalizer.space)
    rules = (
        Rule(
            f"{left.name.lower()} | other",
            frozenset({left}),
            frozenset(right for right in known if (left, right) not in spanned),
            "no token of the vocabulary holds such a pair, so no merge crosses it",
        )
        for left in known
    )
    return Findings(tuple(rule for rule in rules if rule.right), (VOCABULARY_PROOF,))


def proves_none(why: str) -> Findings:
    """Return the finding that no stage forces a cut and the vocabulary proves none either."""
    return Findings(refused=(f"no cut is forced, and the vocabulary proves none: {why}",))


def _why_merges_tell_nothing(model: Any, vocabulary: dict[str, int]) -> str | None:
    if not isinstance(model, BPE):
        return "only BPE merges neighbours and nothing else"
    if model.ignore_merges:
        return "a whole text in the vocabulary skips the merges"
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return "the ends of a text are marked"
    if len(set(vocabulary.values())) < len(vocabulary):
        return "one id stands for two tokens, and merges go by ids"
    return None


def _known_classes(
    vocabulary: dict[str, int], *, byte_fallback: bool, normalizer: Normalizer
) -> list[CharClass]:
    """Return the ASCII classes whose characters are all tokens: none can fuse into an unknown."""
    has_bytes = byte_fallback and _has_plain_bytes(vocabulary)
    missing = {
        class_of(char)
        for char in map(chr, range(128))
        if (normalizer.space if char == " " else char) not in vocabulary and not has_bytes
    }
    usable = [*sorted(VISIBLE), C.SPACE]
    return [one for one in usable if one not in missing and one not in NON_ASCII]


def _has_plain_bytes(vocabulary: dict[str, int]) -> bool:
    """Return whether every byte has a token, and no merge goes by the name of one."""
    others = "\n".join(vocabulary.keys() - BYTE_NAMES)
    return vocabulary.keys() >= BYTE_NAMES and not BYTE_NAME.search(others)


def _spanned_pairs(vocabulary: Iterable[str], space: str) -> set[Pair]:
    """Return the pairs of classes that stand side by side in some token."""
    all_chars = "".join(vocabulary)
    between = next(char for char in map(chr, range(0xE000, 0x110000)) if char not in all_chars)
    joined = between.join(vocabulary).replace(space, " ")
    shape = re.sub("[A-Za-z]+", "aa", joined)  # most of it
    inside = (pair for pair in set(pairwise(shape)) if between not in pair)
    return {pair for left, right in inside for pair in pairs_in(left + right)}
