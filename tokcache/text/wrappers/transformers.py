"""The face of transformers' fast tokenizers."""

from __future__ import annotations

import copy
import copyreg
import logging
import threading
from abc import ABCMeta
from collections.abc import Callable, Sequence
from functools import cache, update_wrapper
from inspect import getattr_static
from itertools import chain
from operator import itemgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from tokcache._validate import require_scope
from tokcache.errors import InvalidText, UnsupportedTokenizer
from tokcache.text.engines.copying import Engine, PlainEngine
from tokcache.text.tokenizer import WrappedTokenizer
from tokcache.text.wrappers.backend import NOTHING_SET, Backend, own_copy
from tokcache.text.wrappers.batch_encoding import Asked, make_fields, make_rows, read
from tokcache.text.wrappers.tokenizers import TokenizerFace, accept_wrappers, set_slots

if TYPE_CHECKING:
    from tokcache.config import CacheConfig
    from tokcache.text.token_ids import TokenIds
    from tokcache.text.tokenizer import CachedTokenizer

_log = logging.getLogger("tokcache")
_lock = threading.RLock()  # of the classes that are made once

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

# What apply_chat_template hands on to the call that tokenizes, beside the chat.
_OF_TOKENIZING = frozenset(
    {
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
        "tokenizer_kwargs",
    }
)

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


class _PlainLayout:
    """The first base of our classes: it gives their objects the layout of a plain tokenizer's.

    CPython assigns `__class__` only between classes whose chains of first bases add the same
    fields: here `__dict__` and `__weakref__`, added by a class that derives from `object` alone.
    """


class _ViewLayout(_PlainLayout):
    """The first base of the classes of scoped views: they have one field more."""

    __slots__ = ("_tokcache_scope",)


