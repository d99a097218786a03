"""Exit codes, and the printing of errors, that the commands share."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokcache.errors import TokcacheError

if TYPE_CHECKING:
    from collections.abc import Iterator

DIFFERS = 1
BAD_INPUT = 2

AnyTokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="PATH_OR_HUB_ID",
        help="A tokenizer.json, its folder, a hub name, or a GGUF; by default --model's own.",
    ),
]


def write_text(path: Path, text: str) -> None:
    """Write a file that the user named; exit with one line if it can't be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        typer.echo(f"tokcache: {path} can't be written: {error.strerror}", err=True)
        raise typer.Exit(BAD_INPUT) from None


def require_folder(path: Path | None) -> None:
    """Exit with one line if a file can't be written later because its folder is absent."""
    if path is not None and not path.parent.is_dir():
        typer.echo(f"tokcache: {path} can't be written: no such folder: {path.parent}", err=True)
        raise typer.Exit(BAD_INPUT)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print a TokcacheError in one line and exit; other exceptions are bugs and pass through."""
    try:
        yield
    except TokcacheError as error:
        text = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())
        typer.echo(f"tokcache: {text}", err=True)
        raise typer.Exit(BAD_INPUT) from None
