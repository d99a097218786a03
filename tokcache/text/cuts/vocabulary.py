"""The cuts that a BPE vocabulary proves where nothing forces one: no token spans the pair."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers.models import BPE

from tokcache.text.cuts.char_classes import VISIBLE, class_of
from tokcache.text.cuts.plan import VOCABULARY_PROOF
from tokcache.text.cuts.rules import NON_ASCII, C, Findings, Rule, pairs_in
from tokcache.text.engines.components import BYTE_NAME, BYTE_NAMES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.text.cuts.normalizers import Normalizer


def cuts_of_vocabulary(tokenizer: Tokenizer, normalizer: Normalizer) -> Findings:
    """Return the pairs that no token of a tokenizer without a pre-tokenizer spans.

    Cost: a pass over the vocabulary.
    """
    if normalizer.rewritten:
        string, content = normalizer.rewritten[0]
        return proves_none(f"the normalizer replaces {string!r} by {content!r}")
    if normalizer.replaced or normalizer.composes:
        return proves_none("the normalizer makes one character of several")
    model = tokenizer.model
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    why = _why_merges_tell_nothing(model, vocabulary)
    if why is not None:
        return proves_none(why)

    # The ASCII classes whose characters are all tokens: no character of them becomes an unknown
    # token, which could fuse with the one next to it.
    has_bytes = model.byte_fallback and _has_plain_bytes(vocabulary)
    missing = {
        class_of(char)
        for char in map(chr, range(128))
        if (normalizer.space if char == " " else char) not in vocabulary and not has_bytes
    }
    known = [one for one in (*sorted(VISIBLE), C.SPACE) if one not in missing | NON_ASCII]

    # The pairs of neighbouring classes in some token. All tokens are joined by a character that
    # none of them has, and runs of letters, which are most of the text, become two letters.
    all_chars = "".join(vocabulary)
    between = next(char for char in map(chr, range(0xE000, 0x110000)) if char not in all_chars)
    joined = between.join(vocabulary).replace(normalizer.space, " ")
    shape = re.sub("[A-Za-z]+", "aa", joined)
    inside = (pair for pair in set(pairwise(shape)) if between not in pair)
    spanned = {pair for left, right in inside for pair in pairs_in(left + right)}

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
    """Return why two characters may end up in one token that the vocabulary does not show."""
    if not isinstance(model, BPE):
        return "only the tokens of BPE are made by merging neighbours"
    if model.ignore_merges:
        return "a text that is a token is not merged from its characters"
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return "the model marks the beginning or end of a text"
    if len(set(vocabulary.values())) < len(vocabulary):
        return "one id stands for two tokens, and merges go by ids"
    return None


def _has_plain_bytes(vocabulary: dict[str, int]) -> bool:
    """Return whether every byte has a token, and no other token holds the name of one."""
    others = "\n".join(vocabulary.keys() - BYTE_NAMES)
    return vocabulary.keys() >= BYTE_NAMES and not BYTE_NAME.search(others)
