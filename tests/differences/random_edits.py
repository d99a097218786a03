"""Random edits of chats, each with the class that it must be given.

An edit takes an earlier request and returns it and a later one. Both may get a value that then
changes, such as a date; the later one always has more messages at its end.
"""

from __future__ import annotations

import base64
import copy
import datetime as dt
import json
import random
import re
import uuid
from collections.abc import Callable
from typing import Any

from tokcache.differences import DifferenceClass as C

Chat = list[dict[str, Any]]
Pair = tuple[dict[str, Any], dict[str, Any]]

_WORDS = (
    "timetable", "seat", "window", "luggage", "harbour", "lantern", "bridge", "winter", "orchard",
    "copper", "violin", "kettle", "garden", "marble", "station", "captain", "ladder", "blanket",
)  # fmt: skip
_TOOLS = ("cancel", "book", "search", "refund", "calculate", "transfer", "list", "update")


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(4, 12))).capitalize() + "."


def synthetic_chat(rng: random.Random, n_turns: int) -> Chat:
    """Return a chat of random sentences with tool calls."""
    system = "\n".join(f"{n}. {sentence(rng)} {sentence(rng)}" for n in range(1, 12))
    chat: Chat = [{"role": "system", "content": system}]
    for turn in range(n_turns):
        chat.append({"role": "user", "content": f"{sentence(rng)} {sentence(rng)}"})
        if turn % 2:
            arguments = {word: rng.randint(1, 99) for word in rng.sample(_WORDS, 3)}
            function = {"name": "search", "arguments": json.dumps(arguments)}
            ids = f"call_{turn}"
            chat += [
                {"role": "assistant", "content": None,
                 "tool_calls": [{"id": ids, "type": "function", "function": function}]},
                {"role": "tool", "tool_call_id": ids, "content": json.dumps({"found": turn})},
            ]  # fmt: skip
        chat.append({"role": "assistant", "content": f"{sentence(rng)}\n\n{sentence(rng)}"})
    return chat


def tools(rng: random.Random) -> list[dict[str, Any]]:
    found = []
    for name in rng.sample(_TOOLS, rng.randint(3, 6)):
        properties = {word: {"type": "string"} for word in rng.sample(_WORDS, 3)}
        parameters = {"type": "object", "properties": properties}
        function = {"name": name, "description": sentence(rng), "parameters": parameters}
        found.append({"type": "function", "function": function})
    return found


def _moment(rng: random.Random) -> dt.datetime:
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return start + dt.timedelta(seconds=rng.randint(0, 30_000_000))


_FORMS = (
    "%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M:%S UTC", "%d/%m/%Y", "%B %d, %Y",
    "%A, %d %B %Y at %I:%M %p", "%a %b %d %H:%M:%S UTC %Y", "%H:%M", "%d %b %Y", "%d.%m.%Y",
    "%Y-%m-%dT%H:%M:%S.%f+00:00", "%A, %B %d, %Y %I:%M %p",
)  # fmt: skip
_DATES = ("Current date: {}", "Now: {}", "Today is {}.", "<env time='{}'/>", '{{"now": "{}"}}')
_IDS = (
    "session: {}",
    "Request {}",
    "trace_id={}",
    '{{"nonce": "{}"}}',
    "Workspace run-{}/src",
)
_COUNTS = (
    "Turn {}",
    "tokens used: {}",
    "Step {} of 50",
    '{{"round": {}}}',
    "Budget left: {} units",
)


