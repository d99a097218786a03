"""SlotRemovals: remembers, for each namespace, the contents of slots and files that are gone.

1. When a file is evicted, or a slot's contents are replaced and no file has them, `note` writes a
   row for each of their first 16, 32, 64 … tokens: a short digest, the cause and the time.
2. When a prompt is reused no further, `find` returns the row of its longest such beginning.
3. `clear` drops the rows of a scope. Rows of contents that are saved again stay: they are read only
   where nothing holds as much of the prompt, and the next removal replaces them.

All digests have a random key. Rows of one namespace never displace those of another.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from tokcache.state.reasons import MissReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tokcache.text.token_ids import TokenIds

# The causes that are not the code of a refusal, and the reason that each is shown as.
_REASONS = {
    "max_bytes": (MissReason.EVICTED, "file: max_bytes"),
    "max_age_s": (MissReason.EXPIRED, "file: max_age_s"),
    "overwritten": (MissReason.EVICTED, "slot: n_slots"),
    "files_of_another_model": (MissReason.OTHER_FINGERPRINT, "model"),
}
N_ROWS, N_TABLES = 256, 64
FIRST_TOKENS = 16  # fewer, such as a BOS, are the same in unrelated prompts
_KEY_BYTES = 8


def reason_of_cause(cause: str) -> tuple[MissReason, str]:
    """Return the reason and the detail of a miss that a removal with this cause explains."""
    return _REASONS.get(cause, (MissReason.REFUSED, cause))


class Removal(NamedTuple):
    """The cause of a removal, and the time in seconds since the epoch.

    Units: at least `n_tokens` of the prompt were removed, which is a power of two.
    """

    cause: str
    n_tokens: int
    removed_at: float


@dataclass(slots=True)
class _Table:
    rows: OrderedDict[bytes, tuple[str, float]] = field(default_factory=OrderedDict)
    has_lost: bool = False


class SlotRemovals:
    """The tables of all namespaces; not thread-safe: callers hold the lock of the table of slots.

    Cost: one digest of the tokens for each removal, and for each prompt that is reused no further
          in a namespace of which something was removed.
    """

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._tables: OrderedDict[bytes, _Table] = OrderedDict()
        self._has_dropped = False

    def note(self, namespace: bytes, tokens: TokenIds, cause: str) -> None:
        """Remember that contents that began with `tokens` are gone."""
        if len(tokens) >= FIRST_TOKENS:
            self.note_places(namespace, self._places(namespace, tokens), cause)

    def note_places(
        self, namespace: bytes, places: Iterable[tuple[int, bytes]], cause: str
    ) -> None:
        """Remember that contents are gone whose beginnings have these lengths and digests."""
        table = self._tables.setdefault(namespace, _Table())
        self._tables.move_to_end(namespace)
        if len(self._tables) > N_TABLES:
            self._tables.popitem(last=False)
            self._has_dropped = True
        row = cause, time.time()
        for _, place in places:
            table.rows[place] = row
            table.rows.move_to_end(place)
        while len(table.rows) > N_ROWS:
            table.rows.popitem(last=False)
            table.has_lost = True

    def find(self, namespace: bytes, prompt: TokenIds) -> Removal | None:
        """Return the removal of the longest beginning of `prompt`, None if none was removed."""
        if namespace not in self._tables:
            return None
        return self.find_places(namespace, self._places(namespace, prompt))

    def find_places(self, namespace: bytes, places: Iterable[tuple[int, bytes]]) -> Removal | None:
        """Return the removal of the longest of these beginnings, None if none was removed."""
        table, found = self._tables.get(namespace), None
        for n_tokens, place in places:
            row = table.rows.get(place) if table is not None else None
            if row is not None:
                found = Removal(row[0], n_tokens, row[1])
        return found

    def has(self, namespace: bytes, tokens: TokenIds) -> bool:
        """Return whether the removal of these contents is remembered."""
        found = self.find(namespace, tokens)
        return found is not None and 2 * found.n_tokens > len(tokens)

    def has_forgotten(self, namespace: bytes) -> bool:
        """Return whether rows of this namespace may be lost."""
        table = self._tables.get(namespace)
        return self._has_dropped if table is None else table.has_lost

    def clear(self, is_doomed: Callable[[bytes], bool]) -> None:
        """Drop the tables of these namespaces."""
        for namespace in [each for each in self._tables if is_doomed(each)]:
            del self._tables[namespace]

    def _places(self, namespace: bytes, tokens: TokenIds) -> Iterator[tuple[int, bytes]]:
        """Yield the digests of the first 16, 32, 64 … tokens."""
        state = blake2b(namespace, key=self._key, digest_size=_KEY_BYTES)
        view, done, n_tokens = memoryview(tokens).cast("B"), 0, FIRST_TOKENS
        size = memoryview(tokens).itemsize
        while n_tokens <= len(tokens):
            state.update(view[done : n_tokens * size])
            yield n_tokens, state.digest()
            done, n_tokens = n_tokens * size, 2 * n_tokens
