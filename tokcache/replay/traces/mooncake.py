"""Mooncake's traces (FAST'25): `hash_ids` of 512 tokens, the last one shorter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokcache.errors import Malformed

if TYPE_CHECKING:
    from tokcache.replay.traces.request import Blocks

name = "mooncake"
about = "Mooncake's traces: hash_ids of 512 tokens"
block_tokens = 512
is_session = False


def matches(value: Any) -> bool:
    """Return whether a record has ids of blocks and no chat."""
    return isinstance(value, dict) and "hash_ids" in value and "chat_id" not in value


def blocks(value: Any) -> Iterable[Blocks]:
    """Return the prompt of a record."""
    try:
        ids, n_tokens = value["hash_ids"], value["input_length"]
    except (KeyError, TypeError):
        raise Malformed("it has no hash_ids and input_length") from None
    if type(ids) is not list:
        raise Malformed("its hash_ids are no array")
    return ((ids, n_tokens),)


def columns(values: list[Any]) -> tuple[list[list[int]], list[int]] | None:
    """Return the ids and the lengths of many records, None if one of them is malformed."""
    try:
        ids = [value["hash_ids"] for value in values]
        n_tokens = [value["input_length"] for value in values]
    except (KeyError, TypeError):
        return None
    return (ids, n_tokens) if set(map(type, ids)) == {list} else None
