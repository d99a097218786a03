"""ByteBudget: how many bytes a folder of states holds, and the pruning that keeps it in bounds.

All processes that share the folder count in one file, DIR/usage. Its lock orders writers and
pruning; readers take none. A count that is missing, damaged or wrong is replaced by that of a scan
at the next pruning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tokcache.errors import StateRefused
from tokcache.state.tiers.disk.folder import GONE, TEMPORARY, TRIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokcache._disk_budget import DiskBudget
    from tokcache.state.tiers.counters import TierCounters
    from tokcache.state.tiers.disk.folder import StateFolder

USAGE = "usage"
_LOW_WATER = 0.9  # pruned that far, so that not every write scans the folder
_STALE_S = 900.0  # a temporary file that old was left by a writer that died
FUTURE_S = 60.0  # a time of use that far ahead comes from a clock that was wrong
_COUNT_BYTES = 8
_MAX_COUNTED = 1 << 60


class ByteBudget:
    """The bytes of a folder's files, over all processes that share it.

    Units: `size` bytes of files, or a share of the disk, which is read while the lock is held;
           `ttl_s` seconds after its last use a file is pruned.
    Threads: safe, for threads and processes.
    """

    def __init__(
        self, folder: StateFolder, counters: TierCounters, size: DiskBudget, ttl_s: float | None
    ) -> None:
        self.size, self.ttl_s = size, ttl_s
        self._folder, self._counters = folder, counters

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Hold the writers' lock; yield the descriptor of the file that holds the count.

        Errors: OSError.
        """
        fd = self._open_usage(os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # releases the lock

    def _open_usage(self, flags: int) -> int:
        """Open the file that holds the count; anything that is not a regular file is renamed.

        Errors: OSError.
        """
        path = self._folder.path / USAGE
        for _ in range(TRIES):
            try:
                fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                    raise
            else:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    return fd
                os.close(fd)
            path.rename(self._folder.path / f"{GONE}{USAGE}-{secrets.token_hex(8)}")
        raise OSError(errno.EEXIST, "another program keeps putting other things there", str(path))

    def reserve(self, n_bytes: int) -> None:
        """Count bytes that are to be written, and prune if they would exceed the budget.

        A negative number gives back bytes that were reserved.

        Errors: StateRefused if they would not fit into an empty folder; OSError.
        """
        with self.locked() as fd:
            raw = os.pread(fd, _COUNT_BYTES, 0)
            # Without a count (a new folder, or a damaged one) the pruning below counts the files.
            is_counted = len(raw) == _COUNT_BYTES
            total = int.from_bytes(raw, "little") if is_counted else self._scanned_bytes()
            max_bytes = self.size.n_bytes(total if total <= _MAX_COUNTED else self._scanned_bytes())
            if n_bytes > max_bytes:
                raise StateRefused("over_budget")
            total = (total if is_counted else max_bytes) + n_bytes
            if n_bytes > 0 and total > max_bytes:
                goal = int(max_bytes * _LOW_WATER) - n_bytes
                total = self._prune_to(max(goal, 0), None) + n_bytes
            os.pwrite(fd, max(total, 0).to_bytes(_COUNT_BYTES, "little"), 0)

    def prune(self, goal: int, progress: Callable[[int, int], object] | None = None) -> int:
        """Remove expired and least recently used files down to `goal` bytes, pinned ones last.

        Return the bytes left.

        Errors: OSError.
        """
        with self.locked() as fd:
            total = self._prune_to(goal, progress)
            os.pwrite(fd, total.to_bytes(_COUNT_BYTES, "little"), 0)
        return total

    def _prune_to(self, goal: int, progress: Callable[[int, int], object] | None) -> int:
        """Prune and return the bytes left; the lock is held."""
        now = time.time()
        # First the files that writers left when they died, and times from a clock that was wrong.
        for _, _, entry in self._folder.entries():
            with contextlib.suppress(OSError):
                age_s = now - entry.stat(follow_symlinks=False).st_mtime
                if entry.name.startswith(TEMPORARY):
                    if abs(age_s) > _STALE_S:
                        Path(entry.path).unlink()
                elif age_s < -FUTURE_S:
                    os.utime(entry.path, (now, now), follow_symlinks=False)
        files = list(self._folder.files())
        total = sum(file.n_bytes for file in files)
        # Pinned files go last, and of equal age the deepest first: they are useless without those
        # that precede them.
        files.sort(key=lambda file: (file.is_pinned, min(file.used_at, now), -file.position))
        for n_seen, file in enumerate(files):
            if progress is not None:
                progress(n_seen, len(files))
            is_old = self.ttl_s is not None and now - file.used_at > self.ttl_s
            is_expired = is_old and not file.is_pinned
            if total <= goal and not is_expired:
                if self.ttl_s is None:
                    break
                continue
            if self._folder.unlink(file):
                total -= file.n_bytes
                self._counters.count("evictions")
        return total

    def recount(self) -> None:
        """Replace the count by that of a scan.

        Errors: OSError.
        """
        with self.locked() as fd:
            os.pwrite(fd, self._scanned_bytes().to_bytes(_COUNT_BYTES, "little"), 0)

    def counted_bytes(self) -> int:
        """Return the count; 0 where there is none."""
        try:
            fd = self._open_usage(os.O_RDONLY)
        except OSError:
            return 0
        try:
            n_bytes = int.from_bytes(os.pread(fd, _COUNT_BYTES, 0), "little")
        finally:
            os.close(fd)
        # A damaged count is replaced by the next write that exceeds the budget.
        return n_bytes if n_bytes <= _MAX_COUNTED else self._scanned_bytes()

    def _scanned_bytes(self) -> int:
        return sum(file.n_bytes for file in self._folder.files())
