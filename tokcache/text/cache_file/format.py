"""The format of a cache file: a header, scopes, entries, and a checksum or MAC over all of it.

All numbers are little-endian and unsigned. The header is `_HEADER` and the cut seed. A scope is the
length of its name and the name in UTF-8. An entry is `_ENTRY`, its text in UTF-8 and its token ids.
The last 32 bytes are the SHA-256 of all bytes before them, or the HMAC-SHA-256 if a key was given.
Entries are in the order of their kinds, and within a kind the one used last comes first.

A file may come from anywhere. So the reader never allocates more bytes than the file has, and it
skips the entries that its caller does not take.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from pathlib import Path
from struct import Struct
from typing import IO, Any, TypeVar

from tokcache._files import atomic_file
from tokcache.errors import Damaged, InvalidCacheFile, MissingFile

MAX_SCOPES = 1 << 20  # in one file
MAX_SCOPE_BYTES = 64 << 20  # of the names of all scopes together
DIGEST_BYTES = 32

_MAGIC = b"tokcache"
_VERSION = 1
_HEADER = Struct("<8sHBBI32s32sQ")
_LENGTH = Struct("<I")
_ENTRY = Struct("<QIIBBBB")
_BLOCK_BYTES = 1 << 20
_KEYED = 1  # a flag in the header: the file ends with a MAC, not a checksum
_IS_LITTLE = sys.byteorder == "little"

Hash = Any  # the objects of hashlib and hmac have no common public type
T = TypeVar("T")


class Kind(IntEnum):
    """The kind of an entry: a whole text, a chunk or a short segment."""

    TEXT = 0
    CHUNK = 1
    SEGMENT = 2


@dataclass(frozen=True, slots=True)
class Header:
    """The tokenizer and cuts to which the entries belong, and the number of entries.

    `fingerprint` is a digest of the tokenizer and `plan` a digest of its cut plan; `cut_seed`
    chooses the cuts at which chunks begin.
    """

    fingerprint: bytes
    plan: bytes
    cut_seed: bytes
    n_entries: int


@dataclass(frozen=True, slots=True)
class Entry:
    """The header of an entry; `scope` is a place in the file's list of scopes, 0 for None.

    `flag` is true for a text with special tokens, and for a chunk at the end of its text.

    Units: `n_bytes` of text, in UTF-8.
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
        """The number of bytes of text and ids."""
        return self.n_bytes + 4 * self.n_ids


# ---- writing


def write(
    path: Path,
    header: Header,
    scopes: Iterable[str],
    entries: Iterable[tuple[Entry, bytes, bytes]],
    key: bytes | None,
) -> int:
    """Write a file that only its owner can read, completely or not at all, and return its size.

    Errors: MissingFile if its folder does not exist; OSError, which names `path` or its folder. In
            both cases no temporary file remains, and a file that was at `path` is unchanged.
    """
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "this is a folder, pass the name of a file", str(path)
        )
    if not path.parent.exists():
        raise MissingFile(
            f"the folder {path.parent}, in which {path.name} is to be written, does not exist; "
            "create it first"
        )
    failed = path.parent  # the path that an error names: the temporary file's name helps nobody
    try:
        with atomic_file(path, is_synced=True) as file:
            failed = path
            _write_all(file, _pieces(header, list(scopes), entries, key is not None), key)
            return file.tell()
    except OSError as error:
        error.filename, error.filename2 = str(failed), None
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
    """Write the pieces in blocks, and the checksum or MAC after them."""
    checksum = _checksum(key)
    block: list[bytes] = []
    n_bytes = 0
    for piece in chain(pieces, [None]):
        if piece is not None:
            block.append(piece)
            n_bytes += len(piece)
        if piece is None or n_bytes >= _BLOCK_BYTES:
            joined = b"".join(block)
            checksum.update(joined)
            file.write(joined)
            block, n_bytes = [], 0
    file.write(checksum.digest())


def _checksum(key: bytes | None) -> Hash:
    return hashlib.sha256() if key is None else hmac.new(key, digestmod="sha256")


def ids_to_bytes(ids: Any) -> bytes:
    """Return token ids in the form of the file."""
    own: bytes = ids.tobytes()
    return own if _IS_LITTLE else _swapped(own)


