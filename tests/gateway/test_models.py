"""Two llama-servers with different models: a request goes to the one that has its model."""

from __future__ import annotations

import shutil
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import Gateway, gateway, upstream, user
from tokcache import samples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(samples.tiny_model(), folder / "one.gguf")
    shutil.copy(samples.tiny_model(seed=3), folder / "two.gguf")
    with (
        upstream(folder / "a", model=folder / "one.gguf") as one,
        upstream(folder / "b", model=folder / "two.gguf") as two,
        gateway(folder / "own", one, two) as made,
    ):
        yield made


def test_each_model_answers_its_own_requests(served: Gateway) -> None:
    listed = {each["id"] for each in served.http.get("/v1/models").json()["data"]}
    assert listed == {"one.gguf", "two.gguf"}
    texts = {}
    for model in sorted(listed):
        for _ in range(2):
            answer = served.chat([user("Count to ten. " * 20)], model=model)
            assert answer["model"].endswith(model)
        assert answer["tokcache"]["cached_tokens"] > 50
        texts[model] = answer["choices"][0]["message"]["content"]
    assert texts["one.gguf"] != texts["two.gguf"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize"])
@pytest.mark.parametrize("model", ["three", [], {}, 3, None], ids=str)
def test_another_model_is_refused_with_the_names_of_those_served(
    served: Gateway, path: str, model: Any
) -> None:
    body = {"model": model, "messages": [user("hi")], "max_tokens": 2, "content": "x"}
    answer = served.http.post(path, json=body)
    assert answer.status_code == 404
    assert "one.gguf, two.gguf" in answer.json()["error"]["message"]
    assert (answer.json().get("type") == "error") == (path == "/v1/messages")
    assert served.chat([user("hi")], model="one.gguf")


def test_a_server_that_never_answers_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # it does not listen: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with gateway(tmp_path, upstreams=[{"url": url}]) as made:
            upstream = made.service.upstreams[url]
            n_looks = 0
            look = upstream.look

            async def counted(*args: Any) -> Any:
                nonlocal n_looks
                n_looks += 1
                return await look(*args)

            upstream.look = counted  # type: ignore[method-assign, assignment]
            deadline = time.monotonic() + 20
            while n_looks < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert n_looks >= 3
    assert sum("is down" in record.getMessage() for record in caplog.records) == 1
