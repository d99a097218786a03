"""Replays hash traces into the curve of prefix states, in batches of many prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from tokcache.replay.curves import mixed
from tokcache.replay.prefixes import Prompts

if TYPE_CHECKING:
    from tokcache.replay.prefixes import Prefixes
    from tokcache.replay.traces import Trace

_BATCH_IDS = 1 << 16
_SEED = 0x686173686573


class BlockReplay:
    """Counts the blocks of the prompts of hash traces.

    `make` returns the counter for a number of tokens a block, when the first prompt shows it.

    Errors:  InvalidTrace from the trace in strict mode.
    Threads: one.
    """

    def __init__(self, make: Callable[[int], Prefixes]) -> None:
        self._make = make
        self.prefixes: Prefixes | None = None
        self._begin()

    def _begin(self) -> None:
        self._ids: list[Sequence[int]] = []
        self._n_tokens: list[int] = []
        self._scopes: list[int] = []
        self._numbers: list[str | int] = []
        self._n_ids = 0

    def run(self, trace: Trace) -> Iterator[int]:
        """Replay a trace; yield the number of prompts of each batch."""
        source = trace.source
        ids_of, n_tokens_of = self._ids, self._n_tokens
        scopes, numbers = self._scopes, self._numbers
        n_ids = 0
        try:
            for ids, n_tokens, scope in trace.blocks():
                ids_of.append(ids)
                n_tokens_of.append(n_tokens)
                scopes.append(scope)
                numbers.append(source.number)
                n_ids += len(ids)
                if n_ids >= _BATCH_IDS:
                    yield self._flush(trace)
                    ids_of, n_tokens_of = self._ids, self._n_tokens
                    scopes, numbers = self._scopes, self._numbers
                    n_ids = 0
        finally:  # of an interrupted run, too
            n_last = self._flush(trace)
        yield n_last

    def _flush(self, trace: Trace) -> int:
        if not self._ids:
            return 0
        try:
            keys, n_tokens = _arrays(self._ids, self._n_tokens)
        except (TypeError, ValueError, OverflowError):
            self._drop_malformed(trace)
            keys, n_tokens = _arrays(self._ids, self._n_tokens)
        if self.prefixes is None:
            self.prefixes = self._make(trace.block_tokens)
        lengths = np.fromiter(map(len, self._ids), np.int64, len(self._ids))
        scopes = np.array(self._scopes, np.uint64) << np.uint64(40)
        name = f"{trace.source.name}, {trace.source.unit}"
        keys = mixed(keys.view(np.uint64) + np.repeat(scopes, lengths), _SEED)
        self.prefixes.add(Prompts(keys, lengths, lengths, n_tokens, self._numbers, name))
        self._begin()
        return len(lengths)

    def _drop_malformed(self, trace: Trace) -> None:
        kept = []
        for row in zip(self._ids, self._n_tokens, self._scopes, self._numbers, strict=True):
            ids, n_tokens, _, number = row
            try:
                _arrays([ids], [n_tokens])
            except (TypeError, ValueError, OverflowError):
                where = f"{trace.source.name}, {trace.source.unit} {number}"
                trace.source.skipped.add(where, "its ids or its length are no integers")
            else:
                kept.append(row)
        self._begin()
        for ids, n_tokens, scope, number in kept:
            self._ids.append(ids)
            self._n_tokens.append(n_tokens)
            self._scopes.append(scope)
            self._numbers.append(number)


def _arrays(ids: list[Sequence[int]], n_tokens: list[int]) -> tuple[Any, Any]:
    n_ids = sum(map(len, ids))
    counts = np.array(n_tokens)
    if len(counts) and (counts.dtype.kind != "i" or counts.min() < 0):
        raise ValueError("lengths are integers")
    found = np.fromiter(chain.from_iterable(ids), np.int64, n_ids)
    return found, counts.astype(np.int64)
