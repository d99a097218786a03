"""`tokcache replay`: shows what the caches would bring on recorded requests."""

from __future__ import annotations

import contextlib
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import tokcache
from tokcache._validate import require_share, require_size
from tokcache.cli._common import (
    BAD_INPUT,
    AnyTokenizer,
    errors_in_one_line,
    require_folder,
    write_text,
)
from tokcache.demo.tokenizers import chat_format, find_tokenizer
from tokcache.errors import InvalidConfig
from tokcache.replay.result import Prefill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokcache.replay.result import Result
    from tokcache.replay.texts import Encoder

_INTERRUPTED = 130


class Generated(StrEnum):
    """The values of --generated."""

    IDS = "ids"
    REENCODED = "reencoded"


def replay(
    traces: Annotated[
        list[str],
        typer.Argument(metavar="TRACE...", help="Files, gzip or zstd or plain; - is stdin."),
    ],
    *,
    tokenizer: AnyTokenizer = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="GGUF", help="Measure prefill and state sizes with this model."),
    ] = None,
    prefill_rate: Annotated[
        float | None, typer.Option(metavar="TOKENS_PER_S", help="Prefill, instead of --model.")
    ] = None,
    kv_bytes_per_token: Annotated[
        float | None, typer.Option(metavar="BYTES", help="State size, instead of --model.")
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option("--format", help="The traces' format, instead of recognising it."),
    ] = None,
    sample: Annotated[
        float, typer.Option(metavar="RATE", help="Look at this share of all objects (SHARDS).")
    ] = 1.0,
    max_objects: Annotated[
        int, typer.Option(min=1024, help="Objects of each curve before it is sampled.")
    ] = 1 << 20,
    state_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Explain the misses of states of this size, as 8G."),
    ] = None,
    generated: Annotated[
        Generated,
        typer.Option(
            help="Replies in stored states: those with ids in the trace, or all, encoded again."
        ),
    ] = Generated.IDS,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Keep no text in memory, only digests.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first record that can't be read.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with charts.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures to a file.")
    ] = None,
) -> None:
    """Show what the caches would bring on recorded requests, for every cache size at once.

    Reads request logs of OpenAI and Anthropic, ShareGPT, tau-bench, SWE-agent, plain texts,
    OpenTelemetry spans, and the hash traces of Mooncake, Bailian and kv-cache-tester. Exit code 2:
    bad input, or no record could be read; 130: interrupted, with the figures up to then.
    """
    with errors_in_one_line():
        from tokcache.replay.run import Options, Replay  # noqa: PLC0415 (numpy takes 0.1 s)

        _check(sample, prefill_rate, kv_bytes_per_token)
        for file in (html, json_file):
            require_folder(file)
        if html is not None:
            from tokcache.replay.report import require_libraries  # noqa: PLC0415 (an extra)

            require_libraries()
        prefill = _prefill(model, prefill_rate, kv_bytes_per_token)
        if state_bytes is not None and not prefill.kv_bytes_per_token:
            raise InvalidConfig(
                "--state-bytes needs the size of a token's state: add --kv-bytes-per-token or "
                "--model"
            )
        named = str(model) if tokenizer is None and model is not None else tokenizer
        options = Options(
            format_name=format_name,
            is_strict=strict,
            sample_rate=sample,
            max_objects=max_objects,
            generated=generated.value,
            state_bytes=None if state_bytes is None else require_size("--state-bytes", state_bytes),
        )
        with _progress() as on_progress:
            replaying = Replay(lambda: _encoder(named, no_text), options, prefill, on_progress)
            is_partial = False
            try:
                replaying.run(traces)
            except KeyboardInterrupt:
                is_partial = True
        found = replaying.result(is_partial=is_partial)
        try:  # a file that can't be written costs no figure, a closed output no file
            if json_file is not None:
                write_text(json_file, json.dumps(found.to_dict(), indent=1) + "\n")
            if html is not None:
                from tokcache.replay.report.replay import page  # noqa: PLC0415 (an extra)

                write_text(html, page(found))
        finally:
            _show(found)
    if is_partial:
        raise typer.Exit(_INTERRUPTED)
    is_unread = found.n_skipped and not found.n_prompts and not found.n_without_text
    raise typer.Exit(BAD_INPUT if is_unread else 0)


def _check(sample: float, prefill_rate: float | None, kv: float | None) -> None:
    require_share("--sample", sample)
    if sample == 0:
        raise InvalidConfig("--sample must be above 0")
    for name, value in (("--prefill-rate", prefill_rate), ("--kv-bytes-per-token", kv)):
        if value is not None and not 0 < value < 1e15:  # noqa: PLR2004 (also refuses nan)
            raise InvalidConfig(f"{name} must be a number above 0, not {value}")


def _prefill(model: Path | None, rate: float | None, kv: float | None) -> Prefill:
    if model is not None:
        from tokcache.replay.model import measure  # noqa: PLC0415 (an extra)

        measured = measure(model)
        return Prefill(
            rate or measured.tokens_per_s,
            kv or measured.kv_bytes_per_token,
            measured.restore_tokens_per_s,
            measured.how if rate is None and kv is None else f"given, and {measured.how}",
        )
    return Prefill(rate, kv, None, "given" if rate or kv else "")


def _encoder(named: str | None, no_text: bool) -> Encoder:
    from tokcache.replay.texts import Encoder  # noqa: PLC0415 (numpy)

    source = find_tokenizer(named)
    plain = source.load()
    form = chat_format(source, plain)
    wrapped = tokcache.wrap(source.load())
    name = source.name if named else f"{source.name}: --tokenizer names another"
    kept = None if no_text else wrapped
    return Encoder(name, form.name, plain, wrapped, kept, form.write, is_sample=named is None)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar of the bytes read, where the error output is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("replaying"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("replaying", total=None)

        def on_progress(done: int, total: int | None) -> None:
            shown.update(task, completed=done, total=total)

        yield on_progress


def _show(found: Result) -> None:
    from tokcache.cli.replay_report import print_result  # noqa: PLC0415 (with numpy)

    print_result(Console(highlight=False), found)
