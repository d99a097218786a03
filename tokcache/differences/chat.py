"""Turns a request of any API into the messages and tools that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from tokcache.differences.request import Kind, Message, Request

_KWARGS = ("enable_thinking", "reasoning_effort")


def to_chat(request: Request) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return messages and tools as OpenAI's chat API has them; tool arguments become objects.

    Contents of several texts are joined by line breaks, as servers do for templates that take
    texts only.
    """
    if request.api == "chat":
        messages = [_with_plain_content(dict(each)) for each in _list_of(request.body)]
    else:
        messages = _rebuilt(request)
    tools = [_tool(each) for each in request.body.get("tools") or ()]
    return messages, tools or None


def template_variables(request: Request) -> dict[str, Any]:
    """Return the settings of a request that are passed to its chat template."""
    found = request.settings.get("chat_template_kwargs")
    variables = dict(found) if isinstance(found, dict) else {}
    return {**{name: request.settings[name] for name in _KWARGS if name in request.settings},
            **variables}  # fmt: skip


def _list_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = body["messages"]
    return found


def _with_plain_content(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        found = [each.get("text") if isinstance(each, dict) else each for each in content]
        texts = [text for text in found if isinstance(text, str)]
        if len(texts) == len(found):
            message["content"] = "\n".join(texts)
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    return message


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        return {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
    return call


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):  # a model may have written broken JSON
        return arguments


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as OpenAI's chat API has it."""
    if isinstance(tool.get("function"), dict):
        return tool
    function = {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": tool.get("input_schema", tool.get("parameters", {})),
    }
    return {"type": "function", "function": function}


def _rebuilt(request: Request) -> list[dict[str, Any]]:
    """Return chat messages for a request of another API; its items of one turn are joined."""
    chat: list[dict[str, Any]] = []
    for message in request.messages:
        texts = [part.text for part in message.parts if part.kind is Kind.TEXT]
        thinking = [part.text for part in message.parts if part.kind is Kind.THINKING]
        calls = _calls(message)
        results = _results(message)
        chat += results
        is_continued = bool(chat) and chat[-1]["role"] == "assistant" == message.role
        if is_continued and request.api == "responses":
            own = chat[-1]
        elif texts or thinking or calls or not results:
            own = {"role": message.role or "user", "content": ""}
            chat.append(own)
        else:
            continue
        own["content"] = "\n".join(filter(None, [own["content"], *texts]))
        if thinking:
            own["reasoning_content"] = "\n".join(thinking)
        if calls:
            own["tool_calls"] = [*own.get("tool_calls", ()), *calls]
    return chat


def _calls(message: Message) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    ids = ""
    for part in message.parts:
        if part.kind is not Kind.CALL or message.role == "tool":
            continue
        if part.field.endswith(".id"):
            ids = part.text
        elif part.field.endswith(".arguments"):
            name, _, arguments = part.text.partition(" ")
            function = {"name": name, "arguments": _parsed(arguments)}
            calls.append({"id": ids, "type": "function", "function": function})
    return calls


def _results(message: Message) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    ids = ""
    for part in message.parts:
        if part.field.endswith(("tool_use_id", "call_id")):
            ids = part.text
        elif part.kind is Kind.RESULT:
            results.append({"role": "tool", "tool_call_id": ids, "content": part.text})
    return results
