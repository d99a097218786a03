"""Disturbs the CPU's cache between two timed calls, as other work of a server does.

Back to back, a cache's own data stays in the CPU's cache, and so every system looks faster than it
is where decoding and other requests run between two prompts. A buffer of four times the second
level cache is read before each timed call. It was written before (memory that was never written is
one shared page), and it is read by a search of the C library, in well under 100 us: a slow loop
would disturb by its time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter_ns
from typing import Any

_DEFAULT_L2 = 1 << 20
QUIET, DISTURBED, MADE_AFTER = "quiet", "disturbed", "disturbed, text made after"
MODES = (QUIET, DISTURBED, MADE_AFTER)


def fresh(text: str) -> str:
    """Return an equal string that is another object, without a cached hash."""
    return (text + "\0")[:-1]


def l2_bytes() -> int:
    """Return the bytes of one core's second level cache; 1 MiB where the system does not say."""
    try:
        found = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (ValueError, OSError):
        found = 0
    return found if found > 0 else _DEFAULT_L2


class Disturber:
    """A buffer of four times the second level cache, and the call that reads it."""

    def __init__(self) -> None:
        self.buffer = bytearray(b"\2") * (4 * l2_bytes())
        self._find = self.buffer.find

    def __call__(self) -> None:
        """Read the buffer; nothing that was in the second level cache before stays there."""
        self._find(b"\1")


def one_by_one(
    calls: Sequence[Callable[[str], Any]], texts: list[str], mode: str, disturb: Disturber
) -> float:
    """Return the median nanoseconds of calls that are timed alone, less those of an empty call.

    There is one call a text. Every call gets a new string object, which was made before the
    disturbance, or after it.
    """
    is_quiet, is_made_after = mode == QUIET, mode == MADE_AFTER
    taken, empty = [], []
    gc.disable()
    for call, text in zip(calls, texts, strict=True):
        own = fresh(text)
        if not is_quiet:
            disturb()
            if is_made_after:
                own = fresh(text)
        began = perf_counter_ns()
        call(own)
        taken.append(perf_counter_ns() - began)
        began = perf_counter_ns()
        _nothing(own)
        empty.append(perf_counter_ns() - began)
    gc.enable()
    return max(median(taken) - median(empty), 1.0)


def _nothing(_text: str) -> None:
    pass
