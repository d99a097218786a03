"""One llama-server over HTTP: who it is, the actions on its slots, and its streams."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tokcache.errors import (
    ApiError,
    InvalidAnswer,
    RequestRejected,
    ServerError,
    ServerFailed,
    ServerUnsupported,
)
from tokcache.gateway.api.body import finite_json
from tokcache.gateway.api.errors import upstream_error
from tokcache.gateway.servers.exchange import Address, Exchange
from tokcache.llama.server import calls
from tokcache.llama.server.model import model_identity, probe_tokens
from tokcache.llama.server.results import ModelMeta

if TYPE_CHECKING:
    from tokcache.gateway.config import UpstreamConfig
    from tokcache.llama.server.calls import Call
    from tokcache.llama.server.results import Completion, SlotFile, TokenProbabilities

T = TypeVar("T")
_SLOT_ACTION_S = 60.0
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
        self.url = config.url
        self.slot_folder = Path(config.slot_folder) if config.slot_folder else None
        self._address = Address(config.url, read_timeout_s=read_timeout_s)
        self.tokenizer = config.tokenizer
        self._meta = ModelMeta()

    async def look(self, last: Look | None = None) -> Look:
        """Ask who the server is; raise InvalidAnswer if it is not a llama-server.

        The metadata of the model is asked for again only if the server has started since `last`.
        """
        raw = await self._json("GET", "/props")
        props = calls.props().read(raw)
        if last is None or not props.boot or props.boot != last.boot:
            self._meta = await self._do(calls.model_meta())
        try:
            adapters = await self._do(calls.lora_adapters())
        except (RequestRejected, ServerUnsupported):
            adapters = ""
        modalities = raw.get("modalities") or {}
        identity = (
            model_identity(props.model_path, self._meta),
            props.build,
            props.n_ctx,
            adapters,
        )
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
        return await self._answer("GET", path)

    async def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and JSON answer of a POST."""
        return await self._answer("POST", path, body)

    async def stream(self, path: str, body: bytes) -> Exchange:
        """Send a request and return its answer once its status is known; closing it aborts it."""
        return await self._address.send("POST", path, body)

    async def rejection(self, exchange: Exchange) -> ApiError:
        """Return the error that a request was answered with."""
        return upstream_error(exchange.status, await self._read(exchange))

    async def _answer(
        self, method: str, path: str, body: bytes = b"", timeout_s: float | None = None
    ) -> tuple[int, Any]:
        exchange = await self._address.send(method, path, body, timeout_s=timeout_s)
        try:
            return exchange.status, await self._read(exchange)
        finally:
            exchange.close()

    async def _read(self, exchange: Exchange) -> Any:
        """Return the JSON of a whole answer, None if it is not JSON."""
        content = bytearray()
        while chunk := await exchange.read():
            content += chunk
            if len(content) > _MAX_ANSWER_BYTES:
                raise InvalidAnswer(f"{self.url} answered more than {_MAX_ANSWER_BYTES:,} bytes")
        try:
            return finite_json(content.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None

    async def _json(
        self, method: str, path: str, body: bytes = b"", timeout_s: float | None = None
    ) -> Any:
        status, found = await self._answer(method, path, body, timeout_s)
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
        body = b"" if call.body is None else json.dumps(call.body).encode()
        return call.read(await self._json(call.method, call.path, body, timeout_s))


class Lines:
    """Splits a stream into server-sent events; lines have a limited size.

    Errors: InvalidAnswer for a line that is too long, or that some clients would read as two.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._name = ""

    def feed(self, chunk: bytes) -> list[tuple[str, bytes]]:
        """Add bytes and return the name and data of each data line that they complete."""
        # The start of a long line is kept without a copy for each chunk.
        self._rest += chunk
        if len(self._rest) > _MAX_LINE_BYTES and b"\n" not in chunk:
            raise InvalidAnswer(f"the llama-server sent a line of over {_MAX_LINE_BYTES:,} bytes")
        if b"\n" not in chunk:
            return []
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        found = []
        for line in lines:
            name, _, value = line.removesuffix(b"\r").partition(b":")
            if b"\r" in value:
                raise InvalidAnswer("the llama-server sent a carriage return within a line")
            if name == b"data":
                found.append((self._name, value.strip()))
            elif name == b"event":
                self._name = value.strip().decode("ascii", "replace")
            elif name == b"error":
                found.append(("error", value.strip()))
            elif not name:
                self._name = ""
        return found
