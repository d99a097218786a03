"""Reads a user's file of prompts; a file that can't be read is an InvalidPrompts."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tokcache.errors import InvalidPrompts, MissingFile

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHAPES = '{"prompt": "..."}, {"messages": [...]} or a list of {"role": ..., "content": ...}'


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat to continue, or a plain text; exactly one of the two is set."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    @classmethod
    def chat(cls, messages: Iterable[Message]) -> Self:
        """Return the prompt of a chat."""
        return cls(messages=tuple(messages))

    def as_body(self) -> dict[str, Any]:
        """Return the body of a request to OpenAI's API, without a model."""
        if self.messages:
            return {"messages": [asdict(each) for each in self.messages]}
        return {"prompt": self.text}


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file: JSON lines, or plain text in blocks between blank lines.

    Errors: MissingFile; InvalidPrompts with the line that can't be read.
    """
    if not path.exists():
        raise MissingFile(f"no such prompts file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidPrompts(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidPrompts(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None
    if path.suffix == ".jsonl" or text.lstrip()[:1] in {"{", "["}:
        prompts = _from_json_lines(text, path)
    else:
        blocks = re.split(r"\n(?:[ \t]*\n)+", text.replace("\r\n", "\n"))
        prompts = [Prompt(text=block.strip("\n")) for block in blocks if block.strip()]
    if not prompts:
        raise InvalidPrompts(f"{path} holds no prompts; write one JSON object a line or plain text")
    return prompts


def _from_json_lines(text: str, path: Path) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                prompts.append(_from_json(json.loads(line)))
            except ValueError as error:
                raise InvalidPrompts(f"{path}, line {number}: {error}") from None
    return prompts


def _from_json(found: Any) -> Prompt:
    if isinstance(found, dict) and isinstance(found.get("prompt"), str):
        return Prompt(text=_checked(found["prompt"]))
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected {_SHAPES}")
    chat = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"a message must be an object, not {json.dumps(message)[:40]}")  # noqa: TRY004 (a file's content)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError('a message needs "role" and "content", both strings')  # noqa: TRY004 (same)
        chat.append(Message(role, _encodable(content)))
    return Prompt.chat(chat)


def _checked(text: str) -> str:
    if not text:
        raise ValueError("the prompt is empty")
    return _encodable(text)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from None
    return text
