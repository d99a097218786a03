"""Reads a trace file as a stream of JSON values or lines, in memory that does not grow with it.

1. The first bytes say whether the file is compressed (gzip, zstd); names are not trusted.
2. The first lines say how values are written: one a line, or in an array or over several lines.
3. A value that can't be read is counted and named by its number, and the next one is read. Between
   values that are not on lines of their own there is no place to go on from: the rest of such a
   file is not read.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from tokcache.errors import InvalidTrace, MissingExtra, MissingFile

_HEAD_BYTES = 1 << 20  # looked at to recognise how a file is written
_PIECE_CHARS = 1 << 20
_BATCH_BYTES = 1 << 16  # of lines that are parsed together
MAX_RECORD_BYTES = 256 << 20  # a longer line or item is counted as broken
_MAX_NAMED = 10
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SPACE = " \t\r\n"
_LINE_FEED = 0x0A


loads: Callable[[bytes | str], Any]
try:
    from orjson import loads  # an extra: four times as fast
except ImportError:
    loads = json.loads


@dataclass(slots=True)
class Skipped:
    """Records that were not replayed: how many, and the first ones by number, with the cause.

    With `is_strict` the first one is an InvalidTrace instead.
    """

    is_strict: bool = False
    n: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Count a record; `why` must not contain any of its text."""
        if self.is_strict:
            raise InvalidTrace(f"{where}: {why}; leave out --strict to skip such records")
        self.n += 1
        if len(self.named) < _MAX_NAMED:
            self.named.append(f"{where}: {why}")


