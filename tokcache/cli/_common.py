"""Exit codes, and the printing of errors, that the commands share."""

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
def errors_in_one_line() -> Iterator[None]:
    """Print a TokcacheError in one line and exit; other exceptions are bugs and pass through."""
    try:
        yield
    except TokcacheError as error:
        text = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())
        typer.echo(f"tokcache: {text}", err=True)
        raise typer.Exit(BAD_INPUT) from None
