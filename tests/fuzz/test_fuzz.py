"""A short run of every target without atheris, and proof that such a run can find a fault."""

from __future__ import annotations

import time

import pytest

from tests.fuzz.mutations import mutations
from tests.fuzz.planted import planted
from tests.fuzz.targets import TARGETS

# Inputs a target: most take under a millisecond, a cache file 30 and a Redis 300.
_N_INPUTS = {"cache-file": 40, "redis-answers": 4}
_N_UNTIL_FOUND = {"redis-answers": 60, "body": 20_000}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_seeds_and_their_mutations_show_no_fault(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    inputs = [*seeds, *mutations(seeds, _N_INPUTS.get(name, 300), seed=1)]
    began = time.monotonic()
    for each in inputs:
        target.run(each)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_planted_fault_is_found_by_mutations_and_by_no_seed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, fault = TARGETS[name], planted(name)
    monkeypatch.setattr(fault.owner, fault.name, fault.value)
    seeds = target.seeds("[0-9]*")
    for each in seeds:
        target.run(each)

    def is_found(data: bytes) -> bool:
        try:
            target.run(data)
        except Exception:  # noqa: BLE001 (any fault)
            return True
        return False

    n_tried = _N_UNTIL_FOUND.get(name, 3000)
    assert any(map(is_found, mutations(seeds, n_tried, seed=2)))
