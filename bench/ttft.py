"""Six interleaved chats: tokens prefilled and time to the first token, tokcache and its peers.

The first turns of tau-bench chats (or of chats made here, if those are absent) are interleaved
round robin, so that a context with one sequence never holds the prefix of the next prompt. Each
system has its own process, all with the same random model, llama_cpp's default n_batch of 512 and
one thread (two threads on a busy machine wait for each other). Every prompt goes to all systems,
one at a time, in random order. Half-way the disk systems are ended and started again on their
folder, and the Redis systems continue in a new process.

First the texts are compared with those of prompts decoded as a whole in pieces of 256:
reproducible mode must give all of them, token for token, in every tier. As a control, prompts with
other first 256 tokens must give other texts. llama-server has other kernels, so only its prefilled
tokens are compared. The figures of each system are the decoded prompt tokens divided by the least
possible (the tokens after the longest prefix in common with any earlier prompt and its answer, at
least one), the time to the first token, and the time of whole requests, including saving.

The bars are for the default mode, which reuses prefixes to the token, as LlamaRAMCache does.
Reproducible mode reuses complete blocks of 256, so its least possible is counted in blocks; its
figures are printed as well. For `unseen alone` the seen tokens are put into the context before the
clock starts: its time is that of decoding the unseen tokens. `--large` uses a model of 12 layers x
768, with which decoding takes nearly all of the time, so that caches that find the same prefixes
have about the same times; without it the model has 4 layers x 384. With a vocabulary of 151,665
tokens LlamaRAMCache stores a matrix of 310 MB with every state: 4 turns of 6 chats take 8 GB of
memory, and LlamaDiskCache the same on disk.

In the end the first tokens of a prompt are pre-warmed (`Llama.prewarm`) in a process with a folder
of states. The process is ended and started again several times; each time the first request and a
second one, which begin with these tokens and go on with others, are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from bench._report import Report, progress
from bench.adapters.answering import (
    BLOCK,
    N_ANSWER,
    N_CTX,
    PREFIX,
    PREWARMED,
    SYSTEMS,
    Answer,
    Setting,
    Worker,
    redis_server,
    why_without,
)
from bench.restore import big_model
from bench.workloads import chats
from bench.workloads.data import default_tokenizers, tokenizer_file
from tokcache import TokenIds
from tokcache._prefix import n_common

if TYPE_CHECKING:
    from rich.progress import Progress

PACKAGES = ("llama-cpp-python", "xllamacpp", "numpy", "redis")
UNIT = "ms to the first token, tokens prefilled"
BAR = "at most 1.02 times the least prefill, and 0.42 times the time of its peer"
IN_ALL = ("--turns", "2")
N_SESSIONS = 6
SMALL = {"n_layers": 4, "n_embd": 384, "n_heads": 6, "n_kv_heads": 2, "n_ff": 1024}
EXPECTED, IDEAL, PEER, SERVER = "nothing kept", "unseen alone", "LlamaRAMCache", "llama-server"
RAM, DISK, REDIS = "tokcache RAM", "tokcache disk", "tokcache Redis"
REPRODUCIBLE = ", reproducible"
MAX_OVER_LEAST, MAX_OVER_PEER, MAX_OVER_IDEAL, MAX_OVER_RAM = 1.02, 0.42, 1.1, 1.3
MAX_OVER_SECOND = 1.2
N_WARM, N_QUESTION, N_RESTARTS = 1500, 64, 5

Prompts = list[list[int]]


@dataclass(slots=True)
class Run:
    """The answers of one system, and the prompt at which a new process continued."""

    answers: list[Answer] = field(default_factory=list)
    least: list[int] = field(default_factory=list)


def prompts(tokenizer: Any, n_turns: int) -> tuple[str, Prompts]:
    """Return the source of the chats, and the sessions' prompts in turns."""
    source, found = chats.load()
    sessions = [chats.prompts([chat], tokenizer)[:n_turns] for chat in found]
    sessions = [one for one in sessions if len(one) == n_turns][:N_SESSIONS]
    texts = [session[turn] for turn in range(n_turns) for session in sessions]
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    longest = max(map(len, encoded)) + N_ANSWER
    if longest > N_CTX:
        raise SystemExit(f"a prompt has {longest} tokens, more than {N_CTX}: take fewer --turns")
    return source, encoded