class TransformersFace(_PlainLayout, WrappedTokenizer):
    """What a wrapped transformers tokenizer does otherwise than the class it wraps.

    The class of a wrapped tokenizer derives from this one and from the tokenizer's own class, and
    bears its name. An object of it has the layout and the attributes of a plain tokenizer, so that
    code which copies it and puts a class of its own on the copy works. All that is tokcache's hangs
    on the attribute `_tokenizer`, a TokenizerFace.
    """

    _tokcache_plain: type[Any]
    _tokcache_scope: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain tokenizer: `from_pretrained` of a wrapped one's class does this.

        A class that others derived from it makes its own, wrapped when it gets its `_tokenizer`.
        """
        if "_tokcache_plain" in vars(cls):
            return cls._tokcache_plain(*args, **kwargs)
        return object.__new__(cls)

    @property
    def _tokcache(self) -> CachedTokenizer:  # type: ignore[override]
        return self._tokcache_backend.core

    @property
    def _tokcache_backend(self) -> Backend:
        rust = vars(self)["_tokenizer"]
        if type(rust) is not TokenizerFace:  # put there by code that sets `__dict__` directly
            rust = _wrap_in_place(self, None)
        return rust._backend  # noqa: SLF001 (ours)

    def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        """Return the token ids of `text`, from the cache if it holds them.

        Shapes: int32[n_tokens], read-only, shared with the cache.
        Cost:   a hit is one look-up; a text that many ask for at once is encoded once.
        """
        try:  # the properties of this class would take longer than the look-up
            core: CachedTokenizer = self._tokenizer._tokcache  # noqa: SLF001 (ours)
        except AttributeError:
            core = self._tokcache
        if scope is None:
            scope = self._tokcache_scope
        ids = core.get(text, add_special_tokens, scope)
        return core.miss(text, add_special_tokens, scope) if ids is None else ids

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Tokenize as the plain tokenizer does; from the cache where ids are enough for that."""
        if not args and _asks_for_nothing(kwargs):
            found = self._whole_text(text, kwargs.get("add_special_tokens", True), _batch_encoding)
            if found is not None:
                return found
        if self._tokcache_backend.has_own_engine:  # its calls may switch it between two modes
            with self._tokcache.plain_lock:
                return super().__call__(text, *args, **kwargs)
        return super().__call__(text, *args, **kwargs)

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ids as the plain tokenizer does; from the cache where they are known."""
        if not args and _asks_for_nothing(kwargs):
            found = self._whole_text(text, kwargs.get("add_special_tokens", True), _ids_alone)
            if found is not None:
                return found
        return super().encode(text, *args, **kwargs)  # type: ignore[misc]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render and tokenize as the plain tokenizer does; ids alone are made without the rest."""
        if args or kwargs.get("return_dict") is not False or not _OF_TOKENIZING.isdisjoint(kwargs):
            return super().apply_chat_template(conversation, *args, **kwargs)  # type: ignore[misc]
        text = super().apply_chat_template(conversation, tokenize=False, **kwargs)  # type: ignore[misc]
        ids = self._whole_text(text, False, _ids_alone)
        return self(text, add_special_tokens=False)["input_ids"] if ids is None else ids

    def _whole_text(self, text: Any, add_special_tokens: bool, answer: Callable[..., Any]) -> Any:
        """Return what `answer` makes of one text's ids; None: the long way is to be taken."""
        if not isinstance(text, str):
            return None
        try:
            backend = self._tokenizer._backend  # noqa: SLF001 (ours)
        except AttributeError:
            backend = self._tokcache_backend
        core = backend.core
        generation = core.fresh()
        engine = core.engine(generation)
        if engine.reason is not None:
            return None
        if backend.settled is not NOTHING_SET:
            backend.settle()
        try:
            found = core.find(generation, text, add_special_tokens, self._tokcache_scope)
        except InvalidText:
            return None  # the plain tokenizer raises its own error
        ids = found.tolist()
        if len(ids) > self.model_max_length:
            self._eventual_warn_about_too_long_sequence(ids, None, True)
        return answer(self, ids, engine, text, add_special_tokens)

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        core = self._tokcache
        asked = read(self, {**dict(zip(("text", "text_pair"), args, strict=False)), **kwargs})
        answer = self._from_ids(asked) if isinstance(asked, Asked) else asked
        if not isinstance(answer, str):
            return answer
        core.count_bypass(answer)
        with self._tokcache_backend.turn():
            return super()._encode_plus(*args, **kwargs)  # type: ignore[misc]

    def _from_ids(self, asked: Asked) -> Any:
        """Return what the plain tokenizer would, made from ids, or why it can't be."""
        core = self._tokcache
        generation = core.fresh()
        engine = core.engine(generation)
        if engine.reason is not None:
            return engine.reason
        n_texts = len(asked.texts)
        layout = engine.layout(n_texts, asked.add_special_tokens)
        if layout is None:
            return "post_processor"
        texts = [*chain.from_iterable(asked.texts)]
        has_around = asked.add_special_tokens and n_texts == 1
        try:
            found = core.find_batch(generation, texts, has_around, self._tokcache_scope)
        except InvalidText:
            return "invalid_text"  # the plain tokenizer raises its own error
        rows = make_rows(asked, layout, found)
        if rows is None:
            return "truncation"
        self._tokcache_backend.settle(*asked.settings)
        data = make_fields(asked, layout, rows, self.model_input_names)
        self._warn_if_too_long(asked, data["input_ids"])
        return _shaped(asked, engine, data)

    def _warn_if_too_long(self, asked: Asked, rows: Any) -> None:
        verbose = asked.flags.get("verbose", True)
        for ids in rows:
            self._eventual_warn_about_too_long_sequence(ids, asked.max_length, verbose)

    def unwrap(self) -> Any:
        """Return a plain tokenizer as this one is now; later changes are not shared."""
        plain = object.__new__(self._tokcache_plain)
        plain.__dict__.update(_copied_state(self))
        plain.__dict__["_tokenizer"] = own_copy(self._tokcache_backend.raw)
        return plain

    def scoped(self, scope: str | None) -> Any:
        """Return the same tokenizer with `scope` for every call that names none."""
        scope = require_scope(scope)
        view = object.__new__(_view_class(type(self)))
        set_slots(view, __dict__=self.__dict__, _tokcache_scope=scope)
        return view

    def __repr__(self) -> str:
        return self._cached_repr(super().__repr__())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_tokenizer":
            self._set_rust(value)
        elif name == "__class__":
            self._set_class(value)
        else:
            if name == "split_special_tokens":
                self._set_splitting(bool(value))
            super().__setattr__(name, value)
            if name in _STANDARD:
                self._tokcache_backend.set_own_engine(_own_engine(self))

    def _set_rust(self, value: Any) -> None:
        """Take another Rust tokenizer; with anything else in its place this is a plain one."""
        is_wrapped = type(vars(self).get("_tokenizer")) is TokenizerFace
        config = self._tokcache.config if is_wrapped else None
        is_own = is_wrapped and not self._tokcache_backend.is_shared(self)
        if is_own and isinstance(value, Tokenizer):
            self._tokcache_backend.replace(value)
            return
        vars(self)["_tokenizer"] = value
        if isinstance(value, Tokenizer):
            _wrap_in_place(self, config)
            return
        _log.warning("a tokenizer is no longer cached: %s", foreign_backend(value))
        if not _is_view(type(self)):  # else a view, which has a slot more
            object.__setattr__(self, "__class__", self._tokcache_plain)

    def _set_class(self, value: Any) -> None:
        """Take another class: a plain one in its wrapped form, with the calls that it changes."""
        if not issubclass(value, TransformersFace):
            value = _face_class(value)
        if _is_view(type(self)):
            value = _view_class(value)
        object.__setattr__(self, "__class__", value)
        own = _own_engine(self)
        if own is not None or self._tokcache_backend.has_own_engine:
            self._detach()
            self._tokcache_backend.set_own_engine(own)

    def _set_splitting(self, is_split: bool) -> None:
        if type(vars(self).get("_tokenizer")) is not TokenizerFace:
            return  # its class is being constructed
        if is_split != self._tokcache_backend.splits_special_tokens:
            self._detach()
        backend = self._tokcache_backend
        backend.splits_special_tokens, backend.settled = is_split, None
        self._tokcache.invalidate()

    def _detach(self) -> None:
        """Take a copy of the Rust tokenizer if a copy of this object uses the same.

        One cache has the answers of one setting. From then on, what is changed in one of the two
        Rust tokenizers is not seen by the other.
        """
        old = self._tokcache_backend
        if old.is_shared(self):
            vars(self)["_tokenizer"] = old.raw
            _wrap_in_place(self, old.core.config)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in _STANDARD:
            self._tokcache_backend.set_own_engine(_own_engine(self))

    def __copy__(self) -> Any:
        if _has_own_reduce(type(self)):
            return _reconstructed(self.__reduce_ex__(4))
        made = object.__new__(type(self))
        set_slots(made, __dict__=vars(self).copy())
        if _is_view(type(self)):
            set_slots(made, _tokcache_scope=self._tokcache_scope)
        self._tokcache_backend.add_face(made)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if _has_own_reduce(type(self)):
            return _reconstructed(copy.deepcopy(self.__reduce_ex__(4), memo))
        made = memo[id(self)] = object.__new__(type(self))
        backend = self._tokcache_backend.copied()
        memo[id(vars(self)["_tokenizer"])] = TokenizerFace(backend, None)
        set_slots(made, __dict__=copy.deepcopy(vars(self), memo))
        if _is_view(type(self)):
            set_slots(made, _tokcache_scope=self._tokcache_scope)
        if (own := _own_engine(made)) is not None:
            backend.set_own_engine(own)
        backend.add_face(made)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = type(self)
        if own.__reduce__ is not object.__reduce__ and _has_own_reduce(own):
            return self.__reduce__()
        if "_tokcache_plain" not in vars(own):  # a class that others derived from ours
            return _wrapped_as, (own, self.unwrap(), self._tokcache.config, self._tokcache_scope)
        # The older form: pickle insists that the newer one names the class of this very object.
        return self.unwrap().__reduce_ex__(1)


