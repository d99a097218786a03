"""Request bodies of OpenAI's API: chat completions, completions and responses.

A record is a body, or an object that has it as `body`, `request` or `request_body` (as OpenAI's
batch files have), with the answer as `response` if there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokcache.errors import Malformed
from tokcache.replay.traces.chats import conversation, messages_of
from tokcache.replay.traces.request import Request

name = "openai"
about = "request bodies of OpenAI's API, one a line"
_WRAPPED = ("body", "request", "request_body")


def matches(value: Any) -> bool:
    """Return whether a record is a body, or has one; a list of messages is one, too."""
    if isinstance(value, str) or messages_of(value):
        return True
    body = body_of(value, _WRAPPED)
    if any(key in body for key in ("messages", "prompt", "input", "text", "prompt_token_ids")):
        return True
    return "prompt_ids" in _reply(answer_of(value))


def requests(value: Any) -> Iterable[Request]:
    """Return the prompts of a record: several if `prompt` is a list of texts."""
    if isinstance(value, str):
        return [Request(text=value)]
    if isinstance(value, list):
        return [Request(messages=conversation(value).messages)]
    body = body_of(value, _WRAPPED)
    answer = answer_of(value)
    if "messages" in body or isinstance(body.get("input"), list):
        found = conversation(
            body.get("messages", body.get("input")),
            tools=body.get("tools"),
            instructions=body.get("instructions"),
        )
        return [
            Request(
                messages=found.messages,
                tools=found.tools,
                n_left_out=found.n_left_out,
                **_reply(answer),
            )
        ]
    prompt = body.get("prompt", body.get("input", body.get("text")))
    if isinstance(prompt, str):
        return [Request(text=prompt, **_reply(answer))]
    if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
        return [Request(prompt_ids=prompt, **_reply(answer))]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
        return [Request(text=one) for one in prompt]
    reply = _reply(answer)
    ids = body.get("prompt_token_ids")
    if _are_ids(ids):
        reply["prompt_ids"] = ids
    if reply.get("prompt_ids"):  # a log that keeps no text
        return [Request(**reply)]
    raise Malformed("it has neither messages nor a prompt that is a text or token ids")


def body_of(value: Any, wrapped: Iterable[str]) -> Mapping[str, Any]:
    """Return the body of a request, {} if the record is no object."""
    if not isinstance(value, dict):
        return {}
    for key in wrapped:
        if isinstance(value.get(key), dict):
            inside: Mapping[str, Any] = value[key]
            return inside
    return value


def answer_of(value: Any) -> Mapping[str, Any]:
    """Return the body of the answer that a record has, or {}."""
    answer = value.get("response") if isinstance(value, dict) else None
    if isinstance(answer, dict) and isinstance(answer.get("body"), dict):
        answer = answer["body"]
    return answer if isinstance(answer, dict) else {}


def _reply(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply's text, and its ids and those of the prompt where the server gave them.

    vLLM returns them with `return_token_ids`.
    """
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return {}
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    found: dict[str, Any] = {"reply": text if isinstance(text, str) else None}
    if _are_ids(choice.get("token_ids")):
        found["reply_ids"] = choice["token_ids"]
    for owner in (answer, choice):
        if _are_ids(owner.get("prompt_token_ids")):
            found["prompt_ids"] = owner["prompt_token_ids"]
    return found


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)
