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

__all__ = ["FORMATS", "Blocks", "PromptsOfBlocks", "Request", "Skipped", "Trace", "open_trace"]

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


@dataclass(frozen=True, slots=True)
class PromptsOfBlocks:
    """Some prompts of a hash trace; equal ids of other scopes are other blocks.

    Shapes: a value for each prompt: the number of its record, its ids, its tokens.
    """

    numbers: Sequence[int]
    ids: Sequence[Sequence[int]]
    n_tokens: Sequence[int]
    scope: int


@dataclass(slots=True)
class Trace:
    """One file of requests, to be read once.

    Exactly one of `requests()` and `blocks()` yields something, as `has_text` says. `_first` are
    the records that were read to recognise the format, with their numbers.
    """

    source: Source
    format_name: str
    _first: Sequence[tuple[int, Any]] = ()
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
        for value in self._values():
            try:
                yield from own.requests(value)
            except (Malformed, RecursionError) as error:
                self.source.skipped.add(self.source.where, str(error))

    def _values(self) -> Iterator[Any]:
        for number, value in self._first:
            self.source.number = number
            yield value
        yield from self.source.values()

    def blocks(self) -> Iterator[PromptsOfBlocks]:
        """Yield the prompts of a hash format, many at a time.

        `block_tokens` is known from the first prompt on. Scope 0 is that of all files.
        """
        own = next(each for each in _BLOCK_FORMATS if each.name == self.format_name)
        self.block_tokens = 0 if own.is_session else own.block_tokens
        for numbers, values in self._batches():
            found = own.columns(values)
            if found is not None:
                yield PromptsOfBlocks(numbers, *found, self.first_scope)
                continue
            for number, value in zip(numbers, values, strict=True):
                self.source.number = number
                scope = self._scope_of_session(value) if own.is_session else self.first_scope
                if scope is None:
                    continue
                try:
                    prompts = list(own.blocks(value))
                except Malformed as error:
                    self.source.skipped.add(self.source.where, str(error))
                    continue
                ids = [ids for ids, _ in prompts]
                yield PromptsOfBlocks([number] * len(ids), ids, [n for _, n in prompts], scope)

    def _batches(self) -> Iterator[tuple[Sequence[int], list[Any]]]:
        for number, value in self._first:
            yield (number,), [value]
        if self.source.has_values_on_lines:
            yield from self.source.batches()
            return
        for value in self.source.values():
            yield (self.source.number,), [value]

    def _scope_of_session(self, value: Any) -> int | None:
        """Return the scope of a session's ids, None if its blocks are of another size."""
        n_tokens = kv_cache_tester.block_tokens_of(value)
        self.block_tokens = self.block_tokens or n_tokens
        if n_tokens != self.block_tokens:
            self.source.skipped.add(
                self.source.where,
                f"its blocks have {n_tokens} tokens, those before it {self.block_tokens}",
            )
            return None
        self.first_scope += 1
        return 0 if kv_cache_tester.is_global(value) else self.first_scope


def open_trace(path: str, skipped: Skipped, format_name: str | None = None) -> Trace:
    """Open a trace file, or standard input for "-".

    Errors: MissingFile; InvalidTrace if the file can't be read or no format fits; MissingExtra.
    """
    if format_name is not None and format_name not in FORMATS:
        raise InvalidTrace(f"no format {format_name!r}; known are {', '.join(FORMATS)}")
    source = Source(path, skipped)
    if format_name in texts.ABOUT or (format_name is None and source.head and not source.is_json()):
        return Trace(source, format_name or texts.BLOCKS)
    try:
        return Trace(source, *((format_name,) if format_name else _recognised(source)))
    except BaseException:
        source.close()
        raise


def _recognised(source: Source) -> tuple[str, list[tuple[int, Any]]]:
    """Return the first format that the first records have, and those records."""
    read: list[tuple[int, Any]] = []  # with the places they were read at, for messages
    for value in islice(source.values(), _N_LOOKED_AT):
        read.append((source.number, value))
        for each in _ALL:
            if each.matches(value):
                return each.name, read
    if not read:
        return openai_log.name, []
    first = read[0][1]
    keys = sorted(first)[:8] if isinstance(first, dict) else None
    found = f"objects with the keys {', '.join(map(str, keys))}" if keys else "other values"
    raise InvalidTrace(
        f"{source.name}: no known format: it has {found}; --format names one of "
        f"{', '.join(FORMATS)}"
    )
