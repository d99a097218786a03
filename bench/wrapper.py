"""The cost of a wrapped transformers tokenizer against the plain one: hits, misses, chats.

Answers are compared before anything is timed. Both tokenizers take turns, call by call or in
short bursts, and every figure is a median; a miss is a text that neither has seen, the same for
both. "Overhead" is the time that transformers adds to tokenizers for a text of two characters.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import tokcache
from bench._disturb import MODES, Disturber, fresh, one_by_one
from bench.workloads import chats, texts
from bench.workloads.data import TINY, add_tokenizer, default_tokenizers, tokenizer_file

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("tokenizers", "transformers")
UNIT = "us a call"
BAR = (
    "at most a third of the plain overhead; 1.05 times a plain miss; 2 times token_ids for a "
    "known chat"
)
IN_ALL = ("--tokenizer", "qwen2.5", "--chats", "5")
SIZES = {"64": 64, "1k": 1024, "8k": 8192}  # tokens
SHORT = "ab"
N_BURSTS, BURST = 61, 200
Call = Callable[[], Any]


def interleaved_us(calls: dict[str, Call], n_bursts: int, burst: int) -> dict[str, list[float]]:
    """Return the microseconds of each call and burst; the calls take turns in short bursts."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    rng = random.Random(3)
    gc.disable()
    for _ in range(n_bursts):
        rng.shuffle(order)
        for name, call in order:
            began = perf_counter_ns()
            for _ in range(burst):
                call()
            times[name].append((perf_counter_ns() - began) / burst / 1000)
    gc.enable()
    return times


def load(name: str) -> Any:
    """Return a transformers tokenizer: of a folder's own class, or the base class for a file."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415 (seconds)

    file = tokenizer_file(name)
    if name == TINY or not (file.parent / "tokenizer_config.json").is_file():
        made: Any = PreTrainedTokenizerFast
        return made(tokenizer_file=str(file))
    return AutoTokenizer.from_pretrained(file.parent)


def text_of(plain: Any, n_tokens: int, seed: int) -> str:
    """Return a text of about `n_tokens` tokens, different for each seed."""
    source = texts.endless("English", seed)
    parts = [f"Text {seed}."]
    while len(plain.encode("\n".join(parts))) < n_tokens:
        parts.append(next(source))
    ids = plain.encode("\n".join(parts), add_special_tokens=False)[:n_tokens]
    return str(plain.decode(ids))


def compare(plain: Any, wrapped: Any, known: dict[str, str]) -> int:
    """Return the number of answers that differ, in the first call or from the cache."""
    n_wrong = 0
    for text in (SHORT, *known.values()):
        expected, ids = dict(plain(text)), plain.encode(text)
        for _ in range(2):
            n_wrong += dict(wrapped(fresh(text))) != expected
            n_wrong += wrapped.encode(fresh(text)) != ids
            n_wrong += wrapped.token_ids(fresh(text)).tolist() != ids
    return n_wrong


def short_call(plain: Any, wrapped: Any) -> dict[str, list[float]]:
    """Return the microseconds of each step of a call with two characters."""
    backend, ids = plain.backend_tokenizer, wrapped.token_ids(SHORT)
    alone = tokcache.L0Cache()
    alone.put(SHORT, ids)
    n = len(ids)
    return interleaved_us(
        {
            "plain tok(text)": lambda: plain(SHORT),
            "plain tokenizers.encode_batch": lambda: backend.encode_batch([SHORT]),
            "tokcache tok(text)": lambda: wrapped(SHORT),
            "tokcache, its lists": lambda: (ids.tolist(), [1] * n),
            "plain encode": lambda: plain.encode(SHORT),
            "tokcache encode": lambda: wrapped.encode(SHORT),
            "tokcache token_ids": lambda: wrapped.token_ids(SHORT),
            "tokcache L0Cache.get": lambda: alone.get(SHORT),
        },
        N_BURSTS,
        BURST,
    )


def hits(
    plain: Any, wrapped: Any, text: str, disturb: Disturber
) -> dict[str, dict[str, list[float]]]:
    """Return the microseconds of a cached text, by mode."""
    calls: dict[str, Callable[[str], Any]] = {
        "plain tok(text)": plain,
        "plain encode": plain.encode,
        "tokcache tok(text)": wrapped,
        "tokcache encode": wrapped.encode,
        "tokcache token_ids": wrapped.token_ids,
    }
    rng = random.Random(5)
    found: dict[str, dict[str, list[float]]] = {m: {name: [] for name in calls} for m in MODES}
    for _ in range(15):
        for name in rng.sample(list(calls), len(calls)):
            for mode in MODES:
                us = one_by_one([calls[name]] * 3, [text] * 3, mode, disturb) / 1000
                found[mode][name].append(us)
    return found


def misses(plain: Any, wrapped: Any, n_tokens: int, seed: int) -> dict[str, list[float]]:
    """Return the microseconds of new texts."""
    times: dict[str, list[float]] = {"plain tok(text)": [], "tokcache tok(text)": []}
    for turn in range(60 if n_tokens < 4096 else 20):
        text = text_of(plain, n_tokens, seed + turn)
        order = list(zip(times, (plain, wrapped), strict=True))
        for name, tokenizer in order if turn % 2 else reversed(order):
            own = fresh(text)
            gc.collect(0)
            began = perf_counter_ns()
            tokenizer(own)
            times[name].append((perf_counter_ns() - began) / 1000)
    return times


def chat_calls(
    plain: Any, wrapped: Any, n_chats: int, report: Report
) -> dict[str, list[float]] | None:
    """Return the microseconds of each cached chat: rendering it, and making its ids."""
    if not plain.chat_template:
        return None
    times: dict[str, list[float]] = {}
    turns = [turn for chat in chats.load(n_chats)[1] for turn in _turns(chat)]
    asked: dict[str, Any] = {"add_generation_prompt": True}
    try:
        rendered = [plain.apply_chat_template(turn, tokenize=False, **asked) for turn in turns]
    except Exception as reason:  # noqa: BLE001 (a template may raise anything)
        report.line(f"  this template can't render the chats: {reason}")
        return None
    for turn, text in zip(turns, rendered, strict=True):
        expected = plain(text, add_special_tokens=False)["input_ids"]
        assert wrapped.apply_chat_template(turn, **asked, return_dict=False) == expected
        for name, us in _chat_us(wrapped, turn, text).items():
            times.setdefault(name, []).append(us)
    return times


def _chat_us(wrapped: Any, turn: chats.Chat, text: str) -> dict[str, float]:
    """Return the minimum microseconds of each step; the steps take turns."""
    ids = wrapped.token_ids(text, add_special_tokens=False)
    best: dict[str, float] = {}
    asked: dict[str, Any] = {"add_generation_prompt": True}
    calls: dict[str, Callable[[str], Any]] = {
        "tokcache, render": lambda _: wrapped.apply_chat_template(turn, tokenize=False, **asked),
        "tokcache, render and tokenize": lambda _: wrapped.apply_chat_template(
            turn, return_dict=False, **asked
        ),
        "tokcache, token_ids": lambda own: wrapped.token_ids(own, add_special_tokens=False),
        "tokcache, lists": lambda _: (ids.tolist(), [1] * len(ids)),
    }
    for _ in range(9):
        for name, call in calls.items():
            own = fresh(text)  # a new object, as rendering returns
            began = perf_counter_ns()
            call(own)
            best[name] = min(best.get(name, 1e9), (perf_counter_ns() - began) / 1000)
    return best


def _turns(chat: chats.Chat) -> list[chats.Chat]:
    """Return the messages that a server is sent before each answer."""
    return [chat[:n] for n, message in enumerate(chat) if n and message["role"] == "assistant"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_tokenizer(parser)
    parser.add_argument("--chats", type=int, default=20)


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare, then measure, every tokenizer."""
    names = ("qwen2.5", "phi-3-mini", "bert-base-uncased")
    for name in options.tokenizer or default_tokenizers(*names):
        measure(name, options.chats, report)


