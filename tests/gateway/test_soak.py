"""Many clients at once, some of which leave: no wrong text, no leaked slot or connection.

`TOKCACHE_SOAK_S=600 python -m pytest -s tests/gateway/test_soak.py` is the long run: 16 clients, a
llama-server killed each 40 s and started again, and a memory of the process that does not grow.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

from tests.gateway.gateways import SYSTEM, Gateway, gateway, httpx, upstream

if TYPE_CHECKING:
    from tokcache.samples.server_process import ServerProcess

SECONDS = float(os.environ.get("TOKCACHE_SOAK_S", "10"))
IS_LONG = SECONDS >= 60
N_CLIENTS, N_CHATS, N_TURNS = (16 if IS_LONG else 8), 6, 3
# Another split into batches changes the last bits, and with them a few greedy answers.
MAX_DIFFERENT = 0.1
KILL_S, DOWN_S = 40.0, 15.0
MAX_GROWTH = 0.02  # of the memory, over the last half of a long run


def bodies() -> list[dict[str, Any]]:
    made = []
    for chat in range(N_CHATS):
        messages = [{"role": "system", "content": f"{chat % 2} {SYSTEM}"}]
        for turn in range(N_TURNS):
            messages = [*messages, {"role": "user", "content": f"chat {chat} turn {turn} " * 10}]
            made.append({"messages": messages, "max_tokens": 6, "temperature": 0})
    return made


def n_sockets() -> int:
    links = (str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
    return sum(link.startswith("socket:") for link in links)


def memory_bytes() -> int:
    n_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return n_pages * os.sysconf("SC_PAGE_SIZE")


class Clients:
    """Clients that ask for known answers until a deadline; their findings are counted."""

    def __init__(self, served: Gateway, expected: list[str]) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.killed_at = float("-inf")
        self._served = served
        self._expected = expected
        self._asked = bodies()
        self._lock = threading.Lock()
        self.deadline = time.monotonic() + SECONDS

    def work(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._served.url, timeout=60, trust_env=False) as client:
            while time.monotonic() < self.deadline:
                number = rng.randrange(len(self._asked))
                try:
                    found = self._leave(client, rng, number) or self._ask(client, rng, number)
                except Exception as error:  # noqa: BLE001 (reported by the test)
                    # A request that runs on a server that is killed gets an error.
                    found = "broken"
                    if time.monotonic() - self.killed_at > DOWN_S:
                        self.failures.append(repr(error))
                        return
                with self._lock:
                    self.counts[found] += 1

    def _leave(self, client: Any, rng: random.Random, number: int) -> str:
        """Sometimes read a few lines of a long answer and leave."""
        if rng.random() >= 0.3:
            return ""
        body = {**self._asked[number], "stream": True, "max_tokens": 200}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for _ in zip(answer.iter_lines(), range(rng.randrange(9)), strict=False):
                pass
        return "left"

    def _ask(self, client: Any, rng: random.Random, number: int) -> str:
        path, body = "/v1/chat/completions", self._asked[number]
        if rng.random() < 0.5:
            answer = client.post(path, json=body)
            told = answer.json()["choices"][0]["message"]["content"]
        else:
            told, line = "", ""
            with client.stream("POST", path, json={**body, "stream": True}) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        found = httpx.Response(200, text=line[6:]).json()
                        for choice in found["choices"]:
                            told += choice["delta"].get("content") or ""
                    elif line.startswith("data: "):
                        assert line == "data: [DONE]", line
        if told == self._expected[number]:
            return "right"
        return "swapped" if told in self._expected else "different"


def test_soak(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(upstream(tmp_path / "slots")) for _ in range(2)]
        served = stack.enter_context(gateway(tmp_path / "own", *processes, max_queue=64))
        expected = []
        for body in bodies():
            found = httpx.post(f"{processes[0].url}/v1/chat/completions",
                               json={**body, "cache_prompt": False}, timeout=60)  # fmt: skip
            expected.append(found.json()["choices"][0]["message"]["content"])
        assert len(set(expected)) == len(expected), "two prompts with one answer show no mix-up"
        before = n_sockets()
        clients = Clients(served, expected)
        threads = [threading.Thread(target=clients.work, args=(n,)) for n in range(N_CLIENTS)]
        for thread in threads:
            thread.start()
        memory = []
        next_kill, turns = time.monotonic() + KILL_S, itertools.cycle(range(2))
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.5)
            memory.append((time.monotonic(), memory_bytes()))
            if IS_LONG and next_kill < time.monotonic() < clients.deadline - 2 * DOWN_S:
                clients.killed_at = time.monotonic()
                number = next(turns)
                processes[number] = restarted(stack, processes[number], tmp_path / "slots")
                clients.counts["killed"] += 1
                clients.killed_at = time.monotonic()
                next_kill = time.monotonic() + KILL_S
        counts = clients.counts
        growth = growth_of(memory[len(memory) // 2 :])
        sys.stdout.write(f"\n{dict(counts)}; memory +{growth:.2%} of {memory[-1][1]:,} bytes\n")
        assert not clients.failures
        served.wait_until_idle()
        assert counts["left"] > 3
        assert counts["right"] > 20
        assert counts["swapped"] == 0
        assert counts["different"] <= MAX_DIFFERENT * (counts["right"] + counts["different"])
        assert counts["killed"] >= int(SECONDS / 2 / KILL_S) * IS_LONG
        assert growth < MAX_GROWTH or not IS_LONG
        require_nothing_leaked(served, processes, before)


def restarted(stack: contextlib.ExitStack, process: ServerProcess, folder: Path) -> ServerProcess:
    """Kill a llama-server and start another one at its address."""
    process.kill()
    process.close()
    time.sleep(1)
    port = int(process.url.rpartition(":")[2])
    return stack.enter_context(upstream(folder, port=port))


def growth_of(memory: list[tuple[float, int]]) -> float:
    """Return by which share the memory grew, by a line through all samples."""
    if len(memory) < 2:
        return 0.0
    at, n_bytes = zip(*memory, strict=True)
    slope, _ = linear_regression(at, n_bytes)
    return float(slope * (at[-1] - at[0]) / n_bytes[0])


def require_nothing_leaked(served: Gateway, processes: list[ServerProcess], before: int) -> None:
    slots = [s for server in served.service.router.servers.values() for s in server.slots]
    assert not any(slot.is_busy for slot in slots)
    assert all(file.n_readers == 0 for file in served.service.files)
    assert not served.service.router.queue
    assert served.http.get("/health").status_code == 200
    time.sleep(1)
    assert n_sockets() <= before + 4
    for process in processes:
        listed = httpx.get(f"{process.url}/slots").json()
        assert not any(slot["is_processing"] for slot in listed)
