"""How much of an edited 64 KiB prompt is encoded again: one sentence inserted, documents swapped.

A prompt of sixteen documents is encoded, then the same prompt with a sentence inserted in the
middle. In a new cache the prompt is encoded again, then with two documents swapped that are not
neighbours. The figures are the characters that reach the engine, as a share of those looked up,
and the characters in missing chunks (over gigatoken, which looks up no segments, both are the
same). Ids are compared with those of tokenizers. There are five kinds of text and several seeds;
the worst result counts.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

import numpy as np

from bench._report import Report, progress
from bench.adapters import tokenizing as peers
from bench.workloads import texts
from bench.workloads.data import add_tokenizer, default_tokenizers, tokenizer_file

PACKAGES = ("tokenizers", "numpy")
UNIT = "% of a prompt encoded again"
BAR = "at most 10 after an inserted sentence, 15 after swapped documents"
IN_ALL = ("--seeds", "3")
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_tokenizer(parser)
    parser.add_argument("--seeds", type=int, default=10)


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure every tokenizer; the worst of all texts and seeds counts."""
    for name in options.tokenizer or default_tokenizers("qwen2.5", "phi-3-mini"):
        try:
            measure(name, options.seeds, report)
        except peers.Unavailable as reason:
            report.line(f"{name}: tokcache is unavailable: {reason}")
            for case, limit in BARS.items():
                report.bar(f"{name}, {case}", None, limit, "%", most=True)


def measure(name: str, n_seeds: int, report: Report) -> None:
    """Measure one tokenizer on every kind of text and seed."""
    file = tokenizer_file(name)
    expect = peers.build("tokenizers", file)
    encoded: dict[str, dict[str, list[float]]] = {case: {} for case in BARS}
    missed: dict[str, dict[str, list[float]]] = {case: {} for case in BARS}
    n_wrong = 0
    with progress() as shown:
        task = shown.add_task(name, total=len(texts.KINDS) * n_seeds)
        for kind in texts.KINDS:
            for seed in range(n_seeds):
                documents = original(kind, seed)
                before = joined(documents)
                edited = (with_sentence(kind, before), with_swap(documents, seed))
                for case, after in zip(BARS, edited, strict=True):
                    again, chunks, wrong = missed_percent(file, expect, before, after)
                    encoded[case].setdefault(f"tokcache, {kind}", []).append(again)
                    missed[case].setdefault(f"tokcache, {kind}", []).append(chunks)
                    n_wrong += wrong
                shown.advance(task)
    report.check(f"{name}: ids", is_right=not n_wrong, found=f"{n_wrong} wrong answers")
    size = f"{N_BYTES >> 10} KiB, {N_DOCUMENTS} documents"
    for case, limit in BARS.items():
        title = f"{name}, {size}, {case}"
        report.table(f"{title}: characters encoded again", "%", encoded[case])
        report.table(f"{title}: characters that miss the chunks", "%", missed[case])
        worst = max(map(max, encoded[case].values()))
        report.bar(f"{name}, {case}, worst: encoded again", worst, limit, "%", most=True)
