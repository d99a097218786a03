"""The page of a replay."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokcache.replay.report import Chart, Code, Figure, Report, Table, charts
from tokcache.replay.report.page import render
from tokcache.replay.summary import duration, sentence, with_unit

if TYPE_CHECKING:
    from tokcache.replay.result import Curve, Result

_LRU = "One pass over the look-ups gives the hits of an LRU cache of every size (stack distances). "
_NAMES = {"L0": "L0, equal texts", "L1": "L1, equal parts", "states": "Prefix states"}


def page(found: Result) -> str:
    """Return the HTML of a replay's figures."""
    return render(report(found))


def report(found: Result) -> Report:
    """Return the figures of a replay as a report."""
    parts: list[Chart | Table | Code] = [*_curves(found), *_times(found)]
    if found.misses is not None and found.misses.tokens:
        parts.append(_misses(found))
    sized = {_NAMES[one.name]: one for one in found.curves if one.unit == "bytes"}
    if sized:
        parts.append(_bytes(sized))
    if found.misses is not None and found.misses.costliest:
        parts.append(_costliest(found))
    if found.curves:
        how = "The smallest sizes with 95% of the hits that unlimited ones have, and a fifth more."
        parts.append(Code("Settings to paste", found.config, how))
    notes = [f"Trace: {Path(name).name} ({form})" for name, form in found.traces]
    if found.is_partial:
        notes.insert(0, "The replay was interrupted: figures are those of the requests up to then.")
    if found.n_skipped:
        were = "record was" if found.n_skipped == 1 else "records were"
        notes.append(f"{found.n_skipped:,} {were} skipped; the first ones:")
        notes += found.skipped
    return Report(
        "tokcache replay", sentence(found), _figures(found), parts, [*notes, *found.notes]
    )


def _figures(found: Result) -> list[Figure]:
    figures = [Figure("Prompts", f"{found.n_prompts:,}", f"{found.n_tokens:,} tokens")]
    for curve in found.curves:
        if curve.name == "L0" and curve.unlimited < found.curves[-1].unlimited / 10:
            continue  # whole texts seldom repeat: the chart shows it
        size = curve.knee_size
        room = with_unit(size) if curve.unit == "bytes" else f"{_count(size)} {curve.unit}"
        how = f"of {curve.counted}, with {room}"
        figures.append(Figure(_NAMES[curve.name], f"{curve.knee_rate:.0%}", how))
    timed = found.tokenization
    if timed is not None and timed.with_s is not None:
        how = f"instead of {duration(timed.without_s)}"
        figures.append(Figure("Tokenization", duration(timed.with_s), how))
    if found.prefill_s is not None:
        without, with_ = found.prefill_s
        figures.append(Figure("Prefill", duration(with_), f"instead of {duration(without)}"))
    return figures


def _name(tokenizer: str) -> str:
    """Return a tokenizer's name without the folders of its path."""
    return Path(tokenizer).name if Path(tokenizer).exists() else tokenizer


def _tick(size: float) -> str:
    """Return a power of two as text: 1 GiB, where `with_unit` says 1024 MiB."""
    at = min(int(math.log2(max(size, 1))) // 10, 4)
    return f"{size / 1024**at:.0f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[at]}"


def _count(value: float) -> str:
    for suffix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.0f}"


def _curves(found: Result) -> list[Chart]:
    made = []
    for curves, title in (
        ([one for one in found.curves if one.name != "states"], "the tokenizer's cache"),
        ([one for one in found.curves if one.name == "states"], "prefix states"),
    ):
        if not curves:
            continue
        unit = curves[0].unit
        counted = "; ".join(f"{_NAMES[one.name]}: share of {one.counted}" for one in curves)
        sampled = min(one.sample_rate for one in curves)
        how = f"{_LRU}{counted}."
        for one in curves:
            for name, rate in one.others.items():
                how += f" {_NAMES[one.name]}, counted as {name}, without a limit: {rate:.1%}."
        if any(one.name == "L1" and one.sizes[0] < 1 << 20 for one in curves):
            how += (
                " Below 1 MiB an L1 has up to four points less: it evicts the oldest of eight "
                "chunks, and of few chunks these are often not the oldest of all."
            )
        if sampled < 1:
            how += f" {sampled:.2%} of the objects were looked at (SHARDS)."
        svg = charts.lines(
            {_NAMES[one.name]: (one.sizes, one.rates) for one in curves},
            x_label=f"size of the cache, {unit}",
            y_label="hit rate",
            write_x=_tick if unit == "bytes" else _count,
            base=2 if unit == "bytes" else 10,
            marks=[(one.knee_size, one.knee_rate) for one in curves],
        )
        made.append(
            Chart(f"Hit rate of {title}", svg, how + " The dot: 95% of the hits without a limit.")
        )
    return made


