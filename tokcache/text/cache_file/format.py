"""The file of a cache that was dumped: a header, scopes, entries, and a checksum over it all.

All numbers are little-endian and unsigned. The header is `_HEADER` and the cut seed; a scope is
its length and its name in UTF-8; an entry is `_ENTRY`, its text in UTF-8 and its token ids. The
last 32 bytes are SHA-256 of all before, or HMAC-SHA-256 where a key was given. Entries come in
the order of their kinds, in each the last used first.

A file may come from anywhere: a length is believed only as far as the file has so many bytes, and
what a caller does not want is read past, not held.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from struct import Struct
from typing import IO, Any, TypeVar

from tokcache.errors import Damaged, InvalidCacheFile, MissingFile

MAX_SCOPES = 1 << 20  # of one file
MAX_SCOPE_BYTES = 64 << 20  # of all their names
DIGEST_BYTES = 32

_MAGIC = b"tokcache"
_VERSION = 1
_HEADER = Struct("<8sHBBI32s32sQ")
_LENGTH = Struct("<I")
_ENTRY = Struct("<QIIBBBB")
_BLOCK_BYTES = 1 << 20
_KEYED = 1  # flag of the header
_IS_LITTLE = sys.byteorder == "little"

Hash = Any  # what hashlib and hmac return has no common public type
T = TypeVar("T")


class Kind(IntEnum):
    """What an entry is of: a whole text, or a part of texts."""

    TEXT = 0
    CHUNK = 1
    SHORT = 2


@dataclass(frozen=True, slots=True)
class Header:
    """What the entries belong to, and how many there are.

    `fingerprint` is the tokenizer's, `plan` that of the places where texts are cut, `cut_seed`
    what chooses among them.
    """

    fingerprint: bytes
    plan: bytes
    cut_seed: bytes
    n_entries: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A text or a part; `scope` is a place in the file's list of scopes.

    `flag` says of a text that special tokens were added, of a chunk that it ended its text.
    """

    kind: Kind
    scope: int
    flag: bool
    variant: int
    end_class: int
    n_bytes: int
    n_ids: int

    @property
    def n_content(self) -> int:
        """Bytes of text and ids."""
        return self.n_bytes + 4 * self.n_ids


# ---- writing


def write(
    path: Path,
    header: Header,
    scopes: Iterable[str],
    entries: Iterable[tuple[Entry, bytes, bytes]],
    key: bytes | None,
) -> int:
    """Write a file whole or not at all, for its owner's eyes, and return its size.

    Errors: MissingFile if there is no folder for it; OSError, which names `path` or its folder.
            Then no part of it is left, and what was at `path` before is.
    """
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "a folder is there, pass the name of a file", str(path)
        )
    with _named(path.parent):
        handle, name = _temporary(path)
    try:
        with _named(path):
            with os.fdopen(handle, "wb") as file:
                _write_all(file, _pieces(header, list(scopes), entries, key is not None), key)
                file.flush()
                os.fsync(file.fileno())
                n_bytes = file.tell()
            Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return n_bytes


