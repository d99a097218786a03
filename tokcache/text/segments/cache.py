"""L1: puts texts together from segments that were encoded before.

`L1.encode` owns a text's look-up and its completion:

1. The segment cache returns the ids, if it has all segments, or a Walk that lists the missing ones.
2. The missing segments are joined into few texts, without a separator where the lengths of their
   ids show where each ends. A fast engine encodes those on whose code points it agrees with
   tokenizers, and tokenizers encodes the rest.
3. The ids are assigned to the segments, which are stored, and the ids of the whole text returned.

The text is cut only where `cuts.planner` proves it safe. `verify_rate` is the share of the answers
that are encoded again in full; the first difference ends the fast engine that made it, or L1.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import blake2b
from os import urandom
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from tokcache._prefix import first_difference
from tokcache.errors import MissingExtra, Unsure
from tokcache.text import _implementation as implementation
from tokcache.text.cuts.plan import VOCABULARY_PROOF
from tokcache.text.cuts.scanner import Scanner, spans_of
from tokcache.text.engines.copying import SegmentEncoder, is_of_library
from tokcache.text.engines.fast import FastEncoder, agreed_code_points, installed, is_fork_safe
from tokcache.text.engines.remembered import REMEMBERED, Outcome
from tokcache.text.segments.choice import Choice, Chosen
from tokcache.text.segments.id_lengths import id_lengths

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.config import CacheConfig
    from tokcache.stats import L1Stats
    from tokcache.text._implementation import (
        CodePoints,
        IdLengths,
        SegmentCache,
        TokenIds,
        Walk,
    )
    from tokcache.text.cuts.plan import CutPlan

__all__ = ["L1", "NOT_LOOKED_UP"]

NOT_LOOKED_UP: Any = object()

_log = logging.getLogger("tokcache")
_MAX_SCOPE_TAGS = 4096
COUNTED = -1.0  # no seconds: another call has counted and stored the text
CHARS_AT_ONCE = 1 << 17  # an engine that holds the interpreter lock gets no more in one call
_CHARS_FOR_A_THREAD = 4096  # for fewer, a second thread costs more than it saves
_MAX_APART = 64  # more separators in a text make tokenizers slower
_NO_LIMIT = sys.maxsize
_N_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# A text, add_special_tokens, its scope, and the number of clears when the call began.
_Key = tuple[str, bool, str | None, int]


@dataclass(frozen=True, slots=True)
class _Variant:
    """The encoders of one tokenizer variant.

    With `space_variant` (or -1) they also encode that variant's segments, a space before each.
    `is_apart` says that each segment must be a text of its own. `lengths` has the bytes of each
    id. `fast` encodes the segments made of `agreed` code points.
    """

    number: int
    space_variant: int
    is_apart: bool
    sure: SegmentEncoder
    lengths: IdLengths | None
    fast: FastEncoder | None
    agreed: CodePoints | None


class L1:
    """The segment cache of one tokenizer, and the encoders of missing segments.

    `engine` is the name of the encoder, `engine_reason` why it is that one (a key of
    `reasons.ENGINE_REASONS`); `notes` say why it is no faster one. It is tokenizers until another
    one is proven, and again if that one fails. `off` is the reason why no text is put together from
    segments, or None. `look` looks a text up in the segment cache alone, for the native
    `token_ids`; it is None if its answers have to be checked. `distrust` is called with the L1
    after its engine gave wrong ids: other caches may have them, too.

    Errors:  MissingExtra if the configured engine is not installed; the tokenizer's own errors
             pass through.
    Threads: safe; tokenizers and fastokens encode without the interpreter lock, gigatoken holds it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        plan: CutPlan,
        config: CacheConfig,
        whole: Callable[[Sequence[str], bool], list[list[int]]],
        distrust: Callable[[L1], None],
    ) -> None:
        self.plan = plan
        self.off = plan.off
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        self._whole = whole
        self._distrust: WeakMethod[Any] = WeakMethod(distrust)
        self._verify_rate = config.verify_rate
        self._max_bytes = config.l1_max_bytes
        self._sure = [
            SegmentEncoder(tokenizer, one.normalizer, one.pre_tokenizer) for one in plan.variants
        ]
        self._secret = urandom(32)
        self._tags: dict[str, int] = {}
        self._n_clears = 0
        self._rng = random.Random(urandom(16))  # noqa: S311 (a draw, not a secret)
        self._lock = threading.Lock()  # held for changes of the engine
        self._variants = self._made_variants({})
        self.holds_lock = False
        self.engine = "tokenizers"
        self._start_cache()
        self._identities: Sequence[bytes] = ()
        self._wanted = config.engine
        self._names, self.engine_reason = self._candidates()
        self._choice: Choice | None = None
        if self._names:
            self._begin_choice()

    def encode(  # noqa: PLR0917 (keywords cost a tenth of a microsecond each)
        self,
        text: str,
        add_special_tokens: bool,
        scope: str | None,
        since: int,
        encode_once: Callable[[Any, _Key, Callable[[], TokenIds | None]], TokenIds] | None = None,
        generation: Any = None,
        found: TokenIds | Walk | None = NOT_LOOKED_UP,
    ) -> tuple[TokenIds | None, float | None]:
        """Return the ids of `text`, and how many seconds they took; no ids: encode it whole.

        Seconds are None if all segments were cached. Missing segments are encoded here. If
        `encode_once` is given, and another thread can ask for `text` meanwhile, it is called with
        `generation`, the key and the function that encodes them, and may return another thread's
        ids instead; the seconds are then COUNTED. Nothing is stored if the scope was cleared since
        the number of clears was `since`. `found` is the answer of `look`, if it was asked.
        """
        if found is NOT_LOOKED_UP:
            if self.off is not None:
                return None, None
            tag = 0 if scope is None else self.tag(scope)
            found = self._cache.look(text, add_special_tokens, tag, since)
        if found is None:
            return None, None
        if isinstance(found, implementation.TokenIds):
            if self._verify_rate:
                found = self._verified(text, add_special_tokens, found)
            return found, None
        # Up to this length an engine that holds the interpreter lock gets the text in one call.
        if encode_once is None or (self.holds_lock and len(text) <= CHARS_AT_ONCE):
            start = perf_counter()
            ids = self._complete(found, text, add_special_tokens)
            return ids, perf_counter() - start
        complete = partial(self._complete, found, text, add_special_tokens)
        return encode_once(generation, (text, add_special_tokens, scope, since), complete), COUNTED

    def _complete(self, walk: Walk, text: str, add_special_tokens: bool) -> TokenIds | None:
        """Encode the missing segments and return the ids of the text; None: encode it whole."""
        if self._choice is None and self._names:  # in the child of a fork
            self._begin_choice()
        variants = self._variants
        for one in variants:
            if one.fast is not None and self._variants is variants:  # else it was dropped
                # An encoder that holds the interpreter lock gets several calls, no long segment.
                max_chars = CHARS_AT_ONCE if one.fast.holds_lock else _NO_LIMIT
                try:
                    is_right = _encode_missing(
                        walk, one, one.fast.encode, one.agreed, max_chars, _NO_LIMIT
                    )
                except BaseException as error:
                    if not is_of_library(error):
                        raise
                    self._drop_fast(f"it failed: {error}", is_wrong=False)
                else:
                    if not is_right:
                        self._drop_fast("it did not keep the segments of a text apart")
            if walk.n_chars and not _encode_sure(walk, one):
                self.counts["segments_differ"] += 1
                return None
        ids = walk.finish()
        return self._verified(text, add_special_tokens, ids) if self._verify_rate else ids

    def clear(self, scope: str | None, n_clears: int) -> None:
        """Remove the segments of a scope, or all; `n_clears` counts the clears up to now."""
        self._n_clears = n_clears
        self._cache.clear(None if scope is None else self.tag(scope), n_clears)
        if scope is not None:
            self._tags.pop(scope, None)

    def stats(self) -> L1Stats:
        """Return a snapshot of the counters."""
        now = self._cache.stats()
        more = Counter(now.refusals) + self.counts
        if self.off is not None:
            more[self.off] += 0
        return replace(now, refusals=dict(more))

    def segments(self, text: str, *, fine: bool) -> list[tuple[int, int, bool]] | None:
        """Return (start, stop, is_token) of every chunk or segment; None if `text` is not cut."""
        return None if self.off else self._cache.cut(text, fine)

    # ---- for a cache file

    @property
    def cache(self) -> SegmentCache:
        """The segment cache itself."""
        return self._cache

    def tag(self, scope: str | None) -> int:
        """Return the number that stands for a scope in this cache: a keyed digest of 64 bits."""
        if scope is None:
            return 0
        tag = self._tags.get(scope)
        if tag is None:
            name = scope.encode("utf-8", "surrogatepass")
            digest = blake2b(name, digest_size=8, key=self._secret).digest()
            tag = int.from_bytes(digest, "little") | 1
            if len(self._tags) >= _MAX_SCOPE_TAGS:
                self._tags.clear()
            self._tags[scope] = tag
        return tag

    def scopes(self, more: Iterable[str]) -> dict[int, str | None]:
        """Return the scope of each tag, of those used recently and `more`."""
        return {0: None} | {self.tag(one): one for one in [*self._tags, *more]}

    def encode_chunk(self, text: str, variant: int) -> list[int] | None:
        """Return the ids of a chunk or segment, encoded again.

        None if it depends on the text around it whether an added token counts.
        """
        ids: list[int] = []
        scanner, span = Scanner(self.plan), (0, len(text))
        try:
            segments = list(spans_of(self.plan, scanner, text, span, variant, fine=False))
        except Unsure:
            return None
        for segment in segments:
            if segment.token is not None:
                ids.append(segment.token.id)
                continue
            own = self._sure[segment.variant].tokenizer
            # `encode`, not a batch: after a batch, forked children stay serial.
            ids += own.encode(text[segment.start : segment.stop], add_special_tokens=False).ids
        return ids

    def after_fork(self) -> None:
        """In a forked child: drop an encoder whose threads exist only in the parent.

        A choice that had not been made begins again when this child first encodes.
        """
        self._lock = threading.Lock()
        self._names = [name for name in self._names if is_fork_safe(name)]
        if not all(one.fast.is_fork_safe for one in self._variants if one.fast is not None):
            self._use({})
            self.engine_reason = "forked"
        if self._choice is not None and not self._choice.is_done:
            self._choice = None
            if not self._names:
                self.engine_reason = "forked"

    # ---- engines

    def wait_for_engine(self, timeout_s: float | None) -> bool:
        """Wait until the engine is chosen; False if `timeout_s` was too short."""
        if self._choice is None and self._names:
            self._begin_choice()
        return self._choice is None or self._choice.wait(timeout_s)

    def retire(self) -> None:
        """Discard a choice that has not been made: no new text will be encoded here."""
        self._names = ()
        if self._choice is not None:
            self._choice.discard()

    def _candidates(self) -> tuple[Sequence[str], str]:
        """Return the encoders to try, and the reason of the engine until one is proven."""
        if self.off is not None:
            return (), "not_cut"
        if self._wanted == "tokenizers":
            return (), "configured"
        present = installed()
        if self._wanted == "auto":
            return present, "pending" if present else "not_installed"
        if self._wanted not in present:
            raise MissingExtra(
                f"engine={self._wanted!r} is not installed; pip install 'tokcache[engines]'"
            )
        return [self._wanted], "pending"

    def _begin_choice(self) -> None:
        with self._lock:
            if self._choice is not None:
                return  # another thread was first
            numbers = [one.number for one in self._variants if not one.is_apart]
            choice = Choice(self._names, {n: self._sure[n] for n in numbers}, self._take)
            self._choice = choice
        choice.begin()

    def _take(self, chosen: Chosen) -> None:
        """Switch to the chosen encoders; all entries stay."""
        variants = self._made_variants(chosen.encoders)  # a few milliseconds, so not under the lock
        with self._lock:
            if self.off is not None:
                return
            self.notes += chosen.notes
            self._identities = chosen.identities
            self.engine_reason = chosen.reason
            if chosen.encoders:
                self._use(chosen.encoders, variants)
        if not chosen.encoders and self._wanted != "auto":
            _log.warning("%s", chosen.notes[-1])

    def _use(
        self, fast: Mapping[int, FastEncoder], variants: Sequence[_Variant] | None = None
    ) -> None:
        """Encode with these encoders, or with tokenizers if there are none.

        A text that another thread encodes at this moment is encoded by one or the other: the ids
        are the same.
        """
        # A fast encoder takes less time for a whole chunk than the look-ups of its segments.
        self._cache.cuts_fine = not fast
        self.holds_lock = any(one.holds_lock for one in fast.values())
        self.engine = next(iter(fast.values())).name if fast else "tokenizers"
        self._variants = self._made_variants(fast) if variants is None else variants

    def _start_cache(self) -> None:
        """Begin with an empty segment cache: what other threads still put into the old is lost."""
        cache = implementation.SegmentCache(self.plan, self._max_bytes, self.engine == "tokenizers")
        cache.clear(n_clears=self._n_clears)
        self._cache: SegmentCache = cache
        is_sure = self.off is None and not self._verify_rate
        self.look: Callable[..., TokenIds | Walk | None] | None
        self.look = self._cache.look if is_sure else None
        cache.clear(n_clears=self._n_clears)  # another thread may have cleared the old one

    def _made_variants(self, fast: Mapping[int, FastEncoder]) -> Sequence[_Variant]:
        plan = self.plan
        first, later, inside = plan.variant_of
        numbers = range(len(plan.variants)) if plan.space_variant < 0 else [inside]
        made = []
        for number in numbers:
            is_apart = number == first != later
            sure = self._sure[number]
            own = None if is_apart else fast.get(number)
            known = {} if own is None else own.vocabulary()
            # An id that stands for two tokens has no length of its own.
            is_distinct = VOCABULARY_PROOF in plan.recognised or len(
                known
            ) == sure.tokenizer.get_vocab_size(with_added_tokens=True)
            lengths = (
                id_lengths(sure.tokenizer, plan.variants[number], known) if is_distinct else None
            )
            agreed = None if own is None else _agreed(implementation.CodePoints)
            made.append(_Variant(number, plan.space_variant, is_apart, sure, lengths, own, agreed))
        return made

    def _drop_fast(self, reason: str, *, is_wrong: bool = True) -> None:
        """Encode with tokenizers from now on, because the fast encoder failed or `is_wrong`.

        Ids that it gave before are not trusted either in the second case: no cache keeps them.
        """
        with self._lock:
            if self.engine == "tokenizers":
                return  # another thread was first
            _log.error("engine %s is dropped for this tokenizer, %s", self.engine, reason)
            self.counts["engine_dropped"] += 1
            self.notes.append(f"{self.engine} was dropped: {reason}")
            self.engine_reason = "dropped"
            self._use({})
        if is_wrong:
            self._clear_answers()
        for identity in self._identities:  # later processes try it again, or never
            if is_wrong:
                REMEMBERED.keep(identity, Outcome("it gave wrong ids after it had proven equal"))
            else:
                REMEMBERED.remove(identity)

    def _clear_answers(self) -> None:
        self._start_cache()
        distrust = self._distrust()
        if distrust is not None:
            distrust(self)

    # ---- verification

    def _verified(self, text: str, add_special_tokens: bool, ids: TokenIds) -> TokenIds:
        """Return the ids, or those of the text encoded in full if it is drawn for verification.

        If they differ, the fast encoder is dropped, provided that tokenizers gives the right ids
        for the same segments; otherwise L1 is switched off.
        """
        if self._rng.random() >= self._verify_rate:
            return ids
        right = implementation.TokenIds(self._whole([text], add_special_tokens)[0])
        self.counts["verified"] += 1
        if right == ids:
            return ids
        self.counts["differences"] += 1
        if self.engine != "tokenizers" and self._encode_surely(text, add_special_tokens) == right:
            self._drop_fast(
                "it gave other token ids than tokenizers: first difference at token "
                f"{first_difference(right, ids)} of {len(right)}, in a text of "
                f"{len(text)} characters; the right ids were returned"
            )
            return right
        self.off = self.engine_reason = "difference"
        self.retire()
        self._clear_answers()
        _log.error(
            "the segment cache (engine %s) gave other token ids than the tokenizer and is off "
            "from now on for this tokenizer: first difference at token %d of %d, in a text of %d "
            "characters; the right ids were returned",
            self.engine,
            first_difference(right, ids),
            len(right),
            len(text),
        )
        return right

    def _encode_surely(self, text: str, add_special_tokens: bool) -> TokenIds | None:
        """Return the ids of the text, all of whose segments tokenizers encodes."""
        empty = implementation.SegmentCache(self.plan, self._max_bytes, True)
        found = empty.look(text, add_special_tokens, 0)
        if found is None or isinstance(found, implementation.TokenIds):
            return found
        are_right = all(_encode_sure(found, one) for one in self._variants if found.n_chars)
        return found.finish() if are_right else None


