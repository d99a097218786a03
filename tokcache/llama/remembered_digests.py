"""RememberedDigests: digests of large files, kept in the user's cache folder for later processes.

1. A record is found by the file's identity: device, inode, size, mtime and ctime. The path is not
   part of it: the bytes belong to the inode, whichever path leads there.
2. Its MAC is checked, then a few blocks of the file itself: a stat can be wrong (images whose files
   all have the same times, a device number that another file system has now), the bytes can't.

Whoever could forge a record could give a model another model's digest, and so another model's
states; `SignedRecords` says against whom its MAC protects. A record that can't be used costs a
digest.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache._records import SignedRecords

if TYPE_CHECKING:
    import os

FOLDER = "digests"
SWITCH = "TOKCACHE_REMEMBER_DIGESTS"
_MAGIC = b"tokcache.digest1"
_HEAD = struct.Struct("<16sQQQqq32sI")  # magic, identity, digest, number of blocks
_BLOCK = struct.Struct("<QI32s")


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Distinguishes a file from one that took its place, and from itself after a change.

    An overwrite in place always changes ctime: `cp -p`, `touch -r` and package managers set mtime,
    but only the kernel sets ctime.
    """

    device: int
    inode: int
    n_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Return the identity that a stat shows."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    def to_bytes(self) -> bytes:
        """Return it as bytes of a fixed length."""
        fields = (self.device, self.inode, self.n_bytes, self.mtime_ns, self.ctime_ns)
        return struct.pack("<QQQqq", *fields)


@dataclass(frozen=True, slots=True)
class BlockDigest:
    """The digest of `n_bytes` of a file from `offset` on."""

    offset: int
    n_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The digest of a file, and of some blocks of it, by which it is recognised."""

    identity: FileIdentity
    digest: bytes
    blocks: tuple[BlockDigest, ...]


class RememberedDigests:
    """Digests of files, by identity, in a folder that processes share.

    Errors:  none; a record that can't be read or written counts in `refusals`.
    Threads: safe.
    """

    def __init__(self) -> None:
        self._records = SignedRecords(FOLDER, SWITCH, "remembered digest")

    @property
    def refusals(self) -> Counter[str]:
        """The number of records and folders that could not be used, by reason."""
        return self._records.refusals

    def find(self, identity: FileIdentity) -> FileDigest | None:
        """Return the remembered digest of a file; its blocks are still to be compared."""
        body = self._records.find(identity.to_bytes())
        if body is None:
            return None
        found = _parsed(body)
        if found is None or found.identity != identity:
            self.refuse("damaged", "a remembered digest is damaged; the file is hashed again")
            return None
        return found

    def keep(self, found: FileDigest) -> None:
        """Remember a digest."""
        self._records.keep(found.identity.to_bytes(), _packed(found))

    def remove(self, identity: FileIdentity) -> None:
        """Remove the remembered digest of a file."""
        self._records.remove(identity.to_bytes())

    def start_without_threads(self) -> None:
        """Replace a lock that another thread of a fork's parent may hold."""
        self._records.start_without_threads()

    def refuse(self, reason: str, message: str = "") -> None:
        """Count a record that can't be used; log the first of each kind."""
        self._records.refuse(reason, message)


def _packed(found: FileDigest) -> bytes:
    identity = found.identity
    head = _HEAD.pack(
        _MAGIC,
        identity.device,
        identity.inode,
        identity.n_bytes,
        identity.mtime_ns,
        identity.ctime_ns,
        found.digest,
        len(found.blocks),
    )
    body = b"".join(_BLOCK.pack(each.offset, each.n_bytes, each.digest) for each in found.blocks)
    return head + body


def _parsed(body: bytes) -> FileDigest | None:
    """Return a record, None if it is not one that this module wrote."""
    if len(body) < _HEAD.size:
        return None
    magic, *fields, digest, n_blocks = _HEAD.unpack_from(body)
    if magic != _MAGIC or len(body) != _HEAD.size + n_blocks * _BLOCK.size:
        return None
    blocks = tuple(BlockDigest(*each) for each in _BLOCK.iter_unpack(body[_HEAD.size :]))
    return FileDigest(FileIdentity(*fields), digest, blocks)
