"""A server that hangs or died takes no other server down, neither while serving nor at the end."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import SYSTEM, Gateway, gateway, system, upstream, user
from tests.gateway.test_saving import paused, wait_for
from tokcache import samples
from tokcache.gateway.servers import upstream as upstream_module
from tokcache.gateway.servers import watch
from tokcache.samples import server_process

if TYPE_CHECKING:
    from pathlib import Path

    from tokcache.samples.server_process import ServerProcess


@pytest.fixture(autouse=True)
def short_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "_LOOK_S", 2.5)


def servers_up(served: Gateway) -> list[bool]:
    return [server.is_up for server in served.service.router.servers.values()]


def occupy(served: Gateway, one: ServerProcess) -> Any:
    """Hold a conversation in a slot of one server and return its messages."""
    for number in range(8):
        messages = [system(f"{number}. {SYSTEM}"), user("hi")]
        served.chat(messages)
        server = served.service.router.servers[one.url]
        if any(slot.n_tokens > 100 for slot in server.slots):
            return messages
    raise AssertionError(one)


def test_a_request_to_a_hung_server_is_answered_by_another(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "one") as one,
        upstream(tmp_path / "two") as two,
        gateway(tmp_path / "own", one, two) as served,
    ):
        messages = occupy(served, one)
        with paused(one):
            answer = served.chat([*messages, user("go on")])
            assert answer["tokcache"]["plan"] == "none"
            assert servers_up(served) == [False, True]
            assert served.service.counts["failover"] >= 1
            assert served.http.post("/tokenize", json={"content": "x"}).status_code == 200
        wait_for(lambda: all(servers_up(served)))


def test_a_server_returns_while_another_hangs(tmp_path: Path) -> None:
    with upstream(tmp_path / "one") as one, upstream(tmp_path / "two") as two:
        port = int(two.url.rpartition(":")[2])
        with gateway(tmp_path / "own", one, two) as served, paused(one):
            two.kill()
            wait_for(lambda: not any(servers_up(served)))
            with upstream(tmp_path / "two", port=port):
                wait_for(lambda: servers_up(served) == [False, True])
                assert served.chat([user("hi")])


def test_a_stream_of_a_server_that_hangs_ends_with_an_error(tmp_path: Path) -> None:
    with upstream(tmp_path / "one") as one, gateway(tmp_path / "own", one) as served:
        body = {"messages": [user("count")], "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/chat/completions", json=body, timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            with paused(one):
                assert "broke off" in [line for line in lines if line][-1]


def test_a_managed_server_that_hangs_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_HUNG_S", 1.0)
    monkeypatch.setattr(server_process, "_STOP_S", 0.5)
    model = str(samples.tiny_model())
    with gateway(tmp_path / "own", model=model, n_slots=1, n_ctx=512, n_threads=1) as served:
        managed = served.service.managed
        assert managed is not None
        pid = managed.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: managed.pid not in (None, pid) and served.service.is_healthy, 40)
        assert served.chat([user("hi")])


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_the_slots_of_a_healthy_server_are_saved_whatever_another_does(
    tmp_path: Path, stop: signal.Signals
) -> None:
    with upstream(tmp_path / "one") as one, upstream(tmp_path / "two") as two:
        with gateway(tmp_path / "own", one, two, drain_timeout_s=3.0) as served:
            occupy(served, one)
            occupy(served, two)
            n_held = sum(
                slot.n_tokens > 100 for slot in served.service.router.servers[two.url].slots
            )
            began = time.monotonic()
            os.kill(one.pid, stop)
            served.close()
            assert time.monotonic() - began < 8
        os.kill(one.pid, signal.SIGCONT)
        listed = json.loads((tmp_path / "own" / "files.json").read_text())["files"]
        written = {path.name for path in (tmp_path / "two").iterdir()}
        assert len(written & {each["name"] for each in listed}) == n_held


def test_slots_are_saved_while_a_request_holds_up_the_end(tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    with upstream(slots) as one, gateway(tmp_path / "own", one) as served:
        served.chat([system(), user("hi")])
        served.wait_until_idle()
        body = {"messages": [user("count")], "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
            served.loop.call_soon_threadsafe(served.service.begin_drain)
            # `stop`, which waits for the requests, is called only after this.
            wait_for(lambda: list(slots.iterdir()))
