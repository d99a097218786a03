"""`tokcache demo`: replay prompts without and with tokcache, and compare every token."""

from __future__ import annotations

import contextlib
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

import tokcache
from tokcache.cli._common import DIFFERS, AnyTokenizer, errors_in_one_line, write_text
from tokcache.demo import backends
from tokcache.demo.chat import built_in_prompts
from tokcache.demo.prompts import read_prompts
from tokcache.demo.replay import Replay, Request
from tokcache.demo.table import Summary, as_json, lines, table
from tokcache.demo.tokenizers import TokenizerSource, chat_format, find_tokenizer
from tokcache.errors import InvalidConfig, MissingFile, UnsupportedTokenizer
from tokcache.samples import tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


_PLACES = {
    "inprocess": "llama.cpp in this process (llama-cpp-python)",
    "server": "a llama-server (xllamacpp), slots saved and restored",
    "tokens": "no model: tokenization only",
}


class Backend(StrEnum):
    """The values of --backend."""

    AUTO = "auto"
    INPROCESS = "inprocess"
    SERVER = "server"
    TOKENS = "tokens"


_NAMES: dict[Backend, backends.BackendName] = {
    Backend.INPROCESS: "inprocess",
    Backend.SERVER: "server",
    Backend.TOKENS: "tokens",
}


def demo(
    *,
    tokenizer: AnyTokenizer = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="GGUF", help="The model; by default a tiny one with random weights."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines ({"prompt": ...}, {"messages": [...]} or a list of messages),'
            " or plain text with a blank line between prompts; by default two chats.",
        ),
    ] = None,
    backend: Annotated[
        Backend,
        typer.Option(
            help="inprocess: llama-cpp-python; server: a llama-server of xllamacpp;"
            " tokens: tokenization only; auto: the first of these that is installed."
        ),
    ] = Backend.AUTO,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate after each prompt.")
    ] = 32,
    threads: Annotated[
        int | None, typer.Option(min=1, help="llama.cpp's threads; by default half the cores.")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the times of each prompt to a file."),
    ] = None,
    requests_file: Annotated[
        Path | None,
        typer.Option(
            "--requests", metavar="FILE", help="Write the requests as JSON lines, for replay."
        ),
    ] = None,
) -> None:
    """Replay prompts without and with tokcache; time both and compare every token.

    Both sides run in reproducible mode, each in its own context. Exit code 1: a token differs;
    2: bad input.
    """
    with errors_in_one_line():
        if model is not None and tokenizer is None and not model.is_file():
            raise MissingFile(f"no such model file: {model}")
        # Without --tokenizer a model is used with the tokenizer in its file.
        source = find_tokenizer(str(model) if tokenizer is None and model else tokenizer)
        plain = source.load()
        found = read_prompts(prompts) if prompts else built_in_prompts()
        chats = chat_format(source, plain)
        requests = [Request(chats.text(one), add_special_tokens=not one.messages) for one in found]
        form = {"Chats as": chats.name} if any(one.messages for one in found) else {}
        path, chosen, why = _model_and_backend(model, source, backend)
        cached = tokcache.wrap(source.load())
        console = Console(highlight=False)
        n_ctx = _context_size(source, requests, max_tokens) if path else 0
        n_threads = threads or max(1, (os.cpu_count() or 1) // 2)
        with _sides(chosen, path, cached, n_ctx, n_threads) as sides:
            head = {"Tokenizer": source.name, "Runs in": _PLACES[chosen] + why}
            _print_head(console, head, path, sides, form)
            replay = Replay(plain, cached, sides, max_tokens=max_tokens)
            summary = _run(replay, requests, cached, sides)
    n_tokens = summary.n_prompt_tokens()
    console.print(f"Prompts:    {len(summary.outcomes)}, {n_tokens:,} tokens\n", markup=False)
    console.print(table(summary))
    console.print()
    for line in lines(summary):
        console.print(line, markup=False)
    if json_file is not None:
        write_text(json_file, json.dumps(as_json(summary), indent=1) + "\n")
    if requests_file is not None:
        write_text(requests_file, "".join(json.dumps(each.as_body()) + "\n" for each in found))
    raise typer.Exit(DIFFERS if summary.differences() else 0)


def _model_and_backend(
    model: Path | None, source: TokenizerSource, asked: Backend
) -> tuple[Path | None, backends.BackendName, str]:
    """Return the model (None if none is used), the backend, and why it is not a better one."""
    if asked is Backend.TOKENS and model is not None:
        raise InvalidConfig("--backend tokens uses no model; leave out --model, or the backend")
    if model is None and source.in_gguf is not None:
        model = source.path
    chosen, why = (
        backends.choose_backend(has_model=model is not None)
        if asked is Backend.AUTO
        else (_NAMES[asked], "")
    )
    if chosen == "tokens":
        return None, chosen, why
    if model is not None:
        if not model.is_file():
            raise MissingFile(f"no such model file: {model}")
        return model, chosen, why
    try:
        return tiny_model(source.path), chosen, why
    except UnsupportedTokenizer as error:
        if asked is Backend.AUTO:
            return None, "tokens", f": {error}"
        raise


def _context_size(source: TokenizerSource, requests: Sequence[Request], max_tokens: int) -> int:
    tokenizer = source.load()  # a separate one: the timed ones must not have seen the prompts
    longest = max(
        len(tokenizer.encode(each.text, add_special_tokens=each.add_special_tokens).ids)
        for each in requests
    )
    return -(-(longest + max_tokens + 1) // backends.BLOCK_TOKENS) * backends.BLOCK_TOKENS


@contextlib.contextmanager
def _sides(
    backend: backends.BackendName, model: Path | None, tokenizer: Any, n_ctx: int, n_threads: int
) -> Iterator[backends.Sides | None]:
    if model is None:
        yield None
        return
    opening = backends.in_process if backend == "inprocess" else backends.served
    with opening(model, tokenizer, n_ctx, n_threads) as sides:
        yield sides


def _print_head(
    console: Console,
    head: dict[str, str],
    model: Path | None,
    sides: backends.Sides | None,
    form: dict[str, str],
) -> None:
    if model is not None and sides is not None:
        made = ", random weights" if model.name.startswith("tiny-") else ""
        with_ = "the same, with prefixes that tokcache restores"
        head |= {"Model": model.name + made, "Without": sides.baseline, "With": with_}
    for name, text in (head | form).items():
        console.print(f"{name + ':':11} {text}", markup=False, soft_wrap=True)


def _run(
    replay: Replay, requests: Sequence[Request], cached: Any, sides: backends.Sides | None
) -> Summary:
    outcomes = []
    replay.warm_up()
    before = cached.cache_stats()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("replaying", total=len(requests))
        for outcome in replay.run(requests):
            outcomes.append(outcome)
            progress.advance(task)
    held = sides.cached.held() if sides else None
    return Summary(outcomes, before, cached.cache_stats(), held)
