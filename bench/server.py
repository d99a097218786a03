"""Six interleaved sessions on a llama-server with two slots, and a restart half-way.

Systems: the server alone; the server with its --cache-ram (8 GiB); the server through tokcache; the
same in reproducible mode. Each has its own server with the same model of 4 layers x 384, one thread
(two threads on a busy machine wait for each other) and pieces of 256 tokens. Every prompt is sent
to all systems, in random order, one at a time; half-way every server is killed and started again on
its folder.

First the answers are compared with those of prompts decoded from an empty slot: reproducible mode
must give all of them, token for token. Where another system's answer differs, the two likeliest
tokens at that place must be nearly equal, as for any other split into batches. The figures are the
prefilled tokens according to the server's `timings` (prompt tokens less `cache_n`), divided by the
least possible with every earlier state available, and the time to the first token, including
tokcache's work before the request.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import tokcache
from bench._report import Report, progress
from bench.restore import big_model
from bench.workloads import chats
from tokcache import TokenIds, samples
from tokcache._prefix import n_common
from tokcache.llama.server import Completion, LlamaServer, SlotSettings
from tokcache.samples.server_process import ServerProcess

PACKAGES = ("xllamacpp", "httpx", "numpy")
UNIT = "tokens prefilled, ms to the first token"
BAR = "at most 1.05 times the least prefill"
IN_ALL = ("--turns", "2")
N_SESSIONS, N_SLOTS, BLOCK, N_CTX = 6, 2, 256, 8192
N_ANSWER = 8
NEAR_TIE = 0.05  # the same tolerance as in tests/integration/test_llama_exact.py
MAX_OVER_LEAST = 1.05
ALONE, RAM, OURS, EXACT = (
    "llama-server",
    "llama-server, --cache-ram",
    "tokcache",
    "tokcache, reproducible",
)
SETTINGS: dict[str, dict[str, Any]] = {
    RAM: {"cache_ram_mib": 8192},
    # With checkpoints a server decodes in other pieces.
    EXACT: {"n_ctx_checkpoints": 0},
}


@dataclass(slots=True)
class Answer:
    """The answer of one system to one prompt."""

    prompt: TokenIds
    completion: Completion
    first_token_s: float
    n_prefilled: int


@dataclass(slots=True)
class Phase:
    """Prompts before or after the restart, and the answers of every system."""

    name: str
    answers: dict[str, list[Answer]] = field(default_factory=dict)


class System:
    """One server and the way to send it prompts."""

    def __init__(self, name: str, model: str, tokenizer: Any) -> None:
        self.name = name
        self._files = contextlib.ExitStack()
        folder = self._files.enter_context(tempfile.TemporaryDirectory(prefix="tokcache-bench-"))
        self._start: Callable[..., ServerProcess] = lambda port=0: ServerProcess(
            model,
            n_ctx=N_CTX,
            n_slots=N_SLOTS,
            block_tokens=BLOCK,
            n_threads=1,
            port=port,
            slot_folder=Path(folder, "slots"),
            overrides=SETTINGS.get(name),
        )
        self._process = self._start()
        settings = SlotSettings(
            slot_folder=Path(folder, "slots"), reproducible=name == EXACT, block_tokens=BLOCK
        )
        self.client = LlamaServer(
            self._process.url, tokenizer=tokenizer, slot_settings=settings, retries=5
        )

    def ask(self, prompt: TokenIds, session: int) -> Answer:
        """Return the answer to a prompt."""
        if self.name in (OURS, EXACT):
            found = self.client.complete(
                prompt, n_predict=N_ANSWER, conversation=str(session), n_probs=2
            )
            # Reproducible mode decodes the complete blocks of a prompt in a separate request.
            n_used = found.n_restored if self.name == EXACT else found.completion.n_cached
            return Answer(prompt, found.completion, found.first_token_s, len(prompt) - n_used)
        completion = self.client.completion(prompt, n_predict=N_ANSWER, n_probs=2)
        return Answer(
            prompt, completion, completion.first_token_s, len(prompt) - completion.n_cached
        )

    def ask_uncached(self, prompt: TokenIds) -> Completion:
        """Return the answer to a prompt that is decoded in an empty slot."""
        return self.client.completion(
            prompt, n_predict=N_ANSWER, n_probs=2, id_slot=0, cache_prompt=False
        )

    def restart(self) -> None:
        """Kill the server and start it again at the same address."""
        self.client.flush()
        port = int(self._process.url.rpartition(":")[2])
        self._process.kill()
        self._process.close()
        self._process = self._start(port)

    def close(self) -> None:
        """End the server."""
        self.client.close()
        self._process.close()
        self._files.close()


def prompts(tokenizer: Any, n_turns: int, *, is_shared: bool) -> list[tuple[int, TokenIds]]:
    """Return the sessions' prompts in turns; each continues the previous one of its session."""
    made = (
        chats.made(N_SESSIONS)
        if is_shared
        else [chats.made(1, seed=seed)[0] for seed in range(N_SESSIONS)]
    )
    plain = Tokenizer.from_file(str(samples.tiny_tokenizer()))
    texts = [chats.prompts([chat], plain)[:n_turns] for chat in made]
    longest = max(map(len, texts))
    return [
        (session, tokenizer.token_ids(turns[turn]))
        for turn in range(longest)
        for session, turns in enumerate(texts)
        if turn < len(turns)
    ]


