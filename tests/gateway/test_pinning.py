"""/v1/messages is passed on as it came only to a server that runs it in the slot it asks for."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import SYSTEM, Gateway, gateway, httpx, upstream, user

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BODY: dict[str, Any] = {"model": "any", "max_tokens": 6, "temperature": 0, "system": SYSTEM}


class Slots(ThreadingHTTPServer):
    """A llama-server as the probe sees it, which chooses slots by a rule."""

    def __init__(self, rule: Any, n_slots: int = 2) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rule = rule
        self.tasks: list[int | None] = [None] * n_slots
        self.n_asked = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Slots

    def do_GET(self) -> None:
        props = {"total_slots": len(self.server.tasks), "modalities": {"vision": True},
                 "default_generation_settings": {"n_ctx": 512}, "model_path": "none.gguf",
                 "build_info": "b1", "media_marker": "boot"}  # fmt: skip
        slots = [{"id": n, "id_task": task} for n, task in enumerate(self.server.tasks)]
        known = {"/props": props, "/v1/models": {"data": []}, "/lora-adapters": []}
        self._send({**known, "/slots": slots}[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.n_asked += 1
        slot = self.server.rule(self.server, body["id_slot"])
        self.server.tasks[slot] = self.server.n_asked
        self._send({"type": "message", "content": []})

    def _send(self, found: Any) -> None:
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        pass


RULES = {
    "honours": (lambda _, wanted: wanted, 2, True),
    "honours, of four": (lambda _, wanted: wanted, 4, True),
    "most similar": (lambda *_: 1, 2, False),
    "first": (lambda *_: 0, 2, False),
    "in turn from 1": (lambda server, _: server.n_asked % 2, 2, False),
    "in turn from 0": (lambda server, _: (server.n_asked + 1) % 2, 2, False),
    "one slot": (lambda *_: 0, 1, False),
}


@pytest.mark.parametrize("name", RULES)
def test_the_probe_tells_a_server_that_honours_the_slot(tmp_path: Path, name: str) -> None:
    rule, n_slots, is_pinning = RULES[name]
    with Slots(rule, n_slots) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with gateway(tmp_path, upstreams=[{"url": url}]) as made:
            assert (url in made.service.watch.pinning) == is_pinning
        server.shutdown()


def test_todays_llama_server_gets_messages_as_chat_completions(tmp_path: Path) -> None:
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as made:
        assert not made.service.watch.pinning
        answer = made.http.post("/v1/messages", json={**BODY, "messages": [user("hi")]}).json()
        assert answer["id"].startswith("msg_")


@pytest.fixture(scope="module")
def passing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, str]]:
    """Yield a gateway in front of a server of one slot, which is always the right one."""
    folder = tmp_path_factory.mktemp("passing")
    with (
        upstream(folder / "slots", n_slots=1) as server,
        gateway(folder / "own", server) as made,
        upstream(folder / "bare", n_slots=1) as bare,
    ):
        made.service.watch.pinning.add(server.url)
        yield made, bare.url


def events(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{url}/v1/messages", json={**body, "stream": True}) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines]


def test_a_passed_message_is_the_servers_own(passing: tuple[Gateway, str]) -> None:
    served, bare = passing
    messages = [user("hi")]
    for _ in range(3):
        body = {**BODY, "messages": messages}
        given, own = (httpx.post(f"{url}/v1/messages", json=body, timeout=60).json()
                      for url in (served.url, bare))  # fmt: skip
        assert given["id"].startswith("chatcmpl-")
        for each in (given, own):
            del each["id"]
        assert given == {**own, "model": given["model"]}
        streams = [events(url, body) for url in (served.url, bare)]
        assert [each["type"] for each in streams[0]] == [each["type"] for each in streams[1]]
        told = streams[0][-2]["tokcache"]
        assert told["cached_tokens"] == told["prompt_tokens"] - 1 > 200
        assert told["plan"] == "slot"
        messages = [*messages, {"role": "assistant", "content": own["content"]}, user("more")]


def test_errors_of_a_passed_message_have_the_apis_form(passing: tuple[Gateway, str]) -> None:
    served, _ = passing
    body = {**BODY, "messages": [user("hello " * 4000)]}
    for is_stream in (False, True):
        answer = served.http.post("/v1/messages", json={**body, "stream": is_stream})
        assert answer.status_code == 400
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "invalid_request_error"
    served.wait_until_idle()


def test_a_message_is_never_passed_to_a_server_that_no_longer_pins_it(
    passing: tuple[Gateway, str],
) -> None:
    served, _ = passing
    answers: list[Any] = []

    def ask(path: str, **settings: Any) -> None:
        body = {**BODY, "messages": [user("hi")], **settings}
        answers.append(served.http.post(path, json=body))

    first = threading.Thread(
        target=ask, args=["/v1/chat/completions"], kwargs={"max_tokens": 500, "ignore_eos": True}
    )
    first.start()
    deadline = time.monotonic() + 30
    while not served.service.n_turns and time.monotonic() < deadline:
        time.sleep(0.01)
    second = threading.Thread(target=ask, args=["/v1/messages"])
    second.start()
    while not served.service.router.queue and time.monotonic() < deadline:
        time.sleep(0.01)
    before = set(served.service.watch.pinning)
    served.service.watch.pinning.clear()
    for thread in (first, second):
        thread.join(60)
    served.service.watch.pinning |= before
    assert [each.status_code for each in answers] == [200, 503]
    assert answers[1].json()["error"]["type"] == "overloaded_error"
    served.wait_until_idle()
