"""The wrapper of transformers' fast tokenizers, and the calls that it answers from the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from tokcache._validate import require_scope
from tokcache.errors import InvalidText
from tokcache.text.tokenizer import WrappedTokenizer
from tokcache.text.wrappers.backend import NOTHING_SET, Backend, own_copy
from tokcache.text.wrappers.batch_encoding import (
    Asked,
    batch_encoding,
    ids_alone,
    make_fields,
    make_rows,
    read,
    shaped,
)
from tokcache.text.wrappers.chats import rendered_chat
from tokcache.text.wrappers.classes import (
    STANDARD,
    PlainLayout,
    is_view,
    own_engine,
    view_class,
    wrapper_class,
)
from tokcache.text.wrappers.copies import (
    copied_state,
    deep_copy,
    foreign_backend,
    has_own_reduce,
    shallow_copy,
    wrap_in_place,
)
from tokcache.text.wrappers.tokenizers import TokenizersWrapper, accept_wrappers, set_slots

if TYPE_CHECKING:
    from tokcache.config import CacheConfig
    from tokcache.text.token_ids import TokenIds
    from tokcache.text.tokenizer import CachedTokenizer

_log = logging.getLogger("tokcache")

# The arguments of a transformers call, with the values that change nothing in the answer: a call
# with no other values is answered from the cache at once.
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

# The arguments that apply_chat_template passes to the call that tokenizes the rendered chat.
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


class TransformersWrapper(PlainLayout, WrappedTokenizer):
    """The methods in which a wrapped transformers tokenizer differs from its plain class.

    The class of a wrapped tokenizer derives from this class and from the tokenizer's own class, and
    has the own class's name. Its objects have the layout and attributes of plain tokenizers, so
    that code which copies one and assigns a class of its own to the copy works. Everything that
    belongs to tokcache is reached by the attribute `_tokenizer`, a TokenizersWrapper.
    """

    _tokcache_plain: type[Any]
    _tokcache_scope: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain tokenizer, as `from_pretrained` of a wrapped tokenizer's class needs.

        A class that somebody derived from it makes objects of its own, which are wrapped as soon as
        `_tokenizer` is set.
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
        if type(rust) is not TokenizersWrapper:  # other code has set it through `__dict__`
            rust = wrap_in_place(self, None)
        return rust._backend  # noqa: SLF001 (ours)

    def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        """Return the token ids of `text`, from the cache if it holds them.

        Shapes: int32[n_tokens], read-only, shared with the cache.
        Cost:   a hit is one look-up; a text that several threads need at once is encoded once.
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
        """Tokenize as the plain tokenizer does, from the cache where ids alone can answer."""
        if not args and _is_neutral(kwargs):
            found = self._whole_text(text, kwargs.get("add_special_tokens", True), batch_encoding)
            if found is not None:
                return found
        if self._tokcache_backend.own_engine is not None:  # its calls may switch between two modes
            with self._tokcache.plain_lock:
                return super().__call__(text, *args, **kwargs)
        return super().__call__(text, *args, **kwargs)

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ids as the plain tokenizer does, from the cache where possible."""
        if not args and _is_neutral(kwargs):
            found = self._whole_text(text, kwargs.get("add_special_tokens", True), ids_alone)
            if found is not None:
                return found
        return super().encode(text, *args, **kwargs)  # type: ignore[misc]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render and tokenize as the plain tokenizer does, through the caches where possible."""
        plain = super().apply_chat_template  # type: ignore[misc]
        if kwargs.get("tokenize") is True:
            kwargs = {name: value for name, value in kwargs.items() if name != "tokenize"}
        is_text = kwargs.get("tokenize", True) is False
        if args or not (is_text or _OF_TOKENIZING.isdisjoint(kwargs)):
            return plain(conversation, *args, **kwargs)
        text = rendered_chat(self, conversation, kwargs, plain)
        if is_text:
            return plain(conversation, **kwargs) if text is None else text
        if kwargs.get("return_dict", True) is not False:
            if text is None or kwargs.get("return_dict", True) is not True:
                return plain(conversation, **kwargs)
            return self(text, add_special_tokens=False)
        if text is None:
            text = plain(conversation, tokenize=False, **kwargs)
        ids = self._whole_text(text, False, ids_alone)
        return self(text, add_special_tokens=False)["input_ids"] if ids is None else ids

    def _whole_text(self, text: Any, add_special_tokens: bool, answer: Callable[..., Any]) -> Any:
        """Return the answer that `answer` makes of a text's ids, None if the cache can't give one.

        This is the path of a hit: the fewest calls and attributes that keep it right.
        """
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
        """Return the plain tokenizer's answer, made from ids, or the reason why it can't be."""
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
        verbose = asked.flags.get("verbose", True)
        for ids in data["input_ids"]:
            self._eventual_warn_about_too_long_sequence(ids, asked.max_length, verbose)
        return shaped(asked, engine, data)

    def unwrap(self) -> Any:
        """Return a plain tokenizer equal to this one; later changes are not shared."""
        plain = object.__new__(self._tokcache_plain)
        plain.__dict__.update(copied_state(self))
        plain.__dict__["_tokenizer"] = own_copy(self._tokcache_backend.raw)
        return plain

    def scoped(self, scope: str | None) -> Any:
        """Return this tokenizer, with `scope` as the scope of calls that name none."""
        scope = require_scope(scope)
        view = object.__new__(view_class(type(self)))
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
            if name == "split_special_tokens" and _is_wrapped(self):
                if bool(value) != self._tokcache_backend.splits_special_tokens:
                    self._detach()
                backend = self._tokcache_backend
                backend.splits_special_tokens, backend.settled = bool(value), None
                self._tokcache.invalidate()
            super().__setattr__(name, value)
            if name in STANDARD:
                self._tokcache_backend.set_own_engine(own_engine(self))

    def _set_rust(self, value: Any) -> None:
        """Wrap another Rust tokenizer; with any other object this becomes a plain tokenizer."""
        is_wrapped = _is_wrapped(self)
        config = self._tokcache.config if is_wrapped else None
        is_own = is_wrapped and not self._tokcache_backend.is_shared(self)
        if is_own and isinstance(value, Tokenizer):
            self._tokcache_backend.replace(value)
            return
        vars(self)["_tokenizer"] = value
        if isinstance(value, Tokenizer):
            wrap_in_place(self, config)
            return
        _log.warning("a tokenizer is no longer cached: %s", foreign_backend(value))
        if not is_view(type(self)):  # a view has another slot, so its class can't be changed
            object.__setattr__(self, "__class__", self._tokcache_plain)

    def _set_class(self, value: Any) -> None:
        """Assign a class in its wrapped form, and the engine for the calls that it overrides."""
        if not issubclass(value, TransformersWrapper):
            value = wrapper_class(value, TransformersWrapper)
        if is_view(type(self)):
            value = view_class(value)
        object.__setattr__(self, "__class__", value)
        own = own_engine(self)
        if own is not None or self._tokcache_backend.own_engine is not None:
            self._detach()
            self._tokcache_backend.set_own_engine(own)

    def _detach(self) -> None:
        """Copy the Rust tokenizer if another tokenizer uses the same one.

        A cache has the answers for one value of a setting, so two tokenizers with different values
        can't share one. Later changes of one Rust tokenizer don't affect the other.
        """
        old = self._tokcache_backend
        if old.is_shared(self):
            vars(self)["_tokenizer"] = old.raw
            wrap_in_place(self, old.core.config)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in STANDARD:
            self._tokcache_backend.set_own_engine(own_engine(self))

    def __copy__(self) -> Any:
        return shallow_copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deep_copy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = type(self)
        if own.__reduce__ is not object.__reduce__ and has_own_reduce(own):
            return self.__reduce__()
        if "_tokcache_plain" not in vars(own):  # a class that somebody derived from ours
            return _wrapped_as, (own, self.unwrap(), self._tokcache.config, self._tokcache_scope)
        # In the older form, because in the newer one pickle requires the class of this object.
        return self.unwrap().__reduce_ex__(1)


