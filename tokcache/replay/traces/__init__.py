"""Recorded requests, read from the formats they are published and logged in.

`open_trace` returns a `Trace`, with its format recognised from the first records or given by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tokcache.errors import InvalidTrace, Malformed
from tokcache.replay.traces import (
    anthropic_log,
    bailian,
    kv_cache_tester,
    mooncake,
    openai_log,
    otel,
    sharegpt,
    swe_agent,
    tau_bench,
    texts,
)
from tokcache.replay.traces.request import BlockFormat, Blocks, Request, TextFormat
from tokcache.replay.traces.source import Skipped, Source

__all__ = ["FORMATS", "Blocks", "Request", "Skipped", "Trace", "open_trace"]

# Those whose records have the most marks come first: a record may look like several.
_BLOCK_FORMATS: tuple[BlockFormat, ...] = (kv_cache_tester, bailian, mooncake)
_TEXT_FORMATS: tuple[TextFormat, ...] = (
    otel,
    tau_bench,
    sharegpt,
    swe_agent,
    anthropic_log,
    openai_log,
)
_ALL: tuple[TextFormat | BlockFormat, ...] = (*_BLOCK_FORMATS, *_TEXT_FORMATS)
FORMATS: dict[str, str] = {each.name: each.about for each in _ALL} | texts.ABOUT
_N_LOOKED_AT = 20


@dataclass(slots=True)
class Trace:
    """One file of requests, to be read once.

    Exactly one of `requests()` and `blocks()` yields something, as `has_text` says.
    """

    source: Source
    format_name: str
    _values: Iterator[Any]
    block_tokens: int = 0
    first_scope: int = 1

    @property
    def has_text(self) -> bool:
        """Whether the format has texts and chats, not ids of blocks."""
        return all(each.name != self.format_name for each in _BLOCK_FORMATS)

    def requests(self) -> Iterator[Request]:
        """Yield the requests of a text format; a record that is not one of it is skipped."""
        if self.format_name in texts.ABOUT:
            for text in texts.prompts(self.source, self.format_name):
                yield Request(text=text)
            return
        own = next(each for each in _TEXT_FORMATS if each.name == self.format_name)
        for value in self._values:
            try:
                yield from own.requests(value)
            except (Malformed, RecursionError) as error:
                self.source.skipped.add(self.source.where, str(error))

    def blocks(self) -> Iterator[tuple[Sequence[int], int, int]]:
        """Yield (ids, tokens of the prompt, scope); equal ids of other scopes are other blocks.

        `block_tokens` is known from the first prompt on. Scope 0 is that of all files.
        """
        own = next(each for each in _BLOCK_FORMATS if each.name == self.format_name)
        scope = self.first_scope
        self.block_tokens = 0 if own.is_session else own.block_tokens
        for value in self._values:
            if own.is_session:
                n_tokens = kv_cache_tester.block_tokens_of(value)
                self.block_tokens = self.block_tokens or n_tokens
                if n_tokens != self.block_tokens:
                    self.source.skipped.add(
                        self.source.where,
                        f"its blocks have {n_tokens} tokens, those before it {self.block_tokens}",
                    )
                    continue
                self.first_scope += 1
                scope = 0 if kv_cache_tester.is_global(value) else self.first_scope
            try:
                for ids, n_prompt in own.blocks(value):
                    yield ids, n_prompt, scope
            except Malformed as error:
                self.source.skipped.add(self.source.where, str(error))


def open_trace(path: str, skipped: Skipped, format_name: str | None = None) -> Trace:
    """Open a trace file, or standard input for "-".

    Errors: MissingFile; InvalidTrace if the file can't be read or no format fits; MissingExtra.
    """
    if format_name is not None and format_name not in FORMATS:
        raise InvalidTrace(f"no format {format_name!r}; known are {', '.join(FORMATS)}")
    source = Source(path, skipped)
    if format_name in texts.ABOUT or (format_name is None and source.head and not source.is_json()):
        return Trace(source, format_name or texts.BLOCKS, iter(()))
    values = source.values()
    if format_name is not None:
        return Trace(source, format_name, values)
    try:
        return Trace(source, *_recognised(source, values))
    except BaseException:
        source.close()
        raise


def _recognised(source: Source, values: Iterator[Any]) -> tuple[str, Iterator[Any]]:
    """Return the first format that the first records have, and all records."""
    read: list[tuple[int, Any]] = []  # with the places they were read at, for messages
    for value in islice(values, _N_LOOKED_AT):
        read.append((source.number, value))
        for each in _ALL:
            if each.matches(value):
                return each.name, _continued(source, read, values)
    if not read:
        return openai_log.name, iter(())
    first = read[0][1]
    keys = sorted(first)[:8] if isinstance(first, dict) else None
    found = f"objects with the keys {', '.join(map(str, keys))}" if keys else "other values"
    raise InvalidTrace(
        f"{source.name}: no known format: it has {found}; --format names one of "
        f"{', '.join(FORMATS)}"
    )


def _continued(source: Source, read: list[tuple[int, Any]], rest: Iterator[Any]) -> Iterator[Any]:
    for source.number, value in read:
        yield value
    yield from rest
