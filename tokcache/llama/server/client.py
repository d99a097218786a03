"""LlamaServer: the client of a running llama-server that caches tokens and reuses slots."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tokcache.llama.server import calls
from tokcache.llama.server.connection import Connection
from tokcache.llama.server.exchange import Exchange
from tokcache.llama.server.session import Prompt, Session, plain_completion, sampling
from tokcache.llama.server.steps import Steps, drive

if TYPE_CHECKING:
    import ssl
    from types import TracebackType

    from tokcache.llama.server.report import SlotBlocks, SlotKv
    from tokcache.llama.server.results import (
        Completion,
        ModelMeta,
        Piece,
        Reused,
        ReuseStats,
        ServerProps,
        Slot,
        SlotFile,
    )
    from tokcache.llama.server.settings import SlotSettings
    from tokcache.llama.server.vocabulary import ServerTokenizer
    from tokcache.text.token_ids import TokenIds

T = TypeVar("T")


class LlamaServer:
    """A client of one llama-server; AsyncLlamaServer is the same for event loops.

    `complete` and `stream` start each prompt from the slot or the saved file that holds most of
    it, as `slot_settings` allow. `completion` and the slot methods are plain calls to the server,
    and the caller chooses the slot. Use the managed slots through one client only. Start a server
    with tenants (`scope`) with `--cache-ram 0`, because its own cache ignores scopes.

    `verify` is the file of a certificate authority, an SSLContext, or False to trust any server.

    Units:  `timeout_s` limits a whole answer, or the wait for a stream's next piece;
            `connect_timeout_s` limits the connecting; `retries` applies to requests that were
            never sent or may be repeated.
    Errors: ServerError and its subclasses, with the server's message; VocabularyMismatch from the
            constructor if `tokenizer` is not the model's; InvalidText, InvalidTokens and
            InvalidScope before a request is sent; InvalidConfig; MissingExtra.
    Threads: safe.
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer: ServerTokenizer | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
        retries: int = 2,
        api_key: str | None = None,
        verify: bool | str | ssl.SSLContext = True,
        slot_settings: SlotSettings | None = None,
    ) -> None:
        self.url = url
        exchange = Exchange(
            url,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            retries=retries,
            api_key=api_key,
            verify=verify,
        )
        self._connection = Connection(exchange)
        self._session = Session(self._connection, tokenizer, slot_settings)
        self._manager = self._session.manager
        try:
            self._drive(self._session.open())
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return self._session.describe(type(self).__name__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish saving and close the connections; the server runs on and saved slots stay."""
        self._manager.close()
        self._connection.close()

    # -- plain calls to the server --------------------------------------------------------------

    def health(self) -> str:
        """Return "ok", or raise ServerError with the reason why the server is not ready."""
        return self._connection.do(calls.health())

    def props(self) -> ServerProps:
        """Return the server's properties."""
        return self._connection.do(calls.props())

    def slots(self) -> tuple[Slot, ...]:
        """Return the slots; a server started with --no-slots refuses."""
        return self._connection.do(calls.slots())

    def metrics(self) -> dict[str, float]:
        """Return the server's counters; it must have been started with --metrics."""
        return self._connection.do(calls.metrics())

    def model_meta(self) -> ModelMeta:
        """Return the model's metadata, as far as this server reports it."""
        return self._connection.do(calls.model_meta())

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenIds:
        """Return the ids that the server's own tokenizer makes of `text`."""
        return self._connection.do(calls.tokenize(text, add_special=add_special_tokens))

    def detokenize(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`, special tokens included."""
        return self._connection.do(calls.detokenize(tokens))

    def completion(
        self,
        tokens: Iterable[int],
        *,
        n_predict: int,
        id_slot: int = -1,
        temperature: float = 0.0,
        cache_prompt: bool = True,
        n_probs: int = 0,
        **settings: Any,
    ) -> Completion:
        """Decode `tokens` in a slot and return the model's answer.

        `settings` are sent unchanged. After `n_predict=0` the slot holds exactly `tokens`.
        """
        asked = sampling(settings, n_predict, temperature, n_probs)
        return self._connection.do(plain_completion(tokens, id_slot, cache_prompt, asked))

    def save_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Write a slot's state to `filename` in the server's slot folder."""
        return self._connection.do(calls.save_slot(id_slot, filename))

    def restore_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Read a slot's state back; the slot is empty after a failure."""
        return self._connection.do(calls.restore_slot(id_slot, filename))

    def erase_slot(self, id_slot: int) -> None:
        """Empty a slot."""
        self._connection.do(calls.erase_slot(id_slot))

    # -- with reuse ---------------------------------------------------------------------------

    def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        """Return the ids of `text` from the wrapped tokenizer, or else from the server.

        Errors: InvalidText if `text` is not a str or has a lone surrogate; InvalidScope.
        """
        return self._drive(self._session.token_ids(text, add_special_tokens, scope))

    def complete(
        self,
        prompt: Prompt,
        *,
        n_predict: int,
        scope: str | None = None,
        conversation: str | None = None,
        temperature: float = 0.0,
        n_probs: int = 0,
        explain: bool = False,
        splice: bool = False,
        **settings: Any,
    ) -> Reused:
        """Complete a text or token ids, starting from the best slot or saved file.

        `scope` separates tenants: their prompts share no slot contents or files. `conversation`
        is a name that `pin` accepts. `miss` of the result says why no more of the prompt was
        reused; `explain` also asks the server for the texts on both sides of that place. With
        `splice` the prompt takes the generated ids of earlier answers of its scope that were asked
        for with `splice`, where its text stays the same byte for byte; this needs `tokenizer`.
        """
        asked = sampling(settings, n_predict, temperature, n_probs)
        steps = self._session.complete(
            prompt, asked, scope, conversation, explain=explain, splice=splice
        )
        return self._drive(steps)

    def stream(
        self,
        prompt: Prompt,
        *,
        n_predict: int,
        scope: str | None = None,
        conversation: str | None = None,
        temperature: float = 0.0,
        **settings: Any,
    ) -> Generator[Piece]:
        """Yield a completion piece by piece; `close()` aborts it and frees the slot."""
        asked = sampling(settings, n_predict, temperature)
        job = self._drive(self._session.begin(prompt, asked, scope, conversation))
        try:
            with contextlib.closing(self._connection.stream(job.call(is_stream=True))) as pieces:
                for piece in pieces:
                    yield self._session.noted(job, piece)
        except BaseException as error:
            self._manager.fail(job, error)
            raise

    def pin(self, conversation: str, *, scope: str | None = None) -> None:
        """Keep a conversation's slot and saved files from being evicted."""
        self._manager.pin(conversation, scope, is_pinned=True)

    def unpin(self, conversation: str, *, scope: str | None = None) -> None:
        """Allow a conversation's slot and saved files to be evicted again."""
        self._manager.pin(conversation, scope, is_pinned=False)

    def clear(self, *, scope: str | None = None) -> None:
        """Clear one tenant's records, pins, saved files and slots; without a scope, everything.

        The server overwrites files that this process can't delete. Running requests go on, and
        nothing of them is kept.

        Errors: InvalidScope; ServerError if a slot could not be erased: its contents are not
                reused.
        """
        self._drive(self._manager.clear(scope))

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until all pending saves are done; ServerTimeout if that takes too long."""
        self._manager.flush(timeout_s)

    def stats(self) -> ReuseStats:
        """Return the counters of the managed slots."""
        return self._manager.stats()

    def kv_state(self) -> tuple[SlotKv, ...]:
        """Return the size of each slot's KV state; zeros if the server can't be reached."""
        return self._drive(self._session.reader.state())

    def kv_report(self) -> tuple[SlotBlocks, ...]:
        """Return the tokens of each slot in blocks; none if the server can't be reached."""
        return self._drive(self._session.reader.blocks())

    def _drive(self, steps: Steps[T]) -> T:
        return drive(steps, self._connection)


def kv_report(*servers: LlamaServer) -> tuple[SlotBlocks, ...]:
    """Return the blocks of all slots of several servers."""
    return tuple(slot for server in servers for slot in server.kv_report())
