"""The classes of wrapped transformers tokenizers and of their scoped views, and their pickles."""

from __future__ import annotations

import copyreg
import threading
from abc import ABCMeta
from collections.abc import Sequence
from functools import update_wrapper
from inspect import getattr_static
from operator import itemgetter
from types import FunctionType
from typing import Any

from tokcache.text.engines.copying import Engine, PlainEngine

_lock = threading.RLock()  # held while a class is looked up and made

# Methods that a class must not override if its calls are to be answered from ids.
STANDARD = (
    "__call__",
    "encode",
    "_encode_plus",
    "_convert_encoding",
    "_eventual_warn_about_too_long_sequence",
    "_get_padding_truncation_strategies",
    "set_truncation_and_padding",
)

# Class methods that load a tokenizer from files.
_LOADING = ("from_pretrained", "_from_pretrained", "convert_to_native_format")


class PlainLayout:
    """The first base of our classes: it gives their objects the layout of plain tokenizers.

    CPython allows an assignment to `__class__` only between classes whose chains of first bases add
    the same fields. Here these are `__dict__` and `__weakref__`, added by a class that derives from
    `object` alone.
    """


class ViewLayout(PlainLayout):
    """The first base of the classes of scoped views, whose objects have one more field."""

    __slots__ = ("_tokcache_scope",)


def is_wrapper_base(kind: type) -> bool:
    """Return whether this is TransformersWrapper, from which all wrapped classes derive."""
    return PlainLayout in kind.__bases__ and kind is not ViewLayout


class WrapperType(ABCMeta):
    """The type of our classes; a pickle of one names the plain class, which any process has.

    It derives from ABCMeta, so that a class can derive both from one of ours and an abstract class.
    """


class _OfPlainClass:
    """A class method, bound to the plain class: transformers inspects the class that it loads.

    It is looked up at each call, because `patch_transformers` replaces it.
    """

    def __init__(self, plain: type[Any], name: str) -> None:
        self._plain, self._name = plain, name

    def __get__(self, instance: object, owner: type[Any]) -> Any:
        return getattr(self._plain, self._name)


def wrapper_class(plain: type[Any], base: type[Any]) -> type[Any]:
    """Return the class of wrapped tokenizers of the class `plain`, with the same name.

    It derives from `base`, which is TransformersWrapper, and from the plain class. It is an
    attribute of the plain class, and its qualified name says so: picklers that store a class by its
    name (dill, cloudpickle, and with them the fingerprints of datasets) find it there.
    """
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase  # noqa: PLC0415

    def signed(name: str) -> Any:
        """Return a copy of a method of `base` with the plain one's signature and docstring."""
        own = getattr(base, name)
        copy = FunctionType(
            own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__
        )
        return update_wrapper(copy, getattr(plain, name))

    with _lock:
        if "_tokcache_class" not in vars(plain):
            chat = plain.apply_chat_template  # a class may have one of its own, which is kept
            if chat is PreTrainedTokenizerBase.apply_chat_template:
                chat = signed("apply_chat_template")
            body = {
                "__slots__": (),
                "__module__": plain.__module__,
                "__qualname__": f"{plain.__qualname__}._tokcache_class",
                "__doc__": plain.__doc__,
                "__call__": signed("__call__"),
                "encode": signed("encode"),
                "apply_chat_template": chat,
                "_tokcache_plain": plain,
                **{name: _OfPlainClass(plain, name) for name in _LOADING},
            }
            make: Any = WrapperType
            plain._tokcache_class = make(plain.__name__, (base, plain), body)  # noqa: SLF001 (ours)
        return plain._tokcache_class  # type: ignore[no-any-return]  # noqa: SLF001 (ours)


def is_view(kind: type[Any]) -> bool:
    """Return whether this is the class of scoped views of a wrapped tokenizer."""
    return kind._tokcache_scope is not None  # noqa: SLF001 (ours; a slot there, None elsewhere)


def view_class(kind: type[Any]) -> type[Any]:
    """Return the class of scoped views of a wrapped tokenizer: they share its attributes."""
    if is_view(kind):
        return kind
    with _lock:
        if "_tokcache_view" not in vars(kind):
            body = {
                "__slots__": (),
                "__module__": kind.__module__,
                "__qualname__": f"{kind.__qualname__}._tokcache_view",
                "__doc__": kind.__doc__,
                "_tokcache_viewed": kind,
            }
            if "_tokcache_plain" in vars(kind):
                body["_tokcache_plain"] = kind._tokcache_plain  # noqa: SLF001 (ours)
            made: Any = type(kind)
            kind._tokcache_view = made(kind.__name__, (ViewLayout, kind), body)  # noqa: SLF001 (ours)
        return kind._tokcache_view  # type: ignore[no-any-return]  # noqa: SLF001 (ours)


def _reduced_class(kind: type[Any]) -> Any:
    own = vars(kind)
    if "_tokcache_plain" in own:
        return itemgetter(0), ((own["_tokcache_plain"],),)
    if "_tokcache_viewed" in own:
        return view_class, (own["_tokcache_viewed"],)
    return kind.__qualname__  # a class that others derived from ours: found by its name


copyreg.pickle(WrapperType, _reduced_class)


# ---- classes that override how they encode


def own_engine(wrapper: Any) -> Engine | None:
    """Return the engine of a tokenizer whose class overrides how it encodes, None for all others.

    The engine is the tokenizer's plain call, and its answers are not cached.
    """
    from transformers.tokenization_utils_tokenizers import TokenizersBackend  # noqa: PLC0415

    kind = type(wrapper)
    own = []
    for name in STANDARD:
        not_ours = (
            base
            for base in kind.__mro__
            if not is_wrapper_base(base) and "_tokcache_plain" not in vars(base)
        )
        owner = next((base for base in not_ours if name in vars(base)), None)
        is_overridden = owner is not None and (
            vars(owner)[name] is not getattr_static(TokenizersBackend, name)
        )
        if is_overridden or name in vars(wrapper):
            own.append(name)
    if hasattr(kind, "_switch_to_input_mode"):
        own.append("_switch_to_input_mode")
    if not own:
        return None

    def call(texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        found = [wrapper(text, add_special_tokens=add_special_tokens) for text in texts]
        return [one["input_ids"] for one in found]

    return PlainEngine(f"own_{own[0].strip('_')}", call)
