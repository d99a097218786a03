"""FileDigests: the digests of files that are loaded, computed once and in the background.

1. `begin` takes a file as it was at the loading. If its digest is known, to this process or from an
   earlier one, a few blocks of the file are compared and the digest is there.
2. Otherwise a small file is hashed at once, a large one by a daemon thread. Llamas of the same file
   share the thread. It does not refer to them, and ends early once none of them waits for it.
3. Before and after the reading the file must have the identity that it had at the loading: then the
   hashed bytes are the loaded ones.
4. The digest is remembered unless the file changed so shortly before the hashing that a later
   change could have left the same times (git's racy rule). It holds for the loaded object all the
   same, and the next one hashes again.

The digest is SHA-256. A fast checksum (xxhash, CRC) is not enough: somebody who offers model files
for download could make two with equal checksums, and have the states of one taken for those of the
other, also by other hosts that share a Redis. Of hashlib's functions SHA-256 is the fastest on CPUs
with SHA instructions. Every host must use the same function, or hosts could not share states.

A file that is overwritten in place while llama.cpp has it mapped changes the loaded weights, too.
Its digest stays that of the file before, which can't be noticed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cachetools import LRUCache

from tokcache._forks import call_in_child
from tokcache.errors import FileChanged
from tokcache.llama.remembered_digests import (
    BlockDigest,
    FileDigest,
    FileIdentity,
    RememberedDigests,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger("tokcache")

# Up to this size a file is hashed by the caller: that takes 20 to 60 ms, less than the loading.
SMALL_BYTES = 16 << 20
_READ_BYTES = 1 << 20
_N_BLOCKS, _BLOCK_BYTES = 16, 4096
_MAX_KNOWN = 256
_SECOND_NS = 10**9
# The times of a file move in steps, of 4 ms or up to a second (ext3, old NFS servers). The rest is
# for the clock of a file server that differs from ours.
_RACY_NS = 2 * _SECOND_NS
_PAUSE_S = 0.05
_N_AT_ONCE = 2  # a model may be many files, and generations need the cores, too
_THREAD = "tokcache-digest"


class Hashing:
    """The digest of one file, there already or still being computed.

    Threads: safe.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._is_done = threading.Event()
        self._digest = b""
        self._error: OSError | None = None

    @property
    def is_done(self) -> bool:
        """Whether the digest is there, or it is known why it can't be."""
        return self._is_done.is_set()

    @property
    def is_lost(self) -> bool:
        """Whether the thread that computes it is in the parent of a fork, and not here."""
        return not self.is_done and self._pid != os.getpid()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the digest is there or has failed; False if `timeout_s` went by before."""
        return self._is_done.wait(timeout_s)

    def result(self) -> bytes:
        """Return the digest; waits for it.

        Errors: FileChanged; OSError for a file that could not be read.
        """
        self._is_done.wait()
        if self._error is not None:
            raise type(self._error)(*self._error.args) from self._error
        return self._digest

    def finish(self, digest: bytes) -> None:
        """Set the digest."""
        self._digest = digest
        self._is_done.set()

    def fail(self, error: OSError) -> None:
        """Set the reason why there is no digest."""
        self._error = error
        self._is_done.set()


class FileDigests:
    """Digests of files, by the identity that a stat shows.

    Errors:  none from `begin`; a Hashing that failed raises its own.
    Threads: safe; after a fork the child hashes for itself.
    """

    def __init__(self, remembered: RememberedDigests) -> None:
        self._remembered = remembered
        self._known: LRUCache[FileIdentity, FileDigest] = LRUCache(_MAX_KNOWN)
        self.start_without_threads()

    def start_without_threads(self) -> None:
        """Begin with no hashing in progress; in the child of a fork, too."""
        self._lock = threading.Lock()
        self._running: weakref.WeakValueDictionary[FileIdentity, Hashing] = (
            weakref.WeakValueDictionary()
        )
        self._may_run = threading.Event()
        self._may_run.set()
        self._places = threading.Semaphore(_N_AT_ONCE)
        self._remembered.start_without_threads()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the threads from reading, while a start needs the disk for itself.

        Digests that are known, and small files, are not held up.
        """
        self._may_run.clear()
        try:
            yield
        finally:
            self._may_run.set()

    def begin(self, path: str, identity: FileIdentity) -> Hashing:
        """Return the digest of a file that was loaded from `path`, there or on its way.

        Cost: 16 reads of 4 KiB if it is known; the whole file if it is small; else a thread.
        """
        with self._lock:
            running = self._running.get(identity)
        if running is not None:
            return running
        hashing = Hashing()
        try:
            found = self._recall(path, identity)
            if found is None and identity.n_bytes <= SMALL_BYTES:
                found = self._hash(path, identity, lambda: True)
        except OSError as error:
            hashing.fail(error)
            return hashing
        if found is None:
            return self._begin_thread(path, identity, hashing)
        hashing.finish(found.digest)
        return hashing

    def _recall(self, path: str, identity: FileIdentity) -> FileDigest | None:
        """Return a digest that is known of this file, if its blocks are still the same.

        Errors: FileChanged; OSError.
        """
        with self._lock:
            found = self._known.get(identity)
        if found is None and identity.n_bytes > SMALL_BYTES:
            found = self._remembered.find(identity)
        if found is None:
            return None
        with Path(path).open("rb", buffering=0) as file:
            _require_same(path, file.fileno(), identity)
            blocks = [_block(file.fileno(), block.offset, block.n_bytes) for block in found.blocks]
            is_same = tuple(blocks) == found.blocks
        with self._lock:
            if is_same:
                self._known[identity] = found
                return found
            self._known.pop(identity, None)
        _log.warning("%s is another file than before, with the same times; hashed again", path)
        self._remembered.refuse("blocks_differ")
        self._remembered.remove(identity)
        return None

    def _begin_thread(self, path: str, identity: FileIdentity, hashing: Hashing) -> Hashing:
        with self._lock:
            running = self._running.get(identity)
            if running is not None:
                return running
            # If the file may change in between unseen, a Llama made later must hash for itself.
            if _is_settled(identity):
                self._running[identity] = hashing
        arguments = (path, identity, weakref.ref(hashing))
        thread = threading.Thread(target=self._run, args=arguments, name=_THREAD, daemon=True)
        _log.info("%s (%d bytes) is hashed in the background", path, identity.n_bytes)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads: the caller waits
            self._run(*arguments)
        return hashing

    def _run(self, path: str, identity: FileIdentity, reference: weakref.ref[Hashing]) -> None:
        """Hash a file in a thread, as long as a Llama waits for it."""
        found: FileDigest | None = None
        failure: OSError | None = None
        try:
            has_place = self._places.acquire(timeout=_PAUSE_S)
            while not has_place and reference() is not None:
                has_place = self._places.acquire(timeout=_PAUSE_S)
            if has_place:
                try:
                    found = self._hash(path, identity, lambda: self._goes_on(reference))
                finally:
                    self._places.release()
        except OSError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  (no Llama may wait for ever)
            failure = OSError(f"{path} could not be hashed: {error!r}")
        with self._lock:
            if self._running.get(identity) is reference():
                self._running.pop(identity, None)
        hashing = reference()
        if hashing is not None and found is not None:
            hashing.finish(found.digest)
        elif hashing is not None and failure is not None:
            hashing.fail(failure)

    def _goes_on(self, reference: weakref.ref[Hashing]) -> bool:
        """Return whether a Llama waits for the digest, once the reading is not paused any more."""
        while reference() is not None and not self._may_run.wait(_PAUSE_S):
            pass
        return reference() is not None

    def _hash(
        self, path: str, identity: FileIdentity, goes_on: Callable[[], bool]
    ) -> FileDigest | None:
        is_settled = _is_settled(identity)  # before the first byte is read
        found = _read_digest(path, identity, goes_on)
        if found is not None and is_settled:
            with self._lock:
                self._known[identity] = found
            if identity.n_bytes > SMALL_BYTES:
                self._remembered.keep(found)
        return found


