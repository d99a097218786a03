"""TokenIds: an immutable int32 sequence with the buffer protocol, both implementations."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.implementations import both, implementation, native
from tokcache.errors import InvalidTokens
from tokcache.text._reference import token_ids as reference

INT32 = st.integers(-(2**31), 2**31 - 1)


@both
def test_token_ids_are_a_sequence_of_the_given_ids(name: str) -> None:
    ids = implementation(name).token_ids([5, 1, 5, 70_000])
    assert len(ids) == 4
    assert list(ids) == ids.tolist() == [5, 1, 5, 70_000]
    assert ids[0] == 5
    assert ids[-1] == 70_000
    assert type(ids[0]) is int
    assert 70_000 in ids
    assert 6 not in ids
    assert ids.count(5) == 2
    assert ids.index(5, 1) == 2
    assert bool(ids)
    assert not implementation(name).token_ids()
    assert repr(ids) == str(ids) == "TokenIds([5, 1, 5, 70000])"
    with pytest.raises(IndexError):
        ids[4]
    with pytest.raises(IndexError):
        ids[-5]
    with pytest.raises(TypeError):
        ids[1.0]


@both
@pytest.mark.parametrize(
    "source",
    [
        [1, -2, 3],
        (1, -2, 3),
        array("i", [1, -2, 3]),
        np.array([1, -2, 3], np.int32),
        np.array([1, -2, 3], np.int64),
        np.array([1, 0, -2, 0, 3], np.int32)[::2],
        {1: 0, -2: 0, 3: 0}.keys(),
        range(1, 4),
    ],
    ids=["list", "tuple", "array", "int32", "int64", "strided", "keys", "range"],
)
def test_token_ids_accept_any_sequence_or_buffer_of_integers(name: str, source: Any) -> None:
    expected = [1, 2, 3] if isinstance(source, range) else [1, -2, 3]
    assert implementation(name).token_ids(source) == expected


@both
@pytest.mark.parametrize(
    "source",
    [
        ["a"],
        [1.0],
        [2**31],
        [-(2**31) - 1],
        "12",
        b"1234",
        [None],
        None,
        5,
        np.array([1.5]),
        np.array(3),
    ],
)
def test_values_that_are_not_int32_are_refused(name: str, source: Any) -> None:
    with pytest.raises(InvalidTokens):
        implementation(name).token_ids(source)


@both
def test_equality_and_hash(name: str) -> None:
    make = implementation(name).token_ids
    ids = make([1, 2, 3])
    assert ids == make((1, 2, 3))
    assert ids == [1, 2, 3]
    assert ids != make([1, 2])
    assert ids != [1, 2, 4]
    assert ids != (1, 2, 3)  # equal objects need equal hashes, and a tuple's hash differs
    assert ids != None  # noqa: E711 (tests __ne__)
    assert hash(ids) == hash(make([0, 1, 2, 3])[1:])
    assert len({ids, make([1, 2, 3]), make([3, 2, 1])}) == 2


@both
def test_token_ids_are_immutable(name: str) -> None:
    ids = implementation(name).token_ids([1, 2, 3])
    with pytest.raises(TypeError):
        memoryview(ids)[0] = 9
    with pytest.raises((TypeError, ValueError)):
        ids[0] = 9
    with pytest.raises(ValueError, match=r"read-only|WRITEABLE"):
        ids.numpy()[0] = 9
    with pytest.raises(ValueError, match="WRITEABLE"):
        ids.numpy().flags.writeable = True
    with pytest.raises((AttributeError, TypeError)):
        ids.append(4)
    with pytest.raises(TypeError):
        ids + ids
    changed = ids.tolist()
    changed[0] = 9
    assert ids == [1, 2, 3]


@both
def test_the_buffer_is_int32_and_slices_share_it(name: str) -> None:
    ids = implementation(name).token_ids(range(100))
    view = memoryview(ids)
    assert (view.format, view.itemsize, view.ndim, view.readonly) == ("i", 4, 1, True)
    assert view.shape == (100,)
    assert view.tolist() == list(range(100))
    assert ids.numpy().dtype == np.int32
    part = ids[10:20]
    start = np.frombuffer(ids, np.int32).ctypes.data
    assert np.frombuffer(part, np.int32).ctypes.data == start + 40
    assert np.frombuffer(part[5:], np.int32).ctypes.data == start + 60


@both
def test_a_slice_outlives_the_sequence_it_was_cut_from(name: str) -> None:
    part = implementation(name).token_ids(range(1000))[500:][:3]
    gc.collect()
    assert part == [500, 501, 502]


@both
def test_pickle_and_copy(name: str) -> None:
    ids = implementation(name).token_ids([1, 2, 3])[1:]
    assert pickle.loads(pickle.dumps(ids)) == [2, 3]  # noqa: S301 (our own)
    assert copy.copy(ids) == copy.deepcopy(ids) == [2, 3]


def test_both_implementations_have_the_same_pickle() -> None:
    plain = reference.TokenIds([1, 2])
    assert pickle.dumps(plain) == pickle.dumps(native().token_ids([1, 2]))


@both
def test_token_ids_are_registered_as_a_sequence(name: str) -> None:
    assert isinstance(implementation(name).token_ids([1]), Sequence)


@both
@given(values=st.lists(INT32, max_size=40), cut=st.slices(40))
def test_slices_and_conversions_equal_those_of_a_list(
    name: str, values: list[int], cut: slice
) -> None:
    ids = implementation(name).token_ids(values)
    assert ids.tolist() == values
    assert ids[cut].tolist() == values[cut]
    assert ids[cut][::-1].tolist() == values[cut][::-1]
    assert ids.tobytes() == array("i", values).tobytes()


def test_tolist_reuses_int_objects() -> None:
    make = native().token_ids
    big = 400_000
    assert make([big]).tolist()[0] is make([7, big]).tolist()[1]
    outside_the_table = 2_000_000_000
    assert make([outside_the_table, -1, -(2**31)]).tolist() == [outside_the_table, -1, -(2**31)]


def test_reference_counts_are_balanced() -> None:
    make = native().token_ids
    number = make([123_456]).tolist()[0]
    before = sys.getrefcount(number)
    lists = [make([123_456, 123_456]).tolist() for _ in range(10)]
    assert sys.getrefcount(number) == before + 20
    del lists
    assert sys.getrefcount(number) == before
    ids = make([1, 2, 3])
    for _ in range(1000):
        memoryview(ids).release()
        ids[1:]
    base = make(range(100))
    part = base[1:]
    del base, part


def test_a_list_that_shrinks_while_it_is_read_is_refused() -> None:
    values: list[Any] = []

    class Shrinks:
        def __index__(self) -> int:
            values.clear()
            return 1

    values.extend([Shrinks(), 2, 3])
    with pytest.raises(InvalidTokens, match="changed"):
        native().token_ids(values)


def test_nobody_gets_a_writable_buffer_and_slices_own_no_ids() -> None:
    ids = native().token_ids(range(1000, 2000))
    with pytest.raises(TypeError, match="read-write"):
        io.BytesIO(b"12345678").readinto(ids)  # it asks for a writable buffer
    with pytest.raises(TypeError, match="not writable"):
        (ctypes.c_char * 8).from_buffer(ids)
    assert ids.tolist() == [*range(1000, 2000)]
    assert sys.getsizeof(ids[1:]) < sys.getsizeof(native().token_ids()) + 40
