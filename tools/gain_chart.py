"""Draw the picture of the gain: `python tools/gain_chart.py runs.json`.

The file is that of `tokcache demo --json runs.json`. Writes docs/assets/gain.svg: the time to first
token of each prompt of the demo, without and with tokcache. Its colours are readable on a light and
on a dark page.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "docs" / "assets" / "gain.svg"
WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 66, 48
WITHOUT, WITH, TEXT, LINE = "#d97706", "#0d9488", "#7d8590", "#7d859055"
_STYLE = (
    f".t{{font:600 16px system-ui,sans-serif;fill:{TEXT}}}"
    f".s{{font:13px system-ui,sans-serif;fill:{TEXT}}}"
    ".m{text-anchor:middle}.e{text-anchor:end}"
)


def chart(runs: list[dict[str, Any]], about: str) -> str:
    """Return the SVG of two bars a prompt, in the order of the demo."""
    top_ms = max(max(run["without_s"], run["with_s"]) for run in runs) * 1000
    step = _round_step(top_ms)
    top_ms = math.ceil(top_ms / step) * step
    height = HEIGHT - TOP - BOTTOM
    width = (WIDTH - LEFT - RIGHT) / len(runs)

    def bar(x: float, milliseconds: float, colour: str) -> str:
        size = height * milliseconds / top_ms
        return (
            f'<rect x="{x:.1f}" y="{TOP + height - size:.1f}" width="{width * 0.38:.1f}" '
            f'height="{size:.1f}" fill="{colour}"/>'
        )

    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
    label = f'aria-label="Time to first token of {len(runs)} prompts, without and with tokcache"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>',
        f"<style>{_STYLE}</style>",
        f'<text x="{LEFT}" y="22" class="t">Time to first token, milliseconds</text>',
        f'<rect x="{LEFT}" y="36" width="11" height="11" fill="{WITHOUT}"/>',
        f'<text x="{LEFT + 17}" y="46" class="s">without tokcache</text>',
        f'<rect x="{LEFT + 140}" y="36" width="11" height="11" fill="{WITH}"/>',
        f'<text x="{LEFT + 157}" y="46" class="s">with tokcache</text>',
    ]
    for tick in range(0, int(top_ms) + 1, int(step)):
        y = TOP + height * (1 - tick / top_ms)
        parts.append(
            f'<path d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}" stroke="{LINE}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="s e">{tick}</text>'
        )
    for n, run in enumerate(runs):
        x = LEFT + n * width
        parts += [
            bar(x + width * 0.1, run["without_s"] * 1000, WITHOUT),
            bar(x + width * 0.52, run["with_s"] * 1000, WITH),
            f'<text x="{x + width / 2:.1f}" y="{HEIGHT - BOTTOM + 17}" class="s m">{n + 1}</text>',
        ]
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" class="s m">{about}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _round_step(top: float) -> float:
    """Return a round distance of the lines, for about five of them."""
    scale: float = 10 ** math.floor(math.log10(top / 5))
    return next(scale * n for n in (1, 2, 5, 10) if top / (scale * n) <= 6)  # noqa: PLR2004


def main() -> None:
    """Draw one run of the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="written by `tokcache demo --json`")
    found = json.loads(parser.parse_args().runs.read_text(encoding="utf-8"))
    runs = found["prompts"]
    n_tokens = sum(run["n_tokens"] for run in runs)
    about = f"prompts of two chats that take turns ({n_tokens:,} tokens, {found['cores']} cores)"
    TARGET.write_text(chart(runs, about), encoding="utf-8")


if __name__ == "__main__":
    main()
