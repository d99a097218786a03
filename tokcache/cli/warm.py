"""`tokcache states warm MODEL FOLDER`: prefill the prompts of a folder into a folder of states."""

from __future__ import annotations

import json
import re
from ctypes import ArgumentError
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokcache._validate import require_size
from tokcache.cli._common import DIFFERS, errors_in_one_line
from tokcache.cli.states import Key, key_of, progress_bar
from tokcache.errors import InvalidConfig, MissingFile, TokcacheError
from tokcache.reasons import LLAMA_REFUSALS
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.disk import DiskTier

_CHAT = ("messages", "tools", "tool_choice", "functions", "function_call")
# Markup that opens messages in the templates of some models, and means nothing to the others.
_MARKUP = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]")


class _Unusable(str):
    """Why a file of the folder can't be warmed."""

    __slots__ = ()


def warm(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The GGUF file.")],
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Prompts: NAME.txt is the beginning of a text; NAME.json has `messages` and "
            "`tools` as the body of a chat completion, or `prompt`, a text or token ids.",
        ),
    ],
    *,
    disk: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of states; by default FOLDER/states."),
    ] = None,
    max_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="The budget of the folder of states.")
    ] = "4G",
    ram: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for states while they are made.")
    ] = "1G",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of Llama, as n_ctx=8192 or flash_attn=true; states serve only a Llama "
            "with the same ones. Can be given several times.",
        ),
    ] = None,
    block_tokens: Annotated[
        int, typer.Option(help="The `block_tokens` of the cache that will use the states.")
    ] = 256,
    scope: Annotated[
        str | None, typer.Option(help="The scope that the prompts belong to; else all share them.")
    ] = None,
    hmac_key_env: Key = None,
) -> None:
    """Prefill prompts into a folder of states, and pin them there.

    A Llama with `disk=` that folder and the same settings restores them, so that its first request
    is as fast as later ones. Prompts that are there already are not decoded again. Exit code 1:
    some prompts were refused, with the reason; 2: bad input.
    """
    with errors_in_one_line():
        chosen = dict(_setting(text) for text in settings or ())
        paths = _paths(folder)
        tier = DiskTier(
            disk or folder / "states", max_bytes=max_bytes, hmac_key=key_of(hmac_key_env)
        )
        cache = PrefixStateCache(
            ram_bytes=require_size("--ram", ram),
            max_entries=4 * len(paths) + 32,
            block_tokens=block_tokens,
            disk=tier,
        )
        llm = _loaded(model, cache, chosen)
        try:
            found = {path: _read(path, llm) for path in paths}
            wanted = {path: each for path, each in found.items() if not isinstance(each, _Unusable)}
            with progress_bar() as progress:
                task = progress.add_task("prefilling", total=None)
                results = llm.prewarm(
                    wanted.values(),
                    scope=scope,
                    progress=lambda done, total: progress.update(task, completed=done, total=total),
                )
        finally:
            llm.close()
            cache.close()
    of_path = dict(zip(wanted, results, strict=True))
    table = Table("prompt", "tokens", "decoded", "result")
    n_refused = 0
    for path in paths:
        result, unusable = of_path.get(path), found[path]
        refusal = result.refusal if result is not None else str(unusable)
        reason = LLAMA_REFUSALS.get(refusal or "")
        n_refused += refusal is not None
        table.add_row(
            Text(path.name),
            f"{result.n_tokens:,}" if result is not None else "",
            f"{result.n_decoded:,}" if result is not None else "",
            Text("warm" if refusal is None else f"{refusal}: {reason.why}" if reason else refusal),
        )
    Console(highlight=False).print(table)
    raise typer.Exit(DIFFERS if n_refused else 0)


def _loaded(model: Path, cache: PrefixStateCache, settings: dict[str, Any]) -> Any:
    """Return the model, loaded with these settings; llama_cpp ignores those it does not know."""
    from tokcache.llama import Llama  # noqa: PLC0415 (an extra)

    known = {name for each in Llama.__mro__[:-1] for name in signature(each).parameters}
    for name in settings:
        if name not in known - {"model_path", "prefix_cache", "tokenizer", "scope", "verbose"}:
            raise InvalidConfig(f"--set: Llama has no setting {name}; see the names of llama_cpp's")
    try:
        return Llama(model, prefix_cache=cache, verbose=False, **settings)
    except TokcacheError:
        raise
    except (TypeError, ValueError, ArgumentError) as error:
        raise InvalidConfig(f"llama.cpp does not take a value given with --set: {error}") from None


def _setting(text: str) -> tuple[str, Any]:
    """Return the name and value of a setting; a value that is not JSON is a text."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise InvalidConfig(f"--set must be NAME=VALUE, as n_ctx=8192, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _paths(folder: Path) -> list[Path]:
    """Return the files of prompts, in the order of their names."""
    if not folder.is_dir():
        raise MissingFile(f"there is no folder {folder}; pass the folder with the prompts")
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".txt", ".json"))
    if not paths:
        raise InvalidConfig(
            f"{folder} has no prompts; put NAME.txt or NAME.json files there, one a prompt"
        )
    return paths


def _read(path: Path, llm: Any) -> Any:
    """Return the prefix in a file as `Llama.prewarm` takes it, or why it can't be used."""
    from tokcache.llama.arguments import checked_messages, checked_prompt  # noqa: PLC0415
    from tokcache.llama.tokenizer import int32_ids  # noqa: PLC0415 (it needs the extra)

    try:
        text = path.read_text(encoding="utf-8")
        prefix: Any = text
        if path.suffix == ".json":
            body = json.loads(text)
            if not isinstance(body, dict):
                return _Unusable("it holds no JSON object")
            names = {Path(llm.model_path).stem, Path(llm.model_path).name}
            names.add(llm.metadata.get("general.name", ""))
            if "model" in body and str(body["model"]).lower() not in map(str.lower, names):
                return _Unusable("prewarm_other_model")
            prefix = body.get("prompt", {name: body[name] for name in _CHAT if name in body})
            if prefix == {}:
                return _Unusable("it has neither `messages` nor `prompt`")
        markup = set(_MARKUP.findall(prefix)) if isinstance(prefix, str) else ()
        for each in markup:
            if len(llm.tokenize(each.encode(), add_bos=False, special=True)) != 1:
                return _Unusable("prewarm_other_model")
        if isinstance(prefix, dict):
            checked_messages(prefix.get("messages", []))
        else:
            checked_prompt(prefix)
            int32_ids(prefix if isinstance(prefix, list) else [])
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        return _Unusable(f"it can't be read: {type(error).__name__}")
    except TokcacheError as error:
        return _Unusable(str(error))
    return prefix
