"""The plain tokenizer in a wrapper, and all changes of it.

It is a copy that shares only the model with the original, so that a change of one does not affect
the other. Every change of it is made here, and invalidates the cache.
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from tokcache.errors import CopyError
from tokcache.text.engines.copying import (
    Engine,
    HuggingFaceEngine,
    PlainEngine,
    added_tokens,
    copies_of,
    copy_tokenizer,
    signature,
    why_random,
)
from tokcache.text.tokenizer import CachedTokenizer, WrappedTokenizer
from tokcache.text.wrappers.attributes import carry_attributes, why_own

if TYPE_CHECKING:
    from tokcache.config import CacheConfig

Settings = tuple[dict[str, Any] | None, dict[str, Any] | None]
NOTHING_SET: Settings = (None, None)

COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "model")


@dataclass(slots=True)
class _HandedOut:
    """A component to which callers hold references, through which they may change it in place."""

    signature: object
    holders: list[Any]


class Backend:
    """A plain tokenizer, with all methods that change it.

    `own_engine` is the engine of a transformers tokenizer whose class overrides how it encodes, or
    None; `set_own_engine` sets it. `settled` are the truncation and padding that the last call of
    transformers has set, or None if they, or `encode_special_tokens`, may have been changed since.

    Threads: safe; `core.plain_lock` is held while the tokenizer encodes or is changed. A call that
             finds the lock taken encodes with a copy.
    """

    def __init__(
        self,
        source: Tokenizer,
        config: CacheConfig | None,
        *,
        splits_special_tokens: bool | None = None,
        own_engine: Engine | None = None,
    ) -> None:
        # The first engine takes a copy that is made with `_raw`: one proof is enough for both.
        copies, self._why_not_copied = _own_copies(source, 1 if own_engine else 2)
        self._raw, *self._unused = copies
        self._lent = threading.local()
        self.settled: Settings | None = None
        self.splits_special_tokens = splits_special_tokens
        self.own_engine = own_engine
        # The transformers tokenizers that use this backend: `copy.copy` shares the Rust object.
        self.wrappers: list[weakref.ref[Any]] = []
        self._handed_out: dict[str, _HandedOut] = {}
        self._has_stale_matcher = False
        self.core = CachedTokenizer(config, self._build_engine)

    def _splits(self) -> bool:
        """Return whether special tokens are encoded as text.

        transformers decides it in each call by an attribute of its tokenizer. The Rust tokenizer
        has a flag, which is not part of its serialised form.
        """
        if self.splits_special_tokens is None:
            return self.raw.encode_special_tokens
        return self.splits_special_tokens

    @property
    def raw(self) -> Tokenizer:
        """The plain tokenizer, or the copy of it with which this thread encodes now."""
        return self._lent_copy or self._raw

    @property
    def _lent_copy(self) -> Tokenizer | None:
        return getattr(self._lent, "copy", None)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Allow this thread to encode and to change settings, with `raw`.

        While another thread uses the tokenizer, `raw` is a copy of it. Settings that are changed on
        the copy are lost, as if they had been changed before the other thread's call.
        """
        if self._lent_copy is not None:
            yield
            return
        if self.core.plain_lock.acquire(blocking=False):
            try:
                yield
            finally:
                self.core.plain_lock.release()
            return
        engine = self.core.engine(self.core.fresh())
        if not isinstance(engine, HuggingFaceEngine):  # no copy is proven equal: wait
            with self.core.plain_lock:
                yield
            return
        with engine.borrowed() as copy:
            _set(copy, self._raw.truncation, self._raw.padding, self._raw.encode_special_tokens)
            self._lent.copy = copy
            try:
                yield
            finally:
                self._lent.copy = None

    def _build_engine(self) -> Engine:
        own = self._unused.pop() if self._unused else None  # only before `raw` can be changed
        if self.own_engine is not None:
            return self.own_engine
        reason = self._why_not_copied or why_own(self.raw) or why_random(self.raw.model)
        if reason is None and self._has_stale_matcher:
            reason = "normalizer_changed_in_place"
        try:
            if reason is None:
                return HuggingFaceEngine(self.raw, self._splits(), own)
        except CopyError as error:
            reason = error.reason
        why = str(reason)

        def encode_plain(texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
            """Encode with the tokenizer itself, and restore its settings afterwards."""
            raw = self._raw
            method = "encode_batch" if "encode_batch" in vars(raw) else "encode_batch_fast"
            with self.core.plain_lock:
                saved = raw.truncation, raw.padding, raw.encode_special_tokens
                self.settle()
                try:
                    found = getattr(raw, method)(texts, add_special_tokens=add_special_tokens)
                finally:
                    _set(raw, *saved)
                    self.settled = None
            self.core.count_bypass(why, len(texts))
            return [encoding.ids for encoding in found]

        return PlainEngine(why, encode_plain)

    def add_wrapper(self, wrapper: Any) -> None:
        """Add a transformers tokenizer to those that use this backend."""
        self.wrappers = [*(one for one in self.wrappers if one() is not None), weakref.ref(wrapper)]

    def is_shared(self, wrapper: Any) -> bool:
        """Return whether another tokenizer object, with its own attributes, uses this backend."""
        others = (one() for one in self.wrappers)
        return any(one is not None and vars(one) is not vars(wrapper) for one in others)

    def copied(self) -> Backend:
        """Return a backend with a copy of the tokenizer and an empty cache, for a copied wrapper.

        As in a copy that tokenizers makes, the attributes that were set on the Rust object are
        missing, and `encode_special_tokens` is off.
        """
        try:
            raw = copy_tokenizer(self._raw)
        except CopyError:
            raw = copy.copy(self._raw)
        raw.encode_special_tokens = False
        return Backend(raw, self.core.config, splits_special_tokens=self.splits_special_tokens)

    def set_own_engine(self, engine: Engine | None) -> None:
        """Encode with this engine from now on, or with one of ours if it is None."""
        with self.core.plain_lock:
            self.own_engine = engine
            self.core.invalidate()

    def settle(
        self, truncation: dict[str, Any] | None = None, padding: dict[str, Any] | None = None
    ) -> None:
        """Set the truncation and padding that a call of transformers with these would leave.

        Nothing is set while another thread uses the tokenizer, as if this call had come before.
        """
        if self.settled == (truncation, padding):
            return
        if self.core.plain_lock.acquire(blocking=False):
            try:
                _set(self._raw, truncation, padding, self._splits())
                is_neutral = truncation is None and padding is None
                self.settled = NOTHING_SET if is_neutral else (truncation, padding)
            finally:
                self.core.plain_lock.release()

    # ---- changes

    def change(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that changes the ids that the tokenizer gives."""
        with self.core.plain_lock:
            try:
                return getattr(Tokenizer, method)(self.raw, *args, **kwargs)
            finally:
                self.core.invalidate()

    def train(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Train a copy of the model: the original shares the model, and training changes it."""
        return self.train_by(lambda raw: getattr(Tokenizer, method)(raw, *args, **kwargs))

    def train_by(self, train: Callable[[Tokenizer], Any]) -> Any:
        """Call `train` with the tokenizer, after its model was copied."""
        with self.core.plain_lock:
            self._raw.model = pickle.loads(pickle.dumps(self.raw.model))  # noqa: S301 (own object)
            try:
                return train(self.raw)
            finally:
                self.core.invalidate()

    def set_attribute(self, name: str, value: Any) -> None:
        """Set an attribute on the Rust object; it may change the ids if it hides a method."""
        with self.core.plain_lock:
            setattr(self._raw, name, value)
            self._note_attribute(name)

    def delete_attribute(self, name: str) -> None:
        """Delete an attribute that was set on the Rust object."""
        with self.core.plain_lock:
            delattr(self._raw, name)
            self._note_attribute(name)

    def _note_attribute(self, name: str) -> None:
        if callable(getattr(Tokenizer, name, None)):
            self.core.invalidate()

    def configure(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that sets truncation or padding, which the cached ids don't depend on."""
        with self.turn():
            if self._lent_copy is None:
                self.settled = None
            return getattr(Tokenizer, method)(self.raw, *args, **kwargs)

    def encode(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that returns Encoding objects, which can't be made from ids."""
        if self.splits_special_tokens is None:  # else transformers called, which was counted there
            self.core.count_bypass("encoding_objects")
        with self.turn():
            return getattr(Tokenizer, method)(self.raw, *args, **kwargs)

    def set_encode_special_tokens(self, value: bool) -> None:
        """Set whether special tokens are encoded as text."""
        if self._lent_copy is not None:
            self._lent_copy.encode_special_tokens = value
            return
        with self.core.plain_lock:
            before = self._splits()
            self._raw.encode_special_tokens = value
            self.settled = None
            if self._splits() != before:
                self.core.invalidate()

    def replace(self, source: Tokenizer) -> None:
        """Take a copy of another tokenizer in place of this one."""
        with self.core.plain_lock:
            (self._raw,), self._why_not_copied = _own_copies(source, 1)
            self.settled = None
            self._has_stale_matcher = False
            self._handed_out.clear()
            self.core.invalidate()

    # ---- components

    def component(self, name: str) -> Any:
        """Return a component; from now on its state is compared before every answer."""
        with self.core.guard_lock:
            part = getattr(self.raw, name)
            if part is not None:
                self._watch(name, part)
            return part

    def set_component(self, name: str, value: Any) -> None:
        """Set a component; the caller still holds it, so it is watched from now on."""
        with self.core.plain_lock, self.core.guard_lock:
            # The state with which the cached answers were made.
            entry = self._handed_out.get(name)
            before = _signature_or_none(self.raw, name) if entry is None else entry.signature
            setattr(self.raw, name, value)
            self._handed_out.pop(name, None)
            is_same = before is not None and before == _signature_or_none(self.raw, name)
            if name == "model" or not is_same or self._has_stale_matcher:
                self._has_stale_matcher = self._has_stale_matcher and name != "normalizer"
                self.core.invalidate()
            if value is not None:
                self._watch(name, value)

    def _watch(self, name: str, part: Any) -> None:
        now = _signature_or_none(self.raw, name)
        entry = self._handed_out.setdefault(name, _HandedOut(now, []))
        entry.holders = [*_held_elsewhere(entry.holders), part]
        self.core.watch(self._look)

    def _look(self) -> None:
        """Compare every component handed out with its state of before; drop those given back."""
        with self.core.guard_lock:
            has_changed = False
            for name, entry in list(self._handed_out.items()):
                # First, because a caller that holds the component can still change it.
                entry.holders = _held_elsewhere(entry.holders)
                now = _signature_or_none(self.raw, name)
                if now != entry.signature:
                    has_changed = True
                    if name == "normalizer":
                        # The library searches for normalized added tokens in the forms that they
                        # had under the normalizer of before.
                        self._has_stale_matcher = any(
                            token.normalized for token in added_tokens(self.raw)
                        )
                entry.signature = now
                if not entry.holders:
                    del self._handed_out[name]
            if not self._handed_out:
                self.core.watch(None)
            if has_changed:  # before the lock is released: the next look sees no difference
                self.core.invalidate()


def _set(
    tokenizer: Tokenizer,
    truncation: dict[str, Any] | None,
    padding: dict[str, Any] | None,
    encode_special_tokens: bool,
) -> None:
    """Change only the settings that differ.

    In a child that was forked while another thread encoded, setting one would wait without end.
    """
    if truncation is None and tokenizer.truncation is not None:
        tokenizer.no_truncation()
    elif truncation != tokenizer.truncation:
        tokenizer.enable_truncation(**(truncation or {}))
    if padding is None and tokenizer.padding is not None:
        tokenizer.no_padding()
    elif padding != tokenizer.padding:
        tokenizer.enable_padding(**(padding or {}))
    if tokenizer.encode_special_tokens != encode_special_tokens:
        tokenizer.encode_special_tokens = encode_special_tokens


def own_copy(source: Tokenizer) -> Tokenizer:
    """Return a plain tokenizer that shares only the model with a plain or wrapped one."""
    (made,), _ = _own_copies(source, 1)
    return made


def _own_copies(source: Any, n_copies: int) -> tuple[list[Tokenizer], str | None]:
    """Return copies and None; or the tokenizer itself, and why its answers must not be cached.

    Only the first copy has the attributes that were set on the source.
    """
    is_wrapped = isinstance(source, WrappedTokenizer)
    plain: Tokenizer = source._backend.raw if is_wrapped else source  # noqa: SLF001 (ours)
    try:
        made = copies_of(plain, n_copies)
        carry_attributes(plain, made[0])
    except CopyError as error:
        return [plain], error.reason
    return made, None


def _signature_or_none(tokenizer: Tokenizer, name: str) -> object:
    try:
        return signature(tokenizer, name)
    except CopyError:
        return None  # written in Python: with it, answers are not cached


def _reference_counts(parts: list[Any]) -> list[int]:
    return [sys.getrefcount(part) for part in parts]


_COUNT_IF_OURS_ALONE = _reference_counts([object()])[0]


def _held_elsewhere(parts: list[Any]) -> list[Any]:
    """Return the components to which other code holds a reference, or may hold one to a member."""
    counts = _reference_counts(parts)
    return [
        part
        for part, count in zip(parts, counts, strict=True)
        if count > _COUNT_IF_OURS_ALONE or hasattr(type(part), "__getitem__")
    ]
