"""The pages say what the code has: every public name, every reason, every command."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import tokcache
import tokcache.errors
import tokcache.llama
from tokcache import reasons
from tokcache.llama.reasons import REASONS
from tokcache.llama.server.trust import CURES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(tokcache.__file__).parent  # in the checkout, or installed
DOCS = ROOT / "docs"


def test_the_generated_parts_are_those_of_the_code() -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(ROOT / "tools" / "docs_pages.py"), "--check"],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, f"run python tools/docs_pages.py: {done.stdout}{done.stderr}"


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    public = {f"tokcache.{name}" for name in tokcache.__all__}
    public |= {f"tokcache.llama.{name}" for name in tokcache.llama.__all__}
    public -= {"tokcache.llama", "tokcache.__version__", "tokcache.TokcacheError"}
    assert public <= documented


# A code that is counted is given as a literal to one of these.
_COUNTS = {"refuse", "_refuse", "count_bypass", "StateRefused", "LinkFailed", "Refused", "degrade"}
_COUNTS |= {"CopyError", "NotFromIds", "TemplateNotTaken", "Refusal", "RenderingRefused"}
_NATIVE = re.compile(r'\.refuse\("(\w+)"')


def _codes_in_source() -> dict[str, str]:
    """Return every literal code that the source counts, and where."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            literal, line = None, getattr(node, "lineno", 0)
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                literal = node.args[0] if name in _COUNTS else None
            elif isinstance(node, ast.Subscript):
                name = getattr(node.value, "attr", getattr(node.value, "id", ""))
                literal = node.slice if name in {"refusals", "_refusals", "reasons"} else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                found[literal.value] = f"{path.relative_to(PACKAGE)}:{line}"
    for path in sorted((ROOT / "ext").rglob("*.pyx")):
        for code in _NATIVE.findall(path.read_text(encoding="utf-8")):
            found[code] = str(path.relative_to(ROOT))
    return found


def test_every_reason_in_the_source_has_its_cause_and_cure() -> None:
    known = {code for table in reasons.TABLES.values() for code in table} | {*REASONS, *CURES}
    found = _codes_in_source()
    assert len(found) > 60
    missing = {code: place for code, place in found.items() if code not in known}
    assert not missing
