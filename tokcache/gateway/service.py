"""Sends requests to their slots, watches the servers, and keeps the list of files.

1. `open` queues a request until the router assigns a slot. It saves, erases and restores slots as
   the assignment says, and sends the request with `id_slot`.
2. `Turn.events` (turn.py) yields the events of the llama-server's stream, and records the counts of
   tokens in the last one.
3. `Turn.close` releases the slot. If the answer was cut off, it waits in the background until
   llama-server has stopped decoding.

If a server fails before the first byte of its answer, the request gets another slot, up to four
times. A task checks the servers, starts a crashed one again and writes the list of files.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import Counter, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import platformdirs

from tokcache._files import atomic_file
from tokcache.errors import (
    ApiError,
    InvalidConfig,
    QueueFull,
    ServerError,
    ServerRefused,
    ServerUnreachable,
)
from tokcache.gateway.api.body import read_object
from tokcache.gateway.api.streams import ChatAnswer
from tokcache.gateway.config import UpstreamConfig
from tokcache.gateway.routing.chain import EMPTY, Chain, chat_prompt, ids_chain
from tokcache.gateway.routing.files import Files, remove_strangers
from tokcache.gateway.routing.router import Router
from tokcache.gateway.routing.slots import Assignment, Server, Slot, Wish
from tokcache.gateway.servers.pinning import pins_messages
from tokcache.gateway.servers.process import ManagedServer
from tokcache.gateway.servers.upstream import Look, Upstream
from tokcache.gateway.tokens import ProvenTokenizers
from tokcache.gateway.turn import Recent, Turn
from tokcache.llama.server.model import is_same_model
from tokcache.llama.server.results import TokenProbabilities

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
_CHECK_S = 1.0  # between checks of a server
_MAX_SETTLE_S = 120.0
_SETTLE_CHECK_S = 0.05
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # before a crashed server is started again
_N_RECENT = 50
_KEY_BYTES = 32
_log = logging.getLogger("tokcache.gateway")


class Service:
    """The servers, the router, and the requests under way.

    Errors:  ApiError for a request; ServerError, InvalidConfig from `start`.
    Threads: not safe; one event loop.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.broken: tuple[type[BaseException], ...] = (ServerError, OSError)
        self.folder = Path(config.folder or platformdirs.user_cache_path("tokcache") / "gateway")
        self.files = Files(int(config.max_bytes))
        self.router = Router(
            self.files,
            max_queue=config.max_queue,
            min_save_tokens=config.min_save_tokens,
            side_tokens=config.side_tokens,
        )
        self.router.erases_between_scopes = bool(config.tenants)
        self.tokens = ProvenTokenizers(self.router.reasons, self.in_background)
        self.upstreams: dict[str, Upstream] = {}
        self.looks: dict[str, Look] = {}
        # The servers whose own /v1/messages runs in the slot that it is asked for.
        self.pinning: set[str] = set()
        self.recent: deque[Recent] = deque(maxlen=_N_RECENT)
        self.counts: Counter[str] = Counter()
        self.managed = ManagedServer(config, self.folder / "slots") if config.model else None
        self.key = b""
        self.is_draining = False
        self._waiting: dict[Wish, asyncio.Future[Assignment]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.n_turns = 0
        self._is_list_old = False
        self._reported_down: set[str] = set()
        self._saving: asyncio.Task[None] | None = None
        self._has_queue = asyncio.Event()

    @property
    def is_healthy(self) -> bool:
        """Return whether a server is up."""
        return any(server.is_up for server in self.router.servers.values())

    # -- start and stop -----------------------------------------------------------------------

    async def start(self) -> None:
        """Start or reach the servers, and find the files of an earlier run."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.key = self._read_key()
        self.files.read_list(self.folder / "files.json")
        if self.managed is not None:
            remove_strangers(self.folder / "slots", self.files)
        configs = list(self.config.upstreams)
        if self.managed is not None:
            url = await asyncio.to_thread(self.managed.start)
            folder, model = str(self.folder / "slots"), self.config.model
            configs = [UpstreamConfig(url=url, slot_folder=folder, tokenizer=model)]
        for config in configs:
            upstream = Upstream(config, read_timeout_s=self.config.read_timeout_s)
            self.upstreams[config.url] = upstream
            self.router.servers.setdefault(config.url, Server(config.url))
            try:
                await self._look(config.url)
            except ServerError as error:
                # Others may serve meanwhile, and it may come up later.
                self._down(config.url, error)
        if not self.is_healthy and self.managed is not None:
            raise ServerError("the started llama-server does not answer")
        self.in_background(self._watch())
        self.in_background(self._reconsider())
        self.in_background(self._tick())

    async def stop(self) -> None:
        """Wait for the requests under way, save the slots, and end the servers."""
        self.is_draining = True
        deadline = time.monotonic() + self.config.drain_timeout_s
        while (self.n_turns or self._waiting) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_TICK_S)
        if self._saving is not None:
            left_s = max(0.0, deadline - time.monotonic())
            await asyncio.wait((self._saving,), timeout=left_s)
        for slot in self.router.idle():
            if time.monotonic() < deadline and self.router.admission.is_savable(slot):
                await self._save_idle(slot)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._write_list()
        if self.managed is not None:
            await asyncio.to_thread(self.managed.stop)

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

    def _read_key(self) -> bytes:
        path = self.folder / "key"
        if not path.exists():
            with atomic_file(path) as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise InvalidConfig(f"{path} is damaged; delete it and {self.folder / 'files.json'}")
        return key

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
                self.counts["failover"] += 1
                # A refused connection shows that the server is gone; a broken one does not.
                if isinstance(error, ServerRefused):
                    self._down(made.slot.server.name, error)
                turn.close()
            except ServerError as error:
                turn.close()
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
        if path == "/v1/messages" and made.slot.server.name not in self.pinning:
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
                self._ids_of(slot),
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

    async def _ids_of(self, slot: Slot) -> Chain:
        """Return the chain of the ids of a slot's prompt, the empty one if they are not known."""
        if slot.ids:
            return slot.ids
        upstream = self.upstreams[slot.server.name]
        return await self._ids(upstream, slot.chat_body, slot.scope, slot.n_prompt)

    def keeps_chat_body(self, slot: Slot) -> bool:
        """Return whether the body of a chat is kept until its slot is saved.

        It is only where the ids of the file can be found, because bodies can be large.
        """
        server = slot.server
        look = self.looks.get(server.name)
        if look is None or not server.can_save:
            return False
        return self.tokens.may_know_ids(self.upstreams[server.name], look)

    async def _ids(
        self, upstream: Upstream, chat: bytes | None, scope: str | None, n_tokens: int | None = None
    ) -> Chain:
        """Return the chain of a prompt's ids, the empty one if they are not known.

        `n_tokens` is the server's own count: if the ids are not as many, they are not used.
        """
        look = self.looks.get(upstream.url)
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

    async def wait_until_idle(self, slot: Slot) -> None:
        """Wait until a server has noticed that the request in a slot is over, at most 120 s."""
        deadline = time.monotonic() + _MAX_SETTLE_S
        upstream = self.upstreams[slot.server.name]
        while slot.server.is_up and time.monotonic() < deadline:
            try:
                if not await upstream.is_processing(slot.id):
                    return
            except ServerError:
                self.counts["settle_failed"] += 1
                self.router.lose(slot, "server_away")
                return
            await asyncio.sleep(_SETTLE_CHECK_S)

    # -- the servers --------------------------------------------------------------------------

    async def _look(self, name: str) -> None:
        """Read a server's identity; if it has started since the last look, record that."""
        upstream = self.upstreams[name]
        look = await upstream.look(self.looks.get(name))
        server = self.router.servers[name]
        if self.looks.get(name) == look and server.is_up:
            return
        self.pinning.discard(name)
        # Two versions of llama-server can report one build number, so each start is probed.
        if await pins_messages(upstream, look.n_slots):
            self.pinning.add(name)
        can_save, is_folder_ours = False, False
        if upstream.slot_folder is not None or look.is_text_only:
            probabilities = await upstream.probe()
            can_save, is_folder_ours = await upstream.probe_saving()
            known = self.files.probes.get(look.pool)
            if known is not None and not is_same_model(_probabilities(known), probabilities):
                self.router.reasons["files_of_another_model"] += 1
                self.files.clear(look.pool)
            if probabilities is not None:
                self.files.probes[look.pool] = {
                    "token_ids": list(probabilities.token_ids),
                    "logprobs": list(probabilities.logprobs),
                }
            self._is_list_old = True
        if is_folder_ours and upstream.slot_folder is not None:
            self.files.folders[look.pool] = upstream.slot_folder
        self._reported_down.discard(name)
        self.counts["server_start"] += int(name in self.looks)
        self.looks[name] = look
        self.router.server_up(
            name, model=look.model, pool=look.pool, can_save=can_save, n_slots=look.n_slots
        )
        self.assign()
        if can_save and self.config.warm_folder:
            self.in_background(self._warm(Path(self.config.warm_folder), look.pool))

    async def _warm(self, folder: Path, pool: str) -> None:
        """Decode and save the prompts of the warm folder that no file holds.

        Each file holds the body of one chat completion: NAME.json, or with tenants SCOPE/NAME.json.
        """
        pattern = "*/*.json" if self.config.tenants else "*.json"
        for path in await asyncio.to_thread(lambda: sorted(folder.glob(pattern))):
            scope = path.parent.name if self.config.tenants else None
            try:
                body = {**read_object(path.read_bytes()), "max_tokens": 1, "stream": True}
                prompt = chat_prompt(body, self.key, scope)
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
                if turn.made.slot.saved is not None:
                    turn.made.slot.saved.is_pinned = True
                self.counts["warmed"] += 1
            except (ApiError, ServerError, OSError) as error:
                self.counts["warm_failed"] += 1
                _log.warning("%s could not be warmed: %s", path, error)

    def _down(self, name: str, error: Exception) -> None:
        if name not in self._reported_down:
            self._reported_down.add(name)
            _log.warning("%s is down: %s", name, error)
        self.router.server_down(name)

    async def _watch(self) -> None:
        """Look at every server, and start a crashed one again."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(_CHECK_S)
            if self.managed is not None and not self.managed.is_running():
                name = self.managed.url
                self._down(name, ServerRefused("its process ended"))
                self.counts["server_crash"] += 1
                try:
                    await asyncio.to_thread(self.managed.start)
                    pause_s = _FIRST_PAUSE_S
                except (ServerError, OSError) as error:
                    _log.warning("the llama-server did not start again: %s", error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
                    continue
            for name in self.upstreams:
                try:
                    await self._look(name)
                except (ServerError, OSError) as error:
                    self._down(name, error)

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
            if self._is_list_old and n_ticks * _IDLE_TICK_S >= _CHECK_S:
                n_ticks = 0
                self._write_list()

    def _write_list(self) -> None:
        self._is_list_old = False
        try:
            self.files.write_list(self.folder / "files.json")
        except OSError as error:
            self.counts["list_not_written"] += 1
            _log.warning("the list of files could not be written: %s", error)


def _probabilities(stored: dict[str, list[Any]]) -> TokenProbabilities | None:
    try:
        return TokenProbabilities(tuple(stored["token_ids"]), tuple(stored["logprobs"]))
    except (KeyError, TypeError):
        return None
