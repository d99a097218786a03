"""SWE-agent: trajectories as its .traj files and the published data sets have them.

The messages are the `history`, or the `messages`, or a `trajectory` of messages whose text is
`content` or `text` and whose model is called "ai". Each message of the model is a request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokcache.errors import Malformed
from tokcache.replay.traces.chats import conversation, messages_of

if TYPE_CHECKING:
    from tokcache.replay.traces.request import Message, Request

name = "swe-agent"
about = "SWE-agent's trajectories"
_MARKS = ("trajectory", "traj_id", "instance_id", "environment", "exit_status")


def matches(value: Any) -> bool:
    """Return whether a record has the messages of a trajectory."""
    if not isinstance(value, dict) or not any(key in value for key in _MARKS):
        return False
    return _messages(value) is not None


def _messages(value: Any) -> list[Message] | None:
    for key in ("history", "messages", "trajectory"):
        found = messages_of(value.get(key))
        if found is not None and "role" in found[0]:
            return found
    return None


def requests(value: Any) -> Iterable[Request]:
    """Return a request for each message of the model."""
    found = _messages(value) if isinstance(value, dict) else None
    if found is None:
        raise Malformed("it has neither a history nor messages")
    return conversation([_chat_message(one) for one in found]).requests()


def _chat_message(message: Message) -> Message:
    own = dict(message)
    if own.get("role") == "ai":
        own["role"] = "assistant"
    if own.get("content") is None:
        own["content"] = own.get("system_prompt") or own.get("text")
    return own
