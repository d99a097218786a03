"""Translates Anthropic's Messages API to chat completions and their answers back.

llama-server has /v1/messages, but ignores `id_slot` there (measured with xllamacpp 2026.10). For a
server that honours it, `MessageAnswer` reads the message that it streams itself.

A message is translated as llama-server does it, so that both render the same prompt, with these
differences: text after a tool result stays after it, thinking can be switched off, addresses of
images are refused, and `tool_choice` may be none.

Source: server_chat_convert_anthropic_to_oai in tools/server/server-chat.cpp of llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokcache.errors import ApiError
from tokcache.gateway.api.rules import blanked
from tokcache.gateway.api.streams import ChatAnswer, Counts, raise_error_in
from tokcache.gateway.routing.chain import canonical_message

_PASSED = ("model", "temperature", "top_p", "top_k", "stream", "max_tokens", "chat_template_kwargs")
_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def to_chat(body: dict[str, Any], *, is_counting: bool = False) -> dict[str, Any]:
    """Return a Messages request as a chat completion.

    Errors: ApiError 400 names the member that can't be translated.
    """
    if not isinstance(body.get("max_tokens"), int) and not is_counting:
        raise ApiError(400, "max_tokens: an integer is required")
    chat: dict[str, Any] = {name: body[name] for name in _PASSED if name in body}
    chat["messages"] = _system(body.get("system"))
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages: a list of at least one message is required")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise ApiError(400, f"messages.{position}: the role must be 'user' or 'assistant'")
        chat["messages"] += _message(message, f"messages.{position}")
    if body.get("tools"):
        chat["tools"] = [_tool(each) for each in body["tools"]]
    if body.get("tool_choice"):
        chat["tool_choice"] = _tool_choice(body["tool_choice"])
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    thinking = body.get("thinking")
    if isinstance(thinking, dict):
        is_on = thinking.get("type") != "disabled"
        chat.setdefault("chat_template_kwargs", {"enable_thinking": is_on})
        if is_on and isinstance(thinking.get("budget_tokens"), int):
            chat["thinking_budget_tokens"] = thinking["budget_tokens"]
    return chat


def _system(found: Any) -> list[dict[str, Any]]:
    if found is None:
        return []
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        # llama-server's own /v1/messages blanks the billing line too; it is a block of its own.
        texts = [blanked(str(each.get("text", ""))) for each in found]
        return [{"role": "system", "content": "".join(texts)}]
    if isinstance(found, str):
        return [{"role": "system", "content": blanked(found)}]
    raise ApiError(400, "system: a text or a list of text blocks is required")


def _message(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Return the chat messages of one message: tool results become messages of their own."""
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise ApiError(400, f"{place}.content: a text or a list of blocks is required")
    made: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    tool_calls: list[dict[str, Any]] = []
    for position, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        where = f"{place}.content.{position}"
        if kind == "text":
            parts.append({"type": "text", "text": str(block.get("text", ""))})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image(block, where)}})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            given = block.get("input") or {}
            arguments = json.dumps(given, ensure_ascii=False, separators=(",", ":"))
            function = {"name": str(block.get("name", "")), "arguments": arguments}
            call = {"id": str(block.get("id", "")), "type": "function", "function": function}
            tool_calls.append(call)
        elif kind == "tool_result":
            result = {"role": "tool", "tool_call_id": str(block.get("tool_use_id", ""))}
            made.append({**result, "content": _result(block.get("content"), where)})
        elif kind != "redacted_thinking":  # nobody but Anthropic can read those
            raise ApiError(400, f"{where}: blocks of type {kind!r} can't be translated")
    if not (parts or thoughts or tool_calls):
        return made
    rest: dict[str, Any] = {"role": role, "content": _joined(parts)}
    if thoughts:
        rest["reasoning_content"] = "".join(thoughts)
    if tool_calls:
        rest["tool_calls"] = tool_calls
    return [*made, rest]


def _joined(parts: list[dict[str, Any]]) -> Any:
    """Return the content of a message: templates may render a list of several in their own way."""
    if len(parts) > 1 or any(part["type"] != "text" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _image(block: dict[str, Any], place: str) -> str:
    source = block.get("source")
    if isinstance(source, dict) and source.get("type") == "base64":
        return f"data:{source.get('media_type', 'image/jpeg')};base64,{source.get('data', '')}"
    # A URL would have the llama-server fetch it.
    raise ApiError(400, f"{place}.source: only images of type base64 are accepted")


def _result(content: Any, place: str) -> Any:
    if content is None or isinstance(content, str):
        return content or ""
    parts: list[dict[str, Any]] = []
    for each in content if isinstance(content, list) else [content]:
        kind = each.get("type") if isinstance(each, dict) else None
        if kind == "text":
            parts.append({"type": "text", "text": str(each.get("text", ""))})
        elif kind == "image":
            parts.append({"type": "image_url", "image_url": {"url": _image(each, place)}})
        else:
            raise ApiError(
                400, f"{place}.content: only text and images are accepted in a tool result"
            )
    if any(part["type"] != "text" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _tool(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("input_schema"), dict):
        raise ApiError(
            400, "tools: each needs a name and an input_schema; server tools are not run"
        )
    function = {
        "name": found.get("name"),
        "description": found.get("description") or "",
        "parameters": found["input_schema"],
    }
    return {"type": "function", "function": function}


def _tool_choice(found: Any) -> str:
    """Return the choice; llama-server can require a tool, but not one by name."""
    kind = found.get("type") if isinstance(found, dict) else None
    if kind not in ("auto", "any", "none", "tool"):
        raise ApiError(400, f"tool_choice: the type {kind!r} is unknown")
    return "required" if kind in ("any", "tool") else kind


def from_chat(answer: ChatAnswer, message_id: str, model: str) -> dict[str, Any]:
    """Return a chat completion as a message."""
    message = answer.message()
    blocks: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        thinking = {"type": "thinking", "thinking": message["reasoning_content"], "signature": ""}
        blocks.append(thinking)
    if message["content"]:
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], _input(call["function"]["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": arguments})
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_reason": _stop_reason(answer),
        "stop_sequence": None,
        "usage": usage(answer),
    }


