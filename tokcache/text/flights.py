"""Flights: a text that many ask for at the same time is encoded once.

1. `claim` returns the ids if L0 has them by now, a Future if another thread encodes the text, or
   None: the caller encodes it, and must then call `land` or `fail`.
2. `land` gives the ids to everyone who waits. The caller has stored them in L0 before, so that
   whoever claims the text later finds them there.
3. `fail` gives everyone the error, if it is about this text alone. If the text was one of a batch,
   they get Abandoned and claim the text again.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from tokcache.errors import Abandoned

if TYPE_CHECKING:
    import threading
    from collections import Counter
    from collections.abc import Callable, Sequence

    from tokcache.text._implementation import TokenIds

# A text, add_special_tokens, its scope, and how often a scope had been cleared when the call began:
# a call from before a clear shares nothing with a call from after it.
Key = tuple[str, bool, str | None, int]


class Flights:
    """The texts that are being encoded now, under one configuration of a tokenizer.

    `get` looks a text up in L0 that missed before. `counts` gets "shared", the claims that waited
    for another thread; `lock` guards it, and the flights.

    Threads: safe.
    """

    def __init__(
        self,
        get: Callable[[str, bool, str | None], TokenIds | None],
        counts: Counter[str],
        lock: threading.Lock,
    ) -> None:
        self._get = get
        self._counts = counts
        self._lock = lock
        # The Future is made by the second asker; most texts have only one.
        self._waited_for: dict[Key, Future[TokenIds] | None] = {}

    def claim(
        self, key: Key, flight: Future[TokenIds] | None = None
    ) -> TokenIds | Future[TokenIds] | None:
        """Return the ids, the Future of the thread that encodes the text, or None: encode it.

        A caller that waits for itself (because a thread of a pool will encode) passes the `flight`.
        """
        with self._lock:
            if key in self._waited_for:
                self._counts["shared"] += 1
                found = self._waited_for[key] = self._waited_for[key] or new_flight()
                return found
            ids = self._get(*key[:3])  # the text may have landed since the caller's look-up
            if ids is None:
                self._waited_for[key] = flight
            return ids

    def land(self, keys: Sequence[Key], made: Sequence[TokenIds]) -> None:
        """Give the ids of claimed texts to everyone who waits for them."""
        for future, ids in zip(self._end(keys), made, strict=True):
            if future is not None:
                future.set_result(ids)

    def fail(self, keys: Sequence[Key], error: BaseException) -> None:
        """Fail everyone who waits for claimed texts."""
        is_own = len(keys) == 1 and isinstance(error, Exception)
        for future in self._end(keys):
            if future is not None:
                future.set_exception(error if is_own else Abandoned())

    def _end(self, keys: Sequence[Key]) -> list[Future[TokenIds] | None]:
        with self._lock:
            return [self._waited_for.pop(key, None) for key in keys]


def new_flight() -> Future[TokenIds]:
    """Return a Future that runs already, so that one waiter can't cancel it for the others."""
    future: Future[TokenIds] = Future()
    future.set_running_or_notify_cancel()
    return future
