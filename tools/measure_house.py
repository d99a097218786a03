"""Measure how the code reads: `python tools/measure_house.py [--json]`.

Five figures, each with its bar:

1. "what" per 1,000 words of prose (comments and docstrings), for tokcache/, ext/ and tests/.
   A sentence that needs the word often has no subject.
2. Private functions that exactly one function calls, as a share of all functions of tokcache/.
3. The largest class that wraps no foreign class, in methods, those of its own bases included.
4. Floors of imports in tokcache/text/, as a reader of the folder sees it: each folder in it counts
   as one room, like each module that is directly in it; the longest chain of rooms that import
   each other.
5. Circles of imports in tokcache/, type-checking imports included: between modules, between the
   rooms of tokcache/, and between those of tokcache/text/.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROSE = {"tokcache": 1.5, "ext": 1.5, "tests": 1.5}
BARS = {"one_caller_percent": 12.0, "largest_class": 30, "floors_in_text": 8, "circles": 0}
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_CYTHON_PROSE = re.compile(r'"""(.*?)"""|#([^\n]*)', re.DOTALL)
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def python_prose(source: str) -> list[str]:
    """Return the docstrings and comments of a module."""
    documented = (ast.Module, ast.ClassDef, *_FUNCTION)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (token.string for token in tokens if token.type == tokenize.COMMENT)
    return [*(ast.get_docstring(node) or "" for node in nodes), *comments]


def cython_prose(source: str) -> list[str]:
    """Return the docstrings and comments of a .pyx or .pxd file."""
    return [doc or comment for doc, comment in _CYTHON_PROSE.findall(source)]


def what_per_thousand(folder: str) -> float:
    """Return the number of times that "what" occurs in 1,000 words of prose."""
    n_words = n_what = 0
    for path in sorted((ROOT / folder).rglob("*.py*")):
        if path.suffix not in (".py", ".pyi", ".pyx", ".pxd"):
            continue
        read = python_prose if path.suffix in (".py", ".pyi") else cython_prose
        for text in read(path.read_text(encoding="utf-8")):
            words = [word.lower() for word in _WORD.findall(text)]
            n_words += len(words)
            n_what += words.count("what")
    return 1000 * n_what / max(n_words, 1)


def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module of tokcache/, by its dotted name."""
    found = {}
    for path in sorted((ROOT / "tokcache").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def one_caller_percent(trees: dict[str, ast.Module]) -> float:
    """Return the share of functions that are private and named in one other function only."""
    n_functions = 0
    private: dict[str, int] = defaultdict(int)
    named_in: dict[str, set[int]] = defaultdict(set)
    for tree in trees.values():
        outer = [node for node in ast.walk(tree) if isinstance(node, _FUNCTION)]
        n_functions += len(outer)
        for node in outer:
            if node.name.startswith("_") and not node.name.endswith("__"):
                private[node.name] += 1
        for place, name in _names(tree):
            named_in[name].add(place)
    singles = sum(n for name, n in private.items() if n == 1 and len(named_in[name]) == 1)
    return 100 * singles / max(n_functions, 1)


def _names(tree: ast.AST, place: int = 0) -> list[tuple[int, str]]:
    """Return every name that is used, with the id of the function that uses it."""
    found = []
    for node in ast.iter_child_nodes(tree):
        inner = id(node) if isinstance(node, _FUNCTION) else place
        if isinstance(node, ast.Name):
            found.append((place, node.id))
        elif isinstance(node, ast.Attribute):
            found.append((place, node.attr))
        found += _names(node, inner)
    return found


def largest_class(trees: dict[str, ast.Module]) -> tuple[str, int]:
    """Return the class with the most methods that wraps no foreign class, and their number.

    A class wraps a foreign one if it has a base that neither tokcache nor the standard library
    defines.
    """
    classes = {
        node.name: node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    harmless = {"object", "Protocol", "Exception", "ABC", "NamedTuple", "Generator", "StrEnum"}

    def methods(name: str) -> set[str]:
        node = classes[name]
        own = {one.name for one in node.body if isinstance(one, _FUNCTION)}
        return own.union(*(methods(base) for base in _bases(node) if base in classes))

    def is_foreign(name: str) -> bool:
        node = classes[name]
        if "Wrapper" in name or "Face" in name:
            return True
        return any(
            is_foreign(base) if base in classes else base not in harmless for base in _bases(node)
        )

    sizes = {name: len(methods(name)) for name in classes if not is_foreign(name)}
    name = max(sizes, key=lambda one: sizes[one])
    return name, sizes[name]


def _bases(node: ast.ClassDef) -> list[str]:
    found = []
    for base in node.bases:
        inner = base.value if isinstance(base, ast.Subscript) else base
        found.append(ast.unparse(inner))  # such as `llama_cpp.Llama`, which is foreign
    return found


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return the modules that each module imports, at any place in it."""
    graph: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                graph[name] |= {one.name for one in node.names if one.name in trees}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for one in node.names:
                    inner = f"{node.module}.{one.name}"
                    graph[name].add(inner if inner in trees else node.module)
        graph[name] &= trees.keys() - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return circles of imports; after each, one of its imports is removed, until none is left."""
    left = {name: set(others) for name, others in graph.items()}
    found = []
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            circle = error.args[1]
            found.append(circle)
            for a, b in pairwise(circle):
                left[b].discard(a)
        else:
            return found


def rooms(graph: dict[str, set[str]], parent: str) -> dict[str, set[str]]:
    """Return which rooms of a package each of its rooms imports: its modules and its folders."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[: parent.count(".") + 2])

    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        if name.startswith(f"{parent}."):
            inside = {room(one) for one in others if one.startswith(f"{parent}.")}
            found.setdefault(room(name), set()).update(inside - {room(name)})
    return found


def floors(graph: dict[str, set[str]]) -> int:
    """Return how many modules or rooms stand on top of each other; a circle counts as one."""
    depth: dict[str, int] = {}

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        if name not in depth:
            below = [one for one in graph[name] if one not in above]
            depth[name] = 1 + max((floor(one, (*above, name)) for one in below), default=0)
        return depth[name]

    return max(map(floor, graph))


def measure() -> dict[str, object]:
    """Return every figure."""
    trees = modules()
    graph = imports(trees)
    name, size = largest_class(trees)
    in_text = rooms(graph, "tokcache.text")
    all_circles = [*circles(graph), *circles(rooms(graph, "tokcache")), *circles(in_text)]
    return {
        "what_per_1000_words": {one: round(what_per_thousand(one), 1) for one in PROSE},
        "one_caller_percent": round(one_caller_percent(trees), 1),
        "largest_class": size,
        "largest_class_name": name,
        "floors_in_text": floors(in_text),
        "circles": len(all_circles),
        "circles_are": [" -> ".join(circle) for circle in all_circles],
    }


def main() -> None:
    """Print the figures with their bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    found = measure()
    if parser.parse_args().json:
        json.dump(found, sys.stdout, indent=2)
        return
    for folder, rate in found["what_per_1000_words"].items():  # type: ignore[attr-defined]
        print(f"'what' in 1,000 words of {folder + '/':10} {rate:6.1f}   (bar {PROSE[folder]})")
    for figure, bar in BARS.items():
        print(f"{figure:34} {found[figure]:6}   (bar {bar})")
    print(f"the largest class is {found['largest_class_name']}")
    for circle in found["circles_are"]:  # type: ignore[attr-defined]
        print(f"circle: {circle}")


if __name__ == "__main__":
    main()
