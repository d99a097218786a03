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
        return ((value["hash_ids"], value["input_length"]),)
    except (KeyError, TypeError):
        raise Malformed("it has no hash_ids and input_length") from None
