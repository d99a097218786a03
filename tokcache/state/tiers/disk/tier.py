"""DiskTier: the Tier protocol on top of a folder's files and their byte budget.

Errors end here: an error of the system, or a file that can't be used, costs a miss and a counter.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tokcache._disk_budget import DiskBudget, require_disk_size
from tokcache._validate import require_bool, require_scope, require_seconds
from tokcache.errors import InvalidConfig, StateRefused, TierUnavailable
from tokcache.state.tiers.block_file import StateCodec
from tokcache.state.tiers.counters import TierCounters
from tokcache.state.tiers.disk.budget import ByteBudget
from tokcache.state.tiers.disk.files import StateFiles
from tokcache.state.tiers.disk.folder import TRIES, StateFolder
from tokcache.state.tiers.disk.notices import DiskNotices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from tokcache.state.names import RootKey
    from tokcache.state.tiers import Address, Record
    from tokcache.state.tiers.disk.file import DiskFile, File
    from tokcache.stats import TierStats

DEFAULT_BYTES = 4 << 30


class DiskTier:
    """States in the files of one folder, which is made if it is missing.

    `PrefixStateCache(disk=path)` makes one with the settings below. With `hmac_key` forged files
    are refused and names can't be guessed; with `encryption_key` (16, 24 or 32 bytes, AES-GCM)
    tokens and states are unreadable without it. With `is_synced=False` the operating system decides
    when files reach the disk: a crash of the machine, not of a process, may then lose or damage
    (never silently) the files written last.

    Units:  `max_bytes` bytes of files, a size such as "4G", or a share: "10%" of the disk, "50%
            free" of its free space and the files together. It counts the files of all processes
            that use the folder; blocks that are being written may exceed it while another process
            prunes. A share follows its disk: the first write after the disk has shrunk prunes.
            `ttl_s` seconds after its last use a state is no longer used, and the next pruning
            removes it.
    Errors: InvalidConfig for settings and folders that can't be used; MissingExtra where a
            library is missing. After that only `check` and `prune` raise: reasons are counted.
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
        named = os.fspath(path) if isinstance(path, str | os.PathLike) else None
        if not isinstance(named, str) or not named:
            raise InvalidConfig(f"path must be the path of a folder, not {path!r}")
        self.path = Path(named).absolute()
        size = require_disk_size("max_bytes", max_bytes)
        self.ttl_s = None if ttl_s is None else require_seconds("ttl_s", ttl_s)
        self.codec = StateCodec(hmac_key, encryption_key)
        self.codec.require_libraries()
        self.is_mapped = encryption_key is None
        is_synced = require_bool("is_synced", is_synced)
        self._cleanup: Callable[[], object] | None = None
        self._counters = TierCounters()
        self._notices = DiskNotices(self.path, self._shown_budget)
        self._folder = StateFolder(self.path, self._counters, self._notices)
        self._size = DiskBudget(size, self.path, self._folder.refuse)
        self._budget = ByteBudget(self._folder, self._counters, self._size, self.ttl_s)
        self._files = StateFiles(
            self._folder, self._budget, self.codec, self._counters, is_synced=is_synced
        )
        self._folder.prepare()
        try:
            self._size.n_bytes(self._budget.counted_bytes())
        except OSError as error:
            raise InvalidConfig(
                f"the size of the disk of {self.path} can't be read: {error.strerror}; give "
                "max_bytes in bytes"
            ) from error

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
        """Return the folder, the bytes it holds and its budget."""
        n_bytes = self._budget.counted_bytes()
        return f"<DiskTier {self.path}: {n_bytes:,} of {self._size.n_bytes(n_bytes):,} bytes>"

    @property
    def max_bytes(self) -> int:
        """The bytes that the files may take now."""
        return self._size.n_bytes(self._budget.counted_bytes())

    def _shown_budget(self) -> str:
        return self._size.shown(self._budget.counted_bytes())

    def check(self) -> None:
        """Raise if states can't be read from or written to the folder now.

        Writes a small file there and removes it again.

        Errors: TierUnavailable; the message has the cause and the cure.
        """
        try:
            self._files.probe()
        except OSError as error:
            raise TierUnavailable(
                f"states can't be written to {self.path} ({error.strerror}): "
                f"{self._notices.cure(error)}"
            ) from error

    # Reading

    def find_each(self, wanted: Iterable[tuple[Address, bytes]]) -> Iterator[DiskFile | None]:
        """Yield the state at each address, in order; a file is opened when it is its turn."""
        for address, rest in wanted:
            yield self.find(address, rest)

    def find(self, address: Address, rest: bytes) -> DiskFile | None:
        """Return the state at an address; of two blocks, the one that shares most with `rest`."""
        found = None
        try:
            found = self._files.find(address, rest)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self._folder.refuse(error)
        self._counters.count("misses" if found is None else "hits")
        return found

    def lengths(self, root_key: RootKey) -> set[int]:
        """Return the numbers of tokens of the snapshots with this root key."""
        try:
            return self._files.lengths(root_key)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self._folder.refuse(error)
            return set()

    # Writing

    def write(self, address: Address, record: Record, payload: memoryview) -> bool:
        """Store a payload; True if it is there now."""
        try:
            n_bytes = self._write(address, record, payload)
        except StateRefused as refusal:
            self.refuse(str(refusal))
            return False
        except OSError as error:
            self._folder.refuse(error)
            self._notices.not_written(payload.nbytes, error)
            return False
        if n_bytes:
            self._counters.count("writes")
            self._counters.count("written_bytes", n_bytes)
            self._notices.written(payload.nbytes)
        return True

    def _write(self, address: Address, record: Record, payload: memoryview) -> int:
        """Return the bytes written, 0 if the state is there already.

        Errors: StateRefused; OSError.
        """
        n_tries_left = TRIES
        while True:
            if self._folder.is_removed:  # a folder made again now would be left over
                raise StateRefused("closed")
            n_tries_left -= 1
            try:
                return self._files.write(address, record, payload)
            except FileNotFoundError:  # the folder was removed meanwhile
                if not n_tries_left:
                    raise
                self._folder.make()

    def touch(self, addresses: Sequence[Address]) -> list[int]:
        """Note that these are in use, all at one time: parents never look older than children.

        Return the indices in `addresses` of those that are gone.
        """
        now, gone = time.time_ns(), []
        for n, address in enumerate(addresses):
            try:
                is_there = self._files.touch(address, now)
            except OSError as error:
                is_there = error.errno != errno.ENOENT  # other errors do not show that it is gone
            if not is_there:
                gone.append(n)
        return gone

    def pin(self, addresses: Sequence[Address], *, is_pinned: bool) -> None:
        """Prune these after all others, and never as expired, or no longer; in any process."""
        for address in addresses:
            try:
                self._files.pin(address, is_pinned=is_pinned)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    self._folder.refuse(error)

    def name_model(self, fingerprint: bytes, name: str) -> None:
        """Note a model's name: folders of its states get it when the next state is written."""
        self._files.model_names[fingerprint] = name

    def model_name(self, scope: str, root: str) -> str | None:
        """Return the name of the model of a folder of states, None if it was not noted."""
        return self._folder.model_name(scope, root)

    # Removing

    def remove(self, address: Address) -> None:
        """Remove one state."""
        try:
            self._files.remove(address)
        except OSError as error:
            if error.errno != errno.ENOENT:
                self._folder.refuse(error)

    def clear(self, *, scope: str | None = None) -> int:
        """Remove all states of a scope, by default everything; return the states removed."""
        scope = require_scope(scope)
        if scope is None:
            return sum(self._remove_scope(name) for name in self._folder.subfolders())
        return self._remove_scope(self.codec.scope(scope).hex())

    def clear_shared(self) -> int:
        """Remove all states that have no scope; return the states removed."""
        return self._remove_scope(self.codec.scope(None).hex())

    def _remove_scope(self, name: str) -> int:
        try:
            n_removed = self._folder.remove(name)
            self._budget.recount()
        except FileNotFoundError:
            return 0
        except OSError as error:
            self._folder.refuse(error)
            return 0
        self._files.forget_lengths()
        return n_removed

    def prune(
        self,
        max_bytes: int | str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> int:
        """Remove expired and least recently used states down to `max_bytes`; return the bytes left.

        Units:  `max_bytes` as for the tier, whose own it is by default.
        Errors: InvalidConfig; OSError where the folder can't be read.
        """
        size = self._size
        if max_bytes is not None:
            wanted = require_disk_size("max_bytes", max_bytes, 0)
            size = DiskBudget(wanted, self.path, self._folder.refuse)
        return self._budget.prune(size.n_bytes(self._budget.counted_bytes()), progress)

    def files(self) -> Iterator[File]:
        """Yield every state's file; other entries of the folder are skipped."""
        return self._folder.files()

    def unlink(self, file: File) -> bool:
        """Remove a file that `files` yielded; return whether it is gone."""
        return self._folder.unlink(file)

    # Counting

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""
        self._counters.refuse(reason)

    def stats(self) -> TierStats:
        """Return the counters, and the bytes that all processes have written to the folder.

        Files that were removed otherwise than by pruning are counted until the next pruning;
        `files` scans.
        """
        return self._counters.stats(self._budget.counted_bytes())

    def close(self) -> None:
        """Release the tier; the files stay, those of an ephemeral tier do not."""
        cleanup, self._cleanup = self._cleanup, None
        if cleanup is not None:
            self._folder.is_removed = True
            cleanup()


def _remove_own(path: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked child's copy must not remove its parent's files
        shutil.rmtree(path, ignore_errors=True)
