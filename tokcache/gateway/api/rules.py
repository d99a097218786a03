"""Opt-in rules against parts of a prompt that change with every request and end its prefix.

A rule changes the request, so none is on by default, and a header names those that changed one.
Without them the gateway counts the requests in which a nonce or a clock was seen.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

# A client's billing line at the start of the system text holds a nonce.
_NONCE = re.compile(r"\A(x-anthropic-billing-header:[^\n]*?\bcch=)[0-9A-Za-z]+")
# A line tells the time if one of these words comes before a date or time. At most 80 characters are
# before the word, between both, and after the date.
_WORD = re.compile(r"\b(?:now|today|date|time)\b", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2}:\d{2}")
_MAX_AROUND, _MAX_LINE = 80, 260
_MAX_SEARCHED = 64 << 10  # characters of a system text


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
    if _clock_lines(system):
        seen.append("move_clock")
    return seen


def _clock_lines(text: str) -> list[tuple[int, int]]:
    """Return the start and stop of each line that tells the time, with its end of line.

    Cost: O(len(text)) up to the first 65,536 characters, which are all that is searched.
    """
    found = []
    stop = 0
    for date in _DATE.finditer(text, 0, _MAX_SEARCHED):
        if date.start() < stop:
            continue  # in a line that was looked at
        start = text.rfind("\n", stop - 1 if stop else 0, date.start()) + 1
        stop = text.find("\n", date.end()) + 1 or len(text)
        if stop - start <= _MAX_LINE and _tells_time(text[start:stop].rstrip("\n")):
            found.append((start, stop))
    return found


def _tells_time(line: str) -> bool:
    ends = [word.end() for word in _WORD.finditer(line) if word.start() <= _MAX_AROUND]
    for date in _DATE.finditer(line):
        n_before = bisect_right(ends, date.start())
        is_near = n_before > 0 and date.start() - ends[n_before - 1] <= _MAX_AROUND
        if is_near and len(line) - date.end() <= _MAX_AROUND:
            return True
    return False


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
    spans = _clock_lines(system or "")
    if system is None or not spans:
        return None
    lines = [system[start:stop].strip() for start, stop in spans]
    bounds = [0, *(place for span in spans for place in span), len(system)]
    kept = (system[bounds[i] : bounds[i + 1]] for i in range(0, len(bounds), 2))
    body = _with_system(body, "".join(kept))
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