def _times(found: Result) -> list[Chart]:
    made = []
    timed = found.tokenization
    saved: dict[str, float] = {}
    how = ""
    if timed is not None and timed.with_s is not None:
        saved["tokenization, without a cache"] = timed.without_s
        saved["tokenization, with tokcache"] = timed.with_s
        how = (
            f"Tokenization with {_name(found.tokenizer)} on {os.cpu_count()} cores: every "
            "prompt with the cache at its default size; without it a sample of "
            f"{timed.n_sampled:,} tokens, for all {found.n_tokens:,}. "
        )
    if found.prefill_s is not None:
        saved["prefill, without states"], saved["prefill, with states"] = found.prefill_s
        how += f"Prefill at {found.prefill.tokens_per_s:,.0f} tokens/s, {found.prefill.how}."
        if found.prefill.restore_tokens_per_s:
            how += f" Restoring at {found.prefill.restore_tokens_per_s:,.0f} tokens/s, measured."
        else:
            how += " Restoring states counts as no time; --model measures it."
    if saved:
        svg = charts.bars(saved, x_label="time for all prompts", write=duration)
        made.append(Chart("Time saved", svg, how))
    if timed is not None and timed.with_ecdf[0]:
        svg = charts.lines(
            {"with tokcache": timed.with_ecdf, "without": timed.without_ecdf},
            x_label="time to tokenize a prompt",
            y_label="prompts that took no longer",
            write_x=duration,
        )
        how = "Measured on this machine, one prompt at a time, in the order of the trace."
        made.append(Chart("Latency of tokenization", svg, how))
    return made


def _misses(found: Result) -> Chart:
    misses = found.misses
    if misses is None:
        raise AssertionError("called without misses")
    ordered = sorted(misses.tokens.items(), key=lambda item: -item[1])
    shown = {misses.meanings[reason]: float(count) for reason, count in ordered}
    svg = charts.bars(shown, x_label="prompt tokens", write=lambda n: f"{n:,.0f}")
    how = (
        f"Prompt tokens that no earlier prompt's state covers, {misses.size}, of the first "
        f"{misses.n_explained:,} prompts."
    )
    return Chart("Misses by reason", svg, how)


def _bytes(sized: dict[str, Curve]) -> Chart:
    needed = {f"{name}: memory": one.knee_size for name, one in sized.items()}
    states = sized.get(_NAMES["states"])
    if states is not None:
        needed[f"{_NAMES['states']}: memory and disk, for all hits"] = states.full_size
    svg = charts.bars(needed, x_label="bytes", write=with_unit)
    how = (
        "Memory: the smallest size with 95% of the hits. Memory and disk: the smallest size that "
        "evicts nothing that is used again."
    )
    return Chart("Bytes by tier", svg, how)


def _costliest(found: Result) -> Table:
    misses = found.misses
    if misses is None:
        raise AssertionError("called without misses")
    rows = [
        (
            f"{one.number}",
            Path(one.place).name,
            f"{one.n_tokens:,}",
            f"{one.n_reused:,}",
            f"{one.n_missed:,}",
            misses.meanings.get(one.reason, one.reason),
        )
        for one in misses.costliest
    ]
    head = ("Prompt", "Record", "Tokens", "Found", "Missed", "Reason of the miss")
    how = f"By tokens that no state covers, {misses.size}. Numbers only: the page has no text."
    return Table("Costliest prompts", head, rows, how, frozenset({2, 3, 4}))