def usage(answer: ChatAnswer) -> dict[str, int]:
    """Return the counts of an answer; `input_tokens` leaves out those that were cached."""
    counts = answer.counts
    if counts is None:
        return {"input_tokens": 0, "output_tokens": 0}
    return {
        "input_tokens": counts.n_prompt - counts.n_cached,
        "cache_read_input_tokens": counts.n_cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": counts.n_predicted,
    }


def _stop_reason(answer: ChatAnswer) -> str:
    return _STOPS.get(answer.finish_reason or "stop", "end_turn")


def _input(arguments: str) -> Any:
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}


class MessageEvents:
    """Turns the chunks of a chat completion into the events of a streamed message.

    The counts are known at the end of an answer; `message_delta` reports them all.
    """

    def __init__(self, answer: ChatAnswer, message_id: str, model: str) -> None:
        self._answer = answer
        self._id = message_id
        self._model = model
        self._index = -1
        self._open: tuple[str, int] | None = None

    def start(self) -> Iterator[dict[str, Any]]:
        """Yield the first event."""
        message = from_chat(ChatAnswer(), self._id, self._model)
        yield {"type": "message_start", "message": {**message, "stop_reason": None}}

    def feed(self, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a chunk; `answer` has taken it before."""
        for choice in found.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("reasoning_content"):
                yield from self._opened("thinking", 0, {"thinking": "", "signature": ""})
                part = {"type": "thinking_delta", "thinking": delta["reasoning_content"]}
                yield self._delta(part)
            if delta.get("content"):
                yield from self._opened("text", 0, {"text": ""})
                yield self._delta({"type": "text_delta", "text": delta["content"]})
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                block = {"id": call.get("id"), "name": function.get("name"), "input": {}}
                yield from self._opened("tool_use", int(call.get("index") or 0), block)
                if function.get("arguments"):
                    part = {"type": "input_json_delta", "partial_json": function["arguments"]}
                    yield self._delta(part)

    def end(self) -> Iterator[dict[str, Any]]:
        """Yield the last events."""
        yield from self._closed()
        delta = {"stop_reason": _stop_reason(self._answer), "stop_sequence": None}
        yield {"type": "message_delta", "delta": delta, "usage": usage(self._answer)}
        yield {"type": "message_stop"}

    def _opened(self, kind: str, number: int, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._open == (kind, number):
            return
        yield from self._closed()
        self._open = (kind, number)
        self._index += 1
        block = {"type": kind, **block}
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _closed(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": part}


class MessageAnswer:
    """A message that llama-server's own /v1/messages streams, put together from its events.

    Units: the counts are in tokens; the stream has no times.
    """

    def __init__(self) -> None:
        self.counts: Counts | None = None
        self._message: dict[str, Any] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._arguments: dict[int, str] = {}

    def feed(self, found: dict[str, Any]) -> None:
        """Add the JSON object of an event."""
        raise_error_in(found)
        kind = found.get("type")
        if kind == "message_start":
            self._message = found["message"]
        elif kind == "content_block_start":
            self._blocks[int(found["index"])] = dict(found["content_block"])
        elif kind == "content_block_delta":
            self._feed_delta(int(found["index"]), found["delta"])
        elif kind == "message_delta":
            counted = {**self._message.get("usage", {}), **found["usage"]}
            self._message = {**self._message, **found["delta"], "usage": counted}
            n_cached = int(counted.get("cache_read_input_tokens", 0))
            n_decoded, n_predicted = int(counted["input_tokens"]), int(counted["output_tokens"])
            if min(n_cached, n_decoded, n_predicted) >= 0:
                self.counts = Counts(n_cached + n_decoded, n_cached, n_predicted, 0.0)

    def _feed_delta(self, index: int, delta: dict[str, Any]) -> None:
        block, kind = self._blocks[index], delta["type"]
        if kind == "input_json_delta":
            self._arguments[index] = self._arguments.get(index, "") + delta["partial_json"]
            return
        name = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
        block[name[kind]] = block.get(name[kind], "") + delta[name[kind]]

    def body(self) -> dict[str, Any]:
        """Return the whole message."""
        for index, arguments in self._arguments.items():
            self._blocks[index]["input"] = _input(arguments)
        return {**self._message, "content": [block for _, block in sorted(self._blocks.items())]}

    def element(self) -> str | None:
        """Return the message as the next request of the conversation has it, in canonical form.

        None if a block has no translation: the next request is refused then, too.
        """
        try:
            made = _message({"role": "assistant", "content": self.body()["content"]}, "answer")
        except ApiError:
            return None
        return "".join(map(canonical_message, made))