def replay(
    systems: list[System], asked: list[tuple[int, TokenIds]], phase: Phase, rng: random.Random
) -> None:
    """Send every prompt to every system."""
    for session, prompt in asked:
        for system in rng.sample(systems, len(systems)):
            phase.answers.setdefault(system.name, []).append(system.ask(prompt, session))


def differences(expected: list[Completion], answers: list[Answer]) -> list[float]:
    """Return, for each answer that differs, the gap between the two likeliest tokens there."""
    gaps = []
    for right, given in zip(expected, answers, strict=True):
        if right.token_ids == given.completion.token_ids:
            continue
        n_same = n_common(right.token_ids, given.completion.token_ids)
        # One of the two may have ended here; then the other one has the probabilities.
        reported = max(right.probabilities, given.completion.probabilities, key=len)
        # Within an unfinished character the server reports none; then it can't be a near tie.
        likely = reported[n_same].logprobs[:2] if len(reported) == N_ANSWER else (99.0, 0.0)
        gaps.append(likely[0] - likely[1])
    return gaps


def least(answers: list[Answer], held: list[TokenIds]) -> Iterator[int]:
    """Yield the least tokens to prefill for each prompt, with all earlier states of `held`."""
    for answer in answers:
        known = max((n_common(state, answer.prompt) for state in held), default=0)
        yield len(answer.prompt) - min(known, len(answer.prompt) - 1)
        held.append(TokenIds([*answer.prompt, *answer.completion.token_ids[:-1]]))


def play(systems: list[System], asked: list[tuple[int, TokenIds]]) -> tuple[Any, list[Phase]]:
    """Send the first half, restart, send the second; return uncached answers and both phases."""
    before, after = Phase("before the restart"), Phase("after the restart")
    half = len(asked) // (2 * N_SESSIONS) * N_SESSIONS
    rng = random.Random(3)
    replay(systems, asked[:half], before, rng)
    for system in systems:
        system.restart()
    replay(systems, asked[half:], after, rng)
    expected = [systems[0].ask_uncached(prompt) for _, prompt in asked]
    return expected, [before, after]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--turns", type=int, default=8, help="maximum of prompts per session")
    parser.add_argument("--shared", action="store_true", help="one system prompt for all")


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare the answers, then the prefilled tokens and the times to the first token."""
    model = big_model(n_layers=4, n_embd=384, n_heads=6, n_kv_heads=2, n_ff=1024)
    tokenizer = tokcache.wrap(Tokenizer.from_file(str(samples.tiny_tokenizer())))
    asked = prompts(tokenizer, options.turns, is_shared=options.shared)
    names = (ALONE, RAM, OURS, EXACT)
    with contextlib.ExitStack() as opened:
        systems = [System(name, model, tokenizer) for name in names]
        for system in systems:
            opened.callback(system.close)
        with progress() as shown:
            shown.add_task("asking", total=None)
            expected, phases = play(systems, asked)
        for place in (2, 3):
            report.fact(f"{names[place]}: counters", repr(systems[place].client.stats()))

    for name in names:
        gaps = differences(expected, [one for phase in phases for one in phase.answers[name]])
        largest = max(gaps, default=0.0)
        is_right = not gaps if name == EXACT else largest <= NEAR_TIE
        n_equal = len(expected) - len(gaps)
        found = f"{n_equal} of {len(expected)} equal, largest gap of the others {largest:.4f}"
        report.check(f"answers of {name}", is_right=is_right, found=found)

    held: dict[str, list[TokenIds]] = {name: [] for name in names}
    for phase in phases:
        n_least = {name: sum(least(phase.answers[name], held[name])) for name in names}
        prefilled = {name: sum(a.n_prefilled for a in phase.answers[name]) for name in names}
        case = f"{phase.name}, {len(phase.answers[OURS])} prompts"
        over = {name: prefilled[name] / n_least[name] for name in names}
        report.table(f"{case}: prefilled tokens over the least possible", "x", over, base=OURS)
        ms = {name: [1000 * a.first_token_s for a in phase.answers[name]] for name in names}
        report.table(f"{case}: time to the first token", "ms", ms, base=OURS)
        title = f"{phase.name}: prefilled over the least possible"
        report.bar(title, over[OURS], MAX_OVER_LEAST, most=True)
