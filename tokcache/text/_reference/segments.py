"""The reference implementation of the native SegmentCache, on cachetools.

One least-recently-used cache holds the chunks and the short segments inside them; there is no
memory of which chunk came next, so every text is scanned.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cachetools

from tokcache._forks import call_in_child
from tokcache.errors import IdLengthUnknown, Unsure
from tokcache.reasons import TEXT_MISSES
from tokcache.stats import L1Stats
from tokcache.text._reference.evictions import Evictions
from tokcache.text._reference.token_ids import TokenIds
from tokcache.text.cuts.char_classes import N_CLASSES, CharClass, class_of
from tokcache.text.cuts.scanner import Scanner, Span, class_behind, spans_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tokcache.text.cuts.plan import CutPlan

MIN_CHARS = 128  # minimum chunk length, except at the start of a message
MAX_CHARS = 1024  # maximum chunk length, if there is a coarse cut before
OPENING_CHARS = 96  # minimum length of a chunk that ends at the start of a message
GAP_CHARS = 64  # maximum weight of a cut
CHOSEN = 1 << 23  # a cut with a lower rank ends a chunk: about one in 512 characters
WINDOW = 16  # characters before a cut that its rank depends on
STORED_CHARS = 1 << 16  # a longer chunk, in which no cut was found, is not stored
SEGMENT_CHARS = 24  # a longer segment is not stored
SEED_BYTES = 4
_ENTRY_BYTES = 400
_MAX_CLEARED = 1024  # scopes whose last clear is remembered individually

_Key = tuple[str, int, int]  # text, scope, variant
_Ids = tuple[int, ...]
_Chunk = tuple[str, TokenIds, int, int, int, bool]
_Segment = tuple[str, TokenIds, int, int]


@dataclass(slots=True)
class _Pending:
    """A segment that the engine must encode."""

    text: str
    variant: int
    start: int  # its first position in the text
    ids: _Ids | None = None
    given: str = ""  # the text for the engine: with a space before it, or without
    n_bytes: int = 0  # of `given` in UTF-8; 0: id lengths are unknown
    is_seamless: bool = False  # no separator between it and the next one


@dataclass(slots=True)
class _Missed:
    """A chunk that is not cached: its cached and pending segments."""

    key: _Key
    segments: list[_Ids | _Pending] = field(default_factory=list)

    def ids(self) -> _Ids:
        known = (one.ids or () if isinstance(one, _Pending) else one for one in self.segments)
        return tuple(index for ids in known for index in ids)


class Walk:
    """The look-up of one text: its cached ids, and the segments that the engine must encode."""

    def __init__(
        self, cache: SegmentCache, text: str, scope: int, special: bool, since: int
    ) -> None:
        self._cache = cache
        self.text = text
        self.scope = scope
        self.special = special
        self.since = since
        self.chunks: list[_Ids | _Missed] = []
        self.pending: dict[_Key, _Pending] = {}
        self.counts: Counter[str] = Counter(lookup_chars=len(text))
        self.chunk_misses: list[str] = []  # their reasons
        self.segment_misses: list[str] = []
        self._picked: list[list[_Pending]] = []
        self._is_finished = False

    @property
    def n_chars(self) -> int:
        """Number of characters that the engine has yet to encode."""
        return sum(len(one.text) for one in self.pending.values() if one.ids is None)

    def joined(  # noqa: PLR0917 (by position, as the native one is called)
        self,
        variant: int,
        space_variant: int,
        between: str,
        lengths: IdLengths | None,
        agreed: CodePoints | None,
        max_chars: int,
        max_apart: int,
    ) -> list[str]:
        """Return texts that together contain all segments that `variant` has yet to encode.

        Segments of `space_variant` (-1: none) are included with a space before each: with it
        `variant` gives the same ids as the other variant without. A text has at most `max_chars`
        characters, or one segment, and contains `between`, which is ASCII, at most `max_apart`
        times. `between` is put between two segments, unless these may be adjacent and the id
        lengths show where each ends. With `agreed`, only segments of these code points and of at
        most `max_chars` characters are included.
        """
        self._picked = []
        n_chars = n_apart = 0
        for one in self.pending.values():
            n = len(one.text)
            if one.ids is not None or one.variant not in (variant, space_variant):
                continue
            if agreed is not None and (n > max_chars or not agreed.cover(one.text)):
                continue
            one.given = " " * (one.variant == space_variant) + one.text
            one.n_bytes = lengths.encoded_bytes(one.given) if lengths is not None else 0
            before = self._picked[-1][-1] if self._picked else None
            if before is not None:
                before.is_seamless = self._is_seam(before, one, variant)
                n_apart += not before.is_seamless
            if before is None or n_chars + n > max_chars or n_apart > max_apart:
                if before is not None:
                    before.is_seamless = False
                self._picked.append([])
                n_chars = n_apart = 0
            one.is_seamless = False
            self._picked[-1].append(one)
            n_chars += n
        return [
            "".join(one.given + ("" if one.is_seamless else between) for one in group[:-1])
            + group[-1].given
            for group in self._picked
        ]

    def _is_seam(self, before: _Pending, one: _Pending, variant: int) -> bool:
        """Return whether two segments need no separator in a joined text.

        They need none if they are adjacent in the text, or if a text may be cut between two such
        characters and no added token contains them side by side.
        """
        plan = self._cache._plan  # noqa: SLF001 (its own walk)
        if not before.n_bytes or not one.n_bytes or variant != plan.variant_of[2]:
            return False
        if before.start + len(before.text) == one.start and one.given == one.text:
            return True
        left = class_of(before.text[-1])
        if left is CharClass.NEWLINE:
            if len(before.text) == 1:
                return False  # its class depends on a character before the segment
            left = class_behind(before.text[-1], class_of(before.text[-2]))
        right = class_behind(one.given[0], left)
        return bool(plan.seams[left * N_CLASSES + right])

    def take(
        self, encoded: Sequence[Any], separator: int, lengths: IdLengths | None
    ) -> bool | None:
        """Assign the ids of the texts that `joined` returned to the segments; return True.

        Return False if the ids do not fit the segments, None if the length of an id is unknown.
        Each item of `encoded` is a list or a buffer of 32-bit integers.
        """
        if len(encoded) != len(self._picked):
            return False
        found: list[_Ids] = []
        for group, ids in zip(self._picked, map(_listed, encoded), strict=True):
            try:
                split = _split(group, ids, separator, lengths)
            except IdLengthUnknown:
                return None
            if split is None:
                return False
            found += split
        taken = (one for group in self._picked for one in group)
        for one, own in zip(taken, found, strict=True):
            one.ids = own
        return True

    def finish(self) -> TokenIds:
        """Store the encoded segments and return the ids of the whole text."""
        if self._is_finished:
            raise RuntimeError("finish() was called before")
        if any(one.ids is None for one in self.pending.values()):
            raise RuntimeError("finish() before every segment was taken")
        self._is_finished = True
        return self._cache.finish(self)


class SegmentCache:
    """The token ids of chunks and short segments of texts, cut as `plan` says.

    Units:   `max_bytes` is for keys, ids and tables.
    Cost:    one pass over the text in Python.
    Threads: safe, and after fork.
    Source:  content-defined chunks: FastCDC (Xia et al., USENIX ATC 2016).
    """

    _n_bytes: int
    _evicted: Evictions

    def __init__(self, plan: CutPlan, max_bytes: int, cuts_fine: bool = True) -> None:
        self.max_bytes = max_bytes
        self.cuts_fine = cuts_fine
        self._plan = plan
        self._scanner = Scanner(plan)
        self.cut_seed = os.urandom(SEED_BYTES)
        self._lock = threading.RLock()
        self.n_clears = 0
        call_in_child(self._after_fork)
        self.clear(n_clears=0)

    def clear(self, scope: int | None = None, n_clears: int | None = None) -> None:
        """Remove all entries and set the counters to zero, or remove those of `scope` only.

        `n_clears` is the new value of that attribute; by default it grows by one.
        """
        with self._lock:
            self.n_clears = self.n_clears + 1 if n_clears is None else n_clears
            if scope is not None and len(self._cleared) < _MAX_CLEARED:
                self._cleared[scope] = self.n_clears
            else:
                self._cleared_all = self.n_clears
                self._cleared: dict[int, int] = {}  # scope -> n_clears at its last clear
            if scope is not None:
                self._evicted.forget(scope)
                for key in [key for key in self._held if key[1] == scope]:
                    self._n_bytes -= _n_bytes(key, self._held.pop(key))
                return
            self._held: cachetools.LRUCache[_Key, _Ids] = cachetools.LRUCache(sys.maxsize)
            self._n_bytes = 0
            self._counts: Counter[str] = Counter()
            self._refusals: Counter[str] = Counter()
            self._evicted = Evictions()
            self._chunk_misses = dict.fromkeys(TEXT_MISSES, 0)
            self._segment_misses = dict.fromkeys(TEXT_MISSES, 0)

    def look(
        self, text: str, add_special_tokens: bool, scope: int, since: int | None = None
    ) -> TokenIds | Walk | None:
        """Return the ids of `text` if all of it is cached, else a Walk with the segments to encode.

        Return None, counted by reason, if the text can't be cut safely. Nothing is stored if the
        scope was cleared after `n_clears` was `since`, or is cleared before the Walk is finished.
        """
        with self._lock:
            if self._plan.affixes[add_special_tokens] is None:
                self._refuse("post_processor")
                return None
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                self._refuse("surrogate")
                return None
            since = self.n_clears if since is None else since
            walk = Walk(self, text, scope, add_special_tokens, since)
            try:
                self._follow(walk)
            except Unsure:
                self._refuse("beside_single_word")
                return None
            return walk if walk.pending else self.finish(walk)

    def finish(self, walk: Walk) -> TokenIds:
        """Store the segments of a Walk and return the ids of its text."""
        with self._lock:
            last = max(self._cleared.get(walk.scope, 0), self._cleared_all)
            keeps = last <= walk.since
            for key, one in walk.pending.items():
                self._counts["engine_chars"] += len(one.text)
                self._counts["engine_tokens"] += len(one.ids or ())
                if len(one.text) <= SEGMENT_CHARS and keeps:
                    self._keep(key, one.ids or ())
            missed = [one for one in walk.chunks if isinstance(one, _Missed)]
            for chunk in missed if keeps else ():
                self._keep(chunk.key, chunk.ids())
            if not keeps:
                self._refuse("cleared")
            self._counts["misses" if missed else "hits"] += 1
            self._counts["chunk_misses"] += len(missed)
            self._counts.update(walk.counts)
            for why in walk.chunk_misses:
                self._chunk_misses[why] += 1
            for why in walk.segment_misses:
                self._segment_misses[why] += 1
            ids = [
                index
                for one in walk.chunks
                for index in (one.ids() if isinstance(one, _Missed) else one)
            ]
            self._counts["tokens"] += len(ids)
            before, behind = self._plan.affixes[walk.special] or ((), ())
            return TokenIds([*before, *ids, *behind])

    def memory_usage(self) -> int:
        """Return the bytes held: keys, ids and tables."""
        return self._n_bytes

    def stats(self) -> L1Stats:
        """Return a snapshot of the counters."""
        with self._lock:
            n_segments = sum(len(text) <= SEGMENT_CHARS for text, _, _ in self._held)
            return L1Stats(
                **self._counts,
                refusals=dict(self._refusals),
                chunk_misses_by_reason=dict(self._chunk_misses),
                segment_misses_by_reason=dict(self._segment_misses),
                n_segments=n_segments,
                n_chunks=len(self._held) - n_segments,
                n_bytes=self._n_bytes,
            )

    def cut(self, text: str, fine: bool) -> list[tuple[int, int, bool]] | None:
        """Return the chunks (or with `fine` the segments) of `text` as (start, stop, is_token).

        Return None if the text can't be cut. For `explain` and tests.
        """
        found, p = [], 0
        try:
            while p < len(text):
                end = self._chunk_end(text, p)
                if fine:
                    spans = self._spans(text, p, end, 0)
                    found += [(one.start, one.stop, one.token is not None) for one in spans]
                else:
                    found.append((p, end, False))
                p = end
        except Unsure:
            return None
        return found

    # ---- dump and load

    @property
    def cut_seed(self) -> bytes:
        """The secret that chooses where chunks end: dumped chunks are useful only with it."""
        return self._seed.to_bytes(SEED_BYTES, "little")

    @cut_seed.setter
    def cut_seed(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a cut seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._seed = int.from_bytes(seed, "little")

    def held_chunks(self) -> list[_Chunk]:
        """Return (text, ids, scope, variant, end_class, is_tail) of every chunk, newest first.

        Chunks as short as a segment are returned by `held_segments` instead. The last two values
        are 0 and False; only the native cache needs them.
        """
        return [(*row, 0, False) for row in self._held_rows() if len(row[0]) > SEGMENT_CHARS]

    def held_segments(self) -> list[_Segment]:
        """Return (text, ids, scope, variant) of every short segment, newest first."""
        return [row for row in self._held_rows() if len(row[0]) <= SEGMENT_CHARS]

    def fill_chunks(self, rows: Iterable[_Chunk]) -> tuple[int, int]:
        """Store chunks in the form that `held_chunks` returns, without evicting any.

        They count as older than all present entries. Return the number stored, and the number that
        were already present.
        """
        return self.fill_segments(row[:4] for row in rows)

    def fill_segments(self, rows: Iterable[_Segment]) -> tuple[int, int]:
        """Store short segments in the form that `held_segments` returns; like `fill_chunks`."""
        with self._lock:
            entries = dict(self._by_age())
            n_held, n_present = len(entries), 0
            for text, ids, scope, variant in rows:
                key, own = (text, scope, variant), tuple(ids)
                n_bytes = self._n_bytes + _n_bytes(key, own)
                n_present += key in entries
                if key not in entries and len(text) <= STORED_CHARS and n_bytes <= self.max_bytes:
                    entries[key] = own
                    self._n_bytes = n_bytes
            self._held = cachetools.LRUCache(sys.maxsize)
            for key in reversed(entries):
                self._held[key] = entries[key]
            self._counts["insertions"] += len(entries) - n_held
            return len(entries) - n_held, n_present

    def _held_rows(self) -> list[_Segment]:
        with self._lock:
            return [
                (text, TokenIds(ids), scope, variant)
                for (text, scope, variant), ids in self._by_age()
            ]

    def _by_age(self) -> list[tuple[_Key, _Ids]]:
        """Return all entries, newest first."""
        found = [self._held.popitem() for _ in range(len(self._held))]
        for key, ids in found:
            self._held[key] = ids
        return found[::-1]

    def _check(self) -> None:
        """Verify every invariant; for tests."""
        with self._lock:
            held = sum(_n_bytes(key, self._held[key]) for key in list(self._held))
            assert held == self._n_bytes <= self.max_bytes  # noqa: S101

    # ---- inside

    def _refuse(self, reason: str) -> None:
        """Count why a text is not cut, or why a chunk is not stored."""
        self._refusals[reason] += 1

    def _follow(self, walk: Walk) -> None:
        """Look up the text chunk by chunk; `Unsure` if an added token can't be judged."""
        text, plan, p = walk.text, self._plan, 0
        while p < len(text):
            end = self._chunk_end(text, p)
            opens = self._scanner.opens(text, p)
            variant = plan.variant_of[1 if opens else 0 if p == 0 else 2]
            key = (text[p:end], walk.scope, variant)
            ids = self._held.get(key)
            if ids is not None:
                walk.counts["chunk_hits"] += 1
                walk.chunks.append(ids)
            else:
                walk.counts["chunk_miss_chars"] += end - p
                walk.chunk_misses.append(self._evicted.why(key))
                spans = self._spans(text, p, end, variant)
                segments = [self._segment(walk, span) for span in spans]
                walk.chunks.append(_Missed(key, segments))
            p = end

    def _segment(self, walk: Walk, span: Span) -> _Ids | _Pending:
        """Return the ids of a segment if they are cached, else list it as pending."""
        if span.token is not None:
            return (span.token.id,)
        text = walk.text[span.start : span.stop]
        key = (text, walk.scope, span.variant)
        ids = self._held.get(key) if len(text) <= SEGMENT_CHARS else None
        if ids is not None:
            walk.counts["segment_hits"] += 1
            return ids
        if key not in walk.pending:
            walk.counts["segment_misses"] += 1
            walk.segment_misses.append(self._evicted.why(key))
        return walk.pending.setdefault(key, _Pending(text, span.variant, span.start))

    def _spans(self, text: str, start: int, stop: int, variant: int) -> Iterator[Span]:
        return spans_of(
            self._plan, self._scanner, text, (start, stop), variant, fine=self.cuts_fine
        )

    def _chunk_end(self, text: str, p: int) -> int:
        """Return the end of the chunk that begins at `p`; `Unsure` if a token can't be judged."""
        i = base = cut = p
        left, last, best = CharClass.LETTER if p else self._plan.piece_left, 0, 1 << 32
        while i < len(text):
            match = self._scanner.match(text, i, base)
            if match is not None and not match.is_text:
                if match.token.opens and i >= p + OPENING_CHARS:
                    return i
                if last and i > p + MAX_CHARS:
                    return last
                base, i, left = match.stop, match.end, CharClass.TOKEN_END
                continue
            if i < base:
                i += 1
                continue
            if i == base and i > p:
                left, cut = self._plan.piece_left, i
            own = class_behind(text[i], left)
            if match is None and i > base and self._plan.allows(left, own, fine=False):
                if i >= p + MIN_CHARS:
                    is_late = i > p + MAX_CHARS
                    rank = 0 if is_late else self._rank(text, i, i - cut)
                    if rank < CHOSEN:
                        return (is_late and last) or i
                    best, last = min((best, last), (rank, i))
                cut = i
            left = own
            i += 1
        return len(text) if last == 0 or len(text) - p <= MAX_CHARS else last

    def _rank(self, text: str, i: int, gap: int) -> int:
        """Return the rank of a coarse cut: a digest of the characters before it, over its weight.

        The lowest ends a chunk. The weight is `gap`, the characters since the previous coarse cut,
        so that texts with few cuts have chunks of the same length as others. It is four times as
        large for characters beyond Latin-1, because each of them carries more text.
        """
        window = text[i - WINDOW : i]
        digest = zlib.crc32(window.encode("utf-8", "surrogatepass"), self._seed)
        return digest // (min(gap, GAP_CHARS) * (4 if max(window) > "\xff" else 1))

    def _keep(self, key: _Key, ids: _Ids) -> None:
        n_bytes = _n_bytes(key, ids)
        if len(key[0]) > STORED_CHARS:
            self._refuse("no_cut")
            return
        if n_bytes > self.max_bytes:
            self._refuse("oversize")
            return
        if key in self._held:
            return
        while self._n_bytes + n_bytes > self.max_bytes:
            gone, gone_ids = self._held.popitem()
            self._n_bytes -= _n_bytes(gone, gone_ids)
            self._evicted.note(gone, gone[1])
            self._counts["evictions"] += 1
        self._held[key] = ids
        self._n_bytes += n_bytes
        self._counts["insertions"] += 1

    def _after_fork(self) -> None:
        self._lock = threading.RLock()


