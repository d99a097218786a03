"""The attributes that somebody set on a `tokenizers.Tokenizer`, and their transfer to a copy.

Each object of the Rust class has a `__dict__`, and an attribute in it hides the method of the same
name: this is how `CLIPTokenizer` replaces `decode`. A copy made from the components has no such
attributes. A replacing method usually calls the method that it hides, bound to the original object.
So it is bound to the copy instead, or the tokenizer is not copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, update_wrapper
from types import BuiltinMethodType, CellType, FunctionType
from typing import Any

from tokenizers import Tokenizer

from tokcache.errors import CopyError

# Methods that don't decide the ids of a text.
_READING = frozenset(
    {
        "decode",
        "decode_batch",
        "from_buffer",
        "from_file",
        "from_pretrained",
        "from_str",
        "get_added_tokens_decoder",
        "get_vocab",
        "get_vocab_size",
        "id_to_token",
        "save",
        "to_str",
        "token_to_id",
    }
)
_VALUES = (str, bytes, int, float, bool, type(None))


def why_own(tokenizer: Tokenizer) -> str | None:
    """Return the reason if a method that may decide ids was replaced on a tokenizer, or None."""
    for name in vars(tokenizer):
        if hasattr(Tokenizer, name) and name not in _READING:
            return f"own_{name.strip('_')}"
    return None


def carry_attributes(source: Tokenizer, made: Tokenizer) -> None:
    """Set on `made` each attribute of `source`, bound to `made` where it was bound to `source`.

    Errors: CopyError for a replaced method that decides ids, or that can't be bound again.
    """
    reason = why_own(source)
    if reason is not None:
        raise CopyError(reason)
    for name, value in vars(source).items():
        is_method = hasattr(Tokenizer, name)
        setattr(made, name, _Binding(name, source, made).bind(value) if is_method else value)


class _Binding:
    """Makes a copy of the method that was set on `source`, bound to `made`."""

    def __init__(self, name: str, source: Tokenizer, made: Tokenizer) -> None:
        self._name, self._source, self._made = name, source, made
        self._open: list[FunctionType] = []  # functions being copied: one may refer to itself

    def bind(self, value: Any) -> Any:
        """Return `value` with `made` in place of `source`."""
        if value is self._source:
            return self._made
        if isinstance(value, _VALUES):
            return value
        if self._is_bound_to_source(value):
            return getattr(self._made, value.__name__)
        if type(value) is partial:
            return partial(
                self.bind(value.func), *self._all(value.args), **self._named(value.keywords)
            )
        if type(value) is FunctionType and value not in self._open:
            return self._function(value)
        raise self._refusal()

    def _function(self, function: FunctionType) -> FunctionType:
        used = (function.__globals__.get(name) for name in function.__code__.co_names)
        if any(one is self._source or self._is_bound_to_source(one) for one in used):
            raise self._refusal()  # the copy uses the same global variables
        self._open.append(function)
        made = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            self._all(function.__defaults__ or ()) or None,
            self._all(function.__closure__ or (), of_cells=True),
        )
        made.__kwdefaults__ = self._named(function.__kwdefaults__ or {}) or None
        self._open.pop()
        return update_wrapper(made, function)  # type: ignore[return-value]

    def _all(self, values: Iterable[Any], *, of_cells: bool = False) -> tuple[Any, ...]:
        if of_cells:
            return tuple(CellType(self.bind(cell.cell_contents)) for cell in values)
        return tuple(map(self.bind, values))

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: self.bind(value) for name, value in values.items()}

    def _is_bound_to_source(self, value: Any) -> bool:
        return isinstance(value, BuiltinMethodType) and value.__self__ is self._source

    def _refusal(self) -> CopyError:
        # The value may refer to `source` in a way that can't be followed.
        return CopyError(f"own_{self._name.strip('_')}")
