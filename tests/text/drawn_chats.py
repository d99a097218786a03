"""Chats and chat templates drawn at random from parts, the same ones for the same seed."""

from __future__ import annotations

import random
from typing import Any

Message = dict[str, Any]

_TEXTS = ("", " ", "hello", "  two words \n", "é 漢字 🙂", "{{ x }}", "<|im_end|>", "a" * 40)
_CONDITIONS = (
    "message.role == 'user'",
    "message['role'] == 'tool'",
    "message.content is string",
    "message.content",
    "loop.first",
    "not loop.first",
    "loop.last",
    "loop.index0 > 0",
    "loop.index == 2",
    "loop.index0 % 2 == 0",
    "loop.length > 3",
    "loop.revindex == 2",
    "loop.previtem and loop.previtem.role == 'user'",
    "loop.nextitem is defined and loop.nextitem.role == 'tool'",
    "loop.first or messages[loop.index0 - 1].role != 'tool'",
    "not loop.first and messages[loop.index0 - 1].role == 'user'",
    "loop.index0 > 1 and messages[loop.index0 - 2].role == 'user'",
    "loop.index0 > 0 and messages[loop.index0 - 2].role == 'user'",
    "messages[loop.index0 - 1].role == 'tool'",
    "messages[loop.index0].role == 'user'",
    "messages[loop.index0 + 1].role == 'user'",
    "rest[loop.index0].role == 'user'",
    "rest[loop.index0 + 1].role == 'user'",
    "messages[0].role == 'system'",
    "messages[-1].role == 'user'",
    "messages[loop.index0:]|length > 2",
    "messages[:loop.index0]|length > 2",
    "messages[:loop.index]|length > 1",
    "(messages[:loop.index0 - 1]|length) > 1",
    "messages|length > 1",
    "messages|length > 3",
    "messages|length % 2 == 0",
    "ns.seen",
    "ns.n > 2",
    "flag",
    "add_generation_prompt",
    "loop.cycle(true, false)",
    "loop.changed(message.role)",
    "(messages|first).role == 'user'",
    "(messages|last).role == 'user'",
    "messages|selectattr('role', 'equalto', 'tool')|list|length > 1",
)
_OUTPUTS = (
    "{{ message.role }}:",
    "{{ message.content }}",
    "{{ '<' ~ message.role ~ '>' }}",
    "{{ message.content|tojson }}",
    "text\n",
    "{{ loop.index }}",
    "{{ messages[0].role }}",
    "{{ show(message) }}",
    "{{ ns.n }}",
    "{{ first }}",
    "{{ messages|length }}",
    "{{ messages[-1].role }}",
    "{{ loop.revindex0 }}",
    "{% generation %}{{ message.content }}{% endgeneration %}",
    "{% filter upper %}{{ message.role }}{% endfilter %}",
    "{% set part %}{{ message.role }}!{% endset %}{{ part }}",
    "{% for c in message.tool_calls or [] %}{{ c.name }}{{ ',' if not loop.last }}{% endfor %}",
    "{% for m in messages[:loop.index0] %}.{% endfor %}",
    "{% for m in messages %}.{% endfor %}",
    "{% set role = message.role %}{{ role }}",
    "{% set loop_messages = messages %}{{ loop_messages[1].role }}",
    "{% call wrap() %}{{ message.role }}{% endcall %}",
    "{% call wrap() %}{{ messages[-1].role }}{% endcall %}",
    "{% set ns.n = ns.n + 1 %}",
    "{% set ns.seen = message.role == 'tool' %}",
    "{% set ns.last = message %}",
    "{{ ns.last.role }}",
    "{% continue %}",
    "{% break %}",
)
_HEADS = (
    "{{ bos_token }}",
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}",
    "{% set first = messages[0].role %}",
    "{% set first %}{{ messages[0].role }}{% endset %}",
    "{% if flag %}{% set first = messages[1].role %}{% endif %}",
    "{% if tools %}{% for t in tools %}{{ t|tojson }}{% endfor %}{% endif %}",
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}",
    "{% for m in messages[::-1] %}{% set ns.seen = m.role == 'user' %}{% endfor %}",
    "{% if messages|length > 2 %}long{% endif %}",
    "{% set n = messages|length %}",
    "{% if messages[1:] %}more{% endif %}",
    "{% set messages = messages[1:] %}",
    "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
    "{% if messages[-1].role == 'user' %}asked{% endif %}",
    "{% set first = (messages|last).role %}",
    "{% set ns.last = messages[0] %}",
    "{{ show(messages[0]) }}",
    "{{ count() }}",
    "{% set add_generation_prompt = true %}",
    "{% if add_generation_prompt is undefined %}{% set add_generation_prompt = false %}{% endif %}",
)
_TAILS = (
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<assistant>{% endif %}",
    "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}",
    "{% if add_generation_prompt or flag %}<assistant>{% endif %}",
    "{% if not flag %}{% elif add_generation_prompt %}<assistant>{% endif %}",
    "{% if ns.seen %}end{% endif %}",
    "{% set n = messages|length %}",
    "{% set tail %}{{ messages[0].role }}{% endset %}",
    "{% for t in [true] %}{% if add_generation_prompt %}<assistant>{% endif %}{% endfor %}",
    "end",
    "{{ eos_token }}",
)
_LOOP = "{% for message in messages %}BODY{% endfor %}"
_REST = "{% for message in rest %}BODY{% endfor %}"
_LOOPS = (
    _LOOP,
    _LOOP,
    _REST,
    "{% for message in (messages if flag else rest) %}BODY{% endfor %}",
    "{% for message in messages[1:] %}BODY{% endfor %}",
    "{% for message in messages if message.role != 'system' %}BODY{% endfor %}",
    "{% for message in messages|rejectattr('role', 'equalto', 'tool') %}BODY{% endfor %}",
    "{% for message in messages|reverse %}BODY{% endfor %}",
    "{% for message in messages[:3] %}BODY{% endfor %}",
    "{% for message in messages %}BODY{% else %}none{% endfor %}",
    "{% if flag %}" + _LOOP + "{% else %}" + _REST + "{% endif %}",
    "{% filter trim %}" + _LOOP + "{% endfilter %}",
    "{% for t in [1, 2] %}" + _LOOP + "{% endfor %}",
    "{% set all %}" + _LOOP + "{% endset %}{{ all }}",
    _LOOP + _LOOP,
)
_ALWAYS = (
    "{% set ns = namespace(n=0, seen=false, last=none) %}{% set rest = messages[1:] %}"
    "{% macro show(m) %}({{ m.role }}){% endmacro %}"
    "{% macro wrap() %}[{{ caller() }}]{% endmacro %}"
)
_COUNTS = (
    "{% macro count() %}{{ first }}{% endmacro %}",
    "{% macro count() %}{{ messages|length }}{% endmacro %}",
    "{% macro count(n=flag) %}{{ tools or n }}{% endmacro %}",
)


