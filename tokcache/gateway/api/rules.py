"""Opt-in rules against parts of a prompt that change with every request and end its prefix.

A rule changes the request, so none is on by default, and a header names those that changed one.
Without them the gateway counts the requests in which a nonce or a clock was seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

# A client's billing line at the start of the system text holds a nonce.
_NONCE = re.compile(r"\A(x-anthropic-billing-header:[^\n]*?\bcch=)[0-9A-Za-z]+")
_CLOCK = re.compile(
    r"^[^\n]{0,80}\b(?:now|today|date|time)\b[^\n]{0,80}"
    r"(?:\d{4}-\d{2}-\d{2}|\d{1,2}:\d{2})[^\n]{0,80}$\n?",
    re.IGNORECASE | re.MULTILINE,
)


def blanked(text: str) -> str:
    """Return a system text whose billing line has the nonce that llama-server itself writes."""
    return _NONCE.sub(r"\g<1>fffff", text)


def apply(body: dict[str, Any], rules: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a chat completion after the rules, and the names of those that changed it."""
    changed = []
    for name in rules:
        after = RULES[name](body)
        if after is not None:
            body = after
            changed.append(name)
    return body, changed


def suggested(body: dict[str, Any]) -> list[str]:
    """Return the rules for the volatile parts that a chat completion has at a known place."""
    system = _system(body)
    if system is None:
        return []
    seen = []
    if _NONCE.search(system):
        seen.append("blank_nonce")
    if _CLOCK.search(system):
        seen.append("move_clock")
    return seen


def _system(body: dict[str, Any]) -> str | None:
    """Return the text of the first message if it is a system message of one text."""
    messages = body.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    if isinstance(first, dict) and first.get("role") in ("system", "developer"):
        content = first.get("content")
        return content if isinstance(content, str) else None
    return None


def _with_system(body: dict[str, Any], text: str) -> dict[str, Any]:
    first, *rest = body["messages"]
    return {**body, "messages": [{**first, "content": text}, *rest]}


def _blank_nonce(body: dict[str, Any]) -> dict[str, Any] | None:
    system = _system(body)
    if system is None or blanked(system) == system:
        return None
    return _with_system(body, blanked(system))


def _move_clock(body: dict[str, Any]) -> dict[str, Any] | None:
    """Move lines with a date or time from the system text to the end of the last user message."""
    system = _system(body)
    lines = [found.group().strip() for found in _CLOCK.finditer(system or "")]
    if system is None or not lines:
        return None
    body = _with_system(body, _CLOCK.sub("", system))
    for position in range(len(body["messages"]) - 1, 0, -1):
        message = body["messages"][position]
        is_user = isinstance(message, dict) and message.get("role") == "user"
        content, told = message.get("content") if is_user else None, "\n".join(lines)
        if isinstance(content, str):
            body["messages"][position] = {**message, "content": f"{content}\n\n{told}"}
            return body
        if isinstance(content, list):
            parts = [*content, {"type": "text", "text": told}]
            body["messages"][position] = {**message, "content": parts}
            return body
    return None


def _sort_tools(body: dict[str, Any]) -> dict[str, Any] | None:
    tools = body.get("tools")
    if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
        return None

    def name(tool: dict[str, Any]) -> str:
        function = tool.get("function")
        return str(function.get("name") if isinstance(function, dict) else tool.get("name"))

    after = sorted(tools, key=name)
    return None if after == tools else {**body, "tools": after}


RULES: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
    "blank_nonce": _blank_nonce,
    "move_clock": _move_clock,
    "sort_tools": _sort_tools,
}
