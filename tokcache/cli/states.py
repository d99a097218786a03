"""The command line of a folder of states: `tokcache states ls | verify | prune | stats DIR`.

Names are shown as the folder has them, as digests: what they stand for is a secret of the prompts.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from tokcache._validate import require_size
from tokcache.errors import InvalidConfig, MissingFile, TokcacheError
from tokcache.state.tiers import StateRefused
from tokcache.state.tiers.disk import MARKER, DiskTier
from tokcache.state.tiers.disk_file import File, verified_file

DAMAGED, BAD_INPUT = 1, 2
_SHOWN = 12  # digits of a digest that tell folders apart on a screen

states = typer.Typer(
    no_args_is_help=True,
    help="What a folder of saved states holds; whether it is whole; make it smaller.",
    rich_markup_mode=None,
)
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder that `disk=` or DiskTier names.")
]
Key = Annotated[
    str | None,
    typer.Option(
        "--hmac-key-env",
        metavar="NAME",
        help="The environment variable that has the HMAC key, in hexadecimal digits.",
    ),
]


@states.command("ls")
def list_states(folder: Folder) -> None:
    """List what is held for each scope and model, by digest."""
    with _told_errors():
        groups: dict[tuple[str, str], list[File]] = defaultdict(list)
        for file in _tier(folder).files():
            groups[file.scope, file.owner].append(file)
    if not groups:
        typer.echo(f"{folder} holds no states")
        return
    table = Table("scope", "model", "states", "bytes", "last used")
    for (scope, owner), files in sorted(groups.items(), key=lambda item: -_size(item[1])):
        table.add_row(
            scope[:_SHOWN],
            owner[:_SHOWN],
            f"{len(files):,}",
            f"{_size(files):,}",
            _ago(max(file.used_at for file in files)),
        )
    _console().print(table)


@states.command("stats")
def show_stats(folder: Folder) -> None:
    """Tell how much there is in all."""
    with _told_errors():
        files = list(_tier(folder).files())
    lines = {
        "States": f"{len(files):,}",
        "Bytes": f"{_size(files):,}",
        "Scopes": f"{len({file.scope for file in files}):,}",
        "Models": f"{len({file.owner for file in files}):,} (per scope and kind of state)",
    }
    if files:
        lines["Last used"] = _ago(max(file.used_at for file in files))
        lines["Longest unused"] = _ago(min(file.used_at for file in files))
    for name, text in lines.items():
        typer.echo(f"{name + ':':16}{text}")


@states.command()
def verify(
    folder: Folder,
    *,
    hmac_key_env: Key = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is damaged.")] = False,
) -> None:
    """Read every file and check its checksum. Exit code 1: some are damaged; 2: bad input."""
    with _told_errors():
        tier = _tier(folder, hmac_key_env)
        files = list(tier.files())
        refused = _verified(tier, files, remove=remove)
    for place, reason in refused.items():
        typer.echo(f"{reason}: {place}")
    gone = " and removed" if remove and refused else ""
    typer.echo(f"{len(files) - len(refused):,} of {len(files):,} whole, {len(refused):,} not{gone}")
    raise typer.Exit(DAMAGED if refused else 0)


def _verified(tier: DiskTier, files: list[File], *, remove: bool) -> dict[str, str]:
    refused: dict[str, str] = {}
    with _progress() as progress:
        for file in progress.track(files, description="verifying"):
            try:
                verified_file(tier.path, file, tier.codec)
            except FileNotFoundError:
                continue  # pruned by a process that uses the folder
            except (StateRefused, OSError) as error:
                refused[file.place] = str(error)
                if remove and str(error) in ("damaged", "forged"):
                    tier.unlink(file)
    return refused


@states.command()
def prune(
    folder: Folder,
    *,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Remove the least recent until so much is left: bytes, or 500M, 4G."),
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="Remove all states of this scope, and nothing else.")
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Remove all states that have no scope.")
    ] = False,
    ttl_s: Annotated[
        float | None, typer.Option(help="Remove what was not used for that many seconds.")
    ] = None,
    hmac_key_env: Key = None,
) -> None:
    """Remove states: of one scope, beyond a number of bytes, or unused for too long.

    A folder whose names are keyed needs its key to find a scope, given by --hmac-key-env.
    """
    with _told_errors():
        tier = _tier(folder, hmac_key_env, ttl_s=ttl_s)
        before = list(tier.files())
        if scope is not None or shared:
            if max_bytes is not None or ttl_s is not None or (shared and scope is not None):
                raise InvalidConfig("give one of --scope, --shared, or --max-bytes and --ttl-s")
            tier.clear_shared() if scope is None else tier.clear(scope)
        elif max_bytes is None and ttl_s is None:
            raise InvalidConfig("say what to remove: --scope, --shared, --max-bytes or --ttl-s")
        else:
            _prune(
                tier,
                _size(before) if max_bytes is None else require_size("--max-bytes", max_bytes, 0),
            )
        after = list(tier.files())
    n_gone, size = len(before) - len(after), _size(before) - _size(after)
    typer.echo(f"{n_gone:,} states removed ({size:,} bytes); {len(after):,} left")


def _prune(tier: DiskTier, max_bytes: int) -> None:
    with _progress() as progress:
        task = progress.add_task("pruning", total=None)
        tier.prune(
            max_bytes, lambda done, total: progress.update(task, completed=done, total=total)
        )


def _tier(folder: Path, key_name: str | None = None, ttl_s: float | None = None) -> DiskTier:
    if not (folder / MARKER).is_file():
        _refuse(folder)
    return DiskTier(folder, hmac_key=_key(key_name), ttl_s=ttl_s)


def _refuse(folder: Path) -> NoReturn:
    """Say what a folder is that no cache keeps states in; it is left as it is."""
    if not folder.exists():
        raise MissingFile(f"there is no folder {folder}; name the one that `disk=` names")
    if not folder.is_dir():
        raise InvalidConfig(f"{folder} is a file; name the folder that `disk=` names")
    if not any(folder.iterdir()):
        raise InvalidConfig(f"{folder} is an empty folder: no cache has kept states in it yet")
    raise InvalidConfig(
        f"{folder} is not a folder of states: there is no {MARKER} among the files in it; name the "
        "one that `disk=` names"
    )


def _key(name: str | None) -> bytes | None:
    if name is None:
        return None
    try:
        return bytes.fromhex(os.environ[name])
    except KeyError:
        raise InvalidConfig(f"the environment has no variable {name}; export the key") from None
    except ValueError:
        raise InvalidConfig(f"{name} must hold hexadecimal digits, two for each byte") from None


def _size(files: list[File]) -> int:
    return sum(file.n_bytes for file in files)


def _ago(used_at: float) -> str:
    seconds = max(time.time() - used_at, 0)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def _console() -> Console:
    return Console(highlight=False)


def _progress() -> Progress:
    console = Console(stderr=True)
    columns: Any = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def _told_errors() -> Iterator[None]:
    """Tell tokcache's own errors, and what the system refuses, in one line."""
    try:
        yield
    except (TokcacheError, OSError) as error:
        typer.echo(f"tokcache: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
