"""The public API: its names, one name for one thing, and the names that the documents use."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import tokcache
from tokcache.text.tokenizer import WrappedTokenizer

ROOT = Path(__file__).resolve().parents[1]  # the package may be installed elsewhere
NAMES = [
    "CacheConfig",
    "CacheStats",
    "DiskTier",
    "L0Cache",
    "L0Stats",
    "Miss",
    "MissReason",
    "PrefixStateCache",
    "RedisTier",
    "StateStats",
    "TierStats",
    "TokcacheError",
    "TokenIds",
    "__version__",
    "llama",
    "patch_transformers",
    "unpatch_transformers",
    "wrap",
]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def resolved(dotted: str) -> Any:
    """Return the object of a dotted name that begins with tokcache; None if there is none."""
    module, *names = dotted.split(".")
    found: Any = importlib.import_module(module)
    for at, name in enumerate(names):
        try:
            found = getattr(found, name)
        except AttributeError:
            try:
                found = importlib.import_module(".".join([module, *names[: at + 1]]))
            except ImportError:
                return None
    return found


def test_the_public_names_are_these() -> None:
    assert sorted(tokcache.__all__) == sorted(NAMES)
    assert all(hasattr(tokcache, name) for name in NAMES)


@pytest.mark.parametrize(
    ("owner", "stats", "clear"),
    [
        (WrappedTokenizer, "cache_stats", "cache_clear"),
        (tokcache.L0Cache, "stats", "clear"),
        (tokcache.PrefixStateCache, "stats", "clear"),
        (tokcache.DiskTier, "stats", "clear"),
        (tokcache.RedisTier, "stats", "clear"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_cache_is_counted_and_cleared_by_the_same_names(
    owner: type, stats: str, clear: str
) -> None:
    assert not set(inspect.signature(getattr(owner, stats)).parameters) - {"self"}
    scope = inspect.signature(getattr(owner, clear)).parameters["scope"]
    assert scope.kind is inspect.Parameter.KEYWORD_ONLY
    assert scope.default is None


def test_a_model_and_a_server_are_cleared_by_the_same_names() -> None:
    llama = pytest.importorskip("tokcache.llama", reason="llama-cpp-python is an extra")
    pytest.importorskip("llama_cpp", reason="Llama needs llama-cpp-python")
    pytest.importorskip("httpx", reason="LlamaServer needs httpx")
    for method in (
        llama.Llama.cache_clear,
        llama.LlamaServer.clear,
        llama.AsyncLlamaServer.clear,
    ):
        scope = inspect.signature(method).parameters["scope"]
        assert (scope.kind, scope.default) == (inspect.Parameter.KEYWORD_ONLY, None)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_the_documents_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    dotted = set(re.findall(r"(?<![\w./@-])tokcache(?:\.[A-Za-z_]\w*)+", text))
    for module, names in re.findall(
        r"^from (tokcache[\w.]*) import ([\w, ]+)$", text, re.MULTILINE
    ):
        dotted |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert not [name for name in sorted(dotted) if resolved(name) is None]
