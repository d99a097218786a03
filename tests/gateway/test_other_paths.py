"""Requests that need no slot, and those that every API refuses in its own form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.gateways import Gateway, gateway, httpx, upstream, user

if TYPE_CHECKING:
    from pathlib import Path

    from tokcache.samples.server_process import ServerProcess

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [user("hi")], "max_tokens": 2},
    TEXT: {"prompt": "hi", "max_tokens": 2},
    RESPONSES: {"input": "hi", "max_output_tokens": 2},
    MESSAGES: {"messages": [user("hi")], "max_tokens": 2},
}


def error_of(answer: Any, path: str) -> dict[str, Any]:
    """Return the error of an answer, and check that it has the form of the API."""
    told = answer.json()
    assert (told.get("type") == "error") == (path == MESSAGES), told
    assert isinstance(told["error"]["type"], str)
    assert ("param" in told["error"]) == (path != MESSAGES)
    return dict(told["error"])


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["n", "n_cmpl", "best_of"])
def test_several_answers_are_refused(served: Gateway, path: str, name: str) -> None:
    answer = served.http.post(path, json={**BODIES[path], name: 2})
    assert answer.status_code == 400
    assert f"{name} must be 1" in error_of(answer, path)["message"]
    assert served.http.post(path, json={**BODIES[path], name: 1}).is_success


def image(path: str, url: str) -> dict[str, Any]:
    """Return a request with an image, by address or as data."""
    kind, _, data = url.partition(",")
    if path == MESSAGES:
        source = {"type": "base64", "media_type": "image/png", "data": data}
        source = source if kind.startswith("data:") else {"type": "url", "url": url}
        content: Any = [{"type": "image", "source": source}]
    elif path == RESPONSES:
        content = [{"type": "input_image", "image_url": url}]
    else:
        content = [{"type": "image_url", "image_url": {"url": url}}]
    place = "input" if path == RESPONSES else "messages"
    return {**BODIES[path], place: [{"role": "user", "content": content}]}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "file:///etc/passwd"])
def test_images_by_address_are_refused(served: Gateway, path: str, url: str) -> None:
    answer = served.http.post(path, json=image(path, url))
    assert answer.status_code == 400
    assert error_of(answer, path)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_an_image_for_a_model_without_vision_is_the_servers_error(
    served: Gateway, server: ServerProcess, path: str
) -> None:
    body = image(path, "data:image/png;base64,iVBORw0KGgo=")
    bare = httpx.post(f"{server.url}{path}", json=body)
    answer = served.http.post(path, json=body)
    assert answer.status_code == bare.status_code >= 400
    assert error_of(answer, path)["message"] == bare.json()["error"]["message"]
    served.wait_until_idle()
    assert served.chat([user("hi")])


def test_embeddings_are_the_servers(tmp_path: Path) -> None:
    body = {"input": ["hello there", "and more"], "model": "any"}
    with (
        upstream(tmp_path / "slots", embedding=True, pooling_type=1) as process,
        gateway(tmp_path / "own", process) as made,
    ):
        answer = made.http.post("/v1/embeddings", json=body)
        bare = httpx.post(f"{process.url}/v1/embeddings", json=body)
        assert answer.status_code == bare.status_code == 200
        assert len(answer.json()["data"][0]["embedding"]) == 128
        assert answer.json() == bare.json()


def test_ids_become_the_servers_text(served: Gateway, server: ServerProcess) -> None:
    body = {"tokens": [300, 5, 1, 77]}
    bare = httpx.post(f"{server.url}/detokenize", json=body).json()
    assert served.http.post("/detokenize", json=body).json() == bare
    wrong = served.http.post("/detokenize", json={"tokens": "x"})
    assert wrong.status_code >= 400
    assert wrong.json()["error"]["message"]


def test_metrics_can_be_read_by_prometheus(served: Gateway) -> None:
    served.chat([user("one")])
    families = {each.name: each for each in
                text_string_to_metric_families(served.http.get("/metrics").text)}  # fmt: skip
    assert families["tokcache_gateway_requests"].samples[0].value >= 1
    assert families["tokcache_gateway_servers_up"].samples[0].value == 1
    assert all(each.documentation for each in families.values())


def test_without_a_server_each_path_says_so_in_its_own_form(tmp_path: Path) -> None:
    upstreams = [{"url": "http://127.0.0.1:1"}]
    with gateway(tmp_path, upstreams=upstreams, queue_timeout_s=0.2) as made:
        for path, body in BODIES.items():
            answer = made.http.post(path, json=body)
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
            assert error_of(answer, path)
        for path in ("/tokenize", "/detokenize", "/v1/embeddings", f"{MESSAGES}/count_tokens"):
            answer = made.http.post(path, json=BODIES[MESSAGES])
            assert answer.status_code == 503
            assert answer.json()["error"]["message"].startswith("no llama-server is up")
        assert made.http.get("/health").status_code == 503
        assert made.http.get("/v1/models").json()["data"] == []
