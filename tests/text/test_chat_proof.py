"""A template that is proven append-only is: drawn templates, and a weakened proof that is found."""

from __future__ import annotations

import json
import os
import random
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.text.drawn_chats import Message, draw_chat, draw_template
from tokcache.text.chat import expressions, proof
from tokcache.text.chat.expressions import Expressions
from tokcache.text.chat.proof import Proof, prove_append_only

prove = prove_append_only.__wrapped__  # without the cache of results


def render(template: str, chat: list[Message], *, flag: bool) -> str | None:
    """Render as transformers does; None if the template raises."""
    compiled = _compile_jinja_template(template)
    names = {"bos_token": "<s>", "eos_token": "</s>", "flag": flag, "tools": [{"name": "f"}]}
    try:
        text: str = compiled.render(messages=chat, add_generation_prompt=False, **names)
    except (TemplateError, TypeError):
        return None
    return text


def counterexample(template: str, found: Proof, draw: random.Random) -> str | None:
    """Return a template's text of a chat that does not begin the text of the longer chat."""
    for _ in range(4):
        chat, flag = draw_chat(draw, 7), draw.random() < 0.5
        texts = [render(template, chat[:n], flag=flag) for n in range(found.min_messages, 8)]
        for shorter, longer in pairwise(texts):
            if shorter is not None and longer is not None and not longer.startswith(shorter):
                return shorter
    return None


def drawn(n_templates: int, seed: int = 17) -> tuple[int, str | None]:
    """Return how many of the drawn templates are proven, and the first one proven wrongly."""
    draw = random.Random(seed)
    n_proven = 0
    for _ in range(n_templates):
        template = draw_template(draw)
        found = prove(template)
        if found.proven:
            n_proven += 1
            if counterexample(template, found, draw) is not None:
                return n_proven, template
    return n_proven, None


def test_no_drawn_template_is_proven_wrongly() -> None:
    n_templates = int(os.environ.get("TOKCACHE_DRAWN_CHATS", "500"))
    n_proven, wrong = drawn(n_templates)
    assert wrong is None
    assert n_proven > n_templates / 15


def always(value: object) -> Any:
    return lambda *_: value


OF_LOOP = expressions._OF_LOOP
WEAKER: dict[str, tuple[Any, str, Any]] = {
    "loop.last": (expressions, "_OF_LOOP", OF_LOOP | {"last"}),
    "loop.length": (expressions, "_OF_LOOP", OF_LOOP | {"length"}),
    "loop.nextitem": (expressions, "_OF_LOOP", OF_LOOP | {"nextitem"}),
    "loop.revindex": (expressions, "_OF_LOOP", OF_LOOP | {"revindex", "revindex0"}),
    "indexes": (Expressions, "_is_past", always(True)),
    "first iteration": (expressions, "floor_of", always(2)),
    "number of messages": (Expressions, "_need", always(None)),
    "slices": (Expressions, "_slice", always(None)),
    "filters": (Expressions, "_filter", always(None)),
    "values": (Expressions, "value", always(None)),
    "text after": (proof, "_needs_prompt", always(True)),
    "macros": (proof._Prover, "check_macros", always(None)),
    "inside": (proof._Prover, "_without_loop", always(nullcontext())),
}


@pytest.mark.parametrize("condition", WEAKER)
def test_without_one_condition_a_template_is_proven_wrongly(
    condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, weaker = WEAKER[condition]
    monkeypatch.setattr(where, name, weaker)
    monkeypatch.setattr(proof, name, weaker, raising=False)
    assert drawn(2500)[1] is not None


def loop(body: str) -> str:
    return f"{{% for message in messages %}}{body}{{% endfor %}}"


LOOP = loop("{{ message.content }}")
REFUSED: dict[str, tuple[str, str]] = {
    "last": ("{% for m in messages %}\n{{ loop.last }}{% endfor %}", "line 2: `loop.last`"),
    "text after": (f"{LOOP}\nend", "line 2: text after the messages"),
    "clock": ("\n{{ strftime_now('%d') }}" + LOOP, "line 2: `strftime_now`"),
    "random": (
        "{% for m in messages %}{{\n[1, 2]|random }}{% endfor %}",
        "line 2: the filter `ran",
    ),
    "twice": (f"{LOOP} {LOOP}", "line 1: text after"),
    "twice at once": (f"{LOOP}{LOOP}", "line 1: a second loop"),
    "reversed": ("{% for m in messages[::-1] %}\n{{ m }}{% endfor %}", "line 1: `messages[::-1]`"),
    "stored": ("\n{% set ns = namespace(all=messages) %}" + LOOP, "line 2: all messages"),
    "prompt": ("\n{% set add_generation_prompt = 1 %}" + LOOP, "line 2: `add_generation_prompt`"),
    "no loop": ("{{ messages[0].content }}", "there is no loop"),
    "count": ("{{ messages|length > 9 }}" + LOOP, "the text depends on whether there are 10"),
    "include": ("\n{% include 'other' %}" + LOOP, "line 2: `Include`"),
    "syntax": ("\n{% for %}", "line 2: not a valid template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_construct_and_its_line(case: str) -> None:
    template, reason = REFUSED[case]
    found = prove(template)
    assert not found.proven
    assert found.reason.startswith(reason)
    assert found.line == (int(reason.split()[1][:-1]) if reason.startswith("line") else 0)


def test_a_deeply_nested_template_is_refused() -> None:
    assert not prove("{% if x %}" * 400 + LOOP + "{% endif %}" * 400).proven
    long = "{% if " + " or ".join(["x"] * 300) + " %}{% endif %}" + LOOP
    assert isinstance(prove(long), Proof)


SYSTEM = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
EARLIER = "{% if not loop.first %}{{ messages[loop.index0 - 1].role }}{% endif %}"
PROVEN: dict[str, tuple[str, int]] = {
    "plain": (LOOP, 1),
    "prompt": (LOOP + "{% if add_generation_prompt %}{{ messages[-1].role }}{% endif %}", 1),
    "system": (SYSTEM + LOOP, 1),
    "second message": ("{{ messages[1].role }}" + LOOP, 2),
    "state": ("{% set n = namespace(n=0) %}" + loop("{% set n.n = n.n + 1 %}{{ n.n }}"), 1),
    "earlier": (loop(EARLIER), 1),
    "generation": (loop("{% generation %}{{ message.content }}{% endgeneration %}"), 1),
}


@pytest.mark.parametrize("case", PROVEN)
def test_templates_of_this_kind_are_proven(case: str) -> None:
    template, min_messages = PROVEN[case]
    assert prove(template) == Proof(True, min_messages=min_messages)


REAL = {
    "bert-base-uncased": "",
    "deepseek-v3": "line 3: text after the messages without a generation prompt: bos_token",
    "minimind": "line 17: `messages|length` reads all messages",
    "phi-3-mini": "line 8: text after the messages without a generation prompt: eos_token",
    "qwen2.5": "line 47: `loop.last` depends on later messages",
}


@pytest.mark.parametrize("name", REAL)
def test_real_templates(name: str, shared_data: Path) -> None:
    config = json.loads((shared_data / "tokenizers" / name / "tokenizer_config.json").read_text())
    found = prove(config["chat_template"])
    assert (found.proven, found.reason) == (not REAL[name], REAL[name])
