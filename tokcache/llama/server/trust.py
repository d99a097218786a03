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


class Trust:
    """Counts what happened, and stops restores that bring nothing.

    Verdicts are kept by adapters and by the way in which a prompt continues a saved slot; they
    hold for one model and one start of the server. A restore helped if the server then used at
    least half of the tokens: at its context checkpoints it uses fewer than prompt and slot have in
    common. A kind of restore stops once it has failed more often than it helped.

    Threads: safe.
    """

    def __init__(
        self, url: str, refusals: Counter[str], *, is_strict: bool, is_reproducible: bool = False
    ) -> None:
        self._url = url
        self._is_strict = is_strict
        # A part is decoded in other pieces than those that were promised.
        self._is_enough = operator.le if is_reproducible else is_mostly_used
        self._advice = _WITHOUT_CHECKPOINTS if is_reproducible else _CHECKPOINTS
        self._lock = threading.Lock()
        self.refusals = refusals
        self.counts: Counter[str] = Counter()
        self.seconds = {"restore": 0.0, "save": 0.0}
        self.can_save = True
        # What the last save wrote.
        self.saved: SlotFile | None = None
        # Whether the server was seen to go back to a context checkpoint.
        self.went_back = False
        self._verdicts: dict[tuple[bytes, str], _Verdict] = {}

    def kinds(self, adapters: bytes) -> frozenset[str]:
        """Return for which prompts slots saved with `adapters` are restored; empty: for none."""
        if not self.can_save:
            return frozenset()
        stopped = {kind for kind in KINDS if self._is_stopped(adapters, kind)}
        return frozenset() if WHOLE in stopped else KINDS - stopped

    @property
    def token_bytes(self) -> float | None:
        """What one token took in the last file, None before the first."""
        return self.saved.n_bytes / self.saved.n_tokens if self.saved else None

    def after_fork(self) -> None:
        """Renew the lock, which another thread may have held."""
        self._lock = threading.Lock()

    def learn_anew(self) -> None:
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