def _is_wrapped(tokenizer: Any) -> bool:
    """Return whether a tokenizer has its wrapper; one that is being constructed has none yet."""
    return type(vars(tokenizer).get("_tokenizer")) is TokenizersWrapper


def is_fast_transformers(tokenizer: Any) -> bool:
    """Return whether this is a transformers tokenizer that uses the tokenizers library."""
    names = {
        base.__name__
        for base in type(tokenizer).__mro__
        if base.__module__.partition(".")[0] == "transformers"
    }
    return "TokenizersBackend" in names and hasattr(tokenizer, "_tokenizer")


def wrap_transformers(tokenizer: Any, config: CacheConfig | None) -> Any:
    """Return a wrapped copy of a transformers tokenizer."""
    accept_wrappers()
    wrapper = object.__new__(wrapper_class(type(tokenizer), TransformersWrapper))
    set_slots(wrapper, __dict__=copied_state(tokenizer))
    wrap_in_place(wrapper, config)
    return wrapper


def wrap_loaded(tokenizer: Any, config: CacheConfig) -> None:
    """Wrap a plain tokenizer in place; no other code may have a reference to it yet."""
    accept_wrappers()
    plain = type(tokenizer)
    object.__setattr__(tokenizer, "__class__", wrapper_class(plain, TransformersWrapper))
    try:
        wrap_in_place(tokenizer, config)
    except BaseException:
        object.__setattr__(tokenizer, "__class__", plain)
        raise


def _wrapped_as(kind: type[Any], plain: Any, config: CacheConfig | None, scope: str | None) -> Any:
    """Return a tokenizer as an object of `kind`, a class that derives from a wrapped class.

    If transformers is patched, `plain` was wrapped on loading. Picklers that store a class by value
    (cloudpickle, dill) build `kind` from the plain class. Then its objects are plain, unless
    transformers is patched.
    """
    made, is_wrapper = plain, issubclass(kind, TransformersWrapper)
    if is_wrapper and not isinstance(plain, TransformersWrapper):
        made = wrap_transformers(plain, config)
    if is_wrapper and is_view(kind):
        made = made.scoped(scope)
    made.__class__ = kind
    return made


def _is_neutral(kwargs: dict[str, Any]) -> bool:
    for name, value in kwargs.items():  # loops, because generators take ten times as long
        for neutral in _NEUTRAL.get(name, ()):
            if value is neutral:  # by identity: `padding=0` is an error in transformers
                break
        else:
            return False
    return True
