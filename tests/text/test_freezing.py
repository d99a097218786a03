"""Frozen chats: the native module gives the bytes of the reference, and refuses the same values."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from enum import IntEnum, StrEnum
from marshal import dumps, loads
from typing import Any

import pytest

from tests.text.drawn_chats import draw_chat
from tests.text.implementations import both, implementation
from tokcache.errors import RenderingRefused
from tokcache.text._reference import freezing as reference


def module(name: str) -> Any:
    return implementation(name).freezing


class Role(StrEnum):
    USER = "user"


class Number(IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


def nested(depth: int) -> Any:
    value: Any = 1
    for index in range(depth):
        value = [value] if index % 2 else {"x": value}
    return value


PLAIN: dict[str, Any] = {
    "none": None,
    "booleans": [True, False, 1, 0],
    "numbers": [
        0,
        1,
        -1,
        255,
        256,
        -256,
        2**31 - 1,
        2**31,
        -(2**31),
        -(2**31) - 1,
        2**63,
        -(9**99),
    ],
    "floats": [0.0, -0.0, 1.5, 1e308, -1e-308, float("inf"), 0.1],
    "texts": ["", "a", "\0", "é", "漢字", "🙂", "\ud800", "a" * 20_000, "é" * 20_000],
    "tuples": (1, (), ("a", [()])),
    "dicts": [{}, {"": ""}, {"b": 1, "a": 2}, {"é": {"x": [None]}}],
    "many": list(range(300)),
    "deep": nested(100),
}
OTHERS: dict[str, Any] = {
    "bytes": b"a",
    "a buffer": memoryview(b"a"),
    "a set": {1},
    "a complex number": 1j,
    "an object": object(),
    "a class of str": Text("a"),
    "an enumeration of str": Role.USER,
    "an enumeration of int": Number.ONE,
    "a class of dict": OrderedDict(a=1),
    "a number as a name": {1: 1},
    "a class of str as a name": {Text("a"): 1},
    "code": compile("1", "", "eval"),
    "ellipsis": ...,
    "too deep": nested(101),
}


@both
@pytest.mark.parametrize("case", PLAIN)
def test_frozen_values_are_those_of_marshal(name: str, case: str) -> None:
    value = PLAIN[case]
    made = module(name).freeze(value)
    assert made == dumps(value, 0)
    assert repr(loads(made)) == repr(value)  # noqa: S302 (made above)


@both
@pytest.mark.parametrize("case", OTHERS)
def test_values_of_other_types_are_refused(name: str, case: str) -> None:
    for value in (OTHERS[case], [OTHERS[case]], {"a": ("b", OTHERS[case])}):
        with pytest.raises(RenderingRefused, match="type"):
            module(name).freeze(value)
    for message in (OTHERS[case], {"a": OTHERS[case]}):
        with pytest.raises(RenderingRefused, match="type"):
            module(name).freeze_messages([{"role": "user"}, message])


@both
def test_a_value_within_itself_is_refused(name: str) -> None:
    value: dict[str, Any] = {"a": []}
    value["a"].append(value)
    with pytest.raises(RenderingRefused, match="type"):
        module(name).freeze(value)


@both
def test_messages_are_frozen_end_to_end(name: str) -> None:
    draw = random.Random(1)
    for n_messages in (0, 1, 2, 40):
        chat = draw_chat(draw, n_messages)
        keys, ends = module(name).freeze_messages(chat)
        assert (keys, ends) == reference.freeze_messages(tuple(chat))
        begins = (0, *ends)
        found = [loads(keys[a:b]) for a, b in zip(begins, ends, strict=False)]  # noqa: S302
        assert found == chat
        assert keys == b"".join(dumps(message, 0) for message in chat)


@both
def test_values_are_not_kept(name: str) -> None:
    text, number = "some text é", 2**40
    chat = [{"role": text, "content": [number, text]}]
    before = sys.getrefcount(text), sys.getrefcount(number), sys.getrefcount(chat[0])
    for _ in range(100):
        module(name).freeze_messages(chat)
        with pytest.raises(RenderingRefused):
            module(name).freeze([text, number, chat, object()])
    assert (sys.getrefcount(text), sys.getrefcount(number), sys.getrefcount(chat[0])) == before