def _temporary(path: Path) -> tuple[int, str]:
    try:
        return tempfile.mkstemp(prefix=".tokcache-", dir=path.parent)  # mode 0600
    except FileNotFoundError:
        raise MissingFile(
            f"there is no folder {path.parent} to write {path.name} into; make it first"
        ) from None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have errors of the system name `path`, not a temporary file that nobody asked for."""
    try:
        yield
    except MissingFile:
        raise
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _pieces(
    header: Header,
    scopes: list[str],
    entries: Iterable[tuple[Entry, bytes, bytes]],
    is_keyed: bool,
) -> Iterator[bytes]:
    yield _HEADER.pack(
        _MAGIC,
        _VERSION,
        _KEYED if is_keyed else 0,
        len(header.cut_seed),
        len(scopes),
        header.fingerprint,
        header.plan,
        header.n_entries,
    )
    yield header.cut_seed
    for scope in scopes:
        name = scope.encode("utf-8", "surrogatepass")
        yield _LENGTH.pack(len(name))
        yield name
    for one, text, ids in entries:
        yield _ENTRY.pack(
            one.n_bytes, one.n_ids, one.scope, one.kind, one.flag, one.variant, one.end_class
        )
        yield text
        yield ids


def _write_all(file: IO[bytes], pieces: Iterator[bytes], key: bytes | None) -> None:
    checksum = _checksum(key)
    block: list[bytes] = []
    n_bytes = 0
    for piece in pieces:
        block.append(piece)
        n_bytes += len(piece)
        if n_bytes >= _BLOCK_BYTES:
            _write_block(file, checksum, block)
            block, n_bytes = [], 0
    _write_block(file, checksum, block)
    file.write(checksum.digest())


def _write_block(file: IO[bytes], checksum: Hash, block: list[bytes]) -> None:
    joined = b"".join(block)
    checksum.update(joined)
    file.write(joined)


def _checksum(key: bytes | None) -> Hash:
    return hashlib.sha256() if key is None else hmac.new(key, digestmod="sha256")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def ids_to_bytes(ids: Any) -> bytes:
    """Return token ids as a file has them."""
    own: bytes = ids.tobytes()
    return own if _IS_LITTLE else _swapped(own)


def bytes_to_ids(raw: bytes | memoryview) -> memoryview:
    """Return int32 ids; the counterpart of `ids_to_bytes`."""
    return memoryview(raw if _IS_LITTLE else _swapped(raw)).cast("i")


def _swapped(raw: bytes | memoryview) -> bytes:
    from array import array  # noqa: PLC0415 (on few machines)

    items = array("i", bytes(raw))
    items.byteswap()
    return items.tobytes()


# ---- reading


class Reader:
    """Reads a file from its beginning to its end, once; `take` gives no byte that is not there.

    Use `header`, `scopes` and `entries` in this order, then `finish`, before anything is
    believed. Errors: Damaged.
    """

    def __init__(self, file: IO[bytes], key: bytes | None) -> None:
        self.n_bytes = os.fstat(file.fileno()).st_size
        self._file = file
        self._key = key
        self._checksum = _checksum(key)
        self._left = self.n_bytes - DIGEST_BYTES
        self._block = b""
        self._at = 0
        self._n_scopes = self._n_entries = 0

    def header(self) -> Header:
        """Return the header of a file of this version, keyed as the caller has a key."""
        if self._left < _HEADER.size:
            raise Damaged("is too short for a cache file")
        magic, version, flags, n_seed, n_scopes, fingerprint, plan, n_entries = _HEADER.unpack(
            self.take(_HEADER.size)
        )
        if magic != _MAGIC:
            raise Damaged("is no cache file")
        if version != _VERSION:
            raise Damaged(f"has version {version} of the format, this tokcache reads {_VERSION}")
        if flags & _KEYED and self._key is None:
            raise Damaged("was written with a key; pass it as key=")
        if not flags & _KEYED and self._key is not None:
            raise Damaged("was written without a key; only files written with it are loaded")
        self._n_scopes, self._n_entries = n_scopes, n_entries
        return Header(fingerprint, plan, bytes(self.take(n_seed)), n_entries)

    def scopes(self) -> list[str]:
        """Return the names of all scopes."""
        if self._n_scopes > MAX_SCOPES:
            raise Damaged(f"names {self._n_scopes:,} scopes, at most {MAX_SCOPES:,} are read")
        found, n_left = [], MAX_SCOPE_BYTES
        for _ in range(self._n_scopes):
            (length,) = _LENGTH.unpack(self.take(_LENGTH.size))
            n_left -= length
            if n_left < 0:
                raise Damaged(f"names scopes of more than {MAX_SCOPE_BYTES:,} bytes")
            found.append(decoded(self.take(length)))
        return found

    def entries(self) -> Iterator[Entry]:
        """Yield every entry; what the caller does not `take` of it before the next is skipped."""
        before = Kind.TEXT
        for _ in range(self._n_entries):
            one = self._entry()
            if one.kind < before:
                raise Damaged("has its entries in a wrong order")
            before, after = one.kind, self._left - one.n_content
            if after < 0:
                raise Damaged("ends within an entry")
            yield one
            while self._left > after:
                self.take(min(self._left - after, _BLOCK_BYTES))

    def _entry(self) -> Entry:
        n_bytes, n_ids, scope, kind, flag, variant, end_class = _ENTRY.unpack(
            self.take(_ENTRY.size)
        )
        if kind > Kind.SHORT or flag > 1 or scope > self._n_scopes:
            raise Damaged("has an entry of no known kind")
        return Entry(Kind(kind), scope, bool(flag), variant, end_class, n_bytes, n_ids)

    def take(self, n_bytes: int) -> bytes:
        """Return the next bytes."""
        if n_bytes > self._left:
            raise Damaged("ends too early")
        if self._at + n_bytes > len(self._block):
            self._refill(n_bytes)
        start = self._at
        self._at += n_bytes
        self._left -= n_bytes
        return self._block[start : self._at]

    def _refill(self, n_bytes: int) -> None:
        rest = self._block[self._at :]
        more = self._read(min(max(n_bytes, _BLOCK_BYTES), self._left) - len(rest))
        self._checksum.update(more)
        self._block = rest + more if rest else more
        self._at = 0

    def _read(self, n_bytes: int) -> bytes:
        found = self._file.read(n_bytes)
        if len(found) < n_bytes:
            raise Damaged("became shorter while it was read")
        return found

    def finish(self) -> None:
        """Check that nothing is left but the checksum, and that it is right."""
        if self._left:
            raise Damaged(f"has {self._left:,} bytes that belong to no entry")
        if not hmac.compare_digest(self._checksum.digest(), self._read(DIGEST_BYTES)):
            raise Damaged(
                "has a wrong checksum: it is damaged"
                + ("" if self._key is None else ", or was written with another key")
            )


def decoded(raw: bytes, errors: str = "surrogatepass") -> str:
    """Return a text as it was before it was written."""
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError:
        raise Damaged("has a text that is no UTF-8") from None


def read(path: Path, key: bytes | None, use: Callable[[Reader], T]) -> T:
    """Return what `use` makes of a file.

    Errors: MissingFile; InvalidCacheFile for what is Damaged or no regular file; OSError.
    """
    try:
        # Without waiting: a pipe that nobody writes to is no file either.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise MissingFile(f"there is no cache file {path}; cache_dump writes one") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidCacheFile(f"{path} is no regular file")
    with os.fdopen(handle, "rb") as file:
        try:
            return use(Reader(file, key))
        except Damaged as damage:
            raise InvalidCacheFile(
                f"{path} {damage}; nothing of it was loaded, cache_dump writes a new one"
            ) from None
