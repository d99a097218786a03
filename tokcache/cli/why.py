"""`tokcache why`: compares prompts, and says why the later one does not reuse the earlier one."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokcache.cli._common import errors_in_one_line
from tokcache.cli.prompt_tokens import Prompts, TokenCounts, compare_encodings, compare_prompts
from tokcache.cli.why_report import Comparison, Session, print_comparison, print_session
from tokcache.differences.comparison import compare_requests
from tokcache.differences.log import read_log, read_request
from tokcache.differences.session import compare_session
from tokcache.errors import InvalidConfig, InvalidRequest, MissingFile
from tokcache.text.wrappers.gguf_tokenizer import is_gguf

if TYPE_CHECKING:
    from tokcache.cli.prompt_tokens import Prompt
    from tokcache.differences.log import Entry

_MAX_BYTES = 512 << 20


def why(
    before: Annotated[
        str,
        typer.Argument(
            metavar="BEFORE",
            help="The earlier request, JSON or text; alone: a session's log. -: standard input.",
        ),
    ],
    after: Annotated[
        str | None, typer.Argument(metavar="[AFTER]", help="The later request; -: standard input.")
    ] = None,
    *,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENIZER",
            help="A tokenizer.json, its folder, or a hub name: render chats and count tokens.",
        ),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL.gguf", help="The same, with a GGUF's tokenizer.")
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out a log's lines that can't be read.")
    ] = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Show classes and positions, and none of the text.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two requests, and say where their prompts part, why, and what to change.

    Requests are those of OpenAI's and Anthropic's APIs, or plain texts. With one file, a session's
    log with one request a line, every request is compared with the nearest earlier one. Without
    a tokenizer, costs are counted in characters. Exit code 2: bad input.
    """
    with errors_in_one_line(), contextlib.ExitStack() as stack:
        prompts = None
        if tokenizer is not None or model is not None:
            prompts = stack.enter_context(Prompts(_named(tokenizer, model)))
        found: Comparison | Session
        if after is None:
            entries, n_skipped = read_log(_data(before), before, skips_broken=skip_broken)
            found = _session(entries, n_skipped, prompts)
        else:
            if before == after == "-":
                raise InvalidConfig("only one of BEFORE and AFTER can be standard input")
            pair = [
                read_request(_data(name), name, is_text=name.endswith(".txt"))
                for name in (before, after)
            ]
            difference = compare_requests(*pair)
            found = Comparison(difference, pair[0].n_chars, pair[1].n_chars)
            if prompts is not None:
                texts = [prompts.prompt(each) for each in pair]
                difference, counts = compare_prompts(
                    prompts, (pair[0], texts[0]), (pair[1], texts[1]), difference
                )
                found = Comparison(difference, pair[0].n_chars, pair[1].n_chars, counts)
    if as_json:
        typer.echo(json.dumps(found.to_dict(has_text=not no_text)))
        return
    # Prompts have characters of many scripts, which the output's encoding may lack.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False)
    if isinstance(found, Session):
        print_session(console, found, has_text=not no_text)
    else:
        print_comparison(console, found, has_text=not no_text)


def _named(tokenizer: str | None, model: Path | None) -> str:
    if tokenizer is not None and model is not None:
        raise InvalidConfig("pass --tokenizer or --model, not both")
    if model is None:
        return str(tokenizer)
    if not model.is_file():
        raise MissingFile(f"no such model file: {model}")
    if not is_gguf(model):
        raise InvalidConfig(f"--model takes a GGUF, and {model} is none; pass --tokenizer instead")
    return str(model)


def _data(name: str) -> bytes:
    if name == "-":
        data = sys.stdin.buffer.read(_MAX_BYTES + 1)
    else:
        path = Path(name)
        if not path.exists():
            raise MissingFile(f"no such file: {path}")
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise InvalidRequest(f"{path} can't be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise InvalidRequest(f"{name} is larger than {_MAX_BYTES >> 20} MiB; pass a part of it")
    return data


def _session(entries: list[Entry], n_skipped: int, prompts: Prompts | None) -> Session:
    compared = compare_session([entry.request for entry in entries])
    # A prompt is kept until the last request that is compared with it.
    last_uses = {turn.earlier: turn.index for turn in compared}
    rendered: dict[int, Prompt] = {}
    turns: list[tuple[int, int | None, Comparison]] = []
    for turn in compared:
        new, n_chars = entries[turn.index], entries[turn.index].request.n_chars
        if prompts is not None:
            rendered[turn.index] = prompts.prompt(new.request)
        counts = None
        if turn.earlier is None or turn.difference is None:
            if prompts is not None:
                counts = TokenCounts(len(rendered[turn.index].ids), 0, 0)
            turns.append((new.line, None, Comparison(None, 0, n_chars, counts)))
            continue
        old, difference = entries[turn.earlier], turn.difference
        if prompts is not None:
            texts = rendered[turn.earlier], rendered[turn.index]
            difference, counts = compare_prompts(
                prompts, (old.request, texts[0]), (new.request, texts[1]), difference
            )
            if old.generated_ids and difference.kind.is_reused:
                other = compare_encodings(prompts, texts[0], old.generated_ids, texts[1])
                difference, counts = other or (difference, counts)
            for index in (turn.earlier, turn.index):
                if last_uses.get(index, -1) <= turn.index:
                    del rendered[index]
        found = Comparison(difference, old.request.n_chars, n_chars, counts)
        turns.append((new.line, old.line, found))
    return Session(tuple(turns), n_skipped, prompts is not None)
