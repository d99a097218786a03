"""`patch_transformers`: every tokenizer that `from_pretrained` loads afterwards is wrapped.

One class method loads every tokenizer that can be wrapped, for AutoTokenizer, tokenizer classes,
processors and pipelines: `PreTrainedTokenizerBase.from_pretrained`. The patch replaces it by a
class method that calls it and wraps the result. A class that overrides `from_pretrained` gets a
wrapped tokenizer from `super()`; one that does not call `super()`, such as mistral-common's, loads
the same tokenizer as without the patch.

A wrapped tokenizer is pickled as a plain one, so that any process can load it. While transformers
is patched, `TokenizersBackend.__setstate__` wraps each tokenizer that is unpickled.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from tokcache._forks import call_in_child
from tokcache.config import CacheConfig
from tokcache.errors import InvalidConfig, MissingExtra
from tokcache.text.tokenizer import CachedTokenizer, WrappedTokenizer
from tokcache.text.wrappers import wrap
from tokcache.text.wrappers.transformers import wrap_loaded

_log = logging.getLogger("tokcache")
_METHOD = "from_pretrained"
_LOADING = "__setstate__"


@dataclass(frozen=True, slots=True)
class LoadStats:
    """Counters of the tokenizers loaded while transformers was patched, since the process began.

    Units: `n_wrapped` counts the tokenizers that were wrapped; `unwrapped` counts, by class name,
           those that could not be wrapped.
    """

    n_wrapped: int
    unwrapped: Mapping[str, int]


@dataclass(slots=True)
class _Patch:
    """The methods put into classes of transformers; once inactive they only pass calls on.

    `replaced` has the class of each method, its name, the method before (or None) and the new one.
    """

    config: CacheConfig
    replaced: list[tuple[type[Any], str, Any, Any]] = field(default_factory=list)
    is_active: bool = True

    def put(self, owner: type[Any], name: str, method: Any) -> None:
        """Put a method into a class."""
        self.replaced.append((owner, name, vars(owner).get(name), method))
        setattr(owner, name, method)

    def end(self) -> None:
        """Put the methods back, except where another library has replaced ours since then."""
        self.is_active = False
        for owner, name, before, method in reversed(self.replaced):
            if vars(owner).get(name) is not method:
                continue
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The cache of a tokenizer that was wrapped, and the name by which it was loaded."""

    name: str
    core: weakref.ref[CachedTokenizer]


class _State:
    """The patch in force and its counters, under one lock."""

    def __init__(self) -> None:
        self.patch: _Patch | None = None
        self.n_wrapped = 0
        self.unwrapped: Counter[str] = Counter()
        self.loaded: list[_Loaded] = []
        self.last_unwrapped: Callable[[], Any] = lambda: None
        self.renew_lock()

    def renew_lock(self) -> None:
        self.lock = threading.Lock()


_state = _State()

call_in_child(_state.renew_lock)


def patch_transformers(config: CacheConfig | None = None) -> None:
    """Wrap every fast tokenizer that transformers' `from_pretrained` returns from now on.

    Tokenizers that are unpickled are wrapped, too. A slow tokenizer, or another one that can't be
    wrapped, is returned as it is, and logged once for each class. Tokenizers that were loaded
    before are not changed. A second call changes nothing.

    Errors:  InvalidConfig for a `config` that is not a CacheConfig, or differs from that of the
             patch in force; MissingExtra without transformers.
    Cost:    imports transformers.
    Threads: safe; a load in progress in another thread may return a plain or a wrapped tokenizer.
    """
    if config is not None and not isinstance(config, CacheConfig):
        raise InvalidConfig(f"config must be a CacheConfig or None, not {config!r}")
    try:  # before the lock is taken: the import takes seconds
        from transformers import (  # noqa: PLC0415 (an extra, and seconds)
            PreTrainedTokenizerBase,
            TokenizersBackend,
        )
    except ImportError as error:
        raise MissingExtra(
            f"patch_transformers needs transformers ({error}): pip install 'tokcache[hf]'"
        ) from error
    with _state.lock:
        if _state.patch is None:
            patch = _state.patch = _Patch(config or CacheConfig())
            # Another library may have put a method into the class of fast tokenizers that does not
            # call that of the base class, as fastokens does. Then that one is replaced, too.
            for one in (PreTrainedTokenizerBase, TokenizersBackend):
                if _METHOD in vars(one):
                    patch.put(one, _METHOD, _wrapping(patch, vars(one)[_METHOD]))
            if not hasattr(TokenizersBackend, _LOADING):
                patch.put(TokenizersBackend, _LOADING, _loading(patch))
        elif config is not None and config != _state.patch.config:
            raise InvalidConfig(
                f"transformers is patched already, with {_state.patch.config}, not "
                f"{config}; call unpatch_transformers() first"
            )


