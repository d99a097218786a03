"""RememberedDigests: digests of large files, kept in the user's cache folder for later processes.

    FOLDER/digests/key          32 random bytes, this user's: names and MACs are keyed with them
    FOLDER/digests/NAME         one record a file; NAME is a keyed digest of the file's identity

1. A record is found by the file's identity: device, inode, size, mtime and ctime. The path is not
   part of it: the bytes belong to the inode, whichever path leads there.
2. Its MAC is checked, then a few blocks of the file itself: a stat can be wrong (images whose files
   all have the same times, a device number that another file system has now), the bytes can't.
3. A record is written to a temporary file and renamed: a reader sees all of it or nothing, and
   processes need no lock. The least recently used records are removed.

The MAC protects against another user who can write to the folder: a volume that is mounted in two
places, a folder whose parent was opened to a group, a copy from a backup. Such a writer could
otherwise give a model another model's digest, and so another model's states. A key file of another
owner, or one that others may read, is not used. Nothing here protects against programs of the same
user, or root: they can read the key, and could change the model as well.

A record that can't be used counts in `refusals`, is logged once, and costs a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import stat
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache._cache_folder import user_cache_folder
from tokcache._files import write_temporary

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger("tokcache")

FOLDER, KEY = "digests", "key"
MAX_RECORDS = 256
SWITCH = "TOKCACHE_REMEMBER_DIGESTS"
_ON = ("", "1", "true", "yes", "on")  # with any other value no digest is remembered
_TEMPORARY = ".new-"
_STALE_S = 900.0  # a temporary file that old was left by a writer that died
_DIGEST_BYTES = hashlib.sha256().digest_size
_MAGIC = b"tokcache.digest1"
_HEAD = struct.Struct("<16sQQQqq32sI")  # magic, identity, digest, number of blocks
_BLOCK = struct.Struct("<QI32s")
_MAX_BLOCKS = 64
_MAX_BYTES = _HEAD.size + _MAX_BLOCKS * _BLOCK.size + _DIGEST_BYTES
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


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
        self.refusals: Counter[str] = Counter()
        self._lock = threading.Lock()

    def find(self, identity: FileIdentity) -> FileDigest | None:
        """Return the remembered digest of a file; its blocks are still to be compared."""
        with self._folder(make=False) as folder:
            if folder is None or (key := self._key(folder, make=False)) is None:
                return None
            name = _name(key, identity)
            try:
                data = _read_own(name, folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                self.refuse("unreadable", f"a remembered digest can't be read: {error}")
                return None
            found = _parsed(data, key)
            if found is None or found.identity != identity:
                self.refuse("damaged", "a remembered digest is damaged; the file is hashed again")
                return None
            with contextlib.suppress(OSError):  # a folder that is read-only now
                os.utime(name, dir_fd=folder, follow_symlinks=False)
            return found

    def keep(self, found: FileDigest) -> None:
        """Remember a digest."""
        with self._folder(make=True) as folder:
            if folder is None or (key := self._key(folder, make=True)) is None:
                return
            try:
                _write(_name(key, found.identity), _packed(found, key), folder)
                _prune(folder)
            except OSError as error:
                self.refuse("unwritable", f"a digest can't be remembered: {error}")

    def remove(self, identity: FileIdentity) -> None:
        """Remove the remembered digest of a file."""
        with self._folder(make=False) as folder:
            if folder is None or (key := self._key(folder, make=False)) is None:
                return
            with contextlib.suppress(OSError):  # its blocks will differ again
                os.unlink(_name(key, identity), dir_fd=folder)

    def start_without_threads(self) -> None:
        """Replace a lock that another thread of a fork's parent may hold."""
        self._lock = threading.Lock()

    def refuse(self, reason: str, message: str = "") -> None:
        """Count a record or folder that can't be used; log the first of each kind."""
        with self._lock:
            self.refusals[reason] += 1
            is_first = self.refusals[reason] == 1
        if is_first and message:
            _log.warning(
                "%s (in tokcache's cache folder, %s)", message, user_cache_folder() / FOLDER
            )

    @contextlib.contextmanager
    def _folder(self, *, make: bool) -> Iterator[int | None]:
        """Open the folder if no other user can write to it; None if it is not there or not safe."""
        fd = None
        if os.environ.get(SWITCH, "").strip().lower() in _ON:
            try:
                fd = _open_folder(make=make)
            except FileNotFoundError as error:
                if make:
                    self.refuse("no_folder", f"digests are not remembered: {error}")
            except (OSError, RuntimeError, ValueError) as error:
                self.refuse("no_folder", f"digests are not remembered: {error}")
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def _key(self, folder: int, *, make: bool) -> bytes | None:
        try:
            with contextlib.suppress(FileNotFoundError):
                key = _read_own(KEY, folder)
                if len(key) == _DIGEST_BYTES:
                    return key
                self.refuse("damaged_key", "the key of remembered digests is damaged")
            if not make:
                return None
            return _make_key(folder)
        except OSError as error:
            self.refuse("no_key", f"digests are not remembered: {error}")
            return None


