"""Sends requests to their slots, saves and restores slots, and keeps the list of files.

1. `open` queues a request until the router assigns a slot. It saves, erases and restores slots as
   the assignment says, and sends the request with `id_slot`.
2. `Turn.events` (turn.py) yields the events of the llama-server's stream, and records the counts of
   tokens in the last one.
3. `Turn.close` releases the slot. If the answer was cut off, it waits in the background until
   llama-server has stopped decoding.

If a server fails before the first byte of its answer, the request gets another slot, up to four
times. servers/watch.py knows which servers are up. A task saves slots in idle time and writes the
list of files.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import platformdirs

from tokcache.errors import (
    ApiError,
    QueueFull,
    ServerError,
    ServerUnreachable,
)
from tokcache.gateway.api.body import read_object
from tokcache.gateway.api.streams import ChatAnswer
from tokcache.gateway.config import UpstreamConfig
from tokcache.gateway.folder import Folder
from tokcache.gateway.routing.chain import EMPTY, Chain, chat_prompt, ids_chain
from tokcache.gateway.routing.files import Files, remove_strangers
from tokcache.gateway.routing.router import Router
from tokcache.gateway.routing.slots import Assignment, Server, Slot, Wish
from tokcache.gateway.servers.process import ManagedServer
from tokcache.gateway.servers.upstream import Look, Upstream
from tokcache.gateway.servers.watch import ServerWatch
from tokcache.gateway.tokens import ProvenTokenizers
from tokcache.gateway.turn import Recent, Turn

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tokcache.gateway.api.streams import Answer
    from tokcache.gateway.config import GatewayConfig
    from tokcache.gateway.routing.chain import Prompt
    from tokcache.llama.server.results import SlotFile

T = TypeVar("T")
_CHAT = "/v1/chat/completions"
_MAX_TRIES = 4  # of one request
_TICK_S = 0.05  # between tries to assign requests that wait, and while shutting down
_IDLE_TICK_S = 0.25
_WRITE_S = 1.0  # between two writes of the list of files
_MAX_SETTLE_S = 120.0
_SETTLE_CHECK_S = 0.05
_N_RECENT = 50
_log = logging.getLogger("tokcache.gateway")


class WarmPrompt(NamedTuple):
    """One file of the warm folder; `link` is the last one of its chain."""

    path: Path
    scope: str | None
    body: dict[str, Any]
    prompt: Prompt
    link: bytes


class Service:
    """The servers, the router, and the requests under way.

    Errors:  ApiError for a request; ServerError, InvalidConfig from `start`.
    Threads: not safe; one event loop.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.broken: tuple[type[BaseException], ...] = (ServerError, OSError)
        # Two gateways of one host have two ports, so by default they have two folders.
        default = platformdirs.user_cache_path("tokcache") / "gateway" / str(config.port)
        self.folder = Folder(Path(config.folder or default))
        self.files = Files(config.max_bytes, config.upstream_folder or self.folder.path)
        self.router = Router(
            self.files,
            max_queue=config.max_queue,
            min_save_tokens=config.min_save_tokens,
            side_tokens=config.side_tokens,
        )
        self.router.erases_between_scopes = bool(config.tenants)
        self.tokens = ProvenTokenizers(self.router.reasons, self.in_background)
        self.upstreams: dict[str, Upstream] = {}
        self.recent: deque[Recent] = deque(maxlen=_N_RECENT)
        self.counts: Counter[str] = Counter()
        self.managed = ManagedServer(config, self.folder.slots) if config.model else None
        self.watch = ServerWatch(
            self.router,
            self.files,
            self.upstreams,
            managed=self.managed,
            counts=self.counts,
            server_is_up=self._server_is_up,
        )
        self.is_draining = False
        self._waiting: dict[Wish, asyncio.Future[Assignment]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.n_turns = 0
        self._is_list_old = False
        self._saving: asyncio.Task[None] | None = None
        self._has_queue = asyncio.Event()
        self._deadline: float | None = None
        self._last_saves: list[asyncio.Task[None]] = []

    @property
    def is_healthy(self) -> bool:
        """Return whether a server is up."""
        return any(server.is_up for server in self.router.servers.values())

    # -- start and stop -----------------------------------------------------------------------

    async def start(self) -> None:
        """Start or reach the servers, and find the files of an earlier run."""
        self.folder.open(f"process {os.getpid()}, port {self.config.port}")
        self.key = self.folder.key
        self.files.owner = self.folder.owner
        warm = self._read_warm(is_told=False)  # `_warm` tells
        self.files.read_list(self.folder.list_path, {each.link for each in warm})
        if self.managed is not None:
            remove_strangers(self.folder.slots, self.files)
        configs = list(self.config.upstreams)
        if self.managed is not None:
            url = await self.watch.start(self.managed)
            folder, model = str(self.folder.slots), self.config.model
            configs = [UpstreamConfig(url=url, slot_folder=folder, tokenizer=model)]
        for config in configs:
            upstream = Upstream(
                config, read_timeout_s=self.config.read_timeout_s, owner=self.files.owner
            )
            self.upstreams[config.url] = upstream
            self.router.servers.setdefault(config.url, Server(config.url))
        # A server that does not answer may come up later; the others serve meanwhile.
        found = await asyncio.gather(*map(self.watch.check, self.upstreams), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException):
                raise error
        if not self.is_healthy and self.managed is not None:
            raise ServerError("the started llama-server does not answer")
        self.watch.is_started = True
        for name in self.upstreams:
            self.in_background(self.watch.run(name))
        self.in_background(self._reconsider())
        self.in_background(self._tick())

    def begin_drain(self) -> None:
        """Refuse new requests, and save each slot as soon as no request needs it."""
        self.is_draining = True
        if self._deadline is None:
            self._deadline = time.monotonic() + self.config.drain_timeout_s
            servers = self.router.servers.values()
            self._last_saves = [self.in_background(self._save_last(each)) for each in servers]

    async def stop(self) -> None:
        """Wait for the requests under way, save the slots, and end the servers.

        Waiting and saving take no longer than `drain_timeout_s`, from `begin_drain` on.
        """
        self.begin_drain()
        left_s = max(0.0, (self._deadline or 0.0) - time.monotonic())
        try:
            async with asyncio.timeout(left_s):
                while self.n_turns or self._waiting:  # noqa: ASYNC110
                    await asyncio.sleep(_TICK_S)
                await asyncio.gather(*self._last_saves, return_exceptions=True)
        except TimeoutError:
            self.counts["drain_timeout"] += 1
            _log.warning(
                "requests or saves took longer than drain_timeout_s = %g s; slots that were not"
                " saved by then are lost",
                self.config.drain_timeout_s,
            )
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self.watch.is_started:  # else the list of an earlier run would be lost
                self._write_list()
            if self.managed is not None:
                await asyncio.to_thread(self.managed.stop)
            self.folder.close()

    async def _save_last(self, server: Server) -> None:
        """Save a server's slots before the end, each when it becomes idle."""
        tried: list[tuple[Slot, Chain]] = []
        while True:
            idle = [
                slot
                for slot in server.slots
                if not slot.is_busy
                and (slot, slot.chain) not in tried
                and self.router.admission.is_savable(slot)
            ]
            if idle and server.is_up:
                tried.append((idle[0], idle[0].chain))
                await self._save_idle(idle[0])
            elif server.is_up and (self._waiting or any(slot.is_busy for slot in server.slots)):
                await asyncio.sleep(_TICK_S)
            else:
                return

    def any_upstream(self, model: str) -> Upstream:
        """Return a server that is up and has the model."""
        for server in self.router.servers.values():
            if server.is_up and model in ("", server.model):
                return self.upstreams[server.name]
        raise ApiError(503, "no llama-server is up; try again", retry_after_s=5)

    def in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine that `stop` ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- one request --------------------------------------------------------------------------

    async def open(
        self, wish: Wish, prompt: Prompt, path: str, body: bytes, answer: Answer
    ) -> Turn:
        """Wait for a slot, bring it to the planned state, and send the request."""
        if self.is_draining:
            raise ApiError(503, "the gateway is shutting down; try again", retry_after_s=5)
        for _ in range(_MAX_TRIES):
            made = await self._slot_for(wish)
            turn = Turn(self, made, prompt, answer, path)
            try:
                await self._prepare(made, body if path == _CHAT else None)
                self._require_pinned(path, made)
                turn.plan, turn.n_promised = made.source, made.n_promised
                await turn.send(path, body)
            except ServerUnreachable as error:
                # Before the first byte, another slot or server can take the request.
                self.watch.failed(made.slot.server.name, error)
                turn.close(is_charged=False)
            except ServerError as error:
                turn.close(is_charged=False)
                raise ApiError(502, "the llama-server failed before it answered") from error
            except ApiError:
                turn.rejected()
                raise
            except BaseException:
                turn.close()
                raise
            else:
                return turn
        raise ApiError(503, "no llama-server could take the request; try again", retry_after_s=5)

    def _require_pinned(self, path: str, made: Assignment) -> None:
        """Refuse /v1/messages if its server no longer obeys `id_slot`.

        The request could run in another tenant's slot.
        """
        if path == "/v1/messages" and made.slot.server.name not in self.watch.pinning:
            raise ApiError(503, "the llama-servers have changed; try again", retry_after_s=1)

    async def _slot_for(self, wish: Wish) -> Assignment:
        try:
            self.router.enqueue(wish)
        except QueueFull as full:
            raise ApiError(
                429,
                f"{self.config.max_queue} requests are waiting already; try again later",
                code="queue_full",
                retry_after_s=full.retry_after_s,
            ) from None
        future = asyncio.get_running_loop().create_future()
        self._waiting[wish] = future
        self.assign()
        if self.router.queue:
            self._has_queue.set()
        is_taken = False
        try:
            async with asyncio.timeout(self.config.queue_timeout_s):
                made: Assignment = await future
            is_taken = True
        except TimeoutError:
            self.router.reasons["queue_timeout"] += 1
            raise ApiError(
                429 if self.is_healthy else 503,
                f"no slot became free within {self.config.queue_timeout_s:g} s; try again later",
                code="queue_timeout",
                retry_after_s=5,
            ) from None
        finally:
            del self._waiting[wish]
            self.router.cancel(wish)
            if not is_taken and future.done() and not future.cancelled():
                # A slot was assigned just when the client left, or when the time was over.
                self._give_back(future.result())
        return made

    def _give_back(self, made: Assignment) -> None:
        self.router.read_done(made)
        self.release(made.slot)

    def assign(self) -> None:
        """Give waiting requests to idle slots."""
        for made in self.router.assign(time.monotonic()):
            future = self._waiting.get(made.wish)
            if future is None or future.done():
                self._give_back(made)
            else:
                future.set_result(made)

    def release(self, slot: Slot) -> None:
        """Make a slot idle and give it to the next request."""
        self.router.release(slot, time.monotonic())
        self.assign()

    async def _prepare(self, made: Assignment, chat: bytes | None) -> None:
        upstream = self.upstreams[made.slot.server.name]
        try:
            for slot in made.save:
                await self._save(slot)
            if made.copied is not None:
                made.file = made.copied.saved
                if made.file is not None:
                    made.file.n_readers += 1
                # The slot is saved now, so its own conversation may use it again.
                copied_slot, made.copied = made.copied, None
                self.release(copied_slot)
            if made.is_erased:
                await upstream.erase(made.slot.id)
                made.slot.emptied()
                self.router.counts["erase"] += 1
            if made.source == "file":
                await self._restore(made, upstream, chat)
            made.is_sent = True
        finally:
            self.router.read_done(made)

    async def _restore(self, made: Assignment, upstream: Upstream, chat: bytes | None) -> None:
        file = made.file
        if file is None or file not in self.files or not self.files.is_intact(file):
            # llama-server can crash when it reads a truncated file.
            if file is not None:
                self.files.drop(file, "file_gone")
            self.router.not_restored(made, "file_gone")
            return
        if chat is not None and file.ids:
            # A template can render equal messages in another way, such as by their number.
            ids = await self._ids(upstream, chat, made.wish.scope)
            n_shared = file.ids.stop_at(file.ids.n_common(ids))
            if ids and n_shared < self.router.least_to_restore(made):
                self.router.not_worth_restoring(made, "different_ids")
                return
        try:
            await upstream.restore(made.slot.id, file.name)
        except ServerUnreachable:
            raise
        except ServerError as error:
            _log.warning("slot %d could not be restored: %s", made.slot.id, type(error).__name__)
            self.files.drop(file, "restore_failed")
            self._is_list_old = True
            self.router.not_restored(made, "restore_failed")
            return
        self.router.restored(made, file)

    async def _save(self, slot: Slot) -> None:
        server = slot.server
        name = self.files.new_name(server.pool)
        upstream = self.upstreams[server.name]

        async def timed() -> tuple[SlotFile, float]:
            began = time.monotonic()
            return await upstream.save(slot.id, name), time.monotonic() - began

        saving = self.in_background(timed())
        try:
            (saved, seconds), ids = await asyncio.gather(
                asyncio.shield(saving),
                self._ids(
                    upstream, slot.chat_body, slot.scope, n_tokens=slot.n_prompt, known=slot.ids
                ),
            )
        except asyncio.CancelledError:
            # The client left, but the server still writes the file. Its name is used again once
            # that is done, so that no other server of the pool writes it at the same time.
            saving.add_done_callback(lambda _: self.files.note_stale(server.pool, name))
            raise
        except ServerUnreachable:
            self.router.not_saved(slot)
            self.files.discard(server.pool, name)
            raise
        except ServerError as error:
            self.router.not_saved(slot)
            _log.warning("slot %d could not be saved: %s", slot.id, type(error).__name__)
            self.files.discard(server.pool, name)
            return
        self._is_list_old = True
        if abs(saved.n_tokens - slot.n_tokens) > slot.n_tokens // 2:
            # Somebody else uses the server: the slot holds other tokens than we recorded.
            self.router.reasons["slot_changed_by_others"] += 1
            self.files.discard(server.pool, name)
            self.router.lose(slot, "slot_changed_by_others")
            return
        self.router.admission.saved(
            slot, name, saved.n_tokens, saved.n_bytes, seconds=seconds, ids=ids
        )

    def keeps_chat_body(self, slot: Slot) -> bool:
        """Return whether the body of a chat is kept until its slot is saved.

        It is only where the ids of the file can be found, because bodies can be large.
        """
        server = slot.server
        look = self.watch.looks.get(server.name)
        if look is None or not server.can_save:
            return False
        return self.tokens.may_know_ids(self.upstreams[server.name], look)

    async def _ids(
        self,
        upstream: Upstream,
        chat: bytes | None,
        scope: str | None,
        *,
        n_tokens: int | None = None,
        known: Chain = EMPTY,
    ) -> Chain:
        """Return the chain of a prompt's ids, the empty one if they are not known.

        `n_tokens` is the server's own count: if the ids are not as many, they are not used.
        """
        if known:
            return known
        look = self.watch.looks.get(upstream.url)
        if chat is None or look is None:
            return EMPTY
        ids = await self.tokens.prompt_ids(upstream, look, chat, scope)
        if ids is None:
            return EMPTY
        if n_tokens not in (None, len(ids)):
            self.router.reasons["prompt_ids_unknown"] += 1
            return EMPTY
        return ids_chain(ids, self.key, scope)

    async def _save_idle(self, slot: Slot) -> None:
        """Save an idle slot now, so that no later request waits for it."""
        self.router.begin_save(slot)
        try:
            await self._save(slot)
            self.counts["idle_save"] += 1
        except ServerUnreachable:
            self.counts["idle_save_failed"] += 1
        finally:
            self.release(slot)
            self._saving = None

    async def wait_until_idle(self, slot: Slot) -> int | None:
        """Wait until a server noticed that a slot's request is over, at most 120 s.

        Returns the number of tokens that the slot holds, None if it is not known.
        """
        deadline = time.monotonic() + _MAX_SETTLE_S
        upstream = self.upstreams[slot.server.name]
        while slot.server.is_up and time.monotonic() < deadline:
            try:
                listed = await upstream.slot(slot.id)
            except ServerError:
                self.counts["settle_failed"] += 1
                self.router.lose(slot, "server_away")
                return None
            if listed is None or not listed.is_processing:
                return listed.n_tokens if listed is not None else None
            await asyncio.sleep(_SETTLE_CHECK_S)
        return None

    # -- the warm folder ----------------------------------------------------------------------

    def _server_is_up(self, look: Look, *, can_save: bool) -> None:
        """Assign waiting requests to a server that has come up, and warm its slots."""
        self._is_list_old = True
        self.assign()
        if can_save and self.config.warm_folder:
            self.in_background(self._warm(look.pool))

    def _read_warm(self, *, is_told: bool) -> list[WarmPrompt]:
        """Return the prompts of the warm folder; count and log those that can't be read if told.

        Each file holds the body of one chat completion: NAME.json, or with tenants SCOPE/NAME.json.
        """
        if not self.config.warm_folder:
            return []
        read = []
        pattern = "*/*.json" if self.config.tenants else "*.json"
        for path in sorted(Path(self.config.warm_folder).glob(pattern)):
            scope = path.parent.name if self.config.tenants else None
            try:
                body = {**read_object(path.read_bytes()), "max_tokens": 1, "stream": True}
                prompt = chat_prompt(body, self.key, scope)
                read.append(WarmPrompt(path, scope, body, prompt, prompt.chain().links[-1]))
            except (ApiError, OSError, RecursionError) as error:
                self.counts["warm_failed"] += is_told
                if is_told:
                    _log.warning("%s could not be warmed: %s", path, error)
        return read

    async def _warm(self, pool: str) -> None:
        """Decode and save the prompts of the warm folder that no file holds, and pin their files.

        Files of prompts that are not in the folder any more lose their pin.
        """
        prompts = self._read_warm(is_told=True)
        self.files.pin_only({each.link for each in prompts})
        self._is_list_old = True
        for path, scope, body, prompt, _ in prompts:
            try:
                held = self.files.covers(pool, prompt.chain())
                if held is not None:
                    held.is_pinned = True
                    continue
                wish = Wish(prompt.chain(), scope, "", time.monotonic())
                turn = await self.open(wish, prompt, _CHAT, json.dumps(body).encode(), ChatAnswer())
                try:
                    async for _ in turn.events():
                        pass
                    await self._save(turn.made.slot)
                finally:
                    turn.close()
                saved = turn.made.slot.saved
                self.counts["warmed" if saved is not None else "warm_failed"] += 1
                if saved is None:
                    _log.warning("%s was not saved; is max_bytes too small?", path)
                else:
                    saved.is_pinned = True
            except (ApiError, ServerError, OSError) as error:
                self.counts["warm_failed"] += 1
                _log.warning("%s could not be warmed: %s", path, error)

    # -- tasks that run all the time ----------------------------------------------------------

    async def _reconsider(self) -> None:
        """Try again and again to assign queued requests: they wait for a prefix only so long."""
        while True:
            await self._has_queue.wait()
            await asyncio.sleep(_TICK_S)
            self.assign()
            if not self.router.queue:
                self._has_queue.clear()

    async def _tick(self) -> None:
        """Save slots while their servers are idle, and write the list of files."""
        n_ticks = 0
        while True:
            await asyncio.sleep(_IDLE_TICK_S)
            n_ticks += 1
            # `stop` saves the slots itself.
            is_allowed = self._saving is None and not self.is_draining
            slot = self.router.next_to_save(time.monotonic()) if is_allowed else None
            if slot is not None:
                self._saving = self.in_background(self._save_idle(slot))
            if self._is_list_old and n_ticks * _IDLE_TICK_S >= _WRITE_S:
                n_ticks = 0
                self._write_list()

    def _write_list(self) -> None:
        self._is_list_old = False
        try:
            self.files.write_list(self.folder.list_path)
        except OSError as error:
            self.counts["list_not_written"] += 1
            _log.warning("the list of files could not be written: %s", error)
