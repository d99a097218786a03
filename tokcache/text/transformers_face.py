"""The face of transformers' fast tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, update_wrapper
from itertools import chain
from types import FunctionType
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from tokcache._validate import require_scope
from tokcache.errors import InvalidText
from tokcache.text.answers import Asked, make_fields, make_rows, read
from tokcache.text.backend import NOTHING_SET, Backend, own_copy
from tokcache.text.engines import Engine, PlainEngine
from tokcache.text.tokenizer import WrappedTokenizer
from tokcache.text.tokenizers_face import TokenizerFace, set_slots

if TYPE_CHECKING:
    from tokcache.config import CacheConfig

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


class TransformersFace(WrappedTokenizer):
    """What a wrapped transformers tokenizer does otherwise than the class it wraps.

    The class of a wrapped tokenizer derives from this one and from the tokenizer's own class,
    and bears its name. Its `__dict__` is a plain tokenizer's; ours lies in slots beside it.
    """

    __slots__ = ()

    _tokcache_backend: Backend
    _tokcache_plain: type[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain tokenizer: `from_pretrained` of a wrapped one's class does this."""
        return cls._tokcache_plain(*args, **kwargs)

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
        core, backend = self._tokcache, self._tokcache_backend
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
        view = object.__new__(type(self))
        set_slots(
            view,
            __dict__=self.__dict__,
            _tokcache=self._tokcache,
            _tokcache_backend=self._tokcache_backend,
            _tokcache_scope=require_scope(scope),
        )
        return view

    def __repr__(self) -> str:
        return self._cached_repr(super().__repr__())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_tokenizer":
            self._tokcache_backend.replace(value)
            return
        super().__setattr__(name, value)
        if name == "split_special_tokens":
            self._tokcache_backend.settled = None
            self._tokcache.invalidate()
        elif name in _STANDARD:
            self._tokcache_backend.set_own_engine(_own_engine(self))

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in _STANDARD:
            self._tokcache_backend.set_own_engine(_own_engine(self))

    def __reduce_ex__(self, _protocol: Any) -> Any:
        # The older form: pickle insists that the newer one names the class of this very object.
        return self.unwrap().__reduce_ex__(1)


def is_fast_transformers(tokenizer: Any) -> bool:
    """Return whether this is a tokenizer of transformers with one of tokenizers behind it."""
    kinds = {base.__name__ for base in type(tokenizer).__mro__ if _is_of_transformers(base)}
    return "TokenizersBackend" in kinds and isinstance(
        getattr(tokenizer, "_tokenizer", None), Tokenizer
    )


def _is_of_transformers(base: type) -> bool:
    return base.__module__.partition(".")[0] == "transformers"


def wrap_transformers(tokenizer: Any, config: CacheConfig | None) -> Any:
    """Return a wrapped copy of a tokenizer of transformers."""
    face_class = _face_class(type(tokenizer))  # type: ignore[arg-type]  # every type is Hashable
    face = object.__new__(face_class)
    state = _copied_state(tokenizer)
    set_slots(face, __dict__=state, _tokcache_scope=None)
    backend = Backend(
        tokenizer._tokenizer,  # noqa: SLF001 (transformers' name for it)
        config,
        splits_special_tokens=lambda: bool(state["split_special_tokens"]),
        own_engine=_own_engine(face),
    )
    state["_tokenizer"] = TokenizerFace(backend, None)
    set_slots(face, _tokcache=backend.core, _tokcache_backend=backend)
    return face


class _OfPlainClass:
    """A class method bound to the plain class: transformers looks into the class it loads for.

    Looked up at each call, because `patch_transformers` replaces it.
    """

    def __init__(self, plain: type[Any], name: str) -> None:
        self._plain, self._name = plain, name

    def __get__(self, instance: object, owner: type[Any]) -> Any:
        return getattr(self._plain, self._name)


@cache
def _face_class(plain: type[Any]) -> type[Any]:
    """Return the class of wrapped tokenizers of one kind, with the kind's own name."""
    body = {
        "__slots__": ("_tokcache", "_tokcache_backend", "_tokcache_scope"),
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__call__": _signed_like(plain.__call__, TransformersFace.__call__),
        "encode": _signed_like(plain.encode, TransformersFace.encode),
        "apply_chat_template": _chat_method(plain),
        "_tokcache_plain": plain,
        **{name: _OfPlainClass(plain, name) for name in _LOADING},
    }
    return type(plain.__name__, (TransformersFace, plain), body)


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
    plain = face._tokcache_plain  # noqa: SLF001 (ours)
    own = [name for name in _STANDARD if name in vars(face) or _is_overridden(plain, name)]
    if hasattr(plain, "_switch_to_input_mode"):
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
