"""Hit rate against size for every size at once, from one pass over the look-ups.

An LRU cache of some size holds an object at a look-up exactly if the distinct objects used since
its last use, and itself, fit. Their bytes are the stack distance of the look-up; the hits of a size
are the look-ups with no greater distance (Mattson et al., IBM Systems Journal 1970).

1. Look-ups are collected in batches. The table holds each known object once: its key, its weight,
   and its place in the order of last uses. A place that its object left stays empty, with the
   weight 0, until half of them are.
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
    x: Keys = values + np.uint64(seed & (_ALL - 1))
    shifted = np.empty_like(x)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(x, np.uint64(shift), out=shifted)
        x ^= shifted
        x *= np.uint64(factor)
    np.right_shift(x, np.uint64(31), out=shifted)
    x ^= shifted
    return x


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
        self._rows: Ints = np.empty(0, np.int64)  # of the keys, in the arrays of objects
        self._place: Ints = np.empty(0, np.int64)  # in the order of last uses, 0 the oldest
        self._weight: Ints = np.empty(0, np.int64)
        self._marked: Flags = np.empty(0, np.bool_)
        self._by_place: Ints = np.empty(0, np.int64)  # weights
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
        is_new = found < 0
        distances = found / rate
        distances[is_new] = -1.0
        # The last bucket is for objects that were not seen before.
        edges = _exact_bucket(distances)
        edges -= 1 + 1e-9
        buckets = np.ceil(edges, out=edges).astype(np.int64)
        np.clip(buckets, 0, _N_BUCKETS - 1, out=buckets)
        buckets[is_new] = _N_BUCKETS
        for which, value in enumerate(values):
            sums = np.bincount(buckets, value, _N_BUCKETS + 1) / rate
            self._sums[which] += sums
            self._counted[which] += sums.sum()
        if len(self._keys) > self._max_objects:
            # Remove the objects with the greater keys, so that half of the table is free again.
            n_kept = self._max_objects // 2
            self._limit = int(self._keys[n_kept])
            rows = self._rows[:n_kept]
            self._keys, self._rows = self._keys[:n_kept].copy(), np.arange(n_kept)
            self._place, self._weight = self._place[rows], self._weight[rows]
            self._marked = self._marked[rows]
            self._close_gaps()
        return Looked(distances, was_marked)

    def _distances(
        self, keys: Keys, weights: Ints, groups: Ints | None, marks: Flags
    ) -> tuple[Ints, Flags]:
        n, n_places = len(keys), len(self._by_place)
        by_key, ordered = _stable_order(keys)
        is_first = np.ones(n, np.bool_)
        is_first[1:] = ordered[1:] != ordered[:-1]
        distinct = ordered[is_first]
        at = np.searchsorted(self._keys, distinct)
        is_held = np.zeros(len(distinct), np.bool_)
        inside = at < len(self._keys)
        is_held[inside] = self._keys[at[inside]] == distinct[inside]
        held = self._rows[at[is_held]]

        # The place of each look-up's previous use: old ones, then those of the batch; -1: none.
        previous = np.full(n, -1, np.int64)
        previous[by_key[1:]] = np.where(is_first[1:], -1, n_places + by_key[:-1])
        firsts = by_key[is_first]
        previous[firsts[is_held]] = self._place[held]

        was_marked = self._was_marked(marks, by_key, is_first, is_held, held)
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
        marked = was_marked[lasts] | marks[lasts]
        self._by_place = np.r_[self._by_place, np.zeros(n, np.int64)]
        self._move(held, n_places + lasts[is_held], marked[is_held])
        is_new = ~is_held
        new = lasts[is_new]
        self._put(distinct[is_new], at[is_new], n_places + new, weights[new], marked[is_new])
        if len(self._by_place) > 2 * len(self._keys) + n:
            self._close_gaps()
        return distances, was_marked

    def _was_marked(
        self, marks: Flags, by_key: Ints, is_first: Flags, is_held: Flags, held: Ints
    ) -> Flags:
        """Return whether an earlier look-up of the same key was marked, in the table or here."""
        ordered = marks[by_key]
        before: Ints = np.cumsum(ordered) - ordered
        firsts = np.flatnonzero(is_first)
        at_first: Ints = before[firsts]
        at_first[is_held] -= self._marked[held]  # a mark in the table is one more before it
        found = np.zeros(len(marks), np.bool_)
        found[by_key] = before > np.repeat(at_first, np.diff(np.r_[firsts, len(marks)]))
        return found

    def _summed(self, previous: Ints, weights: Ints) -> Ints:
        """Return the distances that follow from the places of the previous uses."""
        n_places = len(self._by_place)
        upto_place = np.r_[0, np.cumsum(self._by_place)]
        is_known = previous >= 0
        known = np.flatnonzero(is_known)
        was = previous[known]
        new_before = np.cumsum(np.where(is_known, 0, weights))
        smaller = new_before[known] + _smaller_in_runs(was, weights[known])
        # Of a previous use in this batch: the look-ups up to it count in `smaller`, but were
        # before it.
        upto = np.cumsum(weights)
        in_batch = was >= n_places
        smaller[in_batch] -= upto[was[in_batch] - n_places]
        distances = np.full(len(previous), -1, np.int64)
        old = upto_place[-1] - upto_place[np.minimum(was + 1, n_places)]
        distances[known] = old + smaller + weights[known]
        return distances

    def _move(self, rows: Ints, places: Ints, marked: Flags) -> None:
        """Give objects of the table new places, which are empty."""
        self._by_place[self._place[rows]] = 0
        self._by_place[places] = self._weight[rows]
        self._place[rows] = places
        self._marked[rows] |= marked

    def _put(self, keys: Keys, at: Ints, places: Ints, weights: Ints, marked: Flags) -> None:
        """Put new objects into the table; `at` are the positions of their keys among the others."""
        n_held, n = len(self._keys), len(keys)
        self._by_place[places] = weights
        self._place = np.r_[self._place, places]
        self._weight = np.r_[self._weight, weights]
        self._marked = np.r_[self._marked, marked]
        is_new = np.zeros(n_held + n, np.bool_)
        is_new[at + np.arange(n)] = True
        self._keys = _interleaved(is_new, keys, self._keys)
        self._rows = _interleaved(is_new, np.arange(n_held, n_held + n), self._rows)
        self.n_seen += n / self.rate
        self.weight_seen += float(weights.sum()) / self.rate

    def _close_gaps(self) -> None:
        row_at = np.full(len(self._by_place), -1, np.int64)
        row_at[self._place] = np.arange(len(self._place))
        order = row_at[row_at >= 0]
        self._place = np.empty_like(order)
        self._place[order] = np.arange(len(order))
        self._by_place = self._weight[order]

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


def _stable_order(keys: Keys) -> tuple[Ints, Keys]:
    """Return the order of a stable argsort, in a third of its time, and the keys in that order.

    The position takes the place of the key's lowest bits, which are needed only where other keys
    have the same higher ones.
    """
    n_bits = np.uint64(len(keys).bit_length())
    packed = (keys >> n_bits << n_bits) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & np.uint64((1 << int(n_bits)) - 1)).astype(np.int64)
    ordered = keys[order]
    if (ordered[1:] < ordered[:-1]).any():
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
    return order, ordered


def _interleaved(is_new: Flags, new: NDArray[Any], old: NDArray[Any]) -> NDArray[Any]:
    found = np.empty(len(is_new), old.dtype)
    found[is_new], found[~is_new] = new, old
    return found


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
    order = np.argsort(values)
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    found = np.zeros(n, np.int64)
    # All are one group first, in time. A group holds all ranks with its higher bits, so it begins
    # at the place of its least rank.
    for bit in range(int(max(n - 1, 0)).bit_length() - 1, -1, -1):
        starts = rank >> (bit + 1) << (bit + 1)
        is_low = (rank >> bit) & 1 == 0
        low = np.cumsum(np.where(is_low, weights, 0))
        low -= np.where(starts, low[starts - 1], 0)
        found += np.where(is_low, 0, low)
        # The low half of each group goes first; the order within the halves stays.
        n_low = np.cumsum(is_low)
        n_low -= np.where(starts, n_low[starts - 1], 0)
        to = np.where(is_low, starts + n_low - 1, np.arange(1 << bit, n + (1 << bit)) - n_low)
        rank, weights, found = _placed(to, rank), _placed(to, weights), _placed(to, found)
    return _placed(order, found)  # it is by rank now


def _placed(to: Ints, values: Ints) -> Ints:
    placed = np.empty_like(values)
    placed[to] = values
    return placed
