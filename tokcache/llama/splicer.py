"""Splicer: puts generated ids into the prompts of one `Llama`; `answers` has the conditions."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from tokcache.llama.answers import Added, Answers, Splice
from tokcache.llama.tokenizer import WrappedTokenizer, int32_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from numpy.typing import NDArray

    from tokcache.state.handles import Work

ADDED = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
_NOT_TEXT = ADDED | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_MOST_TEXTS = 65_536  # of tokens, remembered
_NOTHING = Splice(np.empty(0, np.int32))
_QUOTING = ("echo", "logprobs", "suffix")  # these need the prompt's text


class Splicer:
    """Remembers the answers of one model, and splices them into its prompts.

    Threads: `Answers` is safe; the rest is the context's: one at a time.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.answers = Answers()
        self._model, self._tokenizer = model, tokenizer
        self._vocab = llama_cpp.llama_model_get_vocab(model.model)
        self._bytes_of: Callable[[int], bytes] = lru_cache(_MOST_TEXTS)(self._piece)
        self._attributes: NDArray[np.int64] | None = None
        self._added: tuple[frozenset[int] | None, Added] | None = None
        self._last = _NOTHING  # of the prompt that is about to be decoded

    def completing(
        self,
        complete: Callable[..., Iterator[Any]],
        call: dict[str, Any],
        encode: Callable[..., list[int]],
        scope: str | None,
    ) -> Generator[Any, Any, None]:
        """Yield the items of a completion of llama_cpp, with answers spliced into its prompt."""
        mine = _NOTHING
        if any(call.get(name) not in (None, False) for name in _QUOTING):
            mine = _NOTHING._replace(refusal="splice_call_form")
        else:
            prompt = call["prompt"]
            ids = int32_ids(self._encoded(prompt, encode) if isinstance(prompt, str) else prompt)
            steps = self.answers.splice(scope, ids, self._added_tokens())
            try:
                asked = next(steps)
                while True:
                    asked = steps.send(b"".join(map(self._bytes_of, asked.tolist())))
            except StopIteration as stop:
                mine = stop.value
        if mine.n_spliced:
            call["prompt"] = mine.ids.tolist()
        self._last = mine
        try:
            yield from complete(**call)
        finally:
            if self._last is mine:  # it failed before the prompt was decoded
                self._last = _NOTHING

    def take(self) -> Splice:
        """Return the splice of the prompt that is decoded now, once."""
        last, self._last = self._last, _NOTHING
        return last

    def remembering(
        self,
        generation: Generator[int, Any, None],
        prompt: NDArray[np.int32],
        scope: str | None,
        work: Work | None,
    ) -> Generator[int, Any, None]:
        """Yield the tokens of a generation, and remember them when it ends.

        An answer to which the caller adds tokens of his own, by `send`, is not remembered.
        """
        begun = self.answers.begin(scope, prompt, work)
        answer: list[int] = []
        sent, is_ended, is_own = None, False, not bool((prompt < 0).any())
        try:
            while True:
                try:
                    token = generation.send(sent)
                except StopIteration:
                    return
                answer.append(int(token))
                # Not after the loop: a model that was closed meanwhile has no vocabulary any more.
                is_ended = bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))
                sent = yield token
                is_own &= sent is None
        finally:
            generation.close()
            if is_own:  # the token that ended the answer is not part of it
                self.answers.remember(begun, np.array(answer[: len(answer) - is_ended], np.int32))

    def _encoded(self, prompt: str, encode: Callable[..., list[int]]) -> list[int]:
        """Return the ids that llama_cpp makes of a prompt.

        Source: llama_cpp.Llama._create_completion.
        """
        if not prompt:  # llama_cpp begins it in a way of its own
            return []
        model = self._model
        cls, sep = model.token_cls(), model.token_sep()
        first, last = (model.token_bos() if cls == -1 else cls), model.token_eos()
        before = [first] if model.add_bos_token() and first != -1 else []
        after = [last if sep == -1 else sep] if model.add_eos_token() or sep != -1 else []
        return [*before, *encode(prompt.encode(), add_bos=False, special=True), *after]

    def _added_tokens(self) -> Added:
        """Return which ids are added tokens, of the model and of a wrapped tokenizer."""
        is_wrapped = isinstance(self._tokenizer, WrappedTokenizer)
        given = self._tokenizer.added_ids() if is_wrapped else None
        if self._added is not None and self._added[0] is given:
            return self._added[1]
        if self._attributes is None:
            n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
            attr_of = llama_cpp.llama_vocab_get_attr
            attrs = [attr_of(self._vocab, token) for token in range(n_vocab)]
            self._attributes = np.array(attrs, np.int64)
        alone = (self._attributes & ADDED) != 0
        special = (self._attributes & _NOT_TEXT) != 0
        if given is not None:
            is_given = np.isin(np.arange(len(alone)), list(given))
            alone, special = alone & is_given, special | is_given
        self._added = given, Added(alone, special)
        return self._added[1]

    def _piece(self, token: int) -> bytes:
        """Return the bytes of a token."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            size = -n
