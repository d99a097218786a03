"""Agent chats, turn by turn: those of tau-bench if present, else seeded ones made here."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.workloads.data import shared_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Message = dict[str, Any]
Chat = list[Message]

_N_MADE_CHATS, _N_RULES, _N_TURNS = 60, 45, 8
_ACTIONS = (
    "renewing a loan", "placing a hold", "paying a fine", "replacing a card", "booking a room",
    "ordering an article", "returning a book late", "joining a course", "lending to a guest",
)  # fmt: skip
_CONDITIONS = (
    "the member has confirmed the details in writing",
    "no fine older than thirty days is open",
    "the item is not reserved by another member",
    "the branch is open on that day",
    "the card is valid for at least one more month",
    "fewer than ten items are on loan",
)
_ENDINGS = (
    "Otherwise explain which rule prevents it and offer to ask a librarian.",
    "If a tool reports an error, repeat its message and stop.",
    "Never guess a number that a tool can look up.",
    "Write the date as year, month and day.",
    "This holds for every branch, the mobile library included.",
)
_WISHES = (
    "Could you please help me with {}? My number is {}.",
    "Hi, I was told that {} is possible by chat. I am member {}.",
    "It's about {} again; the desk sent me here. Member {}, as before.",
)
_REPLIES = (
    "Thank you. I have found the record; {} is possible because {}. Shall I go on?",
    "I am sorry, {} has to wait until {}. Is there anything else I can do for you?",
    "Before {} I need you to check this: {}. Please answer yes or no.",
)
_TITLES = ("Harbour Lights", "A Short History of Salt", "Winter Bees", "The Ninth Bridge")


def load(n_chats: int | None = None) -> tuple[str, list[Chat]]:
    """Return the source of the chats, and the first `n_chats` of them."""
    file = shared_file("traces", "tau-bench", "gpt-4o-airline.json")
    if file is None:
        return "made, seed 5", made(n_chats or _N_MADE_CHATS)
    dialogues = json.loads(file.read_text(encoding="utf-8"))[:n_chats]
    return "tau-bench", [dialogue["traj"] for dialogue in dialogues]


def made(n_chats: int, seed: int = 5) -> list[Chat]:
    """Return chats of a library's help desk with one long policy, tool calls and JSON records."""
    rng = random.Random(seed)
    policy = "# Help desk policy\n\n" + "\n\n".join(_rule(rng) for _ in range(_N_RULES))
    return [list(_made_chat(rng, policy)) for _ in range(n_chats)]


def _rule(rng: random.Random) -> str:
    return (
        f"- Before {rng.choice(_ACTIONS)} make sure that {rng.choice(_CONDITIONS)} and that"
        f" {rng.choice(_CONDITIONS)}. {rng.choice(_ENDINGS)}"
    )


def _made_chat(rng: random.Random, policy: str) -> Iterator[Message]:
    yield {"role": "system", "content": policy}
    for _ in range(rng.randrange(3, _N_TURNS)):
        member = f"M{rng.randrange(10**6):06d}"
        action, condition = rng.choice(_ACTIONS), rng.choice(_CONDITIONS)
        call = {"name": "find_member", "arguments": json.dumps({"member": member})}
        yield {"role": "user", "content": rng.choice(_WISHES).format(action, member)}
        yield {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}
        yield {"role": "tool", "content": json.dumps(record(rng, member))}
        yield {"role": "assistant", "content": rng.choice(_REPLIES).format(action, condition)}


def record(rng: random.Random, member: str) -> dict[str, Any]:
    """Return the record of a member, as a tool of the help desk would."""
    return {
        "member": member,
        "card": {"number": rng.randrange(10**9), "valid_until": _date(rng)},
        "loans": [
            {"title": rng.choice(_TITLES), "copy": rng.randrange(10**5), "due": _date(rng)}
            for _ in range(rng.randrange(1, 6))
        ],
        "fines": [round(rng.random() * 20, 2) for _ in range(rng.randrange(3))],
    }


def _date(rng: random.Random) -> str:
    return f"2024-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"


def prompts(chats: list[Chat], tokenizer: Tokenizer) -> list[str]:
    """Return the prompt before every answer of every chat, rendered for `tokenizer`."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    made_prompts = []
    for chat in chats:
        text = ""
        for message in chat:
            if message["role"] == "assistant":
                made_prompts.append(text + _opening("assistant", added))
            text += _opening(message["role"], added) + _body(message, added) + _closing(added)
    return made_prompts


def _opening(role: str, added: set[str]) -> str:
    if "<|im_start|>" in added:
        return f"<|im_start|>{role}\n"
    if "<|end|>" in added:  # Phi-3 has no token for tools: their results are user messages
        return f"<|{role}|>\n" if f"<|{role}|>" in added else "<|user|>\n"
    return f"{role.capitalize()}: "


def _closing(added: set[str]) -> str:
    ends = (end for end in ("<|im_end|>", "<|end|>") if end in added)
    return f"{next(ends, '')}\n"


def _body(message: Message, added: set[str]) -> str:
    calls = [_call(call["function"], added) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in (message["content"], *calls) if part)


def _call(function: dict[str, str], added: set[str]) -> str:
    arguments = json.loads(function["arguments"])
    text = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>" if "<tool_call>" in added else text
