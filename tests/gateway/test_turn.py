"""A request in its slot reads events in any order that a llama-server may send them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("httpx", reason="needs tokcache[gateway]")
pytest.importorskip("starlette", reason="needs tokcache[gateway]")

from tokcache.gateway.api.streams import ChatAnswer
from tokcache.gateway.app import _Stream
from tokcache.gateway.config import TenantConfig, load
from tokcache.gateway.routing.chain import chat_prompt
from tokcache.gateway.routing.slots import Wish
from tokcache.gateway.service import Service
from tokcache.gateway.tenants import Tenant
from tokcache.gateway.turn import Turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

URL = "http://127.0.0.1:9"
PROGRESS = {"choices": [], "prompt_progress": {"total": 100, "processed": 50}}
TEXT = {"choices": [{"delta": {"content": "hi"}}]}
END = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
TIMINGS = {"cache_n": 60, "prompt_n": 40, "predicted_n": 2, "prompt_ms": 1.0}


@pytest.fixture
def turn(tmp_path: Path) -> Turn:
    """A turn of a service that was not started: nothing is sent."""
    service = Service(load(None, {"folder": str(tmp_path), "upstreams": [URL]}, {}))
    router = service.router
    router.server_up(URL, model="m", pool="p", can_save=False, n_slots=1)
    prompt = chat_prompt({"messages": [{"role": "user", "content": "x" * 600}]}, b"key", None)
    wish = Wish(prompt.chain(), None, "", time.monotonic())
    router.enqueue(wish)
    (made,) = router.assign(time.monotonic())
    made.is_sent = True
    return Turn(service, made, prompt, ChatAnswer(), "/v1/chat/completions")


def told(turn: Turn, found: Any) -> Any:
    """Return the event that a client gets for one of the server's."""
    data = found if isinstance(found, bytes) else json.dumps(found).encode()
    return turn._event("", data)[2]


def test_a_report_of_progress_does_not_begin_the_answer(turn: Turn) -> None:
    told(turn, PROGRESS)
    assert turn.made.slot.begun_at is None
    turn._service.router.abort(turn.made, has_begun=turn._has_begun)
    assert turn.made.slot.n_tokens == 0  # the prompt is decoded in part
    told(turn, TEXT)
    assert turn.made.slot.begun_at is not None


def test_the_end_of_a_stream_before_its_counts_does_not_end_the_answer(turn: Turn) -> None:
    for found in (TEXT, b"[DONE]", END):
        told(turn, found)
        assert not turn.is_done
    told(turn, {"choices": [], "timings": TIMINGS})
    assert not turn.is_done  # a chunk with the usage may follow
    told(turn, b"[DONE]")
    assert turn.is_done


def test_the_outcome_is_told_with_the_counts_and_nowhere_else(turn: Turn) -> None:
    assert "tokcache" not in told(turn, TEXT)
    assert "tokcache" not in told(turn, {**TEXT, "timings": TIMINGS})  # `timings_per_token`
    assert "tokcache" not in told(turn, END)
    last = told(turn, {"choices": [], "timings": TIMINGS})
    assert (last["tokcache"]["cached_tokens"], last["tokcache"]["prompt_tokens"]) == (60, 100)
    assert "tokcache" not in told(turn, {"choices": []})
    (recent,) = turn._service.recent
    assert 0 <= recent.first_s < 10
    assert (recent.n_prompt, recent.n_cached, recent.n_predicted) == (100, 60, 2)


def test_the_tokens_of_a_stream_count_against_its_tenant(turn: Turn) -> None:
    tenant = Tenant(TenantConfig(name="x", key_sha256="0" * 64, tokens_per_minute=600))
    tenant.start(0.0)
    turn.made.wish.charge = tenant.charge

    async def content() -> AsyncIterator[tuple[bytes, bool]]:
        for found in (TEXT, END, {"choices": [], "timings": TIMINGS}):
            told(turn, found)
        yield b"data: [DONE]", True

    async def receive() -> dict[str, Any]:
        return await asyncio.Future[dict[str, Any]]()  # the client stays

    async def send(_: Any) -> None:
        pass

    asyncio.run(_Stream(content(), turn, tenant, {})({}, receive, send))
    assert (tenant.n_in_flight, tenant.tokens) == (0, 600 - 102)
    assert not turn.made.slot.is_busy
