"""Replays texts: through a wrapped tokenizer, and into the curves of L0, L1 and prefix states.

The tokenizer that encodes the texts is a wrapped one, so a replay takes less time than encoding,
and its times are those of real look-ups. Encodings without a cache are timed on a sample: all texts
until half a second is spent, then as many as take a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tokcache.errors import TokcacheError
from tokcache.replay.curves import Floats, Keys, Looked, StackDistances, mixed
from tokcache.replay.prefixes import Prefixes, Prompts
from tokcache.text._native import is_native
from tokcache.text.engines.copying import is_of_library

if TYPE_CHECKING:
    from tokcache.replay.traces.request import Message, Request
    from tokcache.text.segments.cache import L1
    from tokcache.text.tokenizer import WrappedTokenizer

BLOCK_TOKENS = 16  # counted more finely than stored: a restored block may be trimmed
_BATCH = 1 << 16
_SEED = 0x746F6B63
# Bytes of an entry besides its text and ids, as the caches count them; measured with
# `L0Cache.memory_usage` and `L1Stats.n_bytes`.
_L0_ENTRY_BYTES, _L1_CHUNK_BYTES = 205, 100
# The table of segments inside chunks, which tokenizers' own encoder uses: its first size, what an
# entry takes when it is half full, and its greatest share of L1 (ext/tokcache/text/segments).
_SEGMENT_TABLE_BYTES, _SEGMENT_BYTES, _SEGMENT_SHARE = 1 << 14, 128, 4
# The native table of texts whose chunks are all known: its share of L1, and the least one.
_BEGINNING_SHARE, _LEAST_BEGINNINGS_BYTES = 8, 1 << 16
_FIRST_SAMPLE_S, _SAMPLE_SHARE = 0.5, 0.1
_N_TIMES = 64 * 16  # a sixteenth of a factor of two each, from 2**-32 s


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with and without a cache, and its form of chats.

    `wrapped` is None if no text may stay in memory; L1's cuts still come from `cuts`. `is_sample`:
    nobody named a tokenizer, and this one has fewer tokens than that of any real model.
    """

    name: str
    chats_as: str
    plain: Any
    cuts: WrappedTokenizer
    wrapped: WrappedTokenizer | None
    render: Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]
    is_sample: bool = False


