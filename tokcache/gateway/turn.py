"""One request in its slot: sends it, reads its stream, records its counts, releases the slot."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tokcache.errors import ApiError
from tokcache.gateway.api.body import event_object, with_settings
from tokcache.gateway.servers.upstream import Lines

if TYPE_CHECKING:
    from collections import Counter, deque
    from collections.abc import Coroutine

    from tokcache.gateway.api.streams import Answer
    from tokcache.gateway.routing.chain import Prompt
    from tokcache.gateway.routing.router import Router
    from tokcache.gateway.routing.slots import Assignment, Slot
    from tokcache.gateway.servers.exchange import Exchange
    from tokcache.gateway.servers.upstream import Upstream

_OK = 200
Event: TypeAlias = tuple[str, bytes, dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Recent:
    """One answered request in numbers, for the page."""

    at: float
    api: str
    plan: str
    n_prompt: int
    n_cached: int
    n_predicted: int
    first_s: float
    reason: str
    detail: str


class Host(Protocol):
    """The part of the service that a request uses."""

    upstreams: dict[str, Upstream]
    router: Router
    recent: deque[Recent]
    counts: Counter[str]
    broken: tuple[type[BaseException], ...]
    n_turns: int

    def in_background(self, work: Coroutine[Any, Any, None]) -> object:
        """Run a coroutine that the service ends when it stops."""

    async def wait_until_idle(self, slot: Slot) -> None:
        """Wait until a server has noticed that the request in a slot is over."""

    def release(self, slot: Slot) -> None:
        """Make a slot idle and give it to the next request."""

    def keeps_chat_body(self, slot: Slot) -> bool:
        """Return whether the body of a chat is kept until its slot is saved."""


class Turn:
    """A request and the slot that it was assigned; whoever opens it closes it."""

    def __init__(
        self, service: Host, made: Assignment, prompt: Prompt, answer: Answer, api: str
    ) -> None:
        self.made = made
        self.answer = answer
        self.n_tokens = 0
        # The upstream said that nothing follows; its connection may end later.
        self.is_done = False
        self.plan, self.n_promised = made.source, made.n_promised
        self._service = service
        self._prompt = prompt
        self._api = api
        self._exchange: Exchange | None = None
        self._chat_body: bytes | None = None
        self._has_begun = False
        self._is_finished = False
        self._is_closed = False
        self._first_s = 0.0
        service.n_turns += 1

    async def send(self, path: str, body: bytes) -> None:
        """Send the request; raise ApiError if the upstream rejects it.

        Errors: ServerUnreachable before the first byte of an answer.
        """
        upstream = self._service.upstreams[self.made.slot.server.name]
        body = with_settings(body, {"id_slot": self.made.slot.id, "cache_prompt": True})
        self._chat_body = body if path == "/v1/chat/completions" else None
        self._exchange = await upstream.stream(path, body)
        if self._exchange.status != _OK:
            raise await upstream.rejection(self._exchange)

    async def events(self) -> AsyncIterator[list[Event]]:
        """Yield the events that arrived together: name, data and object; `[DONE]` has no object.

        Errors: ApiError if the upstream breaks off, reports an error or sends no JSON.
        """
        lines = Lines()
        try:
            while not self.is_done and (chunk := await self._read()):
                if found := [self._event(name, data) for name, data in lines.feed(chunk)]:
                    yield found
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ApiError(502, "the llama-server sent an event of another form") from error
        except self._service.broken as error:
            raise ApiError(502, "the llama-server broke off in the middle of the answer") from error
        if not self._is_finished:
            raise ApiError(502, "the llama-server ended its answer without the counts at its end")

    async def _read(self) -> bytes:
        return await self._exchange.read() if self._exchange is not None else b""

    def _event(self, name: str, data: bytes) -> Event:
        """Record an event and return it, with the outcome added where the counts are."""
        if data == b"[DONE]":
            self.is_done = self._is_finished
            return name, data, None
        found = event_object(data)
        self.answer.feed({"error": found} if name == "error" else found)
        if not self._has_begun and "prompt_progress" not in found:
            self._has_begun = True
            now = time.monotonic()
            self._first_s = now - self.made.wish.arrived
            self._service.router.begun(self.made.slot, now)
        if self.answer.counts is not None and not self._is_finished:
            self._finish()
        if self._is_finished and ("timings" in found or "usage" in found):
            found["tokcache"] = self.happened()
            data = json.dumps(found).encode()
        return name, data, found

    @property
    def is_responses(self) -> bool:
        """Return whether the client called the Responses API, whose errors have another form."""
        return self._api == "/v1/responses"

    def happened(self) -> dict[str, Any]:
        """Return the plan, the tokens that were really cached, and the reason for any shortfall."""
        counts = self.answer.counts
        return {
            "plan": self.plan,
            "planned_tokens": self.n_promised,
            "cached_tokens": counts.n_cached if counts else 0,
            "prompt_tokens": counts.n_prompt if counts else 0,
            "reason": self.made.reason or "",
            "detail": self.made.detail,
        }

    def _finish(self) -> None:
        counts, router = self.answer.counts, self._service.router
        if counts is None:
            return
        self._is_finished = True
        self.n_tokens = counts.n_prompt + counts.n_predicted
        router.measured(self.made.slot.server, counts.n_prompt - counts.n_cached, counts.prompt_s)
        router.finish(
            self.made,
            self._prompt.chain(self.answer.element()),
            n_prompt=counts.n_prompt,
            n_cached=counts.n_cached,
            n_tokens=self.n_tokens,
        )
        if self._service.keeps_chat_body(self.made.slot):
            self.made.slot.chat_body = self._chat_body
        self._service.recent.append(
            Recent(
                time.time(),
                self._api,
                self.plan,
                counts.n_prompt,
                counts.n_cached,
                counts.n_predicted,
                self._first_s,
                self.made.reason or "",
                self.made.detail,
            )
        )

    def close(self) -> None:
        """Release the slot, at once or when the upstream has noticed that a client left.

        It does not wait: it also runs when the task of a client that left is cancelled.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._disconnect()
        if self._is_finished:
            self._released()
            return
        self._service.router.abort(self.made, has_begun=self._has_begun)
        self._service.in_background(self._settle())

    def rejected(self) -> None:
        """Release the slot of a request that the upstream rejected."""
        self._is_closed = True
        self._disconnect()
        self._service.router.reject(self.made)
        self._service.in_background(self._settle())

    def _disconnect(self) -> None:
        if self._exchange is not None:
            self._exchange.close()

    async def _settle(self) -> None:
        try:
            await self._service.wait_until_idle(self.made.slot)
        finally:
            self._released()

    def _released(self) -> None:
        self._service.n_turns -= 1
        self._service.release(self.made.slot)
