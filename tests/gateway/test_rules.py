"""Opt-in rules keep prefixes that a nonce, a clock or the order of tools would end."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import SYSTEM, Gateway, cached, gateway, system, upstream, user
from tokcache.errors import InvalidConfig
from tokcache.gateway.api.rules import RULES, apply, suggested
from tokcache.gateway.config import load

if TYPE_CHECKING:
    from pathlib import Path


def body(first: str, **settings: Any) -> dict[str, Any]:
    return {"messages": [system(first), user("hi")], **settings}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def test_a_clock_moves_to_the_last_user_message() -> None:
    texts = [f"You help.\nCurrent date and time: {t}\nBe brief." for t in ("2026-01-02 10:11",
             "2026-01-03 09:00")]  # fmt: skip
    after = [apply(body(text), ["move_clock"]) for text in texts]
    assert after[0][0]["messages"][0] == after[1][0]["messages"][0]
    assert after[0][0]["messages"][0]["content"] == "You help.\nBe brief."
    assert after[0][0]["messages"][1]["content"].endswith("time: 2026-01-02 10:11")
    assert after[0][1] == ["move_clock"]


def test_a_clock_moves_after_the_parts_of_a_message() -> None:
    parts = [{"type": "text", "text": "hi"}]
    asked = {"messages": [system("Today is 2026-01-02.\nHelp."), {**user(""), "content": parts}]}
    content = apply(asked, ["move_clock"])[0]["messages"][1]["content"]
    assert content == [*parts, {"type": "text", "text": "Today is 2026-01-02."}]


@pytest.mark.parametrize(
    "text",
    ["You help. Be on time. The date format is YYYY-MM-DD.", "Version 2026-01-02", "", "at 10:11"],
)
def test_other_text_is_left_alone(text: str) -> None:
    asked = body(text, tools=[tool("a"), tool("b")])
    assert apply(asked, RULES) == (asked, [])
    assert suggested(asked) == []


@pytest.mark.parametrize(
    "asked",
    [{}, {"messages": 3}, {"messages": [3]}, {"messages": [{"role": "system", "content": 5}]},
     {"tools": 5}, {"tools": [5]}, {"messages": [], "tools": [{}, {"function": 3}]}],
)  # fmt: skip
def test_bodies_of_another_form_pass_as_they_are(asked: dict[str, Any]) -> None:
    apply(asked, RULES)
    suggested(asked)


def test_rules_are_named_in_a_header_and_without_them_counted(tmp_path: Path) -> None:
    line = "x-anthropic-billing-header: cc_version=1; cch=%s;\n"

    def ask(served: Gateway, nonce: str, order: str) -> Any:
        tools = [tool(name) for name in order]
        return served.chat([system(line % nonce + SYSTEM), user("hi")], tools=tools)

    with upstream(tmp_path / "slots") as server:
        with gateway(tmp_path / "one", server) as served:
            plain = [ask(served, "a1", "ab"), ask(served, "b2", "ba")]
            assert all("x-tokcache-rules" not in each["headers"] for each in plain)
            assert cached(plain[1]) < 200
            assert 'reason="volatile_blank_nonce"} 2' in served.http.get("/metrics").text
        given = ["blank_nonce", "sort_tools"]
        with gateway(tmp_path / "two", server, rules=given) as served:
            ruled = [ask(served, "a1", "ab"), ask(served, "b2", "ba")]
            assert ruled[1]["headers"]["x-tokcache-rules"] == "blank_nonce,sort_tools"
            assert cached(ruled[1]) > 200
    with pytest.raises(InvalidConfig, match="move_clock"):
        load(None, {"upstreams": ["http://127.0.0.1:1"], "rules": ["x"]}, {})


def test_a_page_of_an_allowed_origin_may_read_the_headers(tmp_path: Path) -> None:
    origin = "http://page.test"
    settings = {"rules": ["sort_tools"], "allowed_origins": [origin], "max_queue": 1}
    with (
        upstream(tmp_path / "slots", n_slots=1) as server,
        gateway(tmp_path / "own", server, **settings) as served,
    ):
        asked = {"tools": [tool("b"), tool("a")], "headers": {"origin": origin}}
        headers = served.chat([user("hi")], **asked)["headers"]
        assert headers["access-control-allow-origin"] == origin
        exposed = set(headers["access-control-expose-headers"].split(", "))
        told = {name for name in headers if name.startswith("x-tokcache-")}
        assert told | {"retry-after"} <= exposed
        assert "x-tokcache-rules" in told


def test_warm_prompts_are_held_before_the_first_request(tmp_path: Path) -> None:
    folder = tmp_path / "warm"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"messages": [system()]}))
    (folder / "broken.json").write_text("{")
    deadline = time.monotonic() + 60
    with (
        upstream(tmp_path / "slots") as server,
        gateway(tmp_path / "own", server, warm_folder=str(folder)) as served,
    ):
        while served.service.counts.total() < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert served.service.counts["warmed"] == 1
        assert served.service.counts["warm_failed"] == 1
        served.wait_until_idle()
        assert cached(served.chat([system(), user("hello")])) > 200
    with (
        upstream(tmp_path / "slots") as server,
        gateway(tmp_path / "own", server, warm_folder=str(folder)) as served,
    ):
        while not served.service.counts["warm_failed"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert served.service.counts["warmed"] == 0
        assert cached(served.chat([system(), user("another")])) > 200
