"""How much of an edited 64 KiB prompt is encoded again: one sentence inserted, documents swapped.

A prompt of sixteen documents is encoded, then the same prompt with a sentence inserted in the
middle. In a new cache the prompt is encoded again, then with two documents swapped that are not
neighbours. The figures are the characters that reach the engine, as a share of those looked up,
and the characters in missing chunks (over gigatoken, which looks up no segments, both are the
same). Ids are compared with those of tokenizers. There are five kinds of text and several seeds;
the worst result counts.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import _report
from bench.adapters import tokenizing as peers
from bench.workloads import texts
from bench.workloads.data import default_tokenizers, tokenizer_file

N_BYTES, N_DOCUMENTS = 64 << 10, 16
BARS = {"sentence inserted": 10.0, "documents swapped": 15.0}


def original(kind: str, seed: int) -> list[str]:
    """Return the documents of a prompt."""
    return texts.documents(kind, N_BYTES, N_DOCUMENTS, seed)


def joined(documents: list[str]) -> str:
    """Return the prompt that these documents make."""
    return "\n\n".join(documents)


def with_sentence(kind: str, prompt: str) -> str:
    """Return the prompt with a sentence inserted after the first space of its second half."""
    found = re.compile(r"\s").search(prompt, len(prompt) // 2)
    at = found.end() if found else len(prompt) // 2
    return prompt[:at] + texts.SENTENCES[kind] + prompt[at:]


def with_swap(documents: list[str], seed: int) -> str:
    """Return the prompt with two documents swapped that are not neighbours."""
    left, right = sorted(random.Random(seed).sample(range(0, N_DOCUMENTS, 2), 2))
    changed = list(documents)
    changed[left], changed[right] = changed[right], changed[left]
    return joined(changed)


def missed_percent(
    file: Path, expect: peers.Encoder, before: str, after: str
) -> tuple[float, float, int]:
    """Encode `before`, then `after`; return shares of `after`, and the number of wrong answers.

    The shares are the characters encoded, and those in missing chunks.
    """
    cache = peers.over("tokenizers", file)
    expected = [np.array(expect.encode(text), np.int32) for text in (before, after)]
    n_wrong = peers.n_different(cache, [before], expected[:1])
    lookup, missed, encoded = cache.segment_chars()
    n_wrong += peers.n_different(cache, [after], expected[1:])
    lookup_now, missed_now, encoded_now = cache.segment_chars()
    n_chars = lookup_now - lookup
    if not n_chars:  # the segment cache is off for this tokenizer
        return 100.0, 100.0, n_wrong
    return (
        100 * (encoded_now - encoded) / n_chars,
        100 * (missed_now - missed) / n_chars,
        n_wrong,
    )


def run(name: str, n_seeds: int) -> dict[str, Any]:
    """Measure one tokenizer on every kind of text and seed."""
    file = tokenizer_file(name)
    expect = peers.build("tokenizers", file)
    figures: dict[str, dict[str, list[float]]] = {}
    in_chunks: dict[str, dict[str, list[float]]] = {}
    n_wrong = 0
    print(f"{name}: {N_BYTES >> 10} KiB of UTF-8, {N_DOCUMENTS} documents, {n_seeds} seeds")
    for kind in texts.KINDS:
        shares: dict[str, list[float]] = {case: [] for case in BARS}
        missed: dict[str, list[float]] = {case: [] for case in BARS}
        for seed in range(n_seeds):
            documents = original(kind, seed)
            before = joined(documents)
            edited = (with_sentence(kind, before), with_swap(documents, seed))
            for case, after in zip(BARS, edited, strict=True):
                encoded, chunks, wrong = missed_percent(file, expect, before, after)
                shares[case].append(encoded)
                missed[case].append(chunks)
                n_wrong += wrong
        figures[kind] = shares
        in_chunks[kind] = missed
        cells = [
            f"{case} {median(v):5.2f} %, worst {max(v):5.2f} %"
            f" (chunks {median(missed[case]):5.2f}, {max(missed[case]):5.2f})"
            for case, v in shares.items()
        ]
        print(f"  {kind:8} " + ";  ".join(cells), flush=True)
    return {"percent": figures, "percent that misses the chunks": in_chunks, "n_wrong": n_wrong}


def bars(figures: dict[str, Any]) -> list[_report.Bar]:
    """Return the limits for the worst of all texts and seeds."""
    kinds = figures.get("percent", {}).values()
    return [
        _report.Bar(
            f"{case}, worst of all: characters encoded again",
            max((max(shares[case]) for shares in kinds), default=None),
            limit,
            "%",
            is_ceiling=True,
        )
        for case, limit in BARS.items()
    ]


def main(argv: list[str]) -> int:
    """Exit code 1 if ids differ or a bar is missed."""
    options = _report.parser(__doc__ or "")
    options.add_argument(
        "--tokenizer",
        action="append",
        help="a tokenizer.json, a real one's name, or tiny; repeatable",
    )
    options.add_argument("--seeds", type=int, default=10)
    args = options.parse_args(argv)
    found = {}
    for name in args.tokenizer or default_tokenizers("qwen2.5", "phi-3-mini"):
        try:
            one = run(name, args.seeds)
        except peers.Unavailable as reason:
            print(f"{name}: tokcache is unavailable: {reason}")
            one = {"unavailable": str(reason), "n_wrong": 0}
        print(f"  wrong answers: {one['n_wrong']}")
        found[name] = one | {"bars": _report.show_bars(bars(one))}
    environment = _report.environment("tokenizers", "numpy")
    _report.finish({"environment": environment, "tokenizers": found}, args.json)
    met = all(bar["met"] for one in found.values() for bar in one["bars"])
    return 0 if met and not any(one["n_wrong"] for one in found.values()) else 1
