"""Griffe extension: show the sections of tokcache's docstrings as sections.

A docstring here ends in lines such as `Units: positions are code points`, continued by indented
lines. Griffe would join them into one paragraph; rewritten as Google's "Units:" with an indented
block below, each one becomes a section of its own.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = ("Shapes", "Units", "Errors", "Cost", "Threads", "Source")
_FIRST_LINE = re.compile(rf"^({'|'.join(SECTIONS)}):\s+(\S.*)$")


def with_sections(docstring: str) -> str:
    """Return the docstring with each section's text in an indented block below its title."""
    lines: list[str] = []
    in_section = False
    for line in docstring.splitlines():
        if found := _FIRST_LINE.match(line):
            lines += ["", f"{found[1]}:", f"    {found[2]}"]
            in_section = True
        elif in_section and line.startswith(" "):
            lines.append(f"    {line.strip()}")
        else:
            in_section = False
            lines.append(line)
    return "\n".join(lines)


class DocstringSections(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = with_sections(obj.docstring.value)
