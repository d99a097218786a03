"""Soak test: clients that abort at random, on a llama-server that is killed repeatedly.

Sixteen clients have chats through four connections to the same server: a LlamaServer and an
AsyncLlamaServer, each with and without reproducible mode, on two slots each. They use whole
completions and streams; a third of the streams are closed early, and some requests are cancelled.
Every minute the server is killed and started again on its slot folder. A chat that gets
an error of the server continues when the server is back.

Every answer must be that of a server without other clients; two tokens that are almost equally
likely may change places, because the server decodes tokens of several slots in one batch. No slot
may be lost, the slot folder must stay within its budget, and only errors of a killed server are
allowed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcache import samples
from tokcache.errors import ServerError, ServerFailed, ServerTimeout, ServerUnreachable
from tokcache.llama.server import AsyncLlamaServer, Completion, LlamaServer, SlotSettings
from tokcache.llama.server.slot import Condition
from tokcache.samples.server_process import ServerProcess

if TYPE_CHECKING:
    from bench._report import Report

BLOCK, N_CTX, N_SLOTS, N_ANSWER = 64, 1024, 8, 6
MAX_BYTES = 4_000_000
NEAR_TIE = 0.05
PACKAGES = ("xllamacpp", "httpx")
UNIT = "wrong answers"
BAR = "none is wrong"
IN_ALL = ("--seconds", "20", "--kill-every", "6")
AnyServer = LlamaServer | AsyncLlamaServer
# The errors of a server that was killed or is starting.
EXPECTED = (ServerUnreachable, ServerTimeout, ServerFailed)


@dataclass(slots=True)
class Tally:
    """Counts of events and of errors."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, gap: float) -> None:
        """Record an answer that differs."""
        with self.lock:
            self.gaps.append(gap)

    def add(self, event: str) -> None:
        """Count one event."""
        with self.lock:
            self.counts[event] += 1

    def report(self, error: str) -> None:
        """Record an error that must not happen."""
        with self.lock:
            self.wrong.append(error)


