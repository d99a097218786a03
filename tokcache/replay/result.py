"""The figures of a replay, as plain values: printed, written as JSON, or made into a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokcache.replay.curves import Floats, StackDistances
    from tokcache.replay.prefixes import CostlyPrompt

KNEE = 0.95  # the share of the hits without a limit that a recommended size has at least
_N_POINTS = 64
_OCTAVES = 12
_LEAST_BYTES, _MOST_BYTES = 1 << 16, 1 << 22


@dataclass(frozen=True, slots=True)
class Curve:
    """Hit rate against size of one layer.

    `others` are the hit rates without a limit when something else is counted, by name.

    Units:  sizes in `unit`; `full_size` is the least size that evicts nothing useful; rates from 0
            to 1; `sample_rate` is the share of objects looked at.
    """

    name: str
    counted: str
    unit: str
    sizes: tuple[float, ...]
    rates: tuple[float, ...]
    unlimited: float
    knee_size: float
    knee_rate: float
    full_size: float
    sample_rate: float
    others: dict[str, float] = field(default_factory=dict)

    def rate_at(self, size: float) -> float:
        """Return the hit rate of the largest size of the curve that is not above `size`."""
        below = [rate for at, rate in zip(self.sizes, self.rates, strict=True) if at <= size]
        return below[-1] if below else 0.0


@dataclass(frozen=True, slots=True)
class Misses:
    """Prompt tokens that no state covered, by reason, and the costliest prompts.

    Units: `n_explained` prompts were looked at; `size` as words.
    """

    size: str
    n_explained: int
    tokens: dict[str, int]
    meanings: dict[str, str]
    costliest: tuple[CostlyPrompt, ...]


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Seconds for all texts: without a cache (from a sample), and with one (measured).

    Units: seconds; `n_sampled` tokens were encoded for the sample; `with_s` is None if no text was
           kept. The lists are times and the shares of texts that took no longer.
    """

    without_s: float
    with_s: float | None
    n_sampled: int
    without_ecdf: tuple[list[float], list[float]]
    with_ecdf: tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class Prefill:
    """The cost of prompt tokens in the model.

    Units: tokens per second; bytes of state per token; None where neither given nor measured.
           `how` says which.
    """

    tokens_per_s: float | None = None
    kv_bytes_per_token: float | None = None
    restore_tokens_per_s: float | None = None
    how: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of one replay.

    Units: seconds, tokens, characters and bytes as the names say.
    """

    traces: tuple[tuple[str, str], ...]
    n_prompts: int
    n_tokens: int
    n_chars: int
    seconds: float
    is_partial: bool
    n_skipped: int
    skipped: tuple[str, ...]
    n_without_text: int
    n_tokens_without_text: int
    notes: tuple[str, ...]
    tokenizer: str
    curves: tuple[Curve, ...]
    misses: Misses | None
    tokenization: Tokenization | None
    prefill: Prefill
    config: str
    is_sample_tokenizer: bool = False

    def curve(self, name: str) -> Curve | None:
        """Return the curve of a layer, if the traces have one."""
        return next((one for one in self.curves if one.name == name), None)

    @property
    def prefill_s(self) -> tuple[float, float] | None:
        """Seconds of prefill without states, and with those of the recommended size."""
        states, rate = self.curve("states"), self.prefill.tokens_per_s
        if states is None or not rate:
            return None
        hits = self.n_tokens * states.knee_rate
        restore = self.prefill.restore_tokens_per_s
        return self.n_tokens / rate, (self.n_tokens - hits) / rate + (
            hits / restore if restore else 0.0
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as values that JSON has."""
        return asdict(self)


def make_curve(
    name: str,
    counted: str,
    unit: str,
    distances: StackDistances,
    rates_at: Any,
    *,
    scale: float = 1.0,
    others: dict[str, float] | None = None,
) -> Curve:
    """Return the curve of a layer; `rates_at` maps sizes to hit rates, `scale` units to weights."""
    greatest = distances.greatest_distance()
    least, most = greatest * 2.0**-_OCTAVES, greatest * 2.0**0.25
    if unit == "bytes" and scale == 1:  # bytes of a text layer: smaller ones are nobody's setting
        least, most = max(least, _LEAST_BYTES), max(most, _MOST_BYTES)
    sizes: Floats = np.geomspace(least, most, _N_POINTS)
    rates = np.maximum.accumulate(rates_at(sizes))
    unlimited = float(rates_at([float("inf")])[0])
    knee = find_knee(sizes, rates, unlimited)
    return Curve(
        name,
        counted,
        unit,
        tuple((sizes * scale).tolist()),
        tuple(rates.tolist()),
        unlimited,
        float(sizes[knee] * scale),
        float(rates[knee]),
        greatest * scale,
        distances.rate,
        others or {},
    )


def find_knee(sizes: Sequence[float] | Floats, rates: Floats, unlimited: float) -> int:
    """Return the position of the smallest size with nearly all hits."""
    enough = np.flatnonzero(rates >= KNEE * unlimited - 1e-12)
    return int(enough[0]) if len(enough) else len(sizes) - 1


def written_size(n_bytes: float) -> str:
    """Return a size as the settings take it, rounded up: 512K, 64M, 3G."""
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if n_bytes >= 2 * factor:
            return f"{int(-(-n_bytes // factor))}{unit}"
    return f"{max(1, int(-(-n_bytes // 1024)))}K"
