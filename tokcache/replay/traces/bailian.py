"""The traces of Alibaba's Bailian (qwen-bailian-usagetraces-anon): `hash_ids` of 16 tokens."""

from __future__ import annotations

from typing import Any

from tokcache.replay.traces.mooncake import blocks, columns

__all__ = ["about", "block_tokens", "blocks", "columns", "is_session", "matches", "name"]

name = "bailian"
about = "Bailian's traces: hash_ids of 16 tokens"
block_tokens = 16
is_session = False


def matches(value: Any) -> bool:
    """Return whether a record has ids of blocks and belongs to a chat."""
    return isinstance(value, dict) and "hash_ids" in value and "chat_id" in value
