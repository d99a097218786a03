"""Renders the demo's result as a table and a few lines of text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tokcache.demo.replay import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tokcache.demo.backends import Held
    from tokcache.demo.replay import Outcome, Side
    from tokcache.stats import CacheStats

_KINDS = {
    Kind.NEW: "a prompt with a new beginning",
    Kind.CONTINUES: "a prompt that continues an earlier one",
    Kind.AGAIN: "a repeated prompt",
}
_MILLI, _MICRO = 1e-3, 1e-6


@dataclass(frozen=True, slots=True)
class Summary:
    """The outcomes of a replay and the counters before and after it."""

    outcomes: Sequence[Outcome]
    before: CacheStats
    after: CacheStats
    held: Held | None

    @property
    def text_hit_rate(self) -> float:
        """Share of texts that the engine did not encode: in L0, or all chunks in L1."""
        found, before = self.after.l0, self.before.l0
        n_texts = found.hits + found.misses - before.hits - before.misses
        hits = found.hits - before.hits + self.after.l1.hits - self.before.l1.hits
        return hits / n_texts if n_texts else 0.0

    @property
    def char_hit_rate(self) -> float | None:
        """Share of the characters of texts not in L0 that were in cached chunks."""
        now, before = self.after.l1, self.before.l1
        n_chars = now.lookup_chars - before.lookup_chars
        missed = now.chunk_miss_chars - before.chunk_miss_chars
        return 1 - missed / n_chars if n_chars else None

    @property
    def has_model(self) -> bool:
        """Whether a model continued the prompts."""
        return any(outcome.plain.generation for outcome in self.outcomes)

    def differences(self) -> list[str]:
        """Return a description of each request whose two sides differ."""
        found = ((n, each.difference()) for n, each in enumerate(self.outcomes, start=1))
        return [f"request {number}: {difference}" for number, difference in found if difference]

    def n_prompt_tokens(self) -> int:
        """Return the number of prompt tokens of all requests."""
        return sum(len(outcome.plain.token_ids) for outcome in self.outcomes)

    def n_decoded(self, side: Callable[[Outcome], Side]) -> int:
        """Return the number of prompt tokens that a side's model decoded."""
        generations = (side(outcome).generation for outcome in self.outcomes)
        return sum(generation.n_decoded for generation in generations if generation)

    def n_generated(self) -> int:
        """Return the number of generated tokens that were compared."""
        generations = (outcome.plain.generation for outcome in self.outcomes)
        return sum(len(generation.token_ids) for generation in generations if generation)


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the figures of each prompt, in the order of the demo.

    Units: tokens; seconds to the first token, tokenization included (without a model: to the ids).
    """
    return {
        "cores": os.cpu_count(),
        "differences": summary.differences(),
        "prompts": [
            {
                "kind": str(outcome.kind),
                "n_tokens": len(outcome.plain.token_ids),
                "without_s": outcome.plain.first_token_s,
                "with_s": outcome.cached.first_token_s,
            }
            for outcome in summary.outcomes
        ],
    }


def _plain(outcome: Outcome) -> Side:
    return outcome.plain


def _cached(outcome: Outcome) -> Side:
    return outcome.cached


def table(summary: Summary) -> Table:
    """Return a table of both sides' times."""
    made = Table(show_edge=False, pad_edge=False, box=None)
    made.add_column("")
    for name in ("without", "with tokcache", "gain"):
        made.add_column(name, justify="right", no_wrap=True)
    _add_times(made, summary, "Tokenization, median of", lambda side: side.tokenize_s)
    if summary.has_model:
        _add_times(made, summary, "Time to first token, median of", lambda side: side.first_token_s)
        made.add_section()
        made.add_row("[bold]All requests together[/bold]")
        outcomes = summary.outcomes
        first = [sum(side(each).first_token_s for each in outcomes) for side in (_plain, _cached)]
        _add_row(made, "time to first token", (first[0], first[1]))
        last = [sum(side(each).seconds for each in outcomes) for side in (_plain, _cached)]
        _add_row(made, "until the last token", (last[0], last[1]))
        decoded = (summary.n_decoded(_plain), summary.n_decoded(_cached))
        _add_row(made, "prompt tokens decoded", decoded, "{:,}".format)
    return made


def _add_times(made: Table, summary: Summary, title: str, time_of: Callable[[Side], float]) -> None:
    made.add_row(f"[bold]{title}[/bold]")
    for kind, name in _KINDS.items():
        chosen = [outcome for outcome in summary.outcomes if outcome.kind is kind]
        if chosen:
            pair = (
                median(time_of(outcome.plain) for outcome in chosen),
                median(time_of(outcome.cached) for outcome in chosen),
            )
            _add_row(made, f"{name} ({len(chosen)})", pair)


def _add_row(
    made: Table,
    name: str,
    pair: tuple[float, float],
    write: Callable[[float], str] | None = None,
) -> None:
    write = write or duration
    without, with_ = pair
    ratio = f"{without / with_:,.1f}x" if with_ else ""
    made.add_row(f"  {name}", write(without), write(with_), ratio)


def duration(seconds: float) -> str:
    """Return a time as text, in µs, ms or s."""
    if seconds < _MILLI:
        return f"{seconds / _MICRO:.1f} µs"
    return f"{seconds / _MILLI:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def lines(summary: Summary) -> Iterator[str]:
    """Yield the lines below the table; the last one says whether both sides are identical."""
    n_bytes = summary.after.l0.n_bytes + summary.after.l1.n_bytes
    n_tokens, chars, held = summary.n_prompt_tokens(), summary.char_hit_rate, summary.held
    rates = f"{summary.text_hit_rate:.0%} of the texts"
    if chars is not None:
        rates += f", {chars:.0%} of the characters of the others"
    if summary.has_model:
        reused = 1 - summary.n_decoded(_cached) / n_tokens if n_tokens else 0.0
        rates += f", {reused:.0%} of the prompt tokens"
    yield f"Hit rate:   {rates}"
    of_states = "" if held is None else f", {_size(held.n_bytes)} of states {held.where}"
    yield f"Bytes held: {_size(n_bytes)} of texts, segments and ids{of_states}"
    for reason, count in (held.refusals if held else {}).items():
        yield f"Not used:   {count} states ({reason})"
    differences = summary.differences()
    for difference in differences[:5]:
        yield f"Different:  {difference}"
    generated = f" and {summary.n_generated():,} greedy tokens" if summary.has_model else ""
    compared = f"{n_tokens:,} prompt ids{generated} compared"
    yield f"Identical:  {'NO' if differences else 'yes'} ({compared})"


def _size(n_bytes: int) -> str:
    kibi, mebi = 1 << 10, 1 << 20
    if n_bytes < kibi:
        return f"{n_bytes} bytes"
    if n_bytes < mebi:
        return f"{n_bytes / kibi:.0f} KiB"
    return f"{n_bytes / mebi:,.1f} MiB"
