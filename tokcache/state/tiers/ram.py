"""RamTier: payloads in memory, in buffers that are used again.

A fresh buffer costs a page fault for every 4 KiB it is filled with, more than the copy itself.
The buffers of evicted blocks therefore wait for the next block of their size; they count as held.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

Buffer = memoryview


class RamTier:
    """Payloads by block or snapshot, and a pool of buffers; not thread-safe: the store locks.

    A buffer is lent while it is being filled, and while a restore still reads an evicted payload.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, Buffer] = {}
        self._pool: dict[int, list[Buffer]] = {}
        self._lent: dict[int, Buffer] = {}
        self._views: dict[int, list[weakref.ref[Any]]] = {}
        self._n_bytes = 0

    def get(self, key: Hashable) -> Buffer | None:
        """Return the payload itself, None if it is not held."""
        return self._held.get(key)

    def view(self, key: Hashable) -> Buffer | None:
        """Return the payload read-only; it stays valid while the view, or a part of it, is kept.

        Its buffer is not used again as long: the view would show another state's bytes.
        """
        payload = self._held.get(key)
        if payload is None or not payload.nbytes:
            return payload
        import numpy as np  # noqa: PLC0415 (its array can be asked whether it is still in use)

        array = np.frombuffer(payload, np.uint8)
        array.flags.writeable = False
        kept = [one for one in self._views.get(id(payload), ()) if one() is not None]
        self._views[id(payload)] = [*kept, weakref.ref(array)]
        return array.data

    def put(self, key: Hashable, payload: Buffer) -> None:
        """Hold a buffer that `take` returned and that is filled now."""
        if self._lent.pop(id(payload), None) is None:
            self._n_bytes += payload.nbytes
        self._held[key] = payload

    def remove(self, key: Hashable) -> None:
        """Put the payload's buffer into the pool."""
        payload = self.lend(key)
        if payload is not None:
            self.give_back(payload)

    def lend(self, key: Hashable) -> Buffer | None:
        """Take a payload out while a reader has it; its bytes still count."""
        payload = self._held.pop(key, None)
        if payload is not None:
            self._lent[id(payload)] = payload
        return payload

    def take(self, n_bytes: int) -> Buffer:
        """Return a buffer to fill, from the pool if one has this size."""
        pooled = self._pool.get(n_bytes)
        if pooled:
            buffer = pooled.pop()
            if not pooled:
                del self._pool[n_bytes]
        else:
            # It takes 60 ms of `import tokcache`; only NumPy gives memory that is not filled.
            import numpy as np  # noqa: PLC0415

            buffer = np.empty(n_bytes, np.uint8).data
            self._n_bytes += n_bytes
        self._lent[id(buffer)] = buffer
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """Put a lent buffer into the pool, or leave it to the views that are still kept."""
        views = self._views.pop(id(buffer), ())
        if self._lent.pop(id(buffer), None) is None:
            return
        if any(one() is not None for one in views):
            self._n_bytes -= buffer.nbytes
        else:
            self._pool.setdefault(buffer.nbytes, []).append(buffer)

    def has_pooled(self, n_bytes: int) -> bool:
        """Return whether `take(n_bytes)` needs no new memory."""
        return n_bytes in self._pool

    def drop_pooled(self) -> bool:
        """Free one waiting buffer; False if there is none."""
        if not self._pool:
            return False
        n_bytes, buffers = next(iter(self._pool.items()))
        buffers.pop()
        self._n_bytes -= n_bytes
        if not buffers:
            del self._pool[n_bytes]
        return True

    def drop_lent(self) -> None:
        """Drop buffers whose users do not exist any more: after a fork, the other threads."""
        self._n_bytes -= sum(buffer.nbytes for buffer in self._lent.values())
        for lent in self._lent:
            self._views.pop(lent, None)
        self._lent.clear()

    def memory_usage(self) -> int:
        """Return the bytes of all buffers: held, lent and waiting."""
        return self._n_bytes

    def names(self) -> set[Hashable]:
        """Return the blocks and snapshots whose payloads are held."""
        return set(self._held)

    def _check(self) -> None:
        pooled = [b for buffers in self._pool.values() for b in buffers]
        everything = [*self._held.values(), *self._lent.values(), *pooled]
        if len(set(map(id, everything))) != len(everything):
            raise AssertionError("a buffer is in two places")
        if sum(b.nbytes for b in everything) != self._n_bytes:
            raise AssertionError("bytes miscounted")
        if not all(self._pool.values()):
            raise AssertionError("an empty list in the pool")
