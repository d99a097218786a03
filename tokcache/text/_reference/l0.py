"""The reference implementation of the native L0Cache, on cachetools.

There are two maps, split on `add_special_tokens`, and each budget is for both together. The least
recently used of `sample_size` random entries of the larger map is evicted.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cachetools

from tokcache._forks import call_in_child
from tokcache._validate import require_bool, require_int, require_scope, require_size
from tokcache.config import MAX_SAMPLE_SIZE
from tokcache.errors import InvalidText
from tokcache.reasons import TEXT_MISSES as MISSES
from tokcache.stats import L0Stats
from tokcache.text._reference.evictions import Evictions
from tokcache.text._reference.token_ids import TokenIds

if TYPE_CHECKING:
    from collections.abc import Iterable

_Key = tuple[str, str | None]
_Row = tuple[str, bool, TokenIds, str | None]

# A dict slot and a list slot each for _Map and its base, the key tuple, the entry object.
_ENTRY_BYTES = 560
_MAX_CLEARED = 1024  # scopes whose last clear is remembered individually
_DIGESTED_BYTES = 1 << 14  # of the native one, which tells longer texts apart by samples


@dataclass(slots=True)
class _Entry:
    ids: TokenIds
    tick: int
    index: int
    n_bytes: int


class _Map(cachetools.Cache[_Key, "_Entry"]):
    """A cachetools cache whose keys are also dense in a list: a random draw is one index."""

    def __init__(self) -> None:
        super().__init__(maxsize=sys.maxsize, getsizeof=lambda entry: entry.n_bytes)
        self.keys_dense: list[_Key] = []

    def __setitem__(self, key: _Key, entry: _Entry) -> None:
        entry.index = len(self.keys_dense)
        self.keys_dense.append(key)
        super().__setitem__(key, entry)

    def __delitem__(self, key: _Key) -> None:
        hole = self[key].index
        last = self.keys_dense.pop()
        if last != key:
            self.keys_dense[hole] = last
            self[last].index = hole
        super().__delitem__(key)

    def evict(self, rng: random.Random, sample_size: int) -> _Key:
        drawn = rng.sample(self.keys_dense, min(sample_size, len(self.keys_dense)))
        oldest = min(drawn, key=lambda key: self[key].tick)
        del self[oldest]
        return oldest


def _n_bytes(key: _Key, ids: TokenIds) -> int:
    n_bytes = sys.getsizeof(key[0]) + 4 * len(ids) + _ENTRY_BYTES
    return n_bytes + (sys.getsizeof(key[1]) if key[1] is not None else 0)


def _text_bytes(text: str) -> int:
    widest = max(text, default="")
    return len(text) * (1 if widest < "\u0100" else 2 if widest < "\U00010000" else 4)


def _exact_str(text: object) -> str:
    if not isinstance(text, str):
        raise InvalidText(f"text must be a str, not {type(text).__name__}; decode bytes first")
    return str.__str__(text)  # a subclass of str becomes a plain str


class L0Cache:
    """The token ids of whole strings.

    Units:   `max_entries` strings and `max_bytes` bytes (keys, ids, overhead) over both maps;
             `max_bytes` may be a str such as "64M".

    Errors:  InvalidConfig for a budget below 1 or a flag that is not a bool; InvalidText if the
             text is not a str; InvalidScope.
    Cost:    a look-up is one hash and one compare.
    Threads: safe, and after fork.
    """

    _maps: tuple[_Map, _Map]
    _evicted: Evictions

    def __init__(
        self, *, max_entries: int = 10_000, max_bytes: int | str = "64M", sample_size: int = 8
    ) -> None:
        self.max_entries = require_int("max_entries", max_entries, 1)
        self.max_bytes = require_size("max_bytes", max_bytes)
        self.sample_size = require_int("sample_size", sample_size, 1, MAX_SAMPLE_SIZE)
        self._rng = random.Random(os.urandom(16))  # noqa: S311 (a draw, not a secret)
        self._lock = threading.RLock()
        self._n_clears = 0
        call_in_child(self._after_fork)
        self.clear()

    def clear(self, *, scope: str | None = None) -> None:
        """Remove all entries and set the counters to zero, or remove those of `scope` only.

        Errors: InvalidScope.
        Cost:   a pass over all entries.
        """
        scope = require_scope(scope)
        with self._lock:
            self._n_clears += 1
            if scope is not None and len(self._cleared) < _MAX_CLEARED:
                self._cleared[hash(scope)] = self._n_clears
            else:
                self._cleared_all = self._n_clears
                self._cleared: dict[int, int] = {}  # hash of a scope -> _n_clears at its last clear
            if scope is not None:
                self._evicted.forget(scope)
                for one in self._maps:
                    for key in [key for key in one.keys_dense if key[1] == scope]:
                        del one[key]
                return
            self._maps = (_Map(), _Map())
            self._clock = self._hits = self._hit_tokens = 0
            self._insertions = self._evictions = 0
            self._misses = dict.fromkeys(MISSES, 0)
            self._evicted = Evictions()
            self._refusals: Counter[str] = Counter()

    def get(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds | None:
        """Return the ids stored for `text` in `scope`, or None."""
        return self._get(text, add_special_tokens, scope)

    def _get(self, text: str, add_special_tokens: bool, scope: str | None) -> TokenIds | None:
        """Look up as `get` does, without the cost of keyword arguments."""
        return self._look(text, add_special_tokens, scope, is_counted=True)

    def _get_again(self, text: str, add_special_tokens: bool, scope: str | None) -> TokenIds | None:
        """Look up a text that has just missed: another miss is not counted."""
        return self._look(text, add_special_tokens, scope, is_counted=False)

    def _look(
        self, text: str, add_special_tokens: bool, scope: str | None, is_counted: bool
    ) -> TokenIds | None:
        which = require_bool("add_special_tokens", add_special_tokens)
        key = (_exact_str(text), require_scope(scope))
        with self._lock:
            entry = self._maps[which].get(key)
            if entry is None:
                if is_counted:
                    why = self._evicted.why((which, key))
                    if why == "evicted" and _text_bytes(key[0]) > _DIGESTED_BYTES:
                        why = "not_known"
                    self._misses[why] += 1
                return None
            self._hits += 1
            self._hit_tokens += len(entry.ids)
            self._clock += 1
            entry.tick = self._clock
            return entry.ids

    def put(
        self,
        text: str,
        ids: Iterable[int],
        *,
        add_special_tokens: bool = True,
        scope: str | None = None,
    ) -> bool:
        """Store `ids` for `text` in `scope`; return False if it is larger than the budget."""
        return self._put(text, add_special_tokens, ids, scope, sys.maxsize)

    def _put(
        self,
        text: str,
        add_special_tokens: bool,
        ids: Iterable[int],
        scope: str | None,
        since: int,
    ) -> bool:
        """Store as `put` does, unless the scope was cleared since `_n_clears` was `since`."""
        which = require_bool("add_special_tokens", add_special_tokens)
        key = (_exact_str(text), require_scope(scope))
        own = TokenIds(memoryview(TokenIds(ids)))  # a slice would keep the whole array alive
        n_bytes = _n_bytes(key, own)
        with self._lock:
            last = 0 if scope is None else self._cleared.get(hash(key[1]), 0)
            if max(last, self._cleared_all) > since:
                self._refusals["cleared"] += 1
                return False
            target = self._maps[which]
            if key in target:
                del target[key]
            if n_bytes > self.max_bytes:
                self._refusals["oversize"] += 1
                return False
            while len(self) >= self.max_entries:
                self._evict(max(self._maps, key=len))
            while self.memory_usage() + n_bytes > self.max_bytes:
                self._evict(max(self._maps, key=lambda m: m.currsize))
            self._clock += 1
            target[key] = _Entry(own, self._clock, 0, n_bytes)
            self._insertions += 1
            return True

    def _evict(self, one: _Map) -> None:
        key = one.evict(self._rng, self.sample_size)
        self._evicted.note((one is self._maps[True], key), key[1])
        self._evictions += 1

    def held(self) -> list[_Row]:
        """Return (text, add_special_tokens, ids, scope) of every entry, last used first."""
        with self._lock:
            found = [
                (entry.tick, (text, bool(which), entry.ids, scope))
                for which, one in enumerate(self._maps)
                for (text, scope), entry in one.items()
            ]
        return [row for _, row in sorted(found, key=lambda pair: -pair[0])]

    def fill(self, rows: Iterable[_Row]) -> tuple[int, int]:
        """Store entries in the form that `held` returns, without evicting any.

        They count as older than all present entries. Return the number stored, and the number that
        were already present.
        """
        n_stored = n_present = 0
        with self._lock:
            tick = min((entry.tick for one in self._maps for entry in one.values()), default=1)
            for text, add_special_tokens, ids, scope in rows:
                tick -= 1
                key = (_exact_str(text), require_scope(scope))
                own = TokenIds(memoryview(TokenIds(ids)))
                n_bytes = _n_bytes(key, own)
                target = self._maps[bool(add_special_tokens)]
                n_present += key in target
                has_room = (
                    len(self) < self.max_entries and self.memory_usage() + n_bytes <= self.max_bytes
                )
                if key not in target and has_room:
                    target[key] = _Entry(own, tick, 0, n_bytes)
                    n_stored += 1
            self._insertions += n_stored
        return n_stored, n_present

    def __len__(self) -> int:
        return len(self._maps[0]) + len(self._maps[1])

    def __bool__(self) -> bool:
        return True  # `if cache` asks whether there is a cache, not whether it has entries

    def __repr__(self) -> str:
        return (
            f"<L0Cache: {len(self):,} of {self.max_entries:,} entries, "
            f"{self.memory_usage():,} of {self.max_bytes:,} bytes>"
        )

    def memory_usage(self) -> int:
        """Return the bytes held: keys, ids and overhead."""
        return int(self._maps[0].currsize + self._maps[1].currsize)

    def stats(self) -> L0Stats:
        """Return a snapshot of the counters."""
        with self._lock:
            return L0Stats(
                hits=self._hits,
                misses=sum(self._misses.values()),
                misses_by_reason=dict(self._misses),
                insertions=self._insertions,
                evictions=self._evictions,
                refusals=dict(self._refusals),
                hit_tokens=self._hit_tokens,
                n_entries=len(self),
                n_bytes=self.memory_usage(),
            )

    def _check(self) -> None:
        """Verify every invariant; for tests."""
        with self._lock:
            for one in self._maps:
                dense: list[Any] = one.keys_dense
                assert len(dense) == len(one) == len(set(dense))  # noqa: S101
                assert all(one[key].index == i for i, key in enumerate(dense))  # noqa: S101
                assert one.currsize == sum(one[key].n_bytes for key in dense)  # noqa: S101
            assert len(self) <= self.max_entries  # noqa: S101
            assert self.memory_usage() <= self.max_bytes  # noqa: S101

    def _after_fork(self) -> None:
        self._lock = threading.RLock()  # another thread of the parent may have held it
