"""The result of a replay in one sentence."""

from __future__ import annotations

from tokcache.config import CacheConfig
from tokcache.replay.result import Result, written_size


def sentence(found: Result) -> str:
    """Return what the caches would save on these traces, with the figures."""
    states, l1 = found.curve("states"), found.curve("L1")
    if not found.n_prompts or states is None:
        if found.n_without_text:
            return (
                f"{found.n_without_text:,} requests with {found.n_tokens_without_text:,} prompt "
                "tokens have no text, so nothing could be replayed."
            )
        if found.n_skipped:
            return (
                f"No record could be read ({counted(found.n_skipped, 'record')} skipped), so "
                "nothing could be replayed."
            )
        return "The traces have no requests, so nothing could be replayed."
    size = (
        f"{with_unit(states.knee_size)} of states"
        if states.unit == "bytes"
        else f"states of {states.knee_size:,.0f} tokens"
    )
    sample = " of a tiny sample tokenizer" if found.is_sample_tokenizer else ""
    tokens = f"the {found.n_tokens:,} prompt tokens{sample}"
    is_useful = states.knee_rate >= _LEAST_SHARE
    saved = (
        f"{size} would save the prefill of {states.knee_rate:.0%} of {tokens}"
        if is_useful
        else f"states would save the prefill of less than {_LEAST_SHARE:.0%} of {tokens}"
    )
    if is_useful and found.prefill_s is not None:
        without, with_ = found.prefill_s
        saved += f" ({duration(without - with_)} of {duration(without)})"
    parts = [saved]
    timed = found.tokenization
    if l1 is not None and timed is not None:
        # The size with which the texts were timed.
        rate = l1.rate_at(int(CacheConfig().l1_max_bytes))
        text = f"the tokenizer's cache of the default size would find {rate:.0%} of the characters"
        if timed.with_s is not None:
            text += f" and take {duration(timed.with_s)} instead of {duration(timed.without_s)}"
        parts.append(text)
    n = found.n_prompts
    on = "this prompt" if n == 1 else f"these {n:,} prompts"
    return f"On {on}, {', and '.join(parts)}."


def counted(n: int, noun: str) -> str:
    """Return a number and its noun, as 1 record or 2,000 records."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


_LEAST_SHARE = 0.01  # of the prompt tokens, for a size of states to be worth naming
_UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def duration(seconds: float) -> str:
    """Return a time as text, in the unit that fits, with three digits."""
    if seconds <= 0:
        return "0 s"
    fits = (each for each in _UNITS if seconds >= (2 if each[1] > 1 else 1) * each[1])
    unit, factor = next(fits, _UNITS[-1])
    value = seconds / factor
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"  # noqa: PLR2004


def with_unit(n_bytes: float) -> str:
    """Return a number of bytes as text, rounded up: 64 KiB, 3 GiB."""
    text = written_size(n_bytes)
    return f"{text[:-1]} {text[-1]}iB"
