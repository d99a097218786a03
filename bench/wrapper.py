"""The cost of a wrapped transformers tokenizer against the plain one: hits, misses, chats.

Answers are compared before anything is timed. Both tokenizers take turns, call by call or in
short bursts, and every figure is a median; a miss is a text that neither has seen, the same for
both. "Overhead" is the time that transformers adds to tokenizers for a text of two characters.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter_ns
from typing import Any

import tokcache
from bench import _report
from bench.workloads import chats, texts
from bench.workloads.data import TINY, default_tokenizers, fresh, tokenizer_file

SIZES = {"64": 64, "1k": 1024, "8k": 8192}  # tokens
SHORT = "ab"
N_BURSTS, BURST = 61, 200
Call = Callable[[], Any]


def interleaved_us(calls: dict[str, Call], n_bursts: int, burst: int) -> dict[str, float]:
    """Return the median microseconds of each call; the calls take turns in short bursts."""
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
    return {name: median(found) for name, found in times.items()}


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


def short_call(plain: Any, wrapped: Any) -> dict[str, float]:
    """Return the microseconds of each step of a call with two characters."""
    backend, ids = plain.backend_tokenizer, wrapped.token_ids(SHORT)
    alone = tokcache.L0Cache()
    alone.put(SHORT, ids)
    n = len(ids)
    return interleaved_us(
        {
            "plain tok(text)": lambda: plain(SHORT),
            "tokenizers.encode_batch": lambda: backend.encode_batch([SHORT]),
            "tokcache tok(text)": lambda: wrapped(SHORT),
            "its lists": lambda: (ids.tolist(), [1] * n),
            "plain encode": lambda: plain.encode(SHORT),
            "tokcache encode": lambda: wrapped.encode(SHORT),
            "token_ids": lambda: wrapped.token_ids(SHORT),
            "L0Cache.get": lambda: alone.get(SHORT),
        },
        N_BURSTS,
        BURST,
    )


def hits(plain: Any, wrapped: Any, known: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return the microseconds of cached texts, by size."""
    found = {}
    for size, text in known.items():
        calls: dict[str, Call] = {
            "plain tok(text)": partial(plain, text),
            "tokcache tok(text)": partial(wrapped, text),
            "plain encode": partial(plain.encode, text),
            "tokcache encode": partial(wrapped.encode, text),
        }
        found[size] = interleaved_us(calls, 15, 3)
    return found


def misses(plain: Any, wrapped: Any, seed: int) -> dict[str, dict[str, float]]:
    """Return the microseconds of new texts, by size."""
    found = {}
    for size, n_tokens in SIZES.items():
        times: dict[str, list[float]] = {"plain": [], "tokcache": []}
        n_texts = 60 if n_tokens < 4096 else 20
        for turn in range(n_texts):
            seed += 1
            text = text_of(plain, n_tokens, seed)
            order = [("plain", plain), ("tokcache", wrapped)]
            for name, tokenizer in order if turn % 2 else reversed(order):
                own = fresh(text)
                gc.collect(0)
                began = perf_counter_ns()
                tokenizer(own)
                times[name].append((perf_counter_ns() - began) / 1000)
        found[size] = {name: median(one) for name, one in times.items()}
    return found


def chat_calls(plain: Any, wrapped: Any, n_chats: int) -> dict[str, float] | None:
    """Return the median microseconds of a cached chat: rendering it, and making its ids."""
    if not plain.chat_template:
        return None
    times: dict[str, list[float]] = {}
    turns = [turn for chat in chats.load(n_chats)[1] for turn in _turns(chat)]
    asked: dict[str, Any] = {"add_generation_prompt": True}
    try:
        rendered = [plain.apply_chat_template(turn, tokenize=False, **asked) for turn in turns]
    except Exception as reason:  # noqa: BLE001 (a template may raise anything)
        print(f"  this template can't render the chats: {reason}")
        return None
    for turn, text in zip(turns, rendered, strict=True):
        expected = plain(text, add_special_tokens=False)["input_ids"]
        assert wrapped.apply_chat_template(turn, **asked, return_dict=False) == expected
        for name, us in _chat_us(wrapped, turn, text).items():
            times.setdefault(name, []).append(us)
    return {name: median(one) for name, one in times.items()} | {"prompts": float(len(turns))}


