"""The keys of a Redis tier, and the commands and scripts that it uses.

    NAMESPACE:1:SCOPE:ROOT:{POSITION-SLOT}:PLACE   a hash, one state; names are digests
        head                                       a disk tier's file without its payload
        0, 1, 2, …                                 the payload, in chunks
    … :PLACE.new-RANDOM                            the same while it is written; expires, too
    NAMESPACE:1:SCOPE:{ROOT}:lengths               a set: the numbers of tokens of the snapshots

Each slot has two places, 0 and 1; the second takes a block that shares only its first tokens with
the one in the first. A state is one key, so that it is evicted, expires and is removed as a whole,
and a script renames it into its place unless another state has taken that meanwhile. The part in
braces decides where a cluster keeps a key: all keys that one command names are on one node. A scope
is removed by scanning the namespace: an index of its keys could be evicted, or lack those of a
writer that died, and after `clear` no state of the scope may be left.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokcache.state.names import RootKey
    from tokcache.state.tiers import Address
    from tokcache.state.tiers.block_file import StateCodec

Command = tuple[Any, ...]
"""A command and its arguments; the key comes first, after the number of keys in an EVAL."""

LAYOUT, HEAD = 1, b"head"
PLACES = (0, 1)

BEGIN = """
redis.call('HSET', KEYS[1], 'head', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 'begun'"""
PUBLISH = """
if redis.call('HLEN', KEYS[1]) ~= tonumber(ARGV[1]) then
  redis.call('DEL', KEYS[1])
  return 'removed'
end
if (redis.call('HGET', KEYS[2], 'head') or '') ~= ARGV[2] then
  redis.call('DEL', KEYS[1])
  return 'overtaken'
end
redis.call('RENAME', KEYS[1], KEYS[2])
if ARGV[3] == '0' then redis.call('PERSIST', KEYS[2])
else redis.call('PEXPIRE', KEYS[2], ARGV[3]) end
return 'published'"""
DISCARD = """
if redis.call('HGET', KEYS[1], 'head') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0"""

_PROBE = b"tokcache", 60_000  # the value of a probe, and the milliseconds that it would live


@dataclass(frozen=True, slots=True)
class Refused:
    """The reply to a command that the server refused."""

    reason: str


class StateKeys:
    """The keys of one namespace, and the commands that depend on how long they live.

    Units: `ttl_s` seconds after its last use a key expires; None: never.
    """

    def __init__(self, namespace: str, codec: StateCodec, ttl_s: float | None) -> None:
        self.ttl_ms = 0 if ttl_s is None else milliseconds(ttl_s)
        self._namespace, self._codec = namespace, codec

    def prefix(self, scope: str | None = None, *, is_all: bool = False) -> str:
        """Return the beginning of all keys of a scope, or of all scopes."""
        start = f"{self._namespace}:{LAYOUT}:"
        return start if is_all else f"{start}{self._codec.scope(scope).hex()}:"

    def places(self, address: Address) -> list[str]:
        """Return the keys that a state may have, one a place."""
        root = self._codec.root(address.root_key).hex()
        slot = f"{address.position:x}-{self._codec.keyed(address.slot).hex()}"
        key = f"{self.prefix(address.root_key.scope)}{root}:{{{slot}}}"
        return [f"{key}:{place}" for place in PLACES]

    def lengths(self, root_key: RootKey) -> str:
        """Return the key of the numbers of tokens of the snapshots with this root key."""
        return f"{self.prefix(root_key.scope)}{{{self._codec.root(root_key).hex()}}}:lengths"

    def used(self, key: str) -> Command:
        """Return the command that starts the time of a key again."""
        return ("PEXPIRE", key, self.ttl_ms) if self.ttl_ms else ("TOUCH", key)

    def lengths_used(self, address: Address) -> list[Command]:
        """Return the commands that keep a snapshot's length for as long as the snapshot."""
        if address.root_key.kind != "snapshot":
            return []
        key = self.lengths(address.root_key)
        return [("SADD", key, address.position), self.used(key)]

    def probe(self) -> tuple[list[Command], int]:
        """Return every command that the tier uses, on keys of its own, and the index of the read.

        The read replies `PROBED`, if the server did all that was asked.
        """
        key = f"{self.prefix(is_all=True)}check:{{{secrets.token_hex(8)}}}"
        state, new, lengths = f"{key}:0", f"{key}:0.new", f"{key}:lengths"
        value, ttl_ms = _PROBE
        commands: list[Command] = [
            ("EVAL", BEGIN, 1, new, value, ttl_ms),
            ("HSET", new, 0, value),
            ("EVAL", PUBLISH, 2, new, state, 2, b"", self.ttl_ms),
            ("HGET", state, HEAD),
            ("SADD", lengths, 1),
            ("PEXPIRE", lengths, ttl_ms),
            ("TOUCH", lengths),
            ("SMEMBERS", lengths),
            ("EVAL", DISCARD, 1, state, value),
            ("UNLINK", new, state, lengths),
            ("SCAN", b"0", "MATCH", f"{key}*", "COUNT", 1),
        ]
        return commands, 3


PROBED = _PROBE[0]


def milliseconds(seconds: float) -> int:
    """Return whole milliseconds, at least one."""
    return max(int(seconds * 1000), 1)


def is_state(key: str | bytes) -> bool:
    """Return whether a key is that of a state, and neither unfinished nor a set of lengths."""
    name = key.encode() if isinstance(key, str) else key
    return name.endswith(tuple(b":%d" % place for place in PLACES))
