"""`tokcache serve` for minutes: clients that leave, servers that are killed, memory that is flat.

Sixteen clients ask for known answers, half of them as streams, and leave three requests of ten in
the middle. Every 40 seconds one of the two llama-servers is killed and started again. No client may
get another prompt's answer, requests may fail only around a kill, and at the end no slot is busy,
no connection is open, and the memory of the gateway's process has not grown over the last half.

Another split into batches changes the last bits of a state, and with them a few greedy answers;
those are counted apart from swapped ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

import httpx

from bench.gateway import CHAT, N_SERVERS, Ours

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("xllamacpp", "starlette", "uvicorn", "httptools", "uvloop", "httpx")
UNIT = "wrong answers, MB"
BAR = "no wrong answer; at most 2% more memory in the last half"
IN_ALL = ("--seconds", "25", "--kill-every", "10")
SYSTEM = "You are a careful assistant who answers in short sentences. " * 20
N_CHATS, N_TURNS = 6, 3
MAX_DIFFERENT, MAX_GROWTH = 0.1, 0.02
# A request that runs on a server that is killed fails, and so may others until it is back.
DOWN_S = 15.0


def bodies() -> list[dict[str, Any]]:
    """Return the requests: six chats of three turns, with two system prompts."""
    made = []
    for chat in range(N_CHATS):
        messages = [{"role": "system", "content": f"{chat % 2} {SYSTEM}"}]
        for turn in range(N_TURNS):
            messages = [*messages, {"role": "user", "content": f"chat {chat} turn {turn} " * 10}]
            made.append({"messages": messages, "max_tokens": 6, "temperature": 0})
    return made


@dataclass(slots=True)
class Clients:
    """The clients' common findings; `killed_at` is when a server was killed or came back."""

    url: str
    expected: list[str]
    deadline: float
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    killed_at: float = float("-inf")
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, seed: int) -> None:
        """Ask until the deadline."""
        rng, asked = random.Random(seed), bodies()
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while time.monotonic() < self.deadline:
                number = rng.randrange(len(asked))
                try:
                    found = self._ask(client, rng, asked[number])
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    found = "broken"
                    if time.monotonic() - self.killed_at > DOWN_S:
                        found = "failed"
                        self.failures.append(repr(error)[:200])
                else:
                    if found not in ("left", self.expected[number]):
                        found = "swapped" if found in self.expected else "different"
                    elif found != "left":
                        found = "right"
                with self.lock:
                    self.counts[found] += 1

    def _ask(self, client: httpx.Client, rng: random.Random, body: dict[str, Any]) -> str:
        """Return the text of an answer, or "left" after having left in the middle of it."""
        if rng.random() < 0.5:
            answer = client.post(CHAT, json=body)
            return str(answer.json()["choices"][0]["message"]["content"])
        leaves_after = rng.randrange(9) if rng.random() < 0.6 else None
        if leaves_after is not None:
            body = {**body, "max_tokens": 200}
        told, n_lines = "", 0
        with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
            for line in answer.iter_lines():
                n_lines += 1
                if leaves_after is not None and n_lines > leaves_after:
                    return "left"
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        told += choice["delta"].get("content") or ""
        return "left" if leaves_after is not None else told


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kill-every", type=float, default=40.0, help="seconds")


def run(options: argparse.Namespace, report: Report) -> None:
    """Run clients and kill servers for some minutes, then check slots, sockets and memory."""
    with tempfile.TemporaryDirectory(prefix="tokcache-bench-") as folder:
        ours = Ours(Path(folder))
        try:
            _soak(options, report, ours)
        finally:
            ours.stop()


def _soak(options: argparse.Namespace, report: Report, ours: Ours) -> None:
    expected = []
    for body in bodies():
        asked = {**body, "cache_prompt": False}
        found = httpx.post(ours.urls[0] + CHAT, json=asked, timeout=60, trust_env=False).json()
        expected.append(found["choices"][0]["message"]["content"])
    if len(set(expected)) < len(expected):
        raise RuntimeError("two prompts have the same answer, so a mix-up would not be seen")
    n_sockets = _n_sockets(ours)
    clients = Clients(ours.url(), expected, time.monotonic() + options.seconds)
    threads = [threading.Thread(target=clients.work, args=(n,)) for n in range(options.clients)]
    for thread in threads:
        thread.start()
    memory: list[tuple[float, int]] = []
    n_kills, next_kill = 0, time.monotonic() + options.kill_every
    numbers = itertools.cycle(range(N_SERVERS))
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        memory.append((time.monotonic(), _memory_bytes(ours)))
        if next_kill < time.monotonic() < clients.deadline - DOWN_S:
            clients.killed_at = float("inf")
            ours.crash(next(numbers))
            n_kills += 1
            clients.killed_at = time.monotonic()
            next_kill = time.monotonic() + options.kill_every
    counts = clients.counts
    report.fact("requests", dict(counts))
    report.fact("servers killed", n_kills)
    report.check("no answer to another prompt", is_right=not counts["swapped"])
    n_told = counts["right"] + counts["different"]
    is_right = n_told > 0 and counts["different"] <= MAX_DIFFERENT * n_told
    report.check("greedy answers are the bare server's", is_right=is_right)
    report.check("failures only around a kill", is_right=not clients.failures,
                 found=clients.failures[:3] or "")  # fmt: skip
    _check_leaks(report, ours, n_sockets)
    last = memory[len(memory) // 2 :]
    report.fact("memory of the gateway, MB", round(last[-1][1] / 1e6, 1))
    at, n_bytes = zip(*last, strict=True)
    growth = linear_regression(at, n_bytes).slope * (at[-1] - at[0]) / n_bytes[0]
    # In a short run the allocator still takes memory for the first requests.
    if options.seconds >= 300:
        report.bar("memory grown over the last half", growth, MAX_GROWTH, "of it", most=True)
    else:
        report.fact("memory grown over the last half", f"{growth:.2%}")


def _check_leaks(report: Report, ours: Ours, n_sockets: int) -> None:
    """Check that nothing is under way once all clients have left."""
    deadline = time.monotonic() + 30
    while True:
        told = httpx.get(f"{ours.url()}/status.json", trust_env=False).json()
        slots = [slot for server in told["servers"] for slot in server["slots"]]
        n_busy = sum(slot["is_busy"] for slot in slots)
        for url in ours.urls:
            listed = httpx.get(f"{url}/slots", trust_env=False).json()
            n_busy += sum(slot["is_processing"] for slot in listed)
        n_more = _n_sockets(ours) - n_sockets
        is_over = not n_busy and not told["totals"]["queue"] and n_more <= 0
        if is_over or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    report.check("no slot is left busy", is_right=not n_busy, found=n_busy)
    report.check("no request is left in the queue", is_right=not told["totals"]["queue"])
    report.check("no connection is left open", is_right=n_more <= 0, found=n_more)


def _n_sockets(ours: Ours) -> int:
    n_sockets = 0
    for each in (ours.proc / "fd").iterdir():
        try:
            n_sockets += str(each.readlink()).startswith("socket:")
        except FileNotFoundError:  # closed since the listing
            continue
    return n_sockets


def _memory_bytes(ours: Ours) -> int:
    return int((ours.proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
