"""Plain texts: prompts between empty lines, or one prompt a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokcache.replay.traces.source import Source

BLOCKS, LINES = "text", "lines"
ABOUT = {BLOCKS: "plain texts, with an empty line between two", LINES: "one plain text a line"}


def prompts(source: Source, name: str) -> Iterator[str]:
    """Yield the prompts of a file of plain text; one that is not UTF-8 is skipped."""
    lines = source.lines()
    for piece in lines if name == LINES else _blocks(lines):
        try:
            text = piece.decode().replace("\r\n", "\n").strip("\n")
        except UnicodeDecodeError as error:
            source.skipped.add(source.where, f"byte {error.start + 1} of the prompt is not UTF-8")
            continue
        if text.strip():
            yield text


def _blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    for line in lines:
        if line.strip(b" \t\r\n"):
            held.append(line)
        elif held:
            yield b"".join(held)
            held = []
    if held:
        yield b"".join(held)
