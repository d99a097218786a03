"""L1: texts put together from parts that were encoded before.

The segment cache finds the parts of a text and says which are missing; those are encoded
together, by content, and kept. Every part is cut where `cuts.planner` proves that it may be; a
share of the answers can be encoded again in full (`verify_rate`), and the first difference ends
the fast encoder that made it, or L1.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from os import urandom
from typing import TYPE_CHECKING, Any

from tokcache._prefix import first_difference
from tokcache.errors import FastEncoderUnavailable, MissingExtra, Unsure
from tokcache.text import _implementation as implementation
from tokcache.text.cuts.plan import VOCABULARY_PROOF
from tokcache.text.cuts.scanner import Scanner, parts_of
from tokcache.text.engines.copying import PartEncoder, is_of_library
from tokcache.text.engines.fast import (
    FastEncoder,
    agreed_code_points,
    build,
    installed,
    probe_texts,
    prove,
)
from tokcache.text.segments.id_lengths import token_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.config import CacheConfig
    from tokcache.stats import L1Stats
    from tokcache.text._implementation import (
        CodePoints,
        SegmentCache,
        TokenBytes,
        TokenIds,
        Walk,
    )
    from tokcache.text.cuts.plan import CutPlan

__all__ = ["L1"]

_log = logging.getLogger("tokcache")
_MAX_SCOPE_TAGS = 4096
CHARS_AT_ONCE = 1 << 17  # what an encoder that holds the interpreter lock gets in one call
_CHARS_FOR_A_THREAD = 4096  # below, a second thread costs more than it brings
_MAX_APART = 64  # more separators in a text make tokenizers slower
_NO_LIMIT = sys.maxsize
_N_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Variant:
    """What encodes the parts that one variant of a tokenizer is for.

    With `blank` (a variant, or -1) also that one's, a blank before each. `is_apart` says that each
    part must be a text of its own, `sizes` how many bytes of it an id stands for.
    """

    number: int
    blank: int
    is_apart: bool
    sure: PartEncoder
    sizes: TokenBytes | None
    fast: FastEncoder | None = None


class L1:
    """The segment cache of one tokenizer, and what encodes its missing parts.

    `engine` is the name of what encodes them; `notes` say why no other does. `off` is why
    nothing is put together from parts, or None. `holds_lock` says that no other thread can ask
    for a text of up to CHARS_AT_ONCE characters while its missing parts are encoded.

    Errors:  MissingExtra if the engine that was asked for is not installed; the tokenizer's own
             pass through.
    Threads: safe; missing parts are encoded without the interpreter lock by tokenizers and
             fastokens, with it by gigatoken.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        plan: CutPlan,
        config: CacheConfig,
        whole: Callable[[Sequence[str], bool], list[list[int]]],
    ) -> None:
        self.plan = plan
        self.off = plan.off
        self.notes: list[str] = []
        self.counts: Counter[str] = Counter()
        self._whole = whole
        self._verify_rate = config.verify_rate
        self._max_bytes = config.l1_max_bytes
        self._sure = [
            PartEncoder(tokenizer, one.normalizer, one.pre_tokenizer) for one in plan.variants
        ]
        self._secret = urandom(32)
        self._tags: dict[str, int] = {}
        self._n_clears = 0
        self._rng = random.Random(urandom(16))  # noqa: S311 (a draw, not a secret)
        self._set_fast(None if self.off else self._choose_fast(config.engine))

    def look(
        self, text: str, add_special_tokens: bool, scope: str | None, since: int
    ) -> TokenIds | Walk | None:
        """Return the ids if every part is known, a Walk to `complete`, or None: encode it whole.

        Nothing of the text is kept if its scope was cleared since the number of clears was `since`.
        """
        if self.off is not None:
            return None
        tag = 0 if scope is None else self._tag(scope)
        found = self._cache.look(text, add_special_tokens, tag, since)
        if self._verify_rate and isinstance(found, implementation.TokenIds) and self._is_drawn():
            return self._verified(text, add_special_tokens, found)
        return found

    def complete(self, walk: Walk, text: str, add_special_tokens: bool) -> TokenIds | None:
        """Encode what is missing and return the ids of the text; None: encode it whole."""
        variants = self._variants
        for one in variants:
            if one.fast is not None and self._variants is variants:  # else it was dropped
                self._encode_fast(walk, one, one.fast)
            if walk.n_chars and not _encode_sure(walk, one):
                self.counts["parts_differ"] += 1
                return None
        ids = walk.finish()
        if self._verify_rate and self._is_drawn():
            return self._verified(text, add_special_tokens, ids)
        return ids

    def clear(self, scope: str | None, n_clears: int) -> None:
        """Drop the parts of a scope, or all; `n_clears` is the number of clears from now on."""
        self._n_clears = n_clears
        self._cache.clear(None if scope is None else self._tag(scope), n_clears)
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
        """Return (start, stop, is_token) of every part of `text`, None if it is not cut."""
        return None if self.off else self._cache.cut(text, fine)

    # ---- for a warm start

    @property
    def parts(self) -> SegmentCache:
        """The parts that are held."""
        return self._cache

    def tag(self, scope: str | None) -> int:
        """Return the number that stands for a scope in this cache alone."""
        return 0 if scope is None else self._tag(scope)

    def scopes(self, more: Iterable[str]) -> dict[int, str | None]:
        """Return which scope each tag stands for, of those asked for lately and `more`."""
        return {0: None} | {self._tag(one): one for one in [*self._tags, *more]}

    def encode_part(self, text: str, variant: int) -> list[int] | None:
        """Return the ids of a part, made anew; None if an added token in it can't be judged."""
        ids: list[int] = []
        scanner, span = Scanner(self.plan), (0, len(text))
        try:
            parts = list(parts_of(self.plan, scanner, text, span, variant, fine=False))
        except Unsure:
            return None
        for part in parts:
            if part.token is not None:
                ids.append(part.token.id)
                continue
            own = self._sure[part.variant].tokenizer
            # `encode`, not a batch: after a batch, forked children stay serial.
            ids += own.encode(text[part.start : part.stop], add_special_tokens=False).ids
        return ids

    def after_fork(self) -> None:
        """In a forked child: an encoder with threads of its own is no use here."""
        if not all(one.fast.is_fork_safe for one in self._variants if one.fast is not None):
            self._set_fast(None)

    # ---- engines

    def _encode_fast(self, walk: Walk, one: _Variant, encoder: FastEncoder) -> None:
        """Encode the parts made of code points on which the encoder and tokenizers agree.

        An encoder that holds the interpreter lock does so in turns, and gets no longer part.
        """
        max_chars = CHARS_AT_ONCE if encoder.holds_lock else _NO_LIMIT
        agreed = _agreed(implementation.CodePoints)
        try:
            is_right = _encode(walk, one, encoder.encode, agreed, max_chars)
        except BaseException as error:
            if not is_of_library(error):
                raise
            self._drop_fast(f"it failed: {error}")
            return
        if not is_right:
            self._drop_fast("it did not keep the parts of a text apart")

    def _choose_fast(self, wanted: str) -> list[FastEncoder] | None:
        if wanted == "tokenizers":
            return None
        present = installed()
        if wanted != "auto" and wanted not in present:
            raise MissingExtra(
                f"engine={wanted!r} is not installed; pip install 'tokcache[engines]'"
            )
        for name in present if wanted == "auto" else [wanted]:
            try:
                return [self._prove_fast(name, sure) for sure in self._sure]
            except FastEncoderUnavailable as error:
                self.notes.append(str(error))
        if wanted != "auto":
            _log.warning("%s", self.notes[-1])
        return None

    def _prove_fast(self, name: str, sure: PartEncoder) -> FastEncoder:
        encoder = build(name, sure.tokenizer.to_str())
        reason = prove(encoder, sure.tokenizer, probe_texts(sure.tokenizer))
        if reason is not None:
            raise FastEncoderUnavailable(name, reason)
        return encoder

    def _set_fast(self, fast: Sequence[FastEncoder] | None) -> None:
        self._variants = self._made_variants(fast or [None] * len(self._sure))
        self.holds_lock = fast is not None and fast[0].holds_lock
        self.engine = fast[0].name if fast else "tokenizers"
        # A fast encoder is done with a whole chunk before its segments are looked up.
        self._cache: SegmentCache = implementation.SegmentCache(
            self.plan, self._max_bytes, fast is None
        )
        self._cache.clear(n_clears=self._n_clears)  # after it is in place: another may clear now

    def _new_cache(self, *, cuts_fine: bool) -> SegmentCache:
        return implementation.SegmentCache(self.plan, self._max_bytes, cuts_fine)

    def _made_variants(self, fast: Sequence[FastEncoder | None]) -> list[_Variant]:
        plan = self.plan
        first, later, inside = plan.variant_of
        blank = plan.blank_variant
        numbers = range(len(plan.variants)) if blank < 0 else [inside]
        made = []
        for number in numbers:
            is_apart = number == first != later
            sure = self._sure[number]
            own = None if is_apart else fast[number]
            known = {} if own is None else own.vocabulary()
            # An id that stands for two tokens has no bytes of its own.
            is_distinct = VOCABULARY_PROOF in plan.recognised or len(
                known
            ) == sure.tokenizer.get_vocab_size(with_added_tokens=True)
            sizes = (
                token_bytes(sure.tokenizer, plan.variants[number], known) if is_distinct else None
            )
            made.append(_Variant(number, blank, is_apart, sure, sizes, own))
        return made

    def _drop_fast(self, reason: str) -> None:
        if self.engine == "tokenizers":
            return  # another thread was first
        _log.error("engine %s is dropped for this tokenizer, %s", self.engine, reason)
        self.counts["engine_dropped"] += 1
        self.notes.append(f"{self.engine} was dropped: {reason}")
        self._set_fast(None)

    # ---- verification

    def _is_drawn(self) -> bool:
        return self._rng.random() < self._verify_rate

    def _verified(self, text: str, add_special_tokens: bool, ids: TokenIds) -> TokenIds:
        """Return the ids of the text encoded in full.

        If they differ the engine goes, where tokenizers gives the right ids for the same parts;
        else L1 has come to its end.
        """
        right = implementation.TokenIds(self._whole([text], add_special_tokens)[0])
        self.counts["verified"] += 1
        if right == ids:
            return ids
        self.counts["differences"] += 1
        if self.engine != "tokenizers" and self._from_sure_parts(text, add_special_tokens) == right:
            self._drop_fast(
                "it gave other token ids than tokenizers: first difference at token "
                f"{first_difference(right, ids)} of {len(right)}, in a text of "
                f"{len(text)} characters; the right ids were returned"
            )
            return right
        self.off = "difference"
        self._cache.clear(n_clears=self._n_clears)
        _log.error(
            "the cache of parts (engine %s) gave other token ids than the tokenizer and is off "
            "from now on for this tokenizer: first difference at token %d of %d, in a text of %d "
            "characters; the right ids were returned",
            self.engine,
            first_difference(right, ids),
            len(right),
            len(text),
        )
        return right

    def _from_sure_parts(self, text: str, add_special_tokens: bool) -> TokenIds | None:
        """Return the ids put together from parts that tokenizers encodes, all of them anew."""
        found = self._new_cache(cuts_fine=True).look(text, add_special_tokens, 0)
        if found is None or isinstance(found, implementation.TokenIds):
            return found
        are_right = all(_encode_sure(found, one) for one in self._variants if found.n_chars)
        return found.finish() if are_right else None

    def _tag(self, scope: str) -> int:
        """Return the number that stands for a scope: a keyed digest of 64 bits."""
        tag = self._tags.get(scope)
        if tag is None:
            name = scope.encode("utf-8", "surrogatepass")
            digest = blake2b(name, digest_size=8, key=self._secret).digest()
            tag = int.from_bytes(digest, "little") | 1
            if len(self._tags) >= _MAX_SCOPE_TAGS:
                self._tags.clear()
            self._tags[scope] = tag
        return tag


