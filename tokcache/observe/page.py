"""A page of the counters of running caches: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tokcache.replay.report import Chart, Figure, Part, Report, charts, require_libraries
from tokcache.replay.report.page import render
from tokcache.replay.summary import duration, with_unit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokcache.stats import CacheStats, StateStats

_MOST_REASONS = 10
_SINCE = "Counted since the caches were made or cleared."


def page(tokenizer: CacheStats | None = None, states: StateStats | None = None) -> str:
    """Return the HTML of the counters of a wrapped tokenizer, of a prefix-state cache, or of both.

    `tokenizer` is the result of `cache_stats()`, `states` that of `PrefixStateCache.stats()`. The
    page holds numbers and reasons, never text of a prompt.

    Errors: MissingExtra without the libraries of the extra `replay`.
    """
    require_libraries()
    said: list[str] = []
    figures: list[Figure] = []
    parts: list[Part] = []
    held: dict[str, float] = {}
    if tokenizer is not None:
        said.append(_of_tokenizer(tokenizer, figures, parts))
        held["texts (L0)"], held["parts of texts (L1)"] = tokenizer.l0.n_bytes, tokenizer.l1.n_bytes
        held["rendered chats"] = tokenizer.render.n_bytes
    if states is not None:
        said.append(_of_states(states, figures, parts))
        held["states: memory"] = states.n_bytes
        held["states: disk"] = states.disk.n_bytes
    held = {name: n_bytes for name, n_bytes in held.items() if n_bytes}
    if held:
        svg = charts.bars(held, x_label="bytes held now", write=with_unit)
        how = "Keys, values and overhead. Redis reports its own bytes, with INFO."
        parts.append(Chart("Bytes by tier", svg, how))
    sentence = f"{'; '.join(said)}." if said else "No counters were given."
    note = (
        f"{_SINCE} How the hit rate depends on the size, and how long calls take, is not counted "
        "while they run: `tokcache replay` finds both from recorded requests."
    )
    return render(Report("tokcache statistics", sentence, figures, parts, [note]))


def _of_tokenizer(stats: CacheStats, figures: list[Figure], parts: list[Part]) -> str:
    l0, l1 = stats.l0, stats.l1
    n_looked = l0.hits + l0.misses
    if n_looked:
        how = f"of {n_looked:,} look-ups; {l0.hit_tokens:,} tokens from hits"
        figures.append(Figure("L0, equal texts", f"{l0.hit_rate:.0%}", how))
    if l1.lookup_chars:
        how = f"of {l1.lookup_chars:,} characters were in cached chunks"
        figures.append(Figure("L1, equal chunks", f"{l1.char_hit_rate:.0%}", how))
    if stats.encoded_texts:
        how = f"for {stats.encoded_tokens:,} tokens of {stats.encoded_texts:,} texts"
        figures.append(Figure("Encoding", duration(stats.encode_seconds), how))
    calls = Counter({f"bypass: {reason}": n for reason, n in stats.bypasses.items()})
    for layer, counts in (("L0", l0.refusals), ("L1", l1.refusals)):
        calls.update({f"{layer}: {reason}": n for reason, n in counts.items()})
    missed = {
        "texts": l0.misses_by_reason,
        "chunks": l1.chunk_misses_by_reason,
        "segments": l1.segment_misses_by_reason,
    }
    parts += _reasons(
        "Look-ups that missed, by reason",
        {f"{of}: {reason}": n for of, counts in missed.items() for reason, n in counts.items()},
        "look-ups",
        "Of whole texts in L0, and of chunks and segments in L1. A larger budget helps with those "
        "that were evicted.",
    )
    parts += _reasons(
        "Texts that were not cached, by reason",
        calls,
        "calls, texts, chunks or segments",
        "The plain tokenizer answered the bypasses. L0 and L1 did not cut or keep the others.",
    )
    found = l0.hit_tokens + l1.tokens - l1.engine_tokens
    total = l0.hit_tokens + max(l1.tokens, stats.encoded_tokens)
    share = f"{found / total:.0%}" if total else "none"
    return f"The tokenizer's caches gave {share} of {total:,} token ids"


def _of_states(stats: StateStats, figures: list[Figure], parts: list[Part]) -> str:
    n_tokens = stats.prompt_tokens
    figures.append(
        Figure(
            "Prefix states",
            f"{stats.token_hit_rate:.0%}",
            f"of {n_tokens:,} prompt tokens: {stats.restored_tokens:,} restored, "
            f"{stats.context_tokens:,} still in the context",
        )
    )
    how = f"for {stats.hits:,} of {stats.lookups:,} look-ups"
    figures.append(Figure("Restoring", duration(stats.restore_seconds), how))
    how = f"for {stats.saved_tokens:,} tokens in {stats.saved_blocks:,} blocks"
    figures.append(Figure("Saving", duration(stats.save_seconds), how))
    parts += _reasons(
        "Missed prompt tokens, by reason",
        stats.missed_tokens,
        "prompt tokens",
        "Tokens from the place on where a prompt was reused no further.",
    )
    parts += _reasons(
        "States that were not stored or not used, by reason",
        stats.refusals,
        "states",
        "Refusals of memory, disk and Redis together.",
    )
    return f"{stats.token_hit_rate:.0%} of {n_tokens:,} prompt tokens were not decoded again"


def _reasons(title: str, counts: Mapping[str, int], unit: str, how: str) -> list[Chart]:
    most = Counter(counts).most_common(_MOST_REASONS)
    shown = {str(reason): float(n) for reason, n in most if n}
    if not shown:
        return []
    svg = charts.bars(shown, x_label=unit, write=lambda n: f"{n:,.0f}")
    return [Chart(title, svg, f"{how} {_SINCE}")]
