"""Saves that are cut off, fail or take long: nothing is lost without a reason, or left on disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import SYSTEM, Gateway, gateway, httpx, system, upstream, user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tokcache.gateway.routing.chain import Chain
    from tokcache.samples.server_process import ServerProcess


@contextlib.contextmanager
def paused(process: ServerProcess) -> Iterator[None]:
    """Let a llama-server take requests and answer none."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def wait_for(is_so: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_so()


def chat(number: int) -> list[dict[str, Any]]:
    return [system(f"chat {number}. {SYSTEM}"), user("hi")]


@contextlib.contextmanager
def draining(served: Gateway) -> Iterator[None]:
    """Let one of three conversations lose its slot, and drain before an idle slot is saved."""
    for number in range(3):
        served.service.is_draining = False
        served.chat(chat(number))
        served.service.is_draining = True
    served.wait_until_idle()
    yield
    served.service.is_draining = False


def test_no_idle_slot_is_saved_while_the_gateway_drains(tmp_path: Path) -> None:
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        service = served.service
        with draining(served):
            time.sleep(1.0)  # four ticks
            assert service.router.next_to_save(time.monotonic()) is not None
            assert service.counts["idle_save"] == 0
        wait_for(lambda: service.counts["idle_save"])


def test_a_save_that_does_not_end_holds_a_stop_no_longer_than_the_drain(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots") as server,
        gateway(tmp_path / "own", server, drain_timeout_s=1.0) as served,
    ):
        with draining(served):
            os.kill(server.pid, signal.SIGSTOP)
        with paused(server):
            wait_for(lambda: served.service._saving)
            began = time.monotonic()
            served.close()
            assert time.monotonic() - began < 8
            assert served.service._saving is None


def test_a_file_that_is_written_after_its_client_left_is_not_forgotten(tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    with upstream(slots, n_slots=1) as server, gateway(tmp_path / "own", server) as served:
        files = served.service.files
        served.chat(chat(0))
        served.wait_until_idle()
        with paused(server):
            body = {"messages": chat(1), "max_tokens": 1}
            with pytest.raises(httpx.ReadTimeout):
                served.http.post("/v1/chat/completions", json=body, timeout=1.0)
            assert served.service.n_turns == 1
        served.wait_until_idle()
        wait_for(lambda: list(slots.iterdir()))
        (written,) = slots.iterdir()
        wait_for(lambda: files._stale)
        assert list(files._stale.values()) == [[written.name]]
        served.chat(chat(1))
        wait_for(lambda: len(files) == 1)
        assert [file.name for file in files] == [written.name]
        assert [each.name for each in slots.iterdir()] == [written.name]


def test_a_conversation_whose_save_failed_says_so(tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    with upstream(slots, n_slots=1) as server, gateway(tmp_path / "own", server) as served:
        served.chat(chat(0))
        shutil.rmtree(slots)
        served.chat(chat(1))
        told = served.chat(chat(0))["tokcache"]
        assert (told["reason"], told["detail"]) == ("refused", "save_failed")
        assert served.service.router.reasons["save_failed"] == 2


def test_the_time_of_a_save_is_that_of_the_server_alone(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots", n_slots=1) as server,
        gateway(tmp_path / "own", server) as served,
    ):
        service = served.service
        ids_of = service._ids

        async def late(*given: Any, **named: Any) -> Chain:
            await asyncio.sleep(2.0)
            return await ids_of(*given, **named)

        service._ids = late  # type: ignore[method-assign]
        for number in range(2):
            served.chat(chat(number))
        (file,) = service.files
        (per_token_s,) = service.router.admission._save_s_per_token.values()
        assert per_token_s * file.n_tokens < 1.0


def test_a_slot_that_somebody_else_used_is_not_saved_as_ours(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots", n_slots=1) as server,
        gateway(tmp_path / "own", server) as served,
    ):
        served.chat(chat(0))
        other = {"prompt": "one two three", "n_predict": 1, "id_slot": 0, "cache_prompt": False}
        assert httpx.post(f"{server.url}/completion", json=other, timeout=60).is_success
        served.chat(chat(1))
        assert not served.service.files
        assert served.service.router.reasons["slot_changed_by_others"] == 1
        told = served.chat(chat(0))["tokcache"]
        assert (told["plan"], told["detail"]) == ("none", "slot_changed_by_others")


def test_a_request_that_finds_no_server_in_time_gets_503(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots") as server,
        gateway(tmp_path / "own", server, queue_timeout_s=0.3) as served,
    ):
        server.kill()
        wait_for(lambda: served.http.get("/health").status_code == 503)
        answer = served.http.post("/v1/chat/completions", json={"messages": chat(0)})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert served.service.router.reasons["queue_timeout"] == 1
