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
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

from bench import _report
from bench.adapters.answering import (
    BLOCK,
    N_ANSWER,
    N_CTX,
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

N_SESSIONS = 6
SMALL = {"n_layers": 4, "n_embd": 384, "n_heads": 6, "n_kv_heads": 2, "n_ff": 1024}
EXPECTED, IDEAL, PEER, SERVER = "nothing kept", "unseen alone", "LlamaRAMCache", "llama-server"
RAM, DISK, REDIS = "tokcache RAM", "tokcache disk", "tokcache Redis"
REPRODUCIBLE = ", reproducible"
MAX_OVER_LEAST, MAX_OVER_PEER, MAX_OVER_IDEAL, MAX_OVER_RAM = 1.02, 0.42, 1.1, 1.3

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
    workers: list[Worker], asked: Prompts, progress: Progress
) -> tuple[dict[str, Run], list[Answer]]:
    """Send every prompt to every system; half-way some systems continue in another process.

    Return the answers, and those to the last prompts with another beginning and nothing cached.
    """
    rng = random.Random(3)
    runs = {worker.name: Run() for worker in workers}
    task = progress.add_task("asking", total=len(asked) * len(workers))
    for number, prompt in enumerate(asked):
        if number == half(asked):
            for worker in workers:
                if worker.name.startswith((DISK, REDIS)):
                    worker.restart()
        for worker in rng.sample(workers, len(workers)):
            runs[worker.name].answers.append(worker.ask(prompt))
            progress.advance(task)
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


def figures(runs: dict[str, Run], name: str, part: slice) -> dict[str, float]:
    """Return a system's figures for a part of the prompts."""
    run = runs[name]
    answers, n_least = run.answers[part], sum(run.least[part])
    first = sorted(answer.first_token_s * 1000 for answer in answers)
    n_prefilled = sum(answer.n_prefilled for answer in answers)
    return {
        "prefilled": n_prefilled,
        "over least": n_prefilled / n_least,
        "ttft median ms": median(first),
        "ttft p95 ms": first[min(len(first) - 1, int(0.95 * len(first)))],
        "ttft sum ms": sum(first),
        "requests sum ms": sum(answer.whole_s * 1000 for answer in answers),
        **{
            f"median over {other}": median(
                answer.first_token_s / one.first_token_s
                for answer, one in zip(answers, runs[other].answers[part], strict=True)
            )
            for other in (PEER, IDEAL)
        },
    }


def n_equal(runs: dict[str, Run]) -> dict[str, int]:
    """Return the number of texts of each system that equal those of prompts decoded as a whole."""
    right = [answer.token_ids for answer in runs[EXPECTED].answers]
    return {
        name: sum(answer.token_ids == one for answer, one in zip(run.answers, right, strict=True))
        for name, run in runs.items()
        if name != SERVER
    }


def show(console: Console, title: str, found: dict[str, dict[str, float]]) -> None:
    """Print a table with a line per system."""
    table = Table("system", title=title)
    columns = ("prefilled", "x least", "median", "p95", "sum", "x peer", "x ideal", "requests")
    for name in columns:
        table.add_column(name, justify="right")
    for name, row in found.items():
        total = row["ttft sum ms"]
        ratios = (
            f"{total / found[each]['ttft sum ms']:.2f} ({row[f'median over {each}']:.2f})"
            for each in (PEER, IDEAL)
        )
        table.add_row(
            name,
            f"{row['prefilled']:,.0f}",
            f"{row['over least']:.3f}",
            f"{row['ttft median ms']:,.0f}",
            f"{row['ttft p95 ms']:,.0f}",
            f"{total:,.0f}",
            *ratios,
            f"{row['requests sum ms']:,.0f}",
        )
    console.print(table)


