"""Common prefixes and first differences of token ids and texts."""

from __future__ import annotations

from typing import Any, Protocol

_ID_BYTES = 4


class Sliceable(Protocol):
    """A sequence with slices that compare by their elements: a str, list, bytes or TokenIds."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Any: ...


def n_common(left: Sliceable, right: Sliceable) -> int:
    """Return the length of the common prefix of two sequences of one type.

    Cost: O(length of the common prefix), in a few comparisons of slices.
    """
    # [0, low) is equal. Growing steps find a difference near the start without a look at the rest,
    # and often that there is none, because one sequence continues the other; halving ones then
    # find its place.
    limit = min(len(left), len(right))
    low, high = 0, min(128, limit)
    while left[low:high] == right[low:high]:
        if high == limit:
            return limit
        low, high = high, min(8 * high, limit)
    high -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_tokens(left: bytes, right: bytes) -> int:
    """Return the number of common leading tokens of two byte strings of int32 ids."""
    return n_common(left, right) // _ID_BYTES


def first_difference(left: Sliceable, right: Sliceable) -> int | None:
    """Return the position of the first difference, None if both are equal."""
    if left == right:
        return None
    return n_common(left, right)