class Reference:
    """A server without other clients, which gives the correct answers."""

    def __init__(self, server: LlamaServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._known: dict[tuple[int, ...], Completion] = {}

    def answer(self, tokens: list[int]) -> Completion:
        """Return the answer to a prompt that is decoded in an empty slot."""
        key = tuple(tokens)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._server.completion(
                    tokens, n_predict=N_ANSWER, n_probs=4, id_slot=0, cache_prompt=False
                )
            return self._known[key]


def gap(given: Completion, expected: Completion) -> float | None:
    """Return the log probability by which the right token was likelier at the first difference.

    0 without a difference. None if the server does not report the probabilities: it leaves out
    tokens within an unfinished character.
    """
    n_reported = 0
    for ours, theirs in zip(given.token_ids, expected.token_ids, strict=False):
        is_left = n_reported < len(expected.probabilities)
        reported = expected.probabilities[n_reported] if is_left else None
        is_reported = reported is not None and reported.token_ids[0] == theirs
        n_reported += is_reported
        if ours != theirs:
            if reported is None or not is_reported:
                return None
            likely = dict(zip(reported.token_ids, reported.logprobs, strict=True))
            return likely[theirs] - likely.get(ours, -99.0)
    # A stream leaves out ids after an unfinished character.
    return 0.0 if len(given.token_ids) <= len(expected.token_ids) else 99.0


class Client:
    """A client that has one chat after the other until the time is up."""

    def __init__(
        self, number: int, server: AnyServer, reference: Reference, tally: Tally, deadline: float
    ) -> None:
        self._rng = random.Random(number)
        self._server = server
        self._reference = reference
        self._tally = tally
        self._deadline = deadline
        self._scope = self._rng.choice([None, "a", "b"])
        self._is_exact = server._manager.settings.reproducible

    def run(self) -> None:
        """Chat until the time is up; record every error that a killed server does not explain."""
        try:
            while time.monotonic() < self._deadline:
                tokens = _tokens(random.Random(self._rng.randrange(12)), 150)
                for _ in range(self._rng.randrange(2, 6)):
                    tokens = self._turn(tokens)
        except Exception as error:  # noqa: BLE001 (the soak must end and report it)
            self._tally.report(f"{type(error).__name__}: {error}")

    def _turn(self, tokens: list[int]) -> list[int]:
        if time.monotonic() > self._deadline or len(tokens) > N_CTX - 100:
            return tokens
        ask = self._ask_in_a_loop if isinstance(self._server, AsyncLlamaServer) else self._ask
        try:
            given = ask(self._server, tokens, is_stream=self._rng.random() < 1 / 2)
        except EXPECTED as error:
            self._tally.add(type(error).__name__)
            time.sleep(0.2 * self._rng.random())
            return tokens
        if given is None:
            self._tally.add("aborted")
            return tokens
        self._tally.add("answered")
        expected = self._reference.answer(tokens)
        found = gap(given, expected)
        if found is None:
            self._tally.add("not judged")
            found = 0.0
        if found > 0:
            self._tally.note(found)
        if found > NEAR_TIE:
            self._tally.report(
                f"{len(tokens)} tokens, {self._is_exact=}: {given.token_ids} not"
                f" {expected.token_ids}, {found:.3f}"
            )
        return [*tokens, *given.token_ids, *_tokens(self._rng, 25)]

    def _ask(self, server: Any, tokens: list[int], *, is_stream: bool) -> Completion | None:
        if not is_stream:
            found = server.complete(tokens, n_predict=N_ANSWER, scope=self._scope)
            return found.completion  # type: ignore[no-any-return]
        n_read, n_predict = self._length()
        pieces = server.stream(tokens, n_predict=n_predict, scope=self._scope)
        with contextlib.closing(pieces):
            for n_pieces, piece in enumerate(pieces, start=1):
                if n_pieces == n_read:
                    return None
                if piece.completion is not None:
                    return piece.completion  # type: ignore[no-any-return]
        return None

    def _ask_in_a_loop(
        self, server: Any, tokens: list[int], *, is_stream: bool
    ) -> Completion | None:
        n_read, n_predict = self._length()

        async def streamed() -> Completion | None:
            pieces = server.stream(tokens, n_predict=n_predict, scope=self._scope)
            n_pieces = 0
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    n_pieces += 1
                    if n_pieces == n_read:
                        return None
                    if piece.completion is not None:
                        return piece.completion  # type: ignore[no-any-return]
            return None

        async def whole() -> Completion | None:
            limit_s = None if n_read is None else self._rng.random() * 0.2
            asked = server.complete(tokens, n_predict=n_predict, scope=self._scope)
            try:
                found = await asyncio.wait_for(asked, limit_s)
            except TimeoutError:
                return None
            return found.completion if limit_s is None else None

        return asyncio.run(streamed() if is_stream else whole())

    def _length(self) -> tuple[int | None, int]:
        """Return the number of pieces after which to abort, a third of the time, and n_predict."""
        is_aborted = self._rng.random() < 1 / 3
        return (self._rng.randrange(1, 4), 400) if is_aborted else (None, N_ANSWER)


def _tokens(rng: random.Random, n_tokens: int) -> list[int]:
    return [rng.randrange(3, 2048) for _ in range(n_tokens)]


class Killer:
    """Kills the server and starts it again, at a fixed interval."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.process = self._start(0)
        self.port = int(self.process.url.rpartition(":")[2])

    def _start(self, port: int) -> ServerProcess:
        return ServerProcess(
            samples.tiny_model(),
            n_ctx=N_CTX,
            n_slots=N_SLOTS,
            block_tokens=BLOCK,
            n_threads=1,
            port=port,
            slot_folder=self._folder,
        )

    def run(self, every_s: float, deadline: float, tally: Tally) -> None:
        """Kill until the time is up."""
        while time.monotonic() + every_s < deadline:
            time.sleep(every_s)
            self.process.kill()
            self.process.close()
            self.process = self._start(self.port)
            tally.add("killed")

    def close(self) -> None:
        """End the current server."""
        self.process.close()


def watch(folder: Path, deadline: float) -> int:
    """Return the largest size of the folder in bytes until the deadline."""
    most = 0
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # a file was deleted during the loop
            most = max(most, sum(file.stat().st_size for file in folder.iterdir()))
        time.sleep(0.1)
    return most


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[tuple[Killer, list[AnyServer], Reference]]:
    """Yield a server to kill, four clients of it, and a reference server."""
    killer = Killer(folder)
    with contextlib.ExitStack() as opened:
        opened.callback(killer.close)
        url = killer.process.url
        clients: list[AnyServer] = []
        for number in range(4):
            settings = SlotSettings(
                slot_folder=folder,
                max_bytes=MAX_BYTES,
                slot_ids=(2 * number, 2 * number + 1),
                reproducible=number % 2 == 1,
                block_tokens=BLOCK,
            )
            if number < 2:
                clients.append(LlamaServer(url, timeout_s=60, slot_settings=settings))
            else:
                clients.append(AsyncLlamaServer(url, timeout_s=60, slot_settings=settings))
            opened.callback(close, clients[-1])
        right = opened.enter_context(
            ServerProcess(
                samples.tiny_model(), n_ctx=N_CTX, n_slots=1, block_tokens=BLOCK, n_threads=1
            )
        )
        yield killer, clients, Reference(opened.enter_context(LlamaServer(right.url)))


def close(client: AnyServer) -> None:
    """Close either client."""
    if isinstance(client, AsyncLlamaServer):
        asyncio.run(client.aclose())
    else:
        client.close()


def soak(seconds: float, n_clients: int, every_s: float) -> tuple[Tally, dict[str, Any]]:
    """Run the soak test; return the counts of events and the figures."""
    tally = Tally()
    with (
        tempfile.TemporaryDirectory(prefix="tokcache-soak-") as folder,
        servers(Path(folder)) as (killer, clients, reference),
        ThreadPoolExecutor(n_clients + 2) as pool,
    ):
        deadline = time.monotonic() + seconds
        most = pool.submit(watch, Path(folder), deadline)
        killing = pool.submit(killer.run, every_s, deadline, tally)
        chats = [
            pool.submit(Client(n, clients[n % 4], reference, tally, deadline).run)
            for n in range(n_clients)
        ]
        for task in (*chats, killing):
            task.result()
        for client in clients:
            client._manager.flush(60)
            for slot in client._manager.table.slots.values():
                if slot.condition is not Condition.FREE:
                    tally.report(f"slot {slot.id} is {slot.condition.name}")
        with LlamaServer(clients[0].url) as other:
            for listed in other.slots():
                if listed.is_processing:
                    tally.report(f"slot {listed.id} is still decoding")
        figures: dict[str, Any] = {
            "counts": dict(tally.counts),
            "wrong": tally.wrong[:20],
            "answers that differ": len(tally.gaps),
            "largest gap": max(tally.gaps, default=0.0),
            "most bytes": most.result(),
            # A file is deleted only after its replacement was written.
            "byte bound": len(clients) * MAX_BYTES + 2 * N_SLOTS * N_CTX * 1100,
            "stats": [repr(client._manager.stats()) for client in clients],
        }
    if figures["most bytes"] > figures["byte bound"]:
        tally.report(f"{figures['most bytes']:,} bytes in the slot folder")
    return tally, figures


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=16, help="half of them in either mode")
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS")


def run(options: argparse.Namespace, report: Report) -> None:
    """Soak, and report every error that a killed server does not explain."""
    try:
        tally, figures = soak(options.seconds, options.clients, options.kill_every)
    except ServerError as error:
        report.check("the soak could be run", is_right=False, found=error)
        return
    for name, value in figures.items():
        report.fact(name, value)
    title = "no wrong text, no lost slot, no unbounded file"
    report.check(title, is_right=not tally.wrong, found="; ".join(tally.wrong[:20]))