@cache
def _agreed(kind: type[CodePoints]) -> CodePoints:
    return kind(agreed_code_points())


def _encode_sure(walk: Walk, one: _Variant) -> bool:
    """Have tokenizers encode what is left of one variant's parts, shared out to threads."""
    n_chars, max_chars = walk.n_chars, 0
    if not one.is_apart:
        n_texts = min(4 * _N_CPUS, n_chars // _CHARS_FOR_A_THREAD) if _N_CPUS > 1 else 1
        max_chars = n_chars // n_texts + 1 if n_texts > 1 else _NO_LIMIT
    return _encode(walk, one, one.sure.encode, None, max_chars, _MAX_APART)


def _encode(  # noqa: PLR0917 (what `joined` takes)
    walk: Walk,
    one: _Variant,
    encode: Callable[[list[str]], list[Any]],
    agreed: CodePoints | None,
    max_chars: int,
    max_apart: int = _NO_LIMIT,
) -> bool:
    """Encode what is left of one variant's parts; False if they were not kept apart."""
    for sizes in (one.sizes, None):  # the second if an id does not tell its bytes
        texts = walk.joined(
            one.number, one.blank, one.sure.between, sizes, agreed, max_chars, max_apart
        )
        if not texts:
            return True
        is_right = walk.take(encode(texts), one.sure.separator, sizes)
        if is_right is not None:
            return is_right
    return False
