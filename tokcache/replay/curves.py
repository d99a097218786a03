"""Hit rate against size for every size at once, from one pass over the look-ups.

An LRU cache of some size holds an object at a look-up exactly if the distinct objects used since
its last use, and itself, fit. Their bytes are the stack distance of the look-up; the hits of a size
are the look-ups with no greater distance (Mattson et al., IBM Systems Journal 1970).

1. Look-ups are collected in batches. The table holds each known object once: its key, its weight,
   and its place in the order of last uses.
2. For a whole batch, the distance of each look-up is the weight of the objects that were used last
   after this one's last use, at the begin of the batch, and of those of the batch's earlier
   look-ups that were last used before it. The second sum counts the earlier elements of a sequence
   with a smaller value; it takes a pass for each bit of the batch's length.
3. Distances go into a histogram whose buckets are 2% wide.

Objects are sampled by their key, as SHARDS does (Waldspurger et al., FAST'15): with a rate below 1
only keys below a threshold are looked at, and all sums are divided by the rate. When the table is
full, the threshold falls to its middle key, so that memory is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

MAX_OBJECTS = 1 << 20
_ALL = 1 << 64
_STEPS = 32  # buckets a factor of two
_N_BUCKETS = 56 * _STEPS


def mixed(values: Keys, seed: int) -> Keys:
    """Return well-mixed 64-bit keys of integers: splitmix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(seed & (_ALL - 1))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class Looked:
    """The look-ups of a batch.

    `distances` are the stack distances (-1: not seen before), and `was_marked` says whether an
    earlier look-up of the same key had the mark.
    """

    distances: Floats
    was_marked: Flags


