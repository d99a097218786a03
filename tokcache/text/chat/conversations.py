"""The made-up chats that an audit renders: one case for each feature in which templates differ.

Every text in them occurs nowhere else in the chat, so a rendering shows which texts it holds and
where each message ends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A text for switches that are written into the prompt, such as date_string.
FIXED_TEXT = "1 January 2024"
N_TURNS = 6
_MANY_TURNS = 40


class Mode(StrEnum):
    """The two renderings that are compared for each answer of a case."""

    TURNS = "turns"  # prompt and answer, with the next prompt
    CLOCK = "clock"  # the same, with the next prompt rendered later
    CONTINUE = "continue"  # prompt and half an answer, with the prompt that continues it
    NO_PROMPT = "no_prompt"  # chats that end with an answer, without a generation prompt


class Content(StrEnum):
    """The ways to write the content of a message that has none besides its tool calls."""

    EMPTY = "empty"
    MISSING = "missing"
    NULL = "null"


@dataclass(frozen=True, slots=True)
class Step:
    """One message.

    `sent` is the message as later requests hold it. `clean` is the message whose rendering shows
    how the template writes the answer; its last mark is replaced by `generated`, the text as the
    model wrote it. `marks` are texts that the rendering holds if it holds the message.
    """

    sent: dict[str, Any]
    marks: tuple[str, ...] = ()
    clean: dict[str, Any] | None = None
    generated: str | None = None
    thinking: str | None = None  # the content has it before the text, in <think> and </think>

    @property
    def role(self) -> str:
        """The message's role."""
        return str(self.sent["role"])


@dataclass(frozen=True, slots=True)
class Case:
    """A chat, and the feature of templates that it shows."""

    name: str
    title: str
    steps: tuple[Step, ...]
    tools: tuple[dict[str, Any], ...] = ()
    mode: Mode = Mode.TURNS
    content: Content = Content.EMPTY
    has_images: bool = False
    variants: tuple[Case, ...] = field(default=(), repr=False)  # tried if this one is refused
    same_as: str | None = None  # a shorter case that is cured by the same switches

    @property
    def answers(self) -> list[int]:
        """The positions of the messages that the model writes."""
        return [i for i, step in enumerate(self.steps) if step.role == "assistant"]


def all_cases(n_turns: int = N_TURNS) -> list[Case]:
    """Return every case; their chats have `n_turns` turns, the one of many turns 40."""
    system = _system(0)
    plain = _chat(n_turns, _answer)

    def calls(name: str, title: str, make: Callable[[int, Content], list[Step]]) -> Case:
        forms = [
            Case(
                name,
                title,
                (system, *_chat(n_turns, lambda turn, form=form: make(turn, form))),  # type: ignore[misc]
                tools=_TOOLS,
                content=form,
            )
            for form in Content
        ]
        return replace(forms[0], variants=tuple(forms[1:]))

    def answered(change: Callable[[str], str]) -> tuple[Step, ...]:
        return _chat(n_turns, lambda turn: [_changed(turn, change)])

    return [
        Case("plain", "plain chat", plain),
        Case("system", "system prompt", (system, *plain)),
        Case("two_systems", "two system prompts", (system, _system(1), *plain)),
        Case("late_system", "a system prompt later on",
             (system, *plain[:2], _system(1), *plain[2:])),
        Case("many_turns", f"{_MANY_TURNS} turns", (system, *_chat(_MANY_TURNS, _answer)),
             same_as="system"),
        Case("tools", "tools, not called", (system, *plain), tools=_TOOLS),
        Case("tools_alone", "tools, no system prompt", plain, tools=_TOOLS),
        calls("call", "a tool call, arguments as a dict", _called),
        calls("call_as_text", "a tool call, arguments as a string",
              lambda turn, form: _called(turn, form, is_text=True)),
        calls("calls", "two tool calls at once", lambda turn, form: _called(turn, form, n_calls=2)),
        Case("thinking", "thinking, as reasoning_content", _chat(n_turns, _thought)),
        Case("thinking_inline", "thinking, in the content", _chat(n_turns, _thought_inline)),
        calls("thinking_call", "thinking before a tool call",
              lambda turn, form: _called(turn, form, thinks=True)),
        Case("images", "images", _with_images(plain), has_images=True),
        Case("empty", "empty answers", answered(lambda _: "")),
        Case("spaces", "answers between spaces", answered(lambda text: f"  {text}  ")),
        Case("newlines", "answers between newlines", answered(lambda text: f"\n\n{text}\n")),
        Case("continue", "continue_final_message", plain, mode=Mode.CONTINUE),
        Case("no_prompt", "no generation prompt", plain, mode=Mode.NO_PROMPT),
        Case("clock", "the next turn a day later", (system, *plain), mode=Mode.CLOCK),
    ]  # fmt: skip


