"""Makes the HTML file of a report."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from tokcache import _version

if TYPE_CHECKING:
    from tokcache.replay.report import Report


def render(report: Report) -> str:
    """Return the page: one file, nothing from elsewhere, for light and dark and for phones.

    All texts are escaped; the charts' SVG is not.
    """
    from jinja2 import Environment  # noqa: PLC0415 (an extra)
    from markupsafe import Markup  # noqa: PLC0415 (comes with jinja2)

    source = files("tokcache.replay.report").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    parts = [(type(part).__name__, part) for part in report.parts]
    return template.render(report=report, parts=parts, svg=Markup, version=_version.__version__)