def bars(parts: dict[str, dict[str, dict[str, float]]]) -> list[_report.Bar]:
    """Return the bars of the default mode, then the same figures of reproducible mode."""
    every, after, first = parts.values()
    made = []
    for mode in ("", REPRODUCIBLE):
        ram = RAM + mode

        def ceiling(name: str, value: float, limit: float, mode: str = mode) -> None:
            made.append(_report.Bar(name + mode, value, limit, is_ceiling=True))

        def over(rows: dict[str, dict[str, float]], name: str, other: str) -> float:
            return rows[name]["ttft sum ms"] / rows[other]["ttft sum ms"]

        ceiling("prefilled over the least possible", every[ram]["over least"], MAX_OVER_LEAST)
        ceiling("sum of TTFT over LlamaRAMCache's", over(every, ram, PEER), MAX_OVER_PEER)
        ceiling("sum of TTFT over the unseen tokens'", over(every, ram, IDEAL), MAX_OVER_IDEAL)
        for name, case in ((DISK, "disk after a restart"), (REDIS, "Redis in a second process")):
            if name + mode in every:
                ceiling(f"{case} over RAM", over(after, name + mode, ram), MAX_OVER_RAM)
                ratio = over(first, name + mode, ram)
                ceiling(f"{case} over RAM, first prompts", ratio, MAX_OVER_RAM)
    return made


def chosen() -> list[str]:
    """Return the systems that can be measured; print why the others are left out."""
    found = []
    for name in SYSTEMS:
        why = why_without(name)
        if why is None:
            found.append(name)
        else:
            print(f"left out: {name}: {why}")
    return found


def run_all(
    args: Any, model: str, asked: Prompts, names: list[str], progress: Progress
) -> tuple[dict[str, Run], list[Answer]]:
    """Start every system, send the prompts, and end the systems."""
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="tokcache-bench-"))
        uses_redis = any(name.startswith(REDIS) for name in names)
        url = opened.enter_context(redis_server()) if uses_redis else ""
        workers = []
        for number, name in enumerate(progress.track(names, description="starting")):
            own = Path(folder, str(number))
            own.mkdir()
            workers.append(Worker(name, Setting(model, args.threads, str(own), url)))
            opened.callback(workers[-1].close)
        return play(workers, asked, progress)


def main(argv: list[str]) -> int:
    """Compare, then measure; exit code 1 if a text is wrong or the default mode misses a bar."""
    options = _report.parser(__doc__ or "")
    options.add_argument("--turns", type=int, default=4, help="prompts per session")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--large", action="store_true", help="12 layers x 768 instead of 4 x 384")
    options.add_argument("--tokenizer", help="default: qwen2.5 if present, else the tiny one")
    args = options.parse_args(argv)
    (name,) = [args.tokenizer] if args.tokenizer else default_tokenizers("qwen2.5")
    file = tokenizer_file(name)
    source, asked = prompts(Tokenizer.from_file(str(file)), args.turns)
    model = big_model(tokenizer_json=file, **({} if args.large else SMALL))
    names = chosen()
    console = Console(width=132)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        runs, others = run_all(args, model, asked, names, progress)
    equal = n_equal(runs)
    right = [answer.token_ids for answer in last(runs[EXPECTED].answers)]
    n_control_differs = sum(a.token_ids != b for a, b in zip(others, right, strict=True))
    print(f"{source}: {len(asked)} prompts, {sum(map(len, asked)):,} tokens of {name}")
    for system, n in equal.items():
        print(f"  {system:30} {n} of {len(asked)} texts equal")
    cut = half(asked)
    parts = {
        "all prompts": slice(None),
        "after the restart": slice(cut, None),
        "the first prompts after it": slice(cut, cut + N_SESSIONS),
    }
    found = {
        title: {system: figures(runs, system, part) for system in runs}
        for title, part in parts.items()
    }
    for title, rows in found.items():
        show(console, f"{title}; ms; in brackets the median of the ratios of each prompt", rows)
    is_right = all(n == len(asked) for system, n in equal.items() if REPRODUCIBLE in system)
    is_right = is_right and n_control_differs == len(others)
    print(f"control, other first block: {n_control_differs} texts differ of {len(others)}")
    print(f"reproducible mode: {'all texts equal' if is_right else 'WRONG'}")
    made = bars(found)
    figures_made = {
        "environment": _report.environment("llama-cpp-python", "xllamacpp", "numpy", "redis"),
        "workload": {"source": source, "tokenizer": name, "large": args.large, "turns": args.turns},
        "equal texts": equal,
        "control differs": n_control_differs == len(others),
        "figures": found,
        "bars": _report.show_bars(made),
    }
    _report.finish(figures_made, args.json)
    return 0 if is_right and all(b.is_met for b in made if REPRODUCIBLE not in b.name) else 1
