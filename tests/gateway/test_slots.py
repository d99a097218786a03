"""Conversations keep their prefixes over side requests, restarts and slots given away."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import SYSTEM, Gateway, cached, gateway, system, upstream, user

if TYPE_CHECKING:
    from pathlib import Path


def talk(served: Gateway, name: str, n_turns: int) -> list[dict[str, Any]]:
    """Hold a conversation and return its messages."""
    messages = [system(f"{name}. {SYSTEM}")]
    for number in range(n_turns):
        messages.append(user(f"Question {number} of {name}"))
        answer = served.chat(messages)
        messages.append(answer["choices"][0]["message"])
        if number:
            assert cached(answer) > 200, answer["tokcache"]
    return messages


def test_side_requests_leave_a_conversation_its_slot(tmp_path: Path) -> None:
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        messages = talk(served, "main", 2)
        for number in range(4):
            served.chat([user(f"Write a title for chat {number}")])
        answer = served.chat([*messages, user("Go on")])
        assert answer["tokcache"]["plan"] == "slot"
        assert cached(answer) > 250
        assert served.service.router.counts["save"] == 0


def test_more_conversations_than_slots_are_saved_and_restored(tmp_path: Path) -> None:
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        chats = [talk(served, f"chat {number}", 2) for number in range(4)]
        for messages in chats:
            answer = served.chat([*messages, user("Go on")])
            assert cached(answer) > 250, answer["tokcache"]
        assert served.service.router.counts["restore"] >= 2
        assert answer["headers"]["x-tokcache-plan"] == answer["tokcache"]["plan"]


def test_a_slot_is_saved_in_idle_time_and_the_next_request_need_not_wait(tmp_path: Path) -> None:
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        chats = [talk(served, f"chat {number}", 2) for number in range(3)]
        counts = served.service.router.counts
        assert counts["save"] == 1  # the first lost its slot to the third
        deadline = time.monotonic() + 20
        while not served.service.counts["idle_save"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert counts["save"] == 2
        served.wait_until_idle()
        new = served.chat([system(f"chat 3. {SYSTEM}"), user("hi")])
        assert new["tokcache"]["plan"] == "none"
        assert counts["save"] == 2
        for messages in chats:
            assert cached(served.chat([*messages, user("Go on")])) > 250


def test_a_shared_system_prompt_is_copied_and_the_first_chat_stays(tmp_path: Path) -> None:
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        first = served.chat([system(), user("first")])
        second = served.chat([system(), user("second")])
        assert second["tokcache"]["plan"] == "file"
        assert cached(second) > 200
        again = served.chat([system(), user("first"), first["choices"][0]["message"], user("x")])
        assert again["tokcache"]["plan"] == "slot"
        assert cached(again) > 200


def test_restarts_of_gateway_and_server_keep_the_conversations(tmp_path: Path) -> None:
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        chats = [talk(served, f"chat {number}", 2) for number in range(2)]
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        for messages in chats:
            answer = served.chat([*messages, user("Go on")])
            assert answer["tokcache"]["plan"] == "file"
            assert cached(answer) > 250


def test_files_of_another_model_are_not_restored(tmp_path: Path) -> None:
    from tokcache import samples  # noqa: PLC0415

    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        messages = talk(served, "main", 2)
    other = samples.tiny_model(architecture="gemma3")
    with (
        upstream(tmp_path / "slots", model=other) as server,
        gateway(tmp_path / "own", server) as served,
    ):
        answer = served.chat([*messages, user("Go on")])
        assert answer["tokcache"]["plan"] == "none"
        assert cached(answer) == 0
    with upstream(tmp_path / "slots") as server, gateway(tmp_path / "own", server) as served:
        assert cached(served.chat([*messages, user("Go on")])) > 250  # swapped back


@pytest.mark.parametrize("architecture", ["gemma3", "mamba2", "lfm2"])
def test_other_memories_keep_their_prefixes_too(tmp_path: Path, architecture: str) -> None:
    from tokcache import samples  # noqa: PLC0415

    model = samples.tiny_model(architecture=architecture)
    with (
        upstream(tmp_path / "slots", model=model) as server,
        gateway(tmp_path / "own", server) as served,
    ):
        chats = [talk(served, f"chat {number}", 2) for number in range(3)]
        for messages in chats:
            assert cached(served.chat([*messages, user("Go on")])) > 200


def test_a_killed_server_is_noticed_and_its_conversations_restored(tmp_path: Path) -> None:
    from tokcache import samples  # noqa: PLC0415

    settings = {"model": str(samples.tiny_model()), "n_slots": 2, "n_ctx": 2048, "n_threads": 1}
    with gateway(tmp_path, **settings) as served:
        chats = [talk(served, f"chat {number}", 2) for number in range(3)]
        managed = served.service.managed
        assert managed is not None
        assert managed._server is not None
        managed._server.kill()
        deadline = time.monotonic() + 60
        while served.http.get("/health").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        while served.http.get("/health").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        # The first was saved when the third got its slot; the others were lost with the server.
        answer = served.chat([*chats[0], user("Go on")])
        assert answer["tokcache"]["plan"] == "file"
        assert cached(answer) > 200
        assert cached(served.chat([*chats[2], user("Go on")])) == 0
        assert served.service.counts["server_crash"] == 1


def test_the_queue_is_bounded_and_says_when_to_come_back(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots", n_slots=1) as server,
        gateway(tmp_path / "own", server, max_queue=1, queue_timeout_s=0.5) as served,
    ):
        body = {"messages": [user("count")], "max_tokens": 600, "ignore_eos": True}
        found: list[Any] = []

        def ask() -> None:
            found.append(served.http.post("/v1/chat/completions", json=body))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        by_status = {answer.status_code: answer for answer in found}
        assert set(by_status) <= {200, 429}
        assert int(by_status[429].headers["retry-after"]) >= 1
        assert by_status[429].json()["error"]["type"] == "rate_limit_error"
        served.wait_until_idle()
        assert served.chat([user("hi")])
