"""The reference implementation of the native module that freezes messages and settings to bytes.

Frozen values are equal only if all values, their types and their order are. The bytes are those of
`marshal` in version 0, whose output does not depend on the identity of objects, so `marshal.loads`
reads them. Values of other types than JSON's are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from marshal import dumps, loads
from typing import Any

from tokcache.errors import RenderingRefused

MAX_DEPTH = 100  # of values in values
_SCALARS = {str, int, float, bool, type(None)}


def freeze(value: Any) -> bytes:
    """Return a value as bytes.

    Errors: RenderingRefused if it is not made of JSON's types and tuples.
    """
    try:
        made = dumps(value, 0)
    except ValueError:  # an object that marshal does not know, or too many values in values
        raise RenderingRefused("type") from None
    # Objects with a buffer are frozen as other objects, so the types are checked as they are read.
    if not _is_plain(loads(made), MAX_DEPTH):  # noqa: S302 (made above)
        raise RenderingRefused("type")
    return made


def freeze_messages(messages: Iterable[Any]) -> tuple[bytes, tuple[int, ...]]:
    """Return the messages of a chat, all dicts, as bytes, and where each ends.

    Errors: RenderingRefused if they are not made of JSON's types and tuples.
    """
    made, ends, end = [], [], 0
    for message in messages:
        if type(message) is not dict:
            raise RenderingRefused("type")
        made.append(freeze(message))
        end += len(made[-1])
        ends.append(end)
    return b"".join(made), tuple(ends)


def _is_plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind in _SCALARS:
        return True
    if depth == 0:
        return False
    if kind is dict:
        if not all(type(name) is str for name in value):
            return False
        value = value.values()
    elif kind is not list and kind is not tuple:
        return False
    return all(_is_plain(each, depth - 1) for each in value)
