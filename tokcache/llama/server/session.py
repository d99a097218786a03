"""All that the two clients of a llama-server share: the checks and the steps of each request.

Nothing here waits or sends: a method returns a call or steps, which `LlamaServer` performs in a
thread and `AsyncLlamaServer` in an event loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from tokcache._validate import require_bool, require_scope
from tokcache.errors import InvalidConfig, ServerError, ServerTimeout, ServerUnreachable
from tokcache.llama.server import calls, vocabulary
from tokcache.llama.server.manager import SlotManager
from tokcache.llama.server.namespaces import namespace_of
from tokcache.llama.server.report import KvReader
from tokcache.llama.server.settings import SlotSettings
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from tokcache.llama.answers import Splice
    from tokcache.llama.server.calls import Call
    from tokcache.llama.server.connection import Connection
    from tokcache.llama.server.job import Job
    from tokcache.llama.server.results import Completion, Piece, Reused
    from tokcache.llama.server.steps import Steps

Prompt = str | Iterable[int]


class Session:
    """The tokenizer and the managed slots of one client.

    `connection` is for the threads that save slots in the background.

    Threads: safe, also in event loops.
    """

    def __init__(
        self,
        connection: Connection,
        tokenizer: vocabulary.ServerTokenizer | None,
        slot_settings: SlotSettings | None,
    ) -> None:
        if tokenizer is not None and not hasattr(tokenizer, "unwrap"):
            raise InvalidConfig(
                f"tokenizer must be a wrapper; pass tokcache.wrap({type(tokenizer).__name__}(...))"
            )
        if slot_settings is not None and not isinstance(slot_settings, SlotSettings):
            raise InvalidConfig(f"slot_settings must be SlotSettings, not {slot_settings!r}")
        self._url = connection.url
        self._tokenizer = tokenizer
        self._is_checked = tokenizer is None
        self.manager = SlotManager(
            connection, slot_settings or SlotSettings(), self.check_vocabulary
        )
        if tokenizer is not None:
            self.manager.records.misses.decode = partial(vocabulary.decode, tokenizer)
        self.reader = KvReader(connection.url, self.manager)

    def describe(self, name: str) -> str:
        """Return the text of a client's `repr`."""
        watch, stats = self.manager.watch, self.manager.stats()
        model = PurePath(watch.props.model_path).name or "unnamed" if watch.props else "unknown"
        return (
            f"<{name} {self._url}, model {model}, {len(self.manager.table.slots)} slots,"
            f" {stats.n_files} saved ({stats.n_bytes:,} bytes)>"
        )

    def check_vocabulary(self) -> Steps[None]:
        """Raise VocabularyMismatch unless the tokenizer is the model's."""
        if self._tokenizer is not None:
            yield from vocabulary.check(self._tokenizer, self._url)
        self._is_checked = True

    def open(self) -> Steps[None]:
        """Check the tokenizer, if that was not done yet."""
        if not self._is_checked:
            yield from self.check_vocabulary()

    def token_ids(self, text: str, add_special_tokens: bool, scope: str | None) -> Steps[TokenIds]:
        """Return the ids of a text from the wrapped tokenizer, or else from the server."""
        require_scope(scope)
        calls.require_text(text)
        yield from self.open()
        if self._tokenizer is None:
            ids: TokenIds = yield calls.tokenize(text, add_special=add_special_tokens)
            return ids
        encode = self._tokenizer.token_ids
        ids = yield partial(encode, text, add_special_tokens=add_special_tokens, scope=scope)
        return ids

    def complete(
        self,
        prompt: Prompt,
        settings: dict[str, Any],
        scope: str | None,
        conversation: str | None,
        *,
        explain: bool,
        splice: bool,
    ) -> Steps[Reused]:
        """Complete a text or token ids in a managed slot."""
        tokenizer = self._tokenizer
        if require_bool("splice", splice) and tokenizer is None:
            raise InvalidConfig(
                "splice=True needs LlamaServer(tokenizer=…), the model's own tokenizer: a server "
                "does not report which of its tokens are added ones"
            )
        ids = yield from self._prompt_ids(prompt, scope)
        complete = partial(self.manager.complete, explain=explain)
        if not splice or tokenizer is None:
            return (yield from complete(ids, settings, scope, conversation))
        calls.require_settings(settings)
        records, namespace = self.manager.records, namespace_of(scope, settings.get("lora"))
        spliced = yield from self._spliced(ids, namespace, tokenizer)
        if spliced.refusal:
            records.trust.refuse(spliced.refusal)
        if spliced.n_spliced:
            ids = TokenIds(spliced.ids)
        begun = records.answers.begin(namespace, ids.numpy())
        reused = yield from complete(ids, settings, scope, conversation)
        completion = reused.completion
        if len(completion.token_ids) == completion.n_predicted:  # else a setting omitted the ids
            n_text = completion.n_predicted - (completion.stop == "eos")  # its id has no text
            records.answers.remember(begun, completion.token_ids.numpy()[:n_text])
        return replace(reused, n_spliced=spliced.n_spliced, splice_refusal=spliced.refusal)

    def _spliced(
        self, ids: TokenIds, namespace: bytes, tokenizer: vocabulary.ServerTokenizer
    ) -> Steps[Splice]:
        """Return a prompt's ids with the generated ids of earlier answers; `answers` has the rules.

        The server gives the text of ids. A replacement character in it may stand for other bytes.
        """
        added = yield partial(vocabulary.added, tokenizer)
        steps = self.manager.records.answers.splice(namespace, ids.numpy(), added)
        try:
            asked = next(steps)
            while True:
                try:
                    text = yield calls.detokenize(asked.tolist())
                except (ServerUnreachable, ServerTimeout):
                    raise
                except ServerError:
                    text = "\ufffd"
                asked = steps.send(None if "\ufffd" in text else text.encode())
        except StopIteration as stop:
            found: Splice = stop.value
            return found

    def begin(
        self,
        prompt: Prompt,
        settings: dict[str, Any],
        scope: str | None,
        conversation: str | None,
    ) -> Steps[Job]:
        """Prepare a managed slot for a prompt whose answer is streamed."""
        ids = yield from self._prompt_ids(prompt, scope)
        return (yield from self.manager.begin(ids, settings, scope, conversation))

    def noted(self, job: Job, piece: Piece) -> Piece:
        """Record a piece of a streamed answer, and return it; the last one with the reuse."""
        if piece.completion is not None:
            return replace(piece, reused=self.manager.finish(job, piece.completion))
        job.received.extend(piece.token_ids)
        return piece

    def _prompt_ids(self, prompt: Prompt, scope: str | None) -> Steps[TokenIds]:
        require_scope(scope)
        if isinstance(prompt, str):
            return (yield from self.token_ids(prompt, True, scope))
        ids = prompt if isinstance(prompt, TokenIds) else TokenIds(calls.plain(prompt))
        yield from self.open()
        return ids


def sampling(
    settings: dict[str, Any], n_predict: int, temperature: float, n_probs: int = 0
) -> dict[str, Any]:
    """Return all settings of a completion; those in `settings` take precedence."""
    return {
        "n_predict": n_predict,
        "temperature": temperature,
        "n_probs": n_probs,
        **settings,
    }


def plain_completion(
    tokens: Iterable[int], id_slot: int, cache_prompt: bool, settings: dict[str, Any]
) -> Call[Completion]:
    """Return the call for a completion in a slot of the caller's choice."""
    asked = {"id_slot": id_slot, "cache_prompt": cache_prompt, **settings}
    calls.require_settings(asked)
    return calls.completion(tokens, asked)
