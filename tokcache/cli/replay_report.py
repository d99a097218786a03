"""Prints the figures of `tokcache replay` on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from tokcache.replay.summary import counted, sentence, with_unit

if TYPE_CHECKING:
    from rich.console import Console

    from tokcache.replay.result import Curve, Result


def print_result(console: Console, found: Result) -> None:
    """Print the summary, the curves at a few sizes, the misses and the settings to paste."""
    if found.is_partial:
        console.print("Interrupted: the figures are those of the requests up to then.\n")
    console.print(sentence(found), markup=False, soft_wrap=True)
    console.print()
    head = {
        "Traces": ", ".join(f"{name} ({form})" for name, form in found.traces),
        "Tokenizer": found.tokenizer,
        "Skipped": counted(found.n_skipped, "record") if found.n_skipped else "",
    }
    for name, text in head.items():
        if text:
            console.print(f"{name + ':':11} {text}", markup=False, soft_wrap=True)
    for line in (*found.skipped, *found.notes):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    if found.curves:
        console.print()
        console.print(_curves(found))
    for curve in found.curves:
        for name, rate in curve.others.items():
            console.print(
                f"  {curve.name} without a limit, counted as {name}: {rate:.1%}", markup=False
            )
    _print_misses(console, found)
    if found.curves:
        console.print(f"\n{found.config}", markup=False, soft_wrap=True)


def _curves(found: Result) -> Table:
    made = Table(show_edge=False, pad_edge=False, box=None)
    made.add_column("hit rate of")
    made.add_column("counted")
    for name in ("size/16", "size/4", "this size", "no limit"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("size", justify="right", no_wrap=True)
    for curve in found.curves:
        rates = [curve.rate_at(share * curve.knee_size) for share in (1 / 16, 1 / 4)]
        cells = [f"{rate:.1%}" for rate in (*rates, curve.knee_rate, curve.unlimited)]
        made.add_row(curve.name, curve.counted, *cells, _size(curve))
    return made


def _size(curve: Curve) -> str:
    if curve.unit == "bytes":
        return with_unit(curve.knee_size)
    return f"{curve.knee_size:,.0f} {curve.unit}"


def _print_misses(console: Console, found: Result) -> None:
    misses = found.misses
    if misses is None:
        return
    n_missed = sum(misses.tokens.values())
    console.print(
        f"\nMissed prompt tokens of {misses.n_explained:,} prompts, {misses.size}: {n_missed:,}",
        markup=False,
    )
    for reason, count in sorted(misses.tokens.items(), key=lambda item: -item[1]):
        text = f"  {count / max(n_missed, 1):6.1%} {misses.meanings[reason]}"
        console.print(text, markup=False, soft_wrap=True)
    for one in misses.costliest:
        console.print(
            f"  prompt {one.number} ({one.place}): {one.n_missed:,} of {one.n_tokens:,} tokens; "
            f"{one.reason} after {one.n_reused:,}",
            markup=False,
            soft_wrap=True,
        )
