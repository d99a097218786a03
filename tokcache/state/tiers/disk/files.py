"""StateFiles: the files in which a disk tier keeps its states, by their addresses.

A state's file is named POSITION-SLOT.PLACE: each slot has two places, 0 and 1. The second takes a
block that shares only its first tokens with the one in the first, which happens where two processes
store both at once.

1. A writer reserves the bytes of the file, writes it under a temporary name, and syncs it.
2. Under the writers' lock it looks again whether the place is free, and renames the file.
3. It syncs the folder. At each moment the whole file is there, or none of it.

A pinned file is marked by its owner's execute bit, which copies of the folder keep.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from typing import TYPE_CHECKING

from tokcache._files import CREATE, write_temporary
from tokcache._prefix import common_tokens
from tokcache.errors import StateRefused
from tokcache.state.tiers import BROKEN, Address, Record, is_in_place
from tokcache.state.tiers.disk.budget import FUTURE_S, ByteBudget
from tokcache.state.tiers.disk.file import (
    FILE_MODE,
    PINNED_MODE,
    READ,
    DiskFile,
    is_pinned_mode,
    read_head,
)
from tokcache.state.tiers.disk.folder import (
    MODEL_NAME,
    TEMPORARY,
    StateFolder,
    position_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokcache.state.names import RootKey
    from tokcache.state.tiers.block_file import StateCodec
    from tokcache.state.tiers.counters import TierCounters

PLACES = (0, 1)
STEP_S = 0.1  # the time of a folder moves in steps that long, or shorter
_MAX_LISTED = 1024


class StateFiles:
    """The files of states, one at an address.

    A file that can't be used is counted by its reason; a damaged one is removed, too.

    Threads: safe, for threads and processes.
    """

    def __init__(
        self,
        folder: StateFolder,
        budget: ByteBudget,
        codec: StateCodec,
        counters: TierCounters,
        *,
        is_synced: bool,
    ) -> None:
        self._folder, self._budget = folder, budget
        self._codec, self._counters = codec, counters
        self._is_synced = is_synced
        self._listed: dict[str, tuple[tuple[int, int], set[int]]] = {}
        self.model_names: dict[bytes, str] = {}  # by fingerprint
        self._named: set[RootKey] = set()

    @contextlib.contextmanager
    def _opened_folder(self, root_key: RootKey, *, make: bool = False) -> Iterator[int]:
        """Yield a descriptor of the folder of one root key."""
        names = self._codec.scope(root_key.scope).hex(), self._codec.root(root_key).hex()
        fd = self._folder.open(*names, make=make)
        try:
            yield fd
        finally:
            os.close(fd)

    def names(self, address: Address) -> list[str]:
        """Return the names that the file of a state may have, one a place."""
        stem = f"{address.position:x}-{self._codec.keyed(address.slot).hex()}"
        return [f"{stem}.{place}" for place in PLACES]

    # Reading

    def find(self, address: Address, rest: bytes) -> DiskFile | None:
        """Return the state at an address; of two blocks, the one that shares most with `rest`.

        Errors: OSError.
        """
        found: list[DiskFile] = []
        with self._opened_folder(address.root_key) as folder:
            for name in self.names(address):
                file = self._open_file(folder, name, address)
                if file is not None:
                    found.append(file)
                    if rest.startswith(file.record.tokens):
                        break
        found.sort(key=lambda file: common_tokens(file.record.tokens, rest))
        for worse in found[:-1]:
            worse.close()
        return found[-1] if found else None

    def _open_file(self, folder: int, name: str, address: Address) -> DiskFile | None:
        """Return a file whose head was verified; None, and counted, if it can't be used."""
        try:
            fd = os.open(name, READ, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self._folder.refuse(error)
            return None
        try:
            head, first = read_head(fd, self._usable_size(fd))
            record = self._codec.record(head, first, address)
            return DiskFile(
                *(fd, head, first, record),
                codec=self._codec,
                counters=self._counters,
                name=name,
                folder=folder,
            )
        except StateRefused as refusal:
            self._counters.refuse(str(refusal))
            if str(refusal) in BROKEN:
                _unlink(folder, name)
        except OSError as error:
            self._folder.refuse(error)
        with contextlib.suppress(OSError):
            os.close(fd)
        return None

    def _usable_size(self, fd: int) -> int:
        """Return the size of a file.

        Errors: StateRefused for one that is not a regular file, is another user's, or expired.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StateRefused("no_file")
        if status.st_uid not in (os.geteuid(), 0):
            raise StateRefused("other_user")
        age_s = time.time() - status.st_mtime
        if age_s < -FUTURE_S:
            os.utime(fd)  # written while the clock was wrong: from now on it ages as others do
        is_old = self._budget.ttl_s is not None and age_s > self._budget.ttl_s
        if is_old and not is_pinned_mode(status.st_mode):
            raise StateRefused("expired")
        return status.st_size

    def lengths(self, root_key: RootKey) -> set[int]:
        """Return the numbers of tokens of the snapshots with this root key.

        Errors: OSError.
        """
        key = self._codec.root(root_key).hex()
        with self._opened_folder(root_key) as folder:
            # Taken before the listing: a file that is added during it may not change them later.
            status, now = os.fstat(folder), time.time()
            # ctime: programs that copy folders (rsync, tar) set their mtime back.
            stamp = (status.st_ino, status.st_ctime_ns)
            held = self._listed.get(key)
            if held is not None and held[0] == stamp:
                return held[1]
            names = os.listdir(folder)  # noqa: PTH208 (a descriptor, which pathlib does not take)
        positions = {position_of(name) for name in names} - {-1}
        # A file that is added within one step of the folder's time would go unseen.
        if abs(now - status.st_ctime) > STEP_S:
            if len(self._listed) >= _MAX_LISTED:
                self._listed.clear()
            self._listed[key] = (stamp, positions)
        return positions

    def forget_lengths(self) -> None:
        """List the folders again when they are asked for next."""
        self._listed.clear()

    # Writing

    def write(self, address: Address, record: Record, payload: memoryview) -> int:
        """Store a payload; return the bytes written, 0 if the state is there already.

        Errors: StateRefused; OSError; FileNotFoundError if the folder was removed meanwhile.
        """
        with self._opened_folder(address.root_key, make=True) as folder:
            if self._free_name(folder, address, record) is None:
                return 0
            parts = self._codec.packed(address, record, payload)
            n_bytes = sum(len(part) for part in parts)
            try:
                self._budget.reserve(n_bytes)
            except StateRefused:
                self._folder.notices.oversize(address.root_key.fingerprint, n_bytes)
                raise
            n_spare = n_bytes
            try:
                temporary = write_temporary(folder, TEMPORARY, parts, is_synced=self._is_synced)
                try:
                    with self._budget.locked():  # two writers must not both find the place free
                        name = self._free_name(folder, address, record)
                        if name is not None:
                            n_spare, is_pinned = _replaced(folder, name)
                            if is_pinned:  # the longer block serves the pinned prefix, too
                                os.chmod(temporary, PINNED_MODE, dir_fd=folder)
                            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                finally:
                    _unlink(folder, temporary)
                if self._is_synced:
                    os.fsync(folder)
            finally:
                if n_spare:
                    self._budget.reserve(-n_spare)
            if address.root_key.fingerprint in self.model_names:
                self._name_model(folder, address.root_key)
        return n_bytes

    def _name_model(self, folder: int, root_key: RootKey) -> None:
        """Write the model's name into the folder of its states, unless it is there."""
        if root_key in self._named:
            return
        self._named.add(root_key)
        try:
            fd = os.open(MODEL_NAME, CREATE, 0o600, dir_fd=folder)
        except FileExistsError:
            return
        except OSError as error:  # the states are stored: only their listing lacks the name
            self._folder.refuse(error)
            return
        with os.fdopen(fd, "wb") as file:
            file.write(self.model_names[root_key.fingerprint].encode("utf-8", "replace"))

    def _free_name(self, folder: int, address: Address, record: Record) -> str | None:
        """Return the name to give to a new file; None if a file holds these tokens already.

        Errors: StateRefused if both places hold blocks of other tokens.
        """
        for name in self.names(address):
            file = self._open_file(folder, name, address)
            if file is None:
                return name
            with file:
                is_held = is_in_place(file.record, record, address.root_key.kind)
            if is_held is not None:
                return None if is_held else name
        raise StateRefused("place_taken")

    def probe(self) -> None:
        """Write and remove a small file, and take the writers' lock.

        Errors: OSError.
        """
        folder = self._folder.open()
        try:
            _unlink(folder, write_temporary(folder, TEMPORARY, (b"tokcache",)))
            with self._budget.locked():
                pass
        finally:
            os.close(folder)

    def touch(self, address: Address, now: int) -> bool:
        """Set the time of last use; False if no file is there.

        Errors: OSError.
        """
        is_there = False
        with self._opened_folder(address.root_key) as folder:
            for name in self.names(address):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(name, ns=(now, now), dir_fd=folder, follow_symlinks=False)
                    is_there = True
        return is_there

    def pin(self, address: Address, *, is_pinned: bool) -> None:
        """Mark the files of a state as pinned, or no longer.

        Errors: OSError.
        """
        with self._opened_folder(address.root_key) as folder:
            for name in self.names(address):
                with contextlib.suppress(FileNotFoundError):
                    fd = os.open(name, READ, dir_fd=folder)
                    try:
                        os.fchmod(fd, PINNED_MODE if is_pinned else FILE_MODE)
                    finally:
                        os.close(fd)

    def remove(self, address: Address) -> None:
        """Remove one state.

        Errors: OSError.
        """
        with self._opened_folder(address.root_key) as folder:
            for name in self.names(address):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)


def _unlink(folder: int, name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _replaced(folder: int, name: str) -> tuple[int, bool]:
    """Return the size of the file that a new one replaces, 0 if none, and whether it is pinned."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return 0, False
    return status.st_size, is_pinned_mode(status.st_mode)
