"""ShareGPT: conversations of "human" and "gpt"; each answer of the model is a request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokcache.errors import Malformed
from tokcache.replay.traces.request import Conversation, Request

name = "sharegpt"
about = "ShareGPT's conversations"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def matches(value: Any) -> bool:
    """Return whether a record has turns with `from` and `value`."""
    turns = _turns(value)
    return isinstance(turns, list) and all(isinstance(x, dict) and "from" in x for x in turns)


def _turns(value: Any) -> Any:
    if not isinstance(value, dict):
        return None
    return value.get("conversations", value.get("conversation"))


def requests(value: Any) -> Iterable[Request]:
    """Return a request for each answer of the model."""
    turns = _turns(value)
    if not isinstance(turns, list):
        raise Malformed("it has no conversations")
    made = Conversation()
    if isinstance(value.get("system"), str) and value["system"]:
        made.messages.append({"role": "system", "content": value["system"]})
    for turn in turns:
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise Malformed("a turn has no text")
        role = _ROLES.get(str(turn.get("from")).lower(), "user")
        made.messages.append({"role": role, "content": text})
    return made.requests()
