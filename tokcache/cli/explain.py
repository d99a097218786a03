"""`tokcache explain`: shows where a tokenizer's texts are cut, and why."""

from __future__ import annotations

import io
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokcache.cli._common import DIFFERS, errors_in_one_line
from tokcache.cli.explain_report import print_explanation
from tokcache.cli.explanation import explain as explained
from tokcache.cli.explanation import read_sample
from tokcache.config import CacheConfig
from tokcache.demo.tokenizers import find_tokenizer


class EngineName(StrEnum):
    """The values of --engine, which are those of `config.ENGINES`."""

    AUTO = "auto"
    TOKENIZERS = "tokenizers"
    GIGATOKEN = "gigatoken"
    FASTOKENS = "fastokens"


def explain(
    tokenizer: Annotated[
        str,
        typer.Argument(
            metavar="TOKENIZER", help="A tokenizer.json, its folder, a hub name, or a GGUF."
        ),
    ],
    *,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A sample in UTF-8; by default a short chat."),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="The encoder of uncached text; auto: the fastest that proves equal."),
    ] = EngineName.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show whether a tokenizer's texts and segments are cached, where texts are cut, and why.

    A sample text is shown with its segments, and its ids are compared with the plain tokenizer's.
    Exit code 1: they differ; 2: bad input.
    """
    with errors_in_one_line():
        source = find_tokenizer(tokenizer)
        sample = None if text is None else read_sample(text)
        found = explained(source, CacheConfig(engine=engine.value), sample)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        # The sample has characters of many scripts, which the output's encoding may lack.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        print_explanation(Console(highlight=False), found)
    raise typer.Exit(DIFFERS if found.is_different else 0)