@dataclass(slots=True)
class Times:
    """A histogram of times with buckets 4% wide: constant memory for any number.

    Units: seconds.
    """

    counts: Floats = field(default_factory=lambda: np.zeros(_N_TIMES))
    total_s: float = 0.0
    n_tokens: int = 0

    def add(self, seconds: float, n_tokens: int) -> None:
        """Count one time."""
        at = int((np.log2(max(seconds, 2.0**-32)) + 32) * 16)
        self.counts[min(at, _N_TIMES - 1)] += 1
        self.total_s += seconds
        self.n_tokens += n_tokens

    def ecdf(self) -> tuple[list[float], list[float]]:
        """Return times and the share of all that took no longer."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return [], []
        at = np.arange(used[0], used[-1] + 1)
        shares = np.cumsum(self.counts[at]) / self.counts.sum()
        return (2.0 ** ((at + 1) / 16 - 32)).tolist(), shares.tolist()


class Layer:
    """Look-ups of one text layer, in batches.

    Sums: look-ups, and their tokens (L0) or characters (L1). Weights are bytes in the cache. All
    look-ups of one `add` come before what they store.
    """

    def __init__(self, rate: float, max_objects: int) -> None:
        self.distances = StackDistances(2, rate=rate, max_objects=max_objects)
        self._keys: list[int] = []
        self._weights: list[int] = []
        self._values: list[int] = []
        self._groups: list[int] = []
        self._n_added = 0

    def add(self, keys: Iterable[int], weights: Iterable[int], values: Iterable[int]) -> None:
        """Count the look-ups of one text."""
        n_before = len(self._keys)
        self._keys.extend(keys)
        self._weights.extend(weights)
        self._values.extend(values)
        self._groups += [self._n_added] * (len(self._keys) - n_before)
        self._n_added += 1
        if len(self._keys) >= _BATCH:
            self.flush()

    def flush(self) -> Looked:
        """Count the look-ups that wait for a full batch."""
        keys = np.array(self._keys, np.uint64)
        weights = np.array(self._weights, np.int64)
        groups = np.array(self._groups, np.int64)
        values = np.stack([np.ones(len(keys)), np.array(self._values, np.float64)])
        totals = values.sum(axis=1)
        index = self.distances.sampled(keys)
        if index is not None:
            keys, weights, values = keys[index], weights[index], values[:, index]
            groups = groups[index]
        self._keys, self._weights, self._values, self._groups = [], [], [], []
        return self.distances.look_up(keys, weights, values, totals, groups=groups)


class TextReplay:
    """Counts what L0, L1 and states would have of each text; `flush` before reading figures.

    Generated text is stored with a prompt's state as `generated` says: "ids" stores replies whose
    token ids are in the trace; "reencoded" stores the ids of prompt and reply encoded together.

    Units:  `n_skipped_s` and other times in seconds.
    Threads: one.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        generated: str,
        size: float | None,
        rate: float,
        max_objects: int,
    ) -> None:
        self.encoder = encoder
        self.l0 = Layer(rate, max_objects)
        self.l1 = Layer(rate, max_objects)
        self.prefixes = Prefixes(BLOCK_TOKENS, size=size, rate=rate, max_objects=max_objects)
        self.with_cache, self.plain = Times(), Times()
        self.n_texts = self.n_chars = self.n_tokens = self.n_left_out = 0
        self.n_replies = self.n_reply_tokens = 0
        self._generated = generated
        self._began = perf_counter()
        self._blocks: list[Keys] = []
        self._rows: list[tuple[int, int, int]] = []
        self._places: list[str | int] = []
        self._n_blocks = 0

    @property
    def l1_of_cuts(self) -> L1 | None:
        """The segment cache that cuts texts; None if this tokenizer's texts are not cut."""
        found: L1 | None = self.encoder.cuts._tokcache.l1  # noqa: SLF001 (ours)
        return None if found is None or found.off is not None else found

    def l1_rates(self, sizes: Sequence[float] | Floats) -> Floats:
        """Return the share of characters in cached chunks for each size of L1.

        The chunks have what the other two tables leave: that of segments, which doubles until it
        is half empty, and that of whole beginnings of texts.
        """
        wrapped, budget = self.encoder.wrapped, np.asarray(sizes, np.float64)
        n_segments = 0 if wrapped is None else wrapped.cache_stats().l1.n_segments
        if n_segments:
            wanted = max(_SEGMENT_TABLE_BYTES, n_segments * _SEGMENT_BYTES)
            most = np.minimum(budget / _SEGMENT_SHARE, 2.0**50)
            table = _SEGMENT_TABLE_BYTES * 2.0 ** np.minimum(
                np.floor(np.log2(np.maximum(most, 1) / _SEGMENT_TABLE_BYTES)),
                np.ceil(np.log2(wanted / _SEGMENT_TABLE_BYTES)),
            )
            budget = budget - np.where(most < _SEGMENT_TABLE_BYTES, 0, table)
        if is_native():
            beginnings = np.minimum(np.asarray(sizes) / _BEGINNING_SHARE, 2.0**50)
            budget = budget - np.where(beginnings < _LEAST_BEGINNINGS_BYTES, 0, beginnings)
        return self.l1.distances.hit_rates(budget, 1)

    def add(self, request: Request, place: str) -> str | None:
        """Count a request; return why it can't be, or None."""
        self.n_left_out += request.n_left_out
        ids: Any
        text = ""
        try:
            if request.prompt_ids is not None:
                ids = np.array(request.prompt_ids, np.int32)
            else:
                is_chat = request.text is None
                text = (
                    self.encoder.render(request.messages, request.tools)
                    if is_chat
                    else request.text or ""
                )
                ids = self._encoded(text, not is_chat)
                self._count_text(text, is_chat, len(ids))
            reply = self._reply_ids(request, text, len(ids))
        except TokcacheError as error:
            return str(error)
        except (OverflowError, ValueError, TypeError):
            return "its token ids are no 32-bit integers"
        except BaseException as error:
            if not is_of_library(error):
                raise
            # The tokenizer's own message may quote the text.
            return f"the tokenizer failed on this prompt: {type(error).__name__}"
        self._count_blocks(ids, reply, place)
        return None

    def _encoded(self, text: str, add_special_tokens: bool) -> Any:
        """Return the ids, and time the cache and, now and then, the plain tokenizer."""
        encoder = self.encoder
        ids: Any = None
        if encoder.wrapped is not None:
            began = perf_counter()
            ids = encoder.wrapped.token_ids(text, add_special_tokens=add_special_tokens)
            self.with_cache.add(perf_counter() - began, len(ids))
        spent, now = self.plain.total_s, perf_counter()
        if ids is None or spent < _FIRST_SAMPLE_S + _SAMPLE_SHARE * (now - self._began):
            found = encoder.plain.encode(text, add_special_tokens=add_special_tokens).ids
            self.plain.add(perf_counter() - now, len(found))
            ids = found if ids is None else ids
        return np.array(ids, np.int32) if isinstance(ids, list) else np.asarray(ids)

    def _count_text(self, text: str, is_chat: bool, n_ids: int) -> None:
        self.n_texts += 1
        self.n_chars += len(text)
        self.n_tokens += n_ids
        raw = text.encode()
        width = 1 if len(raw) == len(text) else 2
        key = xxhash.xxh3_64_intdigest(raw, _SEED + is_chat)
        self.l0.add((key,), (len(text) * width + 4 * n_ids + _L0_ENTRY_BYTES,), (n_ids,))
        l1 = self.l1_of_cuts
        spans = None if l1 is None else l1.segments(text, fine=False)
        if l1 is None or spans is None:
            return
        first, _, later = l1.plan.variant_of  # equal ones share their chunks
        ids_a_char = 4 * n_ids / max(len(text), 1)
        keys, weights, lengths = [], [], []
        for start, stop, _ in spans:
            piece = text[start:stop]
            keys.append(
                xxhash.xxh3_64_intdigest(piece.encode(), _SEED + (later if start else first))
            )
            n_chars = stop - start
            bytes_of = n_chars if piece.isascii() else 2 * n_chars
            weights.append(int(bytes_of + ids_a_char * n_chars) + _L1_CHUNK_BYTES)
            lengths.append(n_chars)
        self.l1.add(keys, weights, lengths)

    def _reply_ids(self, request: Request, text: str, n_prompt: int) -> Any:
        """Return the ids that follow the prompt's in the stored state, or None.

        Ids of prompt and reply encoded together count from the end of the prompt on; the prompt's
        last token may be another one there.
        """
        found: Any = None
        if request.reply_ids is not None:
            found = np.array(request.reply_ids, np.int32)
        elif self._generated == "reencoded" and request.reply and text:
            both = self.encoder.plain.encode(text + request.reply, add_special_tokens=False).ids
            found = np.array(both[n_prompt:], np.int32)
        if found is not None:
            self.n_replies += 1
            self.n_reply_tokens += len(found)
        return found

    def _count_blocks(self, ids: Any, reply: Any, place: str) -> None:
        n_looked = len(ids) // BLOCK_TOKENS
        stored = ids if reply is None else np.concatenate([ids, reply])
        n_blocks = len(stored) // BLOCK_TOKENS
        # A key stands for all tokens up to the end of its block: a sum over mixed (id, position).
        n = n_blocks * BLOCK_TOKENS
        tokens = stored[:n].astype(np.uint64) | (np.arange(n, dtype=np.uint64) << np.uint64(32))
        sums = np.cumsum(mixed(tokens, _SEED))[BLOCK_TOKENS - 1 :: BLOCK_TOKENS]
        self._blocks.append(mixed(sums, _SEED))
        self._rows.append((n_blocks, n_looked, len(ids)))
        self._places.append(place)
        self._n_blocks += n_blocks
        if self._n_blocks >= _BATCH:
            self._flush_blocks()

    def _flush_blocks(self) -> None:
        if self._rows:
            lengths, n_looked, n_tokens = np.array(self._rows, np.int64).T
            keys = np.concatenate(self._blocks)
            self.prefixes.add(Prompts(keys, lengths, n_looked, n_tokens, self._places))
        self._blocks, self._rows, self._places, self._n_blocks = [], [], [], 0

    def flush(self) -> None:
        """Count everything that waits for a full batch."""
        self.l0.flush()
        self.l1.flush()
        self._flush_blocks()