@cache
def _agreed(kind: type[CodePoints]) -> CodePoints:
    return kind(agreed_code_points())


def _encode_sure(walk: Walk, one: _Variant) -> bool:
    """Have tokenizers encode the missing segments of one variant, in a text for each thread."""
    n_chars, max_chars = walk.n_chars, 0
    if not one.is_apart:
        n_texts = min(4 * _N_CPUS, n_chars // _CHARS_FOR_A_THREAD) if _N_CPUS > 1 else 1
        max_chars = n_chars // n_texts + 1 if n_texts > 1 else _NO_LIMIT
    return _encode_missing(walk, one, one.sure.encode, None, max_chars, _MAX_APART)


def _encode_missing(  # noqa: PLR0917 (the arguments of `joined`)
    walk: Walk,
    one: _Variant,
    encode: Callable[[list[str]], list[Any]],
    agreed: CodePoints | None,
    max_chars: int,
    max_apart: int,
) -> bool:
    """Encode the missing segments of one variant; False if the ids don't fit them."""
    lengths = one.lengths
    while True:
        texts = walk.joined(
            one.number, one.space_variant, one.sure.between, lengths, agreed, max_chars, max_apart
        )
        if not texts:
            return True
        is_right = walk.take(encode(texts), one.sure.separator, lengths)
        if is_right is not None or lengths is None:
            return bool(is_right)
        lengths = None  # the length of an id is unknown
