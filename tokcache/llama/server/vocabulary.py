"""Checks that a tokenizer's ids mean the same text to a server's model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tokcache.errors import VocabularyMismatch
from tokcache.llama.answers import Added
from tokcache.llama.server import calls

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.llama.server.steps import Steps
    from tokcache.text.token_ids import TokenIds

# Letters and single spaces: a tokenizer that splits these differently is not the model's.
_PLAIN = "the quick brown fox jumps over the lazy dog The Quick Brown Fox HELLO WORLD"
_ODD = "don't pay 31,415.92 in 2026: x = f(y) + 1;\n\n\tna\u00efve caf\u00e9, \u65e5\u672c\u8a9e"
_log = logging.getLogger(__name__)
# Vocabularies up to this size are compared in full, larger ones at evenly spaced ids.
_PROBED_IDS = 4096


class ServerTokenizer(Protocol):
    """The methods of a wrapped tokenizer that LlamaServer uses."""

    def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        """Return the ids of `text`."""

    def unwrap(self) -> Any:
        """Return the plain tokenizer."""


def check(wrapped: ServerTokenizer, url: str) -> Steps[None]:
    """Raise VocabularyMismatch unless ids mean the same text, and plain words have the same ids.

    Unusual text that is split differently is only logged: llama.cpp splits some text differently
    with the same vocabulary, and the server receives ids, not text.
    """
    plain = wrapped.unwrap()
    tokenizer: Tokenizer = getattr(plain, "backend_tokenizer", plain)
    n_ours, n_theirs = tokenizer.get_vocab_size(), (yield calls.model_meta()).n_vocab
    if n_theirs is not None and n_ours > n_theirs:
        raise VocabularyMismatch(
            f"the tokenizer has {n_ours:,} tokens, the model of {url} has {n_theirs:,};"
            " pass the model's own tokenizer"
        )
    # Decoding: compare all probed ids at once, and search for the first difference only if there
    # is one. SentencePiece decoders differ in whether they put a space before the text.
    ids = yield partial(_probe_ids, tokenizer)
    ours, theirs = _decode(tokenizer, ids), (yield calls.detokenize(ids))
    if ours.removeprefix(" ") != theirs.removeprefix(" "):
        for number in ids:
            ours, theirs = _decode(tokenizer, [number]), (yield calls.detokenize([number]))
            if ours.removeprefix(" ") != theirs.removeprefix(" "):
                break
        raise VocabularyMismatch(
            f"token {number} is {ours!r} for the tokenizer and {theirs!r} for the model of {url};"
            " pass the model's own tokenizer"
        )
    # Encoding.
    for text in (_PLAIN, _ODD):
        encoded = yield partial(wrapped.token_ids, text, add_special_tokens=False)
        expected = yield calls.tokenize(text, add_special=False)
        if encoded == expected:
            continue
        message = (
            f"{text!r} is {encoded.tolist()} for the tokenizer and {expected.tolist()} for the"
            f" model of {url}"
        )
        if text == _PLAIN:
            raise VocabularyMismatch(f"{message}; pass the model's own tokenizer, unchanged")
        _log.warning("%s; the tokenizer's ids are sent", message)


def decode(wrapped: ServerTokenizer, ids: Sequence[int]) -> str:
    """Return the text of `ids`, special tokens included."""
    plain = wrapped.unwrap()
    return _decode(getattr(plain, "backend_tokenizer", plain), ids)


def added(wrapped: ServerTokenizer) -> Added:
    """Return which ids are added tokens of the tokenizer."""
    plain = wrapped.unwrap()
    tokenizer: Tokenizer = getattr(plain, "backend_tokenizer", plain)
    ids = list(tokenizer.get_added_tokens_decoder())
    table = np.isin(np.arange(max([tokenizer.get_vocab_size(), *(each + 1 for each in ids)])), ids)
    return Added(table, table)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def _probe_ids(tokenizer: Tokenizer) -> list[int]:
    """Return ids with text to compare: added tokens and evenly spaced others."""
    n_vocab = tokenizer.get_vocab_size()
    spread = range(0, n_vocab, max(1, n_vocab // _PROBED_IDS))
    ids = sorted({*spread, *tokenizer.get_added_tokens_decoder()})
    # A single byte of a longer character has no text.
    return [i for i in ids if (text := _decode(tokenizer, [i])) and "\ufffd" not in text]
