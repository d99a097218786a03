"""Texts chosen so that their digests collide, with and without the caches' secret.

The texts are built for a secret of spaces, under which all of them, and all of their chunks and
segments, have one digest. Caches with a secret of their own, as all have, must take no longer for
them than for ordinary texts. With that secret, which nobody outside the process can know, every
digest collides; what that costs is reported.
"""

from __future__ import annotations

import argparse
import importlib
import random
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tokenizers import Tokenizer

import tokcache
from bench.workloads.data import TINY, tokenizer_file
from tokcache import CacheConfig, L0Cache

if TYPE_CHECKING:
    from bench._report import Report

PACKAGES = ("tokenizers",)
UNIT = "us a call"
BAR = "at most 3 times as long as ordinary texts, if the secret is not known"
IN_ALL = ("--texts", "500", "--rounds", "3")
MAX_RATIO = 3.0
BLOCKS = 24  # of 16 characters in a text
_MULTIPLIER = 0x9E3779B97F4A7C15


def colliding(seed: int) -> str:
    """Return a text whose digest is that of all others, under a secret of spaces.

    A block of eight spaces and eight letters folds to 0 then.
    """
    words = (f"{(seed * _MULTIPLIER + at * 7919) % 10**8:08}" for at in range(BLOCKS))
    return "".join(f"{'':8}{word}" for word in words)


def ordinary(seed: int) -> str:
    """Return a text of the same length and the same characters, in another order."""
    characters = list(colliding(seed))
    random.Random(seed).shuffle(characters)
    return "".join(characters)


def of_l0(texts: list[str]) -> dict[str, float]:
    """Return the microseconds of a put and of a hit."""
    cache = L0Cache(max_entries=2 * len(texts))
    began = time.perf_counter()
    for number, text in enumerate(texts):
        cache.put(text, [number])
    put = time.perf_counter()
    for number, text in enumerate(texts):
        assert cache.get(text) == [number]
    hit = time.perf_counter()
    return {"L0 put": put - began, "L0 hit": hit - put}


def of_l1(texts: list[str]) -> dict[str, float]:
    """Return the microseconds of a text that is new, and of one whose chunks are all cached."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file(TINY)))
    config = CacheConfig(l0_max_entries=1, engine="tokenizers")
    cached = tokcache.wrap(tokenizer, config)
    cached.token_ids("warm")
    began = time.perf_counter()
    first = [cached.token_ids(text, add_special_tokens=False) for text in texts]
    new = time.perf_counter()
    again = [cached.token_ids(text, add_special_tokens=False) for text in texts]
    known = time.perf_counter()
    right = tokenizer.encode_batch(texts, add_special_tokens=False)
    assert all(a == b == c.ids for a, b, c in zip(first, again, right, strict=True))
    return {"L1 new": new - began, "L1 known": known - new}


def measured(texts: list[str], *, is_secret_known: bool) -> dict[str, float]:
    """Return the microseconds a call."""
    names = ("_l0", "segments._l1") if is_secret_known else ()
    modules: list[Any] = [importlib.import_module(f"tokcache.text.{name}") for name in names]
    patches = [patch.object(each, "urandom", lambda n: b" " * n) for each in modules]
    for each in patches:
        each.start()
    try:
        found = {**of_l0(texts), **of_l1(texts)}
    finally:
        for each in patches:
            each.stop()
    return {name: 1e6 * seconds / len(texts) for name, seconds in found.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure the three kinds in turn."""
    kinds: dict[str, Callable[[int], str]] = {
        "ordinary": ordinary,
        "built without the secret": colliding,
        "built with the secret": colliding,
    }
    texts = {name: [make(n) for n in range(options.texts)] for name, make in kinds.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for name, own in texts.items():
            took = measured(own, is_secret_known=name == "built with the secret")
            for case, us in took.items():
                found.setdefault(case, {}).setdefault(name, []).append(us)
    for case, by_kind in found.items():
        report.table(case, "us", by_kind, base="ordinary")
        base = median(by_kind["ordinary"])
        ratio = median(by_kind["built without the secret"]) / base
        report.bar(f"{case}: built without the secret", ratio, MAX_RATIO, most=True)
        report.fact(
            f"{case}: built with the secret",
            f"{median(by_kind['built with the secret']) / base:.1f} times as long",
        )
