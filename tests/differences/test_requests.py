"""Requests of all APIs are read into one shape, compared, and turned into chat messages."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from tests.differences.random_edits import synthetic_chat, written
from tests.differences.real_cases import called, responses
from tokcache.differences import (
    DifferenceClass,
    classify,
    compare_requests,
    compare_session,
    parse_request,
    template_variables,
    to_chat,
)
from tokcache.differences.alignment import equal_runs
from tokcache.errors import InvalidRequest

ANTHROPIC: dict[str, Any] = {
    "model": "m",
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "messages": [
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Where?"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [
                {"type": "text", "text": "42"}]},
            {"type": "text", "text": "And now?"},
        ]},
    ],
}  # fmt: skip
CALL = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_a_request_of_anthropic_becomes_a_chat() -> None:
    messages, tools = to_chat(parse_request(ANTHROPIC))
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Where?",
         "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    function = {"name": "f", "description": "", "parameters": {"type": "object"}}
    assert tools == [{"type": "function", "function": function}]


def test_a_request_of_the_responses_api_becomes_a_chat() -> None:
    messages, tools = to_chat(parse_request(responses(*called("c1"))))
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "tool", "user"]
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == {"goal": "coast"}
    assert messages[3]["content"] == "06:15 platform 2"
    assert tools is None


def test_a_chat_keeps_its_fields_and_gets_plain_contents() -> None:
    body: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            {"role": "assistant", "content": None, "name": "n",
             "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        ],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    }  # fmt: skip
    request = parse_request(body)
    messages, _ = to_chat(request)
    assert messages[0]["content"] == "a\nb"
    assert messages[1]["name"] == "n"
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert template_variables(request) == {"enable_thinking": False, "reasoning_effort": "low"}
    assert body["messages"][0]["content"] != "a\nb"  # the caller's own request is unchanged


def test_marks_of_a_cache_are_no_difference() -> None:
    moved = {**ANTHROPIC, "system": "Be brief."}
    assert compare_requests(ANTHROPIC, moved).kind is DifferenceClass.SAME


def test_costs_are_those_of_the_equal_text_behind_the_difference() -> None:
    texts = "id 1\n" + "x" * 50 + "\n" + "y" * 30 + "\n", "id 2\n" + "x" * 50 + "\nnew\n" + "y" * 30
    found = classify(*texts)
    assert (found.kind, found.n_shared, found.n_lost) == (DifferenceClass.COUNTER, 3, 82)
    assert (found.before, found.after) == ("1", "2")


def test_tools_are_lost_with_the_system_text_that_templates_write_before_them() -> None:
    tools = [{"name": "f", "description": "d" * 100}]
    bodies = [
        {"messages": [{"role": "system", "content": f"Now: 12:0{n}. Be brief."}], "tools": tools}
        for n in (1, 2)
    ]
    found = compare_requests(*bodies)
    assert (found.kind, found.n_shared) == (DifferenceClass.DATE, 9)
    assert found.n_lost == len(". Be brief.") + len(parse_request(bodies[0]).tools[0].text)


def test_other_questions_are_not_called_edits() -> None:
    head = [{"role": "system", "content": "Be brief."}]
    one = [*head, {"role": "user", "content": "Where is the station?"}]
    other = [*head, {"role": "user", "content": "My hat is lost, who has it?"}]
    assert compare_requests(one, other).kind is DifferenceClass.OTHER_TEXT
    assert classify(written(one), written(other)).kind is DifferenceClass.OTHER_TEXT


def test_texts_stay_out_of_reprs() -> None:
    found = compare_requests({"prompt": "secret one"}, {"prompt": "secret two"})
    assert "secret" not in repr(found)
    assert "secret" not in repr(parse_request({"prompt": "secret one"}))


@pytest.mark.parametrize("n", [1, 40])
def test_equal_runs_are_equal_and_in_order(n: int) -> None:
    rng = random.Random(n)
    for _ in range(60):
        chat = written(synthetic_chat(rng, 3))[: rng.randint(0, 3000)]
        other = chat
        for _ in range(rng.randint(0, n)):
            at = rng.randint(0, len(other))
            other = (
                other[:at]
                + rng.choice(("", "x", "\n", "<|im_start|>"))
                + other[at + rng.randint(0, 9) :]
            )
        runs = equal_runs(chat, other)
        ends = (0, 0)
        for index, run in enumerate(runs):
            assert (
                chat[run.before : run.before + run.length]
                == other[run.after : run.after + run.length]
            )
            assert run.before >= ends[0]
            assert run.after >= ends[1]
            assert index == 0 or run.length
            ends = run.before + run.length, run.after + run.length


def test_long_and_repetitive_texts_take_time_in_proportion() -> None:
    """A comparison with a quadratic step takes minutes for these."""
    started = time.monotonic()
    lines = "".join(f"line {n}\n" for n in range(60_000))
    classify("1" + lines, "2" + lines[7:])
    classify("ab " * 100_000, "ba " * 100_000)
    classify("[" * 100_000 + "1", "[" * 100_000 + "2")
    classify("{" * 50_000 + '"', "{" * 50_000 + "'")
    messages = [{"role": "user", "content": f"go on {n % 7}"} for n in range(1_000)]
    compare_session([parse_request(messages[:n]) for n in range(970, 1_000)])
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "`messages` is empty"),
        (7, "not int"),
        ({"messages": "hi"}, "`messages` must be a list, not str"),
        ({"messages": [{"role": "user", "content": [7]}]}, "content[0] must be an object"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "tool_calls must be a list"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "tool_calls[0] must be"),
        ({"messages": [{"role": "user"}], "tools": [1]}, "tools[0] must be an object"),
        ({"input": 7}, "`input` must be a text or a list"),
        ({"input": ["a"]}, "input[0] must be an object"),
        ({"input": [{"type": 5}]}, "input[0].type must be a text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_that_cannot_be_read_is_named(body: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(body)
    assert message in str(caught.value)
