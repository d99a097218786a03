"""A tenant of `tokcache serve` that times its probes of another tenant's prompts learns nothing.

In each trial one tenant sends a prompt. Then another tenant, the prober, sends either the same
prompt or one that nobody has sent, and measures the time. The AUC is the share of pairs, one probe
of each kind, in which the probe of a sent prompt was faster: 0.5 if the time tells nothing. The
same is measured within one tenant first, to show that the probe can tell the difference there.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from bench.gateway import CHAT, Ours
from tokcache.gateway.tenants import new_key

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("xllamacpp", "starlette", "uvicorn", "httptools", "uvloop", "httpx")
UNIT = "AUC: 0.5 is chance, 1 is certainty"
BAR = "as chance for another tenant's prompts; at least 0.9 for one's own, or it would show nothing"
IN_ALL = ("--trials", "200")
# The AUC of two samples that do not differ stays within so many standard deviations of 0.5; for
# 2,000 trials that is 0.045.
DEVIATIONS = 3.5
N_WITHIN, MIN_WITHIN = 60, 0.9


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--trials", type=int, default=2_000)


def allowed(n_trials: int) -> float:
    """Return the largest distance of the AUC from 0.5 that chance alone explains."""
    return float(DEVIATIONS * (1 / 3 / n_trials) ** 0.5)


def auc(url: str, victim: str, prober: str, n_trials: int, seed: int) -> float:
    """Return the share of pairs in which the probe of a sent prompt was the faster one."""
    rng = random.Random(seed)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def ask(key: str, text: str) -> float:
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
            began = time.perf_counter()
            client.post(CHAT, json=body, headers={"x-api-key": key}).raise_for_status()
            return time.perf_counter() - began

        is_sent = [number % 2 == 0 for number in range(n_trials)]
        # In a random order, so that a slow spell of the machine does not fall on one kind alone.
        rng.shuffle(is_sent)
        for each in is_sent:
            sent, other = (" ".join(str(rng.randrange(1000)) for _ in range(40)) for _ in range(2))
            ask(victim, sent)
            seconds[each].append(ask(prober, sent if each else other))
    pairs = [one < other for one in seconds[True] for other in seconds[False]]
    return sum(pairs) / len(pairs)


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the AUC within one tenant, then of one tenant that probes another."""
    keys = {name: new_key() for name in ("victim", "prober")}
    settings = []
    for name, (_, digest) in keys.items():
        settings += ["[[tenants]]", f'name = "{name}"', f'key_sha256 = "{digest}"']
    with tempfile.TemporaryDirectory(prefix="tokcache-bench-") as folder:
        ours = Ours(Path(folder), settings)
        try:
            victim, prober = (key for key, _ in keys.values())
            within = auc(ours.url(), victim, victim, N_WITHIN, 1)
            between = auc(ours.url(), victim, prober, options.trials, 2)
        finally:
            ours.stop()
    report.bar("AUC of a tenant that probes itself", within, MIN_WITHIN, "")
    report.fact("AUC of a tenant that probes another", f"{between:.3f} in {options.trials} trials")
    report.bar(
        "AUC away from 0.5", abs(between - 0.5), round(allowed(options.trials), 3), "", most=True
    )
