"""Imports between rooms point one way; an optional library is imported in one file, when used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokcache

ROOT = Path(tokcache.__file__).parent
LEAVES = {"errors", "config", "stats", "_cache_folder", "_forks", "_validate", "_version"}
MAY_IMPORT = {
    **dict.fromkeys(LEAVES, LEAVES),
    "text": LEAVES | {"text"},
    "state": LEAVES | {"state"},
    "samples": LEAVES | {"samples"},
    "llama": LEAVES | {"text", "state", "llama"},
    "gateway": LEAVES | {"text", "state", "llama", "samples", "gateway"},
}
OPTIONAL = {"transformers", "llama_cpp", "redis", "prometheus_client", "httpx", "xllamacpp", "gguf"}
OPTIONAL |= {"gigatoken", "fastokens", "xxhash", "cryptography", "platformdirs"}
OPTIONAL |= {"starlette", "uvicorn"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def is_room(name: str) -> bool:
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


# These rooms may import anything, and no other room imports them.
ON_TOP = {"__init__", "__main__", "cli", "demo", "observe"}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if room(p) not in ON_TOP)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "tokcache" and len(parts) > 1 and is_room(parts[1]):
            assert parts[1] in MAY_IMPORT[room(path)], f"{path.name} imports {name}"


def test_importing_tokcache_loads_no_more_than_it_needs() -> None:
    code = "import sys, tokcache; print('\\n'.join(sys.modules))"
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & (OPTIONAL | {"torch", "typer", "rich", "matplotlib", "jinja2"})
    assert "tokenizers" in loaded
    assert "numpy" not in loaded  # importing it takes half of the time that ours may take
