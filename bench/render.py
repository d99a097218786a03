"""Rendering a chat that has grown by one turn: transformers against the cache of rendered chats.

Every sample is a chat of its own, of which all but the last two messages were rendered before, as
at the turn before. Its messages are new objects, as a server parses them from a request. The texts
are compared before they are timed; both take turns, and the ratio is that of the medians.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns
from typing import Any

import tokcache
from bench import _report
from bench.workloads import texts
from bench.workloads.data import TINY, default_tokenizers, shared_file
from bench.wrapper import load

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
) -> dict[str, float]:
    """Return the median microseconds of both, and by how much the cache is faster."""
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
    us = {name: median(one) for name, one in times.items()}
    return {
        **us,
        "gain": us["transformers"] / us["tokcache"],
        "messages reused": n_known / n_chats,
    }


def run(name: str, n_chats: int) -> dict[str, Any]:
    """Measure the template of one tokenizer, ChatML if it has none."""
    plain = load(name)
    file = shared_file("tokenizers", name, "tokenizer_config.json")
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file else None
    plain.chat_template = template or CHATML
    wrapped = tokcache.wrap(plain)
    kinds = {"chat": plain_chat}
    if "tool_calls" in plain.chat_template and "arguments | tojson" in plain.chat_template:
        kinds["agent with tools"] = agent_chat
    found: dict[str, Any] = {}
    bars = []
    for kind, make in kinds.items():
        for size, least in SIZES.items():
            one = found[f"{kind}, {size} messages"] = gain(plain, wrapped, make, size, n_chats)
            cells = ", ".join(f"{key} {value:,.2f}" for key, value in one.items())
            print(f"{name}, {kind}, {size} messages, microseconds: {cells}")
            if name not in READ_ALL:
                bars.append(_report.Bar(f"{kind} of {size} messages, gain", one["gain"], least))
    return {"figures": found, "bars": _report.show_bars(bars)}


def main(argv: list[str]) -> int:
    """Exit code 1 if a bar is missed."""
    options = _report.parser(__doc__ or "")
    options.add_argument("--tokenizer", action="append", help="a real one's name, or tiny")
    options.add_argument("--chats", type=int, default=120)
    args = options.parse_args(argv)
    names = args.tokenizer or [
        *default_tokenizers("qwen2.5", "phi-3-mini", "minimind", "deepseek-v3"),
        *([TINY] if shared_file("tokenizers", "qwen2.5", "tokenizer.json") else []),
    ]
    found = {name: run(name, args.chats) for name in names}
    environment = _report.environment("jinja2", "transformers")
    _report.finish({"environment": environment, "tokenizers": found}, args.json)
    return 0 if all(bar["met"] for one in found.values() for bar in one["bars"]) else 1