def draw_template(draw: random.Random) -> str:
    """Return a template; about one in seven is proven."""
    body = "".join(_statement(draw, 2) for _ in range(draw.randint(1, 3)))
    heads = "".join(draw.sample(_HEADS, draw.choice((0, 0, 1, 2))))
    tails = "".join(draw.sample(_TAILS, draw.choice((0, 0, 0, 1, 2))))
    loop = draw.choice(_LOOPS if draw.random() < 0.6 else _LOOPS[:1]).replace("BODY", body)
    return f"{_ALWAYS}{draw.choice(_COUNTS)}{heads}{loop}{tails}"


def _statement(draw: random.Random, depth: int) -> str:
    if depth and draw.random() < 0.5:
        inner = _statement(draw, depth - 1)
        other = _statement(draw, depth - 1) if draw.random() < 0.5 else ""
        middle = f"{{% else %}}{other}" if other else ""
        return f"{{% if {draw.choice(_CONDITIONS)} %}}{inner}{middle}{{% endif %}}"
    return draw.choice(_OUTPUTS)


def draw_chat(draw: random.Random, n_messages: int) -> list[Message]:
    """Return messages of any roles, with the contents and fields that callers pass."""
    chat: list[Message] = []
    for index in range(n_messages):
        roles = ("user", "assistant", "tool", "user", "assistant", "system")
        role = "system" if index == 0 and draw.random() < 0.4 else draw.choice(roles)
        message: Message = {"role": role, "content": draw.choice(_TEXTS)}
        if role == "assistant" and draw.random() < 0.4:
            message["tool_calls"] = [
                {"name": f"f{n}", "arguments": {"x": draw.choice((1, True, 1.0, "1"))}}
                for n in range(draw.randint(0, 2))
            ]
        chat.append(message)
    return chat
