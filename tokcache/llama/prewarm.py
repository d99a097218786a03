"""Prewarm: prefixes that are prefilled and pinned before a request needs them.

1. Every prefix becomes ids, or is refused by reason; nothing is decoded before all are read.
2. The ids that are not stored are decoded at idle times: after each call of llama.cpp the context
   is left to any request that waits. Its states are stored before, so nothing is decoded twice.
3. The states of a prefix are pinned as soon as it is complete. In the end it is looked up whether
   memory and all tiers have kept all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llama_cpp import llama_chat_format

from tokcache._prefix import n_common
from tokcache.errors import InvalidText, InvalidTokens, TokcacheError
from tokcache.llama.arguments import checked_messages, checked_prompt
from tokcache.llama.tokenizer import int32_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tokcache.llama.gate import Gate
    from tokcache.llama.model_states import ModelStates

_CHAT_FIELDS = {"messages", "tools", "tool_choice", "functions", "function_call"}
# The ids of a text may change at its end with the text that follows.
_NEXT_TEXTS = ("a", " a", "1", "\n")
_NEXT_QUESTIONS = ("alpha", "7")  # whatever both prompts have in common belongs to neither


@dataclass(frozen=True, slots=True)
class Prewarmed:
    """The result for one prefix of `Llama.prewarm`.

    `refusal` is the reason why it is not warm, or not in every tier; None if it is.

    Units: tokens; `n_tokens` of the prefix, of which `n_decoded` were not held before.
    """

    n_tokens: int = 0
    n_decoded: int = 0
    refusal: str | None = None


class _Prefix(NamedTuple):
    """The ids of a prefix, and where a prompt that begins with it may part; or a refusal."""

    ids: NDArray[np.int32]
    ends: tuple[int, ...] = ()
    refusal: str | None = None


class _Renderer:
    """Stands in for a Llama in a chat handler: a prompt is not completed, but taken."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.prompt: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, prompt: Any, *_args: Any, **_kwargs: Any) -> Any:
        self.prompt = prompt
        raise RuntimeError("the handler must not go on: there is no answer")


