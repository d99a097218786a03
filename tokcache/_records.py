"""SignedRecords: small files in the user's cache folder that only this user's processes can make.

    FOLDER/KIND/key      32 random bytes, this user's: names and MACs are keyed with them
    FOLDER/KIND/NAME     one record; NAME is a keyed digest of the record's identity

A record is written to a temporary file and renamed: a reader sees all of it or nothing, and
processes need no lock. The least recently used records are removed.

The MAC protects against another user who can write to the folder: a volume that is mounted in two
places, a folder whose parent was opened to a group, a copy from a backup. A key file of another
owner, or one that others may read, is not used. Nothing here protects against programs of the same
user, or root: they can read the key.

A record that can't be used counts in `refusals`, is logged once, and is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import stat
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from tokcache._cache_folder import user_cache_folder
from tokcache._files import write_temporary

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger("tokcache")

KEY = "key"
MAX_RECORDS = 256
_ON = ("", "1", "true", "yes", "on")  # with any other value of its switch, a kind keeps nothing
_TEMPORARY = ".new-"
_STALE_S = 900.0  # a temporary file that old was left by a writer that died
_MAC_BYTES = hashlib.sha256().digest_size
_MAX_BYTES = 16 << 10
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class SignedRecords:
    """Records of one kind, by identity, in a folder that processes share.

    `kind` names the folder, `switch` the environment variable that turns it off, `noun` the
    records in the log ("remembered digest"). A record's body must hold the identity, so that the
    caller can see that the record is the one it asked for.

    Errors:  none; a record that can't be read or written counts in `refusals`.
    Threads: safe.
    """

    def __init__(self, kind: str, switch: str, noun: str) -> None:
        self.refusals: Counter[str] = Counter()
        self._kind = kind
        self._switch = switch
        self._noun = noun
        self._lock = threading.Lock()

    def find(self, identity: bytes) -> bytes | None:
        """Return the body of a record; None if there is none that this user's processes wrote."""
        with self._folder(make=False) as folder:
            if folder is None or (key := self._key(folder, make=False)) is None:
                return None
            name = _name(key, identity)
            try:
                data = _read_own(name, folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                self.refuse("unreadable", f"a {self._noun} can't be read: {error}")
                return None
            body, mac = data[:-_MAC_BYTES], data[-_MAC_BYTES:]
            if not hmac.compare_digest(mac, hmac.digest(key, body, "sha256")):
                self.refuse("damaged", f"a {self._noun} is damaged, and is made again")
                return None
            with contextlib.suppress(OSError):  # a folder that is read-only now
                os.utime(name, dir_fd=folder, follow_symlinks=False)
            return body

    def keep(self, identity: bytes, body: bytes) -> None:
        """Write a record, in place of an earlier one of the same identity.

        Units: `body` has at most 16,000 bytes.
        """
        with self._folder(make=True) as folder:
            if folder is None or (key := self._key(folder, make=True)) is None:
                return
            try:
                _write(_name(key, identity), body + hmac.digest(key, body, "sha256"), folder)
                _prune(folder)
            except OSError as error:
                self.refuse("unwritable", f"a {self._noun} can't be written: {error}")

    def remove(self, identity: bytes) -> None:
        """Remove a record."""
        with self._folder(make=False) as folder:
            if folder is None or (key := self._key(folder, make=False)) is None:
                return
            with contextlib.suppress(OSError):  # it will be refused again
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
                "%s (in tokcache's cache folder, %s)", message, user_cache_folder() / self._kind
            )

    @contextlib.contextmanager
    def _folder(self, *, make: bool) -> Iterator[int | None]:
        """Open the folder if no other user can write to it; None if it is not there or not safe."""
        fd = None
        if os.environ.get(self._switch, "").strip().lower() in _ON:
            try:
                fd = _open_folder(self._kind, make=make)
            except FileNotFoundError as error:
                if make:
                    self.refuse("no_folder", f"no {self._noun} can be kept: {error}")
            except (OSError, RuntimeError, ValueError) as error:
                self.refuse("no_folder", f"no {self._noun} can be kept: {error}")
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def _key(self, folder: int, *, make: bool) -> bytes | None:
        try:
            with contextlib.suppress(FileNotFoundError):
                key = _read_own(KEY, folder)
                if len(key) == _MAC_BYTES:
                    return key
                self.refuse("damaged_key", f"the key of each {self._noun} is damaged")
            if not make:
                return None
            return _make_key(folder)
        except OSError as error:
            self.refuse("no_key", f"no {self._noun} can be kept: {error}")
            return None


def _open_folder(kind: str, *, make: bool) -> int:
    root = user_cache_folder()
    path = root / kind
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
    temporary = write_temporary(folder, _TEMPORARY, (secrets.token_bytes(_MAC_BYTES),))
    try:
        # A damaged key is replaced; link fails if another process has made one meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if len(_read_own(KEY, folder)) != _MAC_BYTES:
                os.unlink(KEY, dir_fd=folder)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, KEY, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    finally:
        os.unlink(temporary, dir_fd=folder)
    key = _read_own(KEY, folder)
    if len(key) != _MAC_BYTES:
        raise OSError("the key was damaged as it was made")
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


def _name(key: bytes, identity: bytes) -> str:
    return hmac.digest(key, b"name" + identity, "sha256").hex()
