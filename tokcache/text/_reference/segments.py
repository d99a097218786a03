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
from tokcache.stats import L1Stats
from tokcache.text._reference.token_ids import TokenIds
from tokcache.text.cuts.char_classes import N_CLASSES, CharClass, class_of
from tokcache.text.cuts.scanner import Part, Scanner, class_behind, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tokcache.text.cuts.plan import CutPlan

MIN_CHARS = 128  # a chunk is not cut before, but where a message opens
MAX_CHARS = 1024  # nor later, where there is a place
OPENING_CHARS = 96  # a chunk of so many ends where a message opens
GAP_CHARS = 64  # the greatest weight of a place
CHOSEN = 1 << 23  # a place of a lower rank, as one character in 512 has, ends a chunk
WINDOW = 16  # characters before a place that decide
STORED_CHARS = 1 << 16  # a longer part, in which no place was found, is not kept
SHORT_CHARS = 24
SEED_BYTES = 4
_ENTRY_BYTES = 400
_MAX_CLEARED = 1024  # scopes whose last clear is remembered one by one

_Key = tuple[str, int, int]  # text, scope, variant
_Ids = tuple[int, ...]
_Chunk = tuple[str, TokenIds, int, int, int, bool]
_Short = tuple[str, TokenIds, int, int]


@dataclass(slots=True)
class _Unit:
    part: str
    variant: int
    start: int  # where it stands first
    ids: _Ids | None = None
    given: str = ""  # to the engine: with a blank before it, or without
    n_bytes: int = 0  # of what is given; 0: ids don't tell
    is_seamless: bool = False  # nothing stands between it and the next one given


@dataclass(slots=True)
class _Missed:
    key: _Key
    pieces: list[_Ids | _Unit] = field(default_factory=list)

    def ids(self) -> _Ids:
        known = (one.ids or () if isinstance(one, _Unit) else one for one in self.pieces)
        return tuple(index for ids in known for index in ids)


class Walk:
    """A text on its way: what of it is known, and the units that the engine must encode."""

    def __init__(
        self, cache: SegmentCache, text: str, scope: int, special: bool, since: int
    ) -> None:
        self._cache = cache
        self.text = text
        self.scope = scope
        self.special = special
        self.since = since
        self.chunks: list[_Ids | _Missed] = []
        self.units: dict[_Key, _Unit] = {}
        self.counts: Counter[str] = Counter(lookup_chars=len(text))
        self._picked: list[list[_Unit]] = []

    @property
    def n_chars(self) -> int:
        """Characters that the engine must encode yet."""
        return sum(len(unit.part) for unit in self.units.values() if unit.ids is None)

    def joined(  # noqa: PLR0917 (by place, as the native one is called)
        self,
        variant: int,
        blank_variant: int,
        between: str,
        sizes: TokenBytes | None,
        agreed: CodePoints | None,
        max_chars: int,
        max_apart: int,
    ) -> list[str]:
        """Return texts that hold all parts which `variant` must encode and has not yet.

        With them those of `blank_variant` (-1: none), a blank before each: `variant` encodes that
        as the other one does the part. A text has up to `max_chars` characters, or one part, and
        up to `max_apart` times `between`, which is ASCII, between two parts; parts that may stand
        side by side, and whose ids tell by `sizes` where each ends, have nothing between them.
        With `agreed`, only parts of these code points and of up to `max_chars` characters.
        """
        self._picked = []
        n_chars = n_apart = 0
        for unit in self.units.values():
            n = len(unit.part)
            if unit.ids is not None or unit.variant not in (variant, blank_variant):
                continue
            if agreed is not None and (n > max_chars or not agreed.cover(unit.part)):
                continue
            unit.given = " " * (unit.variant == blank_variant) + unit.part
            unit.n_bytes = sizes.of_part(unit.given) if sizes is not None else 0
            before = self._picked[-1][-1] if self._picked else None
            if before is not None:
                before.is_seamless = self._is_seam(before, unit, variant)
                n_apart += not before.is_seamless
            if before is None or n_chars + n > max_chars or n_apart > max_apart:
                if before is not None:
                    before.is_seamless = False
                self._picked.append([])
                n_chars = n_apart = 0
            unit.is_seamless = False
            self._picked[-1].append(unit)
            n_chars += n
        return [self._text_of(units, between) for units in self._picked]

    def take(self, encoded: Sequence[Any], separator: int, sizes: TokenBytes | None) -> bool | None:
        """Take the ids of the texts that `joined` returned; return False if they are not theirs.

        None if an id doesn't tell its bytes. Each of `encoded` is a list or a buffer of 32-bit
        integers.
        """
        if len(encoded) != len(self._picked):
            return False
        found: list[_Ids] = []
        for units, ids in zip(self._picked, map(_listed, encoded), strict=True):
            try:
                parts = _parted(units, ids, separator, sizes)
            except IdLengthUnknown:
                return None
            if parts is None:
                return False
            found += parts
        for unit, part in zip(
            (unit for units in self._picked for unit in units), found, strict=True
        ):
            unit.ids = part
        return True

    def _is_seam(self, before: _Unit, unit: _Unit, variant: int) -> bool:
        """Return whether nothing need stand between two parts in a joined text.

        They do so in the text, too, or a text may be cut between such characters and no added
        token has them side by side.
        """
        plan = self._cache._plan  # noqa: SLF001 (its own walk)
        if not before.n_bytes or not unit.n_bytes or variant != plan.variant_of[2]:
            return False
        if before.start + len(before.part) == unit.start and unit.given == unit.part:
            return True
        left = class_of(before.part[-1])
        if left is CharClass.NEWLINE:
            if len(before.part) == 1:
                return False  # what stands before it decides
            left = class_behind(before.part[-1], class_of(before.part[-2]))
        right = class_behind(unit.given[0], left)
        return bool(plan.seams[left * N_CLASSES + right])

    @staticmethod
    def _text_of(units: list[_Unit], between: str) -> str:
        pieces = [unit.given + between * (not unit.is_seamless) for unit in units[:-1]]
        return "".join([*pieces, units[-1].given])

    def finish(self) -> TokenIds:
        """Keep what was encoded and return the ids of the whole text."""
        if any(unit.ids is None for unit in self.units.values()):
            raise RuntimeError("finish() before every part was taken")
        return self._cache.finish(self)