class Prewarm:
    """Prefills and pins prefixes in the context of one model; `decode` decodes one batch of ids.

    Errors: InvalidText, InvalidTokens for anything that is not a prefix; ModelClosed.
    Threads: one, which must not be in a step of the gate.
    """

    def __init__(
        self,
        llm: Any,
        gate: Gate,
        states: ModelStates,
        decode: Callable[[list[int]], object],
        scope: str | None,
    ) -> None:
        self._llm, self._gate, self._states = llm, gate, states
        self._decode, self._scope = decode, scope

    def run(
        self, prefixes: Iterable[Any], progress: Callable[[int, int], object] | None
    ) -> list[Prewarmed]:
        """Prefill, store and pin each prefix; return their results."""
        states, cache = self._states, self._states.cache
        states.wait_for_fingerprint(None)
        wanted = self._read(prefixes)
        n_total = sum(len(ids) for ids, _, refusal in wanted if refusal is None)
        n_before, n_decoded = 0, []
        for ids, ends, refusal in wanted:
            n_new = n_reached = 0
            while refusal is None and n_reached < len(ids):

                def note(n_done: int, n_before: int = n_before) -> None:
                    if progress is not None:
                        progress(n_before + n_done, n_total)

                n_reached, n_more = self._prefill(ids, ends, note)
                n_new += n_more
                note(n_reached)
            n_before += n_reached
            n_decoded.append(n_new)
        if cache is not None:  # a full disk is known when all was written
            cache.flush()
        results = []
        for (ids, ends, refusal), n_new in zip(wanted, n_decoded, strict=True):
            if refusal is None:
                with self._gate.turn():
                    n_held, n_below = states.pin(ids, ends, self._scope, is_pinned=True)
                refusals = {"prewarm_not_kept": n_held, "prewarm_not_written": n_below}
                lacking = (name for name, n in refusals.items() if n < len(ids))
                refusal = next(lacking, None)  # noqa: PLW2901
            if refusal is not None:
                states.refuse(refusal)
            results.append(Prewarmed(len(ids), n_new, refusal))
        if cache is not None:
            cache.flush()
        return results

    def unpin(self, prefixes: Iterable[Any]) -> int:
        """End the pins of these prefixes; return how many of them memory held."""
        n_held = 0
        for ids, ends, _ in self._read(prefixes, is_new=False):
            with self._gate.turn():
                n_held += any(self._states.pin(ids, ends, self._scope, is_pinned=False))
        return n_held

    def _prefill(
        self, ids: NDArray[np.int32], ends: tuple[int, ...], note: Callable[[int], object]
    ) -> tuple[int, int]:
        """Prefill until the prefix is complete or a request waits; return positions, new ones."""
        gate, states, record = self._gate, self._states, self._states.record
        with gate.step(is_idle=True):
            if not states.hold_prefix(ids, ends, self._scope).n_tokens:
                self._llm.reset()
            record.tokens_begin(self._scope)
            first, began = record.n_tokens, time.perf_counter()
            while record.n_tokens < len(ids):
                start = record.n_tokens
                stop = start + states.n_next(len(ids) - start, int(self._llm.n_batch))
                self._decode(ids[start:stop].tolist())
                note(stop)
                if gate.is_wanted():
                    break
            states.note_prefill(record.n_tokens - first, began)
            states.end_generation()
            if record.n_tokens >= len(ids):
                states.pin(ids, ends, self._scope, is_pinned=True)
            return min(record.n_tokens, len(ids)), max(record.n_tokens - first, 0)

    # Reading prefixes

    def _read(self, prefixes: Iterable[Any], *, is_new: bool = True) -> list[_Prefix]:
        """Return the ids of prefixes, or why they are refused; of equal ones the first counts."""
        if isinstance(prefixes, (str, bytes, Mapping)) or not isinstance(prefixes, Iterable):
            raise InvalidText(
                "prefixes must be a list of texts, chats or lists of ids, not "
                f"{type(prefixes).__name__}"
            )
        read: list[_Prefix] = []
        seen: set[bytes] = set()
        is_reproducible, n_block = self._states.record.alignment
        for number, prefix in enumerate(prefixes):
            try:
                ids, ends, refusal = self._ids_of(prefix)
            except (InvalidText, InvalidTokens) as error:
                raise type(error)(f"prefixes[{number}]: {error}") from None
            if is_reproducible:  # nothing after the last whole block is reused
                ids = ids[: len(ids) // n_block * n_block]
            if refusal is None and self._states.cache is not None:
                refusal = self._states.why_not_cached()
            if refusal is None and not len(ids):
                refusal = "prewarm_empty"
            elif refusal is None and not 0 <= ids.min() <= ids.max() < self._llm.n_vocab():
                refusal = "prewarm_other_model"
            elif refusal is None and len(ids) >= self._llm.n_ctx():
                refusal = "prewarm_too_long"
            elif refusal is None and is_new and ids.tobytes() in seen:
                refusal = "prewarm_duplicate"
            seen.add(ids.tobytes())
            # A state before the last token serves a prompt that is equal to the prefix.
            stops = {*(end for end in ends if end > 0), len(ids) - 1, len(ids)} - {0}
            read.append(_Prefix(ids, tuple(sorted(stops)), refusal))
        return read

    def _ids_of(self, prefix: Any) -> _Prefix:
        llm, none = self._llm, np.empty(0, np.int32)
        if isinstance(prefix, str):
            checked_prompt(prefix)
            ids, *others = (self._encoded(prefix + text) for text in ("", *_NEXT_TEXTS))
            return _Prefix(int32_ids(ids), (min(n_common(each, ids) for each in others),))
        is_list = isinstance(prefix, (list, tuple))
        if is_list and prefix and all(isinstance(each, Mapping) for each in prefix):
            prefix = {"messages": prefix}
        if not isinstance(prefix, Mapping):
            if not isinstance(prefix, (Sequence, np.ndarray)) or isinstance(
                prefix, (bytes, bytearray)
            ):
                raise InvalidText(
                    "a prefix must be a str, a list of messages, {'messages': …, 'tools': …}, or "
                    f"token ids, not {type(prefix).__name__}"
                )
            return _Prefix(int32_ids(list(prefix)))
        if unknown := set(prefix) - _CHAT_FIELDS:
            raise InvalidText(
                f"a chat has {', '.join(sorted(_CHAT_FIELDS))}, not {min(map(str, unknown))}"
            )
        messages = list(checked_messages(prefix.get("messages", [])))
        if llm.chat_handler is not None:  # it may fill the context itself, with images
            return _Prefix(none, (), "prewarm_chat_handler")
        chats = [messages]
        if not messages or messages[-1].get("role") != "user":
            chats = [[*messages, {"role": "user", "content": text}] for text in _NEXT_QUESTIONS]
        handler = llm._chat_handlers.get(llm.chat_format)  # noqa: SLF001 (llama_cpp looks here, too)
        handler = handler or llama_chat_format.get_chat_completion_handler(llm.chat_format)
        rest = {name: value for name, value in prefix.items() if name != "messages"}
        prompts: list[list[int]] = []
        for chat in chats:
            renderer = _Renderer(llm)
            try:
                handler(llama=renderer, messages=chat, **rest)
            except TokcacheError:
                raise
            except Exception:  # noqa: BLE001 (a template may raise anything; the refusal is counted)
                if renderer.prompt is None:
                    return _Prefix(none, (), "prewarm_template_failed")
            prompt = renderer.prompt
            prompts.append(self._encoded(prompt) if isinstance(prompt, str) else list(prompt))
        first, *others = prompts
        n_same = min((n_common(first, each) for each in others), default=len(first))
        return _Prefix(int32_ids(first[:n_same]))

    def _encoded(self, text: str) -> list[int]:
        """Return the ids of a text as those of a prompt; llama_cpp's rule for the first one."""
        model, ids = self._llm._model, []  # noqa: SLF001 (llama_cpp has no public way)
        if model.add_bos_token():
            first = model.token_cls() if model.token_cls() != -1 else model.token_bos()
            ids = [] if first == -1 else [first]
        return ids + list(self._llm.tokenize(text.encode(), add_bos=False, special=True))
