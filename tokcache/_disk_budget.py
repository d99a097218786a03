"""DiskBudget: the bytes that files in a folder may take, a number or a share of their disk."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tokcache._validate import parsed_size, require_int
from tokcache.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Callable

REREAD_S = 5.0
"""Seconds for which a reading of the disk's size and free space is used."""

_SHARE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?%( ?free)?", re.ASCII | re.IGNORECASE)
_ALL = 100.0  # percent


def require_disk_size(name: str, value: object, minimum: int = 1) -> int | str:
    """Return a size of files as bytes, or a share of their disk as "10%" or "50% free".

    Units:  bytes or a size as `require_size` takes it; percent of the disk; percent of its free
            space, the bytes of the files themselves included.
    Errors: InvalidConfig.
    """
    if not isinstance(value, str):
        return require_int(name, value, minimum)
    n_bytes = parsed_size(value)
    if n_bytes is not None:
        return require_int(name, n_bytes, minimum)
    share = _SHARE.fullmatch(value.strip())
    if share is None:
        raise InvalidConfig(
            f'{name} must be a number of bytes, a size such as "64M", "1.5G" or "4GiB" (powers of '
            f'1,024), or a share of the disk such as "10%" or "50% free", not {value!r}'
        )
    if not 0 < float(share[1]) <= _ALL:
        raise InvalidConfig(f"{name} must be above 0% and at most 100%, not {value!r}")
    return f"{share[1]}% free" if share[2] else f"{share[1]}%"


class DiskBudget:
    """The bytes that the files of one folder may take.

    A share follows its disk: size and free space are read again once they are `REREAD_S` seconds
    old. If they can't be read, the last reading stays and `failed` is called with the error.

    Units:   `size` as `require_disk_size` returns it.
    Cost:    of a share, one statvfs in `REREAD_S` seconds.
    Threads: safe.
    """

    def __init__(
        self, size: int | str, folder: Path | None, failed: Callable[[OSError], object]
    ) -> None:
        self._size, self._folder, self._failed = size, folder, failed
        self._share, self._is_of_free = 0.0, False
        if isinstance(size, str):
            percent, _, rest = size.partition("%")
            self._share, self._is_of_free = float(percent) / _ALL, bool(rest)
        # One value, so that a thread never sees the size of one reading and the time of another.
        self._reading: tuple[float, int] | None = None

    def n_bytes(self, n_held: int) -> int:
        """Return the budget, where the files take `n_held` bytes now.

        Errors: OSError if the disk could never be read.
        """
        if isinstance(self._size, int):
            return self._size
        now, reading = time.monotonic(), self._reading
        if reading is None or now - reading[0] >= REREAD_S:
            try:
                reading = now, self._whole(n_held)
            except OSError as error:
                if reading is None:
                    raise
                self._failed(error)
                reading = now, reading[1]
            self._reading = reading
        return int(reading[1] * self._share)

    def _whole(self, n_held: int) -> int:
        """Return the bytes of which the budget is a share."""
        path = self._folder or Path()
        while True:
            try:
                disk = os.statvfs(path)
                break
            except FileNotFoundError:  # a folder that is not made yet, or was removed
                if path == path.parent:
                    raise
                path = path.parent
        if self._is_of_free:
            # With the files' own bytes: otherwise each file would lower the budget for the next.
            return disk.f_bavail * disk.f_frsize + n_held
        return disk.f_blocks * disk.f_frsize

    def shown(self, n_held: int) -> str:
        """Return the budget for a log line: the bytes, and the share that they are."""
        n_bytes = f"{self.n_bytes(n_held):,}"
        return n_bytes if isinstance(self._size, int) else f"{n_bytes}, {self._size} of the disk"
