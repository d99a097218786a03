"""Files that appear completely or not at all, readable by their owner only."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def atomic_file(path: Path, *, is_synced: bool = False) -> Iterator[IO[bytes]]:
    """Yield a file that takes the name `path` once the block has ended without an error.

    After an error no temporary file remains, and a file that was at `path` is unchanged. With
    `is_synced` the content and the name are on disk when the block has ended. The attribute `name`
    of the file is the path of the temporary file.

    Errors: those of the block; OSError, which may name the temporary file.
    """
    handle, name = tempfile.mkstemp(prefix=".tokcache-", dir=path.parent)  # mode 0600
    try:
        with open(name, "wb", opener=lambda *_: handle) as file:
            yield file
            file.flush()
            if is_synced:
                os.fsync(handle)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if is_synced:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_temporary(
    folder: int, prefix: str, parts: Iterable[bytes | memoryview], *, is_synced: bool = False
) -> str:
    """Write a new file into an open folder under a random name; return that name.

    The folder is a descriptor, so that nobody can put another folder or a link in its place. The
    caller renames or links the file to its final name, and removes files that begin with `prefix`
    and whose writers died.

    Errors: OSError; then the file is removed, or left to that removal if the disk refuses.
    """
    name = f"{prefix}{os.getpid():x}-{secrets.token_hex(8)}"
    fd = os.open(name, CREATE, 0o600, dir_fd=folder)
    try:
        left = [view for part in parts if (view := memoryview(part)).nbytes]
        while left:
            n_written = os.writev(fd, left)
            while left and n_written >= left[0].nbytes:
                n_written -= left.pop(0).nbytes
            if n_written:
                left[0] = left[0][n_written:]
        if is_synced:
            os.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error tells more; the file is removed later
            os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(fd)
    return name
