"""The arguments of a case: tokenizers as one of the three modes loads them, and a folder."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The tokenizers that models which generate have: not BERT's.
GENERATIVE = ("sample", "phi-3-mini")

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "  two leading spaces,\ta tab\nand a line\r\n\r\n",
    "Größe, naïve, 東京, 한국어, \U0001f44d\U0001f3fd and e\u0301",
    "<|im_start|>user\nHello there!<|im_end|>\n<|im_start|>assistant\n",
    "[CLS] hello [SEP] </s> <s> <|endoftext|> special strings of other tokenizers",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": None}  # 12345\n" * 4,
    "A long text that repeats. " * 120,
]
CHAT = [
    {"role": "user", "content": "What is a prefix cache?"},
    {"role": "assistant", "content": "Memory of work already done."},
    {"role": "user", "content": "And a suffix?"},
]


@dataclass
class Given:
    """One tokenizer's folder, the mode, the case's step, and a folder that all steps share."""

    source: Path
    mode: str
    step: int
    folder: Path
    _loaded: list[Any] = field(default_factory=list)

    def load(self, **kwargs: Any) -> Any:
        """Return a transformers tokenizer, loaded as the mode says."""
        from transformers import AutoTokenizer

        found: Any = AutoTokenizer.from_pretrained(self.source, **kwargs)
        if self.mode == "wrap":
            import tokcache

            found = tokcache.wrap(found)
        if self.mode != "plain":
            assert hasattr(found, "cache_stats"), "not wrapped: plain would be compared with plain"
            self._loaded.append(found)
        if found.pad_token is None:
            found.pad_token = found.eos_token
        return found

    def load_rust(self) -> Any:
        """Return a `tokenizers.Tokenizer`; the patch of transformers does not reach it."""
        from tokenizers import Tokenizer

        found: Any = Tokenizer.from_file(str(self.source / "tokenizer.json"))
        if self.mode == "wrap":
            import tokcache

            found = tokcache.wrap(found)
            self._loaded.append(found)
        return found

    def both_rust(self) -> Iterator[tuple[str, Any]]:
        """Yield a separate Rust tokenizer and the one inside a transformers tokenizer."""
        yield "alone", self.load_rust()
        yield "backend", self.load()._tokenizer


def used() -> dict[str, Any]:
    """Return the use counts of all living caches of this process, those of copies included."""
    bypasses: Counter[str] = Counter()
    answered = 0
    for cache in [one for one in gc.get_objects() if type(one).__name__ == "CachedTokenizer"]:
        stats = cache.stats()
        answered += stats.l0.hits + stats.l0.misses
        bypasses.update(stats.bypasses)
    return {"answered": answered, "bypasses": dict(bypasses)}


@dataclass(frozen=True)
class Case:
    """One use of one library; the result of `run` must be the same for plain and wrapped.

    `n_steps` processes run it one after the other and share a folder; `only` names the tokenizers
    that the case can use.
    """

    name: str
    library: str
    done: str
    run: Callable[[Given], Any]
    n_steps: int = 1
    only: tuple[str, ...] | None = None


CASES: dict[str, Case] = {}


def case(
    library: str, done: str, *, n_steps: int = 1, only: tuple[str, ...] | None = None
) -> Callable[[Callable[[Given], Any]], Callable[[Given], Any]]:
    """Register a function as a case of the same name."""

    def register(run: Callable[[Given], Any]) -> Callable[[Given], Any]:
        name = run.__name__.replace("_", "-")
        assert name not in CASES, name
        CASES[name] = Case(name, library, done, run, n_steps, only)
        return run

    return register


def as_json(value: Any) -> Any:
    """Return a value as JSON types, so that results of two processes can be compared."""
    if isinstance(value, dict) or (hasattr(value, "data") and hasattr(value, "encodings")):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple, type({}.values()))):
        return [as_json(part) for part in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    is_json = value is None or isinstance(value, (str, int, float, bool))
    return value if is_json else repr(value)
