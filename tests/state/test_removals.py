"""The bounds of a remembered removal: how many of a prompt's tokens were removed."""

from __future__ import annotations

import numpy as np
import pytest

from tokcache.state.names import TOKEN_BYTES, RootKey
from tokcache.state.removals import Removals

ROOT = RootKey(b"model", "tenant", "free")
POINT = b"p" * 16
BLOCK = np.arange(100, dtype=np.int32)


def changed(at: int) -> bytes:
    """Return the block's tokens and ten more, with another token at one place."""
    tokens = np.concatenate([BLOCK, np.full(10, 7, np.int32)])
    tokens[at] = -1
    return tokens.tobytes()


def noted(*blocks: bytes) -> Removals:
    removals = Removals()
    for block in blocks:
        removals.note(ROOT, POINT, block, "ram_bytes", grain=TOKEN_BYTES)
    return removals


@pytest.mark.parametrize(
    ("rest", "bounds"),
    [
        (BLOCK.tobytes(), (100, 100)),
        (changed(105), (100, 100)),
        (changed(99), (64, 99)),
        (changed(64), (64, 99)),
        (changed(63), (16, 63)),
        (changed(16), (16, 63)),
        (changed(15), (0, 15)),
        (changed(1), (0, 15)),
        (BLOCK[:50].tobytes(), (16, 50)),
        (BLOCK[:16].tobytes(), (16, 16)),
    ],
    ids=["all", "more", "last", "64", "63", "16", "15", "1", "50 of it", "16 of it"],
)
def test_a_removal_counts_tokens_between_two_bounds(rest: bytes, bounds: tuple[int, int]) -> None:
    found = noted(BLOCK.tobytes()).find(ROOT, POINT, rest, TOKEN_BYTES)
    assert found is not None
    assert (found.cause, found.n_tokens, found.n_most) == ("ram_bytes", *bounds)


def test_where_another_block_was_removed_at_the_same_place_all_may_have_been() -> None:
    other = np.concatenate([BLOCK[:20], np.full(30, 9, np.int32)]).tobytes()
    found = noted(BLOCK.tobytes(), other).find(ROOT, POINT, changed(40), TOKEN_BYTES)
    assert found is not None
    assert (found.n_tokens, found.n_most) == (16, 110)


def test_a_removal_is_found_at_its_own_place_and_in_its_own_namespace() -> None:
    removals, rest = noted(BLOCK.tobytes()), BLOCK.tobytes()
    assert removals.find(ROOT, b"q" * 16, rest, TOKEN_BYTES) is None
    assert removals.find(ROOT, POINT, changed(0), TOKEN_BYTES) is None
    for other in (RootKey(b"model", "else", "free"), RootKey(b"other", "tenant", "free")):
        assert removals.find(other, POINT, rest, TOKEN_BYTES) is None
