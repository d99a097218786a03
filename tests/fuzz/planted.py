"""Faults planted on purpose, one for each target: a fuzzer that misses one is worth nothing.

Each weakens one check, in a way that no seed shows: the fuzzer has to change a seed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import Tokenizer

import tokcache
from tests.fuzz import targets
from tokcache.differences import request
from tokcache.errors import InvalidConfig, StateRefused
from tokcache.gateway import config as gateway_config
from tokcache.gateway.api import streams
from tokcache.gateway.routing import chain
from tokcache.gateway.routing import files as slot_files
from tokcache.llama.server import calls
from tokcache.replay.traces import openai_log
from tokcache.state.names import child_name
from tokcache.state.tiers import Record
from tokcache.state.tiers.block_file import HEAD_BYTES, StateCodec
from tokcache.state.tiers.redis.reading import StateReader
from tokcache.text import cache_file
from tokcache.text.chat import proof
from tokcache.text.cuts.regex import syntax
from tokcache.text.wrappers import gguf_tokenizer


class Planted(NamedTuple):
    """An attribute of the project and its faulty value."""

    owner: Any
    name: str
    value: Any


def _unchecked_text(raw: bytes, errors: str = "strict") -> str:
    return raw.decode("utf-8", errors)


def _record_without_names(self: StateCodec, head: Any, first: bytes, address: Any) -> Record:
    end = head.head_bytes - head.checksum_bytes
    self.verify(first[end:], first[:end])
    tokens = first[HEAD_BYTES:end]
    return Record(child_name(address.base, tokens), tokens)


def _lengths_of_any_reply(self: StateReader, root_key: Any) -> set[int]:
    ask = [("SMEMBERS", self._keys.lengths(root_key))]
    (reply,) = self._calls.ask(ask, self._calls.deadline())
    if not isinstance(reply, list):
        raise StateRefused("garbage")
    return {int(each) for each in reply}


_wrap = tokcache.wrap


def _wrap_by_length(tokenizer: Tokenizer) -> Any:
    """Take tokenizers for equal whose JSON has the same length."""
    length = len(tokenizer.to_str())
    for seed in targets.TARGETS["tokenizer-json"].seeds():
        known = Tokenizer.from_str(seed.decode())
        if len(known.to_str()) == length:
            return _wrap(known)
    return _wrap(tokenizer)


def _any_escape(self: Any, _where: str) -> None:
    self.at = syntax._ESCAPE.match(self._pattern, self.at).end()


def _parsed_without_kinds(name: str, value: Any, minimum: int, maximum: int = 1 << 62) -> int:
    if not minimum <= value <= maximum:
        raise InvalidConfig(name)
    return int(value)


def _strings_without_end(data: Any, at: int) -> tuple[bytes, int]:
    start = at + 8
    stop = start + int.from_bytes(data[at:start], "little")
    assert stop <= len(data)
    return data[start:stop], stop


def _reply_of_one_form(answer: Any) -> dict[str, Any]:
    return {"reply": answer["choices"][0]["message"]["content"]}


def _blocks_by_a_set(body: dict[str, Any]) -> bool:
    messages = [each for each in body.get("messages") or [] if isinstance(each, dict)]
    contents = [each.get("content") for each in messages]
    blocks = [block for each in contents if isinstance(each, list) for block in each]
    return any(
        each.get("type") in {"tool_use", "thinking"} for each in blocks if isinstance(each, dict)
    )


def _content_of_anything(found: Any) -> Any:
    is_one = isinstance(found, list) and len(found) == 1 and found[0].get("type") == "text"
    return found[0].get("text") if is_one else found


def _text_of_any_type(found: Any, name: str) -> Any:
    return found.get(name) or ""


def _any_list(found: Any, _name: str) -> Any:
    return found


_FAULTS = {
    "cache-file": Planted(cache_file, "decoded", _unchecked_text),
    "block-file": Planted(StateCodec, "record", _record_without_names),
    "redis-answers": Planted(StateReader, "lengths", _lengths_of_any_reply),
    "gateway-list": Planted(slot_files, "_count", int),
    "tokenizer-json": Planted(tokcache, "wrap", _wrap_by_length),
    "pattern": Planted(syntax._Parser, "_skip_escape", _any_escape),
    "chat-template": Planted(proof, "TemplateSyntaxError", InvalidConfig),
    "gguf": Planted(gguf_tokenizer, "_read_string", _strings_without_end),
    "trace": Planted(openai_log, "_reply", _reply_of_one_form),
    "requests": Planted(request, "_has_anthropic_blocks", _blocks_by_a_set),
    "gateway-config": Planted(gateway_config, "require_int", _parsed_without_kinds),
    "body": Planted(chain, "_content", _content_of_anything),
    "events": Planted(streams, "_text", _text_of_any_type),
    "server-answer": Planted(calls, "_list", _any_list),
}


def planted(name: str) -> Planted:
    """Return the fault of a target."""
    return _FAULTS[name]


def plant(name: str) -> None:
    """Put the fault of a target into the code."""
    fault = planted(name)
    setattr(fault.owner, fault.name, fault.value)
