"""What the commands share: exit codes, and how errors are told."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import typer

from tokcache.errors import TokcacheError

if TYPE_CHECKING:
    from collections.abc import Iterator

DIFFERS = 1
BAD_INPUT = 2


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """Print one of tokcache's own errors in one line; others are bugs and keep their traceback."""
    try:
        yield
    except TokcacheError as error:
        text = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())
        typer.echo(f"tokcache: {text}", err=True)
        raise typer.Exit(BAD_INPUT) from None
