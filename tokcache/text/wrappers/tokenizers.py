"""The wrapper of `tokenizers.Tokenizer`.

It holds a copy of the tokenizer, with two limits. The copy shares the model with the original, so
a change there to the model's attributes (`model.dropout = …`) or a training needs `cache_clear()`.
And the wrapper is not the Rust object that native code may require: `accept_wrappers` makes the
methods of tokenizers take a wrapper, and for other native code there is `unwrap()`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from tokenizers import Tokenizer

from tokcache._validate import require_scope
from tokcache.text.tokenizer import WrappedTokenizer
from tokcache.text.wrappers.backend import COMPONENTS, Backend, own_copy


class TokenizersWrapper(WrappedTokenizer):
    """A `tokenizers.Tokenizer` with a cache; `isinstance` holds, but it can't be subclassed.

    `encode` and similar methods return Encoding objects and do not use the cache: `token_ids` does.
    A copy is wrapped too, with an empty cache of its own. A pickle holds a plain Tokenizer.
    """

    __slots__ = ("_backend", "_tokcache", "_tokcache_scope")

    _backend: Backend

    def __init__(self, backend: Backend, scope: str | None) -> None:
        set_slots(self, _backend=backend, _tokcache=backend.core, _tokcache_scope=scope)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """Return Tokenizer, for isinstance."""
        return Tokenizer

    def unwrap(self) -> Tokenizer:
        """Return a plain Tokenizer equal to this one; later changes are not shared."""
        return own_copy(self._backend.raw)

    def scoped(self, scope: str | None) -> TokenizersWrapper:
        """Return this tokenizer, with `scope` as the scope of calls that name none."""
        return TokenizersWrapper(self._backend, require_scope(scope))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend.raw, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COMPONENTS:
            self._backend.set_component(name, value)
        elif name == "encode_special_tokens":
            self._backend.set_encode_special_tokens(value)
        elif name in _DATA:
            setattr(self._backend.raw, name, value)
        else:
            self._backend.set_attribute(name, value)

    def __delattr__(self, name: str) -> None:
        self._backend.delete_attribute(name)

    def __repr__(self) -> str:
        return self._cached_repr(repr(self._backend.raw))

    def __str__(self) -> str:
        return str(self._backend.raw)

    def __dir__(self) -> list[str]:
        return sorted({*dir(TokenizersWrapper), *dir(self._backend.raw)})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.unwrap().__reduce_ex__(protocol)

    def __copy__(self) -> TokenizersWrapper:
        return TokenizersWrapper(self._backend.copied(), self._tokcache_scope)

    def __deepcopy__(self, memo: Any) -> TokenizersWrapper:
        return self.__copy__()


class _Forward:
    """A method of the Rust class, called through the backend.

    As on the Rust object, an attribute of the same name that was set on the object hides it.
    """

    def __init__(self, kind: str, method: str) -> None:
        def forward(self: TokenizersWrapper, *args: Any, **kwargs: Any) -> Any:
            return getattr(self._backend, kind)(method, *args, **kwargs)

        forward.__name__, forward.__qualname__ = method, f"Tokenizer.{method}"
        plain = getattr(Tokenizer, method)
        forward.__doc__ = plain.__doc__
        if plain.__text_signature__:  # splitters pass an argument only if the signature has it
            forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
        self._forward = forward

    def __get__(self, wrapper: TokenizersWrapper | None, owner: type[Any]) -> Any:
        if wrapper is None:
            return self._forward
        raw = wrapper._backend.raw  # noqa: SLF001 (ours)
        own = vars(raw).get(self._forward.__name__)
        return self._forward.__get__(wrapper) if own is None else own


# The attributes of the Rust class that can be set, besides the components.
_DATA = frozenset({"decoder", "truncation", "padding"})

_FORWARDED = {
    "change": ("add_tokens", "add_special_tokens"),
    "train": ("train", "train_from_iterator"),
    "configure": ("enable_truncation", "no_truncation", "enable_padding", "no_padding"),
    "encode": (
        "encode",
        "encode_batch",
        "encode_batch_fast",
        "async_encode",
        "async_encode_batch",
        "async_encode_batch_fast",
    ),
}

for _kind, _methods in _FORWARDED.items():
    for _method in _methods:
        if hasattr(Tokenizer, _method):
            setattr(TokenizersWrapper, _method, _Forward(_kind, _method))
for _name in COMPONENTS:
    _component: Any = lambda self, name=_name: self._backend.component(name)  # noqa: E731
    setattr(TokenizersWrapper, _name, property(_component, doc=f"The {_name}, watched."))


# The methods of tokenizers that take a Tokenizer and require the Rust object.
# Source: tests/text/test_wrap_rust_object.py, which inspects the signatures of every class.
_INSISTING = (
    ("tokenizers.decoders", "DecodeStream", "step"),
    ("tokenizers.trainers", "ParityBpeTrainer", "train_from_iterator"),
)


def accept_wrappers() -> None:
    """Make the methods of tokenizers that require the Rust object take a wrapper, too.

    Code that streams tokens passes `tok._tokenizer` to `DecodeStream.step`, whether or not other
    code has wrapped `tok`. Any other argument is passed on unchanged.
    """
    for module_name, class_name, method in _INSISTING:
        owner = getattr(importlib.import_module(module_name), class_name, None)
        plain = getattr(owner, method, None)
        if plain is not None and not hasattr(plain, "__wrapped__"):
            setattr(owner, method, _accepting(plain, is_training=method.startswith("train")))


def _accepting(plain: Any, *, is_training: bool) -> Callable[..., Any]:
    def train(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        if type(tokenizer) is not TokenizersWrapper:
            return plain(self, tokenizer, *args, **kwargs)
        return tokenizer._backend.train_by(lambda raw: plain(self, raw, *args, **kwargs))  # noqa: SLF001

    def read(self: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        if type(tokenizer) is TokenizersWrapper:
            tokenizer = tokenizer._backend.raw  # noqa: SLF001 (ours)
        return plain(self, tokenizer, *args, **kwargs)

    return wraps(plain)(train if is_training else read)


def set_slots(instance: Any, **values: Any) -> None:
    """Set attributes on the wrapper itself: its own `__setattr__` passes them on."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)
