"""Counters, and the evidence of whether a server can save slots and uses restored ones."""

from __future__ import annotations

import logging
import operator
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache.errors import ServerError, ServerUnsupported
from tokcache.llama.server.checkpoints import ANY_DISTANCE

if TYPE_CHECKING:
    from tokcache.llama.server.results import SlotFile
    from tokcache.state.reasons import Miss

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
    "models with a sliding window, recurrent and hybrid models continue a restored slot only at"
    " llama-server's context checkpoints: start it with --ctx-checkpoints 32, its default, or use"
    " tokcache.llama.Llama, which needs no checkpoints"
)
_WITHOUT_CHECKPOINTS = (
    "models with a sliding window, recurrent and hybrid models continue a restored slot only at"
    " llama-server's context checkpoints (--ctx-checkpoints 32), but those change the pieces in"
    " which it decodes, so texts are not reproducible; tokcache.llama.Llama has no such limit"
)
# Refusals that the operator can end: the effect and the cure. The log has the first one and the end
# of a series; the counters have every one.
_IDLE_SLOTS = (
    "send no other requests to these slots, and start llama-server with --no-cache-idle-slots: with"
    " a unified KV cache it empties the idle slots at every request"
)
CURES = {
    "slot_not_used_by_server": (
        "the server decoded tokens again that a slot should hold",
        f"{_IDLE_SLOTS}; {_CHECKPOINTS}",
    ),
    "slot_changed_by_others": ("a slot held other tokens than those we sent", _IDLE_SLOTS),
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
        "start llama-server with the options that it had when it saved, and keep its files as is",
    ),
    "erase_failed": ("a slot could not be erased", "the server's log says why"),
    "server_not_understood": (
        "its answers are not those of a llama-server; prompts are served without reuse",
        "the url must be that of a llama-server of 2024 or later",
    ),
    "slots_not_listed": ("the slots can't be listed", "start llama-server without --no-slots"),
    "file_over_budget": (
        "a saved slot does not fit max_bytes besides the pinned ones",
        "raise max_bytes of SlotSettings, or unpin conversations",
    ),
    "file_not_deleted": (
        "a file in slot_folder could not be deleted",
        "this process must be able to write to the folder",
    ),
    "disk_unreadable": (
        "the size of slot_folder's disk could not be read again; its last size stays the budget's",
        "look at that disk, or give max_bytes of SlotSettings in bytes",
    ),
    "folder_not_readable": (
        "slot_folder could not be read",
        "it must be the server's --slot-save-path, and readable for this process",
    ),
}
_MAX_APART = 64  # tokens: a prompt's end that a chat template writes is no longer
_MUCH = 16  # tokens
_N_GOOD_AGAIN = 8  # successes in a row that end a series, so that rare failures are one series


