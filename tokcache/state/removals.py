"""Removals: remembers, for each namespace, the states that were removed or could not be stored.

1. When a block is evicted or expires, or has no room, `note` writes a row into the table of its
   namespace: a short digest of the place where the block starts (the prefix before it and its first
   token), its length, the cause and the time.
2. When a look-up ends at such a place, `find` returns the row.
3. `note_snapshot` and `find_snapshot` do the same for snapshots, by the digest of all their tokens.
4. `forget` drops the tables of a scope that is cleared.

Implementation: a table is a ring of fixed length, so the oldest row goes first, and rows of one
namespace never displace those of another. A row has digests of the block's first 16, 64, 256 and
1,024 tokens and of all of them, so that a prompt that continues in another way is not taken for the
one that was removed. All digests have a random key: they are of no use outside this process.
"""

from __future__ import annotations

import secrets
import struct
import time
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from tokcache.state.names import TOKEN_BYTES, child_name
from tokcache.state.snapshot_index import prefix_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokcache.state.names import RootKey

N_ROWS, N_TABLES = 128, 64
_CHECKED = (16, 64, 256, 1024)  # and all of the block's tokens
_KEY_BYTES = 8
_MAX_BLOCKS = 16
_ROW = struct.Struct("<IdBBB5I")
MAX_BYTES = N_TABLES * N_ROWS * (_KEY_BYTES + _ROW.size)
"""The most that all rows take, besides `ram_bytes`: 344 KiB."""

CAUSES = (
    "ram_bytes",
    "max_entries",
    "ttl_s",
    "over_budget",
    "entries_in_use",
    "blocks_in_use",
    "save_failed",
    "queue_full",
    "conversation_snapshots",
)
_OF_MEMORY = CAUSES[:3]


class Removal(NamedTuple):
    """The cause, and the time in seconds since the epoch.

    `written`: the tiers that had the state then, one bit each.

    Units: `n_tokens` of the prompt that were removed, at least; `n_most`, at most.
    """

    cause: str
    n_tokens: int
    n_most: int
    removed_at: float
    written: int


