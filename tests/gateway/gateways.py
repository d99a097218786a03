"""Real gateways over real llama-servers for tests, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tokcache import samples

pytest.importorskip("xllamacpp", reason="needs tokcache[demo]")
httpx = pytest.importorskip("httpx", reason="needs tokcache[gateway]")
pytest.importorskip("uvicorn", reason="needs tokcache[gateway]")
pytest.importorskip("starlette", reason="needs tokcache[gateway]")

from tokcache.gateway.app import make_app  # noqa: E402
from tokcache.gateway.config import GatewayConfig, load  # noqa: E402
from tokcache.gateway.listener import bind, server  # noqa: E402
from tokcache.gateway.service import Service  # noqa: E402
from tokcache.samples.server_process import ServerProcess  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SYSTEM = "You are a careful assistant who answers in short sentences. " * 20


class Gateway:
    """A running gateway; `service` may be read, and changed only in its own thread."""

    def __init__(self, config: GatewayConfig) -> None:
        self._is_up = threading.Event()
        self._error: BaseException | None = None
        self._config = config
        self.service: Service
        self.loop: asyncio.AbstractEventLoop
        self.url = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._is_up.wait(120)
        if self._error is not None:
            raise self._error
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 (raised in the test's thread)
            self._error = error
            self._is_up.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = Service(self._config)
        try:
            await self.service.start()
            sockets = bind("127.0.0.1", 0)
            self._server = server(make_app(self.service), self.service, self._config)
            task = asyncio.create_task(self._server.serve(sockets))
            while not self._server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
                await asyncio.sleep(0.01)
            self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
            self._is_up.set()
            await task
        finally:
            await self.service.stop()

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def chat(self, messages: list[dict[str, Any]], **settings: Any) -> Any:
        """Return the answer to a chat, and check that it is one."""
        headers = settings.pop("headers", {})
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, **settings}
        answer = self.http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json() | {"headers": answer.headers}

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while self.service.n_turns and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.service.n_turns == 0


@contextlib.contextmanager
def upstream(folder: Path, *, n_slots: int = 2, **settings: Any) -> Iterator[ServerProcess]:
    """Start a llama-server that saves slots in `folder`."""
    with ServerProcess(
        settings.pop("model", None) or samples.tiny_model(),
        n_ctx=settings.pop("n_ctx", 2048),
        n_slots=n_slots,
        n_threads=1,
        slot_folder=folder,
        port=settings.pop("port", 0),
        overrides=settings,
    ) as process:
        yield process


@contextlib.contextmanager
def gateway(folder: Path, *processes: ServerProcess, **settings: Any) -> Iterator[Gateway]:
    """Serve in front of running llama-servers."""
    upstreams = [{"url": each.url, "slot_folder": str(each.slot_folder)} for each in processes]
    flags = {"folder": str(folder), "drain_timeout_s": 10.0, **settings}
    if upstreams:
        flags["upstreams"] = upstreams
    made = Gateway(load(None, flags, {}))
    try:
        yield made
    finally:
        made.close()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str = SYSTEM) -> dict[str, Any]:
    return {"role": "system", "content": text}


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
