"""Adapters with one interface for tokenizers, other encoders, and tokcache over an engine.

No adapter adds the post-processor's special tokens: a rendered chat contains its own, and gigatoken
has no switch for them. A library is imported when its adapter is built; if it is not installed or
refuses the tokenizer, its row has no figures. `NEXT` is a release that cannot be imported beside
the one that tokcache uses: its process has a side folder in PYTHONPATH (`pip install --pre --target
FOLDER "tokenizers>=1.0.0rc0"`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

NEXT = "tokenizers 1.0"
SEGMENT_BYTES = 64 << 20  # fastokens' segment cache: far more than the replayed chats take
ENGINES = {"tokcache over tokenizers": "tokenizers", "tokcache over gigatoken": "gigatoken"}


class Unavailable(Exception):
    """A system can't be built here; the message says why."""


class Encoder(Protocol):
    """The interface: `encode` is timed and returns ids (a list, numpy array or TokenIds)."""

    encode: Callable[[str], Any]


class Tokenizers:
    """tokenizers.Tokenizer.encode, the most common call."""

    def __init__(self, file: Path) -> None:
        encode = Tokenizer.from_file(str(file)).encode
        self.encode = lambda text: encode(text, add_special_tokens=False).ids


class TokenizersFast:
    """tokenizers.Tokenizer.encode_batch_fast of one text: no offsets."""

    def __init__(self, file: Path) -> None:
        encode = Tokenizer.from_file(str(file)).encode_batch_fast
        self.encode = lambda text: encode([text], add_special_tokens=False)[0].ids


class TokenizersNext:
    """The `encode` of tokenizers 1.0, which has a cache of words."""

    def __init__(self, file: Path) -> None:
        if tokenizers_version.startswith("0."):
            raise Unavailable("no side folder with tokenizers 1.0 was named")
        encode = Tokenizer.from_file(str(file)).encode
        self.encode = lambda text: encode(text, add_special_tokens=False).ids


class DictOverTokenizers:
    """An unbounded dict of whole prompts, over tokenizers."""

    def __init__(self, file: Path) -> None:
        encode: Callable[[str], list[int]] = Tokenizers(file).encode
        known: dict[str, list[int]] = {}

        def look_up(text: str) -> list[int]:
            ids = known.get(text)
            if ids is None:
                ids = known[text] = encode(text)
            return ids

        self.encode: Callable[[str], Any] = look_up


class Fastokens:
    """fastokens.Tokenizer: `encode`, or its flat API (a numpy array, no int objects)."""

    def __init__(self, file: Path, *, has_segments: bool = False, is_flat: bool = False) -> None:
        import fastokens  # type: ignore[import-untyped]  # noqa: PLC0415 (optional)

        made = fastokens.Tokenizer.from_file(str(file))
        if has_segments:
            made.enable_segment_cache(SEGMENT_BYTES)
        encode, flat = made.encode, made.encode_batch_flat
        self.encode: Callable[[str], Any] = (
            (lambda text: np.frombuffer(flat([text])[0], np.uint32))
            if is_flat
            else (lambda text: encode(text).ids)
        )


class Gigatoken:
    """gigatoken.Tokenizer.encode: the numpy array that it returns, or a list made from it.

    Of its two ways to a list (`encode(text).tolist()`, `encode_batch_list([text])[0]`) the first
    is the faster for one prompt.
    """

    def __init__(self, file: Path, *, is_list: bool = False) -> None:
        import gigatoken  # noqa: PLC0415 (optional)

        made: Any = gigatoken.Tokenizer(file)
        encode = made.encode
        self.encode: Callable[[str], Any] = (
            (lambda text: encode(text).tolist()) if is_list else encode
        )


class Tokcache:
    """A wrapped tokenizers.Tokenizer; `settings` are CacheConfig's."""

    def __init__(self, file: Path, **settings: Any) -> None:
        import tokcache  # noqa: PLC0415 (tokenizers 1.0 stands in a process without tokcache)

        missing = settings.keys() - {field.name for field in fields(tokcache.CacheConfig)}
        if missing:
            raise Unavailable(f"CacheConfig has no {', '.join(sorted(missing))}")
        config = tokcache.CacheConfig(**settings)
        self.tokenizer = tokcache.wrap(Tokenizer.from_file(str(file)), config)
        token_ids = self.tokenizer.token_ids
        self.encode: Callable[[str], Any] = lambda text: token_ids(text, add_special_tokens=False)
        self.tokenizer.wait_for_engine()
        stats = self.tokenizer.cache_stats()
        if stats.engine != settings.get("engine", stats.engine):
            raise Unavailable(
                f"its engine is {stats.engine} ({stats.engine_reason}), not {settings['engine']}"
            )

    def segment_chars(self) -> tuple[int, int, int]:
        """Return the characters looked up, those in missing chunks, and those encoded."""
        stats: Any = self.tokenizer.cache_stats()
        return stats.l1.lookup_chars, stats.l1.chunk_miss_chars, stats.l1.engine_chars


SYSTEMS: dict[str, Callable[[Path], Encoder]] = {
    "tokenizers": Tokenizers,
    "tokenizers, encode_batch_fast": TokenizersFast,
    NEXT: TokenizersNext,
    "dict over tokenizers": DictOverTokenizers,
    "fastokens": Fastokens,
    "fastokens, flat API": lambda file: Fastokens(file, is_flat=True),
    "fastokens, segments": lambda file: Fastokens(file, has_segments=True),
    "fastokens, segments, flat API": lambda f: Fastokens(f, has_segments=True, is_flat=True),
    "gigatoken, list API": lambda file: Gigatoken(file, is_list=True),
    "gigatoken, array API": Gigatoken,
    "tokcache over tokenizers": lambda file: over("tokenizers", file),
    "tokcache over gigatoken": lambda file: over("gigatoken", file),
}


def over(engine: str, file: Path, **settings: Any) -> Tokcache:
    """Return tokcache with the segment cache over `engine`."""
    return Tokcache(file, l1=True, engine=engine, **settings)


def build(name: str, file: Path) -> Encoder:
    """Return a new system with nothing cached; raise Unavailable if it can't be built."""
    try:
        return SYSTEMS[name](file)
    except Unavailable:
        raise
    except Exception as error:  # every library has its own classes, some raise Exception
        raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


def n_different(encoder: Encoder, texts: list[str], expected: list[Any]) -> int:
    """Return the number of texts whose ids differ from those of `expected`."""
    pairs = zip(texts, expected, strict=True)
    return sum(not np.array_equal(np.asarray(encoder.encode(text)), ids) for text, ids in pairs)