def measure(name: str, n_chats: int, report: Report) -> None:
    """Compare, then measure, one tokenizer."""
    plain = load(name)
    wrapped = tokcache.wrap(plain, tokcache.CacheConfig(engine="tokenizers"))
    known = {size: text_of(plain, n, 0) for size, n in SIZES.items()}
    n_wrong = compare(plain, wrapped, known)
    report.check(f"{name}: answers", is_right=not n_wrong, found=f"{n_wrong} wrong")

    short = short_call(plain, wrapped)
    us = {step: median(values) for step, values in short.items()}
    report.table(f"{name}: a known text of two characters", "us", short, base="plain tok(text)")
    overhead = us["plain tok(text)"] - us["plain tokenizers.encode_batch"]
    less_lists = us["tokcache tok(text)"] - us["tokcache, its lists"]
    title = f"{name}: a hit of two characters, less its lists, over transformers' overhead"
    report.bar(title, less_lists / overhead, 1 / 3, most=True)
    beyond = us["tokcache token_ids"] - us["tokcache L0Cache.get"]
    report.bar(f"{name}: token_ids beyond a bare L0 hit", beyond, 0.3, "us", most=True)

    disturb = Disturber()
    for size, text in known.items():
        found = hits(plain, wrapped, text, disturb)
        report.columns(f"{name}: hits, {size} tokens", "us", found, base="plain tok(text)")
    for size, n_tokens in SIZES.items():
        times = misses(plain, wrapped, n_tokens, n_tokens)
        report.table(f"{name}: misses, {size} tokens", "us", times, base="plain tok(text)")
        ratio = median(times["tokcache tok(text)"]) / median(times["plain tok(text)"])
        report.bar(f"{name}: a miss of {size} tokens over the plain one", ratio, 1.05, most=True)

    chat = chat_calls(plain, wrapped, n_chats, report)
    if chat is not None:
        report.table(f"{name}: a known chat", "us", chat)
        of_chat = {step.removeprefix("tokcache, "): median(v) for step, v in chat.items()}
        own = of_chat["render and tokenize"] - of_chat["render"] - of_chat["lists"]
        title = f"{name}: apply_chat_template beyond rendering and its lists, over token_ids"
        report.bar(title, own / of_chat["token_ids"], 2.0, most=True)