def least(asked: Prompts, answers: list[Answer], grain: int) -> Iterator[int]:
    """Yield the least tokens to prefill with all earlier states, reused in units of `grain`."""
    held: list[TokenIds] = []
    for prompt, answer in zip(asked, answers, strict=True):
        ids = TokenIds(prompt)
        known = max((n_common(state, ids) for state in held), default=0)
        yield len(prompt) - min(known, len(prompt) - 1) // grain * grain
        held.append(TokenIds([*prompt, *answer.token_ids]))


def play(
    workers: list[Worker], asked: Prompts, shown: Progress
) -> tuple[dict[str, Run], list[Answer]]:
    """Send every prompt to every system; half-way some systems continue in another process.

    Return the answers, and those to the last prompts with another beginning and nothing cached.
    """
    rng = random.Random(3)
    runs = {worker.name: Run() for worker in workers}
    task = shown.add_task("asking", total=len(asked) * len(workers))
    for number, prompt in enumerate(asked):
        if number == half(asked):
            for worker in workers:
                if worker.name.startswith((DISK, REDIS)):
                    worker.restart()
        for worker in rng.sample(workers, len(workers)):
            runs[worker.name].answers.append(worker.ask(prompt))
            shown.advance(task)
    for name, run in runs.items():
        run.least = list(least(asked, run.answers, BLOCK if REPRODUCIBLE in name else 1))
    (whole,) = (worker for worker in workers if worker.name == EXPECTED)
    others = [[*rng.choices(range(3, 2000), k=BLOCK), *prompt[BLOCK:]] for prompt in last(asked)]
    return runs, [whole.ask(prompt) for prompt in others]


def last(each: list[Any]) -> list[Any]:
    """Return the items of the last turn."""
    return each[-N_SESSIONS:]


def half(asked: Prompts) -> int:
    """Return the number of prompts before the restart: a number of whole turns."""
    return len(asked) // (2 * N_SESSIONS) * N_SESSIONS


def n_equal(runs: dict[str, Run]) -> dict[str, int]:
    """Return the number of texts of each system that equal those of prompts decoded as a whole."""
    right = [answer.token_ids for answer in runs[EXPECTED].answers]
    return {
        name: sum(answer.token_ids == one for answer, one in zip(run.answers, right, strict=True))
        for name, run in runs.items()
        if name != SERVER
    }


def chosen(report: Report) -> list[str]:
    """Return the systems that can be measured; report why the others are left out."""
    found = []
    for name in SYSTEMS:
        why = why_without(name)
        if why is None:
            found.append(name)
        else:
            report.line(f"left out: {name}: {why}")
    return found


def run_all(
    args: Any, model: str, asked: Prompts, names: list[str], shown: Progress
) -> tuple[dict[str, Run], list[Answer]]:
    """Start every system, send the prompts, and end the systems."""
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="tokcache-bench-"))
        uses_redis = any(name.startswith(REDIS) for name in names)
        url = opened.enter_context(redis_server()) if uses_redis else ""
        workers = []
        for number, name in enumerate(shown.track(names, description="starting")):
            own = Path(folder, str(number))
            own.mkdir()
            workers.append(Worker(name, Setting(model, args.threads, str(own), url)))
            opened.callback(workers[-1].close)
        return play(workers, asked, shown)


