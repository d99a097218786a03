"""The clients that people use see their answers and cached tokens, streaming and not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import SYSTEM, Gateway

openai = pytest.importorskip("openai", reason="needs tokcache[test]")
anthropic = pytest.importorskip("anthropic", reason="needs tokcache[test]")

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOLS = [
    {
        "name": "look_up",
        "description": "Look up a word.",
        "input_schema": {"type": "object", "properties": {"word": {"type": "string"}}},
    }
]


@pytest.fixture
def openai_client(served: Gateway) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic_client(served: Gateway) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0) as client:
        yield client


def test_openai_chat_sees_cached_tokens(openai_client: Any) -> None:
    asked: Any = {
        "model": "any",
        "messages": [{"role": "system", "content": f"openai. {SYSTEM}"},
                     {"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 0,
    }  # fmt: skip
    first = openai_client.chat.completions.create(**asked)
    assert first.usage.prompt_tokens > 200
    asked["messages"] += [first.choices[0].message, {"role": "user", "content": "more"}]
    second = openai_client.chat.completions.create(**asked)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 4
    options = {"include_usage": True}
    chunks = list(
        openai_client.chat.completions.create(**asked, stream=True, stream_options=options)
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == second.choices[0].message.content
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 200
    plain = list(openai_client.chat.completions.create(**asked, stream=True))
    assert all(chunk.usage is None for chunk in plain)


def test_openai_async(served: Gateway) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="any", max_retries=0
        ) as client:
            messages = [{"role": "system", "content": f"async. {SYSTEM}"}]
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="any",
                        messages=[*messages, {"role": "user", "content": f"number {number}"}],
                        max_tokens=4,
                    )
                    for number in range(6)
                )
            )

    answers = asyncio.run(ask())
    n_cached = [a.usage.prompt_tokens_details.cached_tokens for a in answers]
    # One decodes the system prompt; the others wait for it and use its state.
    assert sum(n < 200 for n in n_cached) == 1, n_cached


def test_openai_responses_and_completions(openai_client: Any) -> None:
    asked: Any = {"model": "any", "instructions": f"responses. {SYSTEM}", "input": "hi",
                  "max_output_tokens": 5}  # fmt: skip
    openai_client.responses.create(**asked)
    second = openai_client.responses.create(**asked)
    assert second.usage.input_tokens_details.cached_tokens > 200
    events = list(openai_client.responses.create(**asked, stream=True))
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage.input_tokens_details.cached_tokens > 200
    text = openai_client.completions.create(model="any", prompt="def add(" * 40, max_tokens=4)
    assert text.choices[0].finish_reason == "length"
    assert [model.object for model in openai_client.models.list()] == ["model"]


def test_openai_sees_errors_as_its_own(openai_client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="n must be 1"):
        openai_client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "x"}], n=2
        )
    content = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    with pytest.raises(openai.BadRequestError, match="not an address"):
        openai_client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": content}]
        )


def test_anthropic_messages_see_cached_tokens(anthropic_client: Any) -> None:
    asked: Any = {
        "model": "any",
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=a1b2c;"},
            {"type": "text", "text": SYSTEM},
        ],
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "extra_body": {"temperature": 0},
        "tools": TOOLS,
    }
    first = anthropic_client.messages.create(**asked)
    assert first.usage.input_tokens > 200
    assert first.stop_reason == "max_tokens"
    asked["system"][0]["text"] = "x-anthropic-billing-header: cc_version=1; cch=ffff0;"
    n_counted = anthropic_client.messages.count_tokens(
        **{name: asked[name] for name in ("model", "system", "messages", "tools")}
    ).input_tokens
    assert n_counted == first.usage.input_tokens
    second = anthropic_client.messages.create(**asked)
    assert second.usage.cache_read_input_tokens == n_counted - 1
    assert second.usage.input_tokens == 1
    with anthropic_client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == second.content[0].text
    assert final.usage.output_tokens == 5
    assert final.usage.cache_read_input_tokens == n_counted - 1


def test_anthropic_tool_turns_are_rendered(anthropic_client: Any) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Look up 'cat'."}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "I should look.", "signature": ""},
            {"type": "tool_use", "id": "t1", "name": "look_up", "input": {"word": "cat"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "an animal"}]},
    ]  # fmt: skip
    answer = anthropic_client.messages.create(
        model="any", max_tokens=4, tools=TOOLS, messages=messages
    )
    assert answer.usage.output_tokens == 4


def test_anthropic_sees_errors_as_its_own(anthropic_client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="can't be translated"):
        anthropic_client.messages.create(
            model="any", max_tokens=4,
            messages=[{"role": "user", "content": [{"type": "strange"}]}],
        )  # fmt: skip
