"""A server's event loop while it tokenizes: its lateness, and the requests it answers per second.

Sixteen clients in one event loop send the interleaved turns of agent chats, while a ticker is due
every millisecond. Systems: plain transformers in the loop, plain transformers in threads, and
tokcache's `atoken_ids` over tokenizers. Ids are compared first; in every round each system starts
with nothing cached, in random order; figures are medians over the rounds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from itertools import zip_longest
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import tokcache
from bench import _report
from bench.workloads import chats
from bench.workloads.data import default_tokenizers, fresh
from bench.wrapper import load

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


def run(name: str, n_chats: int, n_rounds: int) -> dict[str, Any]:
    """Measure one tokenizer."""
    plain = load(name)
    prompts = interleaved(plain, n_chats)
    expected = [plain(text, add_special_tokens=False)["input_ids"] for text in prompts]
    made = systems(plain)
    figures: dict[str, dict[str, list[float]]] = {one: {"rps": [], "late_ms": []} for one in made}
    rng, n_wrong = random.Random(4), 0
    for _ in range(n_rounds):
        for one in rng.sample(list(made), len(made)):
            answers, seconds, late_s = asyncio.run(serve(made[one](), prompts))
            n_wrong += answers != expected
            figures[one]["rps"].append(len(prompts) / seconds)
            figures[one]["late_ms"].append(late_s * 1000)
    medians = {one: {key: median(v) for key, v in found.items()} for one, found in figures.items()}
    print(f"{name}: {len(prompts)} prompts, {n_rounds} rounds; rounds with wrong ids: {n_wrong}")
    for one, found in medians.items():
        print(f"  {one:26} {found['rps']:8,.0f} requests/s, p99 late {found['late_ms']:8.2f} ms")
    return {"medians": medians, "n_wrong": n_wrong, "bars": _report.show_bars(bars(medians))}


def bars(medians: dict[str, dict[str, float]]) -> list[_report.Bar]:
    """Return the bars for tokcache, relative to the better of the plain systems."""
    ours, plain = medians[OURS], [found for one, found in medians.items() if one != OURS]
    return [
        _report.Bar(
            "requests a second over the better plain way",
            ours["rps"] / max(found["rps"] for found in plain),
            1.0,
        ),
        _report.Bar(
            "p99 lateness of the loop over the better plain way's",
            ours["late_ms"] / min(found["late_ms"] for found in plain),
            1.0,
            is_ceiling=True,
        ),
    ]


def main(argv: list[str]) -> int:
    """Exit code 1 if ids differ or a bar is missed."""
    options = _report.parser(__doc__ or "")
    options.add_argument(
        "--tokenizer",
        action="append",
        help="a tokenizer.json, a real one's name, or tiny; repeatable",
    )
    options.add_argument("--chats", type=int, default=20)
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args(argv)
    names = args.tokenizer or default_tokenizers("qwen2.5", "phi-3-mini")
    found = {name: run(name, args.chats, args.rounds) for name in names}
    environment = _report.environment("tokenizers", "transformers")
    _report.finish({"environment": environment, "tokenizers": found}, args.json)
    met = all(bar["met"] for one in found.values() for bar in one["bars"])
    return 0 if met and not any(one["n_wrong"] for one in found.values()) else 1
