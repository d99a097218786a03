"""The soak of the text caches for a few seconds, and faults planted in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from bench import text_soak
from bench._report import Report
from tokcache import CacheConfig
from tokcache.text.flights import Flights
from tokcache.text.segments.cache import L1
from tokcache.text.tokenizer import CachedTokenizer

SECONDS = float(os.environ.get("TOKCACHE_SOAK_S", "4")) / 2  # a part


def soaked(kind: type[text_soak.L0Part | text_soak.L1Part]) -> Report:
    report = Report("text-soak")
    report.console.quiet = True
    text_soak.run_part(kind(SECONDS, 10**7), 4, 1, report)
    return report


def wrong(report: Report) -> set[str]:
    return {name for name, is_right in report.checks.items() if not is_right}


@pytest.fixture(autouse=True)
def for_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tokenizers take seconds to load; a short part sees few changes and fills no cache."""
    monkeypatch.setattr(text_soak, "shared_data", lambda: None)
    monkeypatch.setattr(text_soak, "CHANGE_EVERY_S", 0.3)
    small: dict[str, Any] = {"l0_max_entries": 150, "l0_max_bytes": "100K", "l1_max_bytes": "100K"}
    own = CacheConfig(**small, l1=False, engine="tokenizers")
    monkeypatch.setattr(text_soak, "L0", own)


@pytest.mark.parametrize("kind", [text_soak.L0Part, text_soak.L1Part])
def test_soak(kind: Any) -> None:
    report = soaked(kind)
    assert wrong(report) == set()
    assert all(bar.is_met for bar in report.bars)


def stale_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the tokenizer empties no cache, once in a while."""
    n_changes = 0
    invalidate = CachedTokenizer.invalidate

    def sometimes(self: CachedTokenizer) -> None:
        nonlocal n_changes
        n_changes += 1
        if n_changes % 3:
            invalidate(self)

    monkeypatch.setattr(CachedTokenizer, "invalidate", sometimes)


def lost_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoding of a text that another thread waits for is counted twice."""
    land = Flights.land

    def twice(self: Flights, keys: Any, made: Any) -> None:
        self._counts["shared"] += any(self._waited_for.get(key) is None for key in keys)
        land(self, keys, made)

    monkeypatch.setattr(Flights, "land", twice)


def larger_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches take twice the bytes that they were given."""
    wrap = text_soak.wrap
    double = {
        id(one): CacheConfig(
            l0_max_entries=2 * one.l0_max_entries,
            l0_max_bytes=2 * one.l0_max_bytes,
            l1=one.l1,
            l1_max_bytes=2 * one.l1_max_bytes,
            engine="tokenizers",
        )
        for one in (text_soak.L0, text_soak.L1, text_soak.VERIFIED)
    }
    monkeypatch.setattr(text_soak, "wrap", lambda tok, config: wrap(tok, double[id(config)]))


def wrong_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """One segment in a few thousand gets the ids of another one."""
    complete = L1._complete
    n_calls = 0

    def sometimes(self: L1, walk: Any, text: str, special: bool) -> Any:
        nonlocal n_calls
        n_calls += 1
        found = complete(self, walk, text, special)
        return found[:-1] if found is not None and n_calls % 50 == 0 else found

    monkeypatch.setattr(L1, "_complete", sometimes)


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every encoding keeps 64 KiB that nothing counts."""
    kept: list[bytearray] = []
    claim = Flights.claim

    def keeping(self: Flights, *given: Any) -> Any:
        kept.append(bytearray(b"x" * 65_536))
        return claim(self, *given)

    monkeypatch.setattr(Flights, "claim", keeping)
    monkeypatch.setattr(text_soak, "MIN_SECONDS_OF_SLOPE", 0.0)


FOUND: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Any, str]] = {
    "stale answers": (stale_answers, text_soak.L0Part, "right ids, budgets kept, no error"),
    "lost count": (lost_count, text_soak.L0Part, "each call is counted once"),
    "larger cache": (larger_cache, text_soak.L0Part, "right ids, budgets kept, no error"),
    "wrong segments": (wrong_segments, text_soak.L1Part, "right ids, budgets kept, no error"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, kind, check = FOUND[name]
    plant(monkeypatch)
    assert f"{kind.__name__[:2]}: {check}" in wrong(soaked(kind))


def test_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    leak(monkeypatch)
    (bar,) = soaked(text_soak.L0Part).bars
    assert not bar.is_met
