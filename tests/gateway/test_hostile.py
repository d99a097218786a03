"""Hostile clients and lying servers get an error in the API's form, and others are served on."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import Gateway, gateway, upstream, user
from tokcache.gateway import listener

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
    "/models/load", "/metrics/", "/v1/models/",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_other_paths_of_the_server_are_out_of_reach(served: Gateway, path: str) -> None:
    sent = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    assert raw(served, sent.encode()).split(b" ")[1] == b"404"
    sent = sent.replace("GET", "POST")
    assert raw(served, sent.encode()).split(b" ")[1] == b"404"


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


ADDRESS = "http://127.0.0.1:9/x"
FETCHES: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": ADDRESS}},
    {"type": "image_url", "image_url": " " + ADDRESS},
    {"type": "image_url", "image_url": {"url": [ADDRESS]}},
    {"type": "input_image", "image_url": "file:///etc/hostname"},
    {"type": "input_audio", "input_audio": {"data": ADDRESS, "format": "wav"}},
    {"type": "input_audio", "input_audio": {"url": ADDRESS}},
    {"type": "input_video", "input_video": {"url": ADDRESS}},
    {"type": "input_video", "input_video": {"data": "FILE:///etc/hostname"}},
    {"type": "video_url", "video_url": {"url": ADDRESS}},
    {"type": "input_file", "file_url": ADDRESS},
    {"type": "file", "file": {"file_data": ADDRESS}},
]


@pytest.mark.parametrize("part", FETCHES, ids=[str(n) for n in range(len(FETCHES))])
def test_no_api_passes_the_address_of_a_medium_on(served: Gateway, part: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]
    bodies = [
        (CHAT, {"messages": messages}),
        (CHAT, {"messages": [user("x")], "input": messages}),
        ("/v1/responses", {"input": messages}),
        # The member of another API does not hide the one that counts.
        ("/v1/responses", {"messages": [user("x")], "input": messages}),
        ("/v1/responses", {"messages": "x", "input": messages}),
        ("/v1/completions", {"prompt": "x", "messages": messages}),
        ("/v1/messages", {"messages": messages, "max_tokens": 2}),
        ("/v1/messages", {"messages": [user("x")], "max_tokens": 2, "input": messages}),
        ("/v1/embeddings", {"input": messages}),
    ]
    for path, body in bodies:
        answer = served.http.post(path, json=body)
        assert answer.status_code == 400, (path, answer.text)
        assert "not an address" in answer.text or "can't be translated" in answer.text


def test_media_as_data_and_addresses_in_schemas_pass(served: Gateway) -> None:
    properties = {"image_url": {"type": "string", "default": ADDRESS}}
    function = {"name": "look", "parameters": {"type": "object", "properties": properties}}
    assert served.chat([user("x")], tools=[{"type": "function", "function": function}])
    audio = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    answer = served.http.post(CHAT, json={"messages": [{"role": "user", "content": [audio]}]})
    assert "not an address" not in answer.text  # this model takes no audio


@pytest.mark.parametrize("stream", ["yes", 1, [], {}])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_stream_that_is_no_boolean_is_refused(served: Gateway, path: str, stream: Any) -> None:
    body = {"messages": [user("x")], "input": "x", "prompt": "x", "max_tokens": 1}
    answer = served.http.post(path, json={**body, "stream": stream})
    assert answer.status_code == 400
    assert "stream" in answer.json()["error"]["message"]


def n_taken(served: Gateway, start: bytes, more: bytes) -> int:
    """Return how many bytes a connection took before it was closed, at most 20 million."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    n_sent = 0
    with socket.create_connection((host, int(port)), 5) as link:
        link.sendall(start)
        with contextlib.suppress(OSError):
            while n_sent < 20_000_000:
                link.sendall(more)
                n_sent += len(more)
    return n_sent


def test_a_head_is_limited_in_size(served: Gateway) -> None:
    start = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    whole = start + b"x-a: " + b"a" * 70_000 + b"\r\n\r\n"
    assert raw(served, whole).startswith(b"HTTP/1.1 431")
    chunked = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    # A head, trailers after the body, the extension of a chunk, a target: none of them ends.
    for sent in (start, chunked + b"0\r\n", chunked + b"1;a=", b"GET /"):
        assert n_taken(served, sent, b"x-a: " + b"a" * 50_000 + b"\r\n") < 10_000_000
    assert n_taken(served, start + b"x-a: ", b"a" * 50_000) < 10_000_000


def test_a_head_is_limited_in_time(served: Gateway) -> None:
    for sent in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"\r\n"):
        began = time.monotonic()
        found = raw(served, sent, 10)
        assert found.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 8
    # A large body in one piece with its head, and pipelined requests, are no large heads.
    body = json.dumps({"content": "x" * 150_000}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    found = raw(served, (head + body) * 2, 3)
    assert found.count(b"HTTP/1.1 200") == 2


def test_health_needs_no_host(served: Gateway) -> None:
    assert raw(served, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert raw(served, b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403")


def test_a_redirect_never_names_another_host(served: Gateway) -> None:
    answer = served.http.get("/metrics/", headers={"host": "evil.example"}, follow_redirects=False)
    assert answer.status_code == 404
    assert "location" not in answer.headers


def test_a_client_that_does_not_read_loses_its_slot(
    served: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_STALLED_S", 0.5)
    asked = {"messages": [user("x")], "max_tokens": 1900, "ignore_eos": True, "stream": True,
             "logprobs": True, "top_logprobs": 100}  # fmt: skip
    body = json.dumps(asked).encode()
    head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect((host, int(port)))
        link.sendall(head % (CHAT.encode(), len(body)) + body)
        n_before = served.service.router.counts["aborted"]
        deadline = time.monotonic() + 30
        while served.service.router.counts["aborted"] == n_before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    served.wait_until_idle()


def test_connections_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 4)
    with gateway(tmp_path, upstreams=[{"url": "http://127.0.0.1:9"}]) as made:
        host, _, port = made.url.removeprefix("http://").partition(":")
        assert made.http.get("/v1/models").status_code == 200
        with contextlib.ExitStack() as links:
            for _ in range(3):
                links.enter_context(socket.create_connection((host, int(port))))
            time.sleep(0.2)
            assert made.http.get("/v1/models").status_code == 503
        time.sleep(0.2)
        assert made.http.get("/v1/models").status_code == 200