def as_lists(case: Case) -> Case:
    """Return the case with every text content as a list of one part, as some templates need."""

    def listed(message: dict[str, Any] | None) -> dict[str, Any] | None:
        if message is None or not isinstance(message.get("content"), str):
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    steps = tuple(
        replace(step, sent=listed(step.sent) or {}, clean=listed(step.clean)) for step in case.steps
    )
    return replace(case, steps=steps, variants=tuple(map(as_lists, case.variants)))


# ---- messages

_TOWNS = ("Oslo", "Turin", "Porto", "Basel", "Gdansk", "Lyon", "Malmo", "Graz")


def _parameters(name: str, about: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": f"The town whose {about} is asked for"},
            "days": {"type": "integer", "description": f"How many days of {name} to return"},
        },
        "required": ["place"],
    }


_TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Return the {about} of a town",
            "parameters": _parameters(name, about),
        },
    }
    for name, about in (("forecast_of_town", "weather"), ("level_of_river", "water level"))
)


def _system(number: int) -> Step:
    text = f"Rule {number:03}: you are a careful guide to rivers and towns. Answer in one sentence."
    return Step({"role": "system", "content": text}, (text,))


def _user(turn: int) -> Step:
    text = f"Question {turn:03}: which river runs through town number {turn:03}?"
    return Step({"role": "user", "content": text}, (text,))


def _answer_text(turn: int) -> str:
    return f"Answer {turn:03}: river number {turn:03} runs through it, and then down to the sea."


def _thinking_text(turn: int) -> str:
    return f"Thought {turn:03}: the map shows one river there, number {turn:03}, so name that one."


def _answer(turn: int) -> list[Step]:
    return [_changed(turn, str)]


def _changed(turn: int, change: Callable[[str], str]) -> Step:
    """Return an answer whose content the model wrote, and the client sends back, as changed."""
    text = _answer_text(turn)
    written = change(text)
    clean = {"role": "assistant", "content": text}
    sent = {**clean, "content": written}
    # A template may write nothing at all around an empty text.
    return Step(sent, (text,), clean, written) if written else Step(sent)


def _thought(turn: int) -> list[Step]:
    text, thinking = _answer_text(turn), _thinking_text(turn)
    # transformers fills `thinking` from `reasoning_content`, for templates that read that name.
    message = {
        "role": "assistant",
        "content": text,
        "reasoning_content": thinking,
        "thinking": thinking,
    }
    return [Step(message, (thinking, text), message)]


def _thought_inline(turn: int) -> list[Step]:
    text, thinking = _answer_text(turn), _thinking_text(turn)
    clean = {"role": "assistant", "content": text}
    written = f"<think>\n{thinking}\n</think>\n\n{text}"
    return [Step({**clean, "content": written}, (text,), clean, thinking=thinking)]


def _called(
    turn: int, form: Content, *, n_calls: int = 1, is_text: bool = False, thinks: bool = False
) -> list[Step]:
    """Return a message with tool calls, the results, and the answer."""
    thinking = {"reasoning_content": _thinking_text(900 + turn)} if thinks else {}
    if thinks:
        thinking["thinking"] = thinking["reasoning_content"]
    asked: dict[str, Any] = {"role": "assistant", **thinking}
    if form is not Content.MISSING:
        asked["content"] = "" if form is Content.EMPTY else None
    calls, texts, results, marks = [], [], [], [*dict.fromkeys(thinking.values())]
    for number in range(n_calls):
        name = _TOOLS[number]["function"]["name"]
        place = f"{_TOWNS[turn % len(_TOWNS)]} {turn:03} quarter {number:03}"
        arguments = {"place": place, "days": 3}
        # Nine letters and digits, as Mistral's templates ask for.
        call = {"id": f"call{turn:03}{number:02}", "type": "function"}
        calls.append({**call, "function": {"name": name, "arguments": arguments}})
        texts.append({**call, "function": {"name": name, "arguments": json.dumps(arguments)}})
        marks.append(place)
        text = f"Result {turn:03} of call {number:03}: dry, and eleven degrees at noon."
        result = {"role": "tool", "name": name, "tool_call_id": call["id"], "content": text}
        results.append(Step(result, (text,)))
    sent = {**asked, "tool_calls": texts if is_text else calls}
    call_step = Step(sent, tuple(marks), {**asked, "tool_calls": calls})
    last = _thought(turn) if thinks else _answer(turn)
    return [call_step, *results, *last]


def _chat(n_turns: int, answer: Callable[[int], Sequence[Step]]) -> tuple[Step, ...]:
    """Return questions and answers, and a question that has no answer yet."""
    steps: list[Step] = []
    for turn in range(1, n_turns + 1):
        steps += [_user(turn), *answer(turn)]
    return (*steps, _user(n_turns + 1))


def _with_images(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the chat with the users' contents as lists, and an image in every second of them."""
    changed = []
    for number, step in enumerate(steps):
        if step.role == "user":
            parts: list[dict[str, Any]] = [{"type": "text", "text": step.sent["content"]}]
            if number % 4 == 0:
                parts.insert(0, {"type": "image"})
            changed.append(replace(step, sent={**step.sent, "content": parts}))
        else:
            changed.append(step)
    return tuple(changed)
