"""Names the prefixes of a request by a chain of digests, without rendering or tokenizing it.

1. A request is a list of elements: the tools, then each message (or the text of a completion).
2. Each element is written in a canonical form: only members that a chat template can read, in the
   order of the request, because templates render tools in that order.
3. The form is cut into pieces; each piece has a digest of itself and the digest before it.

Two requests with an equal digest at position n have equal first n pieces, so their renderings share
the prefix up to there. The first digest depends on a secret key, the tenant's scope and the members
that change the rendering; requests of different scopes never have an equal digest.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokcache.errors import ApiError

if TYPE_CHECKING:
    from tokcache.text.token_ids import TokenIds

PIECE_CHARS = 512
# A text has no messages, whose ends are good places to compare; its pieces are shorter.
_TEXT_PIECE_CHARS = 128
_PIECE_TOKENS = 32
_IDS_PIECE_TOKENS = 64
_DIGEST_BYTES = 16
# Members of a body that change how llama-server renders the prompt.
_RENDERING = (
    "chat_template_kwargs",
    "reasoning_effort",
    "reasoning_format",
    "add_generation_prompt",
    "response_format",
    "tool_choice",
    "parallel_tool_calls",
    "lora",
)
# Members of a message that a chat template can read.
_MESSAGE = ("role", "name", "tool_call_id", "reasoning_content", "content", "tool_calls")


@dataclass(frozen=True, slots=True)
class Chain:
    """The digests of a request's prefixes, and the place where each prefix stops.

    Units: `stops` are characters of the elements, or tokens in a chain of ids.
    """

    links: tuple[bytes, ...] = ()
    stops: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.links)

    def n_common(self, other: Chain) -> int:
        """Return the number of leading links that are equal.

        Cost: O(log n), because a link is only equal if all links before it are.
        """
        n_both = min(len(self.links), len(other.links))
        return bisect_left(range(n_both), True, key=lambda i: self.links[i] != other.links[i])

    def stop_at(self, n_links: int) -> int:
        """Return the place where the first `n_links` pieces stop."""
        return self.stops[n_links - 1] if n_links else 0


EMPTY = Chain()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's elements, and the digest that its chain starts from.

    `is_text`: the elements are equal parts of one text, or of one list of token ids, and the rest
    at the end that does not fill a part is left out, because the next request may continue it.
    `rest` is that end of a text, None for messages and token ids.
    """

    seed: bytes
    elements: tuple[str, ...]
    is_text: bool = False
    rest: str | None = None

    def chain(self, answer: str | None = None) -> Chain:
        """Return the chain of the request, with an answer as its continuation if given."""
        elements = self.elements
        if answer is not None and self.rest is not None:
            elements = (*elements, *_full_parts(self.rest + answer))
        elif answer is not None and not self.is_text:
            elements = (*elements, answer)
        links, stops, last, n_chars = [], [], self.seed, 0
        for element in elements:
            for start in range(0, len(element), PIECE_CHARS):
                piece = element[start : start + PIECE_CHARS]
                last = hashlib.blake2b(
                    piece.encode("utf-8", "surrogatepass"), key=last, digest_size=_DIGEST_BYTES
                ).digest()
                n_chars += len(piece)
                links.append(last)
                stops.append(n_chars)
        return Chain(tuple(links), tuple(stops))


def ids_chain(ids: TokenIds, key: bytes, scope: str | None) -> Chain:
    """Return the chain of a rendered prompt's ids, which stops every 64 tokens."""
    links, last = [], _seed(key, scope, "ids", {})
    stops = range(_IDS_PIECE_TOKENS, len(ids) + 1, _IDS_PIECE_TOKENS)
    held = memoryview(ids)
    for stop in stops:
        piece = held[stop - _IDS_PIECE_TOKENS : stop]
        last = hashlib.blake2b(piece, key=last, digest_size=_DIGEST_BYTES).digest()
        links.append(last)
    return Chain(tuple(links), tuple(stops))


def chat_prompt(body: Mapping[str, Any], key: bytes, scope: str | None) -> Prompt:
    """Return the elements of a chat completion: its tools, then each message.

    Errors: ApiError 400 if `messages` is not a list of objects.
    """
    messages = _list_of_objects(body, "messages")
    elements = [json.dumps(body["tools"])] if body.get("tools") else []
    elements += map(canonical_message, messages)
    return Prompt(_seed(key, scope, "chat", body), tuple(elements))