def _chat_us(wrapped: Any, turn: chats.Chat, text: str) -> dict[str, float]:
    """Return the minimum microseconds of each step; the steps take turns."""
    ids = wrapped.token_ids(text, add_special_tokens=False)
    best: dict[str, float] = {}
    asked: dict[str, Any] = {"add_generation_prompt": True}
    calls: dict[str, Callable[[str], Any]] = {
        "render": lambda _: wrapped.apply_chat_template(turn, tokenize=False, **asked),
        "render and tokenize": lambda _: wrapped.apply_chat_template(
            turn, return_dict=False, **asked
        ),
        "token_ids": lambda own: wrapped.token_ids(own, add_special_tokens=False),
        "lists": lambda _: (ids.tolist(), [1] * len(ids)),
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


def bars(one: dict[str, Any]) -> list[_report.Bar]:
    """Return the limits for a wrapped tokenizer."""
    short, chat = one["short"], one["chat"]
    overhead = short["plain tok(text)"] - short["tokenizers.encode_batch"]
    made = [
        _report.Bar(
            "a hit of two characters, less its lists, over transformers' overhead",
            (short["tokcache tok(text)"] - short["its lists"]) / overhead,
            1 / 3,
            is_ceiling=True,
        ),
        _report.Bar(
            "token_ids beyond a bare L0 hit",
            short["token_ids"] - short["L0Cache.get"],
            0.3,
            "us",
            is_ceiling=True,
        ),
    ]
    if chat is not None:
        own = chat["render and tokenize"] - chat["render"] - chat["lists"]
        made.append(
            _report.Bar(
                "apply_chat_template beyond rendering and its lists, over token_ids",
                own / chat["token_ids"],
                2.0,
                is_ceiling=True,
            )
        )
    for size, us in one["misses"].items():
        name = f"a miss of {size} tokens over the plain tokenizer"
        made.append(_report.Bar(name, us["tokcache"] / us["plain"], 1.05, is_ceiling=True))
    return made


def run(name: str, n_chats: int) -> dict[str, Any]:
    """Measure one tokenizer."""
    plain = load(name)
    wrapped = tokcache.wrap(plain, tokcache.CacheConfig(engine="tokenizers"))
    known = {size: text_of(plain, n, 0) for size, n in SIZES.items()}
    n_wrong = compare(plain, wrapped, known)
    one: dict[str, Any] = {
        "n_wrong": n_wrong,
        "short": short_call(plain, wrapped),
        "hits": hits(plain, wrapped, known),
        "misses": misses(plain, wrapped, 1),
        "chat": chat_calls(plain, wrapped, n_chats),
    }
    print(f"{name}, microseconds; wrong answers: {n_wrong}")
    for row in ("short", "chat"):
        if one[row] is not None:
            cells = ", ".join(f"{key} {us:,.2f}" for key, us in one[row].items())
            print(f"  {'two characters' if row == 'short' else 'a known chat'}: {cells}")
    for row in ("hits", "misses"):
        for size, us in one[row].items():
            print(f"  {row}, {size} tokens: " + ", ".join(f"{k} {v:,.1f}" for k, v in us.items()))
    return one | {"bars": _report.show_bars(bars(one))}


def main(argv: list[str]) -> int:
    """Exit code 1 if an answer differs or a bar is missed."""
    options = _report.parser(__doc__ or "")
    options.add_argument(
        "--tokenizer",
        action="append",
        help="a tokenizer.json, a real one's name, or tiny; repeatable",
    )
    options.add_argument("--chats", type=int, default=20)
    args = options.parse_args(argv)
    names = args.tokenizer or default_tokenizers("qwen2.5", "phi-3-mini", "bert-base-uncased")
    found = {name: run(name, args.chats) for name in names}
    environment = _report.environment("tokenizers", "transformers")
    _report.finish({"environment": environment, "tokenizers": found}, args.json)
    met = all(bar["met"] for one in found.values() for bar in one["bars"])
    return 0 if met and not any(one["n_wrong"] for one in found.values()) else 1
