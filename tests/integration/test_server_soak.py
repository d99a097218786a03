"""The soak of `python -m bench run soak`, for twenty seconds."""

from __future__ import annotations

import pytest

pytest.importorskip("xllamacpp", reason="needs tokcache[demo]")
pytest.importorskip("httpx", reason="needs tokcache[server]")

from bench import soak


@pytest.mark.timeout(180)
def test_aborts_and_kills_bring_no_wrong_text_and_lose_no_slot() -> None:
    tally, figures = soak.soak(20.0, n_clients=16, every_s=5.0)
    assert tally.wrong == []
    assert tally.counts["answered"] > 50
    assert tally.counts["aborted"] > 10
    assert tally.counts["killed"] >= 2
    assert figures["most bytes"] > 0
