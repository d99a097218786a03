"""Reads llama-server's streams: whole answers for clients that do not stream, and the counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tokcache.errors import ApiError
from tokcache.gateway.api.errors import upstream_error
from tokcache.gateway.routing.chain import canonical_item, canonical_message

_MAX_CALLS = 1024


@dataclass(frozen=True, slots=True)
class Counts:
    """The tokens of one answer, and the seconds of decoding the part that was not reused."""

    n_prompt: int
    n_cached: int
    n_predicted: int
    prompt_s: float

    @classmethod
    def read(cls, timings: Any) -> Counts | None:
        """Return the counts of llama-server's timings, None if they make no sense."""
        try:
            n_cached, n_decoded = int(timings["cache_n"]), int(timings["prompt_n"])
            n_predicted, prompt_s = int(timings["predicted_n"]), float(timings["prompt_ms"]) / 1e3
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        if min(n_cached, n_decoded, n_predicted) < 0:
            return None
        return cls(n_cached + n_decoded, n_cached, n_predicted, prompt_s)


class Answer(Protocol):
    """An answer that is put together from the events of a stream."""

    counts: Counts | None

    def feed(self, found: dict[str, Any]) -> None:
        """Add the JSON object of an event."""

    def body(self) -> dict[str, Any]:
        """Return the whole answer as the API returns it without streaming."""

    def element(self) -> str | None:
        """Return the answer as the element that continues the request's chain, None if unknown."""


class ChatAnswer:
    """A chat completion."""

    def __init__(self) -> None:
        self.counts: Counts | None = None
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self._first: dict[str, Any] = {}
        self._timings: Any = None
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[Any] = []

    def feed(self, found: dict[str, Any]) -> None:
        """Add a chunk."""
        raise_error_in(found)
        self._first = self._first or found
        for choice in found.get("choices") or ():
            delta = choice.get("delta") or {}
            self._texts.append(_text(delta, "content"))
            self._thoughts.append(_text(delta, "reasoning_content"))
            for part in delta.get("tool_calls") or ():
                self._feed_call(part)
            self._logprobs += (choice.get("logprobs") or {}).get("content") or ()
            self.finish_reason = _text(choice, "finish_reason") or self.finish_reason
        self.usage = found.get("usage") or self.usage
        # With `timings_per_token` every chunk has times; only those after the end are the answer's.
        if found.get("timings") and self.finish_reason:
            self._timings = found["timings"]
            self.counts = Counts.read(self._timings)

    def _feed_call(self, part: dict[str, Any]) -> None:
        index = int(part.get("index") or 0)
        if len(self._calls) >= _MAX_CALLS and index not in self._calls:
            raise ApiError(502, "the llama-server answered with too many tool calls")
        call = self._calls.setdefault(
            index, {"type": "function", "function": {"name": "", "arguments": ""}}
        )
        given = part.get("function") or {}
        call["id"] = _text(part, "id") or call.get("id", "")
        call["function"]["name"] += _text(given, "name")
        call["function"]["arguments"] += _text(given, "arguments")

    def message(self) -> dict[str, Any]:
        """Return the assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._texts)}
        if any(self._thoughts):
            message["reasoning_content"] = "".join(self._thoughts)
        if self._calls:
            message["tool_calls"] = [call for _, call in sorted(self._calls.items())]
        return message

    def body(self) -> dict[str, Any]:
        """Return the chat completion."""
        choice: dict[str, Any] = {
            "finish_reason": self.finish_reason,
            "index": 0,
            "message": self.message(),
        }
        if self._logprobs:
            choice["logprobs"] = {"content": self._logprobs}
        members = {name: self._first.get(name) for name in ("created", "model", "id")}
        members["system_fingerprint"] = self._first.get("system_fingerprint")
        return {
            "choices": [choice],
            **members,
            "object": "chat.completion",
            "usage": self.usage or usage_of(self.counts),
            "timings": self._timings,
        }

    def element(self) -> str:
        """Return the assistant's message in canonical form."""
        return canonical_message(self.message())


class TextAnswer:
    """A completion."""

    def __init__(self) -> None:
        self.counts: Counts | None = None
        self._last: dict[str, Any] = {}
        self._texts: list[str] = []
        self._logprobs: list[Any] = []
        self._finish_reason: str | None = None

    def feed(self, found: dict[str, Any]) -> None:
        """Add a chunk."""
        raise_error_in(found)
        for choice in found.get("choices") or ():
            self._texts.append(_text(choice, "text"))
            self._finish_reason = _text(choice, "finish_reason") or self._finish_reason
            self._logprobs += (choice.get("logprobs") or {}).get("content") or ()
        self._last = {**self._last, **found}
        if self._finish_reason:
            self.counts = Counts.read(found.get("timings")) or self.counts

    def body(self) -> dict[str, Any]:
        """Return the completion."""
        choice = {
            "text": "".join(self._texts),
            "index": 0,
            "logprobs": {"content": self._logprobs} if self._logprobs else None,
            "finish_reason": self._finish_reason,
        }
        usage = self._last.get("usage") or usage_of(self.counts)
        return {**self._last, "choices": [choice], "usage": usage}

    def element(self) -> str:
        """Return the text."""
        return "".join(self._texts)


class ResponsesAnswer:
    """A response; its last event holds all of it."""

    def __init__(self) -> None:
        self.counts: Counts | None = None
        self._response: dict[str, Any] = {}

    def feed(self, found: dict[str, Any]) -> None:
        """Add an event."""
        raise_error_in(found)
        if isinstance(found.get("response"), dict):
            self._response = found["response"]
            self.counts = Counts.read(found.get("timings")) or self.counts

    def body(self) -> dict[str, Any]:
        """Return the response, with the time that llama-server's streams leave out."""
        return {"completed_at": int(time.time()), **self._response}

    def element(self) -> str:
        """Return the output items in canonical form."""
        output = self._response.get("output") or ()
        return "".join(canonical_item(each) for each in output if isinstance(each, dict))


def raise_error_in(found: Mapping[str, Any]) -> None:
    """Raise the error that an event of a stream reports."""
    if found.get("error"):
        error = found["error"]
        code = error.get("code") if isinstance(error, dict) else None
        raise upstream_error(code if isinstance(code, int) else 500, found)


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(name)
    return value or ""


def usage_of(counts: Counts | None) -> dict[str, Any]:
    """Return counts as the usage of a chat completion."""
    if counts is None:
        return {}
    return {
        "completion_tokens": counts.n_predicted,
        "prompt_tokens": counts.n_prompt,
        "total_tokens": counts.n_prompt + counts.n_predicted,
        "prompt_tokens_details": {"cached_tokens": counts.n_cached},
    }
