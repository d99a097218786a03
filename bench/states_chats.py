"""Chats that part, on every memory: prompt tokens decoded over the least that has to be decoded.

Chats with thinking that is dropped later, tools, edits, regenerations and branches
(bench/workloads/turns.py) take turns in one context, in the default mode. The model is a tiny
random one of each memory, and its answers are scripted: a logits processor chooses their tokens,
and notes which one the model would have chosen. The least of a prompt is its length less the
longest prefix that it has in common with anything decoded before, and at least 1. Each chat is
rendered by two templates: one whose prompts for an answer open the thinking, and one that leaves
that to the model.

"Grid only" is the same without the places that are found in the chat template: states of recurrent
memories are then saved at multiples of 256 tokens and at the ends of prompts and answers. "Bytes a
turn" are those stored.

The same chats in reproducible mode must give the same tokens with and without a cache.

Disk first: the same chats with a memory that holds only the longest prompt and one block more, over
a disk, against a memory that holds everything, over a disk too. Each prompt goes to all of them, in
random order; the writes are waited for after each, outside the measured time. "Dropped" drops the
files from the page cache (posix_fadvise DONTNEED) before each prompt. The model has 4 layers x 384.

Stops cost prefill: the time of a new prompt of 1,000 tokens, on a hybrid of 4 layers x 384, is
measured with and without them, in turns.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment
from llama_cpp import LogitsProcessorList

from bench._report import progress
from bench.workloads import turns
from tokcache import samples
from tokcache._prefix import n_common
from tokcache.llama import Llama
from tokcache.state.cache import PrefixStateCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench._report import Report

    Ids = NDArray[np.int32]

PACKAGES = ("llama-cpp-python", "numpy", "jinja2")
UNIT = "prompt tokens decoded over the least"
BAR = "at most 1.05 for attention, 1.15 for windows, 1.25 for recurrent memories and hybrids"
IN_ALL = (
    "--turns",
    "5",
    "--memories",
    "attention",
    "hybrid",
    "--prompts",
    "4",
    "--disk-turns",
    "2",
)
N_CTX = 16_384
BLOCK = 32  # of reproducible mode: not longer than the tiny models' window
MAX_RECURRENT = 1.25
# name: architecture, the most that may be decoded over the least
MEMORIES = {
    "attention": ("llama", 1.05),
    "window": ("gemma3", 1.15),
    "recurrent": ("mamba2", MAX_RECURRENT),
    "hybrid": ("lfm2", MAX_RECURRENT),
    "hybrid, windowed": ("lfm2-windowed", MAX_RECURRENT),
}
WAYS = {"thinking opened by the model": False, "by the prompt": True}
MAX_PREFILL = 1.05
MAX_SMALL = 1.15
LARGE, SMALL, DROPPED = "large memory", "small memory", "small memory, dropped"
MIDDLE: dict[str, Any] = {"n_layers": 4, "n_embd": 384, "n_heads": 6, "n_kv_heads": 2, "n_ff": 1024}
_END = "<|im_end|>"
_TEMPLATE = Environment(autoescape=False).from_string(turns.TEMPLATE)  # noqa: S701 (no HTML)


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, the tokens of its answer, and the reason for which it is asked."""

    kind: str
    prompt: list[int]
    answer: list[int]


@dataclass(slots=True)
class Run:
    """The decoded and the least tokens of each prompt, and the tokens that the model chose."""

    kinds: list[str] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    least: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)

    @property
    def over_least(self) -> float:
        """The decoded tokens over the least."""
        return sum(self.decoded) / sum(self.least)


def requests(
    llm: Any, n_chats: int, n_turns: int, *, opens_thinking: bool = False
) -> Iterator[Asked]:
    """Yield the prompts of several chats, which take turns."""
    scripts = [turns.script(seed, n_turns) for seed in range(n_chats)]
    settings = {"tools": turns.TOOLS, "opens_thinking": opens_thinking}
    while scripts:
        for script in list(scripts):
            request = next(script, None)
            if request is None:
                scripts.remove(script)
                continue
            messages = request.messages
            text = _TEMPLATE.render(messages=messages, add_generation_prompt=True, **settings)
            whole = _TEMPLATE.render(messages=[*messages, request.answer], **settings)
            answer = whole.removeprefix(text).removesuffix("\n")
            prompt, tokens = (
                llm.tokenize(each.encode(), add_bos=False, special=True) for each in (text, answer)
            )
            yield Asked(request.kind, prompt, tokens)


