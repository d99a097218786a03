"""A server's event loop while it tokenizes: its lateness, and the requests it answers per second.

Sixteen clients in one event loop send the interleaved turns of agent chats, while a ticker is due
every millisecond. Systems: plain transformers in the loop, plain transformers in threads, and
tokcache's `atoken_ids` over tokenizers. Ids are compared first; in every round each system starts
with nothing cached, in random order; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Awaitable, Callable
from itertools import zip_longest
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import tokcache
from bench._disturb import fresh
from bench._report import Report, progress
from bench.workloads import chats
from bench.workloads.data import add_tokenizer, default_tokenizers
from bench.wrapper import load

PACKAGES = ("tokenizers", "transformers")
UNIT = "requests a second, ms late"
BAR = "at least those of the better plain way"
IN_ALL = ("--tokenizer", "qwen2.5", "--chats", "8", "--rounds", "3")
N_CLIENTS, TICK_S = 16, 0.001
OURS = "tokcache, atoken_ids"
Ask = Callable[[str], Awaitable[Any]]


def systems(plain: Any) -> dict[str, Callable[[], Ask]]:
    """Return a factory for each system, which starts with nothing cached."""

    async def in_loop(text: str) -> Any:
        return plain(text, add_special_tokens=False)["input_ids"]

    async def in_threads(text: str) -> Any:
        return (await asyncio.to_thread(plain, text, add_special_tokens=False))["input_ids"]

    def cached() -> Ask:
        wrapped = tokcache.wrap(plain, tokcache.CacheConfig(engine="tokenizers"))

        async def ask(text: str) -> Any:
            return (await wrapped.atoken_ids(text, add_special_tokens=False)).tolist()

        return ask

    return {
        "transformers in the loop": lambda: in_loop,
        "transformers in threads": lambda: in_threads,
        OURS: cached,
    }


def interleaved(plain: Any, n_chats: int) -> list[str]:
    """Return the prompts of all chats, one turn of each in rotation."""
    found = chats.load(n_chats)[1]
    per_chat = [chats.prompts([chat], plain.backend_tokenizer) for chat in found]
    return [text for turn in zip_longest(*per_chat) for text in turn if text is not None]


async def serve(ask: Ask, prompts: list[str]) -> tuple[list[Any], float, float]:
    """Return the answers, the seconds they took and the ticker's 99th percentile of lateness."""
    answers: list[Any] = [None] * len(prompts)
    waiting = iter(enumerate(prompts))
    late: list[float] = []

    async def client() -> None:
        for index, text in waiting:
            answers[index] = await ask(fresh(text))
            await asyncio.sleep(0)

    async def tick() -> None:
        while True:
            due = perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            late.append(perf_counter() - due)

    ticker = asyncio.create_task(tick())
    began = perf_counter()
    await asyncio.gather(*(client() for _ in range(N_CLIENTS)))
    seconds = perf_counter() - began
    ticker.cancel()
    await asyncio.sleep(2 * TICK_S)
    return answers, seconds, quantiles(late, n=100)[-1] if len(late) > 1 else seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_tokenizer(parser)
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare, then measure, every tokenizer."""
    for name in options.tokenizer or default_tokenizers("qwen2.5", "phi-3-mini"):
        measure(name, options.chats, options.rounds, report)


def measure(name: str, n_chats: int, n_rounds: int, report: Report) -> None:
    """Measure one tokenizer."""
    plain = load(name)
    prompts = interleaved(plain, n_chats)
    expected = [plain(text, add_special_tokens=False)["input_ids"] for text in prompts]
    made = systems(plain)
    a_second: dict[str, list[float]] = {one: [] for one in made}
    late_ms: dict[str, list[float]] = {one: [] for one in made}
    rng, n_wrong = random.Random(4), 0
    with progress() as shown:
        for _ in shown.track(range(n_rounds), description=name):
            for one in rng.sample(list(made), len(made)):
                answers, seconds, late_s = asyncio.run(serve(made[one](), prompts))
                n_wrong += answers != expected
                a_second[one].append(len(prompts) / seconds)
                late_ms[one].append(late_s * 1000)
    report.check(f"{name}: ids", is_right=not n_wrong, found=f"{n_wrong} wrong rounds")
    case = f"{name}, {len(prompts)} prompts of {N_CLIENTS} clients"
    report.table(case, "requests a second", a_second, base=OURS, is_higher_better=True)
    report.table(f"{case}: lateness of the loop, p99", "ms", late_ms, base=OURS)
    plain_names = [one for one in made if one != OURS]
    best = max(median(a_second[one]) for one in plain_names)
    report.bar(
        f"{name}: requests a second over the better plain way", median(a_second[OURS]) / best, 1
    )
    least = min(median(late_ms[one]) for one in plain_names)
    title = f"{name}: p99 lateness of the loop over the better plain way's"
    report.bar(title, median(late_ms[OURS]) / least, 1, most=True)
