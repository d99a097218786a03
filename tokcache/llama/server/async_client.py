"""AsyncLlamaServer: LlamaServer for event loops, with the same methods."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tokcache.llama.server import calls
from tokcache.llama.server.connection import AsyncConnection, Connection
from tokcache.llama.server.exchange import Exchange
from tokcache.llama.server.session import Prompt, Session, plain_completion, sampling
from tokcache.llama.server.steps import Steps, adrive

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


class AsyncLlamaServer:
    """A client of one llama-server for event loops.

    It has the methods of LlamaServer, to be awaited; `stream` is an asynchronous generator, and
    `aclose` takes the place of `close`. The arguments are those of LlamaServer. `async with` closes
    the client, and checks at its start that `tokenizer` is the model's; a client that is opened
    otherwise checks that at its first request.

    Slots are saved in threads of their own, so no event loop waits for a file.

    Errors: those of LlamaServer; VocabularyMismatch from `async with` or from the first request.
    Threads: safe, in any number of event loops.
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
        self._connection = AsyncConnection(exchange)
        self._saving = Connection(exchange)
        self._session = Session(self._saving, tokenizer, slot_settings)
        self._manager = self._session.manager

    def __repr__(self) -> str:
        return self._session.describe(type(self).__name__)

    async def __aenter__(self) -> Self:
        try:
            await self._drive(self._session.open())
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Finish saving and close the connections of this event loop; others close their own."""
        await asyncio.to_thread(self._manager.close)
        self._saving.close()
        await self._connection.aclose()

    # -- plain calls to the server --------------------------------------------------------------

    async def health(self) -> str:
        """Return "ok", or raise ServerError with the reason why the server is not ready."""
        return await self._connection.do(calls.health())

    async def props(self) -> ServerProps:
        """Return the server's properties."""
        return await self._connection.do(calls.props())

    async def slots(self) -> tuple[Slot, ...]:
        """Return the slots; a server started with --no-slots refuses."""
        return await self._connection.do(calls.slots())

    async def metrics(self) -> dict[str, float]:
        """Return the server's counters; it must have been started with --metrics."""
        return await self._connection.do(calls.metrics())

    async def model_meta(self) -> ModelMeta:
        """Return the model's metadata, as far as this server reports it."""
        return await self._connection.do(calls.model_meta())

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenIds:
        """Return the ids that the server's own tokenizer makes of `text`."""
        return await self._connection.do(calls.tokenize(text, add_special=add_special_tokens))

    async def detokenize(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`, special tokens included."""
        return await self._connection.do(calls.detokenize(tokens))

    async def completion(
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
        return await self._connection.do(plain_completion(tokens, id_slot, cache_prompt, asked))

    async def save_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Write a slot's state to `filename` in the server's slot folder."""
        return await self._connection.do(calls.save_slot(id_slot, filename))

    async def restore_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Read a slot's state back; the slot is empty after a failure."""
        return await self._connection.do(calls.restore_slot(id_slot, filename))

    async def erase_slot(self, id_slot: int) -> None:
        """Empty a slot."""
        await self._connection.do(calls.erase_slot(id_slot))

    # -- with reuse ---------------------------------------------------------------------------

    async def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        """Return the ids of `text` from the wrapped tokenizer, or else from the server.

        Errors: InvalidText if `text` is not a str or has a lone surrogate; InvalidScope.
        """
        return await self._drive(self._session.token_ids(text, add_special_tokens, scope))

    async def complete(
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
        return await self._drive(steps)

    async def stream(
        self,
        prompt: Prompt,
        *,
        n_predict: int,
        scope: str | None = None,
        conversation: str | None = None,
        temperature: float = 0.0,
        **settings: Any,
    ) -> AsyncGenerator[Piece]:
        """Yield a completion piece by piece; `aclose()` aborts it and frees the slot."""
        asked = sampling(settings, n_predict, temperature)
        job = await self._drive(self._session.begin(prompt, asked, scope, conversation))
        try:
            async with contextlib.aclosing(
                self._connection.stream(job.call(is_stream=True))
            ) as pieces:
                async for piece in pieces:
                    yield self._session.noted(job, piece)
        except BaseException as error:
            self._manager.fail(job, error)
            raise

    async def pin(self, conversation: str, *, scope: str | None = None) -> None:
        """Keep a conversation's slot and saved files from being evicted."""
        self._manager.pin(conversation, scope, is_pinned=True)

    async def unpin(self, conversation: str, *, scope: str | None = None) -> None:
        """Allow a conversation's slot and saved files to be evicted again."""
        self._manager.pin(conversation, scope, is_pinned=False)

    async def clear(self, *, scope: str | None = None) -> None:
        """Clear one tenant's records, pins, saved files and slots; without a scope, everything.

        The server overwrites files that this process can't delete. Running requests go on, and
        nothing of them is kept.

        Errors: InvalidScope; ServerError if a slot could not be erased: its contents are not
                reused.
        """
        await self._drive(self._manager.clear(scope))

    async def flush(self, timeout_s: float | None = None) -> None:
        """Wait until all pending saves are done; ServerTimeout if that takes too long."""
        await asyncio.to_thread(self._manager.flush, timeout_s)

    async def stats(self) -> ReuseStats:
        """Return the counters of the managed slots."""
        return self._manager.stats()

    async def kv_state(self) -> tuple[SlotKv, ...]:
        """Return the size of each slot's KV state; zeros if the server can't be reached."""
        return await self._drive(self._session.reader.state())

    async def kv_report(self) -> tuple[SlotBlocks, ...]:
        """Return the tokens of each slot in blocks; none if the server can't be reached."""
        return await self._drive(self._session.reader.blocks())

    async def _drive(self, steps: Steps[T]) -> T:
        return await adrive(steps, self._connection)
