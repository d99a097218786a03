"""SlotMisses: finds why a llama-server decoded tokens of a prompt that it might have held.

1. When a prompt gets a slot that does not hold all of it, `parting` looks for the slot or file of
   its namespace that shares most tokens with it. This is done before the slot is changed.
2. After the answer, `find` compares that with the number of tokens that the server reused.

The first of these that is true is the reason:

1. The answers were not those of a llama-server, or the chosen file could not be restored.
2. The server decoded tokens again that its slot should have held: most of those missed.
3. Another slot or a file holds more of the prompt, but cannot be used: the slot is busy, or such
   files are no longer restored.
4. This client removed contents that begin with more of the prompt, or could not save them.
5. The nearest contents go on with other tokens: a different text, or the ids of an answer whose
   text was encoded again.
6. The scope has the prompt's beginning with other adapters.
7. Some removals of the scope are no longer remembered, so the reason is not known.
8. This client never had more of the prompt in this scope.

Nothing here looks at the contents of another scope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cachetools import LRUCache

from tokcache._prefix import n_common
from tokcache.llama.server.job import Parting
from tokcache.llama.server.namespaces import adapters_of, scope_of
from tokcache.llama.server.removals import FIRST_TOKENS, reason_of_cause
from tokcache.llama.server.slot import Condition, SlotRecord
from tokcache.state.reasons import Miss, MissReason
from tokcache.state.tiers.backoff import Speed
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokcache.llama.server.job import Job
    from tokcache.llama.server.shelf import SavedSlot, Shelf
    from tokcache.llama.server.table import SlotTable, Start, Wish

MAX_SHOWN = 256  # tokens of the nearest contents after the place where a prompt parts from them
_COMPARED = 32  # ids on each side of the place where a prompt parts from generated ones
_MAX_NAMESPACES, _MAX_ADAPTERS = 1024, 16
_MIN_MEASURED = 16  # the time that fewer tokens take says little about a prompt's


class _Why(NamedTuple):
    """A reason, and the fields of a Miss that only some reasons have."""

    reason: MissReason
    detail: str = ""
    n_removed: int = 0
    removed_at: float | None = None


class SlotMisses:
    """Explains the prompts of one server that were reused no further.

    `decode` returns the text of ids: without it, an answer that was encoded again counts as a
    different text.

    Cost: nothing for a prompt that its slot or file holds whole; for others a comparison with each
          slot of the namespace and with the files that share most with it.
    """

    def __init__(
        self,
        shelf: Shelf,
        table: SlotTable,
        kinds: Callable[[bytes], frozenset[str]],
        *,
        aligned_to: int | None,
    ) -> None:
        self._shelf, self._table, self._kinds = shelf, table, kinds
        self._aligned_to = aligned_to
        self.decode: Callable[[list[int]], str] | None = None
        self._speeds: LRUCache[bytes, Speed] = LRUCache(_MAX_NAMESPACES)
        # The namespaces of prompts of each scope, to find its prompts with other adapters.
        self._namespaces: LRUCache[bytes, dict[bytes, None]] = LRUCache(_MAX_NAMESPACES)

    def goal(self, n_prompt: int) -> int:
        """Return how many tokens of a prompt can be reused."""
        goal = n_prompt - 1  # the last one is decoded for its logits
        return goal // self._aligned_to * self._aligned_to if self._aligned_to else goal

    def parting(self, wish: Wish, start: Start) -> Parting | None:
        """Return where the nearest contents part from a prompt, None if `start` has all of it."""
        namespace, prompt = wish.namespace, wish.prompt
        if start.n_promised >= self.goal(len(prompt)):
            return None
        with self._table.lock:
            held: list[SlotRecord | SavedSlot] = [
                slot for slot in self._table.slots.values() if slot.namespace == namespace
            ]
            held += self._shelf.nearest(namespace, prompt)
            if self._aligned_to:  # reproducible mode restores files, and no slots
                held = [each for each in held if not isinstance(each, SlotRecord)]
            n_same, nearest = 0, None
            for each in held:
                n_each = n_common(each.tokens, prompt)
                if n_each > n_same:
                    n_same, nearest = n_each, each
            siblings = self._namespaces.setdefault(scope_of(namespace), {})
            others = [each for each in siblings if each != namespace]
            if len(siblings) < _MAX_ADAPTERS:
                siblings[namespace] = None
            return Parting(
                n_same=n_same,
                after=nearest.tokens[n_same : n_same + MAX_SHOWN] if nearest else TokenIds(),
                is_generated=nearest is not None and 0 < nearest.n_prompt <= n_same,
                refusal=self._refusal(wish, start, nearest, n_same),
                removal=self._shelf.removals.find(namespace, prompt),
                has_other=n_same < FIRST_TOKENS
                and any(self._has_beginning(each, prompt) for each in others),
                is_forgotten=self._shelf.removals.has_forgotten(namespace),
            )

    def _has_beginning(self, namespace: bytes, prompt: TokenIds) -> bool:
        slots = self._table.slots.values()
        held = [slot.tokens for slot in slots if slot.namespace == namespace]
        held += [file.tokens for file in self._shelf.nearest(namespace, prompt)]
        return any(n_common(each, prompt) >= FIRST_TOKENS for each in held)

    def _refusal(
        self, wish: Wish, start: Start, nearest: SlotRecord | SavedSlot | None, n_same: int
    ) -> str:
        """Return why contents that have more of the prompt than `start` are not used."""
        if nearest is None or min(n_same, len(wish.prompt) - 1) <= start.n_promised:
            return ""
        if isinstance(nearest, SlotRecord):
            if nearest is not start.slot and nearest.condition is not Condition.FREE:
                # A busy slot, such as one that is being saved, is blamed only if it holds at least
                # half of the tokens that were missed.
                is_most = n_same - start.n_promised >= self.goal(len(wish.prompt)) - n_same
                return "slot_busy" if is_most else ""
        elif not self._kinds(adapters_of(wish.namespace)):
            return "restore_not_used_by_server"
        # If the texts differ within the contents, `_why` names that.
        return "no_checkpoint" if n_same in (len(nearest.tokens), len(wish.prompt)) else ""

    def note_prefill(self, job: Job, n_tokens: int, seconds: float) -> None:
        """Note how long the server took to decode tokens for the first token of an answer."""
        if n_tokens >= _MIN_MEASURED:
            with self._table.lock:
                self._speeds.setdefault(job.wish.namespace, Speed()).note(n_tokens, seconds)

    def find(self, job: Job, n_used: int) -> Miss | None:
        """Return why the server reused only `n_used` tokens of a prompt, None if that is all."""
        goal, parting = self.goal(len(job.prompt)), job.parting
        if n_used >= goal:
            return None
        why = self._why(job, parting, n_used, goal)
        with self._table.lock:
            speed = self._speeds.get(job.wish.namespace)
        seconds = None if speed is None else speed.seconds(goal - n_used)
        at = n_used if parting is None else max(n_used, parting.n_same)
        return Miss(
            why.reason, at, goal - n_used, seconds, why.detail, why.n_removed, why.removed_at
        )

    def _why(self, job: Job, parting: Parting | None, n_used: int, goal: int) -> _Why:
        if job.start is None:
            return _Why(MissReason.REFUSED, "server_not_understood")
        if job.refusal:
            return _Why(MissReason.REFUSED, job.refusal)
        n_promised, unused = job.n_promised, ""
        if n_used < n_promised:
            source = "restore" if job.n_restored else "slot"
            unused = f"{source}_not_used_by_server"
        if parting is None or (unused and n_promised - n_used >= goal - n_promised):
            return _Why(MissReason.REFUSED, unused or "slot_changed_by_others")
        if parting.refusal:
            return _Why(MissReason.REFUSED, parting.refusal)
        removal = parting.removal
        if removal is not None and removal.n_tokens > parting.n_same:
            numbers = removal.n_tokens - parting.n_same, removal.removed_at
            return _Why(*reason_of_cause(removal.cause), *numbers)
        if parting.has_other:
            return _Why(MissReason.OTHER_FINGERPRINT, "lora")
        if parting.n_same and parting.after:
            reason = MissReason.DIFFERENT_TEXT
            if parting.is_generated and self.decode is not None:
                own = self.decode(parting.after[:_COMPARED].tolist())
                sent = job.prompt[parting.n_same : parting.n_same + _COMPARED]
                if is_same_text(own, self.decode(sent.tolist())):
                    reason = MissReason.RE_ENCODING
            return _Why(reason, unused)
        is_lost = parting.is_forgotten
        return _Why(MissReason.NOT_KNOWN if is_lost else MissReason.NEVER_STORED, unused)

    def clear(self, is_doomed: Callable[[bytes], bool]) -> None:
        """Forget everything about these namespaces."""
        self._shelf.removals.clear(is_doomed)
        for namespace in [each for each in self._speeds if is_doomed(each)]:
            del self._speeds[namespace]
        for scope in [scope for scope in self._namespaces if is_doomed(scope)]:
            del self._namespaces[scope]


def is_same_text(left: str, right: str) -> bool:
    """Return whether the shorter text is the beginning of the other one."""
    n_both = min(len(left), len(right))
    return n_both > 0 and left[:n_both] == right[:n_both]
