"""Rendering a chat that has grown by one turn: transformers against the cache of rendered chats.

Every sample is a chat of its own, of which all but the last two messages were rendered before, as
at the turn before. Its messages are new objects, as a server parses them from a request. The texts
are compared before they are timed; both take turns, and the ratio is that of the medians. With
other memory read before each call, too, as other work of a server does.

Then chats that did not grow: new, edited, shortened, with another answer or other tools.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import tokcache
from bench._disturb import DISTURBED, QUIET, Disturber
from bench.workloads import texts
from bench.workloads.data import add_tokenizer, default_tokenizers, shared_file
from bench.wrapper import load

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("jinja2", "transformers")
UNIT = "us a chat"
BAR = "a gain for chats that grow; other changes cost at most 5% more"
IN_ALL = ("--tokenizer", "qwen2.5", "--chats", "30")

SIZES = {32: 5.0, 10: 2.0}  # messages, and the least gain
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Look up the {name.partition('_')[2]} of a member of the library.",
            "parameters": {
                "type": "object",
                "properties": {
                    "member": {"type": "string", "description": "The number of the member."},
                    "limit": {"type": "integer", "description": "The number of records."},
                },
                "required": ["member"],
            },
        },
    }
    for name in ("find_loans", "find_fines", "find_holds", "find_rooms")
]
LEAST_OF_OTHERS = 0.95
# Templates that read all messages before their loop run that part every time: no least gain.
READ_ALL = {"minimind", "deepseek-v3"}


def plain_chat(n_messages: int, seed: int) -> list[dict[str, Any]]:
    """Return a system prompt and turns of user and assistant."""
    source = texts.endless("English", seed)
    roles = ["system", *(("assistant", "user")[n % 2] for n in range(1, n_messages))]
    return [{"role": role, "content": f"{seed} {next(source)}"} for role in roles]


def agent_chat(n_messages: int, seed: int) -> list[dict[str, Any]]:
    """Return a system prompt and turns of an agent that calls a tool for every question."""
    source = texts.endless("English", seed)
    chat: list[dict[str, Any]] = [{"role": "system", "content": next(source)}]
    while len(chat) < n_messages:
        call = {"name": "find_loans", "arguments": {"member": f"M{seed}", "limit": len(chat)}}
        chat += [
            {"role": "user", "content": f"{seed} {next(source)}"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": call}],
            },
            {"role": "tool", "content": json.dumps({"loans": [next(source)[:80]], "n": 1})},
            {"role": "assistant", "content": next(source)},
        ]
    return chat[:n_messages]


Chat = list[dict[str, Any]]
Change = Callable[[Chat, dict[str, Any]], tuple[Chat, Chat, dict[str, Any]]]


def _grown(chat: Chat, asked: dict[str, Any]) -> tuple[Chat, Chat, dict[str, Any]]:
    """Return the chat of the turn before, that of this turn, and its arguments."""
    return chat[:-2], chat, asked


def _edited(chat: Chat, asked: dict[str, Any]) -> tuple[Chat, Chat, dict[str, Any]]:
    middle = len(chat) // 2
    return chat, [*chat[:middle], {**chat[middle], "content": "edited"}, *chat[middle + 1 :]], asked


def _with_other_tools(chat: Chat, asked: dict[str, Any]) -> tuple[Chat, Chat, dict[str, Any]]:
    return chat, chat, {**asked, "tools": TOOLS[1:]}


OTHERS: dict[str, Change] = {
    "new": lambda chat, asked: ([], chat, asked),
    "edited in the middle": _edited,
    "shortened": lambda chat, asked: (chat, chat[: len(chat) // 2], asked),
    "another question": lambda chat, asked: (
        chat,
        [*chat[:-1], {"role": "user", "content": "And now?"}],
        asked,
    ),
    "other tools": _with_other_tools,
}


def gain(
    pair: tuple[Any, Any],
    make: Callable[[int, int], Any],
    n_messages: int,
    seeds: range,
    *,
    change: Change = _grown,
    disturb: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Return the microseconds of both, and the mean number of messages that were known."""
    plain, wrapped = pair
    tools = {"tools": TOOLS} if make is agent_chat else {}
    arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **tools}
    times: dict[str, list[float]] = {"transformers": [], "tokcache": []}
    n_known = 0
    for seed in seeds:
        earlier, now, asked = change(make(n_messages, seed), arguments)
        source = json.dumps(now)
        if earlier:
            wrapped.apply_chat_template(json.loads(json.dumps(earlier)), **arguments)
        expected = plain.apply_chat_template(json.loads(source), **asked)
        order = [("transformers", plain), ("tokcache", wrapped)]
        for name, tokenizer in order if seed % 2 else reversed(order):
            chat = json.loads(source)
            gc.collect(0)
            before = wrapped.cache_stats().render.hit_messages
            disturb()
            began = perf_counter_ns()
            found = tokenizer.apply_chat_template(chat, **asked)
            times[name].append((perf_counter_ns() - began) / 1000)
            assert found == expected
            n_known += wrapped.cache_stats().render.hit_messages - before
    return {**times, "known": [n_known / len(seeds)]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_tokenizer(parser)
    parser.add_argument("--chats", type=int, default=120)


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the template of every tokenizer."""
    names = ("qwen2.5", "phi-3-mini", "minimind", "deepseek-v3")
    for name in options.tokenizer or [*default_tokenizers(*names)]:
        measure(name, options.chats, report)


def measure(name: str, n_chats: int, report: Report) -> None:
    """Measure the template of one tokenizer, ChatML if it has none."""
    plain = load(name)
    file = shared_file("tokenizers", name, "tokenizer_config.json")
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file else None
    plain.chat_template = template or CHATML
    wrapped = tokcache.wrap(plain)
    kinds = {"chat": plain_chat}
    if "tool_calls" in plain.chat_template and "arguments | tojson" in plain.chat_template:
        kinds["agent with tools"] = agent_chat
    pair = plain, wrapped
    first = 0
    disturber = Disturber()
    for kind, make in kinds.items():
        for size, least in SIZES.items():
            for mode in (QUIET, DISTURBED):
                disturb = disturber if mode == DISTURBED else lambda: None
                seeds = range(first, first := first + n_chats)
                times = gain(pair, make, size, seeds, disturb=disturb)
                known = times.pop("known")[0]
                title = f"{name}: {kind} of {size} messages, {mode}"
                report.table(f"{title}, {known:.1f} known", "us", times, base="transformers")
                if name not in READ_ALL:
                    ratio = median(times["transformers"]) / median(times["tokcache"])
                    report.bar(f"{title}, gain", ratio, least)
        for case, change in OTHERS.items():
            seeds = range(first, first := first + n_chats)
            times = gain(pair, make, min(SIZES), seeds, change=change)
            known = times.pop("known")[0]
            title = f"{name}: {kind} of {min(SIZES)} messages, {case}"
            report.table(f"{title}, {known:.1f} known", "us", times, base="transformers")
            ratio = median(times["transformers"]) / median(times["tokcache"])
            report.bar(f"{title}, gain", ratio, LEAST_OF_OTHERS)
