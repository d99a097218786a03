"""RedisTier: the Tier protocol on top of calls, look-ups and writes to a Redis.

Errors end here: a server that does not answer, or a state that can't be used, costs a miss and a
counter. Whoever can write to a Redis can forge states that are protected by XXH3 alone: give
`hmac_key` where others can.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING

from tokcache._validate import (
    require_bool,
    require_int,
    require_scope,
    require_seconds,
    require_size,
)
from tokcache.errors import InvalidConfig, LinkFailed, StateRefused, TierUnavailable
from tokcache.state.tiers.block_file import StateCodec
from tokcache.state.tiers.counters import TierCounters
from tokcache.state.tiers.redis.calls import Calls
from tokcache.state.tiers.redis.commands import PLACES, PROBED, Refused, StateKeys, is_state
from tokcache.state.tiers.redis.notices import RedisNotices
from tokcache.state.tiers.redis.reading import StateReader
from tokcache.state.tiers.redis.writing import StateWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tokcache.state.names import RootKey
    from tokcache.state.tiers import Address, Record
    from tokcache.state.tiers.redis.commands import Command
    from tokcache.state.tiers.redis.reading import RedisState
    from tokcache.stats import TierStats

DEFAULT_STATE_BYTES, DEFAULT_TTL_S = 512 << 20, 86_400.0
# Keys are found by scanning for NAMESPACE:*, so it must hold no character of a glob pattern.
_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class RedisTier:
    """States in one namespace of a Redis.

    `url` is redis-py's: `redis://[[user]:[password]@]host[:port][/db]`, `rediss://…` with TLS,
    `unix://…`; any node's for a cluster. No connection is made yet, so the server may start later;
    `check` connects and raises if something is wrong. With `hmac_key` forged states are refused and
    names can't be guessed; with `encryption_key` (16, 24 or 32 bytes, AES-GCM) tokens and states
    are unreadable without it.

    Units:  `max_state_bytes` bytes of one state, or a size such as "512M"; the server limits the
            bytes of all (maxmemory). `ttl_s` seconds after its last use the server removes a state,
            None: never. A look-up with all it reads, and a write, take `timeout_s` seconds at most,
            and one second more for each 32 MiB. After `n_failures` calls in a row that failed none
            is made for `retry_s` seconds, twice as long after each further failure, a minute at
            most.
    Errors: InvalidConfig for settings and URLs that can't be used; MissingExtra where a library is
            missing. After that only `check` raises: reasons are counted.
    Threads: safe, each has its connection while it asks; a forked child makes its own.
    """

    label = "redis"
    is_mapped = False

    def __init__(
        self,
        url: str,
        *,
        max_state_bytes: int | str = DEFAULT_STATE_BYTES,
        ttl_s: float | None = DEFAULT_TTL_S,
        timeout_s: float = 1.0,
        namespace: str = "tokcache",
        hmac_key: bytes | None = None,
        encryption_key: bytes | None = None,
        is_cluster: bool = False,
        n_failures: int = 3,
        retry_s: float = 1.0,
    ) -> None:
        self.max_state_bytes = require_size("max_state_bytes", max_state_bytes)
        self.ttl_s = None if ttl_s is None else require_seconds("ttl_s", ttl_s)
        self.timeout_s = require_seconds("timeout_s", timeout_s)
        if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
            raise InvalidConfig(
                "namespace must be 1 to 64 letters, digits and characters of '_.-', not "
                f"{namespace!r}"
            )
        self.namespace = namespace
        self.codec = StateCodec(hmac_key, encryption_key)
        self.codec.require_libraries()
        n_failures = require_int("n_failures", n_failures, minimum=1)
        retry_s = require_seconds("retry_s", retry_s)
        is_cluster = require_bool("is_cluster", is_cluster)
        if not isinstance(url, str):
            raise InvalidConfig(f"url must be a str, not {type(url).__name__}")
        from tokcache.state.tiers.redis.link import Link  # noqa: PLC0415 (it imports redis-py)

        link = Link(url, self.timeout_s, is_cluster=is_cluster)
        self._notices = RedisNotices(
            link, namespace, timeout_s=self.timeout_s, max_state_bytes=self.max_state_bytes
        )
        self._counters = TierCounters()
        self._keys = StateKeys(namespace, self.codec, self.ttl_s)
        self._calls = Calls(
            link, self._notices, timeout_s=self.timeout_s, n_failures=n_failures, retry_s=retry_s
        )
        self._reader = StateReader(
            *(self._calls, self._keys, self.codec, self._counters, self._notices),
            max_state_bytes=self.max_state_bytes,
            is_cluster=is_cluster,
        )
        self._writer = StateWriter(self._calls, self._keys, self._reader, self._notices)

    def __repr__(self) -> str:
        """Return the address, namespace and limits; the URL's password is not shown."""
        kept = "kept until evicted" if self.ttl_s is None else f"kept for {self.ttl_s:,.0f} s"
        return (
            f"<RedisTier {self._calls.link.place}, namespace {self.namespace!r}: states of at most "
            f"{self.max_state_bytes:,} bytes, {kept}>"
        )

    def check(self) -> None:
        """Raise if states can't be read from or written to the Redis now.

        Connects, and sends each command that the tier uses once, on keys of its own in the
        namespace. Call it where a program starts: later, trouble costs misses and a line in the
        log. Look-ups and writes that were held back after failures go on if it succeeds.

        Errors: TierUnavailable; the message has the cause and the cure.
        Cost:   one round trip, at most `timeout_s`.
        """
        commands, n_read = self._keys.probe()
        try:
            replies = self._calls.ask_anyway(commands, self._calls.deadline())
        except StateRefused as refusal:
            raise TierUnavailable(self._notices.explained(str(refusal), refusal)) from refusal
        refused = [
            (reply.reason, command[0])
            for reply, command in zip(replies, commands, strict=True)
            if isinstance(reply, Refused)
        ]
        denied = {name for reason, name in refused if reason == "permission"}
        if denied:
            raise TierUnavailable(self._notices.explained_rights(sorted(denied)))
        if refused or replies[n_read] != PROBED:
            reason = refused[0][0] if refused else "garbage"
            raise TierUnavailable(self._notices.explained(reason))
        self._calls.close_circuits()

    # Reading

    def find_each(self, wanted: Iterable[tuple[Address, bytes]]) -> Iterator[RedisState | None]:
        """Yield the state at each address, in order; many are asked for at once."""
        return self._reader.find_each(wanted)

    def lengths(self, root_key: RootKey) -> set[int]:
        """Return the numbers of tokens of the snapshots with this root key."""
        try:
            return self._reader.lengths(root_key)
        except StateRefused as refusal:
            self.refuse(str(refusal))
            return set()

    # Writing

    def write(self, address: Address, record: Record, payload: memoryview) -> bool:
        """Store a payload; True if it is there now."""
        try:
            self._writer.write(address, record, payload)
        except StateRefused as refusal:
            self.refuse(str(refusal))
            return False
        return True

    def pin(self, addresses: Sequence[Address], *, is_pinned: bool) -> None:
        """Do nothing: the server's `maxmemory-policy` and TTL decide."""

    def touch(self, addresses: Sequence[Address]) -> list[int]:
        """Note that these are in use: their time starts again.

        Return the indices in `addresses` of those that are gone.
        """
        keys = [key for address in addresses for key in self._keys.places(address)]
        commands = [self._keys.used(key) for key in keys]
        for address in addresses:
            commands += self._keys.lengths_used(address)
        try:
            replies = iter(self._calls.ask(commands, self._calls.deadline()))
        except StateRefused as refusal:
            self.refuse(str(refusal))
            return []
        return [n for n in range(len(addresses)) if not any(islice(replies, len(PLACES)))]

    # Removing

    def remove(self, address: Address) -> None:
        """Remove one state."""
        try:
            self._unlink(self._keys.places(address))
        except StateRefused as refusal:
            self._not_removed(str(refusal))

    def clear(self, *, scope: str | None = None) -> int:
        """Remove all states of a scope, by default all in the namespace; return those removed."""
        scope = require_scope(scope)
        prefix = self._keys.prefix(scope, is_all=scope is None)
        n_removed = 0
        try:
            for keys in self._calls.link.scan(f"{prefix}*"):
                n_removed += self._unlink([key for key in keys if key.startswith(prefix.encode())])
        except (LinkFailed, StateRefused) as failure:
            self._not_removed(str(failure))
        return n_removed

    def _unlink(self, keys: Sequence[str | bytes]) -> int:
        """Remove keys, whether the circuit is open or not; return the number of states removed.

        Errors: StateRefused.
        """
        if not keys:
            return 0
        commands: list[Command] = [("UNLINK", key) for key in keys]
        replies = self._calls.ask_anyway(commands, self._calls.deadline())
        for reply in replies:
            if isinstance(reply, Refused):
                raise StateRefused(reply.reason)
        return sum(reply == 1 and is_state(key) for key, reply in zip(keys, replies, strict=True))

    def _not_removed(self, reason: str) -> None:
        self.refuse(reason)
        self._notices.not_removed(reason, self.ttl_s)

    # Counting

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""
        self._counters.refuse(reason)

    def name_model(self, fingerprint: bytes, name: str) -> None:
        """Do nothing: no command lists the states in a Redis."""

    def stats(self) -> TierStats:
        """Return the counters; the server's own INFO reports the bytes that it holds."""
        return self._counters.stats()

    def close(self) -> None:
        """Close the connections; the states stay."""
        self._calls.link.close()
