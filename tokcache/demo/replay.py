"""The replay: runs every prompt on both sides, times both in the same way, and compares them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tokcache._prefix import first_difference
from tokcache.demo.backends import BLOCK_TOKENS
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tokenizers import Tokenizer

    from tokcache.demo.backends import Generation, Runner, Sides

_WARM_UP = "A few words that no prompt begins with."


class Kind(StrEnum):
    """How a prompt relates to the earlier ones: new, a continuation, or a repetition."""

    NEW = "new"
    CONTINUES = "continues"
    AGAIN = "again"


@dataclass(frozen=True, slots=True)
class Request:
    """A text for the tokenizer; a rendered chat already contains its special tokens."""

    text: str
    add_special_tokens: bool


@dataclass(frozen=True, slots=True)
class Side:
    """One prompt on one side. Units: seconds, tokenization included."""

    token_ids: list[int]
    tokenize_s: float
    generation: Generation | None

    @property
    def first_token_s(self) -> float:
        """Seconds for tokenization, prefill and the first token."""
        return self.tokenize_s + (self.generation.first_token_s if self.generation else 0.0)

    @property
    def seconds(self) -> float:
        """Seconds for the whole request."""
        return self.tokenize_s + (self.generation.seconds if self.generation else 0.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of one prompt on both sides."""

    kind: Kind
    plain: Side
    cached: Side

    def difference(self) -> str | None:
        """Return a description of the first difference, None if both sides are equal."""
        pairs = [("prompt id", self.plain.token_ids, self.cached.token_ids)]
        if self.plain.generation and self.cached.generation:
            generated = (self.plain.generation.token_ids, self.cached.generation.token_ids)
            pairs.append(("generated token", *generated))
        for name, without, with_ in pairs:
            at = first_difference(without, with_)
            if at is not None:
                return f"{name} {at} is {_at(without, at)} without and {_at(with_, at)} with"
        return None


def _at(tokens: Sequence[int], at: int) -> str:
    return str(tokens[at]) if at < len(tokens) else "missing"


class Replay:
    """Runs requests on both sides.

    The sides take turns in going first, so that other load on the machine affects both.
    """

    def __init__(
        self, plain: Tokenizer, cached: Any, sides: Sides | None, *, max_tokens: int
    ) -> None:
        self._plain = plain
        self._cached = cached
        self._sides = sides
        self._max_tokens = max_tokens

    def warm_up(self) -> None:
        """Run a short prompt on both sides, so that no figure includes the cost of a first use."""
        request = Request(_WARM_UP, add_special_tokens=False)
        self._plain_side(request)
        self._cached_side(request)
        if self._sides is not None:
            self._sides.cached.forget()

    def run(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield an outcome for each request."""
        kind_of = _Kinds()
        for number, request in enumerate(requests):
            if number % 2:
                cached, plain = self._cached_side(request), self._plain_side(request)
            else:
                plain, cached = self._plain_side(request), self._cached_side(request)
            yield Outcome(kind_of(request.text, plain.token_ids), plain, cached)

    def _plain_side(self, request: Request) -> Side:
        def encode(text: str) -> TokenIds:
            return TokenIds(
                self._plain.encode(text, add_special_tokens=request.add_special_tokens).ids
            )

        return self._side(request, encode, self._sides.plain if self._sides else None)

    def _cached_side(self, request: Request) -> Side:
        def encode(text: str) -> TokenIds:
            ids: TokenIds = self._cached.token_ids(
                text, add_special_tokens=request.add_special_tokens
            )
            return ids

        return self._side(request, encode, self._sides.cached if self._sides else None)

    def _side(
        self, request: Request, encode: Callable[[str], TokenIds], runner: Runner | None
    ) -> Side:
        # A new string object without a cached hash, like one parsed from a request.
        text = request.text.encode().decode()
        started = perf_counter()
        ids = encode(text)
        tokenize_s = perf_counter() - started
        generation = runner.generate(ids, self._max_tokens) if runner and len(ids) else None
        return Side(ids.tolist(), tokenize_s, generation)


class _Kinds:
    """Compares each prompt with the earlier ones."""

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._heads: set[tuple[int, ...]] = set()

    def __call__(self, text: str, ids: Sequence[int]) -> Kind:
        head = tuple(ids[:BLOCK_TOKENS]) if len(ids) > BLOCK_TOKENS else None
        kind = Kind.NEW
        if text in self._texts:
            kind = Kind.AGAIN
        elif head in self._heads:
            kind = Kind.CONTINUES
        self._texts.add(text)
        if head is not None:
            self._heads.add(head)
        return kind