def is_fast_transformers(tokenizer: Any) -> bool:
    """Return whether this is a tokenizer of transformers with one of tokenizers behind it."""
    kinds = {base.__name__ for base in type(tokenizer).__mro__ if _is_of_transformers(base)}
    return "TokenizersBackend" in kinds and hasattr(tokenizer, "_tokenizer")


def _is_of_transformers(base: type) -> bool:
    return base.__module__.partition(".")[0] == "transformers"


def wrap_transformers(tokenizer: Any, config: CacheConfig | None) -> Any:
    """Return a wrapped copy of a tokenizer of transformers."""
    accept_wrappers()
    face = object.__new__(_face_class(type(tokenizer)))
    set_slots(face, __dict__=_copied_state(tokenizer))
    _wrap_in_place(face, config)
    return face


def wrap_loaded(tokenizer: Any, config: CacheConfig) -> None:
    """Wrap a plain tokenizer in place, which nobody else has seen yet."""
    accept_wrappers()
    plain = type(tokenizer)
    object.__setattr__(tokenizer, "__class__", _face_class(plain))
    try:
        _wrap_in_place(tokenizer, config)
    except BaseException:
        object.__setattr__(tokenizer, "__class__", plain)
        raise


def _wrap_in_place(face: Any, config: CacheConfig | None) -> TokenizerFace:
    """Put a wrapper, with a copy of it, in the place of the Rust tokenizer that a face has."""
    state = vars(face)
    if not isinstance(state["_tokenizer"], Tokenizer):
        raise UnsupportedTokenizer(f"it can't be wrapped: {foreign_backend(state['_tokenizer'])}")
    backend = Backend(
        state["_tokenizer"],
        config,
        splits_special_tokens=bool(state.get("split_special_tokens", False)),
        own_engine=_own_engine(face),
    )
    backend.add_face(face)
    state["_tokenizer"] = rust = TokenizerFace(backend, None)
    return rust


