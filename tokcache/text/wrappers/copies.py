"""Copies of transformers tokenizers: a wrapped copy of a plain one, and copies of a wrapped one."""

from __future__ import annotations

import copy
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from tokcache.errors import UnsupportedTokenizer
from tokcache.text.wrappers.backend import Backend
from tokcache.text.wrappers.classes import is_view, is_wrapper_base, own_engine
from tokcache.text.wrappers.tokenizers import TokenizersWrapper, set_slots

if TYPE_CHECKING:
    from tokcache.config import CacheConfig


def copied_state(tokenizer: Any) -> dict[str, Any]:
    """Return the attributes of a tokenizer, with containers copied, so that none is shared."""
    return {
        name: value.copy() if type(value) in (dict, list, set) else value
        for name, value in vars(tokenizer).items()
    }


def wrap_in_place(wrapper: Any, config: CacheConfig | None) -> TokenizersWrapper:
    """Replace the Rust tokenizer of `wrapper` by a TokenizersWrapper of a copy of it.

    Errors: UnsupportedTokenizer if another library has replaced the Rust tokenizer.
    """
    state = vars(wrapper)
    if not isinstance(state["_tokenizer"], Tokenizer):
        raise UnsupportedTokenizer(f"it can't be wrapped: {foreign_backend(state['_tokenizer'])}")
    backend = Backend(
        state["_tokenizer"],
        config,
        splits_special_tokens=bool(state.get("split_special_tokens", False)),
        own_engine=own_engine(wrapper),
    )
    backend.add_wrapper(wrapper)
    state["_tokenizer"] = rust = TokenizersWrapper(backend, None)
    return rust


def shallow_copy(wrapper: Any) -> Any:
    """Return a copy that shares the Rust tokenizer, and so its cache."""
    if has_own_reduce(type(wrapper)):
        return reconstructed(wrapper.__reduce_ex__(4))
    made = object.__new__(type(wrapper))
    set_slots(made, __dict__=vars(wrapper).copy())
    if is_view(type(wrapper)):
        set_slots(made, _tokcache_scope=wrapper._tokcache_scope)  # noqa: SLF001 (ours)
    wrapper._tokcache_backend.add_wrapper(made)  # noqa: SLF001 (ours)
    return made


def deep_copy(wrapper: Any, memo: dict[int, Any]) -> Any:
    """Return a copy with a Rust tokenizer and a cache of its own."""
    if has_own_reduce(type(wrapper)):
        return reconstructed(copy.deepcopy(wrapper.__reduce_ex__(4), memo))
    made = memo[id(wrapper)] = object.__new__(type(wrapper))
    backend = wrapper._tokcache_backend.copied()  # noqa: SLF001 (ours)
    memo[id(vars(wrapper)["_tokenizer"])] = TokenizersWrapper(backend, None)
    set_slots(made, __dict__=copy.deepcopy(vars(wrapper), memo))
    if is_view(type(wrapper)):
        set_slots(made, _tokcache_scope=wrapper._tokcache_scope)  # noqa: SLF001 (ours)
    if (own := own_engine(made)) is not None:
        backend.set_own_engine(own)
    backend.add_wrapper(made)
    return made


def has_own_reduce(kind: type[Any]) -> bool:
    """Return whether a class that derives from a wrapped one defines how it is pickled."""
    return any(
        name in vars(base)
        for base in takewhile(lambda base: not is_wrapper_base(base), kind.__mro__)
        for name in ("__reduce__", "__reduce_ex__")
    )


def reconstructed(reduced: Any) -> Any:
    """Return the object that `__reduce_ex__` describes, as the copy module makes it."""
    make, args, *rest = reduced
    made = make(*args)
    if rest and rest[0]:
        state = rest[0]
        made.__setstate__(state) if hasattr(made, "__setstate__") else vars(made).update(state)
    return made


def foreign_backend(rust: Any) -> str:
    """Return a message about the object in place of the Rust tokenizer, and a remedy."""
    found = type(rust)
    name = f"{found.__module__}.{found.__qualname__}"
    if found.__module__.partition(".")[0] == "fastokens":
        return (
            f"its backend is a {name}, put there by fastokens.patch_transformers(); call "
            "fastokens.unpatch_transformers() and load the tokenizer again (with "
            'CacheConfig(engine="fastokens") or "auto", tokcache uses fastokens where it is equal)'
        )
    return (
        f"its backend is a {name}, not a tokenizers.Tokenizer; load the tokenizer without the "
        "library that put it there"
    )
