"""The reference implementation of the native TokenIds, on a numpy array.

On Python 3.11 a subclass of ndarray is the only way in plain Python to a read-only buffer of format
"i" (`__buffer__` came with 3.12). Arithmetic is switched off, so that it is a sequence only.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokcache.errors import InvalidTokens
from tokcache.text._pickling import unpickle

if TYPE_CHECKING:
    from collections.abc import Iterable

_Array: Any = np.ndarray  # untyped: a sequence's methods return other types than an array's


def _index(value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidTokens(f"a token id must be an integer, not {value!r}") from None


def _int32_bytes(ids: object) -> bytes:
    try:
        view = memoryview(ids)  # type: ignore[arg-type]
    except TypeError:
        pass
    else:
        if view.format == "i" and view.ndim == 1 and view.c_contiguous:
            return view.tobytes()
    if isinstance(ids, str | bytes | bytearray):
        raise InvalidTokens(f"token ids must be integers, not {type(ids).__name__}")
    try:
        return array("i", [_index(value) for value in ids]).tobytes()  # type: ignore[attr-defined]
    except TypeError as error:
        raise InvalidTokens(f"token ids must be a sequence of integers: {error}") from None
    except OverflowError:
        raise InvalidTokens("a token id does not fit into an int32") from None


class TokenIds(_Array):  # type: ignore[misc]
    """An immutable sequence of int32 token ids.

    Shapes: int32[n_tokens]; slices share the memory, a slice with a step is a copy.
    Errors: InvalidTokens for a value that is not an int32.
    Threads: safe: it never changes.
    """

    __array_ufunc__ = None

    def __new__(cls, ids: Iterable[int] = ()) -> TokenIds:  # noqa: PYI034 (it is final)
        """Return `ids` itself if it is a TokenIds, else a copy of the integers in it."""
        if isinstance(ids, TokenIds):
            return ids
        view: TokenIds = np.frombuffer(_int32_bytes(ids), np.int32).view(cls)  # type: ignore[assignment]
        return view

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            part = super().__getitem__(index)
            return part if part.flags.c_contiguous else TokenIds(part.tolist())
        return int(super().__getitem__(operator.index(index)))

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __contains__(self, value: object) -> bool:
        return value in self.tolist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return bool(self.tobytes() == other.tobytes())
        return self.tolist() == other if isinstance(other, list) else NotImplemented

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    def __hash__(self) -> int:
        return hash(self.tobytes())

    def __bool__(self) -> bool:
        return len(self) > 0

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        return f"TokenIds({self.tolist()!r})"

    def __reduce__(self) -> Any:
        return unpickle, (self.tobytes(),)

    def __copy__(self) -> TokenIds:
        return self

    def __deepcopy__(self, memo: object) -> TokenIds:
        return self

    def count(self, value: int) -> int:
        """Return how often `value` occurs."""
        return int(self.tolist().count(value))

    def index(self, value: int, start: int = 0, stop: int = 2**62) -> int:
        """Return the first position of `value`; ValueError if it isn't there."""
        return int(self.tolist().index(value, start, stop))

    def numpy(self) -> Any:
        """Return a read-only int32[n_tokens] view, no copy."""
        return self.view(np.ndarray)


Sequence.register(TokenIds)
