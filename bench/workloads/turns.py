"""Chats in which turns part: thinking that is dropped, tools, edits, regenerations, branches.

`script` writes a chat's requests one after the other, as a client sends them: the messages up to
the answer, and the answer that the model is to give. Everything is drawn from a seed.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.workloads.chats import record

if TYPE_CHECKING:
    from collections.abc import Iterator

Message = dict[str, Any]

# A template of the kind of Qwen 3's: thinking is written only after the last question.
TEMPLATE = """\
{%- for tool in tools or [] %}{% if loop.first %}{{ '<|im_start|>system\n' }}{% endif %}
{{- tool | tojson + '\n' }}{% if loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content and loop.index0 > ns.last %}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if opens_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"""

_NAMES = ("find_member", "list_loans", "list_fines", "renew_loan")
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"member": "string"}}}
    for name in _NAMES
]
_PLACES = (
    "the harbour branch",
    "the reading room",
    "the mobile library",
    "the archive",
    "the desk",
)
_THINGS = (
    "a loan that is due on Friday", "the card that was lost in the train", "a book of old maps",
    "the fine of the last winter", "a room for nine people", "the copy with the torn cover",
)  # fmt: skip
_QUESTIONS = (
    "Could you tell me how {} is handled at {}?",
    "And what about {}, which I left at {}?",
    "Please look at {} again. They told me at {} that it was done.",
)
_THOUGHTS = (
    "They ask about {}. The policy says that {} keeps the list, so I have to look there first.",
    "If {} was seen at {}, the record must show it. Let me compare the dates before I answer.",
    "The rule for {} changed. At {} it still is the former one, and I should not promise more.",
)
_ANSWERS = (
    "I have found {}. It is kept at {} until the end of the month.",
    "For {} please go to {} and show your card; the rest is settled.",
    "No, {} was never at {}. I have written that into your record.",
)


@dataclass(frozen=True, slots=True)
class Request:
    """The messages of a prompt, and the message that answers them; `kind` says why it was sent."""

    kind: str
    messages: list[Message]
    answer: Message


def script(seed: int, n_turns: int, *, thinks: bool = True) -> Iterator[Request]:
    """Yield the requests of one chat of `n_turns` questions.

    Every question may need tools. Every fifth one is asked again in other words, every seventh
    answer is generated again, and every ninth question is asked at an earlier place of the chat,
    which then goes on from where it was left.
    """
    rng = random.Random(seed)
    chat: list[Message] = [{"role": "system", "content": _passage(rng, _ANSWERS, 8)}]
    for turn in range(1, n_turns + 1):
        if turn % 9 == 0:
            places = [at for at, message in enumerate(chat) if message["role"] == "user"]
            earlier = chat[: rng.choice(places[:-1])]
            yield from _turn(rng, earlier, "branch", thinks=thinks)
        if turn % 5 == 0:
            given_up = [*chat]
            yield from _turn(rng, given_up, "edited", thinks=thinks)
        requests = list(_turn(rng, chat, "turn", thinks=thinks))
        yield from requests
        if turn % 7 == 0:
            yield Request("again", requests[-1].messages, requests[-1].answer)


def _turn(rng: random.Random, chat: list[Message], kind: str, *, thinks: bool) -> Iterator[Request]:
    """Ask a question, and let tools be called; `chat` grows by all messages."""
    chat.append({"role": "user", "content": _passage(rng, _QUESTIONS, rng.randrange(1, 3))})
    for n_left in reversed(range(rng.choice((1, 1, 2, 3)))):
        answer: Message = {"role": "assistant", "content": ""}
        if thinks:
            answer["reasoning_content"] = _passage(rng, _THOUGHTS, rng.randrange(1, 4))
        if n_left:
            member = f"M{rng.randrange(10**6):06d}"
            call = {"name": rng.choice(_NAMES), "arguments": {"member": member}}
            answer["tool_calls"] = [{"type": "function", "function": call}]
        else:
            answer["content"] = _passage(rng, _ANSWERS, rng.randrange(1, 3))
        yield Request(kind, [*chat], answer)
        kind = "tools" if kind == "turn" else kind
        chat.append(answer)
        if n_left:
            chat.append({"role": "tool", "content": json.dumps(record(rng, member))})


def _passage(rng: random.Random, sentences: tuple[str, ...], n: int) -> str:
    return " ".join(
        rng.choice(sentences).format(rng.choice(_THINGS), rng.choice(_PLACES)) for _ in range(n)
    )
