"""A tenant can't tell by the time of an answer whether another tenant sent the same prompt.

`TOKCACHE_PROBE_TRIALS=2000 python -m pytest -s tests/gateway/test_timing.py` is the long run.
"""

from __future__ import annotations

import os
import random
import sys
import time
from typing import TYPE_CHECKING

from tests.gateway.gateways import Gateway, gateway, upstream, user
from tests.gateway.test_tenants import KEYS, TENANTS

if TYPE_CHECKING:
    from pathlib import Path

N_TRIALS = int(os.environ.get("TOKCACHE_PROBE_TRIALS", "160"))
# 3.5 standard deviations of the AUC of two equal samples.
TOLERANCE = 3.5 * (1 / 12 * 4 / N_TRIALS) ** 0.5


def auc(served: Gateway, victim: str, prober: str, n_trials: int) -> float:
    """Return how often a probe of a prompt that was sent is faster than one that was not."""
    rng = random.Random(7)
    seconds: dict[bool, list[float]] = {True: [], False: []}

    def ask(key: str, text: str) -> float:
        began = time.perf_counter()
        served.chat([user(text)], max_tokens=1, headers={"x-api-key": KEYS[key]})
        return time.perf_counter() - began

    for number in range(n_trials):
        texts = [" ".join(f"{rng.randrange(1000)}" for _ in range(120)) for _ in range(2)]
        is_sent = number % 2 == 0
        ask(victim, texts[0])
        seconds[is_sent].append(ask(prober, texts[0] if is_sent else texts[1]))
        served.wait_until_idle()
    pairs = [sent < other for sent in seconds[True] for other in seconds[False]]
    return sum(pairs) / len(pairs)


def test_the_time_of_an_answer_tells_nothing_about_other_tenants(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots") as server,
        gateway(tmp_path / "own", server, tenants=TENANTS) as served,
    ):
        # The measurement would show it: within one scope the same prompt is much faster.
        assert auc(served, "one", "one", 40) > 0.9
        found = auc(served, "one", "two", N_TRIALS)
        sys.stdout.write(f"\nAUC {found:.3f}, 0.5 ± {TOLERANCE:.3f} over {N_TRIALS} trials\n")
        assert abs(found - 0.5) <= TOLERANCE, found
