"""The record of one slot: its contents, its user, and all transitions of both.

The life of a slot:
1. FREE: any request may get it.
2. `begin()`: one request has it (BUSY), and alone reads and changes it.
   `lost()`, `reset()`, `restored()` and `decoded()` record its preparation, `answered()` or
   `aborted()` its end.
3. `settle()`: it is saved or erased off the request's path (SETTLING).
4. `release()`: it is FREE again.

Implementation: every transition takes the table's lock. Code that holds it therefore never sees a
record that is half changed. `settle()` and `release()` also wake the requests that wait.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from tokcache._prefix import n_common
from tokcache.llama.server.checkpoints import ANY_DISTANCE, NO_GAP, Gap, distance, ends_after
from tokcache.llama.server.settings import STEP_TOKENS
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokcache.llama.server.shelf import SavedSlot


class Condition(Enum):
    """Who has a slot: nobody, a request, or the saver after a request."""

    FREE = auto()
    BUSY = auto()
    SETTLING = auto()


@dataclass(eq=False, slots=True)
class SlotRecord:
    """Our record of one slot of the server.

    `namespace` is None while the slot is empty or its contents are unknown.

    Units: the slot holds `n_held` tokens, of which `tokens` are known; the first `n_prompt` belong
           to a prompt, the others to an answer.

    Threads: safe, by `lock`, which all slots of a table share.
    """

    id: int
    lock: threading.RLock
    wake: Callable[[], None]
    condition: Condition = Condition.FREE
    namespace: bytes | None = None
    tokens: TokenIds = field(default_factory=TokenIds)
    n_held: int = 0
    n_prompt: int = 0
    gap: Gap = NO_GAP
    # Where prompts ended that the slot served one after the other.
    ends: tuple[int, ...] = ()
    conversation: tuple[bytes, str] | None = None
    since: float = field(default_factory=time.monotonic)
    used_at: float = 0.0
    n_uses: int = 0
    # How often each block of STEP_TOKENS tokens was reused; only the report reads it.
    reuse: list[int] = field(default_factory=list)
    # Whether nothing is left to save: saved already, or not worth it.
    is_saved: bool = True
    # Why the last save of the contents failed; "" if none did.
    unsaved: str = ""
    # The adapters of the slot's last request, None if unknown.
    adapters: bytes | None = None
    # The namespace of the request that has the slot, and whether to erase the slot after it.
    user: bytes | None = None
    is_condemned: bool = False

    # -- its user -----------------------------------------------------------------------------

    def begin(self, user: bytes | None) -> None:
        """Give the slot to a request of the namespace `user`, or to an erasure (None)."""
        with self.lock:
            self.condition, self.user, self.is_condemned = Condition.BUSY, user, False

    def settle(self) -> None:
        """Record that the request is over and that the slot is being saved or erased."""
        with self.lock:
            self.condition = Condition.SETTLING
            self.wake()

    def release(self) -> None:
        """Make the slot free for any request."""
        with self.lock:
            self.condition, self.user = Condition.FREE, None
            self.used_at = time.monotonic()
            self.wake()

    def condemn(self) -> None:
        """Mark a slot in use, so that its contents are erased after the request."""
        with self.lock:
            self.is_condemned = self.condition is not Condition.FREE

    # -- its contents -------------------------------------------------------------------------

    def n_usable(self, prompt: TokenIds, too_far: int = ANY_DISTANCE) -> int:
        """Return how many of a prompt's first tokens the server need not decode.

        The last token is always decoded, to get its logits. `too_far` is the distance from a
        checkpoint at which the server uses none.
        """
        n_tokens = min(n_common(self.tokens, prompt), len(prompt) - 1)
        # A prompt that differs before the slot's end needs a checkpoint; the gap has no right one.
        needs_checkpoint = n_tokens < self.n_held
        is_far = needs_checkpoint and distance(n_tokens, self.ends) >= too_far
        return 0 if is_far or (needs_checkpoint and n_tokens in self.gap) else n_tokens

    def lost(self) -> None:
        """Record that the slot is empty or that its contents are unknown."""
        with self.lock:
            self.namespace, self.tokens, self.n_held, self.n_prompt = None, TokenIds(), 0, 0
            self.gap, self.ends = NO_GAP, ()
            self.conversation, self.reuse, self.n_uses = None, [], 0
            self.since, self.is_saved, self.unsaved = time.monotonic(), True, ""

    def reset(self) -> None:
        """Record that neither the contents nor the adapters are known."""
        with self.lock:
            self.lost()
            self.adapters = None

    def loaded(self, adapters: bytes | None) -> None:
        """Record the adapters of the slot's last request; None if it may not have arrived."""
        with self.lock:
            self.adapters = adapters

    def restored(self, file: SavedSlot) -> None:
        """Record that the server read `file` into the slot."""
        with self.lock:
            self.namespace, self.tokens, self.gap = file.namespace, file.tokens, file.gap
            self.n_held, self.n_prompt, self.ends = file.n_saved, file.n_prompt, file.ends
            self.unsaved = ""

    def decoded(
        self,
        namespace: bytes,
        head: TokenIds,
        conversation: tuple[bytes, str] | None,
        *,
        n_used: int = 0,
    ) -> None:
        """Record that the slot holds `head`, the first tokens of a prompt, and no answer.

        The server reused `n_used` tokens for it.
        """
        with self.lock:
            self.namespace, self.tokens, self.conversation = namespace, head, conversation
            self.ends = ends_after(self.ends, n_used=n_used, n_prompt=len(head))
            self.n_held = self.n_prompt = len(head)
            self.unsaved = ""

    def answered(
        self,
        namespace: bytes,
        tokens: TokenIds,
        conversation: tuple[bytes, str] | None,
        *,
        n_prompt: int,
        n_held: int,
        n_used: int,
        gap: Gap,
        is_saved: bool,
    ) -> None:
        """Record a prompt and its answer, for which the server reused `n_used` tokens.

        If the prompt reused nothing, the counts of reuse start again from zero.
        """
        with self.lock:
            reuse, n_uses = (self.reuse, self.n_uses) if n_used else ([], 0)
            ends = ends_after(self.ends, n_used=n_used, n_prompt=n_prompt)
            self.lost()
            self.ends = ends
            self.namespace, self.tokens, self.conversation = namespace, tokens, conversation
            self.n_prompt, self.n_held, self.gap = n_prompt, n_held, gap
            self.is_saved = is_saved
            n_blocks = -(-n_held // STEP_TOKENS)
            counts = (reuse + [0] * n_blocks)[:n_blocks]
            n_reused = n_used // STEP_TOKENS
            self.reuse = [n + (block < n_reused) for block, n in enumerate(counts)]
            self.n_uses = n_uses + (n_used > 0)

    def aborted(
        self,
        namespace: bytes,
        tokens: TokenIds,
        conversation: tuple[bytes, str] | None,
        *,
        n_prompt: int,
        gap: Gap,
    ) -> None:
        """Record that the slot holds at least some of `tokens`; the next save shows how many."""
        with self.lock:
            self.namespace, self.tokens, self.conversation = namespace, tokens, conversation
            self.n_prompt, self.gap, self.unsaved = n_prompt, gap, ""

    def saving(self) -> None:
        """Record that the contents are being saved, or are not worth it."""
        with self.lock:
            self.is_saved = True

    def not_saved(self, reason: str) -> None:
        """Record why a save failed; a request that later misses the contents is told so."""
        with self.lock:
            self.unsaved = reason

    def saved(self, n_tokens: int) -> None:
        """Record that the slot holds the `n_tokens` that a save wrote."""
        with self.lock:
            self.n_held, self.tokens, self.unsaved = n_tokens, self.tokens[:n_tokens], ""