def unpatch_transformers() -> None:
    """Make `from_pretrained` return plain tokenizers again; wrapped tokenizers stay wrapped.

    Without a patch in force this does nothing. If another library has replaced the method in the
    meantime, its method stays, and ours, which it may call, only passes calls on.

    Threads: safe.
    """
    with _state.lock:
        patch, _state.patch = _state.patch, None
        if patch is not None:
            patch.end()


def load_stats() -> LoadStats:
    """Return the counters of the tokenizers loaded while transformers was patched."""
    with _state.lock:
        return LoadStats(_state.n_wrapped, dict(_state.unwrapped))


def loaded() -> list[tuple[str, CachedTokenizer]]:
    """Return the caches of the tokenizers that were wrapped on loading and are still in use.

    Each comes with the name or path by which it was loaded, oldest first.
    """
    with _state.lock:
        alive = [(one, one.core()) for one in _state.loaded]
        _state.loaded = [one for one, core in alive if core is not None]
    return [(one.name, core) for one, core in alive if core is not None]


def _wrapping(patch: _Patch, original: Any) -> Any:
    """Return the class method that calls `original` and wraps the tokenizer that it returns."""

    @wraps(original.__func__)
    def from_pretrained(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        tokenizer = original.__get__(None, cls)(*args, **kwargs)
        # A class may wrap the tokenizer that it loads, with a config of its own.
        if not patch.is_active or isinstance(tokenizer, WrappedTokenizer):
            return tokenizer
        try:
            made = wrap(tokenizer, patch.config)
        except Exception as error:  # noqa: BLE001 (a tokenizer must be loaded all the same)
            _count_unwrapped(tokenizer, error)
            return tokenizer
        _count_wrapped(tokenizer, made)
        return made

    return classmethod(from_pretrained)


def _loading(patch: _Patch) -> Callable[[Any, dict[str, Any]], None]:
    """Return the method that unpickling calls with the attributes of a tokenizer."""

    def __setstate__(self: Any, state: dict[str, Any]) -> None:  # noqa: N807
        vars(self).update(state)
        # The copy module calls this method, too, and the copy of a plain tokenizer is plain.
        is_copy = sys._getframe(1).f_globals.get("__name__") == "copy"  # noqa: SLF001
        if not patch.is_active or is_copy or isinstance(self, WrappedTokenizer):
            return
        try:
            wrap_loaded(self, patch.config)
        except Exception as error:  # noqa: BLE001 (a tokenizer must be loaded all the same)
            _count_unwrapped(self, error)
        else:
            _count_wrapped(self, self)

    return __setstate__


def _count_wrapped(tokenizer: Any, made: WrappedTokenizer) -> None:
    core = weakref.ref(made._tokcache)  # noqa: SLF001 (ours)
    with _state.lock:
        _state.n_wrapped += 1
        _state.loaded = [one for one in _state.loaded if one.core() is not None]
        _state.loaded.append(_Loaded(str(tokenizer.name_or_path), core))


def _count_unwrapped(tokenizer: Any, error: Exception) -> None:
    kind = type(tokenizer).__qualname__
    with _state.lock:
        if _state.last_unwrapped() is tokenizer:
            return  # counted already: one of our methods called another one of ours
        _state.last_unwrapped = weakref.ref(tokenizer)
        _state.unwrapped[kind] += 1
        is_first = _state.unwrapped[kind] == 1
    if is_first:
        _log.warning("a %s was loaded without a cache: %s: %s", kind, type(error).__name__, error)
