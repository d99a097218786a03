"""Texts whose digests all collide under a known secret: ids stay correct and time bounded.

The secret is all spaces here. A block of eight spaces and eight letters then folds to 0, so every
chunk, every segment and every short text has the same digest.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

import pytest

import tokcache
from tests.text.tokenizers_synthetic import SYNTHETIC
from tokcache import CacheConfig
from tokcache.text._native import is_native

N_TEXTS = 1000 if is_native() else 100
BLOCKS = 24  # of 16 characters in a text
MAX_SECONDS = 20  # of CPU time; a few are usual
MULTIPLIER = 0x9E3779B97F4A7C15


def _text(seed: int) -> str:
    words = (f"{(seed * MULTIPLIER + at * 7919) % 10**8:08}" for at in range(BLOCKS))
    return "".join(f"{'':8}{word}" for word in words)


def _fold(one: int, other: int) -> int:
    product = one * other
    return (product ^ product >> 64) & 2**64 - 1


def _digest(text: str, secret: bytes) -> int:
    """Return the digest of 17 to 512 bytes, as the tables compute it."""
    key = text.encode()
    words = [int.from_bytes(secret[at : at + 8], "little") for at in range(0, 512, 8)]
    pairs = zip(range(0, len(key) - 16, 16), range(0, 64, 2), strict=False)
    blocks = [*pairs, (len(key) - 16, 62)]
    total = 0
    for at, own in blocks:
        left, right = (int.from_bytes(key[at + n : at + n + 8], "little") for n in (0, 8))
        total += _fold(left ^ words[own], right ^ words[own + 1])
    return _fold(total % 2**64 ^ words[0], words[1] ^ len(key))


def test_the_texts_collide_only_under_the_known_secret() -> None:
    chunks = [_text(seed)[:128] for seed in range(50)]
    assert len({_digest(one, b" " * 512) for one in chunks}) == 1
    assert len({_digest(one, bytes(range(256)) * 2) for one in chunks}) == 50


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "bert_uncased", "whitespace"])
def test_colliding_texts_get_correct_ids_in_bounded_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_l0", "segments._l1") if is_native() else ():
        module: Any = importlib.import_module(f"tokcache.text.{name}")
        monkeypatch.setattr(module, "urandom", lambda n: b" " * n)
    tokenizer = SYNTHETIC[kind]()
    cached = tokcache.wrap(tokenizer, CacheConfig(engine="tokenizers"))
    texts = [_text(seed) for seed in range(N_TEXTS)]
    right = [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    start = time.process_time()
    for _ in range(2):  # the first round encodes, in the second L0 answers
        for text, ids in zip(texts, right, strict=True):
            assert cached.token_ids(text, add_special_tokens=False) == ids
    for one, other in zip(
        texts, reversed(texts), strict=True
    ):  # the chunks are cached, the texts not
        ids = tokenizer.encode(one + other, add_special_tokens=False).ids
        assert cached.token_ids(one + other, add_special_tokens=False) == ids
    assert time.process_time() - start < MAX_SECONDS
    assert cached.cache_stats().l1.chunk_hits > N_TEXTS