def bytes_to_ids(raw: bytes | memoryview) -> memoryview:
    """Return int32 ids from the form of the file."""
    return memoryview(raw if _IS_LITTLE else _swapped(raw)).cast("i")


def _swapped(raw: bytes | memoryview) -> bytes:
    from array import array  # noqa: PLC0415 (only big-endian machines need it)

    items = array("i", bytes(raw))
    items.byteswap()
    return items.tobytes()


# ---- reading


class Reader:
    """Reads a file once, from its beginning to its end.

    Call `header`, `scopes` and `entries` in this order, then `finish`: only then is it known that
    the file is not damaged.

    Errors: Damaged.
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
        """Return the header; the file must have this version, and a MAC if the caller has a key."""
        if self._left < _HEADER.size:
            raise Damaged("is too short for a cache file")
        magic, version, flags, n_seed, n_scopes, fingerprint, plan, n_entries = _HEADER.unpack(
            self.take(_HEADER.size)
        )
        if magic != _MAGIC:
            raise Damaged("is not a cache file")
        if version != _VERSION:
            raise Damaged(f"has version {version} of the format, this tokcache reads {_VERSION}")
        if flags & _KEYED and self._key is None:
            raise Damaged("was written with a key; pass it as key=")
        if not flags & _KEYED and self._key is not None:
            raise Damaged("was written without a key; with key= only files written with it load")
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
        """Yield every entry; bytes of it that the caller does not `take` are skipped."""
        before = Kind.TEXT
        for _ in range(self._n_entries):
            n_bytes, n_ids, scope, kind, flag, variant, end_class = _ENTRY.unpack(
                self.take(_ENTRY.size)
            )
            if kind > Kind.SEGMENT or flag > 1 or scope > self._n_scopes:
                raise Damaged("has an entry of an unknown kind")
            one = Entry(Kind(kind), scope, bool(flag), variant, end_class, n_bytes, n_ids)
            if one.kind < before:
                raise Damaged("has its entries in a wrong order")
            before, after = one.kind, self._left - one.n_content
            if after < 0:
                raise Damaged("ends within an entry")
            yield one
            while self._left > after:
                self.take(min(self._left - after, _BLOCK_BYTES))

    def take(self, n_bytes: int) -> bytes:
        """Return the next `n_bytes` bytes, which may be fewer than a block or more."""
        if n_bytes > self._left:
            raise Damaged("ends too early")
        if self._at + n_bytes > len(self._block):
            rest = self._block[self._at :]
            more = self._read(min(max(n_bytes, _BLOCK_BYTES), self._left) - len(rest))
            self._checksum.update(more)
            self._block = rest + more if rest else more
            self._at = 0
        start = self._at
        self._at += n_bytes
        self._left -= n_bytes
        return self._block[start : self._at]

    def _read(self, n_bytes: int) -> bytes:
        found = self._file.read(n_bytes)
        if len(found) < n_bytes:
            raise Damaged("became shorter while it was read")
        return found

    def finish(self) -> None:
        """Check that only the checksum or MAC is left, and that it is right."""
        if self._left:
            raise Damaged(f"has {self._left:,} bytes that belong to no entry")
        if not hmac.compare_digest(self._checksum.digest(), self._read(DIGEST_BYTES)):
            raise Damaged(
                "has a wrong checksum: it is damaged"
                + ("" if self._key is None else ", or it was written with another key")
            )


def decoded(raw: bytes, errors: str = "surrogatepass") -> str:
    """Return the text of these bytes."""
    try:
        return raw.decode("utf-8", errors)
    except UnicodeDecodeError:
        raise Damaged("has a text that is not UTF-8") from None


def read(path: Path, key: bytes | None, use: Callable[[Reader], T]) -> T:
    """Open a file and return `use(reader)`.

    Errors: MissingFile; InvalidCacheFile if the file is Damaged or not a regular file; OSError.
    """
    try:
        # O_NONBLOCK: opening a pipe to which nobody writes must not wait.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise MissingFile(f"the cache file {path} does not exist; cache_dump writes one") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InvalidCacheFile(f"{path} is not a regular file; pass a file of cache_dump")
    with os.fdopen(handle, "rb") as file:
        try:
            return use(Reader(file, key))
        except Damaged as damage:
            raise InvalidCacheFile(
                f"{path} {damage}; nothing was loaded: dump a new file with cache_dump"
            ) from None
