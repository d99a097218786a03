"""Messages of OpenAI's and Anthropic's requests in one form, which chat templates understand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokcache.errors import Malformed
from tokcache.replay.traces.request import Conversation, Message

_TEXT_TYPES = ("text", "input_text", "output_text", "refusal", "reasoning", "thinking")


def conversation(
    messages: Any, *, system: Any = None, tools: Any = None, instructions: Any = None
) -> Conversation:
    """Return the messages in the form of OpenAI's chat completions.

    Anthropic's `system`, blocks "tool_use" and "tool_result", and its tools become OpenAI's; so do
    the items of OpenAI's Responses API. Parts that are not text are counted.

    Errors: Malformed.
    """
    if not isinstance(messages, list):
        raise Malformed("its messages are no list")
    made = Conversation(tools=_tools(tools))
    first = system if system is not None else instructions
    if first:
        _add(made, "system", first, {})
    for message in messages:
        if not isinstance(message, dict):
            raise Malformed("a message is no object")
        kind = message.get("type")
        if kind == "function_call":
            _add_calls(made, "", [_call(message, message.get("call_id"))])
        elif kind == "function_call_output":
            _add_result(made, message.get("output"), message.get("call_id"))
        elif "role" in message:
            _add(made, message["role"], message.get("content"), message)
        elif kind != "reasoning":
            raise Malformed("a message has no role")
    return made


def _add(made: Conversation, role: Any, content: Any, message: Mapping[str, Any]) -> None:
    if not isinstance(role, str):
        raise Malformed("a message's role is no string")
    role = {"developer": "system", "function": "tool"}.get(role, role)
    text, calls, results = _parts(made, content)
    for call_id, result in results:  # of Anthropic: they come before the user's own text
        _add_result(made, result, call_id)
    given = message.get("tool_calls") or ()
    if not isinstance(given, list | tuple) or not all(isinstance(one, dict) for one in given):
        raise Malformed("a message's tool_calls are no list of objects")
    calls += [_call(one.get("function") or one, one.get("id")) for one in given]
    if calls:
        _add_calls(made, text, calls)
    elif text or not results:
        own: dict[str, Any] = {"role": role, "content": text}
        own |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
        made.messages.append(own)


def _add_calls(made: Conversation, text: str, calls: list[dict[str, Any]]) -> None:
    last = made.messages[-1] if made.messages else {}
    if not text and last.get("role") == "assistant" and "tool_calls" in last:
        made.messages[-1] = {**last, "tool_calls": [*last["tool_calls"], *calls]}
    else:
        made.messages.append({"role": "assistant", "content": text, "tool_calls": calls})


def _add_result(made: Conversation, content: Any, call_id: Any) -> None:
    text, _, _ = _parts(made, content)
    made.messages.append({"role": "tool", "content": text, "tool_call_id": call_id or ""})


def _call(function: Mapping[str, Any], call_id: Any) -> dict[str, Any]:
    arguments = function.get("arguments", function.get("input", {}))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # a model may have written something else
            arguments = json.loads(arguments)
    own = {"name": str(function.get("name", "")), "arguments": arguments}
    return {"id": str(call_id or ""), "type": "function", "function": own}


def _parts(
    made: Conversation, content: Any
) -> tuple[str, list[dict[str, Any]], list[tuple[Any, Any]]]:
    """Return the text of a message's content, its calls of tools, and the results in it."""
    if content is None or isinstance(content, str):
        return content or "", [], []
    if not isinstance(content, list):
        raise Malformed("a message's content is neither a string nor a list")
    texts, calls, results = [], [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise Malformed("a part of a message is no object")
        kind = part.get("type", "text")
        text = part.get("text", part.get("content", part.get("thinking")))
        if kind in _TEXT_TYPES and isinstance(text, str):
            texts.append(text)
        elif kind in ("tool_use", "tool_call"):
            calls.append(_call(part, part.get("id")))
        elif kind in ("tool_result", "tool_call_response"):
            found = part.get("content", part.get("result", part.get("response")))
            is_content = found is None or isinstance(found, str | list)
            results.append(
                (part.get("tool_use_id", part.get("id")), found if is_content else _dump(found))
            )
        else:
            made.n_left_out += 1
    return "\n".join(texts), calls, results


def _tools(tools: Any) -> list[Mapping[str, Any]] | None:
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise Malformed("its tools are no list of objects")
    return [_tool(one) for one in tools]


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(tool.get("function"), dict):
        return tool
    function = {
        "name": tool.get("name", ""),
        "description": tool.get("description", ""),
        "parameters": tool.get("parameters", tool.get("input_schema", {})),
    }
    return {"type": "function", "function": function}


def neutral_text(
    messages: Iterable[Message], tools: Iterable[Mapping[str, Any]] | None = None
) -> str:
    """Join messages without a chat template: `role: content`, each followed by an empty line.

    Tools, and calls of them, are written as JSON, one a line.
    """
    parts = [_dump(tool) + "\n" for tool in tools or ()]
    for message in messages:
        calls = "".join("\n" + _dump(call["function"]) for call in message.get("tool_calls", ()))
        parts.append(f"{message['role']}: {message['content']}{calls}\n\n")
    return "".join(parts) + "assistant:"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def messages_of(value: Any) -> list[Message] | None:
    """Return a value that is a list of messages, or None."""
    is_list = isinstance(value, list) and bool(value)
    return value if is_list and all(isinstance(one, dict) for one in value) else None
