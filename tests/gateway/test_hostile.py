"""Hostile clients and lying servers get an error in the API's form, and others are served on."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import Gateway, gateway, upstream, user

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        upstream(tmp_path_factory.mktemp("slots")) as process,
        gateway(
            tmp_path_factory.mktemp("gateway"),
            process,
            max_body_bytes=200_000,
            body_timeout_s=1.0,
        ) as made,
    ):
        yield made


@pytest.fixture(autouse=True)
def serves_on(served: Gateway) -> Iterator[None]:
    yield
    assert served.chat([user("still there?")])
    served.wait_until_idle()
    assert all(not s.is_busy for one in served.service.router.servers.values() for s in one.slots)


BAD = [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"\xff{}", 400), (b'{"messages":[]}', 400),
    (b'{"messages":"x"}', 400), (b'{"messages":[3]}', 400), (b'{"messages":[{"role":3}]}', 400),
    (b'{"messages":[{"role":"user","content":NaN}]}', 400), (b'{"x":' + b"9" * 5000 + b"}", 400),
    (b'{"messages":' + b"[" * 90_000, 400), (b'{"a":' * 30_000 + b"1" + b"}" * 30_000, 400),
    (b" " * 200_001, 413), ('{"messages"\x00:1}'.encode("utf-16"), 400),
    (b'{"messages":[{"role":"user","content":"x"}],"n":3}', 400),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), BAD)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_bad_bodies(served: Gateway, path: str, body: bytes, status: int | None) -> None:
    answer = served.http.post(path, content=body)
    if status is None:
        assert answer.status_code in (200, 400)
        return
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert (answer.json().get("type") == "error") == (path == "/v1/messages")


def raw(served: Gateway, sent: bytes, timeout_s: float = 5.0) -> bytes:
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout_s) as link:
        link.sendall(sent)
        found = b""
        try:
            while chunk := link.recv(65536):
                found += chunk
        except TimeoutError:
            pass
        return found


def test_a_slow_body_is_cut_off(served: Gateway) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
    began = time.monotonic()
    assert raw(served, head).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < 5


def test_smuggled_headers_do_not_make_a_second_request(served: Gateway) -> None:
    n_before = served.service.router.counts["request"]
    body = json.dumps({"messages": [user("x")], "max_tokens": 1}).encode()
    inner = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s"
    hidden = inner % (len(body), body)
    for head in (
        b"Content-Length: 4\r\nContent-Length: 400\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length : 5\r\n",
    ):
        sent = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\n" + head + b"\r\n0\r\n\r\n" + hidden
        raw(served, sent, 1.0)
    served.wait_until_idle()
    n_made = served.service.router.counts["request"] - n_before
    # After a chunked body that really ended, the next request on the connection is a request.
    assert n_made <= 1


PATHS = [
    "/v1/../slots/0?action=erase", "/v1/%2e%2e/props", "//props", "/slots", "/infill",
    "/v1/chat/completions/../../../props", "/completion", "/lora-adapters", "/apply-template",
    "/models/load",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_other_paths_of_the_server_are_out_of_reach(served: Gateway, path: str) -> None:
    sent = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    assert raw(served, sent.encode()).split(b" ")[1] in (b"404", b"307")
    sent = sent.replace("GET", "POST")
    assert raw(served, sent.encode()).split(b" ")[1] in (b"404", b"307")


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"host": "evil.example"},
     {"host": "127.0.0.1.evil.example:80"}],
)  # fmt: skip
def test_foreign_pages_may_not_use_the_gateway(served: Gateway, headers: dict[str, str]) -> None:
    answer = served.http.post(CHAT, json={"messages": [user("x")]}, headers=headers)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:1/", "../../etc/passwd", "a\r\nX: y", "x" * 999]
)
def test_a_model_name_is_only_a_name(served: Gateway, name: str) -> None:
    assert served.chat([user("x")], model=name)["model"] != name


def test_no_prompt_in_logs_errors_metrics_and_page(
    served: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    word = "zebra-crossing"
    with caplog.at_level(logging.DEBUG):
        served.chat([user(word)])
        told = [
            served.http.post(CHAT, json={"messages": [user(word * 3000)]}).text,
            served.http.post(CHAT, json={"messages": [user(word)], "n": 2}).text,
            served.http.post(CHAT, json={"messages": [{"role": word, "content": 3}]}).text,
            served.http.get("/metrics").text,
            served.http.get("/status.json").text,
            served.http.get("/").text,
        ]
    assert not any(word in each for each in told)
    ours = [each.getMessage() for each in caplog.records if each.name.startswith("tokcache")]
    assert not any(word in each for each in ours)


class Liar(BaseHTTPRequestHandler):
    """Answers as a llama-server, then lies in the way that its class was told to."""

    protocol_version = "HTTP/1.1"
    answer = b""
    headers_sent = b""

    def do_GET(self) -> None:
        props = {"total_slots": 1, "default_generation_settings": {"n_ctx": 512},
                 "model_path": "none.gguf", "build_info": "b1", "media_marker": "boot",
                 "modalities": {"vision": True}}  # fmt: skip
        known = {"/props": props, "/v1/models": {"data": []}, "/lora-adapters": [], "/slots": []}
        self._send(json.dumps(known[self.path]).encode(), "application/json")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(self.answer, "text/event-stream")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-lie", "yes")
        self.send_header("set-cookie", "lie=1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        pass


LIES = [b"", b"data: [1]\n\n", b"data: {\n\n", b'data: {"choices": 5}\n\n', b"data: [DONE]\n\n",
        b'data: {"error": "no"}\n\n', b'data: {"choices":[{"delta":{"content":5}}]}\n\n',
        b'data: {"timings": {"cache_n": -5, "prompt_n": 1}}\n\n', b"<html>" * 1000,
        # A lone carriage return ends a line too, by the definition of server-sent events.
        b'event: a\rdata: evil\ndata: {"choices": []}\n\n',
        b'data: {"choices": [],\rdata: "evil": 1}\n\n']  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/v1/completions"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_lying_server_is_told_as_an_error(
    liar: Gateway, lie: bytes, path: str, is_stream: bool
) -> None:
    Liar.answer = lie
    body = {"messages": [user("x")], "input": "x", "prompt": "x", "max_tokens": 3,
            "stream": is_stream}  # fmt: skip
    answer = liar.http.post(path, json=body)
    assert answer.status_code == (200 if is_stream else 502), answer.text
    assert "error" in answer.text
    assert "evil" not in answer.text
    assert "x-lie" not in answer.headers
    assert "set-cookie" not in answer.headers
    liar.wait_until_idle()


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with gateway(tmp_path_factory.mktemp("liar"), upstreams=[{"url": url}]) as made:
            yield made
        server.shutdown()


def test_a_server_that_is_no_llama_server_leaves_the_others_serving(tmp_path: Path) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Other) as other,
        upstream(tmp_path / "slots") as real,
    ):
        threading.Thread(target=other.serve_forever, daemon=True).start()
        upstreams = [{"url": f"http://127.0.0.1:{other.server_port}"}, {"url": real.url}]
        with gateway(tmp_path / "own", upstreams=upstreams) as made:
            assert made.chat([user("x")])
            assert [s.is_up for s in made.service.router.servers.values()] == [False, True]
        other.shutdown()
