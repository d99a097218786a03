"""Replays hash traces into the curve of prefix states, in batches of many prompts."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokcache.replay.curves import mixed
from tokcache.replay.prefixes import Prompts
from tokcache.replay.traces import PromptsOfBlocks

if TYPE_CHECKING:
    from tokcache.replay.curves import Ints, Keys
    from tokcache.replay.prefixes import Prefixes
    from tokcache.replay.traces import Trace

_BATCH_IDS = 1 << 18
_SEED = 0x686173686573
_MAX_TOKENS = 1 << 40  # of a prompt: sums of more would not fit


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
        self._keys: list[Keys] = []
        self._lengths: list[Ints] = []
        self._n_tokens: list[Ints] = []
        self._numbers: list[int] = []
        self._n_ids = 0

    def run(self, trace: Trace) -> Iterator[int]:
        """Replay a trace; yield the number of prompts of each batch."""
        try:
            for some in trace.blocks():
                # At once: the ids of some lines are still in the CPU's cache.
                self._add(some, trace)
                if self._n_ids >= _BATCH_IDS:
                    yield self._flush(trace)
        finally:  # of an interrupted run, too
            n_last = self._flush(trace)
        yield n_last

    def _add(self, some: PromptsOfBlocks, trace: Trace) -> None:
        try:
            if some.n_tokens and (
                set(map(type, some.n_tokens)) != {int}
                or min(some.n_tokens) < 0
                or max(some.n_tokens) > _MAX_TOKENS
            ):
                raise ValueError("lengths are integers")  # noqa: TRY301 (caught with numpy's own)
            together: list[int] = []
            for each in some.ids:
                together += each  # in half of the time that itertools.chain takes
            ids = _packed(together)
            n_tokens = _packed(some.n_tokens)
        except (TypeError, ValueError, OverflowError, struct.error):
            if len(some.ids) == 1:
                where = f"{trace.source.name}, {trace.source.unit} {some.numbers[0]}"
                why = "its ids are not 64-bit integers, or its length is not a number of tokens"
                trace.source.skipped.add(where, why)
                return
            for number, one, n in zip(some.numbers, some.ids, some.n_tokens, strict=True):
                self._add(PromptsOfBlocks((number,), (one,), (n,), some.scope), trace)
            return
        self._keys.append(mixed(ids.view(np.uint64), _SEED + (some.scope << 40)))
        self._lengths.append(_packed(list(map(len, some.ids))))
        self._n_tokens.append(n_tokens)
        self._numbers += some.numbers
        self._n_ids += len(ids)

    def _flush(self, trace: Trace) -> int:
        if not self._numbers:
            return 0
        if self.prefixes is None:
            self.prefixes = self._make(trace.block_tokens)
        lengths = np.concatenate(self._lengths)
        prompts = Prompts(
            np.concatenate(self._keys),
            lengths,
            lengths,
            np.concatenate(self._n_tokens),
            self._numbers,
            f"{trace.source.name}, {trace.source.unit}",
        )
        self._begin()
        self.prefixes.add(prompts)
        return len(lengths)


def _packed(values: Sequence[int]) -> Ints:
    """Return an array in a third of the time that numpy takes; struct.error if one is no int.

    Integers from 2**63 on, which unsigned hashes are, become the negative ones with their bits.
    """
    try:
        return np.frombuffer(struct.pack(f"{len(values)}q", *values), np.int64)
    except struct.error:
        return np.frombuffer(struct.pack(f"{len(values)}Q", *values), np.int64)
