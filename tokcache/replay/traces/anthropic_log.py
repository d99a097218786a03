"""Request bodies of Anthropic's Messages API.

A record is a body, or an object that has it as `body`, `request`, `request_body` or `params` (as
Anthropic's batches have), with the answer as `response` if there is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokcache.errors import Malformed
from tokcache.replay.traces.chats import conversation, messages_of
from tokcache.replay.traces.openai_log import answer_of, body_of
from tokcache.replay.traces.request import Request

name = "anthropic"
about = "request bodies of Anthropic's Messages API, one a line"
_WRAPPED = ("params", "body", "request", "request_body")
_BLOCKS = ("tool_use", "tool_result", "thinking")  # a foreign type may be a list


def matches(value: Any) -> bool:
    """Return whether a record has a mark of this API: OpenAI's chats have `messages`, too."""
    body = body_of(value, _WRAPPED)
    messages = messages_of(body.get("messages"))
    if messages is None:
        return False
    if "system" in body or "anthropic_version" in body or isinstance(value.get("params"), dict):
        return True
    if str(body.get("model", "")).startswith("claude") or value.get("url") == "/v1/messages":
        return True
    contents = [one.get("content") for one in messages]
    parts = [part for one in contents if isinstance(one, list) for part in one]
    return any(isinstance(part, dict) and part.get("type") in _BLOCKS for part in parts)


def requests(value: Any) -> Iterable[Request]:
    """Return the prompt of a record."""
    body = body_of(value, _WRAPPED)
    if "messages" not in body:
        raise Malformed("it has no messages")
    found = conversation(body["messages"], system=body.get("system"), tools=body.get("tools"))
    content = answer_of(value).get("content")
    parts = content if isinstance(content, list) else []
    texts = [one["text"] for one in parts if isinstance(one, dict) and "text" in one]
    return [
        Request(
            messages=found.messages,
            tools=found.tools,
            n_left_out=found.n_left_out,
            reply="".join(map(str, texts)) or None,
        )
    ]
