"""`tokcache serve` and bare llama-servers: added time, tokens prefilled, requests a second.

1. Added time: a streamed chat of 12,000 characters whose prompt is held but for the last token, to
   the bare server's pinned slot and through the gateway, in turns. First the answers are compared.
2. Tokens prefilled: clients with six system prompts hold conversations on two servers of four
   slots, with side requests in between; half-way everything is shut down and started again. The
   bare servers have their --cache-ram (8 GiB) and get the requests round robin. The least possible
   is the number of distinct prefixes of all prompts, in tokens.
3. Requests a second where nothing is shared.

The model is small and random, so a prefill is fast; counts of tokens do not depend on that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import httpx

from tokcache import samples
from tokcache.samples.server_process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench._report import Report

N_SLOTS, N_SERVERS, N_CTX = 4, 2, 4096
CHAT = "/v1/chat/completions"
MAX_ADDED_MS, MAX_ADDED_P99_MS = 3.0, 10.0
MAX_OVER_LEAST, MIN_REQUESTS = 1.05, 0.95
PACKAGES = ("xllamacpp", "starlette", "uvicorn", "httpx")
UNIT = "ms, tokens prefilled, requests a second"
BAR = (
    "at most 3 ms more at the median and 10 at p99; at most 1.05 times the least prefill; at "
    "least 0.95 times the requests a second"
)
IN_ALL = ("--clients", "16", "--turns", "2", "--rounds", "60", "--requests", "60")
BARE, OURS = "llama-server, --cache-ram", "tokcache serve"
WORDS = (
    "the",
    "model",
    "reads",
    "a",
    "file",
    "and",
    "then",
    "writes",
    "another",
    "one",
    "before",
    "it",
)


@dataclass(slots=True)
class Figures:
    """The figures of one system."""

    n_prefilled: int = 0
    n_prompt: int = 0
    first_s: list[float] = field(default_factory=list)
    prompts: list[list[dict[str, str]]] = field(default_factory=list)


def text(rng: random.Random, n_chars: int) -> str:
    """Return words that no other seed gives."""
    words = f"{rng.random():.12f}"
    while len(words) < n_chars:
        words += " " + rng.choice(WORDS)
    return words[:n_chars]


class Bare:
    """Llama-servers without a gateway; requests go to them round robin."""

    def __init__(self, folder: Path, **overrides: Any) -> None:
        self._overrides = {"cache_ram_mib": 8192, **overrides}
        self._folder = folder
        self._servers: list[ServerProcess] = []
        self._next = itertools.count()
        self.start()

    @property
    def urls(self) -> list[str]:
        """The addresses of the servers."""
        return [each.url for each in self._servers]

    def url(self) -> str:
        """Return the server that gets the next request."""
        return self.urls[next(self._next) % len(self._servers)]

    def start(self) -> None:
        """Start all servers."""
        for _ in range(N_SERVERS):
            self._servers.append(self._server())

    def _server(self, port: int = 0) -> ServerProcess:
        # The gateway's servers share a folder, so that each can restore the files of another.
        return ServerProcess(
            samples.tiny_model(),
            n_ctx=N_CTX,
            n_slots=N_SLOTS,
            n_threads=1,
            port=port,
            slot_folder=self._folder / "slots",
            overrides={"n_batch": 2048, "n_ubatch": 512, **self._overrides},
        )

    def crash(self, number: int) -> None:
        """Kill a server, and start another one at its address a second later."""
        old = self._servers[number]
        old.kill()
        old.close()
        time.sleep(1)
        self._servers[number] = self._server(int(old.url.rpartition(":")[2]))

    def show_reasons(self) -> None:
        """Print why less was reused; a bare server does not know."""

    def stop(self) -> None:
        """End all servers."""
        for each in self._servers:
            each.close()
        self._servers.clear()


class Ours(Bare):
    """The same servers with a gateway in front, in a process of its own."""

    def __init__(self, folder: Path, settings: Sequence[str] = ()) -> None:
        self._gateway: subprocess.Popen[str] | None = None
        self._settings = settings
        self._gateway_url = ""
        super().__init__(folder, cache_ram_mib=0)

    def url(self) -> str:
        """Return the gateway."""
        return self._gateway_url

    def start(self) -> None:
        """Start the servers, then the gateway."""
        super().start()
        config = self._folder / "serve.toml"
        lines = [f'folder = "{self._folder / "own"}"', "max_queue = 256"]
        for url in self.urls:
            lines += ["[[upstreams]]", f'url = "{url}"', f'slot_folder = "{self._folder}/slots"']
        config.write_text("\n".join([*lines, *self._settings]))
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "tokcache", "serve", "--config", str(config)]
        self._gateway = subprocess.Popen(  # noqa: S603 (our own code)
            [*command, "--port", str(port)], stdout=subprocess.PIPE, text=True
        )
        self._gateway_url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self._gateway_url}/health", trust_env=False).is_success:
                    return
            time.sleep(0.05)
        raise RuntimeError("the gateway did not come up")

    def show_reasons(self) -> None:
        """Print the gateway's plans and reasons."""
        lines = httpx.get(f"{self._gateway_url}/metrics", trust_env=False).text.splitlines()
        print("  " + "; ".join(x[17:] for x in lines if "plan=" in x or "reason=" in x))

    @property
    def proc(self) -> Path:
        """The folder in which Linux shows the gateway's process."""
        if self._gateway is None:
            raise RuntimeError("the gateway does not run")
        return Path("/proc", str(self._gateway.pid))

    def used_s(self) -> float:
        """Return the seconds of processor time that the gateway has used."""
        fields = (self.proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the gateway, which saves the slots, then the servers."""
        if self._gateway is not None:
            self._gateway.terminate()
            self._gateway.wait(60)
            self._gateway = None
        super().stop()


async def ask(
    client: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> tuple[str, dict[str, Any], float]:
    """Return a streamed answer's text, its timings and the seconds to the first text."""
    began, first_s, parts = time.perf_counter(), 0.0, []
    timings: dict[str, Any] = {}
    asked = {**body, "stream": True, "temperature": 0}
    request = client.build_request("POST", url + CHAT, json=asked)
    try:
        answer = await client.send(request, stream=True)
    except httpx.RemoteProtocolError:
        # llama-server closes a connection after 100 requests, without announcing it.
        answer = await client.send(request, stream=True)
    try:
        if answer.status_code != 200:
            raise RuntimeError((await answer.aread()).decode()[:300])
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            found = json.loads(line[6:])
            for choice in found["choices"]:
                if choice["delta"].get("content"):
                    first_s = first_s or time.perf_counter() - began
                    parts.append(choice["delta"]["content"])
            timings = found.get("timings") or timings
    finally:
        await answer.aclose()
    return "".join(parts), timings, first_s or time.perf_counter() - began


async def measure_added(bare: str, ours: str, n_rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds to the first token of the same chat, without and with the gateway."""
    rng = random.Random(1)
    messages = [{"role": "system", "content": text(rng, 11_000)},
                {"role": "user", "content": text(rng, 1_000)}]  # fmt: skip
    body: dict[str, Any] = {"messages": messages, "max_tokens": 1}
    times: dict[str, list[float]] = {BARE: [], OURS: []}
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
        pinned = {**body, "id_slot": 0}
        expected, _, _ = await ask(client, bare, {**pinned, "max_tokens": 16})
        found, _, _ = await ask(client, ours, {**body, "max_tokens": 16})
        assert found == expected, "the answers differ"
        both = [(BARE, bare, pinned), (OURS, ours, body)]
        for number in range(n_rounds):
            for name, url, sent in both if number % 2 else reversed(both):
                _, timings, first_s = await ask(client, url, sent)
                assert timings["prompt_n"] <= 8, timings
                times[name].append(1e3 * first_s)
    return times


async def converse(
    system: Bare, figures: Figures, histories: list[list[dict[str, str]]], first: int, n_turns: int
) -> None:
    """Let every client hold `n_turns` turns of its conversation, with side requests."""
    async with httpx.AsyncClient(
        timeout=600, trust_env=False, limits=httpx.Limits(max_connections=None)
    ) as client:

        async def one(messages: list[dict[str, str]], max_tokens: int) -> str:
            body = {"messages": messages, "max_tokens": max_tokens}
            answer, timings, first_s = await ask(client, system.url(), body)
            figures.n_prefilled += timings["prompt_n"]
            figures.n_prompt += timings["prompt_n"] + timings["cache_n"]
            figures.first_s.append(first_s)
            figures.prompts.append(list(messages))
            return answer

        async def hold(number: int) -> None:
            rng = random.Random(1000 * number + first)
            for turn in range(first, first + n_turns):
                histories[number].append({"role": "user", "content": text(rng, 300)})
                answer = await one(histories[number], 16)
                histories[number].append({"role": "assistant", "content": answer})
                if turn % 2:
                    side = [{"role": "user", "content": f"Write a title: {text(rng, 60)}"}]
                    await one(side, 4)
                await asyncio.sleep(rng.uniform(0, 0.2))

        await asyncio.gather(*(hold(number) for number in range(len(histories))))


async def least(url: str, prompts: list[list[dict[str, str]]]) -> int:
    """Return the number of distinct prefixes of all prompts, in tokens."""
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        ids = []
        for messages in prompts:
            rendered = (await client.post("/apply-template", json={"messages": messages})).json()
            body = {"content": rendered["prompt"], "add_special": True, "parse_special": True}
            ids.append((await client.post("/tokenize", json=body)).json()["tokens"])
    ids.sort()
    n_distinct = 0
    before: list[int] = []
    for each in ids:
        n_shared = 0
        for one, other in zip(each, before, strict=False):
            if one != other:
                break
            n_shared += 1
        # The last token of a prompt is always decoded, for its logits.
        n_distinct += max(1, len(each) - n_shared)
        before = each
    return n_distinct


def conversations(n_clients: int) -> list[list[dict[str, str]]]:
    """Return the beginnings of all conversations; there are six system prompts."""
    systems = [text(random.Random(number), 3_000) for number in range(6)]
    return [[{"role": "system", "content": systems[n % 6]}] for n in range(n_clients)]


async def throughput(system: Bare, n_requests: int) -> float:
    """Return the requests a second where no prompt shares anything."""
    async with httpx.AsyncClient(
        timeout=600, trust_env=False, limits=httpx.Limits(max_connections=None)
    ) as client:
        numbers = iter(range(n_requests))

        async def work(worker: int) -> None:
            for number in numbers:
                rng = random.Random(f"{worker} {number} {time.time()}")
                messages = [{"role": "user", "content": text(rng, 1_200)}]
                await ask(client, system.url(), {"messages": messages, "max_tokens": 32})

        began = time.perf_counter()
        await asyncio.gather(*(work(worker) for worker in range(N_SLOTS * N_SERVERS)))
        return n_requests / (time.perf_counter() - began)


@contextlib.contextmanager
def systems() -> Iterator[tuple[Bare, Ours]]:
    """Start both systems in folders of their own."""
    with (
        tempfile.TemporaryDirectory(prefix="tokcache-bench-") as one,
        tempfile.TemporaryDirectory(prefix="tokcache-bench-") as other,
    ):
        bare, ours = Bare(Path(one)), Ours(Path(other))
        try:
            yield bare, ours
        finally:
            bare.stop()
            ours.stop()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3, help="before, and after the restart")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--requests", type=int, default=200)


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the added time, the requests a second, and the conversations with a restart."""
    with systems() as (bare, ours):
        both: dict[str, Bare] = {BARE: bare, OURS: ours}
        added = asyncio.run(measure_added(bare.urls[0], ours.url(), options.rounds))
        rates: dict[str, list[float]] = {BARE: [], OURS: []}
        used_ms: list[float] = []
        for number in range(5):
            for name, system in list(both.items())[:: 1 if number % 2 else -1]:
                used_s = ours.used_s()
                rates[name].append(asyncio.run(throughput(system, options.requests)))
                if name == OURS:
                    used_ms.append(1e3 * (ours.used_s() - used_s) / options.requests)
        figures = {BARE: Figures(), OURS: Figures()}
        over: dict[str, float] = {}
        for name, system in both.items():
            histories = conversations(options.clients)
            asyncio.run(converse(system, figures[name], histories, 0, options.turns))
            system.show_reasons()
            system.stop()
            system.start()
            asyncio.run(converse(system, figures[name], histories, options.turns, options.turns))
            system.show_reasons()
            n_least = asyncio.run(least(system.urls[0], figures[name].prompts))
            over[name] = figures[name].n_prefilled / n_least
    report.table("first token of a known chat of 12,000 characters", "ms", added, base=BARE)
    # Other work on the machine slows both requests of a pair, which follow each other.
    pairs = zip(added[BARE], added[OURS], strict=True)
    more_ms = median(ours_ms - bare_ms for bare_ms, ours_ms in pairs)
    report.bar("added at the median", more_ms, MAX_ADDED_MS, "ms", most=True)
    with_it, without = (quantiles(added[system], n=100)[98] for system in (OURS, BARE))
    report.bar("added at p99", with_it - without, MAX_ADDED_P99_MS, "ms", most=True)
    title = "nothing is shared"
    report.table(title, "requests a second", rates, base=BARE, is_higher_better=True)
    ratio = median(ours / bare for bare, ours in zip(rates[BARE], rates[OURS], strict=True))
    report.bar("requests a second where nothing is shared", ratio, MIN_REQUESTS)
    report.fact("processor time of the gateway per request, ms", round(median(used_ms), 2))
    title = f"{options.clients} clients, a restart in the middle"
    notes = {name: f"{f.n_prefilled:,} of {f.n_prompt:,} tokens" for name, f in figures.items()}
    report.table(f"{title}: prefilled over the least", "x", over, base=BARE, notes=notes)
    first_ms = {name: [1e3 * s for s in found.first_s] for name, found in figures.items()}
    report.table(f"{title}: time to the first token", "ms", first_ms, base=BARE)
    report.bar("prefilled over the least", over[OURS], MAX_OVER_LEAST, most=True)