def after_restarts(args: Any, model: str, prompt: list[int]) -> tuple[list[Answer], list[Answer]]:
    """Return the answers to the first and second requests after restarts with a warm prefix."""
    rng = random.Random(5)
    prefix = prompt[:N_WARM]
    firsts: list[Answer] = []
    seconds: list[Answer] = []
    with tempfile.TemporaryDirectory(prefix="tokcache-bench-") as folder:
        Path(folder, PREFIX).write_text(json.dumps(prefix))
        worker = Worker(PREWARMED, Setting(model, args.threads, folder, ""))
        try:
            for _ in range(N_RESTARTS):
                worker.restart()
                for answers in (firsts, seconds):
                    question = rng.choices(range(3, 2000), k=N_QUESTION)
                    answers.append(worker.ask([*prefix, *question]))
        finally:
            worker.close()
    return firsts, seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--turns", type=int, default=4, help="prompts per session")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true", help="12 layers x 768 instead of 4 x 384")
    parser.add_argument("--tokenizer", help="default: qwen2.5 if present, else the tiny one")


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare the texts, then the prefilled tokens and the times."""
    (name,) = [options.tokenizer] if options.tokenizer else default_tokenizers("qwen2.5")
    file = tokenizer_file(name)
    source, asked = prompts(Tokenizer.from_file(str(file)), options.turns)
    model = big_model(tokenizer_json=file, **({} if options.large else SMALL))
    names = chosen(report)
    with progress() as shown:
        runs, others = run_all(options, model, asked, names, shown)
    n_tokens = sum(map(len, asked))
    report.fact("workload", f"{source}: {len(asked)} prompts, {n_tokens:,} tokens of {name}")
    for system, n in n_equal(runs).items():
        found = f"{n} of {len(asked)} texts equal"
        if REPRODUCIBLE in system:
            report.check(f"texts of {system}", is_right=n == len(asked), found=found)
        else:
            report.fact(f"texts of {system}", found)
    right = [answer.token_ids for answer in last(runs[EXPECTED].answers)]
    n_differ = sum(a.token_ids != b for a, b in zip(others, right, strict=True))
    report.check("another first block gives other texts", is_right=n_differ == len(others))

    cut = half(asked)
    parts = {
        "all prompts": slice(None),
        "after the restart": slice(cut, None),
        "the first prompts after it": slice(cut, cut + N_SESSIONS),
    }
    for title, part in parts.items():
        answers = {system: one.answers[part] for system, one in runs.items()}
        over = {
            system: sum(a.n_prefilled for a in given) / sum(runs[system].least[part])
            for system, given in answers.items()
        }
        report.table(f"{title}: prefilled tokens over the least possible", "x", over)
        ms = {s: [1000 * a.first_token_s for a in given] for s, given in answers.items()}
        report.table(f"{title}: time to the first token", "ms", ms, base=PEER)
        whole = {s: [1000 * a.whole_s for a in given] for s, given in answers.items()}
        report.table(f"{title}: whole requests, with saving", "ms", whole, base=PEER)
    bars(runs, parts, report)

    firsts, seconds = after_restarts(options, model, max(asked, key=len))
    n_most = max(answer.n_prefilled for answer in (*firsts, *seconds))
    report.check("only the question is prefilled", is_right=n_most == N_QUESTION, found=str(n_most))
    ms = {
        "first request after a restart with pre-warm": [1000 * a.first_token_s for a in firsts],
        "a second request": [1000 * a.first_token_s for a in seconds],
    }
    report.table(f"{N_WARM:,} warm tokens, {N_QUESTION} new ones", "ms", ms)
    first, second = map(median, ms.values())
    report.bar("first request over a second one", first / second, MAX_OVER_SECOND, most=True)


def bars(runs: dict[str, Run], parts: dict[str, slice], report: Report) -> None:
    """Report the bars of the default mode; figures of reproducible mode are facts."""
    every, after, first = parts.values()

    def total(name: str, part: slice) -> float:
        return sum(answer.first_token_s for answer in runs[name].answers[part])

    for mode in ("", REPRODUCIBLE):

        def ceiling(name: str, value: float, limit: float, mode: str = mode) -> None:
            if mode:
                report.fact(name + mode, round(value, 3))
            else:
                report.bar(name, value, limit, most=True)

        ram = RAM + mode
        n_prefilled = sum(answer.n_prefilled for answer in runs[ram].answers)
        over_least = n_prefilled / sum(runs[ram].least)
        ceiling("prefilled over the least possible", over_least, MAX_OVER_LEAST)
        for peer, limit in ((PEER, MAX_OVER_PEER), (IDEAL, MAX_OVER_IDEAL)):
            ratio = total(ram, every) / total(peer, every)
            ceiling(f"sum of TTFT over {peer}'s", ratio, limit)
        for name, case in ((DISK, "disk after a restart"), (REDIS, "Redis in a second process")):
            if name + mode in runs:
                for part, more in ((after, ""), (first, ", first prompts")):
                    ratio = total(name + mode, part) / total(ram, part)
                    ceiling(f"{case} over RAM{more}", ratio, MAX_OVER_RAM)
