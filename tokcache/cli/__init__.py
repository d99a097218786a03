"""The command line; each command has its own file."""

from __future__ import annotations

from typing import Annotated

import typer

import tokcache
from tokcache.cli import demo, explain, replay, serve, states, warm, why

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo.demo)
app.command()(explain.explain)
app.command()(replay.replay)
app.command()(why.why)
app.command()(serve.serve)
states.states.command()(warm.warm)
app.add_typer(states.states, name="states")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"tokcache {tokcache.__version__}")
        raise typer.Exit


@app.callback()
def _tokcache(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Exact caches for language-model serving: tokenization results and prefix states."""


def main() -> None:
    """Run the command line."""
    app()
