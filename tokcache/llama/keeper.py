"""Keeper: one sequence's states, saved and restored in the way that its memory allows.

Attention and windows: blocks of any length, or aligned; the last one may be cut. Recurrent
memories and hybrids: aligned blocks, each saved when its end is reached, because it holds only the
recurrent state at its end. The positions after the last block (up to a place where the next
prompt is likely to part, or to the end of an answer) are a tail: a snapshot of these positions
alone, loaded after its blocks.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from hashlib import blake2b
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from tokcache.errors import StateError
from tokcache.state.reasons import Miss, MissReason

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from tokcache.llama.memory_type import MemoryType
    from tokcache.llama.sequence import Sequence
    from tokcache.state.handles import BlockIO, RestorePlan, StateHandle
    from tokcache.state.namespace import Namespace

    Ids = NDArray[np.int32]

_log = logging.getLogger("tokcache")


class Restored(NamedTuple):
    """The result of a restore: positions [start, stop) were loaded, `stop` are held.

    `miss` is why the cache had no more of the prompt.
    """

    start: int
    stop: int
    miss: Miss | None = None


class Keeper:
    """Saves and restores the states of one sequence, in a namespace that suits its memory.

    `is_reproducible`: prompts are decoded in pieces that end at block multiples, and restored up to
    such a multiple only.

    Errors: none; a state that can't be saved or restored is counted by reason in the cache.
    Threads: the context's: one at a time.
    """

    def __init__(
        self, sequence: Sequence, memory: MemoryType, *, is_reproducible: bool = False
    ) -> None:
        self._sequence, self._memory = sequence, memory
        self.is_reproducible = is_reproducible
        self._has_proven = False  # whether the memory was seen to behave as its kind does

    # Saving

    def save(self, states: Namespace, ids: Ids, *, n_opening: int = 0) -> int:
        """Save the state of `ids`, which the sequence holds; return the new positions.

        The sequence may hold more, where its memory keeps every position. The first `n_opening` ids
        tell their conversation from others: the cache bounds the tails of each.
        """
        n_tokens, n_block = len(ids), states.block_tokens
        # A memory that can't go back can still give up its only position: that proves nothing.
        if n_tokens <= 1:
            return 0
        if not self._has_proven:
            self._has_proven = self._sequence.behaves()
        if not self._has_proven:
            states.refuse("memory_of_unknown_behaviour")
            return 0
        if self._memory.is_recurrent and n_tokens % n_block:
            return self._save_tail(states, ids, n_opening)
        # A block must not be longer than a window: if `block_tokens` is, the positions since its
        # last multiple are saved in several blocks of the window's length.
        step, stops = self._memory.block_tokens(n_block), [n_tokens]
        if step != n_block:
            first = (n_tokens - 1) // n_block * n_block + step
            stops = [*range(first, n_tokens, step), n_tokens]
        read, n_bytes = self._sequence.read_block, self._sequence.block_bytes
        last_only = not self._memory.has_attention
        return sum(states.save(ids[:stop], read, n_bytes, last_only=last_only) for stop in stops)

    def _save_tail(self, states: Namespace, ids: Ids, n_opening: int) -> int:
        n_block = states.block_tokens
        start, stop = len(ids) // n_block * n_block, len(ids)
        if self.is_reproducible or stop < states.min_tokens:
            return 0
        known = _tails(states).handle(ids)
        if known is not None:
            known.close()
            return 0
        is_saved = _tails(states).fill(
            ids,
            self._sequence.block_bytes(start, stop),
            lambda buffer: self._sequence.read_block(start, stop, buffer),
            n_opening=n_opening,
        )
        return (stop - start) * is_saved

    def note_prefill(self, states: Namespace, n_tokens: int, seconds: float) -> None:
        """Note how long decoding took, for the tiers that hold blocks and, if any, tails."""
        states.note_prefill(n_tokens, seconds)
        if self._memory.is_recurrent:
            _tails(states).note_prefill(n_tokens, seconds)

    # Pinning

    def pin(
        self, states: Namespace, ids: Ids, ends: Iterable[int], *, is_pinned: bool
    ) -> tuple[int, int]:
        """Evict the states of `ids`, and those of its first `ends`, last; or as others again.

        Return how many of `ids` can be restored from memory, and how many from every tier.
        """
        blocks = states.pin(ids, is_pinned=is_pinned)
        if not self._memory.is_recurrent or self.is_reproducible:
            return blocks
        tails = [_tails(states).pin(ids[:end], is_pinned=is_pinned) for end in ends]
        found = []
        for n_blocks, *n_tails in zip(blocks, *tails, strict=True):
            # A tail of a hybrid needs all blocks before it.
            n_block = states.block_tokens if self._memory.has_attention else 1 << 62
            usable = [n for n in n_tails if n // n_block * n_block <= n_blocks]
            found.append(max([n_blocks, *usable]))
        return found[0], found[1]

    # Restoring

    def restore(self, states: Namespace, ids: Ids, n_held: int, *, n_matching: int = 0) -> Restored:
        """Bring the longest known prefix of `ids`, without the last, into the sequence.

        It holds `n_held` of them already; anything else that it holds may be removed. If it holds
        more, of which the first `n_matching` are of `ids`, but could not be cut there, `n_held` is
        0. Afterwards it holds `stop` of them; where that is not above `start`, nothing was loaded.
        """
        # How many tokens were useful is known at the end: our caller counts them.
        n_wanted, tail, last_only = len(ids) - 1, None, not self._memory.has_attention
        if last_only and not self.is_reproducible:  # it needs no blocks, and spares reading one
            tail = _tails(states).find(ids[:-1], is_counted=False)
        with states.plan(
            ids,
            max_tokens=n_wanted,
            counts_tokens=False,
            explain=True,
            last_only=last_only,
            n_known=n_held if tail is None else max(n_held, tail.n_tokens),
        ) as plan:
            if self._memory.is_recurrent:
                if not last_only:
                    tail = self._find_tail(states, plan, ids[:-1])
                elif tail is not None and tail.n_tokens < plan.n_tokens:
                    tail.close()
                    tail = None
                with nullcontext() if tail is None else tail:
                    gone_back = self._go_back(states, plan, tail, n_matching)
                    if gone_back is not None:
                        restored = gone_back
                    elif tail is not None:
                        restored = self._load_with_tail(states, plan, tail, n_held)
                    else:
                        restored = self._load_states(states, plan, n_held)
            elif plan.n_tokens <= n_held:
                restored = Restored(n_held, n_held)
            else:
                start = plan.start_beyond(n_held)
                if not self._sequence.trim(start, in_place=self.is_reproducible):
                    self._sequence.clear()
                    start = 0
                write, trim = self._sequence.write_block, self._sequence.trim
                reached = plan.restore(write, start=start, trim=trim)
                restored = self._checked(states, start, reached, plan.n_tokens)
            miss = plan.miss
            if restored.stop < plan.n_tokens:
                n_missed, failed = n_wanted - restored.stop, "restore_failed"
                miss = Miss(MissReason.REFUSED, restored.stop, n_missed, detail=failed)
            elif (
                self._memory.is_recurrent and restored.stop < n_wanted and not self.is_reproducible
            ):
                lost = _tails(states).find_miss(ids[:-1], n_found=restored.stop)
                if lost.n_removed > (0 if miss is None else miss.n_removed):
                    miss = lost
            return restored._replace(miss=miss)

    def _checked(self, states: Namespace, start: int, reached: int, goal: int) -> Restored:
        """Return the restored positions if the sequence agrees; else empty it.

        Blocks before one that failed are good; but if it failed for lack of room, they would take
        the room that is left from other sequences.
        """
        is_right = self._sequence.trim(reached) and self._sequence.is_at(reached)
        if is_right and (reached == goal or self._sequence.is_alone):
            return Restored(start, reached)
        self._sequence.clear()
        if not is_right:
            states.refuse("restore_incomplete")
        return Restored(0, 0)

    def _load_states(self, states: Namespace, plan: RestorePlan, n_held: int) -> Restored:
        """Load blocks that end in a recurrent state; without attention the last one is enough."""
        if plan.n_tokens <= n_held:
            return Restored(n_held, n_held)
        start = self._start_of_states(states, n_held)
        if self._memory.has_attention:
            reached = plan.restore(self._sequence.write_block, start=start)
        else:
            last = plan.blocks[-1].start
            reached = plan.restore(self._sequence.write_block, start=last)
            if reached == last:  # it failed, and nothing came before it
                reached = 0
        return self._checked(states, start, reached, plan.n_tokens)

    def _start_of_states(self, states: Namespace, n_held: int) -> int:
        """Return the position where blocks can follow the held ones.

        If they can't, remove the held ones and return 0.
        """
        is_at_block_end = self._memory.has_attention and n_held % states.block_tokens == 0
        if is_at_block_end and self._sequence.end() == n_held:
            return n_held
        self._sequence.clear()
        return 0

    def _go_back(
        self, states: Namespace, plan: RestorePlan, tail: StateHandle | None, n_matching: int
    ) -> Restored | None:
        """Go back to the last stored state among the matching positions; load those after it.

        None where that is not possible; if there are matching positions, the sequence is then
        empty.
        """
        if not n_matching:
            return None
        sequence, start, reached = self._sequence, 0, 0
        goal = plan.n_tokens if tail is None else tail.n_tokens
        if not sequence.can_go_back():
            pass
        elif tail is not None and goal <= n_matching:
            start = self._base(states, tail)
            reached = self._load_tail(states, plan, tail, sequence.go_back)
        elif within := [block for block in plan.blocks if block.stop <= n_matching]:
            start = within[-1].start

            def load(first: int, stop: int, payload: memoryview) -> None:
                (sequence.go_back if first == start else sequence.write_block)(first, stop, payload)

            reached = plan.restore(load, start=start)
            if tail is not None and reached == plan.n_tokens:
                reached = self._load_tail(states, plan, tail, sequence.write_block)
        if goal and reached == goal and sequence.is_at(goal):
            return Restored(start, goal)
        sequence.clear()
        return None

    # Tails

    def _find_tail(self, states: Namespace, plan: RestorePlan, ids: Ids) -> StateHandle | None:
        """Return the tail that reaches beyond the blocks, if all blocks before it are there."""
        if self.is_reproducible or len(ids) <= plan.n_tokens:
            return None
        tail = _tails(states).find(ids, is_counted=False)
        if tail is None:
            return None
        needed = self._base(states, tail)
        if plan.n_tokens < tail.n_tokens and plan.n_tokens >= needed:
            return tail
        if plan.n_tokens < needed:
            states.refuse("tail_without_blocks")
        tail.close()
        return None

    def _base(self, states: Namespace, tail: StateHandle) -> int:
        return tail.n_tokens // states.block_tokens * states.block_tokens

    def _load_with_tail(
        self, states: Namespace, plan: RestorePlan, tail: StateHandle, n_held: int
    ) -> Restored:
        if tail.n_tokens <= n_held:
            return Restored(n_held, n_held)
        base = self._base(states, tail)
        start = reached = self._start_of_states(states, n_held)
        if self._memory.has_attention:
            reached = plan.restore(self._sequence.write_block, start=start)
        if reached != base and self._memory.has_attention:
            return self._checked(states, start, reached, tail.n_tokens)
        reached = self._load_tail(states, plan, tail, self._sequence.write_block) or base
        if reached == base and not self._memory.has_attention:
            return self._load_states(states, plan, 0)
        return self._checked(states, start, reached, tail.n_tokens)

    def _load_tail(
        self, states: Namespace, plan: RestorePlan, tail: StateHandle, write: BlockIO
    ) -> int:
        """Load a tail after its blocks; return its end, or 0 if that fails."""
        began = perf_counter()
        try:
            write(self._base(states, tail), tail.n_tokens, tail.payload())
        except StateError:
            _log.debug("a tail could not be restored", exc_info=True)
            states.refuse("restore_failed")
            return 0
        states.count_restored(0, perf_counter() - began, is_hit=not plan.blocks)
        return tail.n_tokens


def _tails(states: Namespace) -> Namespace:
    """Return the namespace of tails, which follow blocks of this cache's length."""
    fields = (states.fingerprint, states.block_tokens.to_bytes(8, "little"))
    fingerprint = blake2b(b"".join(fields), digest_size=32, person=b"tokcache.tail.1").digest()
    return states.replace(fingerprint=fingerprint, public_prefix=(), aligned=False)
