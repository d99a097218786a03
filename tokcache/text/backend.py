"""The tokenizer behind a face: a plain copy, and every way to change it.

The copy shares only the model with the original, so that neither sees what is changed on the
other; every way to change it leads through here, which tells the cache.
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.config import CacheConfig

Settings = tuple[dict[str, Any] | None, dict[str, Any] | None]
NOTHING_SET: Settings = (None, None)

COMPONENTS = ("normalizer", "pre_tokenizer", "post_processor", "model")


@dataclass(slots=True)
class _HandedOut:
    """A component that callers hold and may change in place."""

    signature: object
    holders: list[Any]


class Backend:
    """A plain tokenizer of our own, and every way to change it.

    `settled` are the truncation and padding that the last call of transformers left in it, None
    if others may have changed them, or `encode_special_tokens`, since.

    Threads: safe; `core.plain_lock` is held while it encodes or changes. A call that finds it taken
             encodes with a copy.
    """

    def __init__(
        self,
        source: Tokenizer,
        config: CacheConfig | None,
        *,
        splits_special_tokens: Callable[[], bool] | None = None,
        own_engine: Engine | None = None,
    ) -> None:
        self._raw = own_copy(source)
        self._lent = threading.local()
        self.settled: Settings | None = None
        self.counts_encodings = splits_special_tokens is None
        self._splits = splits_special_tokens or (lambda: self.raw.encode_special_tokens)
        self._own_engine = own_engine
        self._handed_out: dict[str, _HandedOut] = {}
        self._has_stale_matcher = False
        self.core = CachedTokenizer(config, self._build_engine)

    @property
    def raw(self) -> Tokenizer:
        """The plain tokenizer, or the copy of it that this thread encodes with."""
        return self._lent_copy or self._raw

    @property
    def _lent_copy(self) -> Tokenizer | None:
        return getattr(self._lent, "copy", None)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Encode, and set how: with the tokenizer itself, or with a copy while others use it.

        What is set on a copy counts as having been set before the others came.
        """
        if self._lent_copy is not None:
            yield
        elif self.core.plain_lock.acquire(blocking=False):
            try:
                yield
            finally:
                self.core.plain_lock.release()
        else:
            with self._copy_or_wait():
                yield

    @contextmanager
    def _copy_or_wait(self) -> Iterator[None]:
        engine = self.core.engine(self.core.fresh())
        if not isinstance(engine, HuggingFaceEngine):  # there is no copy that could be trusted
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
        raw = self._raw
        with self.core.plain_lock:
            saved = raw.truncation, raw.padding, raw.encode_special_tokens
            self.settle()
            try:
                found = raw.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            finally:
                _set(raw, *saved)
                self.settled = None
        self.core.count_bypass(reason, len(texts))
        return [encoding.ids for encoding in found]

    @property
    def has_own_engine(self) -> bool:
        """Whether the tokenizer encodes in a way of its own, through the engine given."""
        return self._own_engine is not None

    def set_own_engine(self, engine: Engine | None) -> None:
        """Encode through this engine from now on, None: through one of ours."""
        with self.core.plain_lock:
            self._own_engine = engine
            self.core.invalidate()

    def settle(
        self, truncation: dict[str, Any] | None = None, padding: dict[str, Any] | None = None
    ) -> None:
        """Leave the settings as a call of transformers with these does.

        While another thread's call is at work this counts as having come before it.
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
        """Call a method that changes how the tokenizer encodes."""
        with self.core.plain_lock:
            try:
                return getattr(self.raw, method)(*args, **kwargs)
            finally:
                self.core.invalidate()

    def train(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Train a model of our own: training happens in place, and the original shares ours."""
        with self.core.plain_lock:
            self._raw.model = pickle.loads(pickle.dumps(self.raw.model))  # noqa: S301 (own object)
            return self.change(method, *args, **kwargs)

    def configure(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that sets truncation or padding: the cache's own copy has neither."""
        with self.turn():
            if self._lent_copy is None:
                self.settled = None
            return getattr(self.raw, method)(*args, **kwargs)

    def encode(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method that returns Encoding objects, which can't be made from ids."""
        if self.counts_encodings:
            self.core.count_bypass("encoding_objects")
        with self.turn():
            return getattr(self.raw, method)(*args, **kwargs)

    def set_encode_special_tokens(self, value: bool) -> None:
        """Set what no serialisation of a tokenizer shows."""
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
            self._raw = own_copy(source)
            self.settled = None
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


def _set(
    tokenizer: Tokenizer,
    truncation: dict[str, Any] | None,
    padding: dict[str, Any] | None,
    encode_special_tokens: bool,
) -> None:
    """Set what differs: where a child was forked while others encode, setting would hang."""
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
    """Return a plain tokenizer that shares nothing but the model with a plain or wrapped one."""
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
