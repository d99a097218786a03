"""The HTTP endpoints of the gateway."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from tokcache.errors import ApiError, ServerError, ServerUnreachable
from tokcache.gateway.api import messages, rules
from tokcache.gateway.api.body import (
    is_streaming,
    read_object,
    require_no_fetches,
    require_one_answer,
    with_settings,
)
from tokcache.gateway.api.errors import error_body
from tokcache.gateway.api.streams import Answer, ChatAnswer, ResponsesAnswer, TextAnswer
from tokcache.gateway.metrics import exposition, status
from tokcache.gateway.page import PAGE
from tokcache.gateway.routing.chain import Prompt, chat_prompt, responses_prompt, text_prompt
from tokcache.gateway.routing.slots import Wish
from tokcache.gateway.tenants import Tenant, Tenants

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from tokcache.gateway.servers.upstream import Look, Upstream
    from tokcache.gateway.service import Service
    from tokcache.gateway.turn import Turn

_CHAT, _TEXT, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_MESSAGES = "/v1/messages"
_ID_BYTES = 12
_MAX_TRIES = 4  # of a request that needs no slot
_WITH_UNREAD_BODY = {408, 413}
_NO_STORE = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_PAGE_HEADERS = {
    **_NO_STORE,
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
}
_log = logging.getLogger("tokcache.gateway")
T = TypeVar("T")
Handler = Callable[[Request], Awaitable["Response"]]


class AsciiJson(JSONResponse):
    """JSON in ASCII: an upstream's text may have lone surrogates, which UTF-8 can't hold."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of the answer."""
        return json.dumps(content, separators=(",", ":")).encode("ascii")


@dataclass(frozen=True, slots=True)
class _Api:
    """How one API names its prompt and puts its answers together."""

    path: str
    prompt: Callable[[Mapping[str, Any], bytes, str | None], Prompt]
    answer: Callable[[], Answer]


_APIS = {
    _CHAT: _Api(_CHAT, chat_prompt, ChatAnswer),
    _TEXT: _Api(_TEXT, text_prompt, TextAnswer),
    _RESPONSES: _Api(_RESPONSES, responses_prompt, ResponsesAnswer),
}


def make_app(service: Service) -> Starlette:
    """Return the ASGI application of a service."""
    endpoints = Endpoints(service)
    config = service.config
    routes = [
        Route(path, endpoints.wrapped(endpoints.generate), methods=["POST"]) for path in _APIS
    ]
    for path, handler, method in (
        (_MESSAGES, endpoints.message, "POST"),
        (f"{_MESSAGES}/count_tokens", endpoints.count_tokens, "POST"),
        ("/v1/embeddings", endpoints.embeddings, "POST"),
        ("/tokenize", endpoints.tokenize, "POST"),
        ("/detokenize", endpoints.passed, "POST"),
        ("/v1/models", endpoints.models, "GET"),
        ("/health", endpoints.health, "GET"),
        ("/metrics", endpoints.metrics, "GET"),
        ("/status.json", endpoints.status, "GET"),
        ("/", endpoints.page, "GET"),
    ):
        routes.append(Route(path, endpoints.wrapped(handler), methods=[method]))
    middleware = []
    if config.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.allowed_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=[
                    "x-tokcache-plan",
                    "x-tokcache-planned-tokens",
                    "x-tokcache-reason",
                    "x-tokcache-rules",
                    "retry-after",
                ],
            )
        )
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={404: endpoints.no_such_path, 405: endpoints.no_such_path},
    )
    # A redirect would name the host of the request, which is not checked before it.
    app.router.redirect_slashes = False
    return app


