"""What a server has shown to be true: counters, what it can do, which restores bring something."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING

from tokcache.errors import ServerError, ServerUnsupported

if TYPE_CHECKING:
    from tokcache.llama.server.results import SlotFile

_log = logging.getLogger(__name__)
_ADVICE = (
    "llama-server uses nothing of a saved slot on models with a sliding window, recurrent or hybrid"
    " ones; tokcache.llama.Llama restores those in process"
)


class Trust:
    """Counts what happened, and stops what brings nothing.

    A restore is "whole" if the prompt goes on where the saved slot ended, else "partial"; hybrid
    models can do the first alone. Each kind stops once it has failed more often than helped.

    Threads: safe.
    """

    def __init__(self, url: str, refusals: Counter[str], *, is_strict: bool) -> None:
        self._url = url
        self._is_strict = is_strict
        self._lock = threading.Lock()
        self.refusals = refusals
        self.counts: Counter[str] = Counter()
        self.seconds = {"restore": 0.0, "save": 0.0}
        self.can_save = True
        # What the last save wrote.
        self.saved: SlotFile | None = None
        self._stopped: set[str] = set()
        self._helped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()

    @property
    def may_restore(self) -> bool:
        """Whether saved slots are of use."""
        return self.can_save and "whole" not in self._stopped

    @property
    def token_bytes(self) -> float | None:
        """What one token took in the last file, None before the first."""
        return self.saved.n_bytes / self.saved.n_tokens if self.saved else None

    @property
    def is_whole_only(self) -> bool:
        """Whether only prompts that go on where a saved slot ended profit."""
        return "partial" in self._stopped

    def after_fork(self) -> None:
        """Renew the lock, which another thread may have held."""
        self._lock = threading.Lock()

    def learn_anew(self) -> None:
        """Forget what holds for one model or one start of the server."""
        with self._lock:
            self.can_save, self.saved = True, None
            for learnt in (self._stopped, self._helped, self._failed):
                learnt.clear()

    def count(self, what: str, n: int = 1, seconds: float = 0.0) -> None:
        """Count something that was done."""
        with self._lock:
            self.counts[what] += n
            if what in self.seconds:
                self.seconds[what] += seconds

    def refuse(self, reason: str, n: int = 1) -> None:
        """Count something that was not done."""
        if n:
            with self._lock:
                self.refusals[reason] += n

    def degrade(self, reason: str, error: ServerError) -> None:
        """Count an error and go on without reuse, unless errors are to be raised."""
        if isinstance(error, ServerUnsupported) and self.can_save and "/slots/" in str(error):
            self.can_save = False
            reason = "no_slot_save_path"
            _log.warning("%s; slots are reused, but not saved", error)
        self.refuse(reason)
        if self._is_strict:
            raise error

    def verify(self, kind: str, n_promised: int, n_used: int) -> bool:
        """Compare what a restore promised with what was used; return whether all restoring ends."""
        with self._lock:
            if n_used >= n_promised:
                self._helped[kind] += 1
                return False
            self._failed[kind] += 1
            self.refusals["restore_not_used_by_server"] += 1
            if self._failed[kind] <= self._helped[kind] or kind in self._stopped:
                return False
            self._stopped.add(kind)
        _log.warning(
            "%s: %s saved slots are no longer restored, for the server used less than it had"
            " restored; %s",
            self._url,
            "all" if kind == "whole" else "partly matching",
            _ADVICE,
        )
        return kind == "whole"
