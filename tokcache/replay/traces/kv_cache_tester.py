"""kv-cache-tester: sessions of coding agents, one a file, with those of subagents inside.

`hash_ids` stand for whole blocks of `block_size` tokens; the rest of a prompt has no id. The times
of a subagent's requests count from its start, and its ids are those of its session.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING, Any

from tokcache.errors import Malformed

if TYPE_CHECKING:
    from tokcache.replay.traces.request import Blocks

name = "kv-cache-tester"
about = "the sessions of kv-cache-tester, with subagents"
block_tokens = 64
is_session = True


def matches(value: Any) -> bool:
    """Return whether a record is a session."""
    return isinstance(value, dict) and isinstance(value.get("requests"), list)


def block_tokens_of(value: Any) -> int:
    """Return the tokens of a block."""
    found = value.get("block_size") if isinstance(value, dict) else None
    return found if type(found) is int and found > 0 else block_tokens


def is_global(value: Any) -> bool:
    """Return whether equal ids of other sessions are equal blocks."""
    return isinstance(value, dict) and value.get("hash_id_scope") == "global"


def blocks(value: Any) -> Iterable[Blocks]:
    """Return the prompts of a session and its subagents, in the order of their times."""
    found: list[tuple[float, Blocks]] = []
    try:
        _collect(value["requests"], 0.0, found)
    except (KeyError, TypeError, RecursionError):
        raise Malformed("a request has no t, in or hash_ids") from None
    found.sort(key=lambda pair: pair[0])  # stable: equal times keep the file's order
    return [one for _, one in found]


def columns(values: list[Any]) -> None:
    """Return None: a record has many prompts, which `blocks` puts in order."""


def _collect(requests: Any, begins: float, found: list[tuple[float, Blocks]]) -> None:
    for one in requests:
        at = begins + one["t"]
        if not isfinite(at):
            raise TypeError
        if isinstance(one.get("requests"), list):
            _collect(one["requests"], at, found)
        elif type(one["hash_ids"]) is list:
            found.append((at, (one["hash_ids"], one["in"])))
        else:
            raise TypeError
