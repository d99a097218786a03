"""With the same history of the slot, answers with and without the gateway are the same."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import SYSTEM, gateway, httpx, upstream, user
from tokcache.gateway.config import GatewayConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOL = {"type": "object", "properties": {"word": {"type": "string"}}}
CALL = {"id": "t1", "type": "function", "function": {"name": "see", "arguments": '{"word": "cat"}'}}
# The beginning of each conversation, and the place of its turns.
APIS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": (
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                user("See 'cat'."),
                {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "t1", "content": "an animal"},
            ],
            "tools": [{"type": "function", "function": {"name": "see", "parameters": TOOL}}],
            "max_tokens": 8,
        },
        "messages",
    ),
    "/v1/completions": ({"prompt": f"{SYSTEM} Hello", "max_tokens": 8}, "prompt"),
    "/v1/responses": (
        {"instructions": SYSTEM, "input": [user("hello")], "max_output_tokens": 8},
        "input",
    ),
    "/v1/messages": (
        {
            "model": "any",
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=a1b2c;"},
                {"type": "text", "text": SYSTEM}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "See"},
                                             {"type": "text", "text": "'cat'."}]},
                {"role": "assistant", "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "see", "input": {"word": "cat"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "an animal"}]},
            ],
            "tools": [{"name": "see", "input_schema": TOOL}],
            "max_tokens": 8,
        },
        "messages",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Yield the URL of a bare server of one slot, and of a gateway in front of another."""
    folder = tmp_path_factory.mktemp("slots")
    with (
        upstream(folder / "bare", n_slots=1, n_ctx=4096) as bare,
        upstream(folder / "served", n_slots=1, n_ctx=4096) as process,
        gateway(tmp_path_factory.mktemp("own"), process) as served,
    ):
        yield bare.url, served.url


def text_of(answer: dict[str, Any]) -> str:
    if "output" in answer:
        return str(answer["output"][0]["content"][0]["text"])
    if "content" in answer:
        return "".join(block["text"] for block in answer["content"])
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def end_of(answer: dict[str, Any]) -> Any:
    if "choices" in answer:
        return answer["choices"][0]["finish_reason"]
    return answer.get("stop_reason") or answer["status"]


def usage_of(answer: dict[str, Any]) -> dict[str, int]:
    """Return the counts above 0: Anthropic's field for written tokens is optional."""
    found: dict[str, int] = {}
    for name, value in answer["usage"].items():
        found |= value if isinstance(value, dict) else {name: value}
    return {name: value for name, value in found.items() if value}


def streamed_text(url: str, path: str, body: dict[str, Any]) -> str:
    parts = []
    with httpx.stream("POST", f"{url}{path}", json={**body, "stream": True}, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            found = json.loads(line[6:])
            delta = found.get("delta")
            if isinstance(delta, str):  # of a response
                parts.append(delta)
            elif isinstance(delta, dict):  # of a message
                parts.append(delta.get("text", ""))
            for choice in found.get("choices", ()):
                told = choice.get("text") or choice.get("delta", {}).get("content")
                parts.append(told or "")
    return "".join(parts)


@pytest.mark.parametrize("path", APIS)
def test_each_turn_is_answered_as_without_the_gateway(urls: tuple[str, str], path: str) -> None:
    body, place = copy.deepcopy(APIS[path])
    body["temperature"] = 0
    for turn in range(3):
        bare, given = (httpx.post(f"{url}{path}", json=body, timeout=60).json() for url in urls)
        text = text_of(bare)
        assert text
        assert text_of(given) == text
        assert end_of(given) == end_of(bare)
        assert usage_of(given) == usage_of(bare)
        assert [streamed_text(url, path, body) for url in urls] == [text, text]
        used = usage_of(given)
        n_cached = used.get("cached_tokens", used.get("cache_read_input_tokens", 0))
        assert n_cached > 200 or turn == 0
        if place == "prompt":
            body["prompt"] += f"{text} and more"
        else:
            said = bare.get("output") or [{"role": "assistant", "content": text}]
            body[place] += [*said, user(f"number {turn}")]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_message_names_the_stop_sequence_as_the_server_does(
    tmp_path: Path, is_stream: bool
) -> None:
    body = {"model": "any", "messages": [user("Tell me about bears")], "max_tokens": 40,
            "temperature": 0, "stop_sequences": ["e"], "stream": is_stream}  # fmt: skip

    def told(answer: Any) -> Any:
        if not is_stream:
            return {name: answer.json()[name] for name in ("stop_reason", "stop_sequence")}
        lines = [line for line in answer.text.splitlines() if '"message_delta"' in line]
        return json.loads(lines[-1].removeprefix("data: "))["delta"]

    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        direct = told(httpx.post(f"{server.url}/v1/messages", json=body, trust_env=False))
        assert direct["stop_sequence"] == "e"
        answer = served.http.post("/v1/messages", json=body)
        assert told(answer) == direct
        assert "__verbose" not in answer.text


def test_a_verbose_answer_has_the_servers_members(tmp_path: Path) -> None:
    body = {"messages": [user("hi")], "max_tokens": 6, "temperature": 0, "verbose": True}
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        path = "/v1/chat/completions"
        direct = httpx.post(f"{server.url}{path}", json=body, trust_env=False).json()["__verbose"]
        ours = served.http.post(path, json=body).json()["__verbose"]
    for each in (direct, ours):
        del each["timings"], each["id_slot"]
    assert ours == direct


def test_every_setting_is_in_the_reference() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "configuration.md").read_text()
    for field in dataclasses.fields(GatewayConfig):
        assert f"`{field.name}`" in text, field.name
