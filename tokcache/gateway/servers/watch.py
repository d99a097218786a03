"""Watches the servers: which are up, what each can do, and starts one that crashed again.

Each server is looked at by a task of its own: one that hangs is down after some seconds, and its
requests fail over. A server that has started is probed before it gets a request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from tokcache.errors import (
    InvalidConfig,
    ServerError,
    ServerRefused,
    ServerTimeout,
    ServerUnreachable,
    TokcacheError,
)
from tokcache.gateway.servers.pinning import pins_messages
from tokcache.llama.server.model import is_same_model
from tokcache.llama.server.results import TokenProbabilities

if TYPE_CHECKING:
    from collections import Counter

    from tokcache.gateway.routing.files import Files
    from tokcache.gateway.routing.router import Router
    from tokcache.gateway.servers.process import ManagedServer
    from tokcache.gateway.servers.upstream import Look, Upstream

_CHECK_S = 1.0  # between checks of a server
_PROBE_S = 120.0  # for the probes of a server that has just started
_HUNG_S = 30.0  # a started server that does not answer for so long is started again
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # before a crashed server is started again
_log = logging.getLogger("tokcache.gateway")


class _Told(Protocol):
    def __call__(self, look: Look, *, can_save: bool) -> None:
        """Take note that a server has come up."""


class ServerWatch:
    """The state of each server, by its URL.

    `looks` are the servers' identities, and `pinning` the servers whose own /v1/messages runs in
    the slot that it is asked for. Until `is_started` a wrong server ends the start of the gateway.

    Threads: not safe; one event loop.
    """

    def __init__(
        self,
        router: Router,
        files: Files,
        upstreams: dict[str, Upstream],
        *,
        managed: ManagedServer | None,
        counts: Counter[str],
        server_is_up: _Told,
    ) -> None:
        self._router, self._files, self._upstreams = router, files, upstreams
        self._managed, self._counts, self._server_is_up = managed, counts, server_is_up
        self.looks: dict[str, Look] = {}
        self.pinning: set[str] = set()
        self.is_started = False
        self._reported_down: set[str] = set()
        self._probabilities: dict[str, TokenProbabilities | None] = {}
        # Servers with another model under a name in use; they are not probed every second.
        self._refused: dict[str, Look] = {}

    async def start(self, managed: ManagedServer) -> str:
        """Start the llama-server in a thread that does not hold up the end of this process."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()

        def tell(url: str, error: BaseException | None) -> None:
            if future.done():  # the gateway was stopped meanwhile
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(url)

        def start() -> None:
            try:
                url, error = managed.start(), None
            except Exception as found:  # noqa: BLE001 (raised where it is awaited)
                url, error = "", found
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, url, error)

        threading.Thread(target=start, daemon=True).start()
        return await future

    async def _look(self, name: str) -> None:
        """Read a server's identity; if it has started since the last look, record that."""
        upstream = self._upstreams[name]
        look = await upstream.look(self.looks.get(name))
        server = self._router.servers[name]
        if self.looks.get(name) == look and server.is_up:
            return
        self.pinning.discard(name)
        # Its slots are empty or not known; no request is sent to it before the probes are done.
        self._router.server_down(name, "server_restarted")
        if self._refused.get(name) == look:
            self._require_one_model(name, look)
        try:
            async with asyncio.timeout(_PROBE_S):
                can_save = await self._probe(name, look)
                self._require_one_model(name, look)
        except TimeoutError:
            raise ServerTimeout(f"{name} did not answer the probes in {_PROBE_S:g} s") from None
        self._reported_down.discard(name)
        self._counts["server_start"] += int(name in self.looks)
        self.looks[name] = look
        self._router.server_up(
            name, model=look.model, pool=look.pool, can_save=can_save, n_slots=look.n_slots
        )
        self._server_is_up(look, can_save=can_save)

    async def _probe(self, name: str, look: Look) -> bool:
        """Try what a server that has started can do; return whether its slots can be saved."""
        upstream = self._upstreams[name]
        # Two versions of llama-server can report one build number, so each start is probed.
        if await pins_messages(upstream, look.n_slots):
            self.pinning.add(name)
        can_save, is_folder_ours = False, False
        if upstream.slot_folder is not None or look.is_text_only:
            probabilities = self._probabilities[name] = await upstream.probe()
            can_save, is_folder_ours = await upstream.probe_saving()
            known = self._files.probes.get(look.pool)
            if known is not None and not is_same_model(_probabilities(known), probabilities):
                self._router.reasons["files_of_another_model"] += 1
                self._files.clear(look.pool)
            if probabilities is not None:
                self._files.probes[look.pool] = {
                    "token_ids": list(probabilities.token_ids),
                    "logprobs": list(probabilities.logprobs),
                }
        if is_folder_ours and upstream.slot_folder is not None:
            self._files.folders[look.pool] = upstream.slot_folder
        return can_save

    def _require_one_model(self, name: str, look: Look) -> None:
        """Raise InvalidConfig if another server has another model under the same name.

        Clients name models by these names, and a conversation may continue on any of the servers.
        """
        for other in self._router.servers.values():
            if other.name == name or not other.is_up or other.model != look.model:
                continue
            ours, theirs = self._probabilities.get(name), self._probabilities.get(other.name)
            is_other = self.looks[other.name].meta != look.meta
            is_known = ours is not None and theirs is not None
            if is_other or (is_known and not is_same_model(ours, theirs)):
                if self._refused.get(name) != look:
                    self._refused[name] = look
                    self._router.reasons["model_name_taken"] += 1
                    self._reported_down.discard(name)  # so that `_down` says why
                raise InvalidConfig(
                    f"{name} and {other.name} have different models under the name"
                    f" {look.model!r}; start one of them with another --alias"
                )

    def failed(self, name: str, error: ServerUnreachable) -> None:
        """Record that a server failed before the first byte, so that another one is asked."""
        self._counts["failover"] += 1
        # A refused connection shows that the server is gone; a broken one does not.
        if isinstance(error, ServerRefused):
            self._down(name, error)

    def _down(self, name: str, error: Exception) -> None:
        if name not in self._reported_down:
            self._reported_down.add(name)
            _log.warning("%s is down: %s", name, error)
        self._router.server_down(name)

    async def check(self, name: str) -> bool:
        """Look at a server; return False if it is down now."""
        upstream, began = self._upstreams[name], asyncio.get_running_loop().time()
        try:
            await self._look(name)
        except ServerTimeout as error:
            if upstream.heard_at >= began and self._router.servers[name].is_up:
                # It sends other answers, so it is only slow.
                self._counts["late_look"] += 1
                return True
            self._down(name, error)
            upstream.break_off()
            return False
        except (ServerError, OSError) as error:
            self._down(name, error)
            return False
        except InvalidConfig as error:
            if not self.is_started:
                raise
            # Another model was started behind this address.
            self._down(name, error)
            return False
        return True

    async def run(self, name: str) -> None:
        """Look at a server again and again; start a managed one that crashed or hangs again."""
        pause_s = _FIRST_PAUSE_S
        answered_at = time.monotonic()
        while True:
            await asyncio.sleep(_CHECK_S)
            if self._managed is not None and not self._managed.is_running():
                self._down(name, ServerRefused("its process ended"))
                self._counts["server_crash"] += 1
                try:
                    await self.start(self._managed)
                    pause_s = _FIRST_PAUSE_S
                except (TokcacheError, OSError) as error:
                    _log.warning("the llama-server did not start again: %s", error)
                    await asyncio.sleep(pause_s)
                    pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
                    continue
            if await self.check(name):
                answered_at = time.monotonic()
            elif self._managed is not None and time.monotonic() - answered_at > _HUNG_S:
                self._counts["server_hung"] += 1
                await asyncio.to_thread(self._managed.stop)
                answered_at = time.monotonic()


def _probabilities(stored: dict[str, list[Any]]) -> TokenProbabilities | None:
    try:
        return TokenProbabilities(tuple(stored["token_ids"]), tuple(stored["logprobs"]))
    except (KeyError, TypeError):
        return None
