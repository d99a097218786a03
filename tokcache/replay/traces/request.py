"""The requests that a trace's records turn into, and the contract of a format.

A record of a text format becomes a `Request`: a text, a chat, or only counts of tokens. A record of
a hash format becomes `Blocks`: ids that each stand for a block of tokens and all tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = Mapping[str, Any]  # "role", "content" (a str), and "tool_calls" as OpenAI has them


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt: a text, the messages of a chat, or neither if the trace has only counts.

    `reply` is the generated text, `reply_ids` its token ids if the trace has them. `n_left_out`
    counts parts of messages that are not text, such as images.
    """

    text: str | None = None
    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    reply: str | None = None
    prompt_ids: Sequence[int] | None = None
    reply_ids: Sequence[int] | None = None
    n_tokens: int | None = None
    n_left_out: int = 0

    @property
    def has_text(self) -> bool:
        """Whether there is a prompt to encode."""
        return self.text is not None or bool(self.messages) or self.prompt_ids is not None


# One prompt of a hash trace: the ids of its blocks, and its tokens; the last block may be shorter
# than the others, and tokens after the blocks have no id. A plain tuple: traces have millions.
Blocks = tuple[Sequence[int], int]


class TextFormat(Protocol):
    """A format whose records have prompts as texts or chats."""

    name: str
    about: str

    def matches(self, value: Any, /) -> bool:
        """Return whether a record looks like one of this format."""

    def requests(self, value: Any, /) -> Iterable[Request]:
        """Return the requests of a record; Malformed if it is not one of this format."""


class BlockFormat(Protocol):
    """A format whose records have ids of blocks.

    `is_session` says that each record has ids of its own, unless `is_global` says otherwise of it;
    other formats have ids of their own in each file.

    Units: `block_tokens` tokens a block, unless the first record says otherwise.
    """

    name: str
    about: str
    block_tokens: int
    is_session: bool

    def matches(self, value: Any, /) -> bool:
        """Return whether a record looks like one of this format."""

    def blocks(self, value: Any, /) -> Iterable[Blocks]:
        """Return the prompts of a record; Malformed if it is not one of this format."""

    def columns(self, values: list[Any], /) -> tuple[list[list[int]], list[int]] | None:
        """Return ids and tokens of records that are a prompt each, None to use `blocks`."""


@dataclass(slots=True)
class Conversation:
    """Messages of a dialogue in their order, each reply of the model being one request."""

    messages: list[Message] = field(default_factory=list)
    tools: Sequence[Mapping[str, Any]] | None = None
    n_left_out: int = 0

    def requests(self) -> Iterable[Request]:
        """Yield a request for every message of the assistant that follows another message."""
        for n, message in enumerate(self.messages):
            if n and message["role"] == "assistant":
                yield Request(
                    messages=self.messages[:n],
                    tools=self.tools,
                    reply=message["content"],
                    n_left_out=self.n_left_out,
                )
                self.n_left_out = 0  # counted once
