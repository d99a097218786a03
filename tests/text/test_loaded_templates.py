"""Chat templates as transformers loads them from files: the cache gives its text for every call."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import tokcache
from tests.text.test_rendered_chats import TOOL, plain_tokenizer, stats_of

TURN = "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}"
LOOP = "{% for message in messages %}" + TURN + "{% endfor %}"
PROMPT = (
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
REASONING = (
    "{% for message in messages %}{% if message.reasoning_content and keep_thinking %}"
    "<think>{{ message.reasoning_content }}</think>{% endif %}" + TURN + "{% endfor %}"
)
TEMPLATES = {
    "default": LOOP + PROMPT,
    "tool_use": "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + LOOP + PROMPT,
    "rag": "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}" + LOOP + PROMPT,
    "thinking": REASONING + PROMPT,
    "marked": "{% for message in messages %}{% generation %}"
    + TURN
    + "{% endgeneration %}{% endfor %}",
}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " How warm is it? "},
    {"role": "assistant", "content": "Warm. ", "reasoning_content": "It is in June."},
    {"role": "user", "content": "And in Rome?"},
    {"role": "assistant", "content": "Very warm", "thinking": "Rome is in the south."},
]


def find_weather(place: str, days: int = 1) -> str:
    """
    Find the weather of a place.

    Args:
        place: The name of the place.
        days: The number of days.
    """
    return f"{place} {days}"


# The layouts in which transformers finds the templates of a folder.


def in_configuration(folder: Path) -> None:
    """Write one template, as `chat_template` of tokenizer_config.json."""
    write_configuration(folder, TEMPLATES["tool_use"])


def named_in_configuration(folder: Path) -> None:
    """Write a list of named templates, as older models have it."""
    named = [{"name": name, "template": source} for name, source in TEMPLATES.items()]
    write_configuration(folder, named)


def in_a_file(folder: Path) -> None:
    """Write one template, as chat_template.jinja."""
    (folder / "chat_template.jinja").write_text(TEMPLATES["tool_use"])


def in_a_file_and_the_configuration(folder: Path) -> None:
    """Write two templates; transformers prefers the file."""
    write_configuration(folder, TEMPLATES["default"])
    in_a_file(folder)


def named_in_files(folder: Path) -> None:
    """Write the default template as chat_template.jinja, and the others into their folder."""
    others = folder / "additional_chat_templates"
    others.mkdir()
    for name, source in TEMPLATES.items():
        path = folder / "chat_template" if name == "default" else others / name
        path.with_suffix(".jinja").write_text(source)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "the configuration": in_configuration,
    "names in the configuration": named_in_configuration,
    "a file": in_a_file,
    "a file and the configuration": in_a_file_and_the_configuration,
    "files with names": named_in_files,
}

CALLS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a prompt": {"add_generation_prompt": True},
    "no thinking": {"add_generation_prompt": True, "enable_thinking": False},
    "thinking": {"add_generation_prompt": True, "enable_thinking": True},
    "thinking kept": {"chat_template": "thinking", "keep_thinking": True},
    "tools": {"tools": [TOOL]},
    "tools in a tuple": {"tools": (TOOL,)},
    "a function as a tool": {"tools": [find_weather]},
    "no tools": {"tools": []},
    "documents": {"chat_template": "rag", "documents": [{"title": "A", "text": "b"}]},
    "a template by its name": {"chat_template": "tool_use", "tools": [TOOL]},
    "a name of no template": {"chat_template": "missing"},
    "a template": {"chat_template": LOOP},
    "a template as a dict": {"chat_template": {"default": LOOP}},
    "the last message goes on": {"continue_final_message": True},
    "its reasoning goes on": {"continue_final_message": "reasoning_content"},
    "it goes on after a prompt": {"continue_final_message": True, "add_generation_prompt": True},
    "the last message ends": {"continue_final_message": False},
    "ids alone": {"tokenize": True, "return_dict": False},
    "a dict of ids": {"tokenize": True, "return_dict": True, "add_generation_prompt": True},
    "ids with a mask": {"tokenize": True, "return_attention_mask": True},
    "padded ids": {"tokenize": True, "padding": "max_length", "max_length": 20},
    "a mask of the answers": {
        "chat_template": "marked",
        "tokenize": True,
        "return_dict": True,
        "return_assistant_tokens_mask": True,
    },
    "another token": {"eos_token": "<end>"},
    "a name that transformers uses": {"messages": []},
    "another name that it uses": {"conversations": []},
}
# Calls that are never answered from the cache, and those that only some layouts can render.
UNCACHED = {"a template as a dict", "a name that transformers uses", "another name that it uses"}
UNCACHED |= {"the last message goes on", "its reasoning goes on", "it goes on after a prompt"}
UNCACHED |= {"a mask of the answers", "padded ids"}
NAMED = {"thinking kept", "documents", "a template by its name", "a name of no template"}


def write_configuration(folder: Path, template: Any) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": template}))


def write_tokenizer(folder: Path, layout: str) -> None:
    folder.mkdir(parents=True)
    plain_tokenizer().save_pretrained(folder)
    LAYOUTS[layout](folder)


def answer(tokenizer: Any, chat: Any, **kwargs: Any) -> Any:
    try:
        found = tokenizer.apply_chat_template(chat, **{"tokenize": False, **kwargs})
    except Exception as error:  # noqa: BLE001 (compared)
        return type(error), str(error)
    return dict(found) if hasattr(found, "keys") else found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_call_gives_the_answer_of_transformers(layout: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model", layout)
    plain = AutoTokenizer.from_pretrained(tmp_path / "model")
    is_named = isinstance(plain.chat_template, dict)
    assert is_named == ("name" in layout)
    wrapped = tokcache.wrap(plain)
    n_hits = dict.fromkeys(CALLS, 0)
    for _ in range(3):
        for name, kwargs in CALLS.items():
            before = stats_of(wrapped).hits
            for n_messages in (1, 2, 3, 5):
                chat = copy.deepcopy(CHAT[:n_messages])
                expected = answer(plain, copy.deepcopy(chat), **kwargs)
                assert answer(wrapped, chat, **kwargs) == expected, (name, n_messages)
            n_hits[name] += stats_of(wrapped).hits - before
    assert {name for name, n in n_hits.items() if not n} == UNCACHED | (
        {"a name of no template"} if is_named else NAMED
    )
    assert "differences" not in stats_of(wrapped).refusals


def test_a_snapshot_of_the_hub_cache_is_used_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The layout of a downloaded model: a reference to a revision, and links to files named by hash.
    write_tokenizer(tmp_path / "made", "files with names")
    store = tmp_path / "hub" / "models--example--chat"
    snapshot, blobs = store / "snapshots" / "0123abcd", store / "blobs"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("0123abcd")
    blobs.mkdir()
    made = [path for path in (tmp_path / "made").rglob("*") if path.is_file()]
    for number, path in enumerate(made):
        link = snapshot / path.relative_to(tmp_path / "made")
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(blobs / str(number))
    # The hub's client notes files that a model does not have.
    missing = store / ".no_exist" / "0123abcd"
    missing.mkdir(parents=True)
    for name in ("config.json", "processor_config.json", "added_tokens.json"):
        (missing / name).touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    plain = AutoTokenizer.from_pretrained("example/chat", **options)
    assert set(plain.chat_template) == set(TEMPLATES)
    wrapped = tokcache.wrap(plain)
    for name in TEMPLATES:
        for n_messages in (1, 2, 3, 5):
            kwargs = {"chat_template": name, "add_generation_prompt": True}
            chat = CHAT[:n_messages]
            assert answer(wrapped, chat, **kwargs) == answer(plain, chat, **kwargs)
    assert stats_of(wrapped).hit_messages > 20


def test_templates_that_change_are_read_again() -> None:
    plain = plain_tokenizer(TEMPLATES["default"])
    wrapped = tokcache.wrap(plain)
    templates: list[Any] = [
        *(TEMPLATES["default"], TEMPLATES["rag"], dict(TEMPLATES), {"default": LOOP}),
        *({"tool_use": LOOP}, None, TEMPLATES["default"]),
    ]
    for template in templates:
        wrapped.chat_template = plain.chat_template = template
        for kwargs in ({}, {"tools": [TOOL]}, {"chat_template": "rag"}):
            for n_messages in (1, 2, 3):
                chat = CHAT[:n_messages]
                assert answer(wrapped, chat, **kwargs) == answer(plain, chat, **kwargs)
    named = dict(TEMPLATES)
    wrapped.chat_template = named
    assert answer(wrapped, CHAT) == answer(wrapped.unwrap(), CHAT)
    named["default"] = TEMPLATES["default"] + "!"  # in its place
    assert answer(wrapped, CHAT).endswith("!")


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_an_iterator_is_read_once(name: str) -> None:
    source = TEMPLATES["tool_use" if name == "tools" else "rag"]
    item: Any = TOOL if name == "tools" else {"title": "A", "text": "b"}
    plain = plain_tokenizer(source)
    wrapped = tokcache.wrap(plain)
    for _ in range(3):
        expected = answer(plain, CHAT, **{name: iter([item])})
        assert answer(wrapped, CHAT, **{name: iter([item])}) == expected
    assert stats_of(wrapped).refusals["type"] == 2


def test_tools_in_a_tuple_are_shown_as_transformers_shows_them() -> None:
    plain = plain_tokenizer("{{ tools }}" + LOOP)
    wrapped = tokcache.wrap(plain)
    for n_messages in (1, 2, 3, 4):
        chat = CHAT[:n_messages]
        for tools in ([TOOL], (TOOL,)):
            assert answer(wrapped, chat, tools=tools) == answer(plain, chat, tools=tools)
    assert stats_of(wrapped).hits > 4
