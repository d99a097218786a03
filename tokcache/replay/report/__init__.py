"""A page of figures, charts and tables in one HTML file that loads nothing from elsewhere.

A `Report` is plain data: replays, benchmarks and a running process's statistics each make one.
`page.render` makes the file of it, `charts` the SVG of a chart. Every figure says how it was
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokcache.errors import MissingExtra


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure to read first: its value with the unit, and how it was measured."""

    label: str
    value: str
    how: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart as SVG, from `charts`; `how` says how its figures were measured."""

    title: str
    svg: str
    how: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the columns `numbers` are aligned to the right.

    A long one may be `is_folded`: its title opens it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    how: str = ""
    numbers: frozenset[int] = frozenset()
    is_folded: bool = False


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to copy."""

    title: str
    text: str
    how: str = ""


@dataclass(frozen=True, slots=True)
class Heading:
    """A title over the parts that follow it."""

    title: str
    text: str = ""


Part = Chart | Table | Code | Heading


@dataclass(frozen=True, slots=True)
class Report:
    """One page: a sentence with its figure, the figures to read first, then the parts in order."""

    title: str
    sentence: str
    figures: Sequence[Figure] = ()
    parts: Sequence[Part] = ()
    notes: Sequence[str] = field(default_factory=list)


def require_libraries() -> None:
    """Check that the libraries for a page are installed, before hours of work for one.

    Errors: MissingExtra.
    """
    try:
        import jinja2  # noqa: F401, PLC0415 (an extra)
        import matplotlib  # noqa: F401, ICN001, PLC0415 (same)
    except ImportError as error:
        raise MissingExtra(f"a report needs {error.name}: pip install 'tokcache[replay]'") from None
