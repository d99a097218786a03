"""Rendering a chat that has grown by one turn: transformers against the cache of rendered chats.

Every sample is a chat of its own, of which all but the last two messages were rendered before, as
at the turn before. Its messages are new objects, as a server parses them from a request. The texts
are compared before they are timed; both take turns, and the ratio is that of the medians.
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
from bench.workloads import texts
from bench.workloads.data import add_tokenizer, default_tokenizers, shared_file
from bench.wrapper import load

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("jinja2", "transformers")
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


def gain(
    plain: Any, wrapped: Any, make: Callable[[int, int], Any], n_messages: int, n_chats: int
) -> dict[str, list[float]]:
    """Return the microseconds of both, and the mean number of messages that were known."""
    tools = {"tools": TOOLS} if make is agent_chat else {}
    asked: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **tools}
    times: dict[str, list[float]] = {"transformers": [], "tokcache": []}
    n_known = 0
    for seed in range(1000 * n_messages, 1000 * n_messages + n_chats):
        source = json.dumps(make(n_messages, seed))
        wrapped.apply_chat_template(json.loads(source)[:-2], **asked)
        expected = plain.apply_chat_template(json.loads(source), **asked)
        order = [("transformers", plain), ("tokcache", wrapped)]
        for name, tokenizer in order if seed % 2 else reversed(order):
            chat = json.loads(source)
            gc.collect(0)
            before = wrapped.cache_stats().render.hit_messages
            began = perf_counter_ns()
            found = tokenizer.apply_chat_template(chat, **asked)
            times[name].append((perf_counter_ns() - began) / 1000)
            assert found == expected
            n_known += wrapped.cache_stats().render.hit_messages - before
    return {**times, "known": [n_known / n_chats]}


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
    for kind, make in kinds.items():
        for size, least in SIZES.items():
            times = gain(plain, wrapped, make, size, n_chats)
            known = times.pop("known")[0]
            title = f"{name}: {kind} of {size} messages"
            report.table(f"{title}, {known:.1f} known", "us", times, base="transformers")
            if name not in READ_ALL:
                ratio = median(times["transformers"]) / median(times["tokcache"])
                report.bar(f"{title}, gain", ratio, least)