def text_prompt(body: Mapping[str, Any], key: bytes, scope: str | None) -> Prompt:
    """Return the only element of a completion: its text or its token ids.

    Errors: ApiError 400 for several prompts in one request.
    """
    found = body.get("prompt")
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str | list):
        found = found[0]
    seed = _seed(key, scope, "text", body)
    if isinstance(found, str):
        parts = _full_parts(found)
        rest = found[len(parts) * _TEXT_PIECE_CHARS :]
        return Prompt(seed, parts, is_text=True, rest=rest)
    if isinstance(found, list) and all(isinstance(each, int) for each in found):
        n_full = len(found) // _PIECE_TOKENS
        of_ids = (found[i * _PIECE_TOKENS : (i + 1) * _PIECE_TOKENS] for i in range(n_full))
        return Prompt(seed, tuple(map(str, of_ids)), is_text=True)
    raise ApiError(
        400, "'prompt' must be one text or one list of token ids; send several as several requests"
    )


def responses_prompt(body: Mapping[str, Any], key: bytes, scope: str | None) -> Prompt:
    """Return the elements of a Responses request: tools, instructions, then each input item.

    Errors: ApiError 400 if `input` is neither a text nor a list of objects.
    """
    elements = [json.dumps(body["tools"])] if body.get("tools") else []
    if body.get("instructions"):
        elements.append(json.dumps(body["instructions"]))
    if isinstance(body.get("input"), str):
        elements.append(canonical_item({"role": "user", "content": body["input"]}))
    else:
        elements += map(canonical_item, _list_of_objects(body, "input"))
    return Prompt(_seed(key, scope, "responses", body), tuple(elements))


def canonical_message(message: Mapping[str, Any]) -> str:
    """Return the members of a message that can be rendered, in one form for equal renderings."""
    parts = []
    for name in _MESSAGE:
        value = message.get(name)
        if name == "content":
            value = _content(value)
        elif name == "tool_calls" and isinstance(value, list):
            value = [
                [call.get("id"), call["function"].get("name"), call["function"].get("arguments")]
                if isinstance(call, dict) and isinstance(call.get("function"), dict)
                else call
                for call in value
            ]
        if value not in (None, "", []):
            parts.append(f"{name}:{value}" if isinstance(value, str) else _dump(name, value))
    return "\x1e" + "\x1f".join(parts)


def canonical_item(item: Mapping[str, Any]) -> str:
    """Return an input or output item of the Responses API in one form for equal renderings."""
    kept = {
        name: value
        for name, value in item.items()
        if name not in ("id", "status", "type") and value
    }
    if item.get("type", "message") != "message":
        kept["type"] = item["type"]
    kept["content"] = _content(item.get("content"))
    return "\x1e" + _dump("item", dict(sorted(kept.items())))


def _content(found: Any) -> Any:
    """Return one text part as its text: templates render both the same."""
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict):
        only = found[0]
        if only.get("type") in ("text", "input_text", "output_text"):
            return only.get("text")
    return found


def _dump(name: str, value: Any) -> str:
    return f"{name}:{json.dumps(value)}"


def _full_parts(text: str) -> tuple[str, ...]:
    n_full = len(text) // _TEXT_PIECE_CHARS
    starts = range(0, n_full * _TEXT_PIECE_CHARS, _TEXT_PIECE_CHARS)
    return tuple(text[start : start + _TEXT_PIECE_CHARS] for start in starts)


def _seed(key: bytes, scope: str | None, family: str, body: Mapping[str, Any]) -> bytes:
    rendering = [body.get(name) for name in _RENDERING]
    told = json.dumps([scope, family, rendering]).encode()
    return hashlib.blake2b(told, key=key, digest_size=_DIGEST_BYTES).digest()


def _list_of_objects(body: Mapping[str, Any], name: str) -> Iterable[Mapping[str, Any]]:
    found = body.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) for m in found):
        raise ApiError(400, f"{name!r} must be a list of at least one object")
    return found
