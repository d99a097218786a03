"""Prefix states: which blocks of each prompt an earlier prompt stored, for every size at once.

A block can be used only with all blocks before it. It is used whenever they are, so the blocks of a
prompt are counted last one first: then the beginning of a prompt is never less recent than the
rest of it, as in `state.retention`, and a block that hits has only hits before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokcache.replay.curves import MAX_OBJECTS, Floats, Ints, Keys, Looked, StackDistances

BLOCKS, TOKENS, SHARES = range(3)  # the sums that are counted
N_COSTLIEST = 10

NEW, DIFFERS, CONTINUES, REST, EVICTED = "new", "differs", "continues", "rest", "evicted"
REASONS = {
    NEW: "no earlier prompt begins like it",
    DIFFERS: "it differs from the earlier prompt it begins like",
    CONTINUES: "it goes on after the end of an earlier prompt",
    REST: "its end is less than a block",
    EVICTED: "stored before, but evicted at this size",
}


@dataclass(frozen=True, slots=True)
class CostlyPrompt:
    """A prompt with many tokens that no state covers.

    Units: `number` counts prompts from 1; `place` is the record, `n_reused` the tokens found.
    """

    n_missed: int
    number: int
    place: str
    n_tokens: int
    n_reused: int
    reason: str


@dataclass(frozen=True, slots=True)
class Prompts:
    """A batch of prompts. `places` are their records, or the records' numbers in `source`.

    Shapes: keys of all blocks, prompt by prompt; for each prompt the number of its blocks, of those
            looked up (the others, of generated text, are only stored), and its tokens.
    """

    keys: Keys
    lengths: Ints
    n_looked: Ints
    n_tokens: Ints
    places: Sequence[str | int]
    source: str = ""


class Prefixes:
    """Hits of prefix blocks by size, misses by reason, and the costliest prompts.

    With `size` (in blocks) reasons and prompts are those of a cache of that size, else of one
    without a limit. They are counted as long as all blocks are looked at: `n_explained` prompts.

    Units:  `block_tokens` tokens a block.
    Threads: one.
    """

    def __init__(
        self,
        block_tokens: int,
        *,
        size: float | None = None,
        rate: float = 1.0,
        max_objects: int = MAX_OBJECTS,
    ) -> None:
        self.block_tokens = block_tokens
        self.distances = StackDistances(3, rate=rate, max_objects=max_objects)
        self.n_prompts = self.n_tokens = self.n_explained = 0
        self.missed_tokens: Counter[str] = Counter()
        self.costliest: list[CostlyPrompt] = []  # the costliest first
        self._size = size

    def add(self, prompts: Prompts) -> None:
        """Count a batch of prompts."""
        lengths, n_looked, n_tokens = prompts.lengths, prompts.n_looked, prompts.n_tokens
        keys = prompts.keys
        self.n_prompts += len(lengths)
        self.n_tokens += int(n_tokens.sum())
        starts = np.cumsum(lengths) - lengths
        reachable = np.minimum(n_looked * self.block_tokens, n_tokens)
        share_of_token = 1 / np.maximum(n_tokens, 1)
        totals = np.array(
            [n_looked.sum(), reachable.sum(), (reachable * share_of_token).sum()], np.float64
        )
        index = self.distances.sampled(keys)
        # Last blocks first: the blocks of each prompt backwards, prompts in their order.
        if index is None:
            prompt, firsts, counts = np.repeat(np.arange(len(lengths)), lengths), starts, lengths
        else:
            prompt = np.searchsorted(starts + lengths, index, side="right")
            counts = np.bincount(prompt, minlength=len(lengths))
            firsts = np.cumsum(counts) - counts
        turned = np.repeat(2 * firsts + counts - 1, counts) - np.arange(len(prompt))
        at = turned if index is None else index[turned]
        offset = at - np.repeat(starts, counts)
        is_looked = offset < np.repeat(n_looked, counts)
        values = np.empty((3, len(at)))
        values[BLOCKS] = is_looked
        # The last block of a prompt may have fewer tokens.
        tokens = np.repeat(n_tokens, counts) - offset * self.block_tokens
        np.clip(tokens, 0, self.block_tokens, out=tokens)
        np.multiply(tokens, is_looked, out=values[TOKENS])
        np.multiply(values[TOKENS], np.repeat(share_of_token, counts), out=values[SHARES])
        found = self.distances.look_up(
            keys[at],
            np.ones(len(at), np.int64),
            values,
            totals,
            groups=prompt,
            marks=offset < np.repeat(lengths - 1, counts),
        )
        if index is None:
            self._explain(found, turned, starts, prompts)

    def _explain(self, found: Looked, turned: Ints, starts: Ints, prompts: Prompts) -> None:
        """Count the missed tokens of each prompt by reason, and keep the costliest prompts."""
        n_looked, n_tokens = prompts.n_looked, prompts.n_tokens
        distances, was_marked = found.distances[turned], found.was_marked[turned]
        n_seen = _n_leading(distances >= 0, starts, n_looked)
        limit = np.inf if self._size is None else self._size
        n_hit = _n_leading((distances >= 0) & (distances <= limit), starts, n_looked)
        n_reused = np.minimum(n_hit * self.block_tokens, n_tokens)
        n_evicted = np.minimum(n_seen * self.block_tokens, n_tokens) - n_reused
        n_new = n_tokens - n_reused - n_evicted
        last = np.maximum(starts + n_seen - 1, 0)
        marked = was_marked[last] if len(was_marked) else np.zeros(len(starts), np.bool_)
        reasons = np.select(
            [n_seen == n_looked, n_seen == 0, marked], [REST, NEW, DIFFERS], CONTINUES
        )
        for reason in (REST, NEW, DIFFERS, CONTINUES):
            self.missed_tokens[reason] += int(n_new[reasons == reason].sum())
        self.missed_tokens[EVICTED] += int(n_evicted.sum())
        n_missed = n_tokens - n_reused
        first = self.n_explained
        self.n_explained += len(starts)
        for at in np.argsort(-n_missed, kind="stable")[:N_COSTLIEST].tolist():
            place = prompts.places[at]
            one = CostlyPrompt(
                int(n_missed[at]),
                first + at + 1,
                place if isinstance(place, str) else f"{prompts.source} {place}",
                int(n_tokens[at]),
                int(n_reused[at]),
                EVICTED if n_evicted[at] > n_new[at] else str(reasons[at]),
            )
            self.costliest.append(one)
        self.costliest.sort(key=lambda one: -one.n_missed)  # stable: the first one of equals stays
        del self.costliest[N_COSTLIEST:]

    def hit_rates(self, sizes: Sequence[float] | Floats, which: int = TOKENS) -> Floats:
        """Return the hit rate at each size: of blocks, of tokens, or averaged over prompts.

        Units: sizes in blocks.
        """
        rates = self.distances.hit_rates(sizes, which)
        # Tokens after the blocks of a prompt are never hits.
        totals = (self.distances.totals[BLOCKS], self.n_tokens, self.n_prompts)
        found: Floats = rates * self.distances.totals[which] / max(totals[which], 1)
        return found


def _n_leading(is_hit: np.ndarray[tuple[int], np.dtype[np.bool_]], starts: Ints, n: Ints) -> Ints:
    """Return how many of each prompt's first `n` blocks hit before the first miss."""
    misses = np.r_[np.flatnonzero(~is_hit), len(is_hit)]
    next_miss = misses[np.searchsorted(misses, starts)]
    found: Ints = np.minimum(next_miss - starts, n)
    return found
