"""Every exception is defined in errors.py, derives from TokcacheError and is used."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

import tokcache
from tokcache import errors

ROOT = Path(tokcache.__file__).parent
EXT = ROOT.parent / "ext"
OWN = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
BUILTIN = {
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}


def exception_classes(source: str) -> set[str]:
    """Return the names of the classes in `source` that have an exception among their bases."""
    found: set[str] = set()
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    for node in sorted(classes, key=lambda node: node.lineno):
        bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        if bases & (OWN | BUILTIN | found) or any(base.endswith("Error") for base in bases):
            found.add(node.name)
    return found


def test_exception_classes_are_found() -> None:
    bases = {"A": "KeyError", "B": "A", "C": "httpx.HTTPError", "D": "A0"}
    source = "\n".join(f"class {name}({base}): pass" for name, base in bases.items())
    assert exception_classes(source) == {"A", "B", "C"}


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_other_module_defines_an_exception(path: Path) -> None:
    if path != ROOT / "errors.py":
        assert not exception_classes(path.read_text())


def test_native_modules_define_no_exception() -> None:
    pattern = re.compile(r"^\s*(?:cdef )?class \w+\(.*(?:Error|Exception)", re.MULTILINE)
    assert not [path for path in EXT.rglob("*.p[yx][xd]") if pattern.search(path.read_text())]


def test_every_exception_derives_from_tokcache_error() -> None:
    assert all(issubclass(getattr(errors, name), errors.TokcacheError) for name in OWN)


def test_every_exception_is_used() -> None:
    sources = [path for path in ROOT.rglob("*.py") if path != ROOT / "errors.py"]
    used = set(re.findall(r"\w+", " ".join(path.read_text() for path in sources)))
    assert OWN - {"ServerError"} <= used  # it is the base class of others
