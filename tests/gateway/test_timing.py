"""`python -m bench run gateway-probe`, in short: no tenant learns by time what another one sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.gateway_probe import MIN_WITHIN, allowed, auc
from tests.gateway.gateways import gateway, upstream
from tests.gateway.test_tenants import KEYS, TENANTS

if TYPE_CHECKING:
    from pathlib import Path

N_TRIALS = 80


def test_the_time_of_an_answer_tells_nothing_about_other_tenants(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots") as server,
        gateway(tmp_path / "own", server, tenants=TENANTS) as served,
    ):
        # The measurement would show it: within one scope the same prompt is much faster.
        assert auc(served.url, KEYS["one"], KEYS["one"], 20, 1) > MIN_WITHIN
        found = auc(served.url, KEYS["one"], KEYS["two"], N_TRIALS, 2)
        assert abs(found - 0.5) <= allowed(N_TRIALS), found
