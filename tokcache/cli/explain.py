"""`tokcache explain`: shows where a tokenizer's texts are cut, and how far its chats are reused."""

from __future__ import annotations

import io
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokcache.cli._common import BAD_INPUT, DIFFERS, errors_in_one_line
from tokcache.cli.chat_report import print_audit
from tokcache.cli.chat_templates import find_chat_templates
from tokcache.cli.explain_report import print_explanation
from tokcache.cli.explanation import explain as explained
from tokcache.cli.explanation import read_sample
from tokcache.config import CacheConfig
from tokcache.demo.tokenizers import find_tokenizer
from tokcache.errors import InvalidConfig
from tokcache.text.chat.audit import audit_template
from tokcache.text.chat.conversations import N_TURNS, all_cases


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
            metavar="TOKENIZER",
            help="A tokenizer.json, its folder, a hub name, a GGUF, or with --chat a .jinja file.",
        ),
    ],
    *,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Try whether the chat template only appends to its prompts."),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A sample in UTF-8; by default a short chat."),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="The encoder of uncached text; auto: the fastest that proves equal."),
    ] = EngineName.AUTO,
    encode_by: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", metavar="TOKENIZER", help="Encodes the texts of a .jinja file."
        ),
    ] = None,
    turns: Annotated[
        int, typer.Option(min=2, max=100, help="Turns of the chats that --chat tries.")
    ] = N_TURNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show whether a tokenizer's texts and segments are cached, where texts are cut, and why.

    A sample text is shown with its segments, and its ids are compared with the plain tokenizer's.
    With --chat, chats are rendered by the tokenizer's template instead, and each prompt is compared
    with the one before and its answer.
    Exit code 1: ids differ, or a prompt does not begin with what a server holds; 2: bad input.
    """
    if chat:
        with errors_in_one_line():
            if text is not None:
                raise InvalidConfig("--text goes with a tokenizer's cuts; leave it out with --chat")
            config = CacheConfig(engine=engine.value)
            code = explain_chat(tokenizer, encode_by, config, n_turns=turns, as_json=as_json)
        raise typer.Exit(code)
    with errors_in_one_line():
        if encode_by is not None:
            raise InvalidConfig("--tokenizer goes with --chat")
        source = find_tokenizer(tokenizer)
        sample = None if text is None else read_sample(text)
        found = explained(source, CacheConfig(engine=engine.value), sample)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        print_explanation(_console(), found)
    raise typer.Exit(DIFFERS if found.is_different else 0)


def _console() -> Console:
    # Texts have characters of many scripts, which the output's encoding may lack.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(highlight=False)


def explain_chat(
    named: str, encode_by: str | None, config: CacheConfig, *, n_turns: int, as_json: bool
) -> int:
    """Print the audit of each chat template of a tokenizer, and return the exit code."""
    found = find_chat_templates(named, encode_by, config)
    audits = [
        audit_template(
            name,
            template,
            variables=found.variables,
            encoder=found.encoder,
            by_transformers=found.by_transformers,
            cases=all_cases(n_turns),
        )
        for name, template in found.templates.items()
    ]
    if as_json:
        of_all = {"name": found.name, "why_text_only": found.why_text_only}
        typer.echo(json.dumps({**of_all, "templates": [each.to_dict() for each in audits]}))
    else:
        console = _console()
        for number, audit in enumerate(audits):
            if number:
                console.print()
            print_audit(console, found, audit)
    if not all(audit.is_rendered for audit in audits):
        return BAD_INPUT
    return DIFFERS if any(audit.broken or audit.n_different for audit in audits) else 0
