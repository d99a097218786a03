"""Reads requests from JSON, JSON lines and plain text, and from the records of usual logs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from tokcache.differences.request import Request, parse_request
from tokcache.errors import InvalidRequest

# Names under which logs keep a request: proxies, OpenAI batches, litellm, HAR files.
_HOLDERS = [
    "request", "body", "json", "payload", "json_body", "data", "kwargs", "params", "request_body",
    "requestBody", "postData", "text", "http",
]  # fmt: skip
_OWN = ("messages", "input", "prompt")
_MAX_DEPTH = 4
# Where servers put the ids that a model generated, in a record or in its answer.
_ANSWERS = ("response", "completion", "answer", "output")
_GENERATED = ("generated_ids", "output_ids", "completion_token_ids", "token_ids", "tokens")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A request of a log, the line it is on, and the ids that were generated for it."""

    line: int
    request: Request
    generated_ids: tuple[int, ...] = dataclasses.field(default=(), repr=False)


def read_request(data: bytes, name: str, *, is_text: bool = False) -> Request:
    """Return the one request of a file: JSON, or a plain text.

    Errors: InvalidRequest with the file's name: not UTF-8, empty, broken JSON, no request, or
            several requests.
    """
    text = _decoded(data, name)
    if is_text or text.lstrip()[:1] not in ("{", "["):
        return parse_request(text)
    try:
        found = json.loads(text)
    except RecursionError:
        raise InvalidRequest(f"{name}: the JSON is nested too deeply") from None
    except ValueError as error:
        if sum(line.lstrip()[:1] in ("{", "[") for line in text.splitlines()) > 1:
            raise InvalidRequest(
                f"{name} has several lines of JSON; pass it alone to compare its turns, or one "
                "request a file"
            ) from None
        raise InvalidRequest(
            f"{name} is not JSON: {error}; a prompt that only begins with a bracket needs a file "
            "that ends in .txt"
        ) from None
    try:
        return parse_request(request_in(found))
    except InvalidRequest as error:
        raise InvalidRequest(f"{name}: {error}") from None


def read_log(data: bytes, name: str, *, skips_broken: bool = False) -> tuple[list[Entry], int]:
    """Return the requests of a session's log, and how many lines were skipped.

    A log is JSON lines, or one JSON list of requests, or a HAR file.

    Errors: InvalidRequest with the file's name, and the line where there is one.
    """
    text = _decoded(data, name)
    records = _records(text, name)
    entries, broken = [], []
    for line, record in records:
        try:
            if isinstance(record, str):
                record = json.loads(record)  # noqa: PLW2901 (the parsed line)
            request = parse_request(request_in(record))
            entries.append(Entry(line, request, _generated_ids(record)))
        except RecursionError:
            broken.append((line, "the JSON is nested too deeply"))
        except ValueError as error:  # of json, and InvalidRequest
            broken.append((line, str(error)))
    if broken and not skips_broken:
        line, reason = broken[0]
        others = f" (and {len(broken) - 1:,} more)" if len(broken) > 1 else ""
        raise InvalidRequest(
            f"{name}, line {line}: {reason}{others}; --skip-broken leaves such lines out"
        )
    if not entries:
        raise InvalidRequest(f"{name} holds no request")
    return entries, len(broken)


def request_in(record: Any) -> Any:
    """Return the request inside a record of a log; the record itself if it is a request."""
    found = record
    for _ in range(_MAX_DEPTH):
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except ValueError as error:
                raise InvalidRequest(f"the request in the record is not JSON: {error}") from None
        if not isinstance(found, dict) or any(
            isinstance(found.get(name), list | str) for name in _OWN
        ):
            break
        inner = next(
            (found[name] for name in _HOLDERS if isinstance(found.get(name), dict | str)), None
        )
        if inner is None:
            break
        found = inner
    return found


def _decoded(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not UTF-8 text: byte {error.start} is wrong") from None
    if "\0" in text:
        raise InvalidRequest(f"{name} is a binary file: character {text.index(chr(0))} is NUL")
    if not text.strip():
        raise InvalidRequest(f"{name} is empty")
    return text


def _records(text: str, name: str) -> list[tuple[int, Any]]:
    """Return lines or records with their numbers."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        lines = enumerate(text.split("\n"), start=1)
        return [(number, line) for number, line in lines if line.strip()]
    if isinstance(whole, dict) and isinstance(whole.get("log"), dict):
        entries = whole["log"].get("entries")  # a HAR file
        whole = entries if isinstance(entries, list) else whole
    if not isinstance(whole, list):
        whole = [whole]
    if all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in whole):
        raise InvalidRequest(
            f"{name} holds one list of messages; a log has one request a line, and two files are "
            "compared with each other"
        )
    return list(enumerate(whole, start=1))


def _generated_ids(record: Any) -> tuple[int, ...]:
    """Return the generated ids that a record keeps, () without any."""
    places = [record]
    for place in places[:]:
        if isinstance(place, dict):
            places += [place[name] for name in _ANSWERS if isinstance(place.get(name), dict)]
    for place in places[:]:
        choices = place.get("choices") if isinstance(place, dict) else None
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            places.append(choices[0])
    for place in places:
        for name in _GENERATED:
            ids = place.get(name) if isinstance(place, dict) else None
            if isinstance(ids, list) and ids and all(type(each) is int for each in ids):
                return tuple(ids)
    return ()
