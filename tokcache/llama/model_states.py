"""ModelStates: the prefix states of one loaded model, stored from its context and restored into it.

It decides whether states are cached at all and under which fingerprint, where a decode has to stop
because a state can't be saved later, and how much of the context a prompt can build on. `Keeper`
knows how a memory type saves and restores; `ContextRecord` knows the held positions.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tokcache.errors import FileChanged, StateError
from tokcache.llama.context import MIXED, UNKNOWN, n_shared
from tokcache.llama.fingerprint import describe, digest_of
from tokcache.llama.keeper import Keeper, Restored
from tokcache.llama.openers import Places
from tokcache.llama.reasons import explained, is_known
from tokcache.state.reasons import Miss, MissReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tokcache.llama.context import ContextRecord, RecordCopy
    from tokcache.llama.fingerprint import LoadedFiles, LoadedModel
    from tokcache.llama.memory_type import MemoryType
    from tokcache.llama.openers import Openers
    from tokcache.llama.sequence import Sequence
    from tokcache.state.cache import PrefixStateCache
    from tokcache.state.namespace import Namespace

_log = logging.getLogger("tokcache")

MAX_SHOWN = 256  # tokens of the context after the place where a prompt parts from it
EMPTY: NDArray[np.int32] = np.empty(0, np.int32)
_MIN_SAME = 16  # tokens: fewer are the same in unrelated prompts
_WITHOUT_CAUSE = {MissReason.DIFFERENT_TEXT, MissReason.NEVER_STORED, MissReason.NOT_KNOWN}
_PREFILL_TOKENS = 16  # the time that fewer take says little about a prompt's
_NEAR = 16  # tokens: decoding them takes hardly longer than decoding one


class Held(NamedTuple):
    """How much of a prompt is in the context, and why no more is.

    `is_generated`: the prompt parts from the context among ids that the model generated.

    Units: `n_tokens` of the prompt are there, of which the first `n_in_context` were there before.
    """

    n_in_context: int
    n_tokens: int
    miss: Miss | None = None
    is_generated: bool = False


@dataclass(frozen=True, slots=True)
class HeldState:
    """The positions of a context at one moment, and the way to bring them back."""

    record: RecordCopy
    snapshot: list[memoryview] | None  # None: the tokens are decoded again, or are lost
    end: int  # the position after the last one: an image may have fewer positions than tokens
    is_redone: bool
    needs_logits: bool


class ModelStates:
    """The states of one model's context in a prefix cache, or the reason why there are none.

    `uncached` is the reason for which this model's states are never cached, None if they are.

    Errors: none; whatever can't be saved or restored is counted by reason in the cache.
    Threads: the context's: one at a time.
    """

    def __init__(
        self,
        record: ContextRecord,
        model: LoadedModel,
        *,
        path: str,
        files: LoadedFiles | None,
        memory: MemoryType,
        sequence: Sequence | None,
        n_ctx: int,
        uncached: str | None,
        cache: PrefixStateCache | None,
        public_prefix: NDArray[np.int32],
        find_openers: Callable[[], Openers | None],
    ) -> None:
        self.record, self.memory, self.sequence = record, memory, sequence
        self.cache, self.public_prefix = cache, public_prefix
        self.uncached = uncached
        self.fingerprint = b""
        self.keeper = None
        if sequence is not None:
            is_reproducible = record.alignment.is_reproducible
            self.keeper = Keeper(sequence, memory, is_reproducible=is_reproducible)
        self._model, self._path, self._files, self._n_ctx = model, path, files, n_ctx
        self._warned_of: str | None = None
        self._find_openers, self._has_looked = find_openers, False
        self._openers: Openers | None = None
        # The last namespace, and what it was made of: most requests ask for the same again.
        self._last: Namespace | None = None
        self._last_wanted: tuple[Any, ...] = ()
        self._last_public: NDArray[np.int32] | None = None
        if files is not None and cache is not None and not uncached:
            files.begin()

    # Whether states are cached, and where

    def why_not_cached(self) -> str | None:
        """Return the reason why states are neither saved nor restored with these settings."""
        is_reproducible, block_tokens = self.record.alignment
        if self.uncached is None and is_reproducible:
            return self.memory.why_not_reproducible(block_tokens, self._n_ctx)
        return self.uncached

    def warn_if_uncached(self) -> None:
        """Log once that these settings leave nothing to the prefix cache."""
        why = None if self.cache is None else self.why_not_cached()
        if why is not None and why != self._warned_of and is_known(why):
            _log.warning("%s runs without the prefix cache: %s", self._path, explained(why))
        self._warned_of = why

    def wait_for_fingerprint(self, timeout_s: float | None) -> bool:
        """Wait until the model file is hashed; False if `timeout_s` was too short."""
        return self._files is None or bool(self.uncached) or self._files.wait(timeout_s)

    def release(self) -> None:
        """Stop waiting for the fingerprint."""
        if self._files is not None:
            self._files.release()

    def settings_changed(self) -> None:
        """Compute another fingerprint, and warn if nothing is cached under the new settings."""
        self.fingerprint = b""
        if self.keeper is not None:
            self.keeper.is_reproducible = self.record.alignment.is_reproducible
        self.warn_if_uncached()

    def refuse(self, reason: str) -> None:
        """Count a state that was not saved or not used."""
        if self.cache is not None:
            self.cache.refuse(reason)

    def note_prefill(self, n_tokens: int, began: float) -> None:
        """Tell the cache how long a decode took: slower tiers are then not asked."""
        if self.cache is None or self.sequence is None or n_tokens < _PREFILL_TOKENS:
            return
        if key := self._key():
            self.sequence.synchronize()
            scope = None if self.record.scope is MIXED else self.record.scope
            states = self.cache.namespace(key, scope=scope)
            seconds = time.perf_counter() - began
            if self.keeper is not None:
                self.keeper.note_prefill(states, n_tokens, seconds)

    def _namespace(self) -> Namespace | None:
        """Return the namespace of the held positions, None if their states are not cached."""
        if self.cache is None or self.why_not_cached() is not None or self.record.scope is MIXED:
            return None
        return self._namespace_of(self.record.scope)

    def _namespace_of(self, scope: str | None) -> Namespace | None:
        """Return the namespace of a scope, None while the fingerprint is pending."""
        key = self._key()
        if not key or self.cache is None:
            return None
        is_aligned = self.record.alignment.is_reproducible or self.memory.is_recurrent
        wanted = self.cache, key, scope, is_aligned
        if wanted != self._last_wanted or self.public_prefix is not self._last_public:
            self._last = self.cache.namespace(
                key,
                scope=scope,
                public_prefix=self.public_prefix,
                aligned=is_aligned,
            )
            self._last_wanted, self._last_public = wanted, self.public_prefix
        return self._last

    def _key(self) -> bytes:
        """Return the fingerprint; empty while it is pending, or where `uncached` says why."""
        if self.fingerprint or self.uncached:
            return self.fingerprint
        if self._files is None:
            self.uncached = "fingerprint_failed"
        elif self._files.begin():
            is_reproducible, block_tokens = self.record.alignment
            aligned_to = block_tokens if is_reproducible else None
            try:
                parts = describe(self._model, self._files, aligned_to)
                self.fingerprint = digest_of(parts)
                if self.cache is not None:
                    context = parts.pop("context")
                    parts |= {f"context.{name}": value for name, value in context.items()}
                    self.cache.name_model(self.fingerprint, Path(self._path).name, parts)
            except OSError as error:
                _log.warning("%s runs without the prefix cache: %s", self._path, error)
                is_change = isinstance(error, FileChanged)
                self.uncached = "model_file_changed" if is_change else "fingerprint_failed"
        return self.fingerprint

    # Decoding: where to stop and save

    def n_next(self, n_left: int, n_batch: int) -> int:
        """Return how many of `n_left` tokens to decode in one batch: not beyond the next save."""
        record = self.record
        n_tokens, n_next = record.n_tokens, min(n_left, n_batch)
        is_reproducible, block_tokens = record.alignment
        step = block_tokens if is_reproducible else self._save_step()
        if step:
            n_next = min(n_next, step - n_tokens % step)
            for stop in record.stops if self._saves_tails() else ():
                if n_tokens < stop < n_tokens + n_next:
                    n_next = stop - n_tokens
        return n_next

    def _save_step(self) -> int:
        """Return the step of the positions at which states are saved as they are reached."""
        if self.cache is None or self.why_not_cached() is not None:
            return 0
        is_reproducible, block_tokens = self.record.alignment
        return self.memory.stops(block_tokens, is_reproducible=is_reproducible)

    def _saves_tails(self) -> bool:
        """Return whether states are saved where prompts may part: they can't be cut later."""
        is_reproducible = self.record.alignment.is_reproducible
        return self.memory.is_recurrent and not is_reproducible and self._save_step() > 0

    def openers(self) -> Openers | None:
        """Return the ids that open messages; None if they are not known, which is counted once."""
        if not self._has_looked:
            self._openers, self._has_looked = self._find_openers(), True
            if self._openers is None:
                self.refuse("openers_unknown")
        return self._openers

    def _stops(self, ids: NDArray[np.int32], n_held: int) -> tuple[tuple[int, ...], int]:
        """Return where to stop in a prompt of which `n_held` tokens are there, and its opening.

        A state is saved before the last token, so that the prompt can be answered again, or where
        the prompt for an answer begins to depend on what follows, if that is near; and where the
        last question ends, or begins, unless a saved state is near.
        """
        if not self._saves_tails():
            return (), 0
        openers = self.openers()
        places = Places() if openers is None else openers.places(ids)
        last, block_tokens = len(ids) - 1, self.record.alignment.block_tokens
        answer, question = min(places.answer or last, last), places.question
        stops = {answer} if last - answer <= _NEAR else {answer, last}
        is_near = question - n_held <= _NEAR or question % block_tokens <= _NEAR
        if not is_near and answer - question > _NEAR:
            stops.add(question)
        return tuple(sorted(stops)), places.opening

    def save_as_reached(self) -> None:
        """Save the state at this position if it could not be saved later."""
        step, n_tokens = self._save_step(), self.record.n_tokens
        is_tail = n_tokens in self.record.stops and self._saves_tails()
        if step and n_tokens == self.record.n_savable and (n_tokens % step == 0 or is_tail):
            self.save(n_tokens)

    def end_generation(self) -> None:
        """Save the state of the decoded tokens; in the default mode the answer's too."""
        record = self.record
        is_whole = record.n_savable == record.n_tokens and not record.alignment.is_reproducible
        if self.memory.is_plain or is_whole:
            self.save(record.n_savable)

    def save(self, n_tokens: int) -> None:
        """Save the state of the first `n_tokens` positions."""
        record = self.record
        if record.is_cleared:
            record.saved(has_unsaved=False)
            self.refuse("cleared")
            return
        states = self._namespace()
        if states is None:
            # Saved by the next request, if the digest is there then and the state still is.
            is_pending = self.cache is not None and not self.why_not_cached()
            record.saved(has_unsaved=is_pending)
        elif self.keeper is not None and self.sequence is not None:
            is_all_there = not record.has_unsaved or self.sequence.keeps_all()
            # A tail of a recurrent memory without attention follows no blocks.
            n_block = record.alignment.block_tokens
            is_alone = not self.memory.has_attention and n_tokens % n_block != 0
            if is_all_there or is_alone:
                self.keeper.save(states, record.ids[:n_tokens], n_opening=record.n_opening)
            record.saved(has_unsaved=not is_all_there)

    # Prompts: bringing their first tokens into the context

    def hold(self, ids: NDArray[np.int32], scope: str | None) -> Held:
        """Bring the longest known prefix of the prompt `ids` into the context.

        The context is to be reset if none of it is there afterwards. The prompt's last token is
        left to decode, for its logits, unless the context holds exactly this prompt and its logits.
        """
        record, (is_reproducible, n_block) = self.record, self.record.alignment
        # Of another scope's positions only the public ones may be used.
        is_same = scope == record.scope and not record.is_cleared
        n_usable = len(ids) if is_same else n_shared(self.public_prefix, ids)
        work = record.work if is_same else None
        if work is None and self.cache is not None:
            work = self.cache.begin(scope)

        # Reproducible mode decodes the last piece of a prompt again. One with images can't be
        # decoded from its ids: a chat handler has put it there.
        may_be_whole = not is_reproducible or bool((ids == UNKNOWN).any())
        if n_usable == len(ids) and may_be_whole and record.holds_prompt(ids):
            record.request_begins(scope, work)
            return Held(len(ids), len(ids))

        # States that could not be stored yet belong to the request before: store them first.
        if record.has_unsaved:
            self.end_generation()
        n_same = n_shared(record.held, ids[:n_usable])
        after = record.held[n_same : n_same + MAX_SHOWN].copy() if n_same < n_usable else EMPTY
        is_generated = 0 < record.n_prompt <= n_same
        n_in_context = min(n_same, len(ids) - 1)
        if is_reproducible:
            n_in_context = min(n_in_context, record.n_aligned) // n_block * n_block
        n_matching = 0
        if not self.trim(n_in_context):
            n_matching, n_in_context = n_in_context, 0
        record.prompt_begins(scope, work, len(ids))
        start, n_held, miss = self.restore(ids, n_in_context, n_matching=n_matching)
        if n_matching and not n_held and self.sequence is not None:
            self.sequence.clear()
            record.reset()
        n_in_context = max(n_in_context, start)
        record.stops_at(*self._stops(ids, n_held))
        goal = (len(ids) - 1) // n_block * n_block if is_reproducible else len(ids) - 1
        held = Held(min(n_in_context, n_held), n_held)
        if n_held >= goal:
            return held
        # Of context and cache, the one that has more of the prompt says why no more is there.
        is_context_nearest = n_same >= (0 if miss is None else miss.at_token + miss.n_removed)
        is_cache_certain = miss is not None and miss.reason not in _WITHOUT_CAUSE
        if is_context_nearest and n_same and not (is_cache_certain and n_same < _MIN_SAME):
            parts = len(after) > 0
            if parts or miss is None or miss.reason in _WITHOUT_CAUSE:
                reason = MissReason.DIFFERENT_TEXT if parts else MissReason.NEVER_STORED
                miss = Miss(reason, n_same, 0, held_tokens=tuple(after.tolist()))
                held = held._replace(is_generated=parts and is_generated)
        miss = miss or Miss(MissReason.NEVER_STORED, n_same, 0)
        seconds = self._seconds(goal - n_held)
        return held._replace(miss=miss._replace(n_missed=goal - n_held, seconds=seconds))

    def _seconds(self, n_tokens: int) -> float | None:
        """Return how long decoding so many tokens of the present scope takes, None if unknown."""
        states = self._namespace()
        return None if states is None else states.prefill_seconds(n_tokens)

    def trim(self, n_tokens: int) -> bool:
        """Remove the positions from `n_tokens` on; False if this memory can't."""
        in_place = self.record.alignment.is_reproducible
        if self.sequence is None or not self.sequence.trim(n_tokens, in_place=in_place):
            return False
        self.record.trimmed(n_tokens)
        return True

    def restore(
        self, ids: NDArray[np.int32], n_in_context: int, *, n_matching: int = 0
    ) -> Restored:
        """Restore positions of `ids` beyond the first `n_in_context`: see `Keeper.restore`.

        If `n_matching` is above 0 and nothing is restored, the context is to be reset.
        """
        if self.cache is None:
            return Restored(n_in_context, n_in_context)
        refusal, states = "", self._namespace()
        if states is None or self.keeper is None:
            pending = "fingerprint_pending" if not self.fingerprint else "context_without_blocks"
            refusal = self.why_not_cached() or pending
        elif (ids < 0).any():
            refusal = "unknown_positions"
        if refusal or states is None or self.keeper is None:
            self.refuse(refusal)
            miss = Miss(MissReason.REFUSED, n_in_context, 0, detail=refusal)
            return Restored(n_in_context, n_in_context, miss)
        found = self.keeper.restore(states, ids, n_in_context, n_matching=n_matching)
        if (found.start, found.stop) != (n_in_context, n_in_context):
            self.record.restored(found.start, ids[: found.stop])
        return found

    # Prefixes that are prefilled before a request needs them

    def hold_prefix(self, ids: NDArray[np.int32], ends: tuple[int, ...], scope: str | None) -> Held:
        """Bring all of `ids` that is known into the context, the last one included.

        The decode of the rest stops at each of `ends`. Only plain attention can be stored whenever
        it is in the context; the states of other memories must come from the cache, or be decoded
        and stored as they are reached.
        """
        record = self.record
        if not self.memory.is_plain and self.sequence is not None:
            if record.has_unsaved:
                self.end_generation()
            self.sequence.clear()
            record.reset()
        # A prompt's last token is always left to decode, so one more than the prefix is asked.
        held = self.hold(np.append(ids, ids[-1:]), scope)
        record.stops_at(tuple(end for end in ends if end > held.n_tokens), 0)
        return held

    def pin(
        self, ids: NDArray[np.int32], ends: tuple[int, ...], scope: str | None, *, is_pinned: bool
    ) -> tuple[int, int]:
        """Evict the states of a prefix after all others, or as others again.

        Return how many of its tokens can be restored from memory, and how many from every tier.
        """
        states = None if self.why_not_cached() else self._namespace_of(scope)
        if states is None or self.keeper is None:
            return 0, 0
        return self.keeper.pin(states, ids, ends, is_pinned=is_pinned)

    # Generations that are suspended

    def suspend(self, *, needs_logits: bool, is_lost: bool, is_repeatable: bool) -> HeldState:
        """Return all that `resume` needs to bring the present positions back.

        `needs_logits`: those of the last decode are still to be sampled from. `is_lost`: they can't
        be brought back. `is_repeatable`: the same decodes would give the same samples.
        """
        record, sequence = self.record, self.sequence
        if not self.memory.is_recurrent:  # a tail for each pause would be too many
            self.end_generation()
        # A snapshot of a window that has moved on puts its positions into other cells, which gives
        # other last bits. The same decodes give the same.
        is_redone = (
            is_repeatable
            and record.alignment.is_reproducible
            and record.is_repeatable
            and sequence is not None
            and not sequence.is_movable()
        )
        state: list[memoryview] | None = None
        if sequence is not None and not is_redone and not is_lost:
            try:
                state = sequence.snapshot()
            except (StateError, MemoryError):
                self.refuse("snapshot_failed")
        return HeldState(
            record=record.copy(),
            snapshot=state,
            end=0 if sequence is None else sequence.end(),
            is_redone=is_redone,
            needs_logits=needs_logits and record.logits_from is not None,
        )

    def resume(self, held: HeldState, decode: Callable[[NDArray[np.int32]], object]) -> None:
        """Bring back the positions that `suspend` found.

        Errors: StateError if they can't be brought back.
        """
        if self.sequence is None or (held.snapshot is None and not held.is_redone):
            raise StateError(
                "another generation used this model meanwhile, and this one could not be "
                "suspended; end a stream before the next request, or use a Llama for each"
            )
        record, copy = self.record, held.record
        record.reset()
        record.prompt_begins(copy.scope, copy.work, copy.n_prompt)
        record.stops_at(copy.stops, copy.n_opening)
        if held.snapshot is None:
            # Decode the same batches again, except for the aligned positions that the cache has.
            self.sequence.clear()
            n_aligned = copy.n_aligned
            reached = self.restore(copy.ids[: n_aligned + 1], 0).stop if n_aligned else 0
            decode(copy.ids[reached:n_aligned])
            for start, stop in pairwise([*copy.batches, len(copy.ids)]):
                decode(copy.ids[start:stop])
        else:
            self.sequence.load_snapshot(held.snapshot, held.end)
        record.resumed(copy)
        if held.needs_logits and held.snapshot is not None and copy.logits_from is not None:
            # A snapshot holds no logits: decode the last batch as it was decoded before.
            if not self.trim(copy.logits_from):
                raise StateError(
                    "another generation used this model before this one began; ask again"
                )
            decode(copy.ids[copy.logits_from :])