def _wrapped_as(kind: type[Any], plain: Any, config: CacheConfig | None, scope: str | None) -> Any:
    """Return a plain tokenizer wrapped, as an object of a class that derives from a wrapped one."""
    made = wrap_transformers(plain, config)
    if _is_view(kind):
        made = made.scoped(scope)
    made.__class__ = kind
    return made


def _has_own_reduce(kind: type[Any]) -> bool:
    """Return whether a class that derives from a wrapped one says itself how it is pickled."""
    return any(
        name in vars(base)
        for base in kind.__mro__[: kind.__mro__.index(TransformersFace)]
        for name in ("__reduce__", "__reduce_ex__")
    )


def _reconstructed(reduced: Any) -> Any:
    """Return the object that `__reduce_ex__` describes, as the copy module makes it."""
    make, args, *rest = reduced
    made = make(*args)
    if rest and rest[0]:
        state = rest[0]
        made.__setstate__(state) if hasattr(made, "__setstate__") else vars(made).update(state)
    return made


def foreign_backend(rust: Any) -> str:
    """Return a message about an object in the place of the Rust tokenizer, and what to do."""
    found = type(rust)
    name = f"{found.__module__}.{found.__qualname__}"
    if found.__module__.partition(".")[0] == "fastokens":
        return (
            f"its backend is a {name}, put there by fastokens.patch_transformers(); call "
            "fastokens.unpatch_transformers() and load the tokenizer again (tokcache uses "
            'fastokens itself where it proves equal: CacheConfig(engine="fastokens") or "auto")'
        )
    return (
        f"its backend is a {name}, not a tokenizers.Tokenizer; load the tokenizer without the "
        "library that put it there"
    )


class _OfPlainClass:
    """A class method bound to the plain class: transformers looks into the class it loads for.

    Looked up at each call, because `patch_transformers` replaces it.
    """

    def __init__(self, plain: type[Any], name: str) -> None:
        self._plain, self._name = plain, name

    def __get__(self, instance: object, owner: type[Any]) -> Any:
        return getattr(self._plain, self._name)


class _FaceType(ABCMeta):
    """The type of our classes: `pickle` makes the plain class of one, in any process.

    It derives from ABCMeta, so that a class may derive from one of ours and from an abstract one.
    """


def _reduced_class(kind: type[Any]) -> Any:
    own = vars(kind)
    if "_tokcache_plain" in own:
        return itemgetter(0), ((own["_tokcache_plain"],),)
    if "_tokcache_viewed" in own:
        return _view_class, (own["_tokcache_viewed"],)
    return kind.__qualname__  # a class that others derived from ours: found by its name


copyreg.pickle(_FaceType, _reduced_class)


def _face_class(plain: type[Any]) -> type[Any]:
    """Return the class of wrapped tokenizers of one kind, with the kind's own name.

    It is an attribute of the plain class, and its qualified name says so: picklers that store a
    class by its name (dill, cloudpickle, and with them the fingerprints of datasets) find it there.
    """
    with _lock:
        if "_tokcache_class" not in vars(plain):
            plain._tokcache_class = _made_class(plain)  # noqa: SLF001 (ours)
        return plain._tokcache_class  # type: ignore[no-any-return]  # noqa: SLF001 (ours)


def _made_class(plain: type[Any]) -> type[Any]:
    body = {
        "__slots__": (),
        "__module__": plain.__module__,
        "__qualname__": f"{plain.__qualname__}._tokcache_class",
        "__doc__": plain.__doc__,
        "__call__": _signed_like(plain.__call__, TransformersFace.__call__),
        "encode": _signed_like(plain.encode, TransformersFace.encode),
        "apply_chat_template": _chat_method(plain),
        "_tokcache_plain": plain,
        **{name: _OfPlainClass(plain, name) for name in _LOADING},
    }
    make: Any = _FaceType
    made: type[Any] = make(plain.__name__, (TransformersFace, plain), body)
    return made


def _is_view(kind: type[Any]) -> bool:
    return kind._tokcache_scope is not None  # noqa: SLF001 (ours; a slot there, None elsewhere)


