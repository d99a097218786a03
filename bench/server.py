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

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer

import tokcache
from bench import _report
from bench.restore import big_model
from bench.workloads import chats
from tokcache import TokenIds, samples
from tokcache._prefix import n_common
from tokcache.llama.server import Completion, LlamaServer, SlotSettings
from tokcache.samples.server_process import ServerProcess

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


def figures(phase: Phase, held: dict[str, list[TokenIds]]) -> dict[str, dict[str, float]]:
    """Return each system's figures in one phase."""
    found = {}
    for name in (ALONE, RAM, OURS, EXACT):
        answers = phase.answers[name]
        n_least = sum(least(answers, held.setdefault(name, [])))
        seconds = sorted(answer.first_token_s for answer in answers)
        n_prefilled = sum(answer.n_prefilled for answer in answers)
        found[name] = {
            "prompts": len(answers),
            "prefilled": n_prefilled,
            "least": n_least,
            "over least": n_prefilled / n_least,
            "ttft median ms": median(seconds) * 1000,
            "ttft p95 ms": seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))] * 1000,
        }
    return found


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    """Print a line per system."""
    print(f"{title}: {found[OURS]['prompts']} prompts")
    for name, row in found.items():
        print(
            f"  {name:26} {row['prefilled']:9,.0f} prefilled {row['over least']:7.2f}x least"
            f"   ttft median {row['ttft median ms']:8.1f} ms  p95 {row['ttft p95 ms']:8.1f} ms",
            flush=True,
        )


def compare(expected: list[Completion], phases: list[Phase]) -> dict[str, Any]:
    """Print and return the number of answers that differ from those of an uncached run."""
    found = {}
    for name in (ALONE, RAM, OURS, EXACT):
        gaps = differences(expected, [one for phase in phases for one in phase.answers[name]])
        largest = max(gaps, default=0.0)
        is_right = not gaps if name == EXACT else largest <= NEAR_TIE
        found[name] = {"different": len(gaps), "largest gap": largest, "right": is_right}
        print(
            f"  {name:26} {len(expected) - len(gaps)} of {len(expected)} answers equal, largest"
            f" gap of the others {largest:.4f}: {'right' if is_right else 'WRONG'}",
            flush=True,
        )
    return found


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


def main(argv: list[str]) -> int:
    """Compare, then measure; exit code 1 if answers are wrong or a bar is missed."""
    options = _report.parser(__doc__ or "")
    options.add_argument("--turns", type=int, default=8, help="maximum of prompts per session")
    options.add_argument("--shared", action="store_true", help="one system prompt for all")
    args = options.parse_args(argv)
    model = big_model(n_layers=4, n_embd=384, n_heads=6, n_kv_heads=2, n_ff=1024)
    tokenizer = tokcache.wrap(Tokenizer.from_file(str(samples.tiny_tokenizer())))
    asked = prompts(tokenizer, args.turns, is_shared=args.shared)
    with contextlib.ExitStack() as opened:
        systems = [System(name, model, tokenizer) for name in (ALONE, RAM, OURS, EXACT)]
        for system in systems:
            opened.callback(system.close)
        expected, phases = play(systems, asked)
        stats = {name: systems[i].client.stats() for i, name in ((2, OURS), (3, EXACT))}
    equality = compare(expected, phases)
    held: dict[str, list[TokenIds]] = {}
    found = {phase.name: figures(phase, held) for phase in phases}
    for title, rows in found.items():
        show(title, rows)
    print(f"  {OURS}: {stats[OURS]}")
    bars = _report.show_bars(
        [
            _report.Bar(
                f"{title}: prefilled over the least possible",
                rows[OURS]["over least"],
                MAX_OVER_LEAST,
                is_ceiling=True,
            )
            for title, rows in found.items()
        ]
    )
    is_good = all(one["right"] for one in equality.values()) and all(bar["met"] for bar in bars)
    report = {
        "environment": _report.environment("xllamacpp", "httpx", "numpy"),
        "answers": equality,
        "phases": found,
        "bars": bars,
    }
    _report.finish(report, args.json)
    return 0 if is_good else 1
