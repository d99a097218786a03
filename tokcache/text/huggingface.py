"""The faces of `tokenizers.Tokenizer` and of transformers' fast tokenizers.

`wrap` returns a new object with the methods of the wrapped kind and the same results. Behind it
stands a copy of the tokenizer that shares only the model with the original, so that neither sees
what is changed on the other; every way to change that copy leads through its face, which tells
the cache. Two limits: attributes of a model object (`model.dropout = …`) and training in place
are shared with the original, and what is done to them there needs `cache_clear()`; and the Rust
object itself is not handed out, for code that insists on it there is `unwrap()`.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, update_wrapper
from types import FunctionType
from typing import Any

from tokenizers import Tokenizer

from tokcache.config import CacheConfig
from tokcache.errors import InvalidConfig, InvalidText, UnsupportedTokenizer
from tokcache.text._native import log_missing_extension
from tokcache.text.engines import (
    CopyError,
    Engine,
    HuggingFaceEngine,
    PlainEngine,
    added_tokens,
    copy_tokenizer,
    signature,
    why_random,
)
from tokcache.text.tokenizer import CachedTokenizer, WrappedTokenizer

_COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "model")

# Arguments of a transformers call and the values that ask for nothing: such a call is cached.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (True, False),
    "text_pair": (None,),
    "text_target": (None,),
    "text_pair_target": (None,),
    "padding": (False,),
    "truncation": (False, None),
    "max_length": (None,),
    "stride": (0,),
    "is_split_into_words": (False,),
    "pad_to_multiple_of": (None,),
    "padding_side": (None,),
    "return_tensors": (None,),
    "return_token_type_ids": (None,),
    "return_attention_mask": (None,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_offsets_mapping": (False,),
    "return_length": (False,),
    "verbose": (True,),
    "tokenizer_kwargs": (None,),
    "sanitize_control_tokens": (False,),
}

# What a class may not have changed, for its calls to be answered from ids.
_STANDARD = (
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


def wrap(tokenizer: Any, config: CacheConfig | None = None) -> WrappedTokenizer:
    """Return a new tokenizer with the methods and results of `tokenizer`, and a cache.

    `tokenizer` is a `tokenizers.Tokenizer` or a fast transformers tokenizer; it stays as it is.
    One that is wrapped already is returned itself; one that can't be copied, because a component
    is written in Python, is used in place and never cached.

    Errors: UnsupportedTokenizer for any other kind; InvalidConfig for a `config` that is
            no CacheConfig, or differs from the one a wrapped tokenizer has.
    Cost:   a few milliseconds; the vocabulary is shared, not copied.
    """
    log_missing_extension()
    if config is not None and not isinstance(config, CacheConfig):
        raise InvalidConfig(f"config must be a CacheConfig or None, not {config!r}")
    if isinstance(tokenizer, WrappedTokenizer):
        return _wrapped_again(tokenizer, config)
    if isinstance(tokenizer, Tokenizer):
        return TokenizerFace(_Backend(tokenizer, config), None)
    if _is_fast_transformers(tokenizer):
        face: WrappedTokenizer = _wrap_transformers(tokenizer, config)
        return face
    raise UnsupportedTokenizer(
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} can't be wrapped; pass a "
        "tokenizers.Tokenizer or a fast transformers tokenizer (transformers 5, "
        "AutoTokenizer.from_pretrained(…) with is_fast True)"
    )


def _wrapped_again(tokenizer: WrappedTokenizer, config: CacheConfig | None) -> WrappedTokenizer:
    own = tokenizer._tokcache.config  # noqa: SLF001 (ours)
    if config is not None and config != own:
        raise InvalidConfig(f"this tokenizer is wrapped already, with {own}, not {config}")
    return tokenizer


# ---- the tokenizer behind a face


@dataclass(slots=True)
class _HandedOut:
    """A component that callers hold and may change in place."""

    signature: object
    holders: list[Any]


class _Backend:
    """A plain tokenizer of our own, and every way to change it.

    `is_unsettled` says that a call left truncation, padding or `encode_special_tokens` in it that
    the next plain call of transformers would undo.

    Threads: safe; `core.plain_lock` is held while it encodes or changes.
    """

    def __init__(
        self,
        source: Tokenizer,
        config: CacheConfig | None,
        *,
        splits_special_tokens: Callable[[], bool] | None = None,
        own_engine: Engine | None = None,
    ) -> None:
        self.raw = _own_copy(source)
        self.is_unsettled = True
        self.counts_encodings = splits_special_tokens is None
        self._splits = splits_special_tokens or (lambda: self.raw.encode_special_tokens)
        self._own_engine = own_engine
        self._handed_out: dict[str, _HandedOut] = {}
        self._has_stale_matcher = False
        self.core = CachedTokenizer(config, self._build_engine)

    def _build_engine(self) -> Engine:
        if self._own_engine is not None:
            return self._own_engine
        reason = why_random(self.raw.model)
        if reason is None and self._has_stale_matcher:
            reason = "normalizer_changed_in_place"
        try:
            if reason is None:
                return HuggingFaceEngine(self.raw, self._splits())
        except CopyError as error:
            reason = error.reason
        return PlainEngine(str(reason), lambda *call: self._encode_plain(str(reason), *call))

    def _encode_plain(
        self, reason: str, texts: Sequence[str], add_special_tokens: bool
    ) -> list[list[int]]:
        """Encode whole texts with the tokenizer itself, and leave its settings as they were."""
        raw = self.raw
        with self.core.plain_lock:
            saved = raw.truncation, raw.padding, raw.encode_special_tokens
            self.settle()
            try:
                found = raw.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            finally:
                self._restore(*saved)
        self.core.count_bypass(reason, len(texts))
        return [encoding.ids for encoding in found]

    def _restore(self, truncation: Any, padding: Any, encode_special_tokens: bool) -> None:
        if truncation is not None:
            self.raw.enable_truncation(**truncation)
        if padding is not None:
            self.raw.enable_padding(**padding)
        self.raw.encode_special_tokens = encode_special_tokens
        self.is_unsettled = True

    def settle(self) -> None:
        """Leave the settings as a plain call of transformers does.

        While another thread's call is at work this counts as having come before it.
        """
        if self.core.plain_lock.acquire(blocking=False):
            try:
                self.raw.no_truncation()
                self.raw.no_padding()
                self.raw.encode_special_tokens = self._splits()
                self.is_unsettled = False
            finally:
                self.core.plain_lock.release()

    # ---- changes

    def change(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that changes how the tokenizer encodes."""
        with self.core.plain_lock:
            try:
                return getattr(self.raw, method)(*args, **kwargs)
            finally:
                self.core.invalidate()

    def train(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Train a model of our own: training happens in place, and the original shares ours."""
        with self.core.plain_lock:
            self.raw.model = pickle.loads(pickle.dumps(self.raw.model))  # noqa: S301 (own object)
            return self.change(method, *args, **kwargs)

    def configure(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that sets truncation or padding: the cache's own copy has neither."""
        with self.core.plain_lock:
            self.is_unsettled = True
            return getattr(self.raw, method)(*args, **kwargs)

    def encode(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that returns Encoding objects, which can't be made from ids."""
        if self.counts_encodings:
            self.core.count_bypass("encoding_objects")
        with self.core.plain_lock:
            return getattr(self.raw, method)(*args, **kwargs)

    def set_encode_special_tokens(self, value: bool) -> None:
        """Set what no serialisation of a tokenizer shows."""
        with self.core.plain_lock:
            before = self._splits()
            self.raw.encode_special_tokens = value
            self.is_unsettled = True
            if self._splits() != before:
                self.core.invalidate()

    def replace(self, source: Tokenizer) -> None:
        """Take a copy of another tokenizer in place of this one."""
        with self.core.plain_lock:
            self.raw = _own_copy(source)
            self.is_unsettled = True
            self._has_stale_matcher = False
            self._handed_out.clear()
            self.core.invalidate()

    # ---- components

    def component(self, name: str) -> Any:
        """Hand out a component; from now on its state is looked at before every answer."""
        with self.core.guard_lock:
            part = getattr(self.raw, name)
            if part is not None:
                self._watch(name, part)
            return part

    def set_component(self, name: str, value: Any) -> None:
        """Put in a component; who put it in still holds it."""
        with self.core.plain_lock, self.core.guard_lock:
            before = self._last_seen(name)
            setattr(self.raw, name, value)
            self._handed_out.pop(name, None)
            is_same = before is not None and before == _signature_or_none(self.raw, name)
            if name == "model" or not is_same or self._has_stale_matcher:
                self._has_stale_matcher = self._has_stale_matcher and name != "normalizer"
                self.core.invalidate()
            if value is not None:
                self._watch(name, value)

    def _last_seen(self, name: str) -> object:
        """Return the state that the cached answers were made with."""
        entry = self._handed_out.get(name)
        return _signature_or_none(self.raw, name) if entry is None else entry.signature

    def _watch(self, name: str, part: Any) -> None:
        now = _signature_or_none(self.raw, name)
        entry = self._handed_out.setdefault(name, _HandedOut(now, []))
        entry.holders = [*_held_elsewhere(entry.holders), part]
        self.core.watch(self._look)

    def _look(self) -> None:
        """Compare every component handed out with what it was, and forget those given back."""
        with self.core.guard_lock:
            changed = [name for name in list(self._handed_out) if self._has_changed(name)]
            if not self._handed_out:
                self.core.watch(None)
            if changed:  # before the lock is let go: the next asker sees no difference any more
                self.core.invalidate()

    def _has_changed(self, name: str) -> bool:
        entry = self._handed_out[name]
        entry.holders = _held_elsewhere(entry.holders)  # first: who holds it can still change it
        now = _signature_or_none(self.raw, name)
        changed = now != entry.signature
        entry.signature = now
        if not entry.holders:
            del self._handed_out[name]
        if changed and name == "normalizer":
            # The matcher of normalized added tokens was made with the normalizer as it was.
            self._has_stale_matcher = any(token.normalized for token in added_tokens(self.raw))
        return changed


def _own_copy(source: Tokenizer) -> Tokenizer:
    try:
        return copy_tokenizer(_plain(source))
    except CopyError:
        return _plain(source)  # nothing of it is cached then, so nothing can be stale


def _plain(tokenizer: Any) -> Tokenizer:
    is_face = isinstance(tokenizer, WrappedTokenizer)
    plain: Tokenizer = tokenizer._backend.raw if is_face else tokenizer  # noqa: SLF001 (ours)
    return plain


def _signature_or_none(tokenizer: Tokenizer, name: str) -> object:
    try:
        return signature(tokenizer, name)
    except CopyError:
        return None  # written in Python: not cached while it is there


def _reference_counts(parts: list[Any]) -> list[int]:
    return [sys.getrefcount(part) for part in parts]


_COUNT_IF_OURS_ALONE = _reference_counts([object()])[0]


def _held_elsewhere(parts: list[Any]) -> list[Any]:
    """Return the components that somebody else holds, or may hold a member of."""
    counts = _reference_counts(parts)
    return [
        part
        for part, count in zip(parts, counts, strict=True)
        if count > _COUNT_IF_OURS_ALONE or hasattr(type(part), "__getitem__")
    ]


# ---- tokenizers.Tokenizer


class TokenizerFace(WrappedTokenizer):
    """A `tokenizers.Tokenizer` with a cache; `isinstance` holds, though it can't be subclassed.

    `encode` and its kin return Encoding objects as before, uncached: the cached way to ids is
    `token_ids`. Pickle and copy give a plain Tokenizer.
    """

    __slots__ = ("_backend", "_tokcache", "_tokcache_scope")

    _backend: _Backend

    def __init__(self, backend: _Backend, scope: str | None) -> None:
        _set_slots(self, _backend=backend, _tokcache=backend.core, _tokcache_scope=scope)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """Say what isinstance asks for."""
        return Tokenizer

    def unwrap(self) -> Tokenizer:
        """Return a plain Tokenizer as this one is now; later changes are not shared."""
        return _own_copy(self._backend.raw)

    def scoped(self, scope: str | None) -> TokenizerFace:
        """Return the same tokenizer with `scope` for every call that names none."""
        return TokenizerFace(self._backend, _exact_scope(scope))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend.raw, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _COMPONENTS:
            self._backend.set_component(name, value)
        elif name == "encode_special_tokens":
            self._backend.set_encode_special_tokens(value)
        else:
            setattr(self._backend.raw, name, value)

    def __repr__(self) -> str:
        return repr(self._backend.raw)

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
for _name in _COMPONENTS:
    setattr(TokenizerFace, _name, _forward_component(_name))


# ---- transformers


class _TransformersFace(WrappedTokenizer):
    """What a wrapped transformers tokenizer does otherwise than the class it wraps.

    The class of a wrapped tokenizer derives from this one and from the tokenizer's own class,
    and bears its name. Its `__dict__` is a plain tokenizer's; ours lies in slots beside it.
    """

    __slots__ = ()

    _tokcache_backend: _Backend
    _tokcache_plain: type[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain tokenizer: `from_pretrained` of a wrapped one's class does this."""
        return cls._tokcache_plain(*args, **kwargs)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Tokenize as the plain tokenizer does; whole texts and no wishes: from the cache."""
        if not args and _asks_for_nothing(kwargs):
            found = self._cached(text, kwargs.get("add_special_tokens", True), _batch_encoding)
            if found is not None:
                return found
        with self._tokcache.plain_lock:
            return super().__call__(text, *args, **kwargs)

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ids as the plain tokenizer does; whole texts and no wishes: from the cache."""
        if not args and _asks_for_nothing(kwargs):
            found = self._cached(text, kwargs.get("add_special_tokens", True), _ids_alone)
            if found is not None:
                return found
        return super().encode(text, *args, **kwargs)  # type: ignore[misc]

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        core = self._tokcache
        core.count_bypass(_why_not_cached(self, args, kwargs))
        with core.plain_lock:
            return super()._encode_plus(*args, **kwargs)  # type: ignore[misc]

    def _cached(self, text: Any, add_special_tokens: bool, answer: Callable[..., Any]) -> Any:
        """Return what `answer` makes of the ids, or None if this call is the plain tokenizer's."""
        core, backend = self._tokcache, self._tokcache_backend
        generation = core.fresh()
        engine = core.engine(generation)
        if engine.reason is not None or not (isinstance(text, str) or _is_batch(text)):
            return None
        if "token_type_ids" in self.model_input_names and not engine.has_zero_type_ids:
            return None
        if backend.is_unsettled:
            backend.settle()
        scope = self._tokcache_scope
        if isinstance(text, str):
            ids = core.find(generation, text, add_special_tokens, scope).tolist()
            self._warn_if_too_long(ids)
            return answer(self, ids, engine, [text], add_special_tokens)
        found = core.find_batch(generation, text, add_special_tokens, scope)
        batch = [ids.tolist() for ids in found]
        for ids in batch:
            self._warn_if_too_long(ids)
        return answer(self, batch, engine, list(text), add_special_tokens)

    def _warn_if_too_long(self, ids: list[int]) -> None:
        if len(ids) > self.model_max_length:
            self._eventual_warn_about_too_long_sequence(ids, None, True)

    def unwrap(self) -> Any:
        """Return a plain tokenizer as this one is now; later changes are not shared."""
        plain = object.__new__(self._tokcache_plain)
        plain.__dict__.update(_copied_state(self))
        plain.__dict__["_tokenizer"] = _own_copy(self._tokcache_backend.raw)
        return plain

    def scoped(self, scope: str | None) -> Any:
        """Return the same tokenizer with `scope` for every call that names none."""
        view = object.__new__(type(self))
        _set_slots(
            view,
            __dict__=self.__dict__,
            _tokcache=self._tokcache,
            _tokcache_backend=self._tokcache_backend,
            _tokcache_scope=_exact_scope(scope),
        )
        return view

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_tokenizer":
            self._tokcache_backend.replace(value)
            return
        super().__setattr__(name, value)
        if name == "split_special_tokens":
            self._tokcache_backend.is_unsettled = True
            self._tokcache.invalidate()

    def __reduce_ex__(self, _protocol: Any) -> Any:
        # The older form: pickle insists that the newer one names the class of this very object.
        return self.unwrap().__reduce_ex__(1)


def _is_fast_transformers(tokenizer: Any) -> bool:
    kinds = {base.__name__ for base in type(tokenizer).__mro__ if _is_of_transformers(base)}
    return "TokenizersBackend" in kinds and isinstance(
        getattr(tokenizer, "_tokenizer", None), Tokenizer
    )


def _is_of_transformers(base: type) -> bool:
    return base.__module__.partition(".")[0] == "transformers"


def _wrap_transformers(tokenizer: Any, config: CacheConfig | None) -> Any:
    face_class = _face_class(type(tokenizer))  # type: ignore[arg-type]  # every type is Hashable
    face = object.__new__(face_class)
    own_engine = _own_engine(face)
    state = _copied_state(tokenizer)
    _set_slots(face, __dict__=state, _tokcache_scope=None)
    backend = _Backend(
        tokenizer._tokenizer,  # noqa: SLF001 (transformers' name for it)
        config,
        splits_special_tokens=lambda: bool(state["split_special_tokens"]),
        own_engine=own_engine,
    )
    state["_tokenizer"] = TokenizerFace(backend, None)
    _set_slots(face, _tokcache=backend.core, _tokcache_backend=backend)
    return face


@cache
def _face_class(plain: type[Any]) -> type[Any]:
    """Return the class of wrapped tokenizers of one kind, with the kind's own name."""
    body = {
        "__slots__": ("_tokcache", "_tokcache_backend", "_tokcache_scope"),
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__call__": _signed_like(plain.__call__, _TransformersFace.__call__),
        "encode": _signed_like(plain.encode, _TransformersFace.encode),
        "_tokcache_plain": plain,
        # Bound to the plain class: transformers looks into the very class that it loads for.
        **{name: getattr(plain, name) for name in _LOADING},
    }
    return type(plain.__name__, (_TransformersFace, plain), body)


def _signed_like(plain: Any, own: Any) -> Any:
    """Return `own` with the signature and documentation of the method it stands for."""
    copy = FunctionType(
        own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__
    )
    return update_wrapper(copy, plain)


def _own_engine(face: Any) -> Engine | None:
    """Return the engine of a class that encodes in a way of its own: its plain call."""
    own = [name for name in _STANDARD if _is_overridden(face._tokcache_plain, name)]  # noqa: SLF001
    if hasattr(face._tokcache_plain, "_switch_to_input_mode"):  # noqa: SLF001
        own.append("_switch_to_input_mode")
    if not own:
        return None

    def call(texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        found = [face(text, add_special_tokens=add_special_tokens) for text in texts]
        return [one["input_ids"] for one in found]

    return PlainEngine(f"own_{own[0].strip('_')}", call)


def _is_overridden(plain: type[Any], name: str) -> bool:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend  # noqa: PLC0415

    return getattr(plain, name) is not getattr(TokenizersBackend, name)


def _copied_state(tokenizer: Any) -> dict[str, Any]:
    """Copy the containers, so that what is put into one side's is not seen on the other."""
    return {
        name: value.copy() if type(value) in (dict, list, set) else value
        for name, value in vars(tokenizer).items()
    }


def _set_slots(instance: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def _exact_scope(scope: object) -> str | None:
    if scope is None or isinstance(scope, str):
        return scope
    raise InvalidText(f"scope must be a str or None, not {type(scope).__name__}")


def _asks_for_nothing(kwargs: dict[str, Any]) -> bool:
    return all(_is_neutral(name, value) for name, value in kwargs.items())


def _is_neutral(name: str, value: object) -> bool:
    # By identity: 0 is no False to transformers, `padding=0` is an error there.
    return any(value is neutral for neutral in _NEUTRAL.get(name, ()))


def _is_batch(text: Any) -> bool:
    if not isinstance(text, list | tuple) or not text:
        return False
    return all(isinstance(one, str) for one in text)


def _why_not_cached(face: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Name what sends a call to the plain tokenizer, as a counter's key."""
    asked = {**dict(zip(("text", "text_pair"), args, strict=False)), **kwargs}
    text = asked.pop("text", None)
    split = asked.pop("split_special_tokens", None)
    if not (split is None or split is face.split_special_tokens):
        return "split_special_tokens"
    for name, value in asked.items():
        short = name.removesuffix("_strategy")
        if short != name and str(getattr(value, "value", "")).startswith("do_not"):
            continue
        if not _is_neutral(short, value):
            return short if short in _NEUTRAL else "other_argument"
    if not (isinstance(text, str) or _is_batch(text)):
        return "input_type"
    engine = face._tokcache.engine(face._tokcache.fresh())  # noqa: SLF001 (ours)
    if engine.reason is not None:
        return str(engine.reason)
    return "encoding_objects" if engine.has_zero_type_ids else "token_type_ids"


def _ids_alone(_face: Any, ids: list[Any], *_rest: Any) -> list[Any]:
    return ids


def _batch_encoding(
    face: Any, ids: list[Any], engine: Engine, texts: list[str], add_special_tokens: bool
) -> Any:
    names = face.model_input_names
    data = {"input_ids": ids}
    if "token_type_ids" in names:
        data["token_type_ids"] = _like(ids, 0)
    if "attention_mask" in names:
        data["attention_mask"] = _like(ids, 1)
    return _lazy_batch_encoding().make(data, engine, texts, add_special_tokens)


def _like(ids: list[Any], value: int) -> list[Any]:
    if ids and isinstance(ids[0], list):
        return [[value] * len(one) for one in ids]
    return [value] * len(ids)


@cache
def _lazy_batch_encoding() -> Any:
    from transformers.tokenization_utils_base import BatchEncoding  # noqa: PLC0415

    class LazyBatchEncoding(BatchEncoding):
        """A BatchEncoding whose `encodings` are computed when first asked for."""

        @classmethod
        def make(
            cls, data: dict[str, Any], engine: Engine, texts: list[str], add_special_tokens: bool
        ) -> Any:
            made = cls.__new__(cls)
            made.__dict__.update(
                data=data, _n_sequences=1, _source=(engine, texts, add_special_tokens)
            )
            return made

        @property
        def _encodings(self) -> Any:
            own = self.__dict__
            if "_made" not in own:
                engine, texts, add_special_tokens = own["_source"]
                own["_made"] = engine.encodings(texts, add_special_tokens)
            return own["_made"]

        @_encodings.setter
        def _encodings(self, value: Any) -> None:
            self.__dict__["_made"] = value

        @property
        def is_fast(self) -> bool:
            own = self.__dict__
            return own["_made"] is not None if "_made" in own else True

        def __reduce_ex__(self, _protocol: Any) -> Any:
            plain: Any = BatchEncoding.__new__(BatchEncoding)
            plain.__setstate__({"data": self.data, "encodings": self._encodings})
            return plain.__reduce_ex__(1)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(LazyBatchEncoding, name, getattr(BatchEncoding, name))
    return LazyBatchEncoding
