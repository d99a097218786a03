"""One pass over traces: reads them, counts, and returns the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from tokcache.errors import InvalidTrace
from tokcache.replay.advice import configuration
from tokcache.replay.blocks import BlockReplay
from tokcache.replay.curves import MAX_OBJECTS
from tokcache.replay.prefixes import BLOCKS, REASONS, SHARES, TOKENS, Prefixes
from tokcache.replay.result import (
    Curve,
    Misses,
    Prefill,
    Result,
    Tokenization,
    make_curve,
    written_size,
)
from tokcache.replay.texts import Encoder, TextReplay
from tokcache.replay.traces import Skipped, Trace, open_trace

_REPORT_EVERY = 64  # requests between two calls of `on_progress`
_UNLIMITED = (float("inf"),)


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of a replay.

    `generated` is "ids" (replies whose ids are in the trace are stored) or "reencoded".

    Units:  `sample_rate` from 0 to 1; `max_objects` in each curve before it is sampled;
            `state_bytes` of the states whose misses are explained, None: without a limit.
    """

    format_name: str | None = None
    is_strict: bool = False
    sample_rate: float = 1.0
    max_objects: int = MAX_OBJECTS
    generated: str = "ids"
    state_bytes: int | None = None


class Replay:
    """Replays traces; `result` can be read at any time, also after an interrupt.

    `find_encoder` is called when the first trace with texts is opened.

    Errors:  MissingFile, MissingExtra, InvalidTrace.
    Threads: one.
    """

    def __init__(
        self,
        find_encoder: Callable[[], Encoder],
        options: Options,
        prefill: Prefill,
        on_progress: Callable[[int, int | None], None] = lambda _done, _total: None,
    ) -> None:
        self._find_encoder = find_encoder
        self._options, self._prefill = options, prefill
        self._on_progress = on_progress
        self._skipped = Skipped(options.is_strict)
        self._traces: list[tuple[str, str]] = []
        self._texts: TextReplay | None = None
        self._blocks = BlockReplay(
            lambda block_tokens: Prefixes(
                block_tokens,
                size=self._blocks_of(block_tokens),
                rate=options.sample_rate,
                max_objects=options.max_objects,
            )
        )
        self._n_without_text = self._n_tokens_without_text = 0
        self._began = perf_counter()
        self._seconds = 0.0

    def run(self, paths: Sequence[str]) -> None:
        """Replay the files in their order."""
        if len(paths) > 1:
            self._check(paths)
        scope = 1
        try:
            for path in paths:
                trace = open_trace(path, self._skipped, self._options.format_name)
                trace.first_scope = scope
                self._traces.append((trace.source.name, trace.format_name))
                try:
                    (self._run_texts if trace.has_text else self._run_blocks)(trace)
                finally:
                    trace.source.close()
                scope = trace.first_scope + 1
        finally:
            self._seconds = perf_counter() - self._began

    def _check(self, paths: Sequence[str]) -> None:
        """Find files that are absent or can't be counted together, before hours of work."""
        names: dict[bool, str] = {}
        for path in paths:
            if path == "-" or Path(path).is_fifo() or Path(path).is_char_device():
                continue  # can be read only once
            trace = open_trace(path, Skipped(), self._options.format_name)
            trace.source.close()
            if trace.source.head.strip():
                names[trace.has_text] = path
        if len(names) > 1:
            raise InvalidTrace(
                f"{names[True]} has texts and {names[False]} ids of blocks, which can't be counted "
                "together; replay them one by one"
            )

    def _blocks_of(self, block_tokens: int) -> float | None:
        """Return the number of blocks that fit into `state_bytes`."""
        kv, n_bytes = self._prefill.kv_bytes_per_token, self._options.state_bytes
        return None if n_bytes is None or not kv else n_bytes / kv / block_tokens

    def _run_blocks(self, trace: Trace) -> None:
        for _ in self._blocks.run(trace):
            found = self._blocks.prefixes
            if found is not None and trace.block_tokens not in {0, found.block_tokens}:
                raise InvalidTrace(
                    f"{trace.source.name} has blocks of {trace.block_tokens} tokens, the traces "
                    f"before it {found.block_tokens}; replay them one by one"
                )
            self._on_progress(trace.source.position(), trace.source.n_bytes)

    def _run_texts(self, trace: Trace) -> None:
        for n, request in enumerate(trace.requests()):
            if not request.has_text:
                self._n_without_text += 1
                self._n_tokens_without_text += request.n_tokens or 0
                continue
            if self._texts is None:
                self._texts = TextReplay(
                    self._find_encoder(),
                    generated=self._options.generated,
                    size=self._blocks_of(16),
                    rate=self._options.sample_rate,
                    max_objects=self._options.max_objects,
                )
            why = self._texts.add(request, trace.source.where)
            if why is not None:
                self._skipped.add(trace.source.where, why)
            if n % _REPORT_EVERY == 0:
                self._on_progress(trace.source.position(), trace.source.n_bytes)

    # ---- the figures

    def result(self, *, is_partial: bool = False) -> Result:
        """Return the figures of all requests up to now."""
        texts, blocks = self._texts, self._blocks.prefixes
        if texts is not None:
            texts.flush()
        prefixes = texts.prefixes if texts is not None else blocks
        if texts is not None and blocks is not None:
            raise InvalidTrace(
                "texts and ids of blocks can't be counted together; replay them one by one"
            )
        curves = _text_curves(texts) if texts is not None else []
        if prefixes is not None and prefixes.n_prompts:
            curves.append(_state_curve(prefixes, self._prefill))
        n_prompts = prefixes.n_prompts if prefixes else 0
        n_tokens = prefixes.n_tokens if prefixes else 0
        return Result(
            traces=tuple(self._traces),
            n_prompts=n_prompts,
            n_tokens=n_tokens,
            n_chars=texts.n_chars if texts else 0,
            seconds=self._seconds,
            is_partial=is_partial,
            n_skipped=self._skipped.n,
            skipped=tuple(self._skipped.named),
            n_without_text=self._n_without_text,
            n_tokens_without_text=self._n_tokens_without_text,
            notes=tuple(self._notes(texts, prefixes)),
            tokenizer=texts.encoder.name if texts and texts.n_texts else "",
            is_sample_tokenizer=bool(texts and texts.n_texts and texts.encoder.is_sample),
            curves=tuple(curves),
            misses=self._misses(prefixes),
            tokenization=_tokenization(texts) if texts and texts.n_texts else None,
            prefill=self._prefill,
            config=configuration(curves, self._prefill, n_prompts),
        )

    def _notes(self, texts: TextReplay | None, prefixes: Prefixes | None) -> list[str]:
        notes = []
        if self._n_without_text:
            notes.append(
                f"{self._n_without_text:,} requests have no text, only counts of tokens "
                f"({self._n_tokens_without_text:,} of prompts): no cache can be replayed from "
                "them; applications record messages only if they opt in"
            )
        if texts is not None:
            if texts.n_texts:
                notes.append(f"Chats as: {texts.encoder.chats_as}")
            else:
                notes.append("The token ids are those of the trace: nothing was tokenized")
            if texts.n_left_out:
                notes.append(f"{texts.n_left_out:,} parts that are not text were left out")
            if texts.n_texts and texts.l1_of_cuts is None:
                notes.append("L1 is off for this tokenizer; `tokcache explain` says why")
            if texts.n_replies:
                how = (
                    "encoded again after their prompts, as --generated reencoded asks for"
                    if self._options.generated == "reencoded"
                    else "with the ids that the trace has"
                )
                notes.append(
                    f"Generated text is part of the stored states: {texts.n_replies:,} replies, "
                    f"{texts.n_reply_tokens:,} tokens, {how}"
                )
            else:
                notes.append(
                    "Generated text is not part of the stored states: the trace has no token ids "
                    "of it"
                )
        if prefixes is not None and prefixes.distances.rate < 1:
            notes.append(
                f"{prefixes.distances.rate:.2%} of all blocks were looked at (SHARDS sampling)"
            )
        return notes

    def _misses(self, prefixes: Prefixes | None) -> Misses | None:
        if prefixes is None or not prefixes.n_explained:
            return None
        size = self._options.state_bytes
        is_sized = size is not None and self._prefill.kv_bytes_per_token
        counts = {one: n for one, n in prefixes.missed_tokens.items() if n}
        return Misses(
            f"{written_size(size)} of states" if is_sized and size else "no limit",
            prefixes.n_explained,
            counts,
            {one: REASONS[one] for one in counts},
            tuple(prefixes.costliest),
        )


