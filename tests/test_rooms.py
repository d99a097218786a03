"""Packages import only those below them, and `import tokcache` loads no optional library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tokcache
from tokcache.text._native import NATIVE

ROOT = Path(tokcache.__file__).parent
LEAVES = {"errors", "config", "differences", "reasons", "stats"}
LEAVES |= {"_cache_folder", "_disk_budget", "_files", "_forks", "_prefix", "_records"}
LEAVES |= {"_validate", "_version"}
MAY_IMPORT = {
    **dict.fromkeys(LEAVES, LEAVES),
    "differences": {"errors", "_prefix", "differences"},
    "text": LEAVES | {"text"},
    "state": LEAVES | {"state"},
    "samples": LEAVES | {"samples"},
    "llama": LEAVES | {"text", "state", "llama"},
    "replay": LEAVES | {"text", "state", "llama", "replay"},
    "gateway": LEAVES | {"text", "state", "llama", "samples", "gateway"},
}
OPTIONAL = {"transformers", "llama_cpp", "redis", "prometheus_client", "httpx", "xllamacpp", "gguf"}
OPTIONAL |= {"gigatoken", "fastokens", "xxhash", "cryptography", "platformdirs"}
OPTIONAL |= {"starlette", "uvicorn", "orjson", "zstandard"}
OPTIONAL |= {"httptools", "uvloop"}


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def is_package(name: str) -> bool:
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file()


def imported_names(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


# These packages may import anything, and no other package may import them.
ON_TOP = {"__init__", "__main__", "cli", "demo", "observe"}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if package_of(p) not in ON_TOP)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_imports_only_the_packages_below_it(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name in imported_names(tree):
        parts = name.split(".")
        if parts[0] == "tokcache" and len(parts) > 1 and is_package(parts[1]):
            assert parts[1] in MAY_IMPORT[package_of(path)], f"{path.name} imports {name}"


def test_the_guide_for_contributors_names_every_room() -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    rooms += [path.parent for path in (ROOT / "text").glob("*/__init__.py")]
    missing = [room for room in rooms if f"`{room.relative_to(ROOT)}/`" not in guide]
    assert not missing


# The packages of text/ in layers, the lowest first; each may import the layers below its own.
TEXT_LAYERS = (
    {"_native", "_pickling", "engines"},
    {"cuts"},
    {"_reference"},
    {"_implementation"},
    {"chat", "flights", "l0", "segments", "token_ids"},
    {"cache_file"},
    {"tokenizer"},
    {"wrappers"},
)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "text").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_package_of_text_imports_only_the_layers_below_it(path: Path) -> None:
    own = path.relative_to(ROOT / "text").parts[0].removesuffix(".py")
    below: set[str] = {own}
    for layer in TEXT_LAYERS:
        if own in layer:
            break
        below |= layer
    compiled = tuple(f"tokcache.text.{name}" for name in NATIVE)
    for name in imported_names(ast.parse(path.read_text())):
        parts = name.split(".")
        is_own = parts[:2] == ["tokcache", "text"] and len(parts) > 2
        if is_own and not name.startswith(compiled):
            assert parts[2] in below, f"{path.name} imports {name}"


def test_importing_tokcache_loads_no_optional_library() -> None:
    code = "import sys, tokcache; print('\\n'.join(sys.modules))"
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & (OPTIONAL | {"torch", "typer", "rich", "matplotlib", "jinja2"})
    assert "tokenizers" in loaded
    assert "numpy" not in loaded  # importing it takes half of our time limit


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for type checking count, too: a reader has to follow them as well."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "tokcache").is_dir():
        pytest.skip("this test runs on an installed package, without its source tree")
    command = [sys.executable, str(checkout / "tools" / "measure_house.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert json.loads(done.stdout)["circles_are"] == []
