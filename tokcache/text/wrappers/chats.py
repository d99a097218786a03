"""The calls of `apply_chat_template` whose text can come from the cache of rendered chats."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from tokcache.text.chat.cache import Chat

if TYPE_CHECKING:
    from types import ModuleType

# What transformers makes of messages, in this order, before a template reads them.
_NORMALISING = ("_normalize_chat_messages", "_plain_template_data", "_alias_reasoning_fields")
_OTHERS = ("_compile_jinja_template", "get_json_schema")

# Arguments that change the text in a way that is not cached, unless they are False.
_BYPASSING = ("continue_final_message", "return_assistant_tokens_mask", "sanitize_control_tokens")
# Arguments that are not passed to the template.
_NOT_PASSED = frozenset(
    {
        *_BYPASSING,
        *("chat_template", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "tokenizer_kwargs"),
    }
)


def rendered_chat(
    tokenizer: Any, conversation: Any, kwargs: dict[str, Any], plain: Callable[..., Any]
) -> str | None:
    """Return the text of a chat, or None if transformers has to render it.

    `plain` is the tokenizer's own `apply_chat_template`. It raises its own errors: everything that
    is wrong or unusual is left to it.
    """
    known = tokenizer._tokcache.rendered  # noqa: SLF001 (ours)
    if known.is_off:
        return None
    for name in _BYPASSING:
        if kwargs.get(name, False) is not False:
            known.refuse(name)
            return None
    library = _library()
    if library is None:
        known.refuse("transformers")
        return None
    if type(conversation) not in (list, tuple) or not conversation:
        known.refuse("type")
        return None
    try:
        template = tokenizer.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
        tools, documents = _schemas(library, kwargs.get("tools")), kwargs.get("documents")
        special_tokens = tokenizer.special_tokens_map
    except Exception:  # noqa: BLE001 (transformers raises it again)
        known.refuse("failed")
        return None
    is_documents = documents is None or all(type(each) is dict for each in documents)
    if type(template) is not str or not is_documents:
        known.refuse("type")
        return None
    settings = {
        **special_tokens,
        **{name: value for name, value in kwargs.items() if name not in _NOT_PASSED},
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": kwargs.get("add_generation_prompt", False),
    }

    def plain_text() -> str:
        found: str = plain(conversation, **{**kwargs, "tokenize": False})
        return found

    compiled = library._compile_jinja_template  # noqa: SLF001 (there is no public way)
    chat = Chat(conversation, template, settings, compiled, _normalised, plain_text)
    found: str | None = known.render(chat, tokenizer._tokcache_scope)  # noqa: SLF001 (ours)
    return found


def _schemas(library: ModuleType, tools: Any) -> Any:
    """Return the JSON schemas of tools; transformers makes those of functions at every call."""
    if tools is None or all(type(tool) is dict for tool in tools):
        return tools
    return [
        library.get_json_schema(tool)
        if inspect.isfunction(tool) or inspect.ismethod(tool)
        else tool
        for tool in tools
    ]


# Names of messages of str alone, and whether transformers passes such messages unchanged.
_unchanged: dict[tuple[str, ...], bool] = {}
_MAX_NAMES = 256


def _normalised(message: dict[str, Any]) -> Any:
    """Return a message as transformers passes it to a template.

    Its functions take as long as rendering the message, and change nothing in most.
    """
    for value in message.values():
        if type(value) is not str:
            return _by_library(message)
    names = tuple(message)
    is_unchanged = _unchanged.get(names)
    if is_unchanged is None:
        if len(_unchanged) >= _MAX_NAMES:
            _unchanged.clear()
        probes = [dict.fromkeys(names, value) for value in ("", " é\n", "<|x|>")]
        same = [list(_by_library(probe).items()) == list(probe.items()) for probe in probes]
        is_unchanged = _unchanged[names] = all(same)
    return message if is_unchanged else _by_library(message)


def _by_library(message: dict[str, Any]) -> Any:
    library, messages = _library(), [message]
    for name in _NORMALISING:
        messages = getattr(library, name)(messages)
    return messages[0]


@cache
def _library() -> ModuleType | None:
    """Return the module of transformers that renders chats, None if it is not as we know it."""
    try:
        from transformers.utils import chat_template_utils as found  # noqa: PLC0415
    except ImportError:
        return None
    return found if all(hasattr(found, name) for name in (*_NORMALISING, *_OTHERS)) else None