def _is_settled(identity: FileIdentity) -> bool:
    """Return whether a change from now on will show in the file's times.

    A ctime in the future is of a clock that was set back. One in whole seconds is of a file system
    that keeps no finer ones, or none at all: images and FAT give mtime for it, which anybody sets.
    """
    if identity.ctime_ns % _SECOND_NS == 0:
        return False
    return max(identity.ctime_ns, identity.mtime_ns) <= time.time_ns() - _RACY_NS


def _read_digest(
    path: str, identity: FileIdentity, goes_on: Callable[[], bool]
) -> FileDigest | None:
    """Return the digest of a file, None if `goes_on` ended it.

    Errors: FileChanged; OSError.
    """
    state = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with Path(path).open("rb", buffering=0) as file:
        _require_same(path, file.fileno(), identity)
        while goes_on():
            n_read = file.readinto(buffer)
            if not n_read:
                break
            state.update(buffer[:n_read])
        else:
            return None
        # One block in each sixteenth of the file, at a place that nobody can predict.
        step = max(identity.n_bytes // _N_BLOCKS, _BLOCK_BYTES)
        blocks = tuple(
            _block(file.fileno(), start + secrets.randbelow(max(n_free, 0) + 1))
            for start in range(0, identity.n_bytes, step)
            for n_free in [min(step, identity.n_bytes - start) - _BLOCK_BYTES]
        )
        _require_same(path, file.fileno(), identity)
    return FileDigest(identity, state.digest(), blocks)


def file_identity(path: str) -> FileIdentity:
    """Return the identity of the file at `path`.

    The file is opened: only then network file systems ask their server again.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return FileIdentity.of(os.fstat(fd))
    finally:
        os.close(fd)


def _require_same(path: str, fd: int, identity: FileIdentity) -> None:
    if not identity == FileIdentity.of(os.fstat(fd)) == file_identity(path):
        raise FileChanged(f"{path} was changed or replaced after it was loaded")


def _block(fd: int, offset: int, n_bytes: int = _BLOCK_BYTES) -> BlockDigest:
    data = os.pread(fd, n_bytes, offset)
    return BlockDigest(offset, len(data), hashlib.sha256(data).digest())


DIGESTS = FileDigests(RememberedDigests())
"""The digests of this process; every Llama takes its own from here."""
call_in_child(DIGESTS.start_without_threads)