def _open_folder(*, make: bool) -> int:
    root = user_cache_folder()
    path = root / FOLDER
    if not path.is_absolute() and not os.environ.get("TOKCACHE_CACHE_DIR"):
        raise FileNotFoundError("the user has no home; TOKCACHE_CACHE_DIR can name a folder")
    if make:
        root.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(path, _DIRECTORY)
    status = os.fstat(fd)
    if status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return fd
    os.close(fd)
    raise PermissionError(f"{path} belongs to another user, or others may write to it; chmod 700")


def _read_own(name: str, folder: int) -> bytes:
    """Return the bytes of a file that only this user can have written.

    Errors: OSError if it is not there, or is not such a file.
    """
    fd = os.open(name, _READ, dir_fd=folder)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        is_own = status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode)
        if not is_own or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise PermissionError(f"{name} is not a file that only this user can read and write")
        return file.read(_MAX_BYTES + 1)


def _make_key(folder: int) -> bytes:
    """Return this user's key, made unless another process was faster."""
    temporary = write_temporary(folder, _TEMPORARY, (secrets.token_bytes(_DIGEST_BYTES),))
    try:
        # A damaged key is replaced; link fails if another process has made one meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if len(_read_own(KEY, folder)) != _DIGEST_BYTES:
                os.unlink(KEY, dir_fd=folder)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, KEY, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    finally:
        os.unlink(temporary, dir_fd=folder)
    key = _read_own(KEY, folder)
    if len(key) != _DIGEST_BYTES:
        raise OSError("the key of remembered digests was damaged as it was made")
    return key


def _write(name: str, data: bytes, folder: int) -> None:
    temporary = write_temporary(folder, _TEMPORARY, (data,))
    try:
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(temporary, dir_fd=folder)
        raise


def _prune(folder: int) -> None:
    """Remove the records used least recently, and files of writers that died."""
    records = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                used = entry.stat(follow_symlinks=False).st_mtime
                if entry.name.startswith(_TEMPORARY):
                    if abs(time.time() - used) > _STALE_S:
                        os.unlink(entry.name, dir_fd=folder)
                elif entry.name != KEY:
                    records.append((used, entry.name))
    for _, name in sorted(records)[:-MAX_RECORDS]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _name(key: bytes, identity: FileIdentity) -> str:
    return hmac.digest(key, b"name" + identity.to_bytes(), "sha256").hex()


def _packed(found: FileDigest, key: bytes) -> bytes:
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
    return head + body + hmac.digest(key, head + body, "sha256")


def _parsed(data: bytes, key: bytes) -> FileDigest | None:
    """Return a record, None if it is not one that was written with this key."""
    signed, mac = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not hmac.compare_digest(mac, hmac.digest(key, signed, "sha256")):
        return None
    if len(signed) < _HEAD.size:
        return None
    magic, *fields, digest, n_blocks = _HEAD.unpack_from(signed)
    if magic != _MAGIC or len(signed) != _HEAD.size + n_blocks * _BLOCK.size:
        return None
    blocks = tuple(BlockDigest(*each) for each in _BLOCK.iter_unpack(signed[_HEAD.size :]))
    return FileDigest(FileIdentity(*fields), digest, blocks)
