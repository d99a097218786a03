"""MemoryNotices: a line in the log, once a model, for states larger than memory may be."""

from __future__ import annotations

import contextlib
import logging
from collections import deque

from tokcache.state.tiers.notices import Notices

_log = logging.getLogger("tokcache")


class MemoryNotices(Notices):
    """The states that were over the budget.

    Units:  `ram_bytes` bytes that memory may retain.
    Threads: safe.
    """

    def __init__(self, ram_bytes: int) -> None:
        super().__init__()
        self._ram_bytes = ram_bytes
        self._unlogged: deque[tuple[str, str, str]] = deque()

    def oversize(self, fingerprint: bytes, n_tokens: int, n_bytes: int) -> None:
        """Note a state over the budget; the store's lock may be held."""
        if self.is_first(fingerprint):
            self._unlogged.append((f"{n_tokens:,}", f"{n_bytes:,}", f"{self._ram_bytes:,}"))

    def log(self) -> None:
        """Log the noted states; the store's lock must be free: a log handler may need it."""
        while self._unlogged:
            with contextlib.suppress(IndexError):  # another thread was faster
                _log.warning(
                    "the state of a prompt of %s tokens takes %s bytes, more than ram_bytes=%s: "
                    "prompts that long are not stored; raise ram_bytes (logged once a model)",
                    *self._unlogged.popleft(),
                )
