"""Messages become chat completions and their chunks become the events of a message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies

from tokcache.errors import ApiError
from tokcache.gateway.api.messages import MessageEvents, from_chat, to_chat
from tokcache.gateway.api.streams import ChatAnswer


def ask(**settings: Any) -> dict[str, Any]:
    return {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], **settings}


def test_a_tool_turn_is_a_call_and_a_message_of_the_tool() -> None:
    chat = to_chat(
        ask(
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "Look."}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "see", "input": {"at": "é"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1",
                     "content": [{"type": "text", "text": "a cat"}]},
                    {"type": "text", "text": "Well?"}]},
            ],
            tools=[{"name": "see", "description": "Sees.", "input_schema": {"type": "object"}}],
            tool_choice={"type": "any"},
            stop_sequences=["END"],
            thinking={"type": "enabled", "budget_tokens": 9},
        )
    )  # fmt: skip
    assert [message["role"] for message in chat["messages"]] == [
        "user", "assistant", "tool", "user",
    ]  # fmt: skip
    called = chat["messages"][1]
    assert called["reasoning_content"] == "Hm."
    assert called["tool_calls"][0]["function"] == {"name": "see", "arguments": '{"at":"é"}'}
    assert chat["messages"][2] == {"role": "tool", "tool_call_id": "t1", "content": "a cat"}
    assert chat["tools"][0]["function"]["parameters"] == {"type": "object"}
    assert (chat["tool_choice"], chat["stop"]) == ("required", ["END"])
    assert chat["chat_template_kwargs"] == {"enable_thinking": True}
    assert chat["thinking_budget_tokens"] == 9


def test_texts_are_joined_as_llama_server_joins_them() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = to_chat(
        ask(
            system=texts,
            messages=[
                {"role": "user", "content": texts},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": texts},
                    {"type": "tool_result", "tool_use_id": "t2", "content": [texts[0], image]}]},
            ],
            tool_choice={"type": "tool", "name": "see"},
        )
    )  # fmt: skip
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    assert [each["content"] for each in chat["messages"]] == ["ab", texts, "ab", [texts[0], shown]]
    assert chat["tool_choice"] == "required"


def test_only_the_nonce_of_a_billing_line_at_the_start_is_blanked() -> None:
    line = "x-anthropic-billing-header: cc_version=2.1; cch=%s;"
    texts = [
        to_chat(ask(system=line % nonce + "\nYou are."))["messages"][0]["content"]
        for nonce in ("a1b2", "ffff9")
    ]
    assert texts[0] == texts[1]
    assert "cc_version=2.1" in texts[0]
    kept = "You are. cch=a1b2 x-anthropic-billing-header: cch=a1b2"
    assert to_chat(ask(system=kept))["messages"][0]["content"] == kept


WRONG: list[dict[str, Any]] = [
    {"max_tokens": "5"}, {"messages": []}, {"messages": [{"role": "system", "content": "x"}]},
    {"messages": [{"role": "user", "content": 5}]}, {"system": 5},
    {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{
        "type": "image"}]}]}]},
    {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    {"tool_choice": {"type": "sometimes"}},
]  # fmt: skip


@pytest.mark.parametrize("settings", WRONG)
def test_a_member_that_can_not_be_translated_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        to_chat(ask(**settings))
    assert caught.value.status == 400


def chunk(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def call(index: int, **function: Any) -> dict[str, Any]:
    name = {"id": f"c{index}"} if "name" in function else {}
    return chunk(tool_calls=[{"index": index, "function": function, **name}])


PARTS = strategies.one_of(
    strategies.text(max_size=3).map(lambda text: chunk(content=text)),
    strategies.text(max_size=3).map(lambda text: chunk(reasoning_content=text)),
)


@given(strategies.lists(PARTS, max_size=12), strategies.integers(0, 3))
def test_events_put_together_equal_the_whole_message(
    parts: list[dict[str, Any]], n_calls: int
) -> None:
    for index in range(n_calls):
        parts = [*parts, call(index, name=f"f{index}", arguments=""),
                 call(index, arguments='{"a"'), call(index, arguments=f": {index}}}")]  # fmt: skip
    answer = ChatAnswer()
    events = MessageEvents(answer, "msg_1", "m")
    told = list(events.start())
    for part in parts:
        answer.feed(part)
        told += events.feed(part)
    answer.feed(
        {
            "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}],
            "timings": {"cache_n": 7, "prompt_n": 3, "predicted_n": 2, "prompt_ms": 1.5},
        }
    )
    told += events.end()  # fmt: skip
    blocks: dict[int, dict[str, Any]] = {}
    is_open = False
    for event in told:
        if event["type"] == "content_block_start":
            assert not is_open
            is_open = True
            assert event["index"] == len(blocks)
            blocks[event["index"]] = {**event["content_block"], "json": ""}
        elif event["type"] == "content_block_stop":
            is_open = False
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            if delta["type"] == "input_json_delta":
                block["json"] += delta["partial_json"]
            else:
                name = "text" if delta["type"] == "text_delta" else "thinking"
                block[name] += delta[name]
    assert not is_open
    whole = from_chat(answer, "msg_1", "m")
    kinds = {"text": "", "thinking": ""}
    for block in blocks.values():
        if block["type"] in kinds:
            kinds[block["type"]] += block[block["type"]]
    for block in whole["content"]:
        if block["type"] in kinds:
            assert kinds[block["type"]] == block[block["type"]]
    used = [json.loads(b["json"]) for b in blocks.values() if b["type"] == "tool_use"]
    assert used == [b["input"] for b in whole["content"] if b["type"] == "tool_use"]
    assert told[-1] == {"type": "message_stop"}
    assert told[-2]["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert told[-2]["usage"] == whole["usage"]
    assert whole["usage"]["input_tokens"] == 3
    assert whole["usage"]["cache_read_input_tokens"] == 7
