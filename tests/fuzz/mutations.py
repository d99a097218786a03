"""Random changes of seeds, for runs without atheris: bytes, numbers, JSON words, and two seeds."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

_WORDS = [
    b"null", b"true", b"false", b"[]", b"{}", b'""', b"-1", b"1e999", b"0.5", b'"x"', b"[1]",
    b'{"a":1}', b"9" * 25, b'"\\ud800"', b"\xff", b"\0", b"(", b"\n",
]  # fmt: skip
_VALUE = re.compile(rb'-?\d+(?:\.\d+)?|"(?:[^"\\]|\\.)*"|\[\]|\{\}|true|false|null')


def mutations(seeds: Sequence[bytes], n: int, seed: int) -> Iterator[bytes]:
    """Yield `n` inputs that one to four changes of a seed make."""
    rng = random.Random(seed)
    for _ in range(n):
        data = rng.choice(seeds)
        for _ in range(rng.randint(1, 4)):
            data = _changed(data, seeds, rng)
        yield data


def _changed(data: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    values = list(_VALUE.finditer(data))
    if kind <= 1 and values:  # another value in the place of one
        found = rng.choice(values)
        return data[: found.start()] + rng.choice(_WORDS) + data[found.end() :]
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind == 2:
        return data[:start] + rng.choice(_WORDS) + data[start:]
    if kind == 3:
        return data[:start] + data[min(stop, start + 16) :]
    if kind == 4:
        other = rng.choice(seeds)
        return data[:start] + other[rng.randrange(len(other) + 1) :]
    changed = bytearray(data)
    for at in rng.sample(range(len(data)), min(len(data), rng.randint(1, 3))):
        changed[at] = rng.randrange(256)
    return bytes(changed)
