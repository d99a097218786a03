"""Llama: llama_cpp.Llama, with its prompts' states restored and saved and its ids from the cache.

llama_cpp.Llama decides in `generate` what of a prompt its context holds already. Here that
decision is made before it (`_hold`), with the prefix cache as a second source, and `generate` is
told to decode just the rest.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from tokcache._validate import require_bool, require_int, require_scope
from tokcache.errors import (
    FileChanged,
    InvalidConfig,
    InvalidModel,
    InvalidText,
    InvalidTokens,
    MissingFile,
    ModelClosed,
    StateError,
)
from tokcache.llama.fingerprint import LoadedFiles, fingerprint
from tokcache.llama.gate import Gate, Steps
from tokcache.llama.keeper import Keeper
from tokcache.llama.memories import Memory
from tokcache.llama.reasons import explained, is_known
from tokcache.llama.sequence import Sequence
from tokcache.llama.tokenizer import (
    OWN_SCOPE,
    ModelTokenizer,
    WrappedTokenizer,
    check_vocabulary,
    int32_ids,
)
from tokcache.state.cache import PrefixStateCache
from tokcache.state.names import token_bytes
from tokcache.text.token_ids import TokenIds
from tokcache.text.wrappers import wrap

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from tokcache.state.handles import Work
    from tokcache.state.namespace import Namespace

_log = logging.getLogger("tokcache")

UNKNOWN = -1  # stands in input_ids where a position was written by no token (images): no id is -1
BLOCK_TOKENS = 256  # the grid of reproducible mode without a prefix cache, as with one by default
_PREFILL_TOKENS = 16  # fewer in one call say little of what a prompt takes
_MIXED: Any = object()  # the scope of a context that tokens of several scopes are in: nobody's
_GENERATE = inspect.signature(llama_cpp.Llama.generate)


@dataclass(frozen=True, slots=True)
class Reuse:
    """What the last prompt did not have to decode.

    Units: tokens; `n_in_context` were still in the context, `n_restored` came from the prefix
    cache, the rest of `n_prompt` was decoded; `seconds` is what finding and restoring took.
    """

    n_prompt: int
    n_in_context: int
    n_restored: int
    seconds: float

    @property
    def n_decoded(self) -> int:
        """Return how many tokens of the prompt were decoded."""
        return self.n_prompt - self.n_in_context - self.n_restored


@dataclass(slots=True)
class _Suspended:
    state: list[memoryview] | None  # None: could not be taken, the generation can't go on
    n_tokens: int
    end: int  # the position after the last one: an image may have fewer positions than tokens
    n_own: int
    n_grid: int
    grid: tuple[bool, int]  # what n_grid was counted with
    batches: list[int]  # where those begin that were decoded after the grid
    is_redone: bool  # they are decoded again: no snapshot would give the last bits
    n_prompt: int
    scope: Any
    work: Work | None
    input_ids: NDArray[np.int32]
    scores: NDArray[np.float32] | None
    requires_eval: bool
    logits_from: int | None  # where the batch begins whose logits are still to be sampled from
    sampler: Any
    mirostat_mu: Any


class Llama(llama_cpp.Llama):  # type: ignore[misc]
    """A llama_cpp.Llama that decodes no prefix twice.

    `tokenizer` is a tokenizer that tokcache wraps, or one that it can wrap; without it the
    model's own stands behind an L0 cache. `prefix_cache` may be shared by any number of models
    and processes' threads. `scope` keeps what a request stores apart from other scopes', in the
    context too: `create_completion(…, scope="tenant-a")`, and so every method that takes text or
    tokens; without it the object's own scope is meant. `public_prefix` are the ids that prompts
    may begin with and that are no scope's secret (a system prompt, BOS included): as far as a
    prompt begins with them, its states are shared by all scopes.

    llama.cpp's results depend, in their last bits, on how a prompt is split into batches. With
    `reproducible=True` prompts are decoded in pieces that end at multiples of the cache's
    `block_tokens` (256 without a cache), and only such pieces are reused: a prompt's logits are,
    bit for bit, those of an uncached reproducible `Llama` with the same settings on the same CPU
    (tests/integration/test_llama_memories.py), whatever was cached. With `n_batch` of at least
    `block_tokens` they are also those of a plain llama_cpp.Llama with `n_batch=block_tokens` that
    begins each prompt with an empty context (tests/integration/test_llama_plain.py); a plain one
    with another `n_batch` splits prompts elsewhere. With `swa_full=False` (llama_cpp's default is
    True) that ends where the plain one has filled its window's cells, n_swa + n_ubatch rounded up
    to 256, and uses them again: states are copied through a second sequence, for which llama.cpp
    adds n_swa cells, so positions lie in other cells and are added up in another order.

    In the default mode the longest prefix is reused, and logits differ as those of different
    batch sizes do. On Gemma 3 270M (Q4_K_M, logits' standard deviation 4.3) the largest difference
    after a prompt was 0.39 at the median and at most 0.84, where plain llama_cpp in batches of 37
    differed by 0.72 and 1.16 from plain llama_cpp in one batch; of 32 greedy answers of 16 tokens
    7 differed, and 14 (`python -m bench real-model`). On the tiny test model (standard
    deviation 1.5) it was at most 0.005 without and 0.09 with flash attention, in other batches
    0.003 and 0.095 (`python -m pytest tests/integration/test_llama_exact.py -k tolerance -s`, the
    larger figures of two CPUs).

    Full attention and sliding windows are reused to the token. Recurrent models and hybrids are
    reused up to a multiple of `block_tokens`, a whole prompt's last token but one, or the end of
    an answer: the states that they pass are not to be had later. Windows, recurrent models and
    hybrids are therefore decoded in pieces, and saved as they are reached. In reproducible mode
    `block_tokens` must not be larger than the window.

    Architectures that llama.cpp may give another memory (tokcache.llama.memories names those
    that are known), embedding contexts, `logits_all` and draft models run uncached, counted by
    reason in `prefix_cache.stats().refusals`; a line in the log says so once, with the cure
    (tokcache.llama.reasons).

    States are filed under the model's content. A file over 16 MiB is hashed in the background from
    construction on, about a second a gigabyte, and its digest is remembered for later processes
    (see tokcache.llama.file_digests). A prompt that comes before is decoded, counted as
    `fingerprint_pending`, and its state is stored by the first request after; not that of a window
    that has moved on, a hybrid, or a recurrent model's blocks, which can't be saved later. A model
    file that is overwritten in place while it is mapped (llama.cpp's default) changes the loaded
    weights, and this can't be noticed: replace model files by renaming new ones over them.

    Errors: MissingFile, InvalidModel; VocabularyMismatch; InvalidText, InvalidTokens, InvalidScope;
            ModelClosed after close() or a fork; llama_cpp's own otherwise. A cache that fails
            costs a decode, never an exception.
    Threads: safe. Generations take turns; one whose consumer pauses is suspended for another.
            Other calls (a setting, `reset`, the end of a stream or of the model) wait for the
            decode in progress at most (see tokcache.llama.gate). A generation that was set up by
            hand (reset, eval, sample) is not suspended: others may follow on it.
    """

    # What llama_cpp's __init__ and __del__ may meet before ours has run.
    _gate: Gate | None = None
    _sequence: Sequence | None = None
    _keeper: Keeper | None = None
    _n_tokens = 0
    _n_own = 0  # leading positions that a decode of known tokens, or a restore, has written
    _n_grid = 0  # of these, the ones decoded in pieces that end at multiples of block_tokens
    _last_batch = 0  # where the batch decoded last begins
    _n_prompt = 0  # how long the present prompt is
    _requires_eval = True
    _is_decoding = False
    _is_embedding = False
    _has_unsaved = False  # whether states were passed over because the fingerprint was pending
    _held_scope: Any = None  # whose the positions are that the context holds
    _work: Work | None = None  # void once that scope was cleared: the positions are stored no more
    _llama_cpp_cache: Any = None
    _warned_of: str | None = None  # why nothing is cached, as last seen

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        prefix_cache: PrefixStateCache | None = None,
        scope: str | None = None,
        public_prefix: Any = (),
        reproducible: bool = False,
        **llama_cpp_kwargs: Any,
    ) -> None:
        self._scope = self._held_scope = require_scope(scope)
        self._request = threading.local()  # `scope`: of the request that a thread works for
        self._public_prefix = np.frombuffer(token_bytes(public_prefix), np.int32)
        self._prefix_cache = None if prefix_cache is None else _checked_cache(prefix_cache)
        self._reproducible = require_bool("reproducible", reproducible)
        cache = self._prefix_cache
        self._block_tokens = BLOCK_TOKENS if cache is None else cache.block_tokens
        self._batches: list[int] = []  # where those begin that were decoded after the grid
        path = _checked_model(model_path)
        _check_lora(llama_cpp_kwargs.get("lora_path"))
        self._is_embedding = bool(llama_cpp_kwargs.get("embedding"))
        # Before the loading: what is replaced meanwhile must not pass for what was loaded. Hashed
        # after it: the pages are in memory then.
        self._files = LoadedFiles.at(path, llama_cpp_kwargs.get("lora_path"))
        self._load(path, llama_cpp_kwargs)
        self.last_reuse = Reuse(0, 0, 0, 0.0)
        self._memory = Memory.of(self.ctx, swa_full=bool(self.context_params.swa_full))
        self._sequence = self._own_sequence()
        if self._sequence is not None:
            self._keeper = Keeper(self._sequence, self._memory, is_exact=self._reproducible)
        self._uncached = self._why_uncached()
        self._fingerprint = b""
        if self._files is not None and cache is not None and not self._uncached:
            self._files.begin()
        self._gate = Gate(self)
        try:
            self.tokenizer_ = self._chosen_tokenizer(tokenizer)
        except BaseException:
            self.close()
            raise
        self._warn_if_uncached()

    def __repr__(self) -> str:
        """Return which model this is, and what of it is cached, or why nothing is."""
        if self._gate is None:
            return f"<{type(self).__name__}: not loaded>"
        if self._gate.is_closed:
            return f"<{type(self).__name__} {Path(self.model_path).name}: closed>"
        why = "no prefix_cache" if self._prefix_cache is None else self._why_not_cached()
        facts = [
            f"context {self._n_tokens:,} of {self.n_ctx():,} tokens",
            "states cached" if why is None else f"states not cached: {explained(why)}",
        ]
        if self._reproducible:
            facts.append(f"reproducible in blocks of {self._block_tokens}")
        if self._scope is not None:
            facts.append(f"scope {self._scope!r}")
        return f"<{type(self).__name__} {Path(self.model_path).name}: {', '.join(facts)}>"

    def _warn_if_uncached(self) -> None:
        """Log once that these settings leave nothing to the prefix cache."""
        why = None if self._prefix_cache is None else self._why_not_cached()
        if why is not None and why != self._warned_of and is_known(why):
            _log.warning("%s runs without the prefix cache: %s", self.model_path, explained(why))
        self._warned_of = why

    # What decides which states are this object's

    @property
    def scope(self) -> str | None:
        """Whose states those of requests without a `scope=` are; it can't be changed."""
        return self._scope

    @contextmanager
    def serving(self, scope: str | None) -> Iterator[None]:
        """Work, in this thread, for a request of `scope`; OWN_SCOPE changes nothing."""
        request, before = self._request, self._request_scope()
        request.scope = before if scope is OWN_SCOPE else require_scope(scope)
        try:
            yield
        finally:
            request.scope = before

    def _request_scope(self) -> str | None:
        scope: str | None = getattr(self._request, "scope", self._scope)
        return scope

    @property
    def cache(self) -> Any:
        """llama_cpp's own cache, which knows no scopes: for requests of the object's own alone."""
        return self._llama_cpp_cache if self._request_scope() == self._scope else None

    @cache.setter
    def cache(self, cache: Any) -> None:
        self._llama_cpp_cache = cache

    @property
    def public_prefix(self) -> NDArray[np.int32]:
        """What prompts may begin with that is shared by all scopes; read-only."""
        return self._public_prefix

    @property
    def prefix_cache(self) -> PrefixStateCache | None:
        """The cache of states; setting it sets `block_tokens` too."""
        return self._prefix_cache

    @prefix_cache.setter
    def prefix_cache(self, cache: PrefixStateCache | None) -> None:
        n_block = _checked_cache(cache).block_tokens if cache is not None else self._block_tokens
        with self._off_the_grid():
            self._prefix_cache, self._block_tokens, self._work = cache, n_block, None

    @property
    def reproducible(self) -> bool:
        """Whether a prompt's logits are, bit for bit, those of an uncached Llama like this one."""
        return self._reproducible

    @reproducible.setter
    def reproducible(self, value: bool) -> None:
        value = require_bool("reproducible", value)
        with self._off_the_grid():
            self._reproducible = value
            if self._keeper is not None:
                self._keeper.is_exact = value

    @property
    def block_tokens(self) -> int:
        """How many tokens the pieces of reproducible mode have: as many as the cache's blocks."""
        return self._block_tokens

    @block_tokens.setter
    def block_tokens(self, value: int) -> None:
        value = require_int("block_tokens", value, minimum=1)
        cache = self._prefix_cache
        if cache is not None and cache.block_tokens != value:
            raise InvalidConfig(
                f"block_tokens is {cache.block_tokens}, the prefix cache's, and can't be {value}; "
                "make the cache with other block_tokens"
            )
        with self._off_the_grid():
            self._block_tokens = value

    @contextmanager
    def _off_the_grid(self) -> Iterator[None]:
        """Change a setting between two steps, and forget what held with its old value."""
        with self._open_gate().turn():
            yield
            self._fingerprint = b""
            self._n_grid = 0
            self._warn_if_uncached()

    def _grid(self) -> tuple[bool, int]:
        return self._reproducible, self._block_tokens

    def _load(self, path: str, settings: dict[str, Any]) -> None:
        try:
            super().__init__(path, **settings)
        except ValueError as error:
            if "Failed to" not in str(error):
                raise
            raise InvalidModel(
                f"llama.cpp can't load {path}: {error}; is the file whole, and of a format that "
                f"llama-cpp-python {llama_cpp.__version__} knows? verbose=True prints its reasons"
            ) from error
        if self.lora_path and not self._lora_adapter:
            super().close()  # llama_cpp would go on without the adapter and say nothing
            raise InvalidModel(f"llama.cpp can't load the LoRA adapter {self.lora_path}")

    def _own_sequence(self) -> Sequence | None:
        if self._memory.kind == "none":
            return None
        is_unified = bool(self.context_params.kv_unified)
        return Sequence(self.ctx, self._memory, is_unified=is_unified)

    def _why_uncached(self) -> str | None:
        """Return the reason why states are neither saved nor restored, None if they are."""
        if self._is_embedding:
            return "embedding_context"
        if self._memory.refusal is not None:
            return self._memory.refusal
        if self.draft_model is not None:
            return "draft_model"
        if self._logits_all:  # the score rows of restored positions would be missing
            return "logits_all"
        if self._sequence is None or not self._sequence.has_blocks:
            return "context_without_blocks"
        return None

    def _chosen_tokenizer(self, tokenizer: Any) -> Any:
        if tokenizer is None:
            return ModelTokenizer(self._model, self.scope)
        if isinstance(tokenizer, llama_cpp.llama_tokenizer.BaseLlamaTokenizer):
            return tokenizer
        if not hasattr(tokenizer, "token_ids"):
            tokenizer = wrap(tokenizer)
        check_vocabulary(tokenizer, self._model)
        return WrappedTokenizer(self._model, tokenizer, self.scope)

    # What llama_cpp sets, watched

    @property
    def context_params(self) -> Any:
        """The context's parameters, with a second sequence to copy blocks through."""
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        if not self._is_embedding:  # that mode sets its own number of sequences
            params.n_seq_max = 2
            params.kv_unified = True
        self._context_params = params

    @property
    def n_tokens(self) -> int:
        """How many positions the context holds."""
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, value: int) -> None:
        before, self._n_tokens = self._n_tokens, value
        if value <= before:
            # llama_cpp goes back on any memory, and goes on with a state that is of none.
            can_go_back = self._sequence is None or self._sequence.holds(value)
            self._n_own = min(self._n_own, value) if can_go_back else 0
            self._n_grid = min(self._n_grid, self._n_own)
            self._batches = [start for start in self._batches if start < value]
            self._has_unsaved &= value > 0
            self._requires_eval |= value < before  # the logits are of a position that is gone
        elif self._is_decoding:
            self._n_own = value if self._n_own == before else self._n_own
        else:
            # Somebody else wrote these positions, an image's say. What lay in input_ids there is
            # of an earlier prompt and must not match one.
            self.input_ids[before:value] = UNKNOWN

    def wait_for_fingerprint(self, timeout_s: float | None = None) -> bool:
        """Wait until the model file is hashed; False if `timeout_s` seconds were too short.

        Prompts that come before are decoded, but neither restored nor stored.
        """
        self._require_open()
        if self._files is None or self._uncached:
            return True
        return self._files.wait(timeout_s)

    # What uses the context, one at a time

    def _open_gate(self) -> Gate:
        if self._gate is None:
            raise ModelClosed("this model was not loaded")
        return self._gate

    def eval(self, tokens: Any) -> None:
        """Decode `tokens` after what the context holds; in reproducible mode, cut on the grid."""
        gate = self._open_gate()
        with gate.step():
            if not hasattr(tokens, "__len__"):
                raise InvalidTokens(f"tokens must be int32 ids, not {type(tokens).__name__}")
            self._note_scope()
            began, done = time.perf_counter(), 0
            while done < len(tokens):
                # Others may enter now, and change settings or use the context.
                began += gate.pause()
                stop = done + self._n_next(len(tokens) - done)
                self._eval_batch(tokens[done:stop])
                done = stop
            self._note_prefill(len(tokens), began)

    def _note_scope(self) -> None:
        """Note whose the tokens are that are decoded now."""
        scope = self._request_scope()
        if not self._n_tokens:
            if scope != self._held_scope:
                self._held_scope, self._work = scope, None
        elif self._held_scope != scope:
            self._held_scope, self._n_own, self._n_grid = _MIXED, 0, 0

    def _note_prefill(self, n_tokens: int, began: float) -> None:
        """Tell the cache what decoding takes: slower tiers are then left alone."""
        cache = self.prefix_cache
        if cache is None or n_tokens < _PREFILL_TOKENS or not (key := self._key()):
            return
        llama_cpp.llama_synchronize(self.ctx)  # a GPU may still be at work
        cache.namespace(key).note_prefill(n_tokens, time.perf_counter() - began)

    def _n_next(self, n_left: int) -> int:
        """Return how many of `n_left` tokens to decode in one batch: not beyond the next save."""
        n_tokens, n_next = self._n_tokens, min(n_left, int(self.n_batch))
        step = self.block_tokens if self.reproducible else self._save_step()
        if step:
            n_next = min(n_next, step - n_tokens % step)
            if self._saves_tails() and n_tokens < self._n_prompt - 1 < n_tokens + n_next:
                n_next = self._n_prompt - 1 - n_tokens
        return n_next

    def _save_step(self) -> int:
        """Return the step of the positions at which states are saved as they are reached."""
        if self.prefix_cache is None or self._why_not_cached() is not None:
            return 0
        return self._memory.stops(self.block_tokens, is_exact=self.reproducible)

    def _saves_tails(self) -> bool:
        """Return whether a state is saved before a prompt's last token: it can't be cut later."""
        return self._memory.is_recurrent and not self.reproducible and self._save_step() > 0

    def _why_not_cached(self) -> str | None:
        """Return the reason why states are neither saved nor restored with these settings."""
        if self._uncached is None and self.reproducible:
            return self._memory.why_inexact(self.block_tokens, self.n_ctx())
        return self._uncached

    def _eval_batch(self, tokens: Any) -> None:
        start = self._n_tokens
        self._is_decoding = True
        try:
            super().eval(tokens)
        except BaseException as error:
            self._after_failed_decode()
            if isinstance(error, (TypeError, OverflowError)):
                int32_ids(tokens)  # names the one that is no id
            raise
        finally:
            self._is_decoding = False
        self._last_batch = start
        self._batches.append(start)
        if self._is_block_done():
            self._n_grid = self._n_own
            self._batches.clear()
        self._save_as_reached()

    def _is_block_done(self) -> bool:
        """Return whether the last batches are a whole block, in the batches that it always has."""
        start, stop = self._n_grid, self._n_tokens
        return (
            stop - start == self.block_tokens
            and start % self.block_tokens == 0
            and self._batches == list(range(start, stop, self.n_batch))
        )

    def _save_as_reached(self) -> None:
        """Save what could not be saved later."""
        step, n_tokens = self._save_step(), self._n_tokens
        is_known = n_tokens == (self._n_grid if self.reproducible else self._n_own)
        is_tail = n_tokens == self._n_prompt - 1 and self._saves_tails()
        if step and is_known and (n_tokens % step == 0 or is_tail):
            self._save(n_tokens)

    def _after_failed_decode(self) -> None:
        """Take out what a failed batch may have left in the context."""
        # Only of attention is it known that a batch that failed has changed nothing before it.
        is_plain = self._memory.is_plain and self._sequence is not None
        if not (is_plain and self._cut(self._n_tokens)):
            self._ctx.kv_cache_clear()
            self.n_tokens = 0
        self._requires_eval = True

    def reset(self) -> None:
        """Forget what the context holds."""
        with self._open_gate().step():
            if self._sequence is not None:
                self._sequence.clear()
            super().reset()

    def cache_clear(self, *, scope: str | None = None) -> None:
        """Forget the texts of one scope and what the context holds of it; without one, all.

        Its states in the prefix cache go by `prefix_cache.clear(scope=…)`. A wrapped tokenizer that
        others use too forgets the texts for all of them.

        Errors: InvalidScope; ModelClosed.
        """
        scope = require_scope(scope)
        self._require_open()
        clear = getattr(self.tokenizer_, "cache_clear", None)  # llama_cpp's own have no cache
        if clear is not None:
            clear(scope=scope)
        with self._open_gate().step():
            if scope in (None, self._held_scope):
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
        texts = _checked_texts(input)
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
            self._is_decoding = True  # input_ids comes with it
            try:
                super().load_state(state)
            finally:
                self._is_decoding = False
                self._n_own = self._n_grid = 0
                self._held_scope, self._work = self._request_scope(), None

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
        scope = self._request_scope() if scope is OWN_SCOPE else require_scope(scope)
        return tokenizer.tokenize(text, add_bos, special, scope=scope)

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of `tokens`."""
        self._require_open()
        text: bytes = self.tokenizer_.detokenize(tokens, prev_tokens=prev_tokens, special=special)
        return text

    def _require_open(self) -> None:
        self._open_gate().require_open()

    def create_chat_completion(
        self, messages: Any, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any
    ) -> Any:
        """Complete a chat, as llama_cpp.Llama does."""
        messages = _checked_messages(messages)
        with self.serving(scope):
            if self.chat_handler is None:
                answer = super().create_chat_completion(messages, *args, **kwargs)
            else:
                # A handler of the user's may fill the context itself before it asks for a
                # completion.
                with self._open_gate().step(is_generation=True):
                    answer = super().create_chat_completion(messages, *args, **kwargs)
        # A handler's generator may ask for the completion when it is read.
        return (
            answer
            if scope is OWN_SCOPE or isinstance(answer, dict)
            else Scoped(self, answer, scope)
        )

    def create_completion(
        self, prompt: Any, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any
    ) -> Any:
        """Complete a prompt, a str or ids, as llama_cpp.Llama does."""
        self._require_open()
        with self.serving(scope):
            return super().create_completion(_checked_prompt(prompt), *args, **kwargs)

    def __call__(self, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any) -> Any:
        """Complete a prompt, as llama_cpp.Llama does."""
        with self.serving(scope):
            return super().__call__(*args, **kwargs)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Any:
        completion = super()._create_completion(*args, **kwargs)
        steps = Steps(self._open_gate(), completion, scope=self._request_scope())
        # Without `stream` the caller takes one item and drops the rest.
        return steps if kwargs.get("stream") else iter((steps.only(),))

    def generate(
        self, tokens: Any, *args: Any, scope: str | None = OWN_SCOPE, **kwargs: Any
    ) -> Any:
        """Yield token after token, as llama_cpp.Llama does."""
        gate = self._open_gate()
        scope = self._request_scope() if scope is OWN_SCOPE else require_scope(scope)
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
        if call.arguments.get("reset", True):
            call.arguments["tokens"] = self._hold(tokens)
            call.arguments["reset"] = False
        yield from super().generate(*call.args[1:], **call.kwargs)

    # What a prompt need not decode

    def _hold(self, tokens: Any) -> Any:
        """Bring the longest known prefix into the context; return the tokens left to decode."""
        began = time.perf_counter()
        tokens = tokens if isinstance(tokens, list) else list(tokens)
        scope = self._request_scope()
        ids = self._int32_ids(tokens, scope)
        if not len(ids):
            raise InvalidTokens("the prompt has no tokens, and the model adds no BOS to it")
        if ids.max() >= self._n_vocab:  # llama.cpp would fail in the middle of the prompt
            position = int((ids >= self._n_vocab).argmax())
            raise InvalidTokens(
                f"token {ids[position]:,} at position {position:,} is not in the model's "
                f"vocabulary of {self._n_vocab:,} tokens; encode the prompt with its tokenizer"
            )
        # Of another scope's positions, those alone are used that are no secret.
        is_same = scope == self._held_scope and not self._is_cleared()
        n_usable = len(ids) if is_same else _n_shared(self._public_prefix, ids)
        if n_usable == len(ids) and self._is_held_whole(ids):
            self._held_scope = scope
            self._note_reuse(Reuse(len(ids), len(ids), 0, time.perf_counter() - began))
            return []
        # While the scope is still that of the request before: this one may cut or clear its states.
        if self._has_unsaved:
            self.end_generation()
        n_in_context = self._usable_in_context(ids[:n_usable], len(ids))
        if not is_same or self._work is None:
            self._held_scope = scope
            self._work = None if self.prefix_cache is None else self.prefix_cache.begin(scope)
        n_held = self._restored(ids, n_in_context) if len(ids) else 0
        n_in_context = min(n_in_context, n_held)
        if not n_held:
            self.reset()
        self._requires_eval = True
        self._n_prompt = len(ids)
        seconds = time.perf_counter() - began
        self._note_reuse(Reuse(len(ids), n_in_context, n_held - n_in_context, seconds))
        return tokens[n_held:]

    def _note_reuse(self, reuse: Reuse) -> None:
        """Tell the caller and the cache what a prompt need not decode, by whatever means."""
        self.last_reuse = reuse
        if self.prefix_cache is not None:
            self.prefix_cache.count_prompt(
                reuse.n_prompt,
                context_tokens=reuse.n_in_context,
                restored_tokens=reuse.n_restored,
            )

    def _int32_ids(self, tokens: list[int], scope: str | None) -> NDArray[np.int32]:
        if isinstance(self.tokenizer_, ModelTokenizer):
            return self.tokenizer_.int32_ids(tokens, scope=scope)
        return int32_ids(tokens)

    def _is_held_whole(self, ids: NDArray[np.int32]) -> bool:
        """Return whether the context holds this prompt, nothing more, and its logits."""
        held = self.input_ids[: self._n_tokens]
        if self._requires_eval or not len(ids) or not np.array_equal(held, ids):
            return False
        # A handler's prompt with images can't be decoded from its ids; any other one can.
        return not self.reproducible or bool((ids == UNKNOWN).any())

    def _usable_in_context(self, ids: NDArray[np.int32], n_prompt: int) -> int:
        """Return how many positions of the context a prompt that begins with `ids` can build on."""
        shared = min(_n_shared(self.input_ids[: self._n_tokens], ids), max(n_prompt - 1, 0))
        if self.reproducible:
            shared = min(shared, self._n_grid) // self.block_tokens * self.block_tokens
        return shared if self._cut(shared) else 0

    def _cut(self, n_tokens: int) -> bool:
        """Take out the positions from `n_tokens` on; False if this memory can't."""
        sequence = self._sequence
        if sequence is None or not sequence.trim(n_tokens, in_place=self.reproducible):
            return False
        self.n_tokens = n_tokens
        return True

    def _restored(self, ids: NDArray[np.int32], n_in_context: int) -> int:
        """Restore what reaches beyond `n_in_context`; return how many positions are held."""
        if self.prefix_cache is None:
            return n_in_context
        states = self._namespace()
        if states is None or self._keeper is None:
            reason = "fingerprint_pending" if not self._fingerprint else "context_without_blocks"
            self._refuse(self._why_not_cached() or reason)
            return n_in_context
        if (ids < 0).any():
            self._refuse("unknown_positions")
            return n_in_context
        start, reached = self._keeper.restore(states, ids, n_in_context)
        if (start, reached) == (n_in_context, n_in_context):
            return n_in_context
        self.input_ids[start:reached] = ids[start:reached]
        self._n_tokens = reached
        self._n_own = reached if self._n_own >= start else min(self._n_own, reached)
        self._n_grid = reached if self.reproducible else 0
        self._batches.clear()
        self._has_unsaved = False
        return reached

    def _namespace(self) -> Namespace | None:
        """Return where the states of this model go, None if they are not cached."""
        if self.prefix_cache is None or self._why_not_cached() is not None:
            return None
        if self._held_scope is _MIXED:
            return None
        key = self._key()
        if not key:
            return None
        return self.prefix_cache.namespace(
            key,
            scope=self._held_scope,
            public_prefix=self._public_prefix,
            aligned=self.reproducible or self._memory.is_recurrent,
        )

    def _key(self) -> bytes:
        """Return the fingerprint; an empty one if there is none yet, or `_uncached` says why."""
        if not self._fingerprint and not self._uncached:
            if self._files is not None and not self._files.begin():
                return b""
            self._uncached = self._why_no_key()
        return self._fingerprint

    def _why_no_key(self) -> str | None:
        """Compute the fingerprint; return the reason if that can't be done, now or ever."""
        if self._files is None:
            return "fingerprint_failed"
        block_tokens = self.block_tokens if self.reproducible else None
        try:
            self._fingerprint = fingerprint(self, self._files, block_tokens)
        except OSError as error:
            _log.warning("%s runs without the prefix cache: %s", self.model_path, error)
            is_change = isinstance(error, FileChanged)
            return "model_file_changed" if is_change else "fingerprint_failed"
        return None

    def _refuse(self, reason: str) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.refuse(reason)

    # What the gate asks

    def end_generation(self) -> None:
        """Save the state of what was decoded; the answer's tokens too, in the default mode."""
        n_tokens = self._n_grid if self.reproducible else self._n_own
        if self._memory.is_plain or (n_tokens == self._n_tokens and not self.reproducible):
            self._save(n_tokens)

    def _is_cleared(self) -> bool:
        """Return whether the scope of the held positions was cleared since they were decoded."""
        return self._work is not None and self._work.is_void

    def _save(self, n_tokens: int) -> None:
        if self._is_cleared():
            self._has_unsaved = False
            self._refuse("cleared")
            return
        states = self._namespace()
        if states is None:
            # Saved by the next request, if the digest is there then and the state still is.
            self._has_unsaved = self.prefix_cache is not None and not self._why_not_cached()
        elif self._keeper is not None and self._sequence is not None:
            is_all_there = not self._has_unsaved or self._sequence.keeps_all()
            # A tail of a recurrent memory without attention follows no blocks.
            is_alone = not self._memory.has_attention and n_tokens % self.block_tokens != 0
            if is_all_there or is_alone:
                self._keeper.save(states, self.input_ids[:n_tokens])
            self._has_unsaved &= not is_all_there

    def suspend(self, *, has_started: bool, is_decoding: bool) -> _Suspended:
        """Return all that the present generation needs to go on later."""
        if not self._memory.is_recurrent:  # a tail for each pause would be too many
            self.end_generation()
        n_tokens = self._n_tokens
        is_redone = self._must_decode_again()
        # A draft model samples several tokens from one decode: its logits are in no snapshot.
        is_lost = self.draft_model is not None and not is_decoding
        needs_logits = not (has_started or is_decoding or self._requires_eval)
        return _Suspended(
            state=[] if is_redone else None if is_lost else self._snapshot(),
            batches=self._batches.copy(),
            is_redone=is_redone,
            n_prompt=self._n_prompt,
            scope=self._held_scope,
            work=self._work,
            n_tokens=n_tokens,
            end=0 if self._sequence is None else self._sequence.end(),
            n_own=self._n_own,
            n_grid=self._n_grid,
            grid=self._grid(),
            input_ids=self.input_ids[:n_tokens].copy(),
            scores=self.scores[:n_tokens].copy() if self._logits_all else None,
            requires_eval=self._requires_eval,
            logits_from=self._last_batch if needs_logits else None,
            sampler=self._sampler,
            mirostat_mu=self._mirostat_mu,
        )

    def _must_decode_again(self) -> bool:
        """Return whether a snapshot would not give the last bits: it moves a window's cells."""
        if not self.reproducible or self._sequence is None or self._sequence.is_movable():
            return False
        # What a handler put there can't be decoded, nor what a draft model has sampled from.
        return self._n_own == self._n_tokens and self.draft_model is None

    def _snapshot(self) -> list[memoryview] | None:
        if self._sequence is None:
            return None
        try:
            return self._sequence.snapshot()
        except (StateError, MemoryError):
            self._refuse("snapshot_failed")
            return None

    def resume(self, suspended: _Suspended) -> None:
        """Undo `suspend`."""
        if suspended.state is None or self._sequence is None:
            raise StateError(
                "another generation used this model meanwhile, and this one could not be "
                "suspended; end a stream before the next request, or use a Llama for each"
            )
        self._n_tokens = self._n_own = self._n_grid = 0
        n_tokens, self._n_prompt = suspended.n_tokens, suspended.n_prompt
        self._held_scope, self._work = suspended.scope, suspended.work
        if suspended.is_redone:
            self._decode_anew(suspended.input_ids, suspended.n_grid, suspended.batches)
        else:
            self._sequence.load_snapshot(suspended.state, suspended.end)
        self._n_tokens = n_tokens
        self._batches = suspended.batches.copy()
        self._n_own = suspended.n_own
        self._n_grid = suspended.n_grid if suspended.grid == self._grid() else 0
        self.input_ids[:n_tokens] = suspended.input_ids
        if suspended.scores is not None:
            self.scores[:n_tokens] = suspended.scores
        self._requires_eval = suspended.requires_eval
        self._sampler, self._mirostat_mu = suspended.sampler, suspended.mirostat_mu
        if suspended.logits_from is not None and not suspended.is_redone:
            self._decode_again(suspended.logits_from)

    def _decode_anew(self, ids: NDArray[np.int32], n_grid: int, batches: list[int]) -> None:
        """Decode `ids` in the same batches as before, but for what the cache has of the grid."""
        self.reset()
        reached = self._restored(ids[: n_grid + 1], 0) if n_grid else 0
        self.eval(ids[reached:n_grid])
        for start, stop in pairwise([*batches, len(ids)]):
            self.eval(ids[start:stop])

    def _decode_again(self, start: int) -> None:
        """Decode the last batch as it was decoded before: a snapshot holds no logits."""
        tokens = self.input_ids[start : self._n_tokens].copy()
        if not self._cut(start):
            raise StateError("another generation used this model before this one began; ask again")
        self.eval(tokens)

    # The end

    def close(self) -> None:
        """Save what can be saved and free the model; later calls raise ModelClosed."""
        if self._gate is not None:
            self._gate.close(self._free)
        elif hasattr(self, "_stack"):
            super().close()

    def _free(self) -> None:
        if self._has_unsaved:
            self.end_generation()
        super().close()
        if self._files is not None:
            self._files.release()

    def __del__(self) -> None:
        # No step can be in progress: it would refer to us. Nothing is saved either: the garbage
        # collector may run this under any lock.
        if hasattr(self, "_stack"):
            self._stack.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, without tokenizer and cache: a pickle has neither."""
        state: dict[str, Any] = super().__getstate__()
        own = ("scope", "public_prefix", "reproducible")
        return state | {name: getattr(self, name) for name in own}


class Scoped(Generator[Any, Any, Any]):
    """The iterator that a chat handler gave: each of its steps works for the request's scope."""

    def __init__(self, llm: Llama, items: Any, scope: str | None) -> None:
        self._llm: Llama | None = llm
        self._items, self._scope = items, scope

    def send(self, value: Any) -> Any:
        """Return the next item."""
        return self._advance(lambda items: next(items) if value is None else items.send(value))

    def throw(self, typ: Any, val: object = None, tb: TracebackType | None = None) -> Any:
        """Raise an error in the handler's generator and return its next item."""
        raised = [typ] if val is None and tb is None else [typ, val, tb]
        del typ, val, tb  # the error's traceback refers to this frame
        try:
            return self._advance(lambda items: items.throw(*raised))
        finally:
            raised.clear()

    def _advance(self, advance: Callable[[Any], Any]) -> Any:
        if self._llm is None:
            return advance(self._items)
        with self._llm.serving(self._scope):
            try:
                return advance(self._items)
            except BaseException:
                self._llm = None  # a generator that has ended refers to nothing
                raise

    def close(self) -> None:
        """End the generation."""
        self._llm = None
        if hasattr(self._items, "close"):
            self._items.close()


def _n_shared(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """Return how many leading ids are equal and known."""
    n = min(len(left), len(right))
    differs = (left[:n] != right[:n]) | (left[:n] == UNKNOWN)
    return int(differs.argmax()) if differs.any() else n


def _checked_cache(cache: Any) -> PrefixStateCache:
    if isinstance(cache, PrefixStateCache):
        return cache
    raise InvalidConfig(f"prefix_cache must be a PrefixStateCache or None, not {cache!r}")


def _checked_prompt(prompt: Any) -> Any:
    """Return what llama_cpp takes for a prompt: a str, or a list of ids.

    Errors: InvalidText; llama_cpp raises TypeError, ValueError and UnicodeEncodeError.
    """
    if isinstance(prompt, list):
        return prompt
    if isinstance(prompt, TokenIds):
        return prompt.tolist()
    if not isinstance(prompt, str):
        cure = "; decode it" if isinstance(prompt, (bytes, bytearray)) else ""
        raise InvalidText(
            f"prompt must be a str, a list of ids or TokenIds, not {type(prompt).__name__}{cure}"
        )
    _require_utf8("prompt", prompt)
    return prompt


def _checked_texts(texts: Any) -> Any:
    """Return one str or a list of them, as llama_cpp takes them.

    Errors: InvalidText.
    """
    if isinstance(texts, str):
        return texts
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, bytearray)):
        raise InvalidText(f"input must be a str or a list of them, not {type(texts).__name__}")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidText(f"input {position} must be a str, not {type(text).__name__}")
    return texts


