"""One file of a state: opened, verified, and only then passed on.

A payload is read into memory of this process and verified there: no other process can change it
any more, and a disk that fails gives an error instead of a signal. Only payloads that memory has no
room for are mapped.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache.errors import StateRefused
from tokcache.state.tiers import Record, Stored
from tokcache.state.tiers.block_file import HEAD_BYTES, HMAC_FLAG, MAX_TOKENS, Head, StateCodec

if TYPE_CHECKING:
    from pathlib import Path

    from tokcache.state.tiers.counters import TierCounters

LAYOUT = "1"
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block
FILE_MODE, PINNED_MODE = 0o600, 0o700
_AHEAD_BYTES = 1 << 17  # Linux cuts a larger request to read ahead down to this
_FIRST_READ = 8192  # the head and some 1,900 tokens: one read for most blocks

_REASONS = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EFBIG: "full",
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.EROFS: "permission",
    errno.ELOOP: "symlink",
    errno.ENOTDIR: "symlink",
    errno.ENOENT: "missing",
}


def reason_of(error: OSError) -> str:
    """Return the reason under which an error of the system is counted."""
    return _REASONS.get(error.errno or 0, "error")


def is_pinned_mode(mode: int) -> bool:
    """Return whether a file of this mode is pinned: pruned after all others."""
    return bool(mode & stat.S_IXUSR)


@dataclass(frozen=True, slots=True)
class File:
    """A file of a state, as a scan finds it; all names are digests.

    Units: `n_bytes` bytes, `used_at` seconds since the epoch.
    """

    scope: str
    root: str
    name: str
    position: int
    n_bytes: int
    used_at: float
    is_pinned: bool = False

    @property
    def path(self) -> str:
        """Its path below the tier's folder."""
        return f"{LAYOUT}/{self.scope}/{self.root}/{self.name}"


class DiskFile(Stored):
    """An open file of a state whose head was verified; `read_into` and `view` verify the rest.

    `folder` is an open descriptor of the folder in which the file is called `name`; the file owns
    `fd` and a copy of `folder`.
    """

    def __init__(
        self,
        fd: int,
        head: Head,
        first: bytes,
        record: Record,
        *,
        codec: StateCodec,
        counters: TierCounters,
        name: str,
        folder: int,
    ) -> None:
        self._fd = -1  # until the copy of `folder` exists, `fd` is still the caller's to close
        self._folder = os.dup(folder)
        self._fd, self._name = fd, name
        self._head, self._first = head, first
        self._codec, self._counters = codec, counters
        self.record = record
        self.n_bytes = head.payload_bytes - head.tag_bytes

    def _checksum(self) -> bytes:
        end = self._head.head_bytes + self._head.payload_bytes
        return os.pread(self._fd, self._head.checksum_bytes, end)

    def read_into(self, buffer: memoryview) -> None:
        """Read the payload into `buffer`, which no other process can change, and verify it there.

        Errors: StateRefused.
        """
        with _refusing():
            if self._head.tag_bytes:
                buffer[:] = self._mapped_payload()
            else:
                _read_exactly(self._fd, buffer, self._head.head_bytes)
                self._codec.opened_payload(self._head, self._first, buffer, self._checksum())
        self._counters.count("read_bytes", self.n_bytes)

    def view(self) -> memoryview:
        """Map the payload into memory and verify it.

        Errors: StateRefused.
        """
        with _refusing():
            payload = self._mapped_payload()
        self._counters.count("read_bytes", self.n_bytes)
        return payload

    def _mapped_payload(self) -> memoryview:
        head = self._head
        if head.payload_bytes == 0:
            self._codec.opened_payload(head, self._first, memoryview(b""), self._checksum())
            return memoryview(b"")
        mapped = memoryview(mmap.mmap(self._fd, 0, prot=mmap.PROT_READ))
        if mapped.nbytes < head.head_bytes + head.payload_bytes:
            raise StateRefused("damaged")
        stored = mapped[head.head_bytes : head.head_bytes + head.payload_bytes]
        payload = self._codec.opened_payload(head, self._first, stored, self._checksum())
        return memoryview(payload).toreadonly()

    def discard(self) -> None:
        """Remove the file, whose content is damaged, unless another one has taken its name."""
        with contextlib.suppress(OSError):
            found = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
            if found.st_ino == os.fstat(self._fd).st_ino:
                os.unlink(self._name, dir_fd=self._folder)

    def close(self) -> None:
        """Close the file; a view stays valid."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            os.close(self._folder)

    def __del__(self) -> None:
        self.close()


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn an error of the system into a reason to be counted."""
    try:
        yield
    except OSError as error:
        raise StateRefused(reason_of(error)) from error
    except MemoryError as error:
        raise StateRefused("no_memory") from error


def verified_file(folder: Path, file: File, codec: StateCodec) -> Head:
    """Read all of a file that a scan found and check its checksums; return its head.

    Tokens and states are not looked at: without the prompt nothing shows whether they belong
    there, only whether the file stands in the folder, and under the name, that its head says.

    Errors: StateRefused; OSError.
    """
    fd = os.open(folder / file.path, READ)
    try:
        head, first = read_head(fd, os.fstat(fd).st_size)
        if head.flags & HMAC_FLAG != codec.flags & HMAC_FLAG:
            raise StateRefused("other_keys")
        end = head.head_bytes - head.checksum_bytes
        codec.verify(first[end:], first[:end])
        payload = memoryview(bytearray(head.payload_bytes))
        _read_exactly(fd, payload, head.head_bytes)
        checksum = os.pread(fd, head.checksum_bytes, head.head_bytes + head.payload_bytes)
        codec.verify(checksum, first, payload)
    finally:
        os.close(fd)
    stem = f"{head.position:x}-{head.slot.hex()}"
    if (head.scope.hex(), head.root.hex(), stem) != (file.scope, file.root, file.name[:-2]):
        raise StateRefused("misfiled")
    return head


def read_head(fd: int, n_file_bytes: int) -> tuple[Head, bytes]:
    """Return the head of an open file, and all bytes that precede its payload.

    Errors: StateRefused; OSError.
    """
    first = os.pread(fd, _FIRST_READ, 0)
    head = Head.read(first, n_file_bytes)
    if head.head_bytes > HEAD_BYTES + 4 * MAX_TOKENS + 64:
        raise StateRefused("damaged")
    if len(first) < head.head_bytes:
        buffer = bytearray(head.head_bytes)
        _read_exactly(fd, memoryview(buffer), 0)
        first = bytes(buffer)
    return head, first[: head.head_bytes]


def _read_exactly(fd: int, buffer: memoryview, offset: int) -> None:
    done = 0
    if buffer.nbytes > _AHEAD_BYTES and hasattr(os, "posix_fadvise"):
        # The disk reads what follows while the first bytes are copied and verified.
        for at in range(offset, offset + buffer.nbytes, _AHEAD_BYTES):
            os.posix_fadvise(fd, at, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
    while done < buffer.nbytes:
        n_read = os.preadv(fd, [buffer[done:]], offset + done)
        if not n_read:
            raise StateRefused("damaged")
        done += n_read
