"""SequenceStates: prefix states for code that drives llama.cpp itself, with many sequences."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from tokcache._validate import require_bool, require_int
from tokcache.errors import InvalidConfig, StateError
from tokcache.llama.keeper import Keeper, Restored
from tokcache.llama.memory_type import MemoryType
from tokcache.llama.reasons import explained
from tokcache.llama.sequence import Sequence
from tokcache.llama.tokenizer import OWN_SCOPE
from tokcache.state.cache import PrefixStateCache
from tokcache.state.names import token_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from tokcache.state.handles import Work
    from tokcache.state.namespace import Namespace


@dataclass(slots=True)
class _Own:
    """One sequence of the caller's, and the namespace of its states.

    `generation` counts how often its positions were replaced, `n_prompt` is the length of the
    prompt that they were restored for.
    """

    sequence: Sequence
    keeper: Keeper
    states: Namespace
    generation: int = 0
    n_prompt: int = 0


@dataclass(frozen=True, slots=True)
class _Pending:
    """A save to be taken later: of these tokens, if the sequence has not changed until then."""

    seq_id: int
    generation: int
    states: Namespace
    ids: NDArray[np.int32]
    mark: bytes
    work: Work


class SequenceStates:
    """The states of a context's sequences: restored before a prompt, saved after a decode.

    ```python
    n_past = sequences.restore(tokens, seq_id)
    for stop in sequences.stops(n_past, len(tokens)):
        decode(tokens[n_past:stop], seq_id, first_position=n_past)
        sequences.save(tokens[:stop], seq_id)
        n_past = stop
    ```

    `ctx` is a llama_context_p with `kv_unified=True` and one sequence more than are used: blocks
    are copied through the last one. `scope` separates stored states from those of other scopes;
    each sequence may serve another one (`restore`, `reset`). `fingerprint` covers everything that
    decides the numbers in a state (`tokcache.llama.state_fingerprint` makes one). `public_prefix`
    are token ids that prompts may begin with and that are no scope's secret: a system prompt, say;
    their states are stored once for all scopes. Logits differ from those of an uncached run as
    those of other batches and other cells do.

    With `reproducible=True` a prompt is decoded in pieces that end at multiples of the cache's
    `block_tokens` (`stops` gives them; each is a decode of its own, without tokens of other
    sequences), and only those pieces are saved: generated tokens are not. A prompt is then decoded
    in the same batches with and without the cache. These states and those of the default mode never
    meet.

    Errors: StateError for a context that can't do it, before llama.cpp ends the process, and for a
            memory that can't be reproducible; InvalidConfig, InvalidScope or InvalidTokens for an
            argument of the wrong kind. A state that can't be saved, restored or forked costs a
            decode and counts by reason in `prefix_cache.stats().refusals`.
    Threads: those that may use the context: one at a time.
    """

    def __init__(
        self,
        ctx: Any,
        *,
        prefix_cache: PrefixStateCache,
        fingerprint: bytes,
        scope: str | None = None,
        public_prefix: object = (),
        reproducible: bool = False,
    ) -> None:
        if not isinstance(prefix_cache, PrefixStateCache):
            raise InvalidConfig(f"prefix_cache must be a PrefixStateCache, not {prefix_cache!r}")
        if not isinstance(fingerprint, bytes) or not fingerprint:
            raise InvalidConfig(f"fingerprint must be bytes, at least one, not {fingerprint!r}")
        _require_blocks(ctx)
        self._ctx = ctx
        self._memory = MemoryType.of(ctx)
        self._cache = prefix_cache
        self._is_reproducible = require_bool("reproducible", reproducible)
        if reproducible:
            n_block, n_ctx = prefix_cache.block_tokens, int(llama_cpp.llama_n_ctx(ctx))
            why_not = self._memory.why_not_reproducible(n_block, n_ctx)
            if why_not is not None:
                raise StateError(explained(why_not))
            key = n_block.to_bytes(8, "little")
            fingerprint = blake2b(fingerprint, key=key, person=b"tokcache.repro.1").digest()
        self._states = prefix_cache.namespace(
            fingerprint,
            scope=scope,
            public_prefix=public_prefix,
            aligned=self._memory.is_recurrent or reproducible,
        )
        self._scratch = int(llama_cpp.llama_n_seq_max(ctx)) - 1
        self._n_vocab = int(
            llama_cpp.llama_vocab_n_tokens(
                llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx))
            )
        )
        self._own: dict[int, _Own] = {}
        self._pending: list[_Pending] = []

    @property
    def n_sequences(self) -> int:
        """How many sequences may be used: ids from 0 on."""
        return self._scratch

    def stops(self, n_past: int, n_tokens: int) -> list[int]:
        """Return where to stop decoding, and save, on the way from `n_past` to `n_tokens`.

        States of windows and recurrent memories can only be saved when they are reached. The last
        token of a prompt is decoded alone where the same prompt can then begin before it.
        """
        n_past = require_int("n_past", n_past, 0)
        n_tokens = require_int("n_tokens", n_tokens, n_past)
        n_block, is_reproducible = self._cache.block_tokens, self._is_reproducible
        step = self._memory.stops(n_block, is_reproducible=is_reproducible)
        step = n_block if is_reproducible else step
        stops = set(range(n_past // step * step + step, n_tokens, step) if step else ())
        if self._memory.is_recurrent and not is_reproducible:
            stops.add(n_tokens - 1)
        return sorted(stop for stop in {*stops, n_tokens} if stop > n_past)

    def restore(self, tokens: object, seq_id: int, *, scope: str | None = OWN_SCOPE) -> int:
        """Put the longest known prefix of `tokens`, without the last, in place of the sequence.

        Return its length: decode the tokens from there on. The positions that the sequence held are
        removed. From now on it serves `scope`, by default the object's: its states are saved for
        that scope. If you let a prompt continue in place instead, count it with
        `prefix_cache.count_prompt(len(tokens), context_tokens=n_past)`.
        """
        states, own, ids = self._namespace(scope), self._sequence(seq_id), self._ids(tokens)
        own.generation += 1
        own.states, own.n_prompt = states, len(ids)
        own.sequence.clear()
        is_usable = len(ids) > 0 and self._is_usable(ids)
        restored = own.keeper.restore(states, ids, 0) if is_usable else Restored(0, 0)
        miss = restored.miss
        n_block = self._cache.block_tokens if self._is_reproducible else 1
        if miss is not None:
            goal = (len(ids) - 1) // n_block * n_block
            miss = None if restored.stop >= goal else miss._replace(held_tokens=())
        self._cache.count_prompt(len(ids), restored_tokens=restored.stop, miss=miss)
        return restored.stop

    def save(self, tokens: object, seq_id: int) -> int:
        """Save the state of `tokens`, which the sequence holds; return the new positions."""
        own, ids = self._sequence(seq_id), self._ids(tokens)
        if not self._is_savable(own, ids) or not self._is_usable(ids):
            return 0
        if not own.sequence.is_at(len(ids)):
            self._cache.refuse("sequence_is_elsewhere")
            return 0
        return own.keeper.save(own.states, ids)

    def reset(self, seq_id: int, *, scope: str | None = OWN_SCOPE) -> None:
        """Note that the caller removed or replaced positions of the sequence, for `scope`."""
        states, own = self._namespace(scope), self._sequence(seq_id)
        own.generation += 1
        own.states, own.n_prompt = states, 0

    def fork(self, source: int, targets: Iterable[int], n_tokens: int | None = None) -> int:
        """Let other sequences begin with the first `n_tokens` positions of one, by default all.

        Return how many positions they hold now: decode each branch from there on. The branches
        share the cells of the source, so no bytes are copied (a recurrent state is, when a branch
        is decoded), and serve its scope. Positions that they held are removed. The source may be
        decoded further, removed or restored.

        It returns 0, and nothing has changed, where this memory can't do it: a recurrent memory or
        a hybrid forks only at its present end; a window only where the positions that the next
        token looks back at are still there. In reproducible mode a fork ends at a multiple of the
        cache's `block_tokens`, and the states of the branches' own tokens are not saved.

        Errors: InvalidConfig for a sequence that the context does not have, or that is the source
                or named twice; nothing has changed then.
        Cost:   a call of llama_memory_seq_cp for each target.
        """
        own, last = self._sequence(source), self._scratch - 1
        ids = [require_int("a target", each, 0, last) for each in targets]
        if len({source, *ids}) < len(ids) + 1:
            raise InvalidConfig(f"targets must differ from each other and from {source}, not {ids}")
        end = own.sequence.end()
        n_tokens = end if n_tokens is None else require_int("n_tokens", n_tokens, 1)
        if self._is_reproducible:
            n_tokens -= n_tokens % self._cache.block_tokens
        refusal = self._why_not_forked(own.sequence, n_tokens, end)
        if refusal is not None:
            self._cache.refuse(refusal)
            return 0
        for each in ids:
            target = self._sequence(each)
            target.generation += 1
            target.states, target.n_prompt = own.states, 0
            target.sequence.branch_from(own.sequence, n_tokens)
        return n_tokens if ids else 0

    def _why_not_forked(self, sequence: Sequence, n_tokens: int, end: int) -> str | None:
        if self._memory.refusal is not None:
            return self._memory.refusal
        if not 0 < n_tokens <= end:
            return "sequence_is_elsewhere"
        if self._memory.is_recurrent and n_tokens < end:
            return "fork_of_the_past"
        return None if sequence.holds(n_tokens) else "fork_outside_window"

    # Saves that are taken later

    def save_later(self, tokens: object, seq_id: int) -> None:
        """Save the state of `tokens` at the next `take_pending`, if it is still there then.

        Cost: reads the state of the last position; of a recurrent memory the whole state.
        """
        own, ids = self._sequence(seq_id), self._ids(tokens)
        if not self._is_savable(own, ids) or not self._is_usable(ids):
            return
        if not own.sequence.is_at(len(ids)):
            self._cache.refuse("sequence_is_elsewhere")
            return
        mark = _mark(own.sequence, len(ids))
        work = self._cache.begin(own.states.scope)
        self._pending.append(_Pending(seq_id, own.generation, own.states, ids, mark, work))

    def take_pending(self) -> int:
        """Take the pending saves; return the new positions.

        A save is dropped and counted if its sequence was decoded further, reset or used for another
        prompt, so that the state there now is not that of its tokens, and if its scope was cleared.
        """
        n_saved, pending = 0, self._pending
        self._pending = []
        for each in pending:
            own, n_tokens = self._sequence(each.seq_id), len(each.ids)
            is_same = own.generation == each.generation and own.sequence.is_at(n_tokens)
            if each.work.is_void:
                self._cache.refuse("cleared")
            elif not is_same or _mark(own.sequence, n_tokens) != each.mark:
                self._cache.refuse("pending_save_overtaken")
            else:
                n_saved += own.keeper.save(each.states, each.ids)
        return n_saved

    # Arguments

    def _namespace(self, scope: str | None) -> Namespace:
        return self._states if scope is OWN_SCOPE else self._states.replace(scope=scope)

    def _sequence(self, seq_id: int) -> _Own:
        seq_id = require_int("seq_id", seq_id, 0, self._scratch - 1)
        if seq_id not in self._own:
            sequence = Sequence(
                self._ctx,
                self._memory,
                is_unified=True,
                seq_id=seq_id,
                scratch=self._scratch,
                is_alone=False,
            )
            keeper = Keeper(sequence, self._memory, is_reproducible=self._is_reproducible)
            self._own[seq_id] = _Own(sequence, keeper, self._states)
        return self._own[seq_id]

    def _is_savable(self, own: _Own, ids: NDArray[np.int32]) -> bool:
        """Return whether there is something to save: in reproducible mode whole pieces of prompts.

        A prompt's last piece is decoded again each time, and the tokens after it were generated.
        """
        is_piece = len(ids) <= own.n_prompt and len(ids) % self._cache.block_tokens == 0
        return len(ids) > 0 and (is_piece or not self._is_reproducible)

    def _ids(self, tokens: object) -> NDArray[np.int32]:
        return np.frombuffer(token_bytes(tokens), np.int32)

    def _is_usable(self, ids: NDArray[np.int32]) -> bool:
        reason = self._memory.refusal
        if reason is None and ((ids < 0) | (ids >= self._n_vocab)).any():
            reason = "tokens_outside_the_vocabulary"
        if reason is not None:
            self._cache.refuse(reason)
        return reason is None


def _require_blocks(ctx: Any) -> None:
    n_seq_max = int(llama_cpp.llama_n_seq_max(ctx))
    # Without a common pool the context's positions are divided among the sequences.
    is_unified = llama_cpp.llama_n_ctx_seq(ctx) == llama_cpp.llama_n_ctx(ctx)
    if n_seq_max < 2 or not is_unified:  # noqa: PLR2004 (one to use, one to copy through)
        raise StateError(
            "states of sequences need a context with kv_unified=True and n_seq_max of one more "
            f"than are used; this one has n_seq_max={n_seq_max}, "
            f"{'one pool' if is_unified else 'a pool for each sequence'}"
        )


def _mark(sequence: Sequence, n_tokens: int) -> bytes:
    """Return a digest that distinguishes this state from others of the same length."""
    start = n_tokens - 1
    buffer = np.empty(sequence.block_bytes(start, n_tokens), np.uint8).data
    sequence.read_block(start, n_tokens, buffer)
    return blake2b(buffer, digest_size=32).digest()
