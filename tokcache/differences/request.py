"""Reads a request of the known APIs into one shape: tools, messages with parts, and parameters.

The APIs: OpenAI chat completions, responses and completions, Anthropic messages, and plain text.
"""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from typing import Any

from tokcache.errors import InvalidRequest

MAX_TOOLS = 10_000
MAX_MESSAGES = 50_000
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# Parameters that chat templates or servers write into the prompt.
PROMPT_SETTINGS = (
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "enable_thinking",
    "reasoning_effort",
    "reasoning",
    "thinking",
    "tool_choice",
    "output_config",
    "response_format",
    "add_generation_prompt",
    "continue_final_message",
)
_PROMPT_FIELDS = {"messages", "tools", "functions", "system", "instructions", "input", "prompt"}
# Tuples, because a foreign type may be a list or an object, which no set can be asked for.
_IMAGES = ("image", "image_url", "input_image", "input_audio", "audio", "audio_url", "video")
_IMAGES += ("video_url", "document", "file", "input_file")
_THINKING = ("reasoning_content", "reasoning", "thinking")


class Kind(StrEnum):
    """The kinds of parts of a message."""

    TEXT = "text"
    THINKING = "thinking"
    IMAGE = "image"
    CALL = "tool call"
    RESULT = "tool result"


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message: its kind, its text, and the field of the request that holds it."""

    kind: Kind
    text: str = dataclasses.field(repr=False)
    field: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """A message of any API; `index` is its place in the list of messages, None for a system text.

    Messages are compared without the fields' names, which hold the index.
    """

    role: str
    parts: tuple[Part, ...]
    field: str
    index: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Return role and content: equal for equal messages at any place."""
        return (self.role, *((part.kind, part.text) for part in self.parts))

    @property
    def n_chars(self) -> int:
        """Return the length of all texts."""
        return sum(len(part.text) for part in self.parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A request in one shape; `body` is the request as it was read."""

    api: str
    messages: tuple[Message, ...]
    tools: tuple[Part, ...] = ()
    model: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    body: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def is_plain(self) -> bool:
        """Return whether the prompt is a text, not a chat."""
        return self.api in ("text", "completion")

    @property
    def n_chars(self) -> int:
        """Return the length of all texts of the prompt."""
        texts = sum(message.n_chars for message in self.messages)
        return texts + sum(len(tool.text) for tool in self.tools)


def parse_request(found: Any) -> Request:
    """Return a request that was read from JSON, or a plain text.

    Errors: InvalidRequest names the field that is not one of a request.
    """
    if isinstance(found, str):
        return _plain(found, "text", {})
    if isinstance(found, list):
        found = {"messages": found}
    if not isinstance(found, dict):
        raise InvalidRequest(
            f"a request is a JSON object or a list of messages, not {type(found).__name__}"
        )
    if "messages" in found:
        is_anthropic = "system" in found or _has_anthropic_blocks(found)
        return _chat(found, "anthropic" if is_anthropic else "chat")
    if "input" in found:
        return _responses(found)
    if "prompt" in found:
        prompt = found["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise InvalidRequest("`prompt` must be one text, not a list or token ids")
        return _plain(prompt, "completion", found)
    raise InvalidRequest(
        "a request needs `messages`, `input` or `prompt`; found "
        + (", ".join(f"`{key}`" for key in list(found)[:8]) or "an empty object")
    )


def _plain(text: str, api: str, body: dict[str, Any]) -> Request:
    field = "prompt" if body else ""
    message = Message("", (Part(Kind.TEXT, text, field),), field)
    return Request(api, (message,), **_rest(body))


def _rest(body: dict[str, Any]) -> dict[str, Any]:
    """Return model, settings and parameters of a request."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidRequest(f"`model` must be a text, not {type(model).__name__}")
    settings = {name: body[name] for name in PROMPT_SETTINGS if name in body}
    others = {
        name: value
        for name, value in body.items()
        if name not in _PROMPT_FIELDS and name not in settings and name != "model"
    }
    return {"model": model, "settings": settings, "parameters": others, "body": body}


def _has_anthropic_blocks(body: dict[str, Any]) -> bool:
    """Return whether contents or tools have a shape that only Anthropic's API has."""
    if any(isinstance(tool, dict) and "input_schema" in tool for tool in _list(body, "tools")):
        return True
    own = ("tool_use", "tool_result", "thinking", "redacted_thinking")
    for message in _list(body, "messages"):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(
            isinstance(block, dict) and block.get("type") in own for block in content
        ):
            return True
    return False


def _list(body: dict[str, Any], name: str) -> list[Any]:
    found = body.get(name)
    if found is None:
        return []
    if not isinstance(found, list):
        raise InvalidRequest(f"`{name}` must be a list, not {type(found).__name__}")
    return found


def _chat(body: dict[str, Any], api: str) -> Request:
    messages = []
    if body.get("system"):
        parts = _parts(body["system"], "system")
        messages.append(Message("system", parts, "system"))
    found = _list(body, "messages")
    if not found:
        raise InvalidRequest("`messages` is empty")
    if len(found) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(found):,} messages; at most {MAX_MESSAGES:,} are compared")
    messages += [_message(each, f"messages[{at}]", at) for at, each in enumerate(found)]
    return Request(api, tuple(messages), _tools(body), **_rest(body))


