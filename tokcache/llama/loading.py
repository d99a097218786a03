"""LoadedLlama: a llama_cpp.Llama with its settings, the record of its context, and its end.

`Llama` in `inprocess` adds the calls.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tokcache._validate import require_bool, require_int, require_scope
from tokcache.errors import InvalidConfig, InvalidModel, ModelClosed
from tokcache.llama.arguments import check_lora, checked_cache, checked_model
from tokcache.llama.context import Alignment, ContextRecord
from tokcache.llama.fingerprint import LoadedFiles, LoadedModel
from tokcache.llama.gate import Gate
from tokcache.llama.memory_type import MemoryType
from tokcache.llama.model_states import ModelStates
from tokcache.llama.openers import checked_openers, derive, encoded
from tokcache.llama.reasons import explained
from tokcache.llama.scopes import RequestScopes
from tokcache.llama.sequence import Sequence
from tokcache.llama.splicer import ADDED, Splicer
from tokcache.llama.tokenizer import model_tokenizer
from tokcache.state.names import token_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from tokcache.llama.openers import Openers
    from tokcache.state.cache import PrefixStateCache

_log = logging.getLogger("tokcache")

BLOCK_TOKENS = 256  # of reproducible mode without a prefix cache; a cache has as many by default


class LoadedLlama(llama_cpp.Llama):  # type: ignore[misc]
    """A model that is loaded, or was, with everything that does not use its context."""

    # Before __init__ has run, __repr__, close and llama_cpp's own __init__ find these.
    _gate: Gate | None = None
    _sequence: Sequence | None = None
    _is_embedding = False
    _llama_cpp_cache: Any = None
    _splicer: Splicer | None = None

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        prefix_cache: PrefixStateCache | None = None,
        scope: str | None = None,
        public_prefix: Any = (),
        reproducible: bool = False,
        message_openers: Mapping[str, str] | None = None,
        splice: bool = False,
        **llama_cpp_kwargs: Any,
    ) -> None:
        self._scopes = RequestScopes(require_scope(scope))
        self._message_openers = checked_openers(message_openers)
        require_bool("splice", splice)
        public = np.frombuffer(token_bytes(public_prefix), np.int32)
        cache = checked_cache(prefix_cache)
        n_block = BLOCK_TOKENS if cache is None else cache.block_tokens
        alignment = Alignment(require_bool("reproducible", reproducible), n_block)
        self._record = ContextRecord(scope, alignment)
        path = checked_model(model_path)
        check_lora(llama_cpp_kwargs.get("lora_path"))
        # Looked at before the loading, so that a file that is replaced meanwhile can't pass for the
        # loaded one; hashed after it, when the pages are in memory.
        files = LoadedFiles.at(path, llama_cpp_kwargs.get("lora_path"))
        self._is_embedding = bool(llama_cpp_kwargs.get("embedding"))
        self._load(path, llama_cpp_kwargs)

        memory = MemoryType.of(self.ctx, swa_full=bool(self.context_params.swa_full))
        if memory.kind != "none":
            is_unified = bool(self.context_params.kv_unified)
            self._sequence = Sequence(self.ctx, memory, is_unified=is_unified)
        reasons = {
            "embedding_context": self._is_embedding,
            memory.refusal: memory.refusal is not None,
            "draft_model": self.draft_model is not None,
            "logits_all": self._logits_all,  # the score rows of restored positions would be missing
            "context_without_blocks": self._sequence is None or not self._sequence.has_blocks,
        }
        self._states = ModelStates(
            self._record,
            LoadedModel.of(self),
            path=self.model_path,
            files=files,
            memory=memory,
            sequence=self._sequence,
            n_ctx=self.n_ctx(),
            uncached=next((reason for reason, holds in reasons.items() if holds), None),
            cache=cache,
            public_prefix=public,
            find_openers=partial(_find_openers, self._model, self.metadata, self._message_openers),
        )
        self._gate = Gate(self)
        try:
            self.tokenizer_ = model_tokenizer(self._model, tokenizer, scope)
            self._splicer = Splicer(self._model, self.tokenizer_) if splice else None
            if self._message_openers is not None:  # wrong ones are an error now, not at a prompt
                self._states.openers()
        except BaseException:
            self.close()
            raise
        self._states.warn_if_uncached()

    def _load(self, path: str, settings: dict[str, Any]) -> None:
        """Load the model, with errors that name the file."""
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
            super().close()  # llama_cpp would go on without the adapter and not say so
            raise InvalidModel(f"llama.cpp can't load the LoRA adapter {self.lora_path}")

    def __repr__(self) -> str:
        """Return which model this is, and whether its states are cached, or why not."""
        if self._gate is None:
            return f"<{type(self).__name__}: not loaded>"
        if self._gate.is_closed:
            return f"<{type(self).__name__} {Path(self.model_path).name}: closed>"
        why = self._states.why_not_cached() if self.prefix_cache is not None else "no prefix_cache"
        facts = [
            f"context {self.n_tokens:,} of {self.n_ctx():,} tokens",
            "states cached" if why is None else f"states not cached: {explained(why)}",
        ]
        if self.reproducible:
            facts.append(f"reproducible in blocks of {self.block_tokens}")
        if self.splice:
            facts.append("answers spliced")
        if self.scope is not None:
            facts.append(f"scope {self.scope!r}")
        return f"<{type(self).__name__} {Path(self.model_path).name}: {', '.join(facts)}>"

    # Settings

    @property
    def scope(self) -> str | None:
        """The scope of requests without a `scope=`; it can't be changed."""
        return self._scopes.own

    def serving(self, scope: str | None) -> AbstractContextManager[None]:
        """Work, in this thread, for a request of `scope`; OWN_SCOPE changes nothing."""
        return self._scopes.serving(scope)

    @property
    def cache(self) -> Any:
        """llama_cpp's own cache, which knows no scopes: for requests of the object's own alone."""
        return self._llama_cpp_cache if self._scopes.current() == self.scope else None

    @cache.setter
    def cache(self, cache: Any) -> None:
        self._llama_cpp_cache = cache

    @property
    def public_prefix(self) -> NDArray[np.int32]:
        """The ids that prompts may begin with and that all scopes share; read-only."""
        return self._states.public_prefix

    @property
    def prefix_cache(self) -> PrefixStateCache | None:
        """The cache of states; setting it sets `block_tokens` too."""
        return self._states.cache

    @prefix_cache.setter
    def prefix_cache(self, cache: PrefixStateCache | None) -> None:
        checked = checked_cache(cache)
        with self._changing_settings():
            self._states.cache = checked
            n_block = self.block_tokens if checked is None else checked.block_tokens
            alignment = Alignment(self.reproducible, n_block)
            self._record.realigned(alignment, is_other_cache=True)
            if self._splicer is not None:  # the clears of the cache before do not reach them
                self._splicer.answers.clear()

    @property
    def reproducible(self) -> bool:
        """Whether a prompt's logits are, bit for bit, those of an uncached Llama like this one."""
        return self._record.alignment.is_reproducible

    @reproducible.setter
    def reproducible(self, value: bool) -> None:
        value = require_bool("reproducible", value)
        with self._changing_settings():
            self._record.realigned(Alignment(value, self.block_tokens))

    @property
    def block_tokens(self) -> int:
        """How many tokens the pieces of reproducible mode have: as many as the cache's blocks."""
        return self._record.alignment.block_tokens

    @block_tokens.setter
    def block_tokens(self, value: int) -> None:
        value = require_int("block_tokens", value, minimum=1)
        cache = self.prefix_cache
        if cache is not None and cache.block_tokens != value:
            raise InvalidConfig(
                f"block_tokens is {cache.block_tokens}, the prefix cache's, and can't be {value}; "
                "make the cache with other block_tokens"
            )
        with self._changing_settings():
            self._record.realigned(Alignment(self.reproducible, value))

    @property
    def splice(self) -> bool:
        """Whether prompts take the generated ids of earlier answers; it can't be changed."""
        return self._splicer is not None

    @contextmanager
    def _changing_settings(self) -> Iterator[None]:
        """Change a setting between two steps."""
        with self._open_gate().turn():
            yield
            self._states.settings_changed()

    def wait_for_fingerprint(self, timeout_s: float | None = None) -> bool:
        """Wait until the model file is hashed; False if `timeout_s` seconds were too short.

        Prompts that come before are decoded, but neither restored nor stored.
        """
        self._require_open()
        return self._states.wait_for_fingerprint(timeout_s)

    # Attributes of llama_cpp.Llama that this class has to know of

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
        return self._record.n_tokens

    @n_tokens.setter
    def n_tokens(self, value: int) -> None:
        # llama_cpp goes back in any memory, also where it then goes on with a wrong state.
        is_longer = value > self._record.n_tokens
        is_intact = is_longer or self._sequence is None or self._sequence.holds(value)
        self._record.assigned(value, is_intact=is_intact)

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """The token of each position; -1 where another input than a token wrote it."""
        return self._record.ids

    @input_ids.setter
    def input_ids(self, ids: NDArray[np.int32]) -> None:
        self._record.ids = ids

    # The end

    def _open_gate(self) -> Gate:
        if self._gate is None:
            raise ModelClosed("this model was not loaded")
        return self._gate

    def _require_open(self) -> None:
        self._open_gate().require_open()

    def close(self) -> None:
        """Save the states that can be saved and free the model; later calls raise ModelClosed."""

        def free() -> None:
            if self._record.has_unsaved:
                self._states.end_generation()
            super(LoadedLlama, self).close()
            self._states.release()

        if self._gate is not None:
            self._gate.close(free)
        elif hasattr(self, "_stack"):
            super().close()

    def __del__(self) -> None:
        # No step can be in progress: it would refer to us. Nothing is saved either: the garbage
        # collector may run this under any lock.
        if hasattr(self, "_stack"):
            self._stack.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, without tokenizer and cache: a pickle has neither."""
        state: dict[str, Any] = super().__getstate__()
        own = ("scope", "public_prefix", "reproducible", "splice")
        state |= {name: getattr(self, name) for name in own}
        return state | {"message_openers": self._message_openers}


def _find_openers(
    model: Any, metadata: dict[str, str], texts: Mapping[str, str] | None
) -> Openers | None:
    """Return the given openers of messages, else those of the model's chat template."""
    vocab = llama_cpp.llama_model_get_vocab(model.model)

    def is_added(token: int) -> bool:
        return bool(llama_cpp.llama_vocab_get_attr(vocab, token) & ADDED)

    def encode(text: str) -> list[int]:
        ids: list[int] = model.tokenize(text.encode(), add_bos=False, special=True)
        return ids

    if texts is not None:
        return encoded(texts, encode, is_added)
    template = metadata.get("tokenizer.chat_template")
    if not template:
        return None
    ends = (model.token_eos(), model.token_bos())
    eos, bos = (model.token_get_text(each) if each >= 0 else "" for each in ends)
    try:
        formatter = Jinja2ChatFormatter(template, eos, bos)
        return derive(lambda chat: str(formatter(messages=chat).prompt), encode, is_added)
    except Exception as error:  # noqa: BLE001  (a template may raise anything; the caller counts it)
        _log.debug("the chat template can't render a short chat: %s", type(error).__name__)
        return None
