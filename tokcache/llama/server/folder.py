"""The server's slot folder, as far as this process reaches it."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tokcache.llama.server.trust import Trust

PREFIX, SUFFIX = "tokcache-", ".bin"
DIGEST_BYTES = 20
_NAME = re.compile(rf"{PREFIX}[0-9a-f]{{{2 * DIGEST_BYTES}}}{re.escape(SUFFIX)}")


class Folder:
    """The files in the slot folder whose names have the form of ours.

    `path` is None if this process can't reach the folder. `is_reachable` is None until the first
    file that the server saved; then it says whether that file is in `path`.

    `trust` counts the reasons why files were not read or not deleted.
    """

    def __init__(self, path: Path | None, trust: Trust) -> None:
        self._path = path
        self._trust = trust
        self.is_reachable: bool | None = None

    def look_for(self, name: str, n_bytes: int) -> None:
        """Learn from the first file that the server saved whether the folder can be reached."""
        if self.is_reachable is None:
            self.is_reachable = self._path is not None and self._size(name) == n_bytes

    def is_intact(self, name: str, n_bytes: int) -> bool:
        """Return whether a file still has its size; True if the folder can't be reached.

        Reading a truncated file may crash the server.
        """
        return not self.is_reachable or self._size(name) == n_bytes

    def _size(self, name: str) -> int | None:
        try:
            return (self._path / name).stat().st_size if self._path is not None else None
        except OSError:
            return None

    def touch(self, name: str) -> None:
        """Record that a file was used, for the clients that come later."""
        if self._path is not None and self.is_reachable:
            with contextlib.suppress(OSError):  # deleted by others; the restore reports it
                os.utime(self._path / name)

    def delete(self, name: str) -> bool:
        """Delete a file if it exists; return whether it is gone."""
        if self._path is None:
            return False
        try:
            (self._path / name).unlink(missing_ok=True)
        except OSError:
            self._trust.refuse("file_not_deleted")
            return False
        self._trust.went_well("file_not_deleted")
        return True

    def files(self) -> list[tuple[str, os.stat_result]]:
        """Return the files in the folder, those of other clients too."""
        if self._path is None:
            return []
        found = []
        try:
            for entry in os.scandir(self._path):
                if _NAME.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # its owner deleted it
                        found.append((entry.name, entry.stat()))
        except OSError:
            self._trust.refuse("folder_not_readable")
        else:
            self._trust.went_well("folder_not_readable")
        return found
