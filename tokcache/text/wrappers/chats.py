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
_BYPASSING = frozenset(
    {"continue_final_message", "return_assistant_tokens_mask", "sanitize_control_tokens"}
)
# Names of arguments that transformers does not pass on, or has itself, and raises an error for.
_RESERVED = frozenset({"messages", "conversations"})
_LISTS = (list, tuple, type(None))
# Arguments that are not passed to the template, or apart from the others.
_NOT_PASSED = frozenset(
    {
        *_BYPASSING,
        *("chat_template", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "tokenizer_kwargs"),
        *("tools", "documents", "add_generation_prompt"),
    }
)


def rendered_chat(
    tokenizer: Any, conversation: Any, kwargs: dict[str, Any], plain: Callable[..., Any]
) -> str | None:
    """Return the text of a chat, or None if transformers has to render it.

    `plain` is the tokenizer's own `apply_chat_template`. It raises its own errors: everything that
    is wrong or unusual is left to it.
    """
    try:  # the properties of the wrapper's class would take longer
        core = tokenizer._tokenizer._tokcache  # noqa: SLF001 (ours)
    except AttributeError:
        core = tokenizer._tokcache  # noqa: SLF001 (ours)
    known = core.rendered
    if known.is_off:
        return None
    library = _library()
    if library is None:
        known.refuse("transformers")
        return None
    tools = kwargs.get("tools")
    try:
        source = tokenizer.get_chat_template(kwargs.get("chat_template"), tools)
        if type(source) is not str:
            known.refuse("type")
            return None
        template = known.template(source, library._compile_jinja_template)  # noqa: SLF001 (no public way)
        if template is None:
            return None
        reason = _refusal(conversation, kwargs)
        if reason:
            known.refuse(reason)
            return None
        if tools is not None:
            tools = _schemas(library, tools)
        special_tokens = _special_tokens(tokenizer, template.parts.reads)
    except Exception:  # noqa: BLE001 (transformers raises it again)
        known.refuse("failed")
        return None
    arguments = {name: value for name, value in kwargs.items() if name not in _NOT_PASSED}

    def plain_text() -> str:
        found: str = plain(conversation, **{**kwargs, "tokenize": False})
        return found

    chat = Chat(
        messages=conversation,
        special_tokens=special_tokens,
        arguments=arguments,
        tools=tools,
        documents=kwargs.get("documents"),
        add_generation_prompt=kwargs.get("add_generation_prompt", False),
        normalise=_normalised,
        plain=plain_text,
    )
    scope = tokenizer._tokcache_scope  # noqa: SLF001 (ours)
    found: str | None = known.render(template, chat, scope)
    return found


def _refusal(conversation: Any, kwargs: dict[str, Any]) -> str:
    """Return the reason why a call is left to transformers, if it is one of its arguments."""
    if not _BYPASSING.isdisjoint(kwargs):
        for name in sorted(_BYPASSING):
            if kwargs.get(name, False) is not False:
                return name
    if type(conversation) not in (list, tuple) or not conversation:
        return "type"
    # An iterator could be read only once.
    tools, documents = kwargs.get("tools"), kwargs.get("documents")
    if type(tools) not in _LISTS or type(documents) not in _LISTS:
        return "type"
    if documents is not None and not all(type(each) is dict for each in documents):
        return "type"
    return "" if _RESERVED.isdisjoint(kwargs) else "type"


def _special_tokens(tokenizer: Any, reads: frozenset[str]) -> dict[str, str]:
    """Return the special tokens that a template reads, as transformers passes them to it."""
    names = [name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name in reads]
    if not names:
        return {}
    if type(tokenizer).special_tokens_map is _own_map():
        own = tokenizer._special_tokens_map  # noqa: SLF001 (its own property makes all of them)
        return {name: str(own[name]) for name in names if own.get(name) is not None}
    found = tokenizer.special_tokens_map
    return {name: found[name] for name in names if name in found}


@cache
def _own_map() -> Any:
    from transformers import PreTrainedTokenizerBase  # noqa: PLC0415

    return PreTrainedTokenizerBase.special_tokens_map


def _schemas(library: ModuleType, tools: Any) -> Any:
    """Return the JSON schemas of tools; transformers makes those of functions at every call."""
    return [
        library.get_json_schema(tool)
        if type(tool) is not dict and (inspect.isfunction(tool) or inspect.ismethod(tool))
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