class Endpoints:
    """The handlers of all paths.

    Threads: not safe; one event loop.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._config = service.config
        self._tenants = Tenants(service.config.tenants)
        hosts = {"localhost", "127.0.0.1", "[::1]", self._config.host, *self._config.allowed_hosts}
        is_loopback = self._config.host in ("127.0.0.1", "localhost", "::1")
        hosts = {host.lower() for host in hosts}
        # A web page can make a browser send requests here under another name (DNS rebinding).
        self._hosts = hosts if is_loopback or self._config.allowed_hosts else None

    # -- shared by all handlers ---------------------------------------------------------------

    def wrapped(self, handler: Handler) -> Handler:
        """Return a handler that refuses foreign pages and answers errors in the API's form."""

        async def handle(request: Request) -> Response:
            try:
                self._require_own_page(request)
                return await handler(request)
            except ApiError as error:
                return self._failed(request, error)
            except ClientDisconnect:
                return PlainTextResponse("", status_code=400)
            except ServerError as error:
                _log.warning("%s: %s", request.url.path, type(error).__name__)
                failed = ApiError(502, "the llama-server could not be asked; try again")
                return self._failed(request, failed)

        return handle

    def _require_own_page(self, request: Request) -> None:
        if request.url.path == "/health":  # some checkers send no Host; there is nothing to read
            return
        host = request.headers.get("host", "").rpartition(":")
        name = host[0] if host[0] and host[2].isdigit() else "".join(host)
        if self._hosts is not None and name.lower() not in self._hosts:
            raise ApiError(403, "this host name is not served; add it to allowed_hosts")
        origin = request.headers.get("origin")
        is_own = origin in (None, f"{request.url.scheme}://{request.headers.get('host')}")
        if not is_own and not {origin, "*"} & set(self._config.allowed_origins):
            raise ApiError(
                403, "pages of this origin may not use the gateway; add it to allowed_origins"
            )

    def _failed(self, request: Request, error: ApiError) -> Response:
        self._service.counts[f"error_{error.status}"] += 1
        headers = dict(_NO_STORE)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if error.status in _WITH_UNREAD_BODY:
            headers["connection"] = "close"
        body = error_body(error, is_anthropic=request.url.path.startswith(_MESSAGES))
        return AsciiJson(body, status_code=error.status, headers=headers)

    async def no_such_path(self, request: Request, _: Exception) -> Response:
        """Answer a path or method that is not served."""
        return self._failed(request, ApiError(404, "the gateway does not serve this path"))

    async def _body(self, request: Request) -> bytes:
        """Return the body; refuse one that is too large or comes too slowly."""
        limit = int(self._config.max_body_bytes)
        too_large = f"the body is larger than {limit:,} bytes"
        declared = request.headers.get("content-length", "0")
        if not declared.isdigit() or int(declared[:20]) > limit:
            raise ApiError(413, too_large)
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise ApiError(413, too_large)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._config.body_timeout_s:g} s"
            ) from None
        return bytes(body)

    def _server_model(self, body: Mapping[str, Any]) -> str:
        """Return the model that a request must go to, "" if all servers have the same."""
        known = {each.model for each in self._service.router.servers.values() if each.model}
        asked = body.get("model")
        if len(known) <= 1 or (isinstance(asked, str) and asked in known):
            return str(asked) if len(known) > 1 else ""
        raise ApiError(
            404, f"there is no such model; served are {', '.join(sorted(known))}", code="model"
        )

    # -- answers ------------------------------------------------------------------------------

    async def generate(self, request: Request) -> Response:
        """Answer a chat completion, completion or response."""
        tenant = self._tenants.find(request.headers)
        raw = await self._body(request)
        body = read_object(raw)
        is_stream = is_streaming(body)
        self._require_servable(body)
        api = _APIS[request.url.path]
        if api.path == _CHAT:
            body, changed = rules.apply(body, self._config.rules)
            raw = json.dumps(body).encode() if changed else raw
            request.state.rules = changed
        if not is_stream:
            settings: dict[str, Any] = {"stream": True}
            if api.path == _CHAT:
                settings["stream_options"] = {"include_usage": True}
            raw = with_settings(raw, settings)
        turn, answer = await self._open(request, tenant, api, body, raw)
        headers = _headers(request, turn)
        if is_stream:
            return _Stream(self._streamed(turn), turn, tenant, headers)
        await self._collect(request, turn, tenant)
        return AsciiJson({**answer.body(), "tokcache": turn.happened()}, headers=headers)

    async def message(self, request: Request) -> Response:
        """Answer an Anthropic message by a chat completion."""
        tenant = self._tenants.find(request.headers)
        given = await self._body(request)
        body = read_object(given)
        is_stream = is_streaming(body)
        self._require_servable(body)
        chat, request.state.rules = rules.apply(_translated(body), self._config.rules)
        servers = self._service.router.servers.keys()
        if servers <= self._service.watch.pinning and not request.state.rules:
            return await self._message_as_it_came(request, tenant, chat, given, is_stream)
        # The stream names the stop sequence that was found only in its verbose form.
        chat |= {"verbose": True} if chat.get("stop") else {}
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
        raw = json.dumps(chat).encode()
        turn, answer = await self._open(request, tenant, _APIS[_CHAT], chat, raw)
        headers = _headers(request, turn)
        if not isinstance(answer, ChatAnswer):  # never; for the type checker
            raise TypeError
        message_id = f"msg_{secrets.token_hex(_ID_BYTES)}"
        model = str(body.get("model") or turn.made.slot.server.model)
        if is_stream:
            events = messages.MessageEvents(answer, message_id, model)
            return _Stream(self._streamed_message(turn, events), turn, tenant, headers)
        await self._collect(request, turn, tenant)
        return AsciiJson(messages.from_chat(answer, message_id, model), headers=headers)

    async def _message_as_it_came(
        self,
        request: Request,
        tenant: Tenant,
        chat: dict[str, Any],
        raw: bytes,
        is_stream: bool,
    ) -> Response:
        """Pass a message on to a server that pins it; its translation names its prefixes."""
        raw = raw if is_stream else with_settings(raw, {"stream": True})
        api = _Api(_MESSAGES, chat_prompt, messages.MessageAnswer)
        turn, answer = await self._open(request, tenant, api, chat, raw)
        headers = _headers(request, turn)
        if is_stream:
            return _Stream(self._streamed(turn), turn, tenant, headers)
        await self._collect(request, turn, tenant)
        return AsciiJson(answer.body(), headers=headers)

    def _require_servable(self, body: Mapping[str, Any]) -> None:
        """Refuse a body that no llama-server is asked for, before any work is done for it."""
        require_one_answer(body)
        require_no_fetches(body)
        self._server_model(body)

    async def _open(
        self, request: Request, tenant: Tenant, api: _Api, body: dict[str, Any], raw: bytes
    ) -> tuple[Turn, Answer]:
        """Send a request to its slot.

        Errors: ApiError; ClientDisconnect if the client left while it waited.
        """
        model = self._server_model(body)
        try:
            prompt = api.prompt(body, self._service.key, tenant.scope)
            now = time.monotonic()
            wish = Wish(prompt.chain(), tenant.scope, model, now, charge=tenant.charge)
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None
        answer = api.answer()
        tenant.start(time.monotonic())
        try:
            with _Presence(request.receive):
                turn = await self._service.open(wish, prompt, api.path, raw, answer)
        except BaseException:
            tenant.end()
            raise
        if api.path in (_CHAT, _MESSAGES):
            # Counted while the llama-server decodes: it takes a millisecond for a long system text.
            for name in rules.suggested(body):
                self._service.router.reasons[f"volatile_{name}"] += 1
        return turn, answer

    async def _collect(self, request: Request, turn: Turn, tenant: Tenant) -> None:
        """Read a whole answer; stop if the client leaves."""
        try:
            with _Presence(request.receive):
                async for _ in turn.events():
                    pass
        finally:
            turn.close()
            tenant.end()

    async def _streamed(self, turn: Turn) -> AsyncIterator[tuple[bytes, bool]]:
        try:
            async for events in turn.events():
                told = b"".join(
                    b"%sdata: %s\n\n" % (f"event: {name}\n".encode() if name else b"", data)
                    for name, data, _ in events
                )
                yield told, turn.is_done
        except ApiError as error:
            self._service.counts[f"error_{error.status}"] += 1
            is_message = isinstance(turn.answer, messages.MessageAnswer)
            failed, name = error_body(error, is_anthropic=is_message), b""
            if turn.is_responses:
                failed = {"type": "error", "message": str(error), "code": error.code, "param": None}
            if turn.is_responses or is_message:
                name = b"event: error\n"
            yield b"%sdata: %s\n\n" % (name, json.dumps(failed).encode()), True

    async def _streamed_message(
        self, turn: Turn, made: messages.MessageEvents
    ) -> AsyncIterator[tuple[bytes, bool]]:
        try:
            yield b"".join(map(_event, made.start())), False
            async for events in turn.events():
                fed = [each for _, _, found in events for each in made.feed(found or {})]
                if fed:
                    yield b"".join(map(_event, fed)), False
            yield b"".join(map(_event, made.end())), True
        except ApiError as error:
            self._service.counts[f"error_{error.status}"] += 1
            yield _event(error_body(error, is_anthropic=True)), True

    # -- the other paths ----------------------------------------------------------------------

    async def count_tokens(self, request: Request) -> Response:
        """Count the tokens of an Anthropic message's prompt."""
        tenant = self._tenants.find(request.headers)
        body = read_object(await self._body(request))
        chat = _translated(body, is_counting=True)

        async def ask(upstream: Upstream, look: Look) -> int:
            return await self._service.tokens.count(upstream, look, chat, tenant.scope)

        n_tokens = await self._from_any(tenant, self._server_model(body), ask)
        return AsciiJson({"input_tokens": n_tokens})

    async def _from_any(
        self, tenant: Tenant, model: str, ask: Callable[[Upstream, Look], Awaitable[T]]
    ) -> T:
        """Return the answer of a server that is up, of another one if the first fails.

        The tenant's limits hold, but no tokens are charged.
        """
        tenant.start(time.monotonic())
        try:
            for _ in range(_MAX_TRIES):
                upstream = self._service.any_upstream(model)
                try:
                    return await ask(upstream, self._service.watch.looks[upstream.url])
                except ServerUnreachable as error:
                    self._service.watch.failed(upstream.url, error)
        finally:
            tenant.end()
        raise ApiError(503, "no llama-server could be asked; try again", retry_after_s=5)

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a text."""
        tenant = self._tenants.find(request.headers)
        raw = await self._body(request)
        body = read_object(raw)

        async def ask(upstream: Upstream, look: Look) -> tuple[int, Any]:
            tokens, scope = self._service.tokens, tenant.scope
            return await tokens.tokenize(upstream, look, raw, body, scope)

        code, found = await self._from_any(tenant, self._server_model(body), ask)
        return AsciiJson(found, status_code=code)

    async def embeddings(self, request: Request) -> Response:
        """Pass on a request for embeddings, which llama-server gives to any slot."""
        if not self._tenants.is_open:
            self._tenants.find(request.headers)
            raise ApiError(
                501,
                "llama-server pins embeddings to no slot, so with tenants they are"
                " not passed on; run a gateway without tenants for them",
            )
        return await self.passed(request)

    async def passed(self, request: Request) -> Response:
        """Pass on a request that needs no slot."""
        tenant = self._tenants.find(request.headers)
        raw = await self._body(request)
        body = read_object(raw)
        require_no_fetches(body)

        async def ask(upstream: Upstream, _: Look) -> tuple[int, Any]:
            return await upstream.post(request.url.path, raw)

        code, found = await self._from_any(tenant, self._server_model(body), ask)
        return AsciiJson(found, status_code=code)

    async def models(self, request: Request) -> Response:
        """List the models of all servers that are up."""
        self._tenants.find(request.headers)
        listed: dict[str, Any] = {}
        for server in self._service.router.servers.values():
            if server.is_up:
                look = self._service.watch.looks[server.name]
                listed[server.model] = {
                    "id": server.model,
                    "object": "model",
                    "created": 0,
                    "owned_by": "llamacpp",
                    "meta": {"n_ctx": look.n_ctx},
                }
        return AsciiJson({"object": "list", "data": list(listed.values())})

    async def health(self, _: Request) -> Response:
        """Answer 200 if a server is up and the gateway is not shutting down."""
        is_well = self._service.is_healthy and not self._service.is_draining
        told = {"status": "ok" if is_well else "unavailable"}
        return AsciiJson(told, status_code=200 if is_well else 503)

    async def metrics(self, request: Request) -> Response:
        """Show all figures to Prometheus."""
        self._require_admin(request)
        text = exposition(self._service)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def status(self, request: Request) -> Response:
        """Show the figures of the page."""
        self._require_admin(request)
        return AsciiJson(status(self._service), headers=_NO_STORE)

    async def page(self, _: Request) -> Response:
        """Show the page; it asks for the figures itself, with a key if one is needed."""
        return HTMLResponse(PAGE, headers=_PAGE_HEADERS)

    def _require_admin(self, request: Request) -> None:
        if not self._tenants.find(request.headers).config.is_admin:
            raise ApiError(403, "these figures cover all tenants; use a key with is_admin = true")


def _translated(body: dict[str, Any], *, is_counting: bool = False) -> dict[str, Any]:
    try:
        return messages.to_chat(body, is_counting=is_counting)
    except (TypeError, AttributeError, RecursionError):
        raise ApiError(400, "the message has a member of another type than the API's") from None


class _Stream(StreamingResponse):
    """A stream of events that closes its turn, also if the client leaves before the first one.

    `content` yields bytes, and whether they are the last, which then leave with the stream's end.
    """

    def __init__(
        self,
        content: AsyncIterator[tuple[bytes, bool]],
        turn: Turn,
        tenant: Tenant,
        headers: dict[str, str],
    ) -> None:
        super().__init__((), media_type="text/event-stream", headers=headers)
        self._content = content
        self._turn = turn
        self._tenant = tenant

    async def __call__(
        self,
        scope: Scope,  # noqa: ARG002 (of ASGI)
        receive: Receive,
        send: Send,
    ) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        body: dict[str, Any] = {"type": "http.response.body"}
        try:
            with suppress(ClientDisconnect), _Presence(receive):
                await send(start)
                is_last = False
                async for data, is_last in self._content:
                    await send({**body, "body": data, "more_body": not is_last})
                if not is_last:
                    await send({**body, "body": b"", "more_body": False})
        finally:
            self._turn.close()
            self._tenant.end()


class _Presence:
    """Cancels the task that serves a request when its client leaves, and raises ClientDisconnect.

    The work itself needs no task of its own, and so no hop of the event loop.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False

    def __enter__(self) -> None:
        async def gone() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass

        self._task = asyncio.current_task()
        self._watch = asyncio.ensure_future(gone())
        self._watch.add_done_callback(self._cancel)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._watch.remove_done_callback(self._cancel)
        self._watch.cancel()
        if self._has_left and self._task is not None:
            self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise ClientDisconnect from None

    def _cancel(self, watch: asyncio.Future[None]) -> None:
        if not watch.cancelled() and self._task is not None:
            self._has_left = True
            self._task.cancel()


def _headers(request: Request, turn: Turn) -> dict[str, str]:
    headers = {
        **_NO_STORE,
        "x-tokcache-plan": turn.plan,
        "x-tokcache-planned-tokens": str(turn.n_promised),
    }
    if turn.made.reason is not None:
        headers["x-tokcache-reason"] = turn.made.reason
    if changed := getattr(request.state, "rules", None):
        headers["x-tokcache-rules"] = ",".join(changed)
    return headers


def _event(found: dict[str, Any]) -> bytes:
    return f"event: {found['type']}\ndata: {json.dumps(found)}\n\n".encode()