class StackDistances:
    """Stack distances of look-ups, and the sums of their values by distance.

    `values` has a row for each sum: look-ups, tokens, characters or the like. Keys must be mixed
    well, see `mixed`.

    Units:  weights and distances in bytes, or blocks, as the caller counts; `rate` is the share of
            objects that is looked at.
    Cost:   about 0.4 us a look-up in batches of 65,536; 17 bytes for each of `max_objects`.
    Threads: one.
    """

    def __init__(
        self, n_sums: int = 1, *, rate: float = 1.0, max_objects: int = MAX_OBJECTS
    ) -> None:
        self._limit = min(int(rate * _ALL), _ALL)
        self._max_objects = max_objects
        self._keys: Keys = np.empty(0, np.uint64)  # ascending
        self._place: Ints = np.empty(0, np.int64)  # in the order of last uses, 0 the oldest
        self._weight: Ints = np.empty(0, np.int64)
        self._marked: Flags = np.empty(0, np.bool_)
        self._sums: Floats = np.zeros((n_sums, _N_BUCKETS + 1))
        self._counted: Floats = np.zeros(n_sums)
        self.totals: Floats = np.zeros(n_sums)
        self.n_seen = 0.0  # distinct objects, estimated if sampled
        self.weight_seen = 0.0

    @property
    def rate(self) -> float:
        """The share of objects that is looked at now; 1.0: all of them."""
        return self._limit / _ALL

    def sampled(self, keys: Keys) -> Ints | None:
        """Return the positions of the keys that are looked at, None if all are."""
        return None if self._limit >= _ALL else np.flatnonzero(keys < np.uint64(self._limit))

    def look_up(
        self,
        keys: Keys,
        weights: Ints,
        values: Floats,
        totals: Floats,
        *,
        groups: Ints | None = None,
        marks: Flags | None = None,
    ) -> Looked:
        """Count a batch of look-ups, in their order: those at the positions `sampled` returned.

        `totals` are the sums of the values of all look-ups of the batch, sampled or not. Look-ups
        of one group, which must be adjacent, happen at the same time: the weights of a group do not
        count among its own distances.

        Shapes: keys, weights, groups and marks [n]; values [n_sums, n], 0 for an object that is
                stored and not looked up; totals [n_sums].
        """
        self.totals += totals
        if marks is None:
            marks = np.zeros(len(keys), np.bool_)
        found, was_marked = self._distances(keys, weights, groups, marks)
        rate = self.rate
        distances = np.where(found < 0, -1.0, found / rate)
        self._counted += values.sum(axis=1) / rate
        # The last bucket is for objects that were not seen before.
        buckets = np.ceil(_exact_bucket(distances) - 1e-9).astype(np.int64) - 1
        buckets = np.clip(buckets, 0, _N_BUCKETS - 1)
        buckets[distances < 0] = _N_BUCKETS
        for which, value in enumerate(values):
            self._sums[which] += np.bincount(buckets, value / rate, _N_BUCKETS + 1)
        if len(self._keys) > self._max_objects:
            # Remove the objects with the greater keys, so that half of the table is free again.
            n_kept = self._max_objects // 2
            self._limit = int(self._keys[n_kept])
            self._keys = self._keys[:n_kept].copy()
            self._place = self._place[:n_kept].copy()
            self._weight = self._weight[:n_kept].copy()
            self._marked = self._marked[:n_kept].copy()
            self._close_gaps()
        return Looked(distances, was_marked)

    def _distances(
        self, keys: Keys, weights: Ints, groups: Ints | None, marks: Flags
    ) -> tuple[Ints, Flags]:
        n, n_held = len(keys), len(self._keys)
        by_key = np.argsort(keys, kind="stable")
        ordered = keys[by_key]
        is_first = np.ones(n, np.bool_)
        is_first[1:] = ordered[1:] != ordered[:-1]
        distinct = ordered[is_first]
        at = np.searchsorted(self._keys, distinct)
        is_held = np.zeros(len(distinct), np.bool_)
        inside = at < n_held
        is_held[inside] = self._keys[at[inside]] == distinct[inside]
        at_held = at[is_held]

        # The place of each look-up's previous use: old ones, then those of the batch; -1: none.
        previous = np.full(n, -1, np.int64)
        previous[by_key[1:]] = np.where(is_first[1:], -1, n_held + by_key[:-1])
        firsts = by_key[is_first]
        previous[firsts[is_held]] = self._place[at_held]

        was_marked = self._was_marked(marks, by_key, is_first, is_held, at_held)
        distances = self._summed(previous, weights)
        if groups is not None and n:
            before = np.cumsum(weights) - weights
            starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
            own = before - np.repeat(before[starts], np.diff(np.r_[starts, n]))
            distances -= np.where(distances < 0, 0, own)
            distances = np.where(previous < 0, -1, np.maximum(distances, weights))

        is_last = np.ones(n, np.bool_)
        is_last[:-1] = is_first[1:]
        lasts = by_key[is_last]
        self._remember(
            distinct,
            at=at,
            is_held=is_held,
            lasts=lasts,
            weights=weights[lasts],
            marked=was_marked[lasts] | marks[lasts],
        )
        return distances, was_marked

    def _was_marked(
        self, marks: Flags, by_key: Ints, is_first: Flags, is_held: Flags, at_held: Ints
    ) -> Flags:
        """Return whether an earlier look-up of the same key was marked, in the table or here."""
        ordered = marks[by_key].astype(np.int64)
        before = np.cumsum(ordered) - ordered
        number = np.cumsum(is_first) - 1  # of the key, among those of the batch
        in_table = np.zeros(int(is_first.sum()), np.bool_)
        in_table[is_held] = self._marked[at_held]
        found = np.zeros(len(marks), np.bool_)
        found[by_key] = (before > before[is_first][number]) | in_table[number]
        return found

    def _summed(self, previous: Ints, weights: Ints) -> Ints:
        """Return the distances that follow from the places of the previous uses."""
        n_held = len(self._keys)
        by_place = np.empty(n_held, np.int64)
        by_place[self._place] = self._weight
        younger = np.r_[by_place.sum() - np.cumsum(by_place), 0]
        is_known = previous >= 0
        known = np.flatnonzero(is_known)
        was = previous[known]
        new_before = np.cumsum(np.where(is_known, 0, weights))
        smaller = new_before[known] + _smaller_in_runs(was, weights[known])
        # Of a previous use in this batch: the look-ups up to it count in `smaller`, but were
        # before it.
        upto = np.cumsum(weights)
        in_batch = was >= n_held
        smaller[in_batch] -= upto[was[in_batch] - n_held]
        distances = np.full(len(previous), -1, np.int64)
        old = younger[np.minimum(was, n_held)] if n_held else 0
        distances[known] = old + smaller + weights[known]
        return distances

    def _remember(
        self,
        distinct: Keys,
        *,
        at: Ints,
        is_held: Flags,
        lasts: Ints,
        weights: Ints,
        marked: Flags,
    ) -> None:
        """Put the objects of a batch into the table, with places behind all others."""
        n_held = len(self._keys)
        at_held, is_new = at[is_held], ~is_held
        self._place[at_held] = n_held + lasts[is_held]
        self._marked[at_held] |= marked[is_held]
        where = at[is_new]
        self._keys = np.insert(self._keys, where, distinct[is_new])
        self._place = np.insert(self._place, where, n_held + lasts[is_new])
        self._weight = np.insert(self._weight, where, weights[is_new])
        self._marked = np.insert(self._marked, where, marked[is_new])
        self.n_seen += float(is_new.sum()) / self.rate
        self.weight_seen += float(weights[is_new].sum()) / self.rate
        self._close_gaps()

    def _close_gaps(self) -> None:
        if len(self._place) == 0:
            return
        is_used = np.zeros(int(self._place.max()) + 1, np.int64)
        is_used[self._place] = 1
        self._place = (np.cumsum(is_used) - 1)[self._place]

    # ---- the curve

    def hit_rates(self, sizes: Sequence[float] | Floats, which: int = 0) -> Floats:
        """Return the share of a sum's total that hits with a cache of each size.

        Units: sizes in the unit of the weights; infinity: without a limit.
        """
        total = self.totals[which]
        if not total:
            return np.zeros(len(sizes))
        hits = np.cumsum(self._sums[which, :_N_BUCKETS])
        # A sample has too many or too few of the objects that are looked up most: their look-ups
        # have the least distances (SHARDS-adj).
        missing = total - self._counted[which]
        position = np.minimum(np.asarray(sizes, np.float64), 2.0**55)
        found = np.interp(_exact_bucket(position), np.arange(_N_BUCKETS) + 1, hits)
        found = np.where(position < 1, 0.0, found + missing)
        rates: Floats = np.clip(found / total, 0.0, 1.0)
        return rates

    def greatest_distance(self) -> float:
        """Return the size from which on a larger cache has no more hits."""
        used = np.flatnonzero(self._sums[:, :_N_BUCKETS].sum(axis=0))
        return float(2 ** ((used[-1] + 1) / _STEPS)) if len(used) else 1.0