def play(llm: Any, asked: Sequence[Asked]) -> Run:
    """Ask every prompt, and let the model give the scripted answers."""
    run, held = Run(), [np.empty(0, np.int32)]
    for each in asked:
        script = iter(each.answer)

        def choose(_: Any, scores: Any, script: Iterator[int] = script) -> Any:
            run.chosen.append(int(scores.argmax()))
            scores[:] = -np.inf
            scores[next(script)] = 0.0
            return scores

        steps = llm.generate(each.prompt, temp=0.0, logits_processor=LogitsProcessorList([choose]))
        given = [token for _, token in zip(each.answer, steps, strict=False)]
        steps.close()
        assert given == each.answer
        prompt = np.array(each.prompt, np.int32)
        n_known = max(n_common(one.tobytes(), prompt.tobytes()) // 4 for one in held)
        run.kinds.append(each.kind)
        run.least.append(max(len(prompt) - n_known, 1))
        run.decoded.append(llm.last_reuse.n_decoded)
        # The last token of an answer is not decoded.
        held.append(np.array([*each.prompt, *each.answer[:-1]], np.int32))
    return run


def opened(memory: str, *, cache: PrefixStateCache | None, **settings: Any) -> Any:
    """Return a tiny model of a memory."""
    model = samples.tiny_model(architecture=MEMORIES[memory][0])
    shared: dict[str, Any] = {
        "n_ctx": N_CTX,
        "n_threads": 1,
        "n_threads_batch": 1,
        "verbose": False,
    }
    return Llama(str(model), prefix_cache=cache, swa_full=False, **shared, **settings)


def on_the_grid(llm: Any) -> Any:
    """Return a Llama as it is with a template without openers."""
    llm._states._find_openers = lambda: None
    return llm


def store(block_tokens: int = 256) -> PrefixStateCache:
    """Return a cache with room for everything."""
    return PrefixStateCache(ram_bytes="4G", max_entries=10_000, block_tokens=block_tokens)


def measure(memory: str, way: str, options: argparse.Namespace, report: Report) -> None:
    """Measure one memory with one template."""
    most, decoded, run = MEMORIES[memory][1], {}, Run()
    is_recurrent = most == MAX_RECURRENT  # only these have stops outside the grid
    for name in ("grid only", "tokcache") if is_recurrent else ("tokcache",):
        cache = store()
        llm = opened(memory, cache=cache)
        if name == "grid only":
            on_the_grid(llm)
        asked = list(requests(llm, options.chats, options.turns, opens_thinking=WAYS[way]))
        run = play(llm, asked)
        llm.close()
        decoded[name] = float(sum(run.decoded))
        stored = cache.stats().saved_bytes / len(asked)
        report.fact(f"{memory}, {way}: bytes a turn, {name}", f"{stored:,.0f}")
    title = f"{memory}, {way}: prompt tokens decoded, {len(run.least)} prompts"
    least = float(sum(run.least))
    report.table(title, "tokens", {"the least": least, **decoded}, base="the least")
    for kind in dict.fromkeys(run.kinds):
        rows = [n for n, each in enumerate(run.kinds) if each == kind]
        sums = [sum(numbers[n] for n in rows) for numbers in (run.decoded, run.least)]
        report.fact(f"{memory}, {way}: {kind}", f"{sums[0]:,} decoded, least {sums[1]:,}")
    report.bar(f"{memory}, {way}: decoded over the least", run.over_least, most, most=True)


def compare(memory: str, options: argparse.Namespace, report: Report) -> None:
    """Compare the tokens of reproducible mode with and without a cache."""
    chosen = []
    for has_cache in (True, False):
        cache = store(BLOCK) if has_cache else None
        llm = opened(memory, cache=cache, reproducible=True)
        llm.block_tokens = BLOCK
        asked = list(requests(llm, 1, options.same_turns, opens_thinking=True))
        chosen.append(play(llm, asked).chosen)
        llm.close()
    n_same = sum(map(int.__eq__, *chosen))
    report.check(
        f"{memory}: tokens of reproducible mode",
        is_right=chosen[0] == chosen[1],
        found=f"{n_same:,} of {len(chosen[1]):,} equal",
    )


def prefill(n_prompts: int, report: Report) -> None:
    """Measure new prompts with and without stops, in turns."""
    model = samples.tiny_model(
        architecture="lfm2", n_layers=4, n_embd=384, n_heads=6, n_kv_heads=2, n_ff=1024
    )
    shared: dict[str, Any] = {"n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    models = {
        name: Llama(str(model), prefix_cache=store(), **shared)
        for name in ("grid only", "tokcache")
    }
    on_the_grid(models["grid only"])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    rng = random.Random(4)
    for number in range(n_prompts + 1):
        words = " ".join(rng.choices(("loan", "card", "map", "fine", "room", "desk"), k=350))
        messages = [
            {"role": "system", "content": words},
            {
                "role": "user",
                "content": " ".join(rng.choices(words.split(), k=rng.randrange(20, 200))),
            },
        ]
        text = _TEMPLATE.render(messages=messages, add_generation_prompt=True)
        for name in rng.sample(list(models), 2):
            llm = models[name]
            if not number:
                llm.wait_for_fingerprint()
            tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
            steps = llm.generate(tokens, temp=0.0)
            began = perf_counter()
            next(steps)
            took = perf_counter() - began
            steps.close()
            if number:  # the first one looks for the openers, too
                seconds[name].append(took * 1000)
    report.table("a new prompt, 4 layers x 384", "ms", seconds, base="grid only")
    ratio = sum(seconds["tokcache"]) / sum(seconds["grid only"])
    report.bar("prefill of a new prompt over grid only", ratio, MAX_PREFILL, most=True)


def small_memory(memory: str, n_turns: int, report: Report) -> None:
    """Compare a memory of one prompt and one block, over a disk, with a large one."""
    model = samples.tiny_model(architecture=MEMORIES[memory][0], **MIDDLE)
    shared: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}

    def ask(llm: Any, each: Asked) -> float:
        script = iter(each.answer)

        def choose(_: Any, scores: Any) -> Any:
            scores[:] = -np.inf
            scores[next(script)] = 0.0
            return scores

        steps = llm.generate(each.prompt, temp=0.0, logits_processor=LogitsProcessorList([choose]))
        began = perf_counter()
        next(steps)
        took = perf_counter() - began
        for _ in zip(each.answer[1:], steps, strict=False):
            pass
        steps.close()
        return took

    scratch = store()
    llm = Llama(str(model), prefix_cache=scratch, n_ctx=N_CTX, **shared)
    asked = list(requests(llm, 3, n_turns))
    llm.wait_for_fingerprint()
    ask(llm, max(asked, key=lambda each: len(each.prompt) + len(each.answer)))
    stats = scratch.stats()
    n_bytes = scratch.memory_usage() + stats.saved_bytes // max(stats.saved_blocks, 1)
    llm.close()
    with tempfile.TemporaryDirectory(prefix="tokcache-bench-") as folder:
        caches, models = {}, {}
        for name in (LARGE, SMALL, DROPPED):
            ram = "4G" if name == LARGE else n_bytes
            caches[name] = PrefixStateCache(
                ram_bytes=ram, queue_bytes=ram, max_entries=10_000, disk=Path(folder, name)
            )
            models[name] = Llama(str(model), prefix_cache=caches[name], n_ctx=N_CTX, **shared)
            models[name].wait_for_fingerprint()
        seconds: dict[str, list[float]] = {name: [] for name in models}
        rng = random.Random(5)
        for number, each in enumerate(asked):
            _drop_pages(Path(folder, DROPPED))
            for name in rng.sample(list(models), len(models)):
                took = ask(models[name], each)
                caches[name].flush()
                if number >= 3:  # the first prompt of each chat has nothing to read
                    seconds[name].append(took * 1000)
        for name, each_model in models.items():
            stats = caches[name].stats()
            found = f"{stats.disk.read_bytes:,} bytes read, refusals {stats.refusals}"
            report.fact(f"{memory}: {name}", found)
            each_model.close()
            caches[name].close()
    report.fact(f"{memory}: bytes of the small memory", f"{n_bytes:,}")
    report.table(f"{memory}: time to the first token", "ms", seconds, base=LARGE)
    for name in (SMALL, DROPPED):
        ratio = sum(seconds[name]) / sum(seconds[LARGE])
        report.bar(f"{memory}: sum of TTFT, {name} over large", ratio, MAX_SMALL, most=True)


def _drop_pages(folder: Path) -> None:
    """Drop the files of a folder from the page cache; they were synced when they were written."""
    for path in folder.rglob("*.[01]"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--chats", type=int, default=2)
    parser.add_argument("--turns", type=int, default=20, help="questions of each chat")
    parser.add_argument("--same-turns", type=int, default=8, help="of the chat that is compared")
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--prompts", type=int, default=12, help="new prompts that are timed")
    parser.add_argument("--disk-turns", type=int, default=6, help="questions of chats on disk")
    parser.add_argument("--disk-only", action="store_true", help="measure the small memory alone")


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure every memory, then the cost of the stops."""
    for memory in ("attention", "recurrent"):
        if memory in options.memories:
            small_memory(memory, options.disk_turns, report)
    if options.disk_only:
        return
    with progress() as shown:
        for memory in shown.track(options.memories, description="asking"):
            for way in WAYS:
                measure(memory, way, options, report)
            compare(memory, options, report)
    prefill(options.prompts, report)
