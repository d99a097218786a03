"""What a server has shown to be true: counters, what it can do, which restores bring something."""

from __future__ import annotations

import logging
import operator
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache.errors import ServerError, ServerUnsupported

if TYPE_CHECKING:
    from tokcache.llama.server.results import SlotFile

_log = logging.getLogger(__name__)

# How a prompt continues a saved slot: after its last token, within its answer, within its prompt.
WHOLE, ANSWER, PROMPT = "whole", "answer", "prompt"
KINDS = frozenset({WHOLE, ANSWER, PROMPT})
_NOT_RESTORED = {
    WHOLE: "saved slots are no longer restored",
    ANSWER: "saved slots are no longer restored for prompts that continue within the saved answer",
    PROMPT: "saved slots are no longer restored for prompts that differ within the saved prompt",
}
_CHECKPOINTS = (
    "models with a sliding window, recurrent and hybrid ones continue a restored slot only at"
    " llama-server's context checkpoints: start it with --ctx-checkpoints 32, its default, or use"
    " tokcache.llama.Llama, which needs none"
)
_WITHOUT_CHECKPOINTS = (
    "models with a sliding window, recurrent and hybrid ones continue a restored slot only at"
    " llama-server's context checkpoints (--ctx-checkpoints 32), and those change in which pieces"
    " it decodes, so that texts are not reproducible; tokcache.llama.Llama has both"
)
# Refusals that someone can cure: what happens, and how it ends. Each is logged when it begins, and
# when it is over; the counters have every one.
_IDLE_SLOTS = (
    "send no other requests to these slots, and start llama-server with --no-cache-idle-slots: with"
    " a unified KV cache it empties the idle slots at every request"
)
CURES = {
    "slot_not_used_by_server": (
        "the server decoded again what a slot should hold",
        f"{_IDLE_SLOTS}; {_CHECKPOINTS}",
    ),
    "slot_changed_by_others": ("a slot held other tokens than were sent", _IDLE_SLOTS),
    "no_slot_save_path": (
        "slots are reused, but not saved",
        "start llama-server with --slot-save-path FOLDER",
    ),
    "save_failed": (
        "a slot could not be saved",
        "the server must be able to write to its --slot-save-path, and the disk must have room",
    ),
    "restore_failed": (
        "a saved slot could not be restored",
        "start llama-server with the options of the one that saved it, and leave its files alone",
    ),
    "erase_failed": ("a slot could not be erased", "the server's log says why"),
    "server_not_understood": (
        "its answers are not those of a llama-server; prompts are served without reuse",
        "the url must be a llama-server's own, of 2024 or later",
    ),
    "slots_not_told": ("the slots can't be listed", "start llama-server without --no-slots"),
    "file_over_budget": (
        "a saved slot is larger than all files may be, or than what pinned ones leave",
        "raise max_bytes of SlotSettings, or unpin conversations",
    ),
    "file_not_deleted": (
        "a file in slot_folder could not be deleted",
        "this process must be able to write to the folder",
    ),
    "folder_not_readable": (
        "slot_folder could not be read",
        "it must be the server's --slot-save-path, and readable for this process",
    ),
}
_N_GOOD_AGAIN = 8  # in a row: what fails now and then is one state, not many


