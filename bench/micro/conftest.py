"""The implementation to time, and the texts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.text.implementations import Implementation, implementation


@pytest.fixture(params=["native", "reference"])
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Implementation:
    """Return the classes of one implementation, which new tokenizers use, too."""
    found = implementation(request.param)
    found.use(monkeypatch)
    return found


@pytest.fixture
def rounds(benchmark: Any) -> Any:
    """Return a function that times a call with new arguments in every round.

    `make` returns the arguments and is not timed.
    """

    def timed(call: Any, make: Any, n_rounds: int = 200) -> Any:
        return benchmark.pedantic(call, setup=lambda: ((make(),), {}), rounds=n_rounds)

    return timed
