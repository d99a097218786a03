"""patch_transformers: from then on, what transformers' `from_pretrained` returns is wrapped.

Every tokenizer that can be wrapped is loaded by one class method, whether AutoTokenizer asks for
it, a class of its own, a processor or a pipeline: `PreTrainedTokenizerBase.from_pretrained`. That
one is replaced by a class method that calls it and wraps what it returns. A class that defines
`from_pretrained` itself has the wrapped tokenizer from `super()`; one that does not ask `super()`,
as that of mistral-common, loads what it always did.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

from tokcache.config import CacheConfig
from tokcache.errors import InvalidConfig, MissingExtra
from tokcache.text.huggingface import wrap
from tokcache.text.tokenizer import CachedTokenizer, WrappedTokenizer

_log = logging.getLogger("tokcache")
_METHOD = "from_pretrained"


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What was loaded while transformers was patched, since the process began.

    Units: `n_wrapped` tokenizers; `unwrapped` tokenizers returned as they were, by class name.
    """

    n_wrapped: int
    unwrapped: Mapping[str, int]


@dataclass(slots=True)
class _Patch:
    """One replacement of the method; it only passes calls on once it is no longer active.

    `original` and `installed` are the class methods themselves, as they lie in the class.
    """

    config: CacheConfig
    owner: type[Any]
    original: Any
    installed: Any = None
    is_active: bool = True


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A tokenizer that was wrapped, and the name it was loaded by."""

    name: str
    core: weakref.ref[CachedTokenizer]


class _State:
    """The patch in force and what came of it."""

    def __init__(self) -> None:
        self.patch: _Patch | None = None
        self.n_wrapped = 0
        self.unwrapped: Counter[str] = Counter()
        self.loaded: list[_Loaded] = []
        self.renew_lock()

    def renew_lock(self) -> None:
        self.lock = threading.Lock()


_state = _State()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_state.renew_lock)


def patch_transformers(config: CacheConfig | None = None) -> None:
    """Wrap every fast tokenizer that transformers' `from_pretrained` returns from now on.

    A slow one, or any other that can't be wrapped, is returned as it is, and logged once a class.
    Tokenizers that are loaded already stay as they are. Patching twice is patching once.

    Errors:  InvalidConfig for a `config` that is no CacheConfig, or differs from that of the patch
             in force; MissingExtra without transformers.
    Cost:    imports transformers.
    Threads: safe; a load that is under way ends as it began or wrapped.
    """
    if config is not None and not isinstance(config, CacheConfig):
        raise InvalidConfig(f"config must be a CacheConfig or None, not {config!r}")
    owner = _tokenizer_base()  # before the lock: its import takes seconds
    with _state.lock:
        if _state.patch is None:
            _state.patch = _installed(_Patch(config or CacheConfig(), owner, vars(owner)[_METHOD]))
        elif config is not None and config != _state.patch.config:
            raise InvalidConfig(
                f"transformers is patched already, with {_state.patch.config}, not "
                f"{config}; call unpatch_transformers() first"
            )


def unpatch_transformers() -> None:
    """Have `from_pretrained` return plain tokenizers again; those wrapped already stay wrapped.

    Without a patch in force this does nothing. Where somebody else has replaced the method in the
    meantime, theirs stays, and ours below it only passes calls on.

    Threads: safe.
    """
    with _state.lock:
        patch, _state.patch = _state.patch, None
        if patch is None:
            return
        patch.is_active = False
        if vars(patch.owner)[_METHOD] is patch.installed:
            setattr(patch.owner, _METHOD, patch.original)


def load_stats() -> LoadStats:
    """Return how many tokenizers were wrapped as they were loaded, and which were not."""
    with _state.lock:
        return LoadStats(_state.n_wrapped, dict(_state.unwrapped))


def loaded() -> list[tuple[str, CachedTokenizer]]:
    """Return the caches of the living tokenizers that were wrapped as they were loaded.

    Each comes with the name or path it was loaded by, oldest first.
    """
    with _state.lock:
        alive = [(one, one.core()) for one in _state.loaded]
        _state.loaded = [one for one, core in alive if core is not None]
    return [(one.name, core) for one, core in alive if core is not None]


def _tokenizer_base() -> type[Any]:
    try:
        from transformers import PreTrainedTokenizerBase  # noqa: PLC0415 (an extra, and seconds)
    except ImportError as error:
        raise MissingExtra(
            f"patch_transformers needs transformers ({error}): pip install 'tokcache[hf]'"
        ) from error
    return PreTrainedTokenizerBase


def _installed(patch: _Patch) -> _Patch:
    """Put a patch in place of the method that it remembers."""
    original = patch.original

    @wraps(original.__func__)
    def from_pretrained(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        tokenizer = original.__get__(None, cls)(*args, **kwargs)
        return _wrapped(tokenizer, patch.config) if patch.is_active else tokenizer

    patch.installed = classmethod(from_pretrained)
    setattr(patch.owner, _METHOD, patch.installed)
    return patch


def _wrapped(tokenizer: Any, config: CacheConfig) -> Any:
    if isinstance(tokenizer, WrappedTokenizer):
        return tokenizer  # by a class that wraps what it loads, with a config of its own
    try:
        made = wrap(tokenizer, config)
    except Exception as error:  # noqa: BLE001 (what can't be wrapped is loaded all the same)
        _count_unwrapped(tokenizer, error)
        return tokenizer
    _count_wrapped(tokenizer, made)
    return made


def _count_wrapped(tokenizer: Any, made: WrappedTokenizer) -> None:
    core = weakref.ref(made._tokcache)  # noqa: SLF001 (ours)
    with _state.lock:
        _state.n_wrapped += 1
        _state.loaded = [one for one in _state.loaded if one.core() is not None]
        _state.loaded.append(_Loaded(str(tokenizer.name_or_path), core))


def _count_unwrapped(tokenizer: Any, error: Exception) -> None:
    kind = type(tokenizer).__qualname__
    with _state.lock:
        _state.unwrapped[kind] += 1
        is_first = _state.unwrapped[kind] == 1
    if is_first:
        _log.warning("a %s was loaded without a cache: %s: %s", kind, type(error).__name__, error)