def _exact_bucket(distances: Floats) -> Floats:
    found: Floats = np.log2(np.maximum(distances, 1.0)) * _STEPS
    return found


def _smaller_in_runs(values: Ints, weights: Ints) -> Ints:
    """Return `_smaller_before`, with runs of successive values taken as one element.

    A prompt that continues an earlier one uses the same blocks in the same order.
    """
    if len(values) == 0:
        return np.zeros(0, np.int64)
    is_start = np.r_[True, values[1:] != values[:-1] + 1]
    starts, run = np.flatnonzero(is_start), np.cumsum(is_start) - 1
    before = np.cumsum(weights) - weights
    of_runs = _smaller_before(values[starts], np.add.reduceat(weights, starts))
    found: Ints = of_runs[run] + before - before[starts][run]
    return found


def _smaller_before(values: Ints, weights: Ints) -> Ints:
    """Return, for each element, the weights of the earlier ones with a smaller value.

    Values must be distinct. Elements are split by the bits of their rank, the highest first: within
    a group of equal higher bits, those with a 0 are the smaller ones.
    """
    n = len(values)
    found = np.zeros(n, np.int64)
    if n <= 1:
        return found
    rank: NDArray[Any] = np.empty(
        n, np.uint16 if n <= 1 << 16 else np.uint32
    )  # uint16: a radix sort
    rank[np.argsort(values)] = np.arange(n)
    for bit in range(int(n - 1).bit_length()):
        group = rank >> (bit + 1)
        order = np.argsort(group, kind="stable")  # by group, in time within a group
        is_low = (rank[order] >> bit) & 1 == 0
        low = np.cumsum(np.where(is_low, weights[order], 0))
        # The sum before the group: its first element has the rank group << (bit + 1).
        starts = np.arange(0, n, 2 << bit)
        before = np.r_[0, low[starts[1:] - 1]][group[order]]
        found[order] += np.where(is_low, 0, low - before)
    return found
