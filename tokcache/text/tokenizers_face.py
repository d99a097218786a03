"""The face of `tokenizers.Tokenizer`.

Behind it stands a copy of the tokenizer; two limits: attributes of a model object
(`model.dropout = …`) and training in place are shared with the original, and what is done to them
there needs `cache_clear()`; and the Rust object itself is not handed out, for code that insists
on it there is `unwrap()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from tokcache._validate import require_scope
from tokcache.text.backend import COMPONENTS, Backend, own_copy
from tokcache.text.tokenizer import WrappedTokenizer


class TokenizerFace(WrappedTokenizer):
    """A `tokenizers.Tokenizer` with a cache; `isinstance` holds, though it can't be subclassed.

    `encode` and its kin return Encoding objects as before, uncached: the cached way to ids is
    `token_ids`. Pickle and copy give a plain Tokenizer.
    """

    __slots__ = ("_backend", "_tokcache", "_tokcache_scope")

    _backend: Backend

    def __init__(self, backend: Backend, scope: str | None) -> None:
        set_slots(self, _backend=backend, _tokcache=backend.core, _tokcache_scope=scope)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """Say what isinstance asks for."""
        return Tokenizer

    def unwrap(self) -> Tokenizer:
        """Return a plain Tokenizer as this one is now; later changes are not shared."""
        return own_copy(self._backend.raw)

    def scoped(self, scope: str | None) -> TokenizerFace:
        """Return the same tokenizer with `scope` for every call that names none."""
        return TokenizerFace(self._backend, require_scope(scope))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend.raw, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COMPONENTS:
            self._backend.set_component(name, value)
        elif name == "encode_special_tokens":
            self._backend.set_encode_special_tokens(value)
        else:
            setattr(self._backend.raw, name, value)

    def __repr__(self) -> str:
        return self._cached_repr(repr(self._backend.raw))

    def __str__(self) -> str:
        return str(self._backend.raw)

    def __dir__(self) -> list[str]:
        return sorted({*dir(TokenizerFace), *dir(self._backend.raw)})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.unwrap().__reduce_ex__(protocol)


def _forward(kind: str, method: str) -> Callable[..., Any]:
    plain = getattr(Tokenizer, method)

    def forward(self: TokenizerFace, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._backend, kind)(method, *args, **kwargs)

    forward.__name__, forward.__qualname__ = method, f"Tokenizer.{method}"
    forward.__doc__ = plain.__doc__
    return forward


def _forward_component(name: str) -> property:
    return property(lambda self: self._backend.component(name), doc=f"The {name}, watched.")


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
            setattr(TokenizerFace, _method, _forward(_kind, _method))
for _name in COMPONENTS:
    setattr(TokenizerFace, _name, _forward_component(_name))


def set_slots(instance: Any, **values: Any) -> None:
    """Set attributes past a face that hands them on."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)