class Source:
    """One trace file, or standard input if `path` is "-".

    Errors:  MissingFile, MissingExtra for zstd without its library, InvalidTrace if it can't be
             opened.
    Threads: one.
    """

    def __init__(self, path: str, skipped: Skipped) -> None:
        self.name = "standard input" if path == "-" else path
        self.skipped = skipped
        self.n_bytes: int | None = None
        self.number = 0  # of the line or item that was read last
        self.unit = "line"
        self._file = self._opened(path)
        try:
            raw: Any = self._file
            magic = raw.read(4)
            raw = _unpacked(_Joined(magic, raw), magic, self.name)
            self.head, raw = self._first_bytes(raw)
        except BaseException:
            self.close()
            raise
        self.is_complete = len(self.head) < _HEAD_BYTES  # the head is all of the file
        self._stream = io.BufferedReader(_Joined(self.head, raw), _HEAD_BYTES)
        self._lines = self._read_lines()

    @property
    def where(self) -> str:
        """The place of the record that was read last."""
        return f"{self.name}, {self.unit} {self.number}"

    def position(self) -> int:
        """Return the bytes of the file that were read, compressed as they are."""
        try:
            return self._file.tell()
        except OSError:  # a pipe
            return 0

    def close(self) -> None:
        """Close the file."""
        if self._file is not sys.stdin.buffer:
            self._file.close()

    def _opened(self, path: str) -> IO[bytes]:
        if path == "-":
            return sys.stdin.buffer
        try:
            file = Path(path).open("rb")  # noqa: SIM115 (closed by `close`)
            self.n_bytes = Path(path).stat().st_size
        except FileNotFoundError:
            raise MissingFile(f"no such trace: {path}") from None
        except IsADirectoryError:
            raise InvalidTrace(f"{path} is a folder; name its files, as {path}/*.jsonl") from None
        except OSError as error:
            raise InvalidTrace(f"{path} can't be read: {error.strerror}") from None
        return file

    def _first_bytes(self, raw: Any) -> tuple[bytes, Any]:
        """Return the first bytes, and the stream to read the rest from."""
        pieces, n_missing = [], _HEAD_BYTES
        try:
            while n_missing and (piece := _read_some(raw, n_missing)):
                pieces.append(piece)
                n_missing -= len(piece)
        except _read_errors() as error:
            if pieces:  # counted with its place, after the records before it
                return b"".join(pieces), _Damaged(error)
            self.skipped.add(self.name, f"its compressed data is damaged: {error}")
        return b"".join(pieces), raw

    # ---- records

    def is_json(self) -> bool:
        """Return whether the file begins as JSON does."""
        return self._start[:1] in {"{", "[", '"'}

    @cached_property
    def _start(self) -> str:
        head = self.head
        encoding = "utf-16" if head.startswith(_UTF_16) else "utf-8-sig"
        return codecs.getincrementaldecoder(encoding)("replace").decode(head).lstrip(_SPACE)

    @cached_property
    def has_values_on_lines(self) -> bool:
        """Return whether each line is a JSON value, as far as the first lines show.

        A line that is an array of objects without a role is the array of all records.
        """
        lines = self._start.split("\n")
        if len(lines) > 1 and not self.is_complete:
            lines.pop()  # incomplete
        for line in lines[:20]:
            if line[:1] not in {"{", "[", '"'}:
                continue
            try:
                found = loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(found, list):
                return True
            return bool(found) and isinstance(found[0], dict) and "role" in found[0]
        return False

    def values(self) -> Iterator[Any]:
        """Return the JSON values that were not read yet; `where` is the place of the last one."""
        return self._values

    @cached_property
    def _values(self) -> Iterator[Any]:
        if self.has_values_on_lines:
            return (value for line in self._lines for value in self._parsed(line))
        return self._values_anywhere()

    def _parsed(self, line: bytes) -> Sequence[Any]:
        try:
            return (loads(line),)
        except (ValueError, RecursionError) as error:
            if not line.isspace():
                self.skipped.add(self.where, _cause(line, error))
            return ()

    def batches(self) -> Iterator[tuple[Sequence[int], list[Any]]]:
        """Yield JSON values on lines, and the numbers of the lines, many at a time.

        They are parsed together, as items of an array: a call for each line takes as long as its
        JSON. If one of them is broken, they are parsed one by one.
        """
        if self.head.startswith(_UTF_16):
            for value in self.values():
                yield (self.number,), [value]
            return
        rest = b""
        try:
            while piece := self._stream.read1(_BATCH_BYTES):
                data = rest + piece
                stop = data.rfind(b"\n") + 1
                if not stop:  # a long line, or the last one
                    data += self._stream.readline(MAX_RECORD_BYTES)
                    if len(data) >= MAX_RECORD_BYTES and not data.endswith(b"\n"):
                        self.number += 1
                        self._skip_too_long()
                        rest = b""
                        continue
                    stop = len(data)
                yield from self._parsed_together(data[:stop])
                rest = data[stop:]
        except _read_errors() as error:
            self.skipped.add(f"{self.name}, after line {self.number}", f"the file ends: {error}")
            return
        yield from self._parsed_together(rest)

    def _parsed_together(self, data: bytes) -> Iterator[tuple[Sequence[int], list[Any]]]:
        first = self.number + 1
        if first == 1 and data.startswith(codecs.BOM_UTF8):
            data = data[len(codecs.BOM_UTF8) :]
        is_ended = data.endswith(b"\n")
        # In half of the time that bytes.count takes.
        n_feeds = int(np.count_nonzero(np.frombuffer(data, np.uint8) == _LINE_FEED))
        n_lines = n_feeds + (not is_ended)
        try:
            values = loads(b"[%b]" % data[: len(data) - is_ended].replace(b"\n", b","))
        except (ValueError, RecursionError):
            values = []
        if len(values) == n_lines:  # else one of them has several values
            self.number += n_lines
            yield range(first, first + n_lines), values
            return
        for line in io.BytesIO(data):
            self.number += 1
            for value in self._parsed(line):
                yield (self.number,), [value]

    def lines(self) -> Iterator[bytes]:
        """Return the lines as UTF-8, without a byte order mark; too long ones are skipped."""
        return self._lines

    def _read_lines(self) -> Iterator[bytes]:
        read: Callable[[int], bytes] = self._stream.readline
        if self.head.startswith(_UTF_16):
            texts = io.TextIOWrapper(self._stream, encoding="utf-16", newline="\n")
            lines = (line.encode("utf-8", "surrogatepass") for line in texts)
            read = lambda _: next(lines, b"")  # noqa: E731 (reads the next line)
        try:
            while line := read(MAX_RECORD_BYTES):
                self.number += 1
                if self.number == 1 and line.startswith(codecs.BOM_UTF8):
                    line = line[len(codecs.BOM_UTF8) :]
                if len(line) >= MAX_RECORD_BYTES and not line.endswith(b"\n"):
                    self._skip_too_long()
                    continue
                yield line
        except _read_errors() as error:
            self.skipped.add(f"{self.name}, after line {self.number}", f"the file ends: {error}")

    def _skip_too_long(self) -> None:
        """Count a line that is too long, and read the rest of it."""
        self.skipped.add(self.where, f"longer than {MAX_RECORD_BYTES >> 20} MiB")
        while (line := self._stream.readline(MAX_RECORD_BYTES)) and not line.endswith(b"\n"):
            pass

    def _values_anywhere(self) -> Iterator[Any]:
        """Yield the items of an array, or values that follow each other.

        A value that can't be parsed may be incomplete: it is tried again when the buffer has
        doubled, so that an item of n bytes costs O(n).
        """
        self.unit = "item"
        decoder, pieces = json.JSONDecoder(), self._pieces()
        text, at, wanted, is_open = "", 0, _PIECE_CHARS, False
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at < len(text) and ((text[at] == "[" and not is_open) or text[at] == "]"):
                is_open = text[at] == "["
                at += 1
                continue
            cause: Exception | None = None
            try:
                value, at = decoder.raw_decode(text, at) if at < len(text) else (None, at)
            except (ValueError, RecursionError) as error:
                cause = error
            else:
                if at < len(text) or (text and value is not None):
                    self.number += 1
                    yield value
                    wanted = _PIECE_CHARS
                    continue
            text, at = text[at:], 0
            n_before = len(text)
            while len(text) < max(wanted, n_before + 1) and (piece := next(pieces, "")):
                text += piece
            wanted = 2 * len(text)
            if len(text) == n_before or len(text) > MAX_RECORD_BYTES:
                if text.strip(_SPACE):
                    self.number += 1
                    why = _cause(b"", cause) if cause else "incomplete"
                    self.skipped.add(self.where, f"{why}; nothing after it is read")
                return

    def _pieces(self) -> Iterator[str]:
        encoding = "utf-16" if self.head.startswith(_UTF_16) else "utf-8-sig"
        decode = codecs.getincrementaldecoder(encoding)().decode
        try:
            while piece := self._stream.read(_PIECE_CHARS):
                yield decode(piece)
        except _read_errors() as error:
            self.skipped.add(f"{self.name}, after item {self.number}", f"the file ends: {error}")


