"""Common prefixes and first differences, against a loop over the elements."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tokcache import TokenIds
from tokcache._prefix import common_tokens, first_difference, n_common

# Some below the first step of 128 elements, some above the second of 1,024.
LENGTHS = st.sampled_from([0, 1, 2, 7, 127, 128, 129, 1023, 1024, 1025, 1500])


def by_loop(left: Sequence[Any], right: Sequence[Any]) -> int:
    for at, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return at
    return min(len(left), len(right))


@given(LENGTHS, LENGTHS, LENGTHS, st.booleans())
def test_it_equals_a_loop(n_same: int, n_left: int, n_right: int, is_equal: bool) -> None:
    left = [7] * n_same + [1] * n_left
    right = [7] * n_same + ([1] if is_equal else [2]) * n_right
    expected = by_loop(left, right)
    makers: list[Callable[[list[int]], Any]] = [list, tuple, bytes, TokenIds]
    makers.append(lambda ids: "".join(map(chr, ids)))
    for make in makers:
        one, other = make(left), make(right)
        assert n_common(one, other) == expected
        assert first_difference(one, other) == (None if left == right else expected)
    assert common_tokens(array("i", left).tobytes(), array("i", right).tobytes()) == expected