class CodePoints:
    """A set of code points, given as inclusive (first, last) ranges."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        spans = "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges)
        self._all = re.compile(f"[{spans}]*")

    def cover(self, text: str) -> bool:
        """Return whether every character of `text` is in the set."""
        return self._all.fullmatch(text) is not None


class IdLengths:
    """The number of bytes of text that each token id stands for.

    `length_of(id)` returns it for an id below `n_ids`, or 0 if it is unknown; it is called once for
    each id that occurs. `exact()` returns the code points that are encoded unchanged; Latin-1
    always is, and without `exact` all code points are.
    """

    def __init__(
        self,
        n_ids: int,
        length_of: Callable[[int], int],
        exact: Callable[[], CodePoints] | None = None,
    ) -> None:
        self._n_ids = n_ids
        self._length_of = length_of
        self._exact = exact
        self._known: dict[int, int] = {}

    def fill(self, lengths: list[int]) -> None:
        """Set the lengths of the first ids, 0 for an unknown one."""
        self._known.update(enumerate(lengths))

    def of_id(self, index: int) -> int:
        """Return the bytes of an id, or 0 if they are unknown."""
        if not 0 <= index < self._n_ids:
            return 0
        if index not in self._known:
            self._known[index] = self._length_of(index)
        return self._known[index]

    def encoded_bytes(self, text: str) -> int:
        """Return the UTF-8 bytes of a text, or 0 if some characters are not encoded unchanged."""
        is_exact = self._exact is None or max(text) <= "\xff" or self._exact().cover(text)
        return len(text.encode()) if is_exact else 0


def _split(
    group: list[_Pending], ids: list[int], separator: int, lengths: IdLengths | None
) -> list[_Ids] | None:
    """Split the ids of a joined text into those of each segment; None if they do not fit."""
    found: list[_Ids] = []
    i, was_seamless = 0, False
    for one in group:
        start, left = i, one.n_bytes
        if lengths is not None and (was_seamless or one.is_seamless):
            while left > 0:
                if i == len(ids):
                    return None
                n_bytes = lengths.of_id(ids[i])
                if n_bytes == 0:
                    raise IdLengthUnknown
                left -= n_bytes
                i += 1
            if left < 0:
                return None
        else:
            while i < len(ids) and ids[i] != separator:
                i += 1
        found.append(tuple(ids[start:i]))
        was_seamless = one.is_seamless
        if one is not group[-1] and not was_seamless:
            if i == len(ids) or ids[i] != separator:
                return None
            i += 1
    return found if i == len(ids) else None


def _n_bytes(key: _Key, ids: _Ids) -> int:
    return 4 * len(key[0]) + 40 * len(ids) + _ENTRY_BYTES  # at most four bytes a character


def _listed(ids: Any) -> list[int]:
    if isinstance(ids, list):
        return ids
    found: list[int] = memoryview(ids).cast("B").cast("i").tolist()
    return found