def _cause(line: bytes, error: Exception) -> str:
    """Return why a line is no JSON value, without any of its text."""
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return f"byte {wrong.start + 1} is not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "not a JSON value: " + str(error).split(":", maxsplit=1)[0]


# ---- compression


def _unpacked(raw: Any, head: bytes, name: str) -> Any:
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=raw)
    if head.startswith(_ZSTD):
        try:
            import zstandard  # noqa: PLC0415 (an extra)
        except ImportError:
            raise MissingExtra(
                f"{name} is compressed with zstd, which needs zstandard: "
                "pip install 'tokcache[replay]', or unpack it: zstd -dc FILE | tokcache replay -"
            ) from None
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    return raw


def _read_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that damaged data raises while it is read."""
    known = (OSError, EOFError, zlib.error, UnicodeError)
    zstandard = sys.modules.get("zstandard")
    return known if zstandard is None else (*known, zstandard.ZstdError)


def _read_some(raw: Any, n_bytes: int) -> bytes:
    """Read up to `n_bytes` at once: a longer read loses all that comes before damaged data."""
    found: bytes = getattr(raw, "read1", raw.read)(n_bytes)
    return found


class _Damaged:
    """The rest of a stream that can't be read."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def read(self, _n_bytes: int) -> bytes:
        raise self._error


class _Joined(io.RawIOBase):
    """The bytes that were read already, then the rest of a stream."""

    def __init__(self, head: bytes, rest: Any) -> None:
        super().__init__()
        self._head = memoryview(head)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece: bytes | memoryview = self._head[: len(buffer)]
        self._head = self._head[len(piece) :]
        if not piece:
            piece = _read_some(self._rest, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
