"""The commands for a folder of states: `tokcache states ls | verify | prune | stats DIR`.

`tokcache states warm` is in `warm`.

Scopes and models are shown as the digests that name their folders, because a folder does not hold
their names. A scope that the caller names is shown by its name.
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
from rich.text import Text

from tokcache._disk_budget import require_disk_size
from tokcache.errors import InvalidConfig, MissingFile, StateRefused, TokcacheError
from tokcache.state.tiers.disk import DiskTier
from tokcache.state.tiers.disk.file import File, verified_file
from tokcache.state.tiers.disk.folder import MARKER

DAMAGED, BAD_INPUT = 1, 2
_SHOWN = 12  # leading digits of a digest that are printed

states = typer.Typer(
    no_args_is_help=True,
    help="List, verify, prune, count or prefill the states of a folder.",
    rich_markup_mode=None,
)
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder given to `disk=` or DiskTier.")
]
Key = Annotated[
    str | None,
    typer.Option(
        "--hmac-key-env",
        metavar="NAME",
        help="The environment variable with the HMAC key, in hexadecimal digits.",
    ),
]


@states.command("ls")
def list_states(
    folder: Folder,
    *,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="Show this scope by its name; can be given several times."),
    ] = None,
    hmac_key_env: Key = None,
) -> None:
    """List the states and bytes of each scope and model.

    A model is shown by the name of its file and the beginning of a digest, which differs for each
    scope and kind of state; by the digest alone if its states were not written by a Llama. Scopes
    are shown as digests, but for those given with --scope and the shared one. If the folder
    was written with an HMAC key, naming a scope needs that key: give --hmac-key-env.
    """
    with _errors_in_one_line():
        tier = _tier(folder, hmac_key_env)
        names = {tier.codec.scope(None).hex(): "(shared)"}
        names |= {tier.codec.scope(one).hex(): one for one in scope or ()}
        groups: dict[tuple[str, str], list[File]] = defaultdict(list)
        for file in tier.files():
            groups[file.scope, file.root].append(file)
        found = ((group, tier.model_name(*group)) for group in groups)
        model_names = {group: f"{name} ({group[1][:4]})" for group, name in found if name}
    if not groups:
        typer.echo(f"{folder} holds no states")
        return
    table = Table("scope", "model", "states", "bytes", "last used")
    for (digest, root), files in sorted(groups.items(), key=lambda item: -_size(item[1])):
        table.add_row(
            Text(names.get(digest, digest[:_SHOWN])),  # Text: a scope may hold rich's markup
            Text(model_names.get((digest, root), root[:_SHOWN])),
            f"{len(files):,}",
            f"{_size(files):,}",
            _ago(max(file.used_at for file in files)),
        )
    Console(highlight=False).print(table)


@states.command("stats")
def show_stats(folder: Folder) -> None:
    """Print the totals of the folder and when states were last used."""
    with _errors_in_one_line():
        files = list(_tier(folder).files())
    lines = {
        "States": f"{len(files):,}",
        "Bytes": f"{_size(files):,}",
        "Scopes": f"{len({file.scope for file in files}):,}",
        "Models": f"{len({file.root for file in files}):,} (per scope and kind of state)",
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
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove damaged and forged files.")
    ] = False,
) -> None:
    """Read every file and check its checksum or MAC. Exit code 1: some fail; 2: bad input."""
    with _errors_in_one_line():
        tier = _tier(folder, hmac_key_env)
        files = list(tier.files())
        refused = _verified(tier, files, remove=remove)
    for path, reason in refused.items():
        typer.echo(f"{reason}: {path}")
    gone = " and removed" if remove and refused else ""
    typer.echo(f"{len(files) - len(refused):,} of {len(files):,} whole, {len(refused):,} not{gone}")
    raise typer.Exit(DAMAGED if refused else 0)


def _verified(tier: DiskTier, files: list[File], *, remove: bool) -> dict[str, str]:
    refused: dict[str, str] = {}
    with progress_bar() as progress:
        for file in progress.track(files, description="verifying"):
            try:
                verified_file(tier.path, file, tier.codec)
            except FileNotFoundError:
                continue  # another process that uses the folder pruned it
            except (StateRefused, OSError) as error:
                refused[file.path] = str(error)
                if remove and str(error) in ("damaged", "forged"):
                    tier.unlink(file)
    return refused


@states.command()
def prune(
    folder: Folder,
    *,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            help="Remove the least recently used until this is left: bytes, 500M, 4G, 10% of the"
            " disk, '50% free'."
        ),
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="Remove all states of this scope and no others.")
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Remove all states without a scope.")
    ] = False,
    ttl_s: Annotated[
        float | None, typer.Option(help="Remove states not used for this many seconds.")
    ] = None,
    hmac_key_env: Key = None,
) -> None:
    """Remove the states of a scope, or those least recently used.

    If the folder was written with an HMAC key, --scope needs that key: give --hmac-key-env.
    """
    with _errors_in_one_line():
        tier = _tier(folder, hmac_key_env, ttl_s=ttl_s)
        before = list(tier.files())
        if scope is not None or shared:
            if max_bytes is not None or ttl_s is not None or (shared and scope is not None):
                raise InvalidConfig(
                    "these options exclude each other; give one of --scope, --shared, or"
                    " --max-bytes and --ttl-s"
                )
            tier.clear_shared() if scope is None else tier.clear(scope=scope)
        elif max_bytes is None and ttl_s is None:
            raise InvalidConfig("give one of --scope, --shared, --max-bytes or --ttl-s")
        else:
            size: int | str = _size(before)
            if max_bytes is not None:
                size = require_disk_size("--max-bytes", max_bytes, 0)
            _prune(tier, size)
        after = list(tier.files())
    n_gone, size = len(before) - len(after), _size(before) - _size(after)
    typer.echo(f"{n_gone:,} states removed ({size:,} bytes); {len(after):,} left")


def _prune(tier: DiskTier, max_bytes: int | str) -> None:
    with progress_bar() as progress:
        task = progress.add_task("pruning", total=None)
        tier.prune(
            max_bytes, lambda done, total: progress.update(task, completed=done, total=total)
        )


def _tier(folder: Path, key_name: str | None = None, ttl_s: float | None = None) -> DiskTier:
    if not (folder / MARKER).is_file():
        _refuse(folder)
    return DiskTier(folder, hmac_key=key_of(key_name), ttl_s=ttl_s)


def _refuse(folder: Path) -> NoReturn:
    """Raise the error for a path that is not a folder of states; nothing is changed there."""
    if not folder.exists():
        raise MissingFile(f"there is no folder {folder}; pass the folder given to `disk=`")
    if not folder.is_dir():
        raise InvalidConfig(f"{folder} is a file; pass the folder given to `disk=`")
    if not any(folder.iterdir()):
        raise InvalidConfig(f"{folder} is an empty folder: no cache has stored states in it yet")
    raise InvalidConfig(
        f"{folder} is not a folder of states: it has no file {MARKER}; pass the folder given to "
        "`disk=`"
    )


def key_of(name: str | None) -> bytes | None:
    """Return the HMAC key in the environment variable of that name, None without a name."""
    if name is None:
        return None
    try:
        return bytes.fromhex(os.environ[name])
    except KeyError:
        raise InvalidConfig(f"the environment has no variable {name}; export it") from None
    except ValueError:
        raise InvalidConfig(f"{name} must hold hexadecimal digits, two per byte") from None


def _size(files: list[File]) -> int:
    return sum(file.n_bytes for file in files)


def _ago(used_at: float) -> str:
    seconds = max(time.time() - used_at, 0)
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def progress_bar() -> Progress:
    """Return a progress bar on stderr, which shows nothing if that is not a terminal."""
    console = Console(stderr=True)
    columns: Any = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Print a TokcacheError or an error of the system in one line and exit."""
    try:
        yield
    except (TokcacheError, OSError) as error:
        typer.echo(f"tokcache: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
