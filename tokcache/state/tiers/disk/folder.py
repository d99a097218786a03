"""StateFolder: the folder of a disk tier: its marker, its subfolders, and scans of its files.

    DIR/tokcache-states          the marker: shows that the folder belongs to tokcache
    DIR/usage                    the number of bytes reserved so far; see budget.py
    DIR/1/SCOPE/ROOT/…          the files of states; SCOPE and ROOT are digests
    DIR/1/.gone-…                a subfolder that is being removed

Nothing else is written there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
from typing import TYPE_CHECKING

from tokcache._files import CREATE
from tokcache.errors import InvalidConfig
from tokcache.state.tiers.disk.file import LAYOUT, READ, File, is_pinned_mode, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tokcache.state.tiers.counters import TierCounters
    from tokcache.state.tiers.disk.notices import DiskNotices

_log = logging.getLogger("tokcache")

MARKER = "tokcache-states"
_MARKER_TEXT = b"States of language models, kept by tokcache. They hold prompts.\n"
GONE, TEMPORARY = ".gone-", ".new-"
MODEL_NAME = "model"  # a file with the name of the model, in a folder of its states
_LONGEST_NAME = 255  # bytes
TRIES = 3
_DIGITS = 64  # of a digest
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class StateFolder:
    """The folder below which a disk tier keeps its files.

    No symbolic link is followed below it.

    Threads: safe, for threads and processes.
    """

    def __init__(self, path: Path, counters: TierCounters, notices: DiskNotices) -> None:
        self.path = path
        self.is_removed = False  # an ephemeral tier that was closed has no folder any more
        self._counters, self.notices = counters, notices

    @property
    def layout(self) -> Path:
        """The subfolder that holds all files of states."""
        return self.path / LAYOUT

    def prepare(self) -> None:
        """Make the folder if it is missing, and finish removals that were interrupted.

        Errors: InvalidConfig for a folder of other files, one that others may write to, and a
                path that can't be a folder.
        """
        try:
            self.make()
        except OSError as error:
            raise InvalidConfig(
                f"{self.path} can't be a folder of states: {error.strerror}; name a folder that "
                "this user may write to"
            ) from error
        except ValueError as error:
            raise InvalidConfig(f"{str(self.path)!r} can't be a path: {error}") from error
        if not (self.path / MARKER).is_file():
            raise InvalidConfig(
                f"{self.path} holds other files than states (it has no {MARKER}), and a tier "
                "removes files that it does not need; name a new folder"
            )
        if self.path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InvalidConfig(
                f"others may write to {self.path}, and a forged state steers the model; chmod 700"
            )
        with contextlib.suppress(OSError):
            for each in self.layout.iterdir():
                if each.name.startswith(GONE):
                    shutil.rmtree(each, ignore_errors=True)

    def make(self) -> None:
        """Make the folder, its marker and its layout where they are missing.

        A folder with other files gets no marker, and `prepare` then refuses it.

        Errors: OSError; ValueError for a path that no file system can have.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker = self.path / MARKER
        if not marker.exists() and not any(self.path.iterdir()):
            with contextlib.suppress(FileExistsError):
                fd = os.open(marker, CREATE, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.write(_MARKER_TEXT)
        self.layout.mkdir(mode=0o700, exist_ok=marker.exists())

    def open(self, *names: str, make: bool = False) -> int:
        """Return a descriptor of the subfolder with that path below the layout.

        Errors: OSError.
        """
        try:
            fd = os.open(self.layout, _DIRECTORY)
        except OSError as error:
            if not self.is_removed:
                self.notices.folder(error)
            raise
        self.notices.folder()
        for name in names:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=fd)
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def refuse(self, error: OSError) -> None:
        """Count an error of the system, by its reason."""
        _log.debug("the disk tier at %s failed", self.path, exc_info=error)
        self._counters.refuse(reason_of(error))

    # Scans

    def entries(self) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
        """Yield all entries of the folders of states, with the names of scope and root."""
        for scope in self.subfolders():
            for root in self.subfolders(scope):
                with (
                    contextlib.suppress(OSError),
                    os.scandir(self.layout / scope / root) as found,
                ):
                    for entry in found:
                        yield scope, root, entry

    def files(self) -> Iterator[File]:
        """Yield every state's file; other entries of the folder are skipped."""
        for scope, root, entry in self.entries():
            position = position_of(entry.name)
            if position < 0:
                continue
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    size, used = status.st_size, status.st_mtime
                    is_pinned = is_pinned_mode(status.st_mode)
                    yield File(scope, root, entry.name, position, size, used, is_pinned)

    def subfolders(self, *names: str) -> list[str]:
        """Return the names of the folders at that path that are digests; links are skipped."""
        try:
            with os.scandir(self.layout.joinpath(*names)) as entries:
                return [
                    each.name
                    for each in entries
                    if len(each.name) == _DIGITS and each.is_dir(follow_symlinks=False)
                ]
        except OSError:
            return []

    def model_name(self, scope: str, root: str) -> str | None:
        """Return the name of the model whose states a folder holds, None if it has none."""
        try:
            fd = os.open(self.layout / scope / root / MODEL_NAME, READ)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            return file.read(_LONGEST_NAME).decode("utf-8", "replace")

    # Removing

    def unlink(self, file: File) -> bool:
        """Remove a file that a scan found, and its folders if they are empty now.

        Return whether it is gone; an error of the system is counted.
        """
        path = self.path / file.path
        try:
            path.unlink()
        except FileNotFoundError:
            return True
        except OSError as error:
            self.refuse(error)
            return False
        with contextlib.suppress(OSError):
            if [each.name for each in path.parent.iterdir()] == [MODEL_NAME]:
                (path.parent / MODEL_NAME).unlink()
            path.parent.rmdir()
            path.parent.parent.rmdir()
        return True

    def remove(self, scope: str) -> int:
        """Remove all of a scope; return the number of states removed.

        Errors: OSError; FileNotFoundError if the scope has no folder.
        """
        # Renamed first: from one moment to the next nothing of it is found any more.
        gone = self.layout / f"{GONE}{secrets.token_hex(8)}"
        (self.layout / scope).rename(gone)
        n_files = sum(position_of(name) >= 0 for _, _, names in os.walk(gone) for name in names)
        for attempt in range(TRIES):
            try:
                shutil.rmtree(gone)
                break
            except OSError as error:
                # A writer that had the folder open may still be putting a file there.
                if error.errno != errno.ENOTEMPTY or attempt == TRIES - 1:
                    raise
        return n_files


def position_of(name: str) -> int:
    """Return the position in the name of a state's file, -1 for other names."""
    position, dash, rest = name.partition("-")
    if not dash or len(rest) != _DIGITS + 2 or rest[_DIGITS:] not in (".0", ".1"):
        return -1
    try:
        return int(position, 16)
    except ValueError:
        return -1
