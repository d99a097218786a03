"""A tenant of `tokcache serve` that times its probes of another tenant's prompts learns nothing.

In each trial a tenant sends a prompt. Then another tenant sends the same prompt, or one that nobody
sent, and takes the time. The AUC is how often the probe of a sent prompt is the faster one of a
pair: 0.5 if the time tells nothing. First the same is done within one tenant, where it tells a lot.
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
# Standard deviations of the AUC of two equal samples: 0.045 for 2,000 trials.
DEVIATIONS = 3.5
N_WITHIN, MIN_WITHIN = 60, 0.9


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--trials", type=int, default=2_000)


def allowed(n_trials: int) -> float:
    """Return how far from 0.5 chance alone takes the AUC of so many trials."""
    return float(DEVIATIONS * (1 / 3 / n_trials) ** 0.5)


def auc(url: str, victim: str, prober: str, n_trials: int, seed: int) -> float:
    """Return how often a probe of a prompt that was sent is faster than one that was not."""
    rng = random.Random(seed)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:

        def ask(key: str, text: str) -> float:
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
            began = time.perf_counter()
            client.post(CHAT, json=body, headers={"x-api-key": key}).raise_for_status()
            return time.perf_counter() - began

        is_sent = [number % 2 == 0 for number in range(n_trials)]
        # In a random order, so that no rhythm of the machine falls on one kind.
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
    report.bar("AUC within one tenant: it would show", within, MIN_WITHIN, "")
    report.fact("AUC of a tenant that probes another", f"{between:.3f} in {options.trials} trials")
    report.bar(
        "AUC away from 0.5", abs(between - 0.5), round(allowed(options.trials), 3), "", most=True
    )
