"""Llama: llama_cpp.Llama that restores the states of its prompts and takes its ids from a cache.

llama_cpp.Llama decides in `generate` how much of a prompt its context still holds. Here `_hold`
decides that first, with the prefix cache as a second source, and `generate` decodes only the rest.
The record of the context is in `context`, the rules of saving and restoring in `model_states`.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama_cpp

from tokcache._validate import require_scope
from tokcache.errors import InvalidConfig, InvalidText, InvalidTokens, StateError
from tokcache.llama.arguments import checked_messages, checked_prompt, checked_texts
from tokcache.llama.explanation import Explanation, explained
from tokcache.llama.gate import Steps
from tokcache.llama.loading import LoadedLlama
from tokcache.llama.model_states import MAX_SHOWN
from tokcache.llama.prewarm import Prewarm
from tokcache.llama.scopes import ScopedItems
from tokcache.llama.tokenizer import OWN_SCOPE, ModelTokenizer, int32_ids
from tokcache.state.reasons import Miss, MissReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from tokcache.llama.model_states import Held, HeldState
    from tokcache.llama.prewarm import Prewarmed
    from tokcache.state.handles import Work

_COMPARED = 32  # ids on each side of the place where a prompt parts from generated ones
_GENERATE = inspect.signature(llama_cpp.Llama.generate)


@dataclass(frozen=True, slots=True)
class Reuse:
    """How much of the last prompt did not have to be decoded.

    `miss` says why no more of it was reused; None if all of it was that can be. With `splice=True`
    `splice_refusal` is the first reason for which an answer in it kept the ids of its text, ""
    if none did.

    Units: tokens; `n_in_context` were still in the context, `n_restored` came from the prefix
    cache, the rest of `n_prompt` was decoded; `n_spliced` are generated ids that took the place of
    others; `seconds` is how long finding and restoring took.
    """

    n_prompt: int
    n_in_context: int
    n_restored: int
    seconds: float
    miss: Miss | None = None
    n_spliced: int = 0
    splice_refusal: str = ""

    @property
    def n_decoded(self) -> int:
        """Return how many tokens of the prompt were decoded."""
        return self.n_prompt - self.n_in_context - self.n_restored


@dataclass(frozen=True, slots=True)
class _Parting:
    """The ids around the place where a prompt parted from the nearest held prefix of its scope."""

    scope: str | None
    work: Work | None
    miss: Miss
    shared: list[int]
    held: list[int]
    new: list[int]


@dataclass(frozen=True, slots=True)
class _Suspended:
    """A generation that was suspended for another one."""

    held: HeldState
    scores: NDArray[np.float32] | None
    sampler: Any
    mirostat_mu: Any


class Llama(LoadedLlama):
    """A llama_cpp.Llama that decodes no prefix twice.

    `tokenizer` is a tokenizer that tokcache wraps, or one that it can wrap; without it llama.cpp's
    own tokenizer is used, through an L0 cache. `prefix_cache` may be shared by any number of models
    and threads. `scope` separates the texts and states of one tenant from those of others, in the
    context too: `create_completion(…, scope="tenant-a")`, and so every method that takes text or
    tokens; a request without it has the object's own scope. `public_prefix` are ids that prompts
    may begin with and that any scope may know (a system prompt, BOS included): as far as a prompt
    begins with them, its states are shared by all scopes.

    llama.cpp's results depend, in their last bits, on how a prompt is split into batches. With
    `reproducible=True` prompts are decoded in pieces that end at multiples of the cache's
    `block_tokens` (256 without a cache), and only such pieces are reused: a prompt's logits are,
    bit for bit, those of an uncached reproducible `Llama` with the same settings on the same CPU
    (tests/integration/test_llama_memories.py). With `n_batch` of at least `block_tokens` they are
    also those of a plain llama_cpp.Llama with `n_batch=block_tokens` that begins each prompt with
    an empty context (tests/integration/test_llama_plain.py); a plain one with another `n_batch`
    splits prompts elsewhere. With `swa_full=False` (llama_cpp's default is True) that holds until
    the plain one has filled its window's cells (n_swa + n_ubatch, rounded up to a multiple of 256)
    and uses them again: states are copied through a second sequence, for which llama.cpp adds n_swa
    cells, so later positions are in other cells and are added up in another order.

    In the default mode the longest prefix is reused, and logits differ as those of different
    batch sizes do. On Gemma 3 270M (Q4_K_M, logits' standard deviation 4.3) the largest difference
    after a prompt was 0.39 at the median and 0.84 at most; between plain llama_cpp in batches of 37
    and in one batch it was 0.72 and 1.16. Of 32 greedy answers of 16 tokens 7 differed, between the
    two plain ones 14 (`python -m bench run real-model`). On the tiny test model (standard deviation
    1.5) the difference was at most 0.005 without and 0.09 with flash attention, between batch sizes
    0.003 and 0.095 (`python -m pytest tests/integration/test_llama_exact.py -k tolerance -s`, the
    larger figures of two CPUs).

    Full attention and sliding windows are reused to the token. Recurrent models and hybrids are
    reused up to a multiple of `block_tokens`, the token before a whole prompt's last one, the end
    of an answer, or where the last question begins or ends and where the next prompt is likely to
    part: their earlier states are overwritten. These places come from the chat template;
    `message_openers` ({"user": text, "assistant": text}) names the texts that open a message, where
    the template does not tell. Windows, recurrent models and hybrids
    are therefore decoded in pieces, and saved at the end of each. In reproducible mode
    `block_tokens` must not be larger than the window.

    With `splice=True` the prompts of completions take the generated ids of earlier answers of their
    scope, instead of those of their text encoded again, where the text stays the same byte for
    byte (tokcache.llama.answers names the conditions). Such a prompt is reused to the end of its
    last answer, but its ids depend on the answers before. `last_reuse` says how many were spliced.

    Architectures for which llama.cpp may choose another memory (tokcache.llama.memory_type names
    the known ones), embedding contexts, `logits_all` and draft models run uncached, counted by
    reason in `prefix_cache.stats().refusals`; a line in the log says so once, with the cure
    (tokcache.llama.reasons).

    States are filed under the model's content. A file over 16 MiB is hashed in the background from
    construction on, about a second a gigabyte, and its digest is remembered for later processes
    (see tokcache.llama.file_digests). A prompt that comes before the digest is decoded and counted
    as `fingerprint_pending`, and the first request after it stores its state. The states of a
    window that has moved on, of a hybrid, and the blocks of a recurrent model are not stored then:
    they are overwritten. A model file that is overwritten in place while it is mapped (llama.cpp's
    default) changes the loaded weights, which can't be noticed: replace model files by renaming new
    ones over them.

    Errors: MissingFile, InvalidModel; VocabularyMismatch; InvalidText, InvalidTokens, InvalidScope;
            ModelClosed after close() or a fork; llama_cpp's own otherwise. A cache that fails
            costs a decode, never an exception.
    Threads: safe. Generations take turns; one whose consumer pauses is suspended for another.
            Other calls (a setting, `reset`, the end of a stream or of the model) wait at most for
            the decode in progress (see tokcache.llama.gate). A generation that was made by hand
            (reset, eval, sample) is not suspended: another one may replace it.
    """

    last_reuse = Reuse(0, 0, 0, 0.0)
    _parting: _Parting | None = None

    # Calls that use the context, one at a time

    def eval(self, tokens: Any) -> None:
        """Decode `tokens` after the held ones; in reproducible mode, split at block multiples."""
        gate = self._open_gate()
        with gate.step():
            if not hasattr(tokens, "__len__"):
                raise InvalidTokens(f"tokens must be int32 ids, not {type(tokens).__name__}")
            self._record.tokens_begin(self._scopes.current())
            began, done = time.perf_counter(), 0
            while done < len(tokens):
                # Others may enter now, and change settings or use the context.
                began += gate.pause()
                stop = done + self._states.n_next(len(tokens) - done, int(self.n_batch))
                self._eval_batch(tokens[done:stop])
                done = stop
            self._states.note_prefill(len(tokens), began)

    def _eval_batch(self, tokens: Any) -> None:
        """Decode tokens that fit one batch, and save the state if that can't be done later."""
        record, states = self._record, self._states
        start = record.n_tokens
        record.update_begins()
        try:
            super().eval(tokens)
        except BaseException as error:
            # Only of attention is it known that a failed batch has changed nothing before it.
            sequence = self._sequence if states.memory.is_plain else None
            is_intact = sequence is not None and sequence.trim(start, in_place=self.reproducible)
            if not is_intact:
                self._ctx.kv_cache_clear()
            record.decode_failed(is_rest_intact=is_intact)
            if isinstance(error, (TypeError, OverflowError)):
                int32_ids(tokens)  # names the one that is not an id
            raise
        record.decoded(self.n_batch)
        states.save_as_reached()

    def reset(self) -> None:
        """Empty the context."""
        with self._open_gate().step():
            if self._sequence is not None:
                self._sequence.clear()
            super().reset()
            self._record.reset()

    def cache_clear(self, *, scope: str | None = None) -> None:
        """Clear the cached texts of one scope, and its tokens in the context; all without one.

        Its states in the prefix cache are cleared by `prefix_cache.clear(scope=…)`. A wrapped
        tokenizer that others use too is cleared for all of them.

        Errors: InvalidScope; ModelClosed.
        """
        scope = require_scope(scope)
        self._require_open()
        clear = getattr(self.tokenizer_, "cache_clear", None)  # llama_cpp's own have no cache
        if clear is not None:
            clear(scope=scope)
        with self._open_gate().step():
            if self._splicer is not None:
                self._splicer.answers.clear(lambda each: scope is None or each == scope)
            if self._parting is not None and scope in (None, self._parting.scope):
                self._parting = None
            if scope is None or self._record.may_hold(scope):
                self.reset()

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """Sample a token, as llama_cpp.Llama does."""
        with self._open_gate().step():
            return super().sample(*args, **kwargs)

    def embed(
        self,
        input: Any,  # noqa: A002 (llama_cpp's name)
        *args: Any,
        scope: str | None = OWN_SCOPE,
        **kwargs: Any,
    ) -> Any:
        """Embed texts, as llama_cpp.Llama does."""
        texts = checked_texts(input)
        with self.serving(scope), self._open_gate().step():
            return super().embed(texts, *args, **kwargs)

    def create_embedding(self, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any) -> Any:
        """Embed texts, as llama_cpp.Llama does."""
        with self.serving(scope):
            return super().create_embedding(*args, **kwargs)

    def save_state(self) -> Any:
        """Return the whole context's state, as llama_cpp.Llama does."""
        with self._open_gate().turn():
            self._require_open()
            return super().save_state()

    def load_state(self, state: Any) -> None:
        """Load a whole context's state; it is never stored in the prefix cache."""
        with self._open_gate().step():
            ids = self._record.ids
            self._record.update_begins()
            try:
                super().load_state(state)
            except BaseException:
                # It is not known how much of the state was loaded.
                self._record.loaded(self._scopes.current())
                self._record.ids = ids
                self.reset()
                raise
            self._record.loaded(self._scopes.current())

    def tokenize(
        self,
        text: bytes,
        add_bos: bool = True,
        special: bool = False,
        *,
        scope: str | None = OWN_SCOPE,
    ) -> list[int]:
        """Return the ids of `text`."""
        gate = self._open_gate()
        gate.require_open()
        if not isinstance(text, bytes):
            raise InvalidText(f"text must be bytes, not {type(text).__name__}; pass text.encode()")
        if gate.is_inside():  # `embed` decodes again and again, with a text encoded in between
            gate.pause(only_between=True)
        tokenizer = self.tokenizer_
        if not isinstance(tokenizer, ModelTokenizer):
            tokens: list[int] = tokenizer.tokenize(text, add_bos, special)
            return tokens
        return tokenizer.tokenize(text, add_bos, special, scope=self._scopes.of(scope))

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of `tokens`."""
        self._require_open()
        text: bytes = self.tokenizer_.detokenize(tokens, prev_tokens=prev_tokens, special=special)
        return text

    # Prefixes that requests will begin with

    def prewarm(
        self,
        prefixes: Iterable[Any],
        *,
        scope: str | None = OWN_SCOPE,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[Prewarmed]:
        """Prefill prefixes before the first request needs them, store and pin their states.

        A prefix is a text, a list of messages, {"messages": …, "tools": …} or token ids. A chat is
        prefilled as far as its prompt does not depend on the next question; one that ends with a
        question, as a whole. The states are evicted and pruned after all that are not pinned, until
        `unpin`; a disk tier keeps pins for later processes, where the same call restores the states
        instead of decoding them.

        Waits for the digest of the model file, and works while nobody else needs the context: a
        request of another thread waits for one decode at most. `progress(n_done, n_total)` is
        called with numbers of tokens after each decode; it must not use the model.

        Returns one result a prefix; a prefix that can't be warmed is refused there by reason
        (tokcache.reasons.LLAMA_REFUSALS), and the context is as it was.

        Errors: InvalidConfig without a prefix cache; InvalidText, InvalidTokens, InvalidScope
                before anything is decoded; StateError inside a request of this model; ModelClosed.
        """
        with self.serving(scope):
            return self._prewarming().run(prefixes, progress)

    def unpin(self, prefixes: Iterable[Any], *, scope: str | None = OWN_SCOPE) -> int:
        """End the pins that `prewarm` set for these prefixes; return how many were in memory.

        Their states stay until others need the room.

        Errors: as `prewarm`.
        """
        with self.serving(scope):
            return self._prewarming().unpin(prefixes)

    def _prewarming(self) -> Prewarm:
        gate, scope = self._open_gate(), self._scopes.current()
        gate.require_open()
        if self.prefix_cache is None:
            raise InvalidConfig(
                "this model has no prefix cache that could keep prefixes; pass prefix_cache="
            )
        if gate.is_inside():
            raise StateError(
                "prefixes can't be warmed inside a request of the same model; call prewarm from "
                "another thread"
            )
        return Prewarm(self, gate, self._states, self._eval_batch, scope)

    # Completions

    def create_chat_completion(
        self, messages: Any, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any
    ) -> Any:
        """Complete a chat, as llama_cpp.Llama does."""
        messages = checked_messages(messages)
        with self.serving(scope):
            if self.chat_handler is None:
                answer = super().create_chat_completion(messages, *args, **kwargs)
            else:
                # A handler of the user's may fill the context itself before it asks for a
                # completion.
                with self._open_gate().step(is_generation=True):
                    answer = super().create_chat_completion(messages, *args, **kwargs)
        if scope is OWN_SCOPE or isinstance(answer, dict):
            return answer
        return ScopedItems(answer, self._scopes, scope)

    def create_completion(
        self, prompt: Any, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any
    ) -> Any:
        """Complete a prompt, a str or ids, as llama_cpp.Llama does."""
        self._require_open()
        with self.serving(scope):
            return super().create_completion(checked_prompt(prompt), *args, **kwargs)

    def __call__(self, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any) -> Any:
        """Complete a prompt, as llama_cpp.Llama does."""
        with self.serving(scope):
            return super().__call__(*args, **kwargs)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Any:
        complete = super()._create_completion
        if self._splicer is None or args:
            completion = complete(*args, **kwargs)
        else:
            scope = self._scopes.current()
            completion = self._splicer.completing(complete, kwargs, self.tokenize, scope)
        steps = Steps(self._open_gate(), completion, scope=self._scopes.current())
        # Without `stream` the caller takes one item and drops the rest.
        return steps if kwargs.get("stream") else iter((steps.only(),))

    def generate(
        self, tokens: Any, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any
    ) -> Any:
        """Yield token after token, as llama_cpp.Llama does."""
        gate = self._open_gate()
        scope = self._scopes.of(scope)
        if isinstance(tokens, str) or not (
            hasattr(tokens, "__iter__") or hasattr(tokens, "__len__")
        ):
            raise InvalidTokens(
                f"tokens must be int32 ids, not {type(tokens).__name__}; tokenize makes them"
            )
        generation = self._generate(tokens, args, kwargs)
        return generation if gate.is_inside() else Steps(gate, generation, scope=scope)

    def _generate(self, tokens: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _GENERATE.bind(self, tokens, *args, **kwargs)
        is_prompt = call.arguments.get("reset", True)
        if is_prompt:
            ids, call.arguments["tokens"] = self._hold(tokens)
            call.arguments["reset"] = False
        generation = super().generate(*call.args[1:], **call.kwargs)
        if self._splicer is not None and is_prompt:
            scope, work = self._record.scope, self._record.work
            generation = self._splicer.remembering(generation, ids, scope, work)
        yield from generation

    def _hold(self, tokens: Any) -> tuple[NDArray[np.int32], Any]:
        """Bring the longest known prefix into the context.

        Return the prompt's ids, and the tokens left to decode.
        """
        began = time.perf_counter()
        tokens = tokens if isinstance(tokens, list) else list(tokens)
        scope, states = self._scopes.current(), self._states
        is_ours = isinstance(self.tokenizer_, ModelTokenizer)
        ids = self.tokenizer_.int32_ids(tokens, scope=scope) if is_ours else int32_ids(tokens)
        if not len(ids):
            raise InvalidTokens("the prompt has no tokens, and the model adds no BOS to it")
        if ids.max() >= self._n_vocab:  # llama.cpp would fail in the middle of the prompt
            position = int((ids >= self._n_vocab).argmax())
            raise InvalidTokens(
                f"token {ids[position]:,} at position {position:,} is not in the model's "
                f"vocabulary of {self._n_vocab:,} tokens; encode the prompt with its tokenizer"
            )

        held = states.hold(ids, scope)
        if not held.n_tokens:
            self.reset()
        miss = None if held.miss is None else self._explained(held, ids, scope)
        n_restored, seconds = held.n_tokens - held.n_in_context, time.perf_counter() - began
        n_spliced, refusal = (0, "") if self._splicer is None else self._splicer.take()[1:]
        if refusal:
            states.refuse(refusal)
        self.last_reuse = Reuse(
            len(ids), held.n_in_context, n_restored, seconds, miss, n_spliced, refusal
        )
        if states.cache is not None:
            states.cache.count_prompt(
                len(ids), context_tokens=held.n_in_context, restored_tokens=n_restored, miss=miss
            )
        return ids, tokens[held.n_tokens :]

    def _explained(self, held: Held, ids: NDArray[np.int32], scope: str | None) -> Miss | None:
        """Return the miss without text, and keep the ids around it for `explain_miss`."""
        miss = held.miss
        if miss is None:
            return None
        at, own = miss.at_token, list(miss.held_tokens)
        if held.is_generated:
            # The texts of both sides are compared as far as both go: a few ids tell.
            texts = [
                self.detokenize(each, special=True)
                for each in (own[:_COMPARED], ids[at : at + _COMPARED].tolist())
            ]
            n_bytes = min(map(len, texts))
            if n_bytes and texts[0][:n_bytes] == texts[1][:n_bytes]:
                miss = miss._replace(reason=MissReason.RE_ENCODING)
        miss = miss._replace(held_tokens=())
        before, after = ids[:at].tolist(), ids[at : at + MAX_SHOWN].tolist()
        self._parting = _Parting(scope, self._record.work, miss, before, own, after)
        return miss

    def explain_miss(self, *, scope: str | None = OWN_SCOPE) -> Explanation | None:
        """Return why the last prompt was reused no further, with its text.

        None if all of it was reused, if it was not of this scope, or if the scope was cleared.

        Errors: InvalidScope; ModelClosed.
        Cost:   decodes the ids of the prompt to text, and classifies the difference.
        """
        scope = self._scopes.of(scope)
        with self._open_gate().step():
            parting = self._parting
            if parting is None or parting.miss is not self.last_reuse.miss:
                return None
            is_cleared = parting.work is not None and parting.work.is_void
            if parting.scope != scope or is_cleared:
                return None
            shared, held, new = (
                self.detokenize(ids, special=True).decode("utf-8", "replace")
                for ids in (parting.shared, parting.held, parting.new)
            )
        return explained(parting.miss, shared, held, new)

    # Called by the gate

    def end_generation(self) -> None:
        """Save the state of the decoded tokens; in the default mode the answer's too."""
        self._states.end_generation()

    def suspend(self, *, has_started: bool, is_decoding: bool) -> _Suspended:
        """Return all that the present generation needs to go on later."""
        # A draft model samples several tokens from one decode: its logits are in no snapshot.
        is_lost = self.draft_model is not None and not is_decoding
        return _Suspended(
            held=self._states.suspend(
                needs_logits=not (has_started or is_decoding),
                is_lost=is_lost,
                is_repeatable=self.draft_model is None,
            ),
            scores=self.scores[: self.n_tokens].copy() if self._logits_all else None,
            sampler=self._sampler,
            mirostat_mu=self._mirostat_mu,
        )

    def resume(self, suspended: _Suspended) -> None:
        """Undo `suspend`."""
        self._states.resume(suspended.held, self.eval)
        if suspended.scores is not None:
            self.scores[: self.n_tokens] = suspended.scores
        self._sampler, self._mirostat_mu = suspended.sampler, suspended.mirostat_mu