def _message(found: Any, field: str, index: int) -> Message:
    if not isinstance(found, dict):
        raise InvalidRequest(f"{field} must be an object, not {type(found).__name__}")
    role = found.get("role")
    if role not in ROLES:
        shown = json.dumps(role)[:40]
        raise InvalidRequest(f"{field} has the role {shown}; known are {', '.join(ROLES)}")
    parts = [
        Part(Kind.THINKING, found[name], f"{field}.{name}")
        for name in _THINKING
        if isinstance(found.get(name), str) and found[name]
    ]
    content = found.get("content")
    is_result = role in ("tool", "function")
    if is_result and isinstance(found.get("tool_call_id"), str):
        parts.append(Part(Kind.CALL, found["tool_call_id"], f"{field}.tool_call_id"))
    if content is not None:
        kind = Kind.RESULT if is_result else Kind.TEXT
        parts += _parts(content, f"{field}.content", kind)
    calls = found.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise InvalidRequest(f"{field}.tool_calls must be a list, not {type(calls).__name__}")
    for at, call in enumerate(calls or []):
        parts += _call(call, f"{field}.tool_calls[{at}]")
    return Message(role, tuple(parts), field, index)


def _parts(content: Any, field: str, kind: Kind = Kind.TEXT) -> tuple[Part, ...]:
    """Return the parts of a content: a text, or a list of blocks."""
    if isinstance(content, str):
        return (Part(kind, content, field),)
    if not isinstance(content, list):
        raise InvalidRequest(
            f"{field} must be a text or a list of blocks, not {type(content).__name__}"
        )
    parts: list[Part] = []
    for at, block in enumerate(content):
        here = f"{field}[{at}]"
        if isinstance(block, str):
            parts.append(Part(kind, block, here))
            continue
        if not isinstance(block, dict):
            raise InvalidRequest(f"{here} must be an object, not {type(block).__name__}")
        sort = block.get("type")
        if sort in ("thinking", "redacted_thinking", "reasoning"):
            text = block.get("thinking") or block.get("data") or block.get("text") or ""
            parts.append(Part(Kind.THINKING, _text(text), f"{here}.thinking"))
        elif sort == "tool_use":
            parts += _call(block, here)
        elif sort == "tool_result":
            parts.append(Part(Kind.CALL, _text(block.get("tool_use_id")), f"{here}.tool_use_id"))
            parts += _parts(block.get("content") or "", f"{here}.content", Kind.RESULT)
        elif isinstance(block.get("text"), str):
            parts.append(Part(kind, block["text"], f"{here}.text"))
        elif sort in _IMAGES:
            parts.append(Part(Kind.IMAGE, _without_marks(block), here))
        else:
            parts.append(Part(kind, _without_marks(block), here))
    return tuple(parts)


def _call(call: Any, field: str) -> list[Part]:
    """Return a tool call's id and its name with the arguments."""
    if not isinstance(call, dict):
        raise InvalidRequest(f"{field} must be an object, not {type(call).__name__}")
    function = call.get("function")
    inner = function if isinstance(function, dict) else call
    arguments = inner.get("arguments", inner.get("input", {}))
    text = f"{_text(inner.get('name'))} {_text(arguments)}"
    ids = call.get("call_id") or call.get("id")
    parts = [Part(Kind.CALL, ids, f"{field}.id")] if isinstance(ids, str) else []
    return [*parts, Part(Kind.CALL, text, f"{field}.arguments")]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _without_marks(block: dict[str, Any]) -> str:
    """Return a block as JSON, without the marks of Anthropic's cache, which are not in a prompt."""
    return _text({key: value for key, value in block.items() if key != "cache_control"})


def _tools(body: dict[str, Any]) -> tuple[Part, ...]:
    parts = []
    for name in ("tools", "functions"):
        found = _list(body, name)
        if len(found) > MAX_TOOLS:
            raise InvalidRequest(
                f"`{name}` has {len(found):,} entries; at most {MAX_TOOLS:,} are compared"
            )
        for at, tool in enumerate(found):
            if not isinstance(tool, dict):
                raise InvalidRequest(f"{name}[{at}] must be an object, not {type(tool).__name__}")
            parts.append(Part(Kind.TEXT, _without_marks(tool), f"{name}[{at}]"))
    return tuple(parts)


def _responses(body: dict[str, Any]) -> Request:
    """Return a request of OpenAI's Responses API."""
    messages = []
    if body.get("instructions"):
        parts = _parts(body["instructions"], "instructions")
        messages.append(Message("system", parts, "instructions"))
    found = body["input"]
    if isinstance(found, str):
        found = [{"role": "user", "content": found}]
    if not isinstance(found, list) or not found:
        raise InvalidRequest("`input` must be a text or a list of at least one item")
    for at, item in enumerate(found):
        field = f"input[{at}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{field} must be an object, not {type(item).__name__}")
        sort = item.get("type", "message")
        if not isinstance(sort, str):
            raise InvalidRequest(f"{field}.type must be a text, not {type(sort).__name__}")
        if sort == "message":
            messages.append(_message(item, field, at))
        elif sort == "reasoning":
            shown = {key: item[key] for key in ("summary", "content") if item.get(key)}
            part = Part(Kind.THINKING, _text(shown), field)
            messages.append(Message("assistant", (part,), field, at))
        elif sort.endswith("_call_output"):
            output = item.get("output")
            parts = (
                Part(Kind.CALL, _text(item.get("call_id")), f"{field}.call_id"),
                Part(Kind.RESULT, _text(output), f"{field}.output"),
            )
            messages.append(Message("tool", parts, field, at))
        else:
            messages.append(Message("assistant", tuple(_call(item, field)), field, at))
    return Request("responses", tuple(messages), _tools(body), **_rest(body))