def _view_class(kind: type[Any]) -> type[Any]:
    """Return the class of scoped views of a wrapped tokenizer: they share its attributes."""
    if _is_view(kind):
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
            kind._tokcache_view = made(kind.__name__, (_ViewLayout, kind), body)  # noqa: SLF001 (ours)
        return kind._tokcache_view  # type: ignore[no-any-return]  # noqa: SLF001 (ours)


def _chat_method(plain: type[Any]) -> Any:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase  # noqa: PLC0415

    own = plain.apply_chat_template
    if own is not PreTrainedTokenizerBase.apply_chat_template:
        return own
    return _signed_like(own, TransformersFace.apply_chat_template)


def _signed_like(plain: Any, own: Any) -> Any:
    """Return `own` with the signature and documentation of the method it stands for."""
    copy = FunctionType(
        own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__
    )
    return update_wrapper(copy, plain)


def _own_engine(face: Any) -> Engine | None:
    """Return the engine of a tokenizer that encodes in a way of its own: its plain call."""
    kind = type(face)
    own = [name for name in _STANDARD if name in vars(face) or _is_overridden(kind, name)]
    if hasattr(kind, "_switch_to_input_mode"):
        own.append("_switch_to_input_mode")
    if not own:
        return None

    def call(texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        found = [face(text, add_special_tokens=add_special_tokens) for text in texts]
        return [one["input_ids"] for one in found]

    return PlainEngine(f"own_{own[0].strip('_')}", call)


def _is_overridden(kind: type[Any], name: str) -> bool:
    """Return whether a class between ours and TokenizersBackend has this method of its own."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend  # noqa: PLC0415

    for base in kind.__mro__:
        is_ours = base is TransformersFace or "_tokcache_plain" in vars(base)
        if name in vars(base) and not is_ours:
            return vars(base)[name] is not getattr_static(TokenizersBackend, name)
    return False


def _copied_state(tokenizer: Any) -> dict[str, Any]:
    """Copy the containers, so that what is put into one side's is not seen on the other."""
    return {
        name: value.copy() if type(value) in (dict, list, set) else value
        for name, value in vars(tokenizer).items()
    }


def _asks_for_nothing(kwargs: dict[str, Any]) -> bool:
    for name, value in kwargs.items():  # loops: generators take ten times as long
        for neutral in _NEUTRAL.get(name, ()):
            if value is neutral:  # 0 is no False to transformers, `padding=0` is an error there
                break
        else:
            return False
    return True


def _ids_alone(_face: Any, ids: list[int], *_rest: Any) -> list[int]:
    return ids


def _batch_encoding(
    face: Any, ids: list[int], engine: Engine, text: str, add_special_tokens: bool
) -> Any:
    """Return what a call with nothing but a text gives; None if type ids are not to be had."""
    names = face.model_input_names
    data: dict[str, Any] = {"input_ids": ids}
    if "token_type_ids" in names:
        layout = engine.layout(1, add_special_tokens)
        if layout is None or not layout.is_type_zero:
            return None
        data["token_type_ids"] = [0] * len(ids)
    if "attention_mask" in names:
        data["attention_mask"] = [1] * len(ids)
    return _lazy_batch_encoding().make(data, 1, engine, [text], add_special_tokens, None, None)


def _shaped(asked: Asked, engine: Engine, data: dict[str, Any]) -> Any:
    """Return the fields of a call, as tensors or as one row where it asked for that."""
    if asked.tensors is None and not asked.is_batch:
        data = {name: rows[0] if isinstance(rows[0], list) else rows for name, rows in data.items()}
    made = _lazy_batch_encoding().make(
        data, len(asked.texts), engine, asked.inputs, asked.add_special_tokens, *asked.settings
    )
    return made.convert_to_tensors(asked.tensors)


@cache
def _lazy_batch_encoding() -> Any:
    from transformers.tokenization_utils_base import BatchEncoding  # noqa: PLC0415

    class LazyBatchEncoding(BatchEncoding):
        """A BatchEncoding whose `encodings` are computed when first asked for."""

        @classmethod
        def make(cls, data: dict[str, Any], n_sequences: int, *source: Any) -> Any:
            """Return an answer; `source` are an engine and what its `encodings` is to be given."""
            made = cls.__new__(cls)
            made.__dict__.update(data=data, _n_sequences=n_sequences, _source=source)
            return made

        @property
        def _encodings(self) -> Any:
            own = self.__dict__
            if "_made" not in own:
                engine, *asked = own["_source"]
                own["_made"] = engine.encodings(*asked)
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