class Removals:
    """The tables of all namespaces; not thread-safe: the store holds its lock.

    Cost: nothing before the first removal; then two digests of a place and up to five of a block's
          tokens, for each removal and each look-up that ends early.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._tables: OrderedDict[tuple[bytes, str | None, str], _Table] = OrderedDict()
        self._has_dropped = False

    def note(
        self,
        root_key: RootKey,
        point: bytes,
        tokens: bytes,
        cause: str,
        *,
        grain: int,
        written: int = 0,
    ) -> None:
        """Remember that the block of `tokens` after `point` was removed or not stored."""
        table = self._table(root_key)
        lengths = [n * TOKEN_BYTES for n in _CHECKED]
        checks = [self._check(tokens[:n]) if n < len(tokens) else 0 for n in lengths]
        checks.append(self._check(tokens))
        n_tokens, number = len(tokens) // TOKEN_BYTES, CAUSES.index(cause)
        place, is_shared = self._place(point, tokens[:grain]), False
        before = table.get(place)
        if before is not None:
            old = _ROW.unpack(before)
            is_same = (old[0], *old[5:]) == (n_tokens, *checks)
            is_shared = old[4] or not is_same
            if is_same:
                number = _lasting(number, written, old)
        row = _ROW.pack(n_tokens, time.time(), number, written, is_shared, *checks)
        table.put(place, row)

    def _table(self, root_key: RootKey) -> _Table:
        """Return the table of a namespace, which is the last to be dropped from now on."""
        name = root_key[:3]
        table = self._tables.get(name)
        if table is None:
            table = self._tables[name] = _Table()
            if len(self._tables) > N_TABLES:
                self._tables.popitem(last=False)
                self._has_dropped = True
        self._tables.move_to_end(name)
        return table

    def note_snapshot(
        self, root_key: RootKey, name: bytes, n_tokens: int, cause: str, *, written: int = 0
    ) -> None:
        """Remember that the snapshot of this name was removed or not stored."""
        table, place = self._table(root_key), self._place(name, b"")
        number, before = CAUSES.index(cause), table.get(place)
        if before is not None:
            number = _lasting(number, written, _ROW.unpack(before))
        table.put(place, _ROW.pack(n_tokens, time.time(), number, written, False, 0, 0, 0, 0, 0))

    def find_snapshot(self, root_key: RootKey, tokens: bytes, n_above: int) -> Removal | None:
        """Return the removal of the longest snapshot of over `n_above` tokens of `tokens`."""
        found, table = None, self._tables.get(root_key[:3])
        if table is None:
            return None
        n_wanted = len(tokens) // TOKEN_BYTES
        lengths = sorted({row[0] for row in table.rows() if n_above < row[0] <= n_wanted})
        for n_tokens, name in prefix_names(root_key, tokens, lengths):
            row = table.get(self._place(name, b""))
            if row is not None:
                _, removed_at, number, written, *_ = _ROW.unpack(row)
                n_removed = n_tokens - n_above
                found = Removal(CAUSES[number], n_removed, n_removed, removed_at, written)
        return found

    def has(self, root_key: RootKey) -> bool:
        """Return whether a state of this namespace was removed, and that is remembered."""
        return bool(self._tables) and root_key[:3] in self._tables

    def find(self, root_key: RootKey, point: bytes, rest: bytes, grain: int) -> Removal | None:
        """Return the removal of the block after `point` that `rest` begins with.

        `n_tokens` counts the blocks that followed it and were removed too, up to 16.
        """
        first, table = None, self._tables.get(root_key[:3])
        n_tokens = n_most = 0
        for _ in range(_MAX_BLOCKS if table is not None else 0):
            row = table.get(self._place(point, rest[:grain])) if table is not None else None
            if row is None or not rest:
                break
            n_block, removed_at, number, written, is_shared, *checks = _ROW.unpack(row)
            first = first or Removal(CAUSES[number], 0, 0, removed_at, written)
            n_same, n_upper = self._n_same(n_block, checks, rest)
            # Another block that was removed at this place may have more tokens in common.
            n_most = n_tokens + (len(rest) // TOKEN_BYTES if is_shared else n_upper)
            n_tokens += n_same
            if n_same < n_block:
                break
            point = child_name(point, rest[: n_block * TOKEN_BYTES])
            rest = rest[n_block * TOKEN_BYTES :]
        return None if first is None else first._replace(n_tokens=n_tokens, n_most=n_most)

    def _n_same(self, n_block: int, checks: list[int], rest: bytes) -> tuple[int, int]:
        """Return how many tokens of a removed block `rest` begins with: at least, and at most."""
        lengths = [n for n in _CHECKED if n < n_block]
        n_same = 0
        for n, check in [*zip(lengths, checks, strict=False), (n_block, checks[-1])]:
            tokens = rest[: n * TOKEN_BYTES]
            if len(tokens) < n * TOKEN_BYTES:
                return n_same, len(tokens) // TOKEN_BYTES
            if self._check(tokens) != check:
                return n_same, n - 1
            n_same = n
        return n_same, n_same

    def has_forgotten(self, root_key: RootKey) -> bool:
        """Return whether rows of this namespace may be lost."""
        table = self._tables.get(root_key[:3]) if self._tables else None
        return self._has_dropped if table is None else table.has_lost

    def forget(self, is_doomed: Callable[[str | None], bool]) -> None:
        """Drop the tables of these scopes."""
        for name in [name for name in self._tables if is_doomed(name[1])]:
            del self._tables[name]

    def reset(self, *, has_dropped: bool = False) -> None:
        """Forget everything; `has_dropped`: states were removed that no row remembers."""
        self._tables.clear()
        self._has_dropped = has_dropped

    def _place(self, point: bytes, head: bytes) -> bytes:
        return blake2b(point + head, digest_size=_KEY_BYTES, key=self._key).digest()

    def _check(self, tokens: bytes) -> int:
        return int.from_bytes(blake2b(tokens, digest_size=4, key=self._key).digest(), "little")


def _lasting(number: int, written: int, before: tuple[int, ...]) -> int:
    """Return the cause of a removal, after another one of the same state: of both, the first.

    If a tier's queue was full, and the tier did not get the state later, that is why no copy of an
    evicted state is left.
    """
    is_unwritten = CAUSES[before[2]] == "queue_full" and before[3] == written
    return before[2] if is_unwritten and CAUSES[number] in _OF_MEMORY else number


class _Table:
    """A ring of rows, found by their keys."""

    __slots__ = ("_keys", "_next", "_rows", "has_lost")

    def __init__(self) -> None:
        self._keys, self._rows = bytearray(), bytearray()
        self._next = 0  # the row that is written next
        self.has_lost = False

    def _index(self, key: bytes) -> int:
        """Return the number of the row with this key, -1 without one."""
        at = self._keys.find(key)
        while at > 0 and at % _KEY_BYTES:  # it lies across two keys
            at = self._keys.find(key, at + 1)
        return at // _KEY_BYTES

    def get(self, key: bytes) -> bytes | None:
        """Return the row with this key."""
        n = self._index(key)
        return None if n < 0 else bytes(self._rows[n * _ROW.size : (n + 1) * _ROW.size])

    def rows(self) -> Iterator[tuple[int, ...]]:
        """Return the rows, unpacked."""
        return _ROW.iter_unpack(self._rows)

    def put(self, key: bytes, row: bytes) -> None:
        """Write a row, in the place of one with the same key, or of the oldest."""
        n = self._index(key)
        if n < 0:
            n, self._next = self._next, (self._next + 1) % N_ROWS
            self.has_lost |= n * _KEY_BYTES < len(self._keys)
        self._keys[n * _KEY_BYTES : (n + 1) * _KEY_BYTES] = key
        self._rows[n * _ROW.size : (n + 1) * _ROW.size] = row