class Trust:
    """Counts events, and stops restores that the server does not use.

    Verdicts are kept for each set of adapters and each way to continue a saved slot; they hold for
    one model and one start of the server. A restore helped if the server then used at least half of
    its tokens: if it goes back to a context checkpoint, it uses fewer than prompt and slot have in
    common. A kind of restore stops once it has failed more often than it helped. One that failed
    where no prompt's end, and so perhaps no checkpoint, was near says nothing of others: only those
    at the same distance or farther stop (`too_far`).

    Threads: safe.
    """

    def __init__(self, url: str, *, is_strict: bool, is_reproducible: bool = False) -> None:
        self._url = url
        self._is_strict = is_strict
        # Reproducible mode needs all tokens: after a part of them, the pieces would differ.
        self._is_enough = operator.le if is_reproducible else is_mostly_used
        self._advice = _WITHOUT_CHECKPOINTS if is_reproducible else _CHECKPOINTS
        self._lock = threading.Lock()
        self.refusals: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.missed_tokens: Counter[str] = Counter()
        self.seconds = {"restore": 0.0, "save": 0.0}
        self.can_save = True
        # The file of the last save.
        self.saved: SlotFile | None = None
        # Whether the server ever went back to a context checkpoint.
        self.went_back = False
        self._verdicts: dict[tuple[bytes, str], _Verdict] = {}
        self._too_far: dict[bytes, int] = {}
        self._n_apart: dict[bytes, int] = {}
        # Series of refusals, with the number of successes since the last one.
        self._ongoing: dict[str, int] = {}

    def kinds(self, adapters: bytes) -> frozenset[str]:
        """Return the ways to continue slots saved with `adapters` that are still restored."""
        if not self.can_save:
            return frozenset()
        verdicts = {kind: self._verdicts.get((adapters, kind)) for kind in KINDS}
        stopped = {kind for kind, verdict in verdicts.items() if verdict and verdict.is_stopped}
        return frozenset() if WHOLE in stopped else KINDS - stopped

    def n_apart(self, adapters: bytes) -> int:
        """Return how many tokens before its end a prompt is best decoded alone; 0 for nowhere."""
        return self._n_apart.get(adapters, 0)

    def note_parting(self, adapters: bytes, n_from_end: int, n_lost: int) -> None:
        """Note that a prompt differed `n_from_end` tokens before a saved one's end.

        If the server then went far back, that is likely to come again: a chat template that ends
        prompts with text that it writes otherwise later has all prompts differ there.

        Units: `n_lost` tokens before that place were decoded again.
        """
        if 0 < n_from_end <= _MAX_APART and n_lost > _MUCH:
            with self._lock:
                known = self._n_apart.get(adapters, 0)
                self._n_apart[adapters] = max(known, n_from_end)

    def too_far(self, adapters: bytes) -> int:
        """Return the tokens before a prompt's end from which on restores were not used."""
        return self._too_far.get(adapters, ANY_DISTANCE)

    @property
    def kv_bytes_per_token(self) -> float | None:
        """Bytes per token in the last file, None before the first."""
        return self.saved.n_bytes / self.saved.n_tokens if self.saved else None

    def after_fork(self) -> None:
        """Replace the lock, which another thread may have held."""
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Reset everything that was learned about the model."""
        with self._lock:
            self.can_save, self.saved, self.went_back = True, None, False
            self._verdicts.clear()
            self._too_far.clear()
            self._n_apart.clear()

    def restart(self) -> frozenset[bytes]:
        """Reset the verdicts, because the server was restarted, maybe with other options.

        Returns the adapters with files that can only be used as a whole: the server wrote them
        without the checkpoints that a partial use needs.
        """
        with self._lock:
            stopped = [key for key, verdict in self._verdicts.items() if verdict.is_stopped]
            self.can_save = True
            self._verdicts.clear()
            self._too_far.clear()
            self._n_apart.clear()
        return frozenset(adapters for adapters, _ in stopped)

    def count(self, name: str, n: int = 1, seconds: float = 0.0) -> None:
        """Add to the counter `name`, and to its seconds."""
        with self._lock:
            self.counts[name] += n
            if name in self.seconds:
                self.seconds[name] += seconds

    def count_miss(self, miss: Miss) -> None:
        """Count a prompt of which the server decoded more than its last token."""
        with self._lock:
            self.misses[miss.reason] += 1
            self.missed_tokens[miss.reason] += miss.n_missed

    def refuse(self, reason: str, n: int = 1, error: ServerError | None = None) -> None:
        """Count a refusal; log it if it begins a series that the operator can end."""
        if not n:
            return
        with self._lock:
            self.refusals[reason] += n
            is_new = reason in CURES and reason not in self._ongoing
            if reason in CURES:
                self._ongoing[reason] = 0
        if is_new:
            effect, cure = CURES[reason]
            found = f" ({error})" if error else ""
            _log.warning("%s: %s%s; %s [%s]", self._url, effect, found, cure, reason)

    def went_well(self, *reasons: str) -> None:
        """Count a success of a step that `reasons` refuse at other times; log a series' end."""
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
        """Count an error; raise it if the settings say so, else go on without reuse."""
        if isinstance(error, ServerUnsupported) and self.can_save and "/slots/" in str(error):
            self.can_save = False
            reason = "no_slot_save_path"
        self.refuse(reason, error=error)
        if self._is_strict:
            raise error

    def verify(
        self, adapters: bytes, kind: str, n_promised: int, n_used: int, n_before: int = 0
    ) -> bool:
        """Record how much of a restore was used; return whether all restores stop now.

        Units: the prompt differed `n_before` tokens before the next end of a prompt in the file, 0
               if one was near before.
        """
        with self._lock:
            verdict = self._verdicts.setdefault((adapters, kind), _Verdict())
            if self._is_enough(n_promised, n_used):
                verdict.n_helped += 1
                return False
            self.refusals["restore_not_used_by_server"] += 1
            if n_before:
                self._too_far[adapters] = min(self.too_far(adapters), n_before)
                return False
            verdict.n_failed += 1
            if verdict.is_stopped or verdict.n_failed <= verdict.n_helped:
                return False
            verdict.is_stopped = True
        _log.warning(
            "%s: %s%s, because the server used %d of the %d tokens of the last one; %s",
            self._url,
            _NOT_RESTORED[kind],
            "" if adapters == b"null" else f" with lora {adapters.decode()}",
            n_used,
            n_promised,
            self._advice,
        )
        return kind == WHOLE


@dataclass(slots=True)
class _Verdict:
    n_helped: int = 0
    n_failed: int = 0
    is_stopped: bool = False


def is_mostly_used(n_promised: int, n_used: int) -> bool:
    """Return whether a server used most of a slot; going back to a checkpoint loses some."""
    return 2 * n_used >= n_promised
