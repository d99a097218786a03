"""DiskTier: states in files of one folder, shared by any number of processes.

    DIR/tokcache-states          says what the folder is; nothing else is ever written to
    DIR/usage                    bytes reserved so far; its lock orders writers, readers take none
    DIR/1/SCOPE/OWNER/POSITION-SLOT.WAY   one file a state, names are digests

A file is written beside its place under another name, synced, renamed, and the folder is synced:
it is there whole or not at all. Where another block stands in a block's place that shares just its
first tokens (two processes stored them at once), the second way takes it. A file that can't be
used costs a miss and a counter; a damaged one is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tokcache._prefix import common_tokens
from tokcache._validate import require_bool, require_scope, require_seconds, require_size
from tokcache.errors import InvalidConfig, StateRefused
from tokcache.state.tiers import Address, Record, is_in_place
from tokcache.state.tiers.block_file import StateCodec
from tokcache.state.tiers.counting import Counting
from tokcache.state.tiers.disk_file import LAYOUT, READ, REASONS, DiskFile, File, read_head
from tokcache.state.tiers.disk_notices import DiskNotices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tokcache.state.names import Owner
    from tokcache.stats import TierStats

_log = logging.getLogger("tokcache")

MARKER, USAGE = "tokcache-states", "usage"
_MARKER_TEXT = b"States of language models, kept by tokcache. They hold prompts.\n"
_GONE, _TEMPORARY = ".gone-", ".new-"
WAYS = (0, 1)
DEFAULT_BYTES = 4 << 30
_LOW_WATER = 0.9  # pruned that far, so that not every write scans the folder
_STALE_S = 900.0  # a temporary file that old was left by a writer that died
_FUTURE_S = 60.0  # a time of use that far ahead is of a clock that was wrong
_STEP_S = 0.1  # in which a folder's time may not move
_MAX_LISTED = 1024
_TRIES = 3
_COUNT_BYTES = 8
_MAX_COUNTED = 1 << 60
_DIGITS = 64  # of a digest
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class DiskTier(Counting):
    """States in the files of one folder, which is made if it is missing; the module has its layout.

    `PrefixStateCache(disk=path)` makes one with the settings below. With `hmac_key` forged files
    are refused and names can't be guessed; with `encryption_key` (16, 24 or 32 bytes, AES-GCM)
    tokens and states are unreadable without it. `is_synced=False` leaves it to the system when
    files reach the disk: a crash of the machine, not of a process, may then lose or damage (never
    silently) the files written last.

    Units:  `max_bytes` bytes of files, or a size such as "4G", over all processes that use the
            folder; blocks that are being written may come on top while another process prunes.
            `ttl_s` seconds after its last use a state is not used any more, and removed by the
            next pruning.
    Errors: InvalidConfig for settings and folders that can't be used; MissingExtra where a
            library is missing. After that nothing raises: reasons are counted.
    Threads: safe, for threads and processes; readers take no lock.
    """

    label = "disk"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int | str = DEFAULT_BYTES,
        ttl_s: float | None = None,
        hmac_key: bytes | None = None,
        encryption_key: bytes | None = None,
        is_synced: bool = True,
    ) -> None:
        self.path = _checked_path(path)
        self.max_bytes = require_size("max_bytes", max_bytes)
        self.ttl_s = None if ttl_s is None else require_seconds("ttl_s", ttl_s)
        self.codec = StateCodec(hmac_key, encryption_key)
        self.codec.require_libraries()
        self.is_mapped = encryption_key is None
        self._is_synced = require_bool("is_synced", is_synced)
        self._listed: dict[str, tuple[tuple[int, int], set[int]]] = {}
        self._cleanup: Callable[[], object] | None = None
        self._is_removed = False
        self._notices = DiskNotices(self.path, self.max_bytes)
        super().__init__()
        self._prepare()

    @classmethod
    def ephemeral(cls, *, max_bytes: int | str = DEFAULT_BYTES) -> Self:
        """Return the tier of a new temporary folder, removed when the tier is closed or collected.

        Errors: InvalidConfig.
        """
        path = Path(tempfile.mkdtemp(prefix="tokcache-states-"))
        try:
            tier = cls(path, max_bytes=max_bytes, is_synced=False)
        except BaseException:
            _remove_own(str(path), os.getpid())
            raise
        tier._cleanup = weakref.finalize(tier, _remove_own, str(path), os.getpid())
        return tier

    def __repr__(self) -> str:
        """Say which folder it is, what it holds and what it may hold."""
        return f"<DiskTier {self.path}: {self._counted_bytes():,} of {self.max_bytes:,} bytes>"

    # The folder

    def _prepare(self) -> None:
        try:
            self._make_folder()
        except OSError as error:
            raise InvalidConfig(
                f"{self.path} can't be a folder of states: {error.strerror}; name a folder that "
                "this user may write to"
            ) from error
        except ValueError as error:
            raise InvalidConfig(f"{str(self.path)!r} can't be a path: {error}") from error
        self._refuse_foreign_folder()
        with contextlib.suppress(OSError):
            self._remove_gone()

    def _make_folder(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker = self.path / MARKER
        if not marker.exists() and not any(self.path.iterdir()):
            with contextlib.suppress(FileExistsError):
                fd = os.open(marker, _CREATE, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.write(_MARKER_TEXT)
        (self.path / LAYOUT).mkdir(mode=0o700, exist_ok=marker.exists())

    def _refuse_foreign_folder(self) -> None:
        if not (self.path / MARKER).is_file():
            raise InvalidConfig(
                f"{self.path} holds other files than states (there is no {MARKER} in it), and a "
                "tier removes what it does not need; name a new folder"
            )
        if self.path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InvalidConfig(
                f"others may write to {self.path}, and a forged state steers the model; chmod 700"
            )

    def _remove_gone(self) -> None:
        for each in (self.path / LAYOUT).iterdir():
            if each.name.startswith(_GONE):  # a removal that was interrupted
                shutil.rmtree(each, ignore_errors=True)

    def _names(self, owner: Owner) -> tuple[str, str]:
        return self.codec.scope(owner.scope).hex(), self.codec.owner(owner).hex()

    def _open_folder(self, owner: Owner, *, make: bool = False) -> int:
        """Return a descriptor of the owner's folder; no symbolic link is followed below DIR."""
        try:
            fd = os.open(self.path / LAYOUT, _DIRECTORY)
        except OSError as error:
            if not self._is_removed:  # an ephemeral tier's folder is gone as it should be
                self._notices.folder(error)
            raise
        self._notices.folder()
        for name in self._names(owner):
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=fd)
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def _stem(self, address: Address) -> str:
        return f"{address.position:x}-{self.codec.keyed(address.slot).hex()}"

    # Reading

    def find_each(self, wanted: Iterable[tuple[Address, bytes]]) -> Iterator[DiskFile | None]:
        """Yield what is stored at each address, in order; each is opened when it is its turn."""
        for address, rest in wanted:
            yield self.find(address, rest)

    def find(self, address: Address, rest: bytes) -> DiskFile | None:
        """Return what is stored there; of two blocks, the one that shares most with `rest`."""
        found: list[DiskFile] = []
        try:
            folder = self._open_folder(address.owner)
        except OSError as error:
            self._missed(error)
            return None
        try:
            for way in WAYS:
                file = self._open_file(folder, f"{self._stem(address)}.{way}", address)
                if file is not None:
                    found.append(file)
                    if rest.startswith(file.record.tokens):
                        break
        finally:
            os.close(folder)
        found.sort(key=lambda file: common_tokens(file.record.tokens, rest))
        for worse in found[:-1]:
            worse.close()
        self.count("hits" if found else "misses")
        return found[-1] if found else None

    def _missed(self, error: OSError) -> None:
        self.count("misses")
        if error.errno != errno.ENOENT:
            self.refuse_error(error)

    def _open_file(self, folder: int, name: str, address: Address) -> DiskFile | None:
        try:
            fd = os.open(name, READ, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.refuse_error(error)
            return None
        try:
            file = self._verified(fd, address)
            file.place = (name, os.dup(folder))
        except StateRefused as refusal:
            self.refuse(str(refusal))
            if refusal.args[0] in ("damaged", "forged"):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=folder)
        except OSError as error:
            self.refuse_error(error)
        else:
            return file
        with contextlib.suppress(OSError):
            os.close(fd)
        return None

    def _verified(self, fd: int, address: Address) -> DiskFile:
        head, first = read_head(fd, self._require_fresh(fd))
        record = self.codec.record(head, first, address)
        return DiskFile(fd, head, first, record, codec=self.codec, count=self.count_read)

    def _require_fresh(self, fd: int) -> int:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StateRefused("no_file")
        if status.st_uid not in (os.geteuid(), 0):
            raise StateRefused("other_user")
        age_s = time.time() - status.st_mtime
        if age_s < -_FUTURE_S:
            os.utime(fd)  # written while the clock was wrong: from now on it ages as others do
        if self.ttl_s is not None and age_s > self.ttl_s:
            raise StateRefused("expired")
        return status.st_size

    def lengths(self, owner: Owner) -> set[int]:
        """Return the numbers of tokens of this owner's snapshots."""
        try:
            folder = self._open_folder(owner)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.refuse_error(error)
            return set()
        try:
            return self._lengths_in(folder, self._names(owner)[1])
        except OSError as error:
            self.refuse_error(error)
            return set()
        finally:
            os.close(folder)

    def _lengths_in(self, folder: int, key: str) -> set[int]:
        # Before the listing: what is added during it may change no time any more.
        status, now = os.fstat(folder), time.time()
        # ctime: what copies folders (rsync, tar) sets their mtime back.
        stamp = (status.st_ino, status.st_ctime_ns)
        held = self._listed.get(key)
        if held is not None and held[0] == stamp:
            return held[1]
        positions = {_position(name) for name in os.listdir(folder)}
        positions.discard(-1)
        # A folder's time moves in steps: what comes within one would go unseen.
        if abs(now - status.st_ctime) > _STEP_S:
            if len(self._listed) >= _MAX_LISTED:
                self._listed.clear()
            self._listed[key] = (stamp, positions)
        return positions

    # Writing

    def write(self, address: Address, record: Record, payload: memoryview) -> bool:
        """Store a payload; True if it is there now."""
        try:
            for attempt in range(_TRIES):
                try:
                    return self._write(address, record, payload)
                except FileNotFoundError:  # the folder was removed meanwhile
                    if attempt == _TRIES - 1:
                        raise
                    self._make_folder()
        except StateRefused as refusal:
            self.refuse(str(refusal))
        except OSError as error:
            self.refuse_error(error)
            self._notices.not_written(payload.nbytes, error)
        return False

    def _write(self, address: Address, record: Record, payload: memoryview) -> bool:
        if self._is_removed:  # a folder made again now would be left behind
            raise StateRefused("closed")
        folder = self._open_folder(address.owner, make=True)
        try:
            if self._free_way(folder, address, record) is None:
                return True
            parts = self.codec.packed(address, record, payload)
            n_bytes = sum(len(part) for part in parts)
            if n_bytes > self.max_bytes:
                self._notices.oversize(address.owner.fingerprint, n_bytes)
            self._reserve(n_bytes)
            n_spare = n_bytes
            try:
                temporary = self._put(folder, parts)
                n_spare = self._give_name(folder, temporary, n_bytes, address, record)
            finally:
                if n_spare:
                    self._reserve(-n_spare)
        finally:
            os.close(folder)
        self.count("writes")
        self.count("written_bytes", n_bytes)
        self._notices.written(payload.nbytes)
        return True

    def _free_way(self, folder: int, address: Address, record: Record) -> int | None:
        """Return the way to write to; None if a file there holds these tokens already.

        Errors: StateRefused if both ways are taken by blocks of other tokens.
        """
        for way in WAYS:
            file = self._open_file(folder, f"{self._stem(address)}.{way}", address)
            if file is None:
                return way
            with file:
                is_held = is_in_place(file.record, record, address.owner.kind)
            if is_held is not None:
                return None if is_held else way
        raise StateRefused("place_taken")

    def _put(self, folder: int, parts: tuple[bytes | memoryview, ...]) -> str:
        """Write a file under a name that no reader looks for; return it."""
        temporary = f"{_TEMPORARY}{os.getpid():x}-{secrets.token_hex(8)}"
        fd = os.open(temporary, _CREATE, 0o600, dir_fd=folder)
        try:
            _write_exactly(fd, parts)
            if self._is_synced:
                os.fsync(fd)
        except BaseException:
            _unlink(folder, temporary)
            raise
        finally:
            os.close(fd)
        return temporary

    def _give_name(
        self, folder: int, temporary: str, n_bytes: int, address: Address, record: Record
    ) -> int:
        """Put a file into its place, if that is still free; return the bytes that became spare."""
        n_spare = n_bytes
        try:
            with self._locked():  # two writers must not both find the place free
                way = self._free_way(folder, address, record)
                if way is not None:
                    name = f"{self._stem(address)}.{way}"
                    n_spare = _size(folder, name)
                    os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            _unlink(folder, temporary)
        if self._is_synced:
            os.fsync(folder)
        return n_spare

    def touch(self, addresses: Sequence[Address]) -> list[int]:
        """Note that these are in use, all at one time: parents never look older than children.

        Return the places in `addresses` of those that are gone.
        """
        now = time.time_ns()
        return [n for n, address in enumerate(addresses) if not self._is_touched(address, now)]

    def _is_touched(self, address: Address, now: int) -> bool:
        try:
            folder = self._open_folder(address.owner)
        except OSError as error:
            return error.errno != errno.ENOENT
        try:
            return self._touch_in(folder, self._stem(address), now)
        except OSError:
            return True  # it can't be told
        finally:
            os.close(folder)

    def _touch_in(self, folder: int, stem: str, now: int) -> bool:
        is_there = False
        for way in WAYS:
            with contextlib.suppress(FileNotFoundError):
                os.utime(f"{stem}.{way}", ns=(now, now), dir_fd=folder, follow_symlinks=False)
                is_there = True
        return is_there

    # Room

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the writers' lock; yield the descriptor of the file that counts bytes."""
        fd = self._open_usage(os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)  # lets the lock go

    def _open_usage(self, flags: int) -> int:
        """Open the file that counts bytes; what is none in its place is put aside.

        Errors: OSError.
        """
        path = self.path / USAGE
        for _ in range(_TRIES):
            try:
                fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                    raise
            else:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    return fd
                os.close(fd)
            path.rename(self.path / f"{_GONE}{USAGE}-{secrets.token_hex(8)}")
        raise OSError(errno.EEXIST, "somebody else puts other things there", str(path))

    def _reserve(self, n_bytes: int) -> None:
        """Count bytes that are to be written, and prune if they are too many.

        Errors: StateRefused if they would not fit into an empty folder; OSError.
        """
        if n_bytes > self.max_bytes:
            raise StateRefused("over_budget")
        with self._locked() as fd:
            raw = os.pread(fd, _COUNT_BYTES, 0)
            # Without a count (a new folder, or one that is damaged) the files are counted.
            total = int.from_bytes(raw, "little") if len(raw) == _COUNT_BYTES else self.max_bytes
            total += n_bytes
            if n_bytes > 0 and total > self.max_bytes:
                goal = int(self.max_bytes * _LOW_WATER) - n_bytes
                total = self._prune_to(max(goal, 0)) + n_bytes
            os.pwrite(fd, max(total, 0).to_bytes(_COUNT_BYTES, "little"), 0)

    def prune(
        self,
        max_bytes: int | str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> int:
        """Remove expired and least recent states down to `max_bytes`; return the bytes left.

        Errors: InvalidConfig; OSError where the folder can't be read.
        """
        goal = self.max_bytes if max_bytes is None else require_size("max_bytes", max_bytes, 0)
        with self._locked() as fd:
            total = self._prune_to(goal, progress)
            os.pwrite(fd, total.to_bytes(_COUNT_BYTES, "little"), 0)
        return total

    def _prune_to(self, goal: int, progress: Callable[[int, int], object] | None = None) -> int:
        now = time.time()
        self._remove_stale(now)
        files = list(self.files())
        total = sum(file.n_bytes for file in files)
        # Of equal age the deepest go first: they are of no use without those before them.
        files.sort(key=lambda file: (min(file.used_at, now), -file.position))
        for n_seen, file in enumerate(files):
            if progress is not None:
                progress(n_seen, len(files))
            is_expired = self.ttl_s is not None and now - file.used_at > self.ttl_s
            if total <= goal and not is_expired:
                if self.ttl_s is None:
                    break
                continue
            if self.unlink(file):
                total -= file.n_bytes
                self.count("evictions")
        return total

    def unlink(self, file: File) -> bool:
        """Remove a file that a scan found, and its folder if that is empty now."""
        path = self.path / file.place
        try:
            path.unlink()
        except FileNotFoundError:
            return True
        except OSError as error:
            self.refuse_error(error)
            return False
        with contextlib.suppress(OSError):
            path.parent.rmdir()
            path.parent.parent.rmdir()
        return True

    def _remove_stale(self, now: float) -> None:
        """Remove what writers that died left, and times of a clock that was wrong."""
        for _, _, entry in self._entries():
            with contextlib.suppress(OSError):
                age_s = now - entry.stat(follow_symlinks=False).st_mtime
                if entry.name.startswith(_TEMPORARY):
                    if abs(age_s) > _STALE_S:
                        Path(entry.path).unlink()
                elif age_s < -_FUTURE_S:
                    os.utime(entry.path, (now, now), follow_symlinks=False)

    def _entries(self) -> Iterator[tuple[str, str, os.DirEntry[str]]]:
        for scope in _folders(self.path / LAYOUT):
            for owner in _folders(self.path / LAYOUT / scope):
                folder = self.path / LAYOUT / scope / owner
                with contextlib.suppress(OSError), os.scandir(folder) as entries:
                    for entry in entries:
                        yield scope, owner, entry

    def files(self) -> Iterator[File]:
        """Yield every state's file; other things in the folder are passed over."""
        for scope, owner, entry in self._entries():
            position = _position(entry.name)
            if position < 0:
                continue
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    size, used = status.st_size, status.st_mtime
                    yield File(scope, owner, entry.name, position, size, used)

    # Removing

    def remove(self, address: Address) -> None:
        """Remove one state."""
        try:
            folder = self._open_folder(address.owner)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self.refuse_error(error)
            return
        try:
            for way in WAYS:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self._stem(address)}.{way}", dir_fd=folder)
        except OSError as error:
            self.refuse_error(error)
        finally:
            os.close(folder)

    def clear(self, *, scope: str | None = None) -> int:
        """Remove all states of a scope, by default everything; return how many states went."""
        scope = require_scope(scope)
        layout = self.path / LAYOUT
        if scope is not None:
            return self._remove_folder(layout / self.codec.scope(scope).hex())
        return sum(self._remove_folder(layout / name) for name in _folders(layout))

    def clear_shared(self) -> int:
        """Remove all states that have no scope; return how many states went."""
        return self._remove_folder(self.path / LAYOUT / self.codec.scope(None).hex())

    def _remove_folder(self, folder: Path) -> int:
        # Renamed first: from one moment to the next nothing of it is found any more.
        gone = self.path / LAYOUT / f"{_GONE}{secrets.token_hex(8)}"
        try:
            folder.rename(gone)
            n_files = sum(_position(name) >= 0 for _, _, names in os.walk(gone) for name in names)
            _remove_tree(gone)
            self._recount()
        except FileNotFoundError:
            return 0
        except OSError as error:
            self.refuse_error(error)
            return 0
        self._listed.clear()
        return n_files

    def _recount(self) -> None:
        with self._locked() as fd:
            total = sum(file.n_bytes for file in self.files())
            os.pwrite(fd, total.to_bytes(_COUNT_BYTES, "little"), 0)

    # Counting

    def refuse_error(self, error: OSError) -> None:
        """Count what the system refused."""
        _log.debug("the disk tier at %s failed", self.path, exc_info=error)
        self.refuse(REASONS.get(error.errno or 0, "error"))

    def _counted_bytes(self) -> int:
        try:
            fd = self._open_usage(os.O_RDONLY)
        except OSError:
            return 0
        try:
            n_bytes = int.from_bytes(os.pread(fd, _COUNT_BYTES, 0), "little")
        finally:
            os.close(fd)
        if n_bytes > _MAX_COUNTED:  # damaged: the next write counts anew
            return sum(file.n_bytes for file in self.files())
        return n_bytes

    def stats(self) -> TierStats:
        """Return the counters, and the bytes that all processes have written to the folder.

        What was removed otherwise than by pruning is counted until the next one; `files` scans.
        """
        return self.counted(self._counted_bytes())

    def after_fork_in_child(self) -> None:
        """Make new locks."""
        super().after_fork_in_child()
        self._notices.forget()

    def close(self) -> None:
        """Release the tier; the files stay, an ephemeral tier's do not."""
        cleanup, self._cleanup = self._cleanup, None
        if cleanup is not None:
            self._is_removed = True
            cleanup()


