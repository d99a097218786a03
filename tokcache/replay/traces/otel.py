"""Spans of OpenTelemetry's conventions for generative AI.

A record is a span with `attributes`, or a batch of OTLP/JSON (`resourceSpans`). Applications record
messages only if they opt in; without them a span has only counts of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokcache.errors import Malformed
from tokcache.replay.traces.chats import conversation
from tokcache.replay.traces.request import Request

name = "otel"
about = "OpenTelemetry spans of generative AI"
_MODEL_CALLS = ("chat", "text_completion", "generate_content")  # a foreign value may be a list


def matches(value: Any) -> bool:
    """Return whether a record is a span or a batch of spans."""
    if not isinstance(value, dict):
        return False
    if "resourceSpans" in value or "resource_spans" in value:
        return True
    return "attributes" in value and ("name" in value or "spanId" in value)


def requests(value: Any) -> Iterable[Request]:
    """Return the requests of the spans that call a model; there may be none."""
    if not matches(value):
        raise Malformed("it is neither a span nor a batch of spans")
    for span in _spans(value):
        found = _attributes(span.get("attributes"))
        operation = found.get("gen_ai.operation.name")
        n_tokens = found.get("gen_ai.usage.input_tokens", found.get("gen_ai.usage.prompt_tokens"))
        messages = _json(found.get("gen_ai.input.messages"))
        if operation not in _MODEL_CALLS and n_tokens is None and messages is None:
            continue
        count = _count(n_tokens)
        if messages is None:
            yield Request(n_tokens=count)
            continue
        system = _json(found.get("gen_ai.system_instructions"))
        if not isinstance(messages, list):
            raise Malformed("its gen_ai.input.messages are no list")
        with_content = [
            {**one, "content": one["parts"]} if isinstance(one, dict) and "parts" in one else one
            for one in messages
        ]
        made = conversation(with_content, system=system)
        yield Request(
            messages=made.messages,
            tools=conversation([], tools=_json(found.get("gen_ai.tool.definitions"))).tools,
            n_tokens=count,
            n_left_out=made.n_left_out,
        )


def _count(found: Any) -> int | None:
    """Return a number of tokens, which OTLP writes as a text; None where there is none."""
    try:
        return int(found) if isinstance(found, int | float | str) else None
    except (ValueError, OverflowError):
        raise Malformed("its number of tokens is no number") from None


def _spans(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    batches = value.get("resourceSpans", value.get("resource_spans"))
    if batches is None:
        yield value
        return
    try:
        for batch in batches:
            for scope in batch.get("scopeSpans", batch.get("scope_spans", ())):
                yield from scope.get("spans", ())
    except (AttributeError, TypeError):
        raise Malformed("its resourceSpans are not those of OTLP/JSON") from None


def _attributes(found: Any) -> Mapping[str, Any]:
    """Return the attributes as a dict; OTLP/JSON has a list of keys and typed values."""
    if isinstance(found, dict):
        return found
    if not isinstance(found, list):
        return {}
    try:
        return {one["key"]: _plain(one["value"]) for one in found}
    except (KeyError, TypeError, AttributeError):
        raise Malformed("its attributes are not those of OTLP/JSON") from None


def _plain(value: Mapping[str, Any]) -> Any:
    if "arrayValue" in value:
        return [_plain(one) for one in value["arrayValue"].get("values", ())]
    if "kvlistValue" in value:
        pairs = value["kvlistValue"].get("values", ())
        return {one["key"]: _plain(one["value"]) for one in pairs}
    return next(iter(value.values()), None)


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise Malformed("an attribute that holds messages is not JSON") from None
