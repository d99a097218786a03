"""A client of the gateway gets llama-server's own answers, and the gateway pins each request."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import Gateway, cached, httpx, system, user

if TYPE_CHECKING:
    from tokcache.samples.server_process import ServerProcess


def streamed(served: Gateway, path: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the name and data of each event."""
    events = []
    with served.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        name = ""
        for line in answer.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                events.append((name, value if value == "[DONE]" else json.loads(value)))
                name = ""
    return events


BODIES = [
    ("/v1/chat/completions", {"messages": [system(), user("hello")], "max_tokens": 8}),
    ("/v1/completions", {"prompt": "def add(a, b):" * 20, "max_tokens": 8}),
    ("/v1/completions", {"prompt": list(range(3, 90)), "max_tokens": 8}),
    ("/v1/responses", {"input": "hello there", "instructions": "Be brief." * 30,
                       "max_output_tokens": 8}),
]  # fmt: skip


def text_of(answer: Any) -> str:
    if "output" in answer:
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_answers_are_those_of_the_bare_server(
    served: Gateway, server: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    asked = {**body, "temperature": 0}
    bare = httpx.post(f"{server.url}{path}", json={**asked, "cache_prompt": False}).json()
    answer = served.http.post(path, json=asked)
    assert answer.status_code == 200
    given = answer.json()
    assert text_of(given) == text_of(bare)
    own = {"tokcache", "timings"}
    assert set(given) - own == set(bare) - own
    for name in ("object", "model"):
        assert given[name] == bare[name]
    last = [data for _, data in streamed(served, path, asked) if data != "[DONE]"][-1]
    assert last["tokcache"]["cached_tokens"] == last["tokcache"]["prompt_tokens"] - 1
    assert last["tokcache"]["plan"] == "slot"


@pytest.mark.parametrize("number", [0, 1], ids=["chat", "text"])
def test_times_in_every_chunk_do_not_end_an_answer(served: Gateway, number: int) -> None:
    path, body = BODIES[number]
    asked = {**body, "ignore_eos": True, "timings_per_token": True}
    events = [data for _, data in streamed(served, path, asked) if data != "[DONE]"]
    assert sum("timings" in each for each in events) > 3
    assert ["tokcache" in each for each in events] == [False] * (len(events) - 1) + [True]
    assert served.service.recent[-1].n_predicted == 8


def test_a_stream_has_the_bare_servers_events(served: Gateway, server: ServerProcess) -> None:
    path, body = BODIES[3]
    asked = {**body, "temperature": 0}
    names = [name for name, _ in streamed(served, path, asked)]
    bare = httpx.post(f"{server.url}{path}", json={**asked, "stream": True}).text
    expected = [line[7:] for line in bare.splitlines() if line.startswith("event: ")]
    assert names == expected


def test_the_clients_own_slot_and_settings_can_not_unpin_a_request(served: Gateway) -> None:
    for number in range(3):
        messages = [system("Something else. " * 40), user("a"), *[user("b")] * number]
        served.chat(messages, id_slot=number, cache_prompt=False)
    assert cached(served.chat([system("Something else. " * 40), user("a")], id_slot=7)) > 100


def test_unknown_settings_pass_as_they_came(served: Gateway) -> None:
    asked = {"messages": [user("hi")], "max_tokens": 3, "top_k": 1, "n_probs": 2, "logprobs": True}
    answer = served.http.post("/v1/chat/completions", json=asked).json()
    assert len(answer["choices"][0]["logprobs"]["content"]) == 3


def test_other_paths(served: Gateway) -> None:
    tokens = served.http.post("/tokenize", json={"content": "hello there"}).json()["tokens"]
    assert served.http.post("/detokenize", json={"tokens": tokens}).json() == {
        "content": "hello there"
    }
    assert served.http.get("/health").json() == {"status": "ok"}
    listed = served.http.get("/v1/models").json()["data"]
    assert [each["object"] for each in listed] == ["model"]
    assert served.http.post("/v1/embeddings", json={"input": "x"}).status_code == 501
    assert "tokcache_gateway_requests_total" in served.http.get("/metrics").text
    assert served.http.get("/").headers["content-type"].startswith("text/html")
    assert served.http.post("/slots/0?action=erase").status_code == 404
    assert served.http.get("/props").status_code == 404


def test_a_prompt_beyond_the_context_is_told_in_the_apis_form(served: Gateway) -> None:
    body = {"messages": [user("hello " * 4000)], "max_tokens": 8}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["n_ctx"] == 2048
    answer = served.http.post("/v1/messages", json={**body, "model": "any"})
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert served.chat([user("hi")])


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(served: Gateway, is_stream: bool) -> None:
    body = {"messages": [user("count")], "max_tokens": 1900, "stream": is_stream,
            "ignore_eos": True}  # fmt: skip
    n_before = served.service.router.counts["aborted"]
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=served.url, timeout=0.7, trust_env=False) as client:
            try:
                with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    for _ in answer.iter_lines():
                        if is_stream:
                            break
            except httpx.TimeoutException:
                pass
        done.set()

    threading.Thread(target=ask).start()
    assert done.wait(30)
    began = time.monotonic()
    served.wait_until_idle()
    assert time.monotonic() - began < 10
    assert served.service.router.counts["aborted"] == n_before + 1
    assert not any(slot.is_busy for s in served.service.router.servers.values() for slot in s.slots)
    assert served.chat([user("hi")])
