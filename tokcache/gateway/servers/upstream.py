"""One llama-server over HTTP: who it is, the actions on its slots, and its streams."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tokcache.errors import (
    InvalidAnswer,
    RequestRejected,
    ServerError,
    ServerFailed,
    ServerRefused,
    ServerTimeout,
    ServerUnreachable,
    ServerUnsupported,
)
from tokcache.gateway.api.errors import upstream_error
from tokcache.llama.server import calls
from tokcache.llama.server.model import model_identity, probe_tokens

if TYPE_CHECKING:
    import httpx

    from tokcache.gateway.config import UpstreamConfig
    from tokcache.llama.server.calls import Call
    from tokcache.llama.server.results import Completion, SlotFile, TokenProbabilities

T = TypeVar("T")
_CONNECT_S = 5.0
_SLOT_ACTION_S = 60.0
# llama-server closes an idle connection after 5 s.
_IDLE_S = 4.0
_MAX_ANSWER_BYTES = 64 << 20
_MAX_LINE_BYTES = 16 << 20
_OK, _NOT_SUPPORTED = 200, 501
_FIRST_SERVER_ERROR = 500
_N_PROBS = 16
_PROBE_FILE = "tokcache-probe.bin"
_log = logging.getLogger("tokcache.gateway")


@dataclass(frozen=True, slots=True)
class Look:
    """A server's identity; `boot` changes with each start, `pool` with all that a file depends on.

    Units: `n_ctx` tokens per slot.
    """

    boot: str
    model: str
    build: str
    pool: str
    n_slots: int
    n_ctx: int
    is_text_only: bool


class Upstream:
    """A client of one llama-server.

    Errors:  ServerError and its subclasses.
    Threads: not safe; used from one event loop.
    """

    def __init__(self, config: UpstreamConfig, *, read_timeout_s: float) -> None:
        import httpx  # noqa: PLC0415 (an extra)

        self.url = config.url
        self.slot_folder = Path(config.slot_folder) if config.slot_folder else None
        self.tokenizer = config.tokenizer
        self._httpx = httpx
        timeout = httpx.Timeout(read_timeout_s, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S)
        is_tls = config.url.startswith("https")
        self._client = httpx.AsyncClient(
            base_url=config.url,
            timeout=timeout,
            limits=limits,
            verify=is_tls,
            trust_env=False,
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def look(self) -> Look:
        """Ask who the server is; raise InvalidAnswer if it is not a llama-server."""
        raw = await self._json("GET", "/props")
        props = calls.props().read(raw)
        meta = await self._do(calls.model_meta())
        try:
            adapters = await self._do(calls.lora_adapters())
        except (RequestRejected, ServerUnsupported):
            adapters = ""
        modalities = raw.get("modalities") or {}
        identity = (model_identity(props.model_path, meta), props.build, props.n_ctx, adapters)
        place = str(self.slot_folder) if self.slot_folder else self.url
        pool = hashlib.blake2b(repr((identity, place)).encode(), digest_size=16).hexdigest()
        # Without an alias llama-server shows the path of the file on its host.
        alias = str(raw.get("model_alias") or props.model_path).rpartition("/")[2]
        return Look(
            boot=props.boot,
            model=alias or "model",
            build=props.build,
            pool=pool,
            n_slots=props.n_slots,
            n_ctx=props.n_ctx,
            is_text_only=not any(modalities.values()),
        )

    async def probe(self) -> TokenProbabilities | None:
        """Return the model's probabilities after a fixed prompt.

        Cost: decodes 64 tokens in slot 0 and so replaces its contents.
        """
        asked = {"n_predict": 1, "n_probs": _N_PROBS, "temperature": 0.0, "cache_prompt": False}
        found: Completion = await self._do(
            calls.completion(probe_tokens(None), {**asked, "id_slot": 0})
        )
        return found.probabilities[0] if found.probabilities else None

    async def probe_saving(self) -> tuple[bool, bool]:
        """Return whether slots can be saved, and whether the file is in our folder."""
        try:
            saved = await self.save(0, _PROBE_FILE)
        except (ServerUnsupported, RequestRejected):
            return False, False
        path = self.slot_folder / _PROBE_FILE if self.slot_folder is not None else None
        is_there = path is not None and path.is_file() and path.stat().st_size == saved.n_bytes
        if path is not None and is_there:
            path.unlink()
        return True, is_there

    async def save(self, id_slot: int, name: str) -> SlotFile:
        """Write a slot to a file."""
        return await self._do(calls.save_slot(id_slot, name), _SLOT_ACTION_S)

    async def restore(self, id_slot: int, name: str) -> SlotFile:
        """Read a slot from a file."""
        return await self._do(calls.restore_slot(id_slot, name), _SLOT_ACTION_S)

    async def erase(self, id_slot: int) -> None:
        """Empty a slot."""
        await self._do(calls.erase_slot(id_slot), _SLOT_ACTION_S)

    async def is_processing(self, id_slot: int) -> bool:
        """Return whether a slot still works on a request."""
        listed = await self._do(calls.slots())
        return any(slot.id == id_slot and slot.is_processing for slot in listed)

    async def get(self, path: str) -> tuple[int, Any]:
        """Return the status and JSON answer of a GET."""
        return await self._answer(self._client.build_request("GET", path))

    async def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and JSON answer of a POST."""
        return await self._answer(self._client.build_request("POST", path, content=body))

    @asynccontextmanager
    async def stream(self, path: str, body: bytes) -> AsyncIterator[httpx.Response]:
        """Send a request and yield the response once its status is known; leaving aborts it."""
        response = await self._send(self._client.build_request("POST", path, content=body))
        try:
            yield response
        except self._httpx.HTTPError as error:
            raise self._translated(error, path) from error
        finally:
            await response.aclose()

    async def body_of(self, response: httpx.Response) -> Any:
        """Return the JSON of a response that is not a stream, None if it is not JSON."""
        content = bytearray()
        try:
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > _MAX_ANSWER_BYTES:
                    raise InvalidAnswer(
                        f"{self.url} answered more than {_MAX_ANSWER_BYTES:,} bytes"
                    )
        except self._httpx.HTTPError as error:
            raise self._translated(error, response.request.url.path) from error
        try:
            return json.loads(content.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None

    async def _answer(self, request: httpx.Request) -> tuple[int, Any]:
        response = await self._send(request)
        try:
            return response.status_code, await self.body_of(response)
        finally:
            await response.aclose()

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except self._httpx.HTTPError as error:
            raise self._translated(error, request.url.path) from error

    async def _json(
        self, method: str, path: str, body: bytes | None = None, timeout_s: float | None = None
    ) -> Any:
        extensions = {}
        if timeout_s is not None:
            extensions["timeout"] = self._httpx.Timeout(timeout_s).as_dict()
        request = self._client.build_request(method, path, content=body, extensions=extensions)
        status, found = await self._answer(request)
        if status == _OK and found is not None:
            return found
        if status == _OK:
            raise InvalidAnswer(f"{self.url}{path} did not answer in JSON; is it a llama-server?")
        kind: type[ServerError] = RequestRejected
        if status == _NOT_SUPPORTED:
            kind = ServerUnsupported
        elif status >= _FIRST_SERVER_ERROR:
            kind = ServerFailed
        raise kind(f"{self.url} answered {path} with {status}: {upstream_error(status, found)}")

    async def _do(self, call: Call[T], timeout_s: float | None = None) -> T:
        body = None if call.body is None else json.dumps(call.body).encode()
        try:
            found = await self._json(call.method, call.path, body, timeout_s)
        except ServerRefused:
            raise
        except ServerUnreachable:
            # The server may close an idle connection just when it is used again. None of the calls
            # does harm when it is sent twice.
            found = await self._json(call.method, call.path, body, timeout_s)
        return call.read(found)

    def _translated(self, error: Exception, path: str) -> ServerError:
        if isinstance(error, self._httpx.TimeoutException):
            return ServerTimeout(f"{self.url} did not answer {path} in time")
        kind = ServerRefused if isinstance(error, self._httpx.ConnectError) else ServerUnreachable
        return kind(f"{self.url} is out of reach: {type(error).__name__}")


class Lines:
    """Splits a stream into server-sent events; lines and events have a limited size."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._name = ""

    def feed(self, chunk: bytes) -> Iterator[tuple[str, bytes]]:
        """Add bytes and yield the name and data of each data line that they complete."""
        n_searched = len(self._rest)
        self._rest += chunk
        start = 0
        while (end := self._rest.find(b"\n", max(start, n_searched))) >= 0:
            line = bytes(self._rest[start:end]).removesuffix(b"\r")
            start = end + 1
            name, _, value = line.partition(b":")
            if not line:
                self._name = ""
            elif name == b"event":
                self._name = value.strip().decode("ascii", "replace")
            elif name in (b"data", b"error"):
                yield ("error" if name == b"error" else self._name), value.strip()
        del self._rest[:start]
        if len(self._rest) > _MAX_LINE_BYTES:
            raise InvalidAnswer(f"the llama-server sent a line of over {_MAX_LINE_BYTES:,} bytes")