def _random_value(rng: random.Random) -> Callable[[], str]:
    n_bytes = rng.choice((6, 8, 12, 16))
    return rng.choice((
        lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        lambda: rng.randbytes(n_bytes).hex(),
        lambda: base64.urlsafe_b64encode(rng.randbytes(3 * (n_bytes // 3) + 3)).decode(),
        lambda: "req_" + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=16)),
    ))  # fmt: skip


def _with_line(rng: random.Random, chat: Chat, lines: tuple[str, str]) -> tuple[Chat, Chat]:
    """Put a line each at one place of the system text."""
    parts = chat[0]["content"].split("\n")
    at = rng.randint(0, len(parts))
    both = []
    for line in lines:
        other = copy.deepcopy(chat)
        other[0]["content"] = "\n".join([*parts[:at], line, *parts[at:]])
        both.append(other)
    return both[0], both[1]


def _date(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    template, form = rng.choice(_DATES), rng.choice(_FORMS)
    moment = _moment(rng)
    later = moment + dt.timedelta(days=rng.choice((0, 1, 30)), minutes=rng.randint(1, 600))
    if moment.strftime(form) == later.strftime(form):
        later += dt.timedelta(days=1, minutes=1)
    stamps = [template.format(each.strftime(form)) for each in (moment, later)]
    return _with_line(rng, chat, (stamps[0], stamps[1]))


def _random(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    template, value = rng.choice(_IDS), _random_value(rng)
    return _with_line(rng, chat, (template.format(value()), template.format(value())))


def _counter(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    template, start = rng.choice(_COUNTS), rng.choice((3, 9, 47, 1_203, 99_870))
    more = start + rng.randint(1, max(2, start // 10))
    return _with_line(rng, chat, (template.format(start), template.format(more)))


def _place(rng: random.Random, chat: Chat, role: str | None = None) -> int:
    """Return the index of an earlier message with some words."""
    fits = [
        index
        for index, each in enumerate(chat[:-1])
        if index and role in (None, each["role"])
        and len(re.findall(r"(?<!\S)[a-z]+ [a-z]+(?!\S)", each.get("content") or "")) > 1
    ]  # fmt: skip
    return rng.choice(fits)


def _white_space(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    before, after = copy.deepcopy(chat), copy.deepcopy(chat)
    at = _place(rng, chat)
    text = before[at]["content"]
    how = rng.randrange(4)
    if how == 0:
        before[at]["content"] = text.strip() + " \n"
        after[at]["content"] = text.strip()
    elif how == 1:
        after[at]["content"] = re.sub(r"(\w) (\w)", r"\1  \2", text, count=1)
    elif how == 2:
        before[at]["content"] = text.replace(". ", ".\n") + "\nBye."
        after[at]["content"] = before[at]["content"].replace("\n", "\r\n")
    else:
        after[at]["content"] = text.replace(" ", "\u00a0", 1)
    return before, after


def _edited(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    after = copy.deepcopy(chat)
    at = _place(rng, chat) if rng.random() < 0.7 else 0
    words = after[at]["content"].split(" ")
    fits = [index for index, word in enumerate(words) if word.isalpha() and word.islower()]
    start = rng.choice(fits)
    # Other words than those of the chat, so that an edit is no change of order.
    new = rng.choices(("yonder", "perhaps", "sideways", "hardly", "twofold"), k=rng.randint(1, 4))
    words[start : start + rng.randint(1, 3)] = new
    after[at]["content"] = " ".join(words)
    return copy.deepcopy(chat), after


def _dropped(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    at = rng.randint(1, len(chat) - 3)
    return copy.deepcopy(chat), copy.deepcopy(chat[:at] + chat[at + rng.randint(1, 2) :])


def _inserted(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    at = rng.randint(1, len(chat) - 2)
    new = {"role": rng.choice(("user", "system")), "content": f"Reminder: {sentence(rng)}"}
    return copy.deepcopy(chat), copy.deepcopy([*chat[:at], new, *chat[at:]])


def _thinking(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    before = copy.deepcopy(chat)
    at = _place(rng, chat, "assistant")
    if rng.random() < 0.5:
        before[at]["reasoning_content"] = sentence(rng)
    else:
        before[at]["content"] = f"<think>\n{sentence(rng)}\n</think>\n\n{before[at]['content']}"
    return before, copy.deepcopy(chat)


def _role(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    after = copy.deepcopy(chat)
    at = _place(rng, chat, "user")
    after[at]["role"] = rng.choice(("system", "developer", "assistant"))
    return copy.deepcopy(chat), after


def _image(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    both = copy.deepcopy(chat), copy.deepcopy(chat)
    at = _place(rng, chat, "user")
    for other in both:
        data = base64.b64encode(rng.randbytes(60)).decode()
        url = {"url": f"data:image/png;base64,{data}"}
        text = {"type": "text", "text": other[at]["content"]}
        other[at]["content"] = [text, {"type": "image_url", "image_url": url}]
    if rng.random() < 0.5:
        both[1][at]["content"].pop()
    return both


def _reordered_json(rng: random.Random, chat: Chat) -> tuple[Chat, Chat]:
    """Write a JSON value in the system text, or a tool call, with its keys in another order."""
    keys = rng.sample(_WORDS, 5)
    value = {key: rng.choice((1, True, "yes", [1, 2], {"deep": key})) for key in keys}
    other = {key: value[key] for key in [*keys[1:], keys[0]]}
    indent = rng.choice((None, 2))
    lines = json.dumps(value, indent=indent), json.dumps(other, indent=indent)
    return _with_line(rng, chat, (f"Settings: {lines[0]}", f"Settings: {lines[1]}"))


IN_MESSAGES: dict[C, Callable[[random.Random, Chat], tuple[Chat, Chat]]] = {
    C.DATE: _date,
    C.RANDOM: _random,
    C.COUNTER: _counter,
    C.WHITE_SPACE: _white_space,
    C.EDITED: _edited,
    C.DROPPED: _dropped,
    C.INSERTED: _inserted,
    C.THINKING: _thinking,
    C.ROLE: _role,
    C.IMAGE: _image,
    C.REORDERED: _reordered_json,
}
IN_REQUESTS = (*IN_MESSAGES, C.TOOLS, C.PARAMETERS, C.SETTINGS)
# In a rendered text roles and images are not seen as such.
IN_TEXTS = tuple(kind for kind in IN_MESSAGES if kind not in (C.ROLE, C.IMAGE))


def edited_requests(rng: random.Random, chat: Chat, kind: C) -> Pair:
    """Return an earlier request with some messages of `chat` and a later one with an edit."""
    n_before = rng.randint(min(6, len(chat) - 2), len(chat) - 2)
    held, later = chat[:n_before], chat[n_before : n_before + rng.randint(0, 2)]
    body: dict[str, Any] = {"model": "m", "temperature": 0.5, "tools": tools(rng)}
    before, after = copy.deepcopy(body), copy.deepcopy(body)
    if kind is C.REORDERED and rng.random() < 0.5:
        after["tools"] = [*body["tools"][1:], body["tools"][0]]
    elif kind in IN_MESSAGES:
        old, new = IN_MESSAGES[kind](rng, held)
        return {**before, "messages": old}, {**after, "messages": [*new, *later]}
    elif kind is C.TOOLS:
        at = rng.randrange(len(body["tools"]))
        if rng.random() < 0.5:
            del after["tools"][at]
        else:
            after["tools"][at]["function"]["description"] = sentence(rng)
    elif kind is C.SETTINGS:
        before["reasoning_effort"], after["reasoning_effort"] = "low", "high"
    else:
        after["temperature"], later = 0.9, []
    return {**before, "messages": held}, {**after, "messages": [*held, *later]}


def written(chat: Chat) -> str:
    """Return the ChatML of a chat, with thinking and tool calls in the text."""
    parts = []
    for each in chat:
        thinking = each.get("reasoning_content")
        inside = f"<think>\n{thinking}\n</think>\n\n" if thinking else ""
        for call in each.get("tool_calls") or ():
            inside += f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"
        parts.append(f"<|im_start|>{each['role']}\n{inside}{each['content'] or ''}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


def edited_texts(rng: random.Random, chat: Chat, kind: C) -> tuple[str, str]:
    """Return two prompts as a chat template writes them."""
    n_before = rng.randint(min(6, len(chat) - 2), len(chat) - 2)
    old, new = IN_MESSAGES[kind](rng, chat[:n_before])
    later = chat[n_before : n_before + rng.randint(0, 2)]
    return written(old), written([*new, *later])
