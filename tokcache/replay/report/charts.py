"""Charts as SVG, drawn by matplotlib, with the colours of the page they are put into.

They are drawn with colours that stand for the page's variables, which then take their place: the
same chart is readable on a light and on a dark page. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

_INK, _LINE = "#010203", "#010204"
_SERIES = ("#010211", "#010212", "#010213", "#010214")
_VARIABLES = {_INK: "--ink", _LINE: "--line"}
_VARIABLES |= {colour: f"--series-{n}" for n, colour in enumerate(_SERIES, start=1)}
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), "dashdot")  # lines differ without colours, too
_WIDTH, _HEIGHT, _BAR_HEIGHT = 4.3, 2.9, 0.52  # inches of 72 points: readable on a phone
_MANY = 5
_LEGEND_CHARS, _TEN = 36, 10

Points = tuple[Sequence[float], Sequence[float]]
Write = Callable[[float], str]


def lines(
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    write_x: Write,
    base: int = 10,
    marks: Sequence[tuple[float, float]] = (),
) -> str:
    """Return a chart of shares (0 to 1) against values on a logarithmic axis.

    `write_x` writes the labels of the axis, which are powers of `base`; `marks` are points to mark.
    """
    from matplotlib.ticker import FuncFormatter, PercentFormatter  # noqa: PLC0415 (an extra)

    figure, axes = _figure(_HEIGHT)
    for n, (name, (xs, ys)) in enumerate(series.items()):
        colour = _SERIES[n % len(_SERIES)]
        axes.plot(xs, ys, color=colour, linestyle=_DASHES[n % 4], linewidth=2, label=name)
    for x, y in marks:
        axes.plot([x], [y], "o", color=_INK, markersize=5)
    axes.set_xscale("log", base=10)
    axes.minorticks_off()
    ends = [value for xs, _ in series.values() for value in xs]
    axes.set_xticks(_ticks(min(ends), max(ends), base))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: write_x(x)))
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=_LINE, linewidth=0.8)
    if len(series) > 1:
        n_columns = len(series) if sum(map(len, series)) <= _LEGEND_CHARS else 1
        legend = axes.legend(
            frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=n_columns, fontsize=9
        )
        for text in legend.get_texts():
            text.set_color(_INK)
    return _svg(figure)


def bars(values: Mapping[str, float], *, x_label: str, write: Write) -> str:
    """Return a chart of horizontal bars, each with its name above and its value at the end."""
    figure, axes = _figure(0.55 + _BAR_HEIGHT * len(values))
    names = list(values)
    most = max([*values.values(), 1e-12])
    axes.barh(range(len(names)), list(values.values()), height=0.36, color=_SERIES[0])
    for n, name in enumerate(names):
        end, text = values[name] + most * 0.015, write(values[name])
        for x, y, words, at in ((0.0, n - 0.27, name, "bottom"), (end, n, text, "center")):
            axes.text(x, y, words, color=_INK, fontsize=9, va=at).set_in_layout(False)
    axes.set_ylim(len(names) - 0.6, -0.75)
    axes.set_xlim(0, most * 1.22)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.set_xlabel(x_label)
    return _svg(figure)


def _ticks(least: float, most: float, base: int) -> list[float]:
    """Return powers of `base` within the ends, at equal distances, at most five.

    Ends without two powers of ten between them have their halves and fifths, too.
    """
    if least <= 0 or most <= least:
        return [most]
    if base == _TEN and most < 3 * base * least:
        whole = float(base) ** math.floor(math.log(least, base))
        steps = [whole * step for step in (1, 2, 5, 10, 20, 50, 100, 200)]
        return [step for step in steps if least <= step <= most] or [most]
    first, last = math.ceil(math.log(least, base)), math.floor(math.log(most, base))
    step = max(1, math.ceil((last - first + 1) / _MANY))
    return [float(base) ** at for at in range(first, last + 1, step)] or [most]


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_LINE)
    axes.tick_params(colors=_INK, labelsize=9, color=_LINE)
    axes.xaxis.label.set(color=_INK, fontsize=9)
    axes.yaxis.label.set(color=_INK, fontsize=9)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib as mpl  # noqa: PLC0415 (an extra)

    written = io.StringIO()
    settings: Any = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "svg.hashsalt": "tokcache",
    }
    with mpl.rc_context(settings):
        figure.savefig(
            written, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Sizes come from the page; ids must be unique on it.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    own = blake2b(svg.encode(), digest_size=4).hexdigest()
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>c{own}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
