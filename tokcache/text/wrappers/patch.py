"""patch_transformers: from then on, what transformers' `from_pretrained` returns is wrapped.

Every tokenizer that can be wrapped is loaded by one class method, whether AutoTokenizer asks for
it, a class of its own, a processor or a pipeline: `PreTrainedTokenizerBase.from_pretrained`. That
one is replaced by a class method that calls it and wraps what it returns. A class that defines
`from_pretrained` itself has the wrapped tokenizer from `super()`; one that does not ask `super()`,
as that of mistral-common, loads what it always did.

A wrapped tokenizer is pickled as a plain one, so that any process can load it. Where transformers
is patched, one that is unpickled is wrapped: `TokenizersBackend.__setstate__` does it.
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
    """What was loaded while transformers was patched, since the process began.

    Units: `n_wrapped` tokenizers; `unwrapped` tokenizers returned as they were, by class name.
    """

    n_wrapped: int
    unwrapped: Mapping[str, int]


@dataclass(slots=True)
class _Patch:
    """Methods put into classes of transformers; they only pass calls on once it is inactive.

    `replaced` has for each of them its class, its name, what was there before (None: nothing) and
    what was put there.
    """

    config: CacheConfig
    replaced: list[tuple[type[Any], str, Any, Any]] = field(default_factory=list)
    is_active: bool = True

    def put(self, owner: type[Any], name: str, method: Any) -> None:
        """Put a method into a class."""
        self.replaced.append((owner, name, vars(owner).get(name), method))
        setattr(owner, name, method)

    def end(self) -> None:
        """Put back what was there, except where somebody else has replaced our method since."""
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
        self.last_unwrapped: Callable[[], Any] = lambda: None
        self.renew_lock()

    def renew_lock(self) -> None:
        self.lock = threading.Lock()


_state = _State()

call_in_child(_state.renew_lock)


def patch_transformers(config: CacheConfig | None = None) -> None:
    """Wrap every fast tokenizer that transformers' `from_pretrained` returns from now on.

    Every one that is unpickled is wrapped, too. A slow one, or any other that can't be wrapped, is
    returned as it is, and logged once a class. Tokenizers that are loaded already stay as they are.
    Patching twice is patching once.

    Errors:  InvalidConfig for a `config` that is no CacheConfig, or differs from that of the patch
             in force; MissingExtra without transformers.
    Cost:    imports transformers.
    Threads: safe; a load that is under way ends as it began or wrapped.
    """
    if config is not None and not isinstance(config, CacheConfig):
        raise InvalidConfig(f"config must be a CacheConfig or None, not {config!r}")
    owner, backend = _tokenizer_classes()  # before the lock: their import takes seconds
    with _state.lock:
        if _state.patch is None:
            _state.patch = _installed(_Patch(config or CacheConfig()), owner, backend)
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
        if patch is not None:
            patch.end()


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


def _tokenizer_classes() -> tuple[type[Any], type[Any]]:
    """Return the class that loads every tokenizer, and that of the fast ones."""
    try:
        from transformers import (  # noqa: PLC0415 (an extra, and seconds)
            PreTrainedTokenizerBase,
            TokenizersBackend,
        )
    except ImportError as error:
        raise MissingExtra(
            f"patch_transformers needs transformers ({error}): pip install 'tokcache[hf]'"
        ) from error
    return PreTrainedTokenizerBase, TokenizersBackend


def _installed(patch: _Patch, owner: type[Any], backend: type[Any]) -> _Patch:
    """Replace the methods that load tokenizers, and that unpickle them.

    A library that was here first may have put a method of its own into the class of fast tokenizers
    that does not ask ours: fastokens does. Then that one is replaced, too.
    """
    for one in (owner, backend):
        if _METHOD in vars(one):
            patch.put(one, _METHOD, _wrapping(patch, vars(one)[_METHOD]))
    if not hasattr(backend, _LOADING):
        patch.put(backend, _LOADING, _loading(patch))
    return patch


def _wrapping(patch: _Patch, original: Any) -> Any:
    @wraps(original.__func__)
    def from_pretrained(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        tokenizer = original.__get__(None, cls)(*args, **kwargs)
        return _wrapped(tokenizer, patch.config) if patch.is_active else tokenizer

    return classmethod(from_pretrained)


def _loading(patch: _Patch) -> Callable[[Any, dict[str, Any]], None]:
    """Return the method that unpickling calls with the attributes of a tokenizer."""

    def __setstate__(self: Any, state: dict[str, Any]) -> None:  # noqa: N807
        vars(self).update(state)
        # The copy module calls this, too; the copy of a plain tokenizer is plain.
        is_copy = sys._getframe(1).f_globals.get("__name__") == "copy"  # noqa: SLF001
        if not patch.is_active or is_copy or isinstance(self, WrappedTokenizer):
            return
        try:
            wrap_loaded(self, patch.config)
        except Exception as error:  # noqa: BLE001 (what can't be wrapped is loaded all the same)
            _count_unwrapped(self, error)
        else:
            _count_wrapped(self, self)

    return __setstate__


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
        if _state.last_unwrapped() is tokenizer:
            return  # by a method that called another of ours
        _state.last_unwrapped = weakref.ref(tokenizer)
        _state.unwrapped[kind] += 1
        is_first = _state.unwrapped[kind] == 1
    if is_first:
        _log.warning("a %s was loaded without a cache: %s: %s", kind, type(error).__name__, error)