def _checked_path(path: object) -> Path:
    if isinstance(path, str | os.PathLike):
        named = os.fspath(path)
        if isinstance(named, str) and named:
            return Path(named).absolute()
    raise InvalidConfig(f"path must be the path of a folder, not {path!r}")


def _write_exactly(fd: int, parts: tuple[bytes | memoryview, ...]) -> None:
    left = [view for part in parts if (view := memoryview(part)).nbytes]
    while left:
        n_written = os.writev(fd, left)
        while left and n_written >= left[0].nbytes:
            n_written -= left.pop(0).nbytes
        if n_written:
            left[0] = left[0][n_written:]


def _remove_tree(path: Path) -> None:
    """Remove a folder; a writer that had it open may still be putting a file there."""
    for attempt in range(_TRIES):
        try:
            shutil.rmtree(path)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == _TRIES - 1:
                raise
        else:
            return


def _unlink(folder: int, name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _size(folder: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _folders(path: Path) -> list[str]:
    """Return the digests that folders in `path` are named by; symbolic links are none."""
    try:
        with os.scandir(path) as entries:
            return [
                each.name
                for each in entries
                if len(each.name) == _DIGITS and each.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []


def _position(name: str) -> int:
    """Return the position that a state's file is named by, -1 for other names."""
    position, dash, rest = name.partition("-")
    if not dash or len(rest) != _DIGITS + 2 or rest[_DIGITS:] not in (".0", ".1"):
        return -1
    try:
        return int(position, 16)
    except ValueError:
        return -1


def _remove_own(path: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked child's copy must not remove its parent's files
        shutil.rmtree(path, ignore_errors=True)