def _text_curves(texts: TextReplay) -> list[Curve]:
    l0, l1 = texts.l0.distances, texts.l1.distances
    curves = []
    if l0.totals[0]:
        tokens = {"tokens": float(l0.hit_rates(_UNLIMITED, 1)[0])}
        curves.append(
            make_curve("L0", "texts that are equal", "bytes", l0, l0.hit_rates, others=tokens)
        )
    if l1.totals[0]:
        chunks = {"chunks": float(l1.hit_rates(_UNLIMITED)[0])}

        counted = "characters in cached chunks"
        curves.append(make_curve("L1", counted, "bytes", l1, texts.l1_rates, others=chunks))
    return curves


def _state_curve(prefixes: Prefixes, prefill: Prefill) -> Curve:
    kv = prefill.kv_bytes_per_token
    others = {
        "blocks": float(prefixes.hit_rates(_UNLIMITED, BLOCKS)[0]),
        "mean of the prompts": float(prefixes.hit_rates(_UNLIMITED, SHARES)[0]),
    }
    return make_curve(
        "states",
        f"prompt tokens in cached blocks of {prefixes.block_tokens}",
        "bytes" if kv else "tokens",
        prefixes.distances,
        lambda sizes: prefixes.hit_rates(np.asarray(sizes), TOKENS),
        scale=prefixes.block_tokens * (kv or 1),
        others=others,
    )


def _tokenization(texts: TextReplay) -> Tokenization:
    plain, cached = texts.plain, texts.with_cache
    has_cache = texts.encoder.wrapped is not None
    per_token = plain.total_s / max(plain.n_tokens, 1)
    return Tokenization(
        per_token * texts.n_tokens,
        cached.total_s if has_cache else None,
        plain.n_tokens,
        plain.ecdf(),
        cached.ecdf() if has_cache else ([], []),
    )
