"""Turns a request of any API into the messages and tools that chat templates take."""

from __future__ import annotations

import json
from typing import Any

from tokcache.differences.request import Kind, Request

_KWARGS = ("enable_thinking", "reasoning_effort")


def to_chat(request: Request) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return messages and tools as OpenAI's chat API has them; tool arguments become objects.

    Contents of several texts are joined by line breaks, as servers do for templates that take
    texts only.
    """
    if request.api == "chat":
        messages = [_plain(each) for each in request.body["messages"]]
    else:
        messages = _rebuilt(request)
    tools = []
    for tool in request.body.get("tools") or ():
        function = tool.get("function")
        if not isinstance(function, dict):
            function = {
                "name": tool.get("name"),
                "description": tool.get("description", ""),
                "parameters": tool.get("input_schema", tool.get("parameters", {})),
            }
        tools.append({"type": "function", "function": function})
    return messages, tools or None


def template_variables(request: Request) -> dict[str, Any]:
    """Return the settings of a request that are passed to its chat template."""
    found = request.settings.get("chat_template_kwargs")
    variables = {name: request.settings[name] for name in _KWARGS if name in request.settings}
    return {**variables, **(found if isinstance(found, dict) else {})}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its texts joined and the arguments of its tool calls as objects."""
    message = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        found = [each.get("text") if isinstance(each, dict) else each for each in content]
        texts = [text for text in found if isinstance(text, str)]
        if len(texts) == len(found):
            message["content"] = "\n".join(texts)
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function = {**function, "arguments": _parsed(function["arguments"])}
            calls.append({**call, "function": function})
        else:
            calls.append(call)
    if calls:
        message["tool_calls"] = calls
    return message


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):  # a model may have written broken JSON
        return arguments


def _rebuilt(request: Request) -> list[dict[str, Any]]:
    """Return chat messages for a request of another API; the items of one turn are joined."""
    chat: list[dict[str, Any]] = []
    for message in request.messages:
        own: dict[str, Any] = {"role": message.role or "user", "content": ""}
        is_joined = request.api == "responses" and message.role == "assistant" and bool(chat)
        if is_joined and chat[-1]["role"] == "assistant":
            own = chat[-1]
        ids = ""
        for part in message.parts:
            if part.kind is Kind.RESULT:
                chat.append({"role": "tool", "tool_call_id": ids, "content": part.text})
            elif part.kind is Kind.CALL and part.field.endswith(".arguments"):
                name, _, arguments = part.text.partition(" ")
                function = {"name": name, "arguments": _parsed(arguments)}
                own.setdefault("tool_calls", []).append(
                    {"id": ids, "type": "function", "function": function}
                )
            elif part.kind is Kind.CALL:
                ids = part.text
            elif part.kind is Kind.THINKING:
                before = own.get("reasoning_content")
                own["reasoning_content"] = f"{before}\n{part.text}" if before else part.text
            elif part.kind is Kind.TEXT:
                own["content"] += f"\n{part.text}" if own["content"] else part.text
        if len(own) > 2 or own["content"]:  # noqa: PLR2004 (more than role and content)
            chat += [] if chat and own is chat[-1] else [own]
    return chat