class Trust:
    """Counts what happened, and stops restores that bring nothing.

    Verdicts are kept by adapters and by the way in which a prompt continues a saved slot; they
    hold for one model and one start of the server. A restore helped if the server then used at
    least half of the tokens: at its context checkpoints it uses fewer than prompt and slot have in
    common. A kind of restore stops once it has failed more often than it helped.

    Threads: safe.
    """

    def __init__(self, url: str, *, is_strict: bool, is_reproducible: bool = False) -> None:
        self._url = url
        self._is_strict = is_strict
        # A part is decoded in other pieces than those that were promised.
        self._is_enough = operator.le if is_reproducible else is_mostly_used
        self._advice = _WITHOUT_CHECKPOINTS if is_reproducible else _CHECKPOINTS
        self._lock = threading.Lock()
        self.refusals: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.seconds = {"restore": 0.0, "save": 0.0}
        self.can_save = True
        # What the last save wrote.
        self.saved: SlotFile | None = None
        # Whether the server was seen to go back to a context checkpoint.
        self.went_back = False
        self._verdicts: dict[tuple[bytes, str], _Verdict] = {}
        # Refusals that go on, with how often it went well since the last one.
        self._ongoing: dict[str, int] = {}

    def kinds(self, adapters: bytes) -> frozenset[str]:
        """Return for which prompts slots saved with `adapters` are restored; empty: for none."""
        if not self.can_save:
            return frozenset()
        stopped = {kind for kind in KINDS if self._is_stopped(adapters, kind)}
        return frozenset() if WHOLE in stopped else KINDS - stopped

    @property
    def kv_bytes_per_token(self) -> float | None:
        """What one token took in the last file, None before the first."""
        return self.saved.n_bytes / self.saved.n_tokens if self.saved else None

    def after_fork(self) -> None:
        """Renew the lock, which another thread may have held."""
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forget what holds for one model."""
        with self._lock:
            self.can_save, self.saved, self.went_back = True, None, False
            self._verdicts.clear()

    def restart(self) -> frozenset[bytes]:
        """Try again what one start of the server could not do.

        Returns the adapters whose saved slots were of use as a whole only: what that start of the
        server left out of their files is not there for the next one.
        """
        with self._lock:
            stopped = [key for key, verdict in self._verdicts.items() if verdict.is_stopped]
            self.can_save = True
            self._verdicts.clear()
        return frozenset(adapters for adapters, _ in stopped)

    def count(self, what: str, n: int = 1, seconds: float = 0.0) -> None:
        """Count something that was done."""
        with self._lock:
            self.counts[what] += n
            if what in self.seconds:
                self.seconds[what] += seconds

    def refuse(self, reason: str, n: int = 1, error: ServerError | None = None) -> None:
        """Count something that was not done; log it if that is new and can be cured."""
        if not n:
            return
        with self._lock:
            self.refusals[reason] += n
            is_new = reason in CURES and reason not in self._ongoing
            if reason in CURES:
                self._ongoing[reason] = 0
        if is_new:
            what, cure = CURES[reason]
            found = f" ({error})" if error else ""
            _log.warning("%s: %s%s; %s [%s]", self._url, what, found, cure, reason)

    def went_well(self, *reasons: str) -> None:
        """Note that something was done that is refused for `reasons` at other times."""
        if not self._ongoing:
            return
        over = []
        with self._lock:
            for reason in self._ongoing.keys() & set(reasons):
                self._ongoing[reason] += 1
                if self._ongoing[reason] >= _N_GOOD_AGAIN:
                    del self._ongoing[reason]
                    over.append(reason)
        for reason in over:
            _log.info("%s: over: %s [%s]", self._url, CURES[reason][0], reason)

    def degrade(self, reason: str, error: ServerError) -> None:
        """Count an error and go on without reuse, unless errors are to be raised."""
        if isinstance(error, ServerUnsupported) and self.can_save and "/slots/" in str(error):
            self.can_save = False
            reason = "no_slot_save_path"
        self.refuse(reason, error=error)
        if self._is_strict:
            raise error

    def verify(self, adapters: bytes, kind: str, n_promised: int, n_used: int) -> bool:
        """Compare a restore's tokens with those used; return whether all restoring ends."""
        with self._lock:
            verdict = self._verdicts.setdefault((adapters, kind), _Verdict())
            if self._is_enough(n_promised, n_used):
                verdict.n_helped += 1
                return False
            verdict.n_failed += 1
            self.refusals["restore_not_used_by_server"] += 1
            if verdict.is_stopped or verdict.n_failed <= verdict.n_helped:
                return False
            verdict.is_stopped = True
        _log.warning(
            "%s: %s%s, for the server used %d of the %d tokens of the last one; %s",
            self._url,
            _NOT_RESTORED[kind],
            _with_adapters(adapters),
            n_used,
            n_promised,
            self._advice,
        )
        return kind == WHOLE

    def _is_stopped(self, adapters: bytes, kind: str) -> bool:
        verdict = self._verdicts.get((adapters, kind))
        return verdict is not None and verdict.is_stopped


@dataclass(slots=True)
class _Verdict:
    n_helped: int = 0
    n_failed: int = 0
    is_stopped: bool = False


def is_mostly_used(n_promised: int, n_used: int) -> bool:
    """Return whether a server used what a slot held; at checkpoints it uses a part of it."""
    return 2 * n_used >= n_promised


def _with_adapters(adapters: bytes) -> str:
    return "" if adapters == b"null" else f" with lora {adapters.decode()}"
