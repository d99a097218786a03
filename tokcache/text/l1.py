"""L1: texts put together from parts that were encoded before.

The segment cache finds the parts of a text and says which are missing; those are encoded
together, by content, and kept. Every part is cut where `cuts` proves that it may be; a share of
the answers can be encoded again in full (`verify_rate`), and the first difference ends the fast
encoder that made it, or L1.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby, zip_longest
from os import urandom
from typing import TYPE_CHECKING, Any, Protocol

from tokcache.errors import MissingExtra
from tokcache.text._native import is_native
from tokcache.text._scan_py import Scanner, Unsure, parts_of
from tokcache.text.engines import PartEncoder, is_of_library
from tokcache.text.fast_encoders import (
    FastEncoder,
    FastEncoderUnavailable,
    agreed_code_points,
    build,
    installed,
    probe_texts,
    prove,
)
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.config import CacheConfig
    from tokcache.stats import L1Stats
    from tokcache.text.cuts import CutPlan

if TYPE_CHECKING or is_native():
    from tokcache.text._l1 import CodePoints, SegmentCache, Walk
else:
    from tokcache.text._l1_py import CodePoints, SegmentCache, Walk

__all__ = ["L1", "FastParts", "Walk", "first_difference"]

_log = logging.getLogger("tokcache")
_MAX_SCOPE_TAGS = 4096
CHARS_AT_ONCE = 1 << 17  # what an encoder that holds the interpreter lock gets in one call


class Parts(Protocol):
    """Encodes the parts of texts that one variant of a tokenizer is for."""

    separator: int

    def encode(self, parts: Sequence[str]) -> list[Any]:
        """Return ids in groups, `separator` between two parts."""

    def encode_apart(self, parts: Sequence[str]) -> list[Any]:
        """Return the ids of every part by itself."""


class FastParts:
    """Parts encoded by a faster encoder, as long as it answers; all others by tokenizers.

    It gets only parts made of code points on which it and tokenizers agree.
    """

    def __init__(self, encoder: FastEncoder, sure: PartEncoder, agreed: CodePoints) -> None:
        self.separator = sure.separator
        self.encoder = encoder
        self._sure = sure
        self._agreed = agreed

    def fill(self, walk: Walk, variant: int) -> bool:
        """Encode what a walk misses in one call; False if it has other code points, or failed."""
        joined = walk.joined(variant, self._sure.between, self._agreed)
        if joined is None or (self.encoder.holds_lock and len(joined) > CHARS_AT_ONCE):
            return False
        return walk.take(variant, [self.encoder.encode(joined)], self.separator)

    def encode(self, parts: Sequence[str]) -> list[Any]:
        """Return ids in groups, `separator` between two parts."""
        found: list[Any] = []
        for is_agreed, group in groupby(parts, self._agreed.cover):
            some = list(group)
            if not is_agreed:
                found += self._sure.encode(some)
            elif self.encoder.holds_lock:
                found += self._in_turns(some)
            else:
                found.append(self._encode_fast(some))
        return found

    def _in_turns(self, parts: Sequence[str]) -> list[Any]:
        """Return ids in groups so small that other threads need not wait long between two."""
        found: list[Any] = []
        for group in _split(parts):
            is_long = sum(map(len, group)) > CHARS_AT_ONCE
            found += self._sure.encode(group) if is_long else [self._encode_fast(group)]
        return found

    def encode_apart(self, parts: Sequence[str]) -> list[Any]:
        """Return the ids of every part by itself."""
        return [ids for part in parts for ids in self.encode([part])]

    def _encode_fast(self, parts: Sequence[str]) -> Any:
        return self.encoder.encode(self._sure.between.join(parts))


def _split(parts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the parts in groups of up to CHARS_AT_ONCE characters, longer parts alone."""
    group: list[str] = []
    n_chars = 0
    for part in parts:
        if group and n_chars + len(part) > CHARS_AT_ONCE:
            yield group
            group, n_chars = [], 0
        group.append(part)
        n_chars += len(part)
    if group:
        yield group


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
        first, later, _ = plan.variant_of
        self._apart = None if first == later else first
        self._secret = urandom(32)
        self._tags: dict[str, int] = {}
        self._rng = random.Random(urandom(16))  # noqa: S311 (a draw, not a secret)
        self._set_fast(None if self.off else self._choose_fast(config.engine))

    def look(
        self, text: str, add_special_tokens: bool, scope: str | None
    ) -> TokenIds | Walk | None:
        """Return the ids if every part is known, a Walk to `complete`, or None: encode it whole."""
        if self.off is not None:
            return None
        found = self._cache.look(text, add_special_tokens, 0 if scope is None else self._tag(scope))
        if self._verify_rate and isinstance(found, TokenIds) and self._is_drawn():
            return self._verified(text, add_special_tokens, found)
        return found

    def complete(self, walk: Walk, text: str, add_special_tokens: bool) -> TokenIds | None:
        """Encode what is missing and return the ids of the text; None: encode it whole."""
        for variant in walk.variants():
            if not self._take(walk, variant, self._encoders[variant]) and not self._take(
                walk, variant, self._sure[variant]
            ):
                self.counts["parts_differ"] += 1
                return None
        ids = walk.finish()
        if self._verify_rate and self._is_drawn():
            return self._verified(text, add_special_tokens, ids)
        return ids

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
        fast = (one for one in self._encoders if isinstance(one, FastParts))
        if not all(one.encoder.is_fork_safe for one in fast):
            self._set_fast(None)

    # ---- engines

    def _take(self, walk: Walk, variant: int, encoder: Parts) -> bool:
        try:
            if variant == self._apart:
                return walk.take(variant, encoder.encode_apart(walk.parts(variant)), -1)
            if isinstance(encoder, FastParts) and encoder.fill(walk, variant):
                return True
            parts = walk.parts(variant)
            if walk.take(variant, encoder.encode(parts), encoder.separator):
                return True
        except BaseException as error:
            if isinstance(encoder, PartEncoder) or not is_of_library(error):
                raise
            self._drop_fast(f"it failed: {error}")
            return False
        if not isinstance(encoder, PartEncoder):
            self._drop_fast("it did not keep the parts of a text apart")
        return False

    def _choose_fast(self, wanted: str) -> list[FastParts] | None:
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

    def _prove_fast(self, name: str, sure: PartEncoder) -> FastParts:
        encoder = build(name, sure.tokenizer.to_str())
        reason = prove(encoder, sure.tokenizer, probe_texts(sure.tokenizer))
        if reason is not None:
            raise FastEncoderUnavailable(name, reason)
        return FastParts(encoder, sure, CodePoints(agreed_code_points()))

    def _set_fast(self, fast: list[FastParts] | None) -> None:
        self._encoders: Sequence[Parts] = fast or self._sure
        self.holds_lock = fast is not None and fast[0].encoder.holds_lock
        self.engine = fast[0].encoder.name if fast else "tokenizers"
        # A fast encoder is done with a whole chunk before its segments are looked up.
        self._cache = SegmentCache(self.plan, self._max_bytes, fast is None)

    def _drop_fast(self, reason: str) -> None:
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
        right = TokenIds(self._whole([text], add_special_tokens)[0])
        self.counts["verified"] += 1
        if right == ids:
            return ids
        self.counts["differences"] += 1
        if self.engine != "tokenizers" and self._from_sure_parts(text, add_special_tokens) == right:
            self._drop_fast(
                "it gave other token ids than tokenizers: first difference at token "
                f"{first_difference(right.tolist(), ids.tolist())} of {len(right)}, in a text of "
                f"{len(text)} characters; the right ids were returned"
            )
            return right
        self.off = "difference"
        self._cache.clear()
        _log.error(
            "the cache of parts (engine %s) gave other token ids than the tokenizer and is off "
            "from now on for this tokenizer: first difference at token %d of %d, in a text of %d "
            "characters; the right ids were returned",
            self.engine,
            first_difference(right.tolist(), ids.tolist()),
            len(right),
            len(text),
        )
        return right

    def _from_sure_parts(self, text: str, add_special_tokens: bool) -> TokenIds | None:
        """Return the ids put together from parts that tokenizers encodes, all of them anew."""
        found = SegmentCache(self.plan, self._max_bytes, True).look(text, add_special_tokens, 0)
        if found is None or isinstance(found, TokenIds):
            return found
        takes = (self._take(found, one, self._sure[one]) for one in found.variants())
        return found.finish() if all(takes) else None

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


def first_difference(right: Sequence[int], found: Sequence[int]) -> int | None:
    """Return the place of the first id that differs, None if all are equal."""
    pairs = enumerate(zip_longest(right, found))
    return next((index for index, (one, other) in pairs if one != other), None)
