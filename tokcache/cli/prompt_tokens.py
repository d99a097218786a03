"""Renders requests as a model's prompts, and compares two prompts in text and in tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from tokcache.cli.chat_templates import find_chat_templates
from tokcache.config import CacheConfig
from tokcache.demo.tokenizers import find_tokenizer
from tokcache.differences.alignment import equal_runs
from tokcache.differences.chat import template_variables, to_chat
from tokcache.differences.classes import DifferenceClass
from tokcache.differences.texts import classify
from tokcache.errors import InvalidRequest, InvalidTemplate, RenderingFailed
from tokcache.text.chat.process import Limits, TemplateProcess
from tokcache.text.wrappers import wrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokcache.differences.classes import Difference
    from tokcache.differences.request import Request
    from tokcache.text.token_ids import TokenIds

    Ids = Sequence[int] | TokenIds

_FIRST = 0x10000  # ids become characters, so that runs of ids are runs of text
_GAP = 2  # messages
_EACH = re.compile(".", re.DOTALL)
_LIMITS = Limits(seconds=10.0, max_chars=64_000_000)
_FAILURES = {"refused": "refuses these messages", "stopped": "was stopped", "failed": "failed"}


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """How many tokens of a later prompt are shared with an earlier one.

    `n_shared` of `n_tokens` are in front of the first difference; `n_lost` more are after it and
    in the earlier prompt too.
    """

    n_tokens: int
    n_shared: int
    n_lost: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the text that a model reads, and its token ids."""

    text: str
    ids: TokenIds


class Prompts:
    """Renders and encodes requests with one tokenizer and its chat template.

    Errors: those of `find_tokenizer`.
    """

    def __init__(self, named: str) -> None:
        self._named = named
        source = find_tokenizer(named)
        self._plain = source.load()
        self._tokenizer = wrap(source.load())
        self._process: TemplateProcess | None = None

    def prompt(self, request: Request) -> Prompt:
        """Return the prompt of a request.

        Errors: InvalidTemplate if there is no chat template, or it can't be compiled;
                InvalidRequest if it refuses the messages, fails, or passes a limit.
        """
        if request.is_plain:
            text = request.messages[0].parts[0].text
            return Prompt(text, self._tokenizer.token_ids(text))
        text = self.rendered(request)
        return Prompt(text, self.encoded(text))

    def encoded(self, rendering: str) -> TokenIds:
        """Return the ids of a rendering; a template writes the special tokens itself."""
        return self._tokenizer.token_ids(rendering, add_special_tokens=False)

    def decoded(self, ids: Ids) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._plain.decode(list(ids), skip_special_tokens=False))

    def rendered(self, request: Request, n_messages: int | None = None) -> str:
        """Return the rendering of a chat; of its first `n_messages` without generation prompt.

        Errors: as `prompt`.
        """
        if self._process is None:
            try:
                found = find_chat_templates(self._named, None, CacheConfig())
            except InvalidTemplate as error:
                raise InvalidTemplate(f"{error}; or leave the tokenizer out") from None
            template = found.templates.get("default") or next(iter(found.templates.values()))
            self._process = TemplateProcess(
                template,
                found.variables,
                by_transformers=found.by_transformers,
                limits=_LIMITS,
            )
        messages, tools = to_chat(request)
        try:
            return self._process.render(
                messages[:n_messages],
                tools=tools,
                add_generation_prompt=n_messages is None,
                variables=template_variables(request),
            )
        except RenderingFailed as error:
            raise InvalidRequest(
                f"the chat template of {self._named} {_FAILURES[error.kind]}: {error.reason}"
            ) from None

    def close(self) -> None:
        """End the child process that renders."""
        if self._process is not None:
            self._process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def count(old: Ids, new: Ids) -> TokenCounts:
    """Return how many tokens two prompts share, and how many the first difference costs."""
    left, right = ("".join(chr(_FIRST + each) for each in ids) for ids in (old, new))
    runs = equal_runs(left, right, (_EACH,))
    return TokenCounts(len(new), runs[0].length, sum(run.length for run in runs[1:]))


def compare_prompts(
    prompts: Prompts, old: tuple[Request, Prompt], new: tuple[Request, Prompt], between: Difference
) -> tuple[Difference, TokenCounts]:
    """Return the difference of two requests as their prompts have it, and its cost in tokens.

    `between` is the difference of the requests themselves.
    """
    texts = old[1].text, new[1].text
    counts = count(old[1].ids, new[1].ids)
    if texts[1].startswith(texts[0]) or texts[0].startswith(texts[1]):
        if between.kind.is_reused:
            return between, counts
        # The template does not write the difference, such as the ids of tool calls.
        return replace(between, kind=DifferenceClass.PARAMETERS, n_lost=0), counts
    found = classify(*texts)
    place = _message_at(new[0], texts[1], found.position)
    if not between.kind.is_reused:
        # Text between two messages counts as the earlier one's, so a gap of one says nothing.
        at = place.get("message")
        if at is None or between.message is None or at > between.message - _GAP:
            return between, counts
        return replace(found, kind=DifferenceClass.TEMPLATE, **place), counts
    if between.kind is DifferenceClass.PARAMETERS:
        return replace(found, kind=DifferenceClass.SETTINGS, field=between.field), counts
    # The answer was generated after the earlier prompt, so its states are lost as well.
    n_before = len(old[0].messages)
    answer = new[0].messages[n_before : n_before + 1]
    if new[0].api == "chat" and answer and answer[0].role == "assistant":
        until = prompts.rendered(new[0], n_before + 1)
        if texts[1].startswith(until):
            n_answered = len(prompts.encoded(until)) - counts.n_shared
            counts = replace(counts, n_lost=max(counts.n_lost, n_answered))
    return replace(found, kind=DifferenceClass.TEMPLATE, **place), counts


def _message_at(request: Request, text: str, position: int) -> dict[str, Any]:
    """Return the message whose rendering holds `position`: the last one that begins before it."""
    at = 0
    place: dict[str, Any] = {}
    for message in request.messages:
        for part in message.parts:
            start = text.find(part.text.strip(), at)
            if start > position:
                return place or {"message": message.index, "role": message.role}
            if start >= 0:
                at = start + len(part.text.strip())
        place = {"message": message.index, "role": message.role}
    return place


def compare_encodings(
    prompts: Prompts, old: Prompt, generated: Sequence[int], new: Prompt
) -> tuple[Difference, TokenCounts] | None:
    """Return the difference between generated ids and those of their text, None without one."""
    text = old.text + prompts.decoded(generated)
    held = (*old.ids, *generated)
    counts = count(held, new.ids)
    if not new.text.startswith(text) or counts.n_shared >= len(held):
        return None
    position = len(prompts.decoded(new.ids[: counts.n_shared]))
    found = replace(classify(text, new.text), kind=DifferenceClass.RE_ENCODING)
    stop = min(len(text), position + 1)
    return replace(
        found, position=position, start=position, before_stop=stop, after_stop=stop
    ), counts
