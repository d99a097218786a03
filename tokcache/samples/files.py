"""The folder of sample files, the digest in their names, and writing a file atomically."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokcache._cache_folder import user_cache_folder
from tokcache._files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return `folder`, else TOKCACHE_CACHE_DIR, else tokcache's user cache folder; create it."""
    path = Path(folder) if folder else user_cache_folder()
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: object) -> str:
    """Return a digest (16 hex digits) of `parts` and of the code that makes samples."""
    # A change of this package's code makes new files, so that a file of the old code is not used.
    sources = sorted(Path(__file__).parent.glob("*.py"))
    recipe = b"".join(source.read_bytes() for source in sources)
    state = hashlib.blake2b(digest_size=8)
    for part in (*parts, recipe):
        data = part if isinstance(part, bytes) else repr(part).encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def write_once(path: Path, write: Callable[[Path], None]) -> Path:
    """Return `path`, written by `write` if it is missing; no reader ever sees half a file."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        write(Path(file.name))
    return path
