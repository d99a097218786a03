"""LlamaServer: the client of a running llama-server that caches tokens and reuses slots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator, Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tokcache._validate import require_int, require_scope, require_seconds
from tokcache.errors import InvalidConfig
from tokcache.llama.server import calls, vocabulary
from tokcache.llama.server.connection import Connection
from tokcache.llama.server.manager import Job, SlotManager
from tokcache.llama.server.report import KvReader, SlotBlocks, SlotKv
from tokcache.llama.server.settings import SlotSettings
from tokcache.llama.server.steps import Steps, adrive, drive
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from types import TracebackType

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

T = TypeVar("T")
Prompt = str | Iterable[int]


class LlamaServer:
    """A client of one llama-server; the methods named `a...` are for event loops.

    `complete` and `stream` start each prompt from the slot or the saved file that holds most of
    it, as `slot_settings` allow. `completion` and the slot methods are plain calls to the server,
    and the caller chooses the slot. Use the managed slots through one LlamaServer only. Start a
    server with tenants (`scope`) with `--cache-ram 0`, because its own cache ignores scopes.

    `verify` is the file of a certificate authority, an SSLContext, or False to trust any server.
    Units:  `timeout_s` limits a whole answer, or the wait for a stream's next piece;
            `connect_timeout_s` limits the connecting; `retries` applies to requests that were
            never sent or may be repeated.
    Errors: ServerError and its subclasses, with the server's message; VocabularyMismatch from the
            constructor if `tokenizer` is not the model's; InvalidText, InvalidTokens and
            InvalidScope before a request is sent; InvalidConfig; MissingExtra.
    Threads: safe, also with any number of event loops.
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer: vocabulary.ServerTokenizer | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
        retries: int = 2,
        api_key: str | None = None,
        verify: bool | str | ssl.SSLContext = True,
        slot_settings: SlotSettings | None = None,
    ) -> None:
        require_int("retries", retries, minimum=0, maximum=10)
        require_seconds("timeout_s", timeout_s)
        require_seconds("connect_timeout_s", connect_timeout_s)
        if tokenizer is not None and not hasattr(tokenizer, "unwrap"):
            raise InvalidConfig(
                f"tokenizer must be a wrapper; pass tokcache.wrap({type(tokenizer).__name__}(...))"
            )
        self.url = url
        self._connection = Connection(
            url,
            timeout_s=timeout_s,
            connect_timeout_s=connect_timeout_s,
            api_key=api_key,
            verify=verify,
            retries=retries,
        )
        self._tokenizer = tokenizer
        self._manager = self.manage(slot_settings or SlotSettings())
        self._reader = KvReader(url, self._manager)
        try:
            self._drive(self._checked_vocabulary())
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        watch, stats = self._manager.watch, self._manager.stats()
        model = PurePath(watch.props.model_path).name or "unnamed" if watch.props else "unknown"
        return (
            f"<LlamaServer {self.url}, model {model}, {len(self._manager.table.slots)} slots,"
            f" {stats.n_files} saved ({stats.n_bytes:,} bytes)>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def close(self) -> None:
        """Finish saving and close the connections; the server runs on and saved slots stay."""
        self._manager.close()
        self._connection.close()

    async def aclose(self) -> None:
        """Finish saving and close the connections of threads and of this event loop."""
        await asyncio.to_thread(self.close)
        await self._connection.aclose()

    # -- plain calls to the server --------------------------------------------------------------

    def health(self) -> str:
        """Return "ok", or raise ServerError with the reason why the server is not ready."""
        return self._connection.do(calls.health())

    async def ahealth(self) -> str:
        """Return "ok", or raise ServerError with the reason why the server is not ready."""
        return await self._connection.ado(calls.health())

    def props(self) -> ServerProps:
        """Return the server's properties."""
        return self._connection.do(calls.props())

    async def aprops(self) -> ServerProps:
        """Return the server's properties."""
        return await self._connection.ado(calls.props())

    def slots(self) -> tuple[Slot, ...]:
        """Return the slots; a server started with --no-slots refuses."""
        return self._connection.do(calls.slots())

    async def aslots(self) -> tuple[Slot, ...]:
        """Return the slots; a server started with --no-slots refuses."""
        return await self._connection.ado(calls.slots())

    def metrics(self) -> dict[str, float]:
        """Return the server's counters; it must have been started with --metrics."""
        return self._connection.do(calls.metrics())

    async def ametrics(self) -> dict[str, float]:
        """Return the server's counters; it must have been started with --metrics."""
        return await self._connection.ado(calls.metrics())

    def model_meta(self) -> ModelMeta:
        """Return the model's metadata, as far as this server reports it."""
        return self._connection.do(calls.model_meta())

    def n_vocab(self) -> int | None:
        """Return the model's vocabulary size, None if this server does not report it."""
        return self.model_meta().n_vocab

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenIds:
        """Return the ids that the server's own tokenizer makes of `text`."""
        return self._connection.do(calls.tokenize(text, add_special=add_special_tokens))

    async def atokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenIds:
        """Return the ids that the server's own tokenizer makes of `text`."""
        return await self._connection.ado(calls.tokenize(text, add_special=add_special_tokens))

    def detokenize(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`, special tokens included."""
        return self._connection.do(calls.detokenize(tokens))

    async def adetokenize(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`, special tokens included."""
        return await self._connection.ado(calls.detokenize(tokens))

    def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        """Return the ids of `text` from the wrapped tokenizer, or else from the server.

        Errors: InvalidText if `text` is not a str or has a lone surrogate; InvalidScope.
        """
        require_scope(scope)
        if self._tokenizer is None:
            return self.tokenize(text, add_special_tokens=add_special_tokens)
        ids = self._tokenizer.token_ids
        return ids(calls.require_text(text), add_special_tokens=add_special_tokens, scope=scope)

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
        own = {"id_slot": id_slot, "cache_prompt": cache_prompt}
        asked = {**_asked(n_predict, temperature, n_probs), **own, **settings}
        calls.require_settings(asked)
        return self._connection.do(calls.completion(tokens, asked))

    async def acompletion(
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
        """Decode `tokens` in a slot and return the model's answer."""
        own = {"id_slot": id_slot, "cache_prompt": cache_prompt}
        asked = {**_asked(n_predict, temperature, n_probs), **own, **settings}
        calls.require_settings(asked)
        return await self._connection.ado(calls.completion(tokens, asked))

    def save_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Write a slot's state to `filename` in the server's slot folder."""
        return self._connection.do(calls.save_slot(id_slot, filename))

    async def asave_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Write a slot's state to `filename` in the server's slot folder."""
        return await self._connection.ado(calls.save_slot(id_slot, filename))

    def restore_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Read a slot's state back; the slot is empty after a failure."""
        return self._connection.do(calls.restore_slot(id_slot, filename))

    async def arestore_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Read a slot's state back; the slot is empty after a failure."""
        return await self._connection.ado(calls.restore_slot(id_slot, filename))

    def erase_slot(self, id_slot: int) -> None:
        """Empty a slot."""
        self._connection.do(calls.erase_slot(id_slot))

    async def aerase_slot(self, id_slot: int) -> None:
        """Empty a slot."""
        await self._connection.ado(calls.erase_slot(id_slot))

    # -- with reuse ---------------------------------------------------------------------------

    def complete(
        self,
        prompt: Prompt,
        *,
        n_predict: int,
        scope: str | None = None,
        conversation: str | None = None,
        temperature: float = 0.0,
        n_probs: int = 0,
        **settings: Any,
    ) -> Reused:
        """Complete a text or token ids, starting from the best slot or saved file.

        `scope` separates tenants: their prompts share no slot contents or files. `conversation`
        is a name that `pin` accepts.
        """
        asked = {**_asked(n_predict, temperature, n_probs), **settings}
        ids = self._prompt_ids(prompt, scope)
        return self._drive(self._manager.complete(ids, asked, scope, conversation))

    async def acomplete(
        self,
        prompt: Prompt,
        *,
        n_predict: int,
        scope: str | None = None,
        conversation: str | None = None,
        temperature: float = 0.0,
        n_probs: int = 0,
        **settings: Any,
    ) -> Reused:
        """Complete a text or token ids, starting from the best slot or saved file."""
        asked = {**_asked(n_predict, temperature, n_probs), **settings}
        ids = await self._aprompt_ids(prompt, scope)
        return await self._adrive(self._manager.complete(ids, asked, scope, conversation))

    def stream(
        self,
        prompt: Prompt,
        *,
        n_predict: int,
        scope: str | None = None,
        conversation: str | None = None,
        temperature: float = 0.0,
        **settings: Any,
    ) -> Iterator[Piece]:
        """Yield a completion piece by piece; closing the iterator aborts it and frees the slot."""
        asked = {**_asked(n_predict, temperature, 0), **settings}
        ids = self._prompt_ids(prompt, scope)
        manager = self._manager
        job = self._drive(manager.begin(ids, asked, scope, conversation))
        try:
            with contextlib.closing(self._connection.stream(job.call(is_stream=True))) as pieces:
                for piece in pieces:
                    self._note(job, piece)
                    yield piece
        except BaseException as error:
            manager.fail(job, error)
            raise

    async def astream(
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
        asked = {**_asked(n_predict, temperature, 0), **settings}
        ids = await self._aprompt_ids(prompt, scope)
        manager = self._manager
        job = await self._adrive(manager.begin(ids, asked, scope, conversation))
        try:
            async with contextlib.aclosing(
                self._connection.astream(job.call(is_stream=True))
            ) as pieces:
                async for piece in pieces:
                    self._note(job, piece)
                    yield piece
        except BaseException as error:
            manager.fail(job, error)
            raise

    def manage(self, slot_settings: SlotSettings) -> SlotManager:
        """Return another manager for this server; no two managers may share slots."""
        if not isinstance(slot_settings, SlotSettings):
            raise InvalidConfig(f"slot_settings must be SlotSettings, not {slot_settings!r}")
        return SlotManager(self._connection, slot_settings, self._checked_vocabulary)

    def pin(self, conversation: str, *, scope: str | None = None) -> None:
        """Keep a conversation's slot and saved files from being evicted."""
        self._manager.pin(conversation, scope, is_pinned=True)

    def unpin(self, conversation: str, *, scope: str | None = None) -> None:
        """Allow a conversation's slot and saved files to be evicted again."""
        self._manager.pin(conversation, scope, is_pinned=False)

    def clear(self, *, scope: str | None = None) -> None:
        """Clear one tenant's records, pins, saved files and slots; without a scope, everything.

        The server overwrites files that this process can't delete. Running requests go on, and
        nothing of them is kept. Managers that `manage` returned are not cleared.

        Errors: InvalidScope; ServerError if a slot could not be erased: its contents are not
                reused.
        """
        self._drive(self._manager.clear(scope))

    async def aclear(self, *, scope: str | None = None) -> None:
        """Clear one tenant's records, pins, saved files and slots; without a scope, everything."""
        await self._adrive(self._manager.clear(scope))

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until all pending saves are done; ServerTimeout if that takes too long."""
        self._manager.flush(timeout_s)

    def reuse_stats(self) -> ReuseStats:
        """Return the counters of the managed slots."""
        return self._manager.stats()

    def kv_state(self) -> tuple[SlotKv, ...]:
        """Return the size of each slot's KV state; zeros if the server can't be reached."""
        return self._drive(self._reader.state())

    async def akv_state(self) -> tuple[SlotKv, ...]:
        """Return the size of each slot's KV state; zeros if the server can't be reached."""
        return await self._adrive(self._reader.state())

    def kv_report(self) -> tuple[SlotBlocks, ...]:
        """Return the tokens of each slot in blocks; none if the server can't be reached."""
        return self._drive(self._reader.blocks())

    async def akv_report(self) -> tuple[SlotBlocks, ...]:
        """Return the tokens of each slot in blocks; none if the server can't be reached."""
        return await self._adrive(self._reader.blocks())

    # -- inside -------------------------------------------------------------------------------

    def _drive(self, steps: Steps[T]) -> T:
        return drive(steps, self._connection)

    async def _adrive(self, steps: Steps[T]) -> T:
        return await adrive(steps, self._connection)

    def _prompt_ids(self, prompt: Prompt, scope: str | None) -> TokenIds:
        require_scope(scope)
        return self.token_ids(prompt, scope=scope) if isinstance(prompt, str) else _ids(prompt)

    async def _aprompt_ids(self, prompt: Prompt, scope: str | None) -> TokenIds:
        require_scope(scope)
        if not isinstance(prompt, str):
            return _ids(prompt)
        if self._tokenizer is None:
            return await self.atokenize(prompt)
        return await asyncio.to_thread(self.token_ids, prompt, scope=scope)

    def _note(self, job: Job, piece: Piece) -> None:
        if piece.completion is not None:
            self._manager.finish(job, piece.completion)
        else:
            job.received.extend(piece.token_ids)

    def _checked_vocabulary(self) -> Generator[Any, Any, None]:
        if self._tokenizer is not None:
            yield from vocabulary.check(self._tokenizer, self.url)


def kv_report(*servers: LlamaServer) -> tuple[SlotBlocks, ...]:
    """Return the blocks of all slots of several servers."""
    return tuple(slot for server in servers for slot in server.kv_report())


def _asked(n_predict: int, temperature: float, n_probs: int) -> dict[str, Any]:
    return {"n_predict": n_predict, "temperature": temperature, "n_probs": n_probs}


def _ids(prompt: Iterable[int]) -> TokenIds:
    return prompt if isinstance(prompt, TokenIds) else TokenIds(calls.plain(prompt))