class SegmentCache:
    """The ids of the parts of texts, cut as `plan` says.

    Units:   `max_bytes` bytes: keys, ids and tables.
    Cost:    one pass over the text in Python.
    Threads: safe; the lock is made anew in a forked child.
    Source:  content-defined chunks: FastCDC (Xia et al., USENIX ATC 2016).
    """

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
        """Drop every part and set the counters to zero, or drop the parts of `scope` alone.

        `n_clears` is what the attribute of this name is set to, one more than it was by default.
        """
        with self._lock:
            self.n_clears = self.n_clears + 1 if n_clears is None else n_clears
            if scope is not None:
                self._clear_scope(scope)
                return
            self._cleared_all = self.n_clears
            self._cleared: dict[int, int] = {}  # scope -> n_clears when it was cleared last
            self._held: cachetools.LRUCache[_Key, _Ids] = cachetools.LRUCache(sys.maxsize)
            self._n_bytes = 0
            self._counts: Counter[str] = Counter()
            self._refusals: Counter[str] = Counter()

    def _clear_scope(self, scope: int) -> None:
        if len(self._cleared) < _MAX_CLEARED:
            self._cleared[scope] = self.n_clears
        else:
            self._cleared_all, self._cleared = self.n_clears, {}
        for key in [key for key in self._held if key[1] == scope]:
            self._n_bytes -= _n_bytes(key, self._held.pop(key))

    def look(
        self, text: str, add_special_tokens: bool, scope: int, since: int | None = None
    ) -> TokenIds | Walk | None:
        """Return the ids of `text` if every part is known, a Walk if some are to be encoded.

        None, counted by reason, if the text can't be cut with proof. Nothing of it is kept if its
        scope was cleared since `n_clears` was `since`, or is before the Walk is finished.
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
            return walk if walk.units else self.finish(walk)

    def finish(self, walk: Walk) -> TokenIds:
        """Keep the parts of a walk and return the ids of its text."""
        with self._lock:
            last = max(self._cleared.get(walk.scope, 0), self._cleared_all)
            keeps = last <= walk.since
            for key, unit in walk.units.items():
                self._counts["engine_chars"] += len(unit.part)
                self._counts["engine_tokens"] += len(unit.ids or ())
                if len(unit.part) <= SHORT_CHARS and keeps:
                    self._keep(key, unit.ids or ())
            missed = [one for one in walk.chunks if isinstance(one, _Missed)]
            for one in missed if keeps else ():
                self._keep(one.key, one.ids())
            if not keeps:
                self._refuse("cleared")
            self._counts["misses" if missed else "hits"] += 1
            self._counts["chunk_misses"] += len(missed)
            self._counts.update(walk.counts)
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
            n_shorts = sum(len(text) <= SHORT_CHARS for text, _, _ in self._held)
            return L1Stats(
                **self._counts,
                refusals=dict(self._refusals),
                n_shorts=n_shorts,
                n_chunks=len(self._held) - n_shorts,
                n_bytes=self._n_bytes,
            )

    def cut(self, text: str, fine: bool) -> list[tuple[int, int, bool]] | None:
        """Return the parts of `text` as (start, stop, is_token); for people and tests."""
        found, p = [], 0
        try:
            while p < len(text):
                end = self._chunk_end(text, p)
                if fine:
                    parts = self._parts(text, p, end, 0)
                    found += [(one.start, one.stop, one.token is not None) for one in parts]
                else:
                    found.append((p, end, False))
                p = end
        except Unsure:
            return None
        return found

    # ---- to be kept elsewhere and brought back

    @property
    def cut_seed(self) -> bytes:
        """The secret that chooses where chunks end: with another one, others are looked up."""
        return self._seed.to_bytes(SEED_BYTES, "little")

    @cut_seed.setter
    def cut_seed(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a cut seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._seed = int.from_bytes(seed, "little")

    def held_chunks(self) -> list[_Chunk]:
        """Return (text, ids, scope, variant, end_class, is_tail) of every chunk, newest first.

        What is no longer than a short segment is returned by `held_shorts` alone; the last two,
        which only the native cache keeps, are 0 and False.
        """
        return [(*row, 0, False) for row in self._held_rows() if len(row[0]) > SHORT_CHARS]

    def held_shorts(self) -> list[_Short]:
        """Return (text, ids, scope, variant) of every short segment, newest first."""
        return [row for row in self._held_rows() if len(row[0]) <= SHORT_CHARS]

    def fill_chunks(self, rows: Iterable[_Chunk]) -> tuple[int, int]:
        """Keep chunks as `held_chunks` returns them, as far as nothing must go for them.

        They count as older than all that is held. Return how many were kept, and how many were
        there.
        """
        return self.fill_shorts(row[:4] for row in rows)

    def fill_shorts(self, rows: Iterable[_Short]) -> tuple[int, int]:
        """Keep short segments as `held_shorts` returns them; like `fill_chunks`."""
        with self._lock:
            all_of_it = dict(self._by_age())
            n_held, n_there = len(all_of_it), 0
            for text, ids, scope, variant in rows:
                key, own = (text, scope, variant), tuple(ids)
                n_bytes = self._n_bytes + _n_bytes(key, own)
                n_there += key in all_of_it
                if key not in all_of_it and len(text) <= STORED_CHARS and n_bytes <= self.max_bytes:
                    all_of_it[key] = own
                    self._n_bytes = n_bytes
            self._held = cachetools.LRUCache(sys.maxsize)
            for key in reversed(all_of_it):
                self._held[key] = all_of_it[key]
            self._counts["insertions"] += len(all_of_it) - n_held
            return len(all_of_it) - n_held, n_there

    def _held_rows(self) -> list[_Short]:
        with self._lock:
            return [
                (text, TokenIds(ids), scope, variant)
                for (text, scope, variant), ids in self._by_age()
            ]

    def _by_age(self) -> list[tuple[_Key, _Ids]]:
        """Return all that is held, newest first."""
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
        """Count why a text or a part is not held."""
        self._refusals[reason] += 1

    def _follow(self, walk: Walk) -> None:
        text, p = walk.text, 0
        while p < len(text):
            end, variant = self._chunk_end(text, p), self._variant_at(text, p)
            key = (text[p:end], walk.scope, variant)
            ids = self._held.get(key)
            if ids is not None:
                walk.counts["chunk_hits"] += 1
                walk.chunks.append(ids)
            else:
                walk.counts["chunk_miss_chars"] += end - p
                missed = _Missed(key)
                for part in self._parts(text, p, end, variant):
                    missed.pieces.append(self._piece(walk, part))
                walk.chunks.append(missed)
            p = end

    def _piece(self, walk: Walk, part: Part) -> _Ids | _Unit:
        if part.token is not None:
            return (part.token.id,)
        text = walk.text[part.start : part.stop]
        key = (text, walk.scope, part.variant)
        ids = self._held.get(key) if len(text) <= SHORT_CHARS else None
        if ids is not None:
            walk.counts["short_hits"] += 1
            return ids
        walk.counts["short_misses"] += key not in walk.units
        return walk.units.setdefault(key, _Unit(text, part.variant, part.start))

    def _parts(self, text: str, start: int, stop: int, variant: int) -> Any:
        return parts_of(
            self._plan, self._scanner, text, (start, stop), variant, fine=self.cuts_fine
        )

    def _variant_at(self, text: str, p: int) -> int:
        if self._scanner.opens(text, p):
            return self._plan.variant_of[1]
        return self._plan.variant_of[0 if p == 0 else 2]

    def _chunk_end(self, text: str, p: int) -> int:
        """Return where the chunk that begins at `p` ends; `Unsure` if a token can't be judged."""
        i = piece = cut = p
        left, last, best = CharClass.LETTER if p else self._plan.piece_left, 0, 1 << 32
        while i < len(text):
            match = self._scanner.match(text, i, piece)
            if match is not None and not match.is_text:
                if match.token.opens and i >= p + OPENING_CHARS:
                    return i
                if last and i > p + MAX_CHARS:
                    return last
                piece, i, left = match.stop, match.end, CharClass.TOKEN_END
                continue
            if i < piece:
                i += 1
                continue
            if i == piece and i > p:
                left, cut = self._plan.piece_left, i
            own = class_behind(text[i], left)
            if match is None and i > piece and self._is_coarse(left, own):
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

    def _is_coarse(self, left: CharClass, right: CharClass) -> bool:
        return self._plan.allows(left, right, fine=False)

    def _rank(self, text: str, i: int, gap: int) -> int:
        """Return the rank of a coarse cut; the lowest one ends a chunk.

        What stands before it decides; `gap`, the characters since the coarse cut before, is its
        weight, so that texts with few places have chunks of the same length. Characters beyond
        Latin-1, which say more each, weigh four times.
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
        """Return whether every character of `text` is one of them."""
        return self._all.fullmatch(text) is not None


class TokenBytes:
    """How many bytes of a text each token id stands for.

    `length_of` tells it of one of `n_ids`, 0 where it can't: asked once for each that is met.
    `exact` returns the code points that are encoded as they are; without it all are, and all of
    Latin-1 in any case.
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

    def fill(self, sizes: list[int]) -> None:
        """Take the bytes of the first ids at once; 0 where they are unknown."""
        self._known.update(enumerate(sizes))

    def of_id(self, index: int) -> int:
        """Return the bytes of an id, 0 where they are unknown."""
        if not 0 <= index < self._n_ids:
            return 0
        if index not in self._known:
            self._known[index] = self._length_of(index)
        return self._known[index]

    def of_part(self, part: str) -> int:
        """Return the bytes of a part in UTF-8, or 0 where the ids don't tell them."""
        is_exact = self._exact is None or max(part) <= "\xff" or self._exact().cover(part)
        return len(part.encode()) if is_exact else 0


def _parted(
    units: list[_Unit], ids: list[int], separator: int, sizes: TokenBytes | None
) -> list[_Ids] | None:
    """Return what of a text's ids is each unit's, None if they are not theirs."""
    found: list[_Ids] = []
    i, was_seamless = 0, False
    for unit in units:
        start, left = i, unit.n_bytes
        if sizes is not None and (was_seamless or unit.is_seamless):
            while left > 0:
                if i == len(ids):
                    return None
                size = sizes.of_id(ids[i])
                if size == 0:
                    raise IdLengthUnknown
                left -= size
                i += 1
            if left < 0:
                return None
        else:
            while i < len(ids) and ids[i] != separator:
                i += 1
        found.append(tuple(ids[start:i]))
        was_seamless = unit.is_seamless
        if unit is not units[-1] and not was_seamless:
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