def _checked_messages(messages: Any) -> Any:
    """Return a chat's messages if they can be some.

    Errors: InvalidText.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidText(
            "messages must be a list of dicts with 'role' and 'content', "
            f"not {type(messages).__name__}"
        )
    if isinstance(messages, list | tuple):
        for n, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, str):
                _require_utf8(f"messages[{n}]['content']", content)
    return messages


def _require_utf8(name: str, text: str) -> None:
    """Raise InvalidText if `text` has a lone surrogate: llama.cpp takes UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidText(
            f"{name} has a lone surrogate at position {error.start}, which is no text; replace it "
            "(text.encode('utf-8', 'replace').decode())"
        ) from None


def _checked_model(path: str | os.PathLike[str]) -> str:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise InvalidModel(
            f"model_path must be the path of a GGUF file, a str or a Path, not {path!r}"
        )
    file = Path(path)
    if not os.fspath(path) or not file.is_file():
        found = "" if not os.fspath(path) else f" {file}"
        is_folder = found and file.is_dir()
        raise MissingFile(
            f"there is no model file{found}{', it is a folder' if is_folder else ''}; "
            "pass the path of a GGUF file"
        )
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise InvalidModel(
            f"{file} is no GGUF file: it begins with {magic!r}, not b'GGUF'; convert the model "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    return str(file)


def _check_lora(path: object) -> None:
    if path is not None and not Path(str(path)).is_file():
        raise MissingFile(f"there is no LoRA file {path}; pass the path of a GGUF adapter")
