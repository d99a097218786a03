"""RedisTier: states in a Redis or Valkey server, or a cluster, shared by any number of hosts.

    NAMESPACE:1:SCOPE:OWNER:{POSITION-SLOT}:WAY   a hash, one state; names are digests
        head                                      what a file of the disk tier has, but its payload
        0, 1, 2, …                                the payload, in chunks
    … :WAY.new-RANDOM                             the same while it is written; expires, too
    NAMESPACE:1:SCOPE:{OWNER}:lengths             a set: of how many tokens the snapshots are

A state is one key: it is evicted, expires and is removed whole, and a script gives it its name if
nothing else took that meanwhile. What stands in braces places a key in a cluster: all keys that a
command names are in one slot. A scope is removed by scanning the namespace: an index of its keys
could be evicted, or miss what a writer that died left, and what is said to be gone has to be.

Who can write to a Redis can forge what is checked by XXH3 alone: give `hmac_key` where others can.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Self

from tokcache._prefix import common_tokens
from tokcache._validate import (
    require_bool,
    require_int,
    require_scope,
    require_seconds,
    require_size,
)
from tokcache.errors import InvalidConfig, LinkFailed, StateRefused
from tokcache.state.tiers import Address, Record, is_in_place
from tokcache.state.tiers.block_file import MAX_TOKENS, Head, StateCodec
from tokcache.state.tiers.circuit import Circuit
from tokcache.state.tiers.counting import Counting
from tokcache.state.tiers.redis_link import Command, Link, Refused
from tokcache.state.tiers.redis_notices import RedisNotices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from tokcache.state.names import Owner
    from tokcache.stats import TierStats

_log = logging.getLogger("tokcache")

LAYOUT, HEAD = 1, b"head"
WAYS = (0, 1)
DEFAULT_STATE_BYTES, DEFAULT_TTL_S = 512 << 20, 86_400.0
CHUNK_BYTES = 1 << 20  # what every server takes: its proto-max-bulk-len is at least that
_CHUNKS_A_CALL = 8
_SMALL, _SMALL_AT_ONCE = 256 << 10, 2 << 20  # bytes that take less time than a round trip
_FIRST_ASKED, _ASKED = 8, 64  # places looked up in one call: most prompts are new, or short
_SLOWEST = 32 << 20  # bytes a second: what comes slower was not worth waiting for
_NEW_S = 60.0  # what is being written lives that long at least
_TRIES = 3
_LENGTH = re.compile(rb"[1-9][0-9]{0,8}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NO_WRITES = {"full", "read_only", "not_persisting", "no_replicas", "permission"}
_BROKEN = {"damaged", "forged", "missing"}

_BEGIN = """
redis.call('HSET', KEYS[1], 'head', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 'begun'"""
_PUBLISH = """
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
_DISCARD = """
if redis.call('HGET', KEYS[1], 'head') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0"""


class _Patience:
    """Until when all calls of one look-up, or of one write, have to end."""

    def __init__(self, timeout_s: float) -> None:
        self.until = time.monotonic() + timeout_s

    def moving(self, n_bytes: int) -> Self:
        """Have patience for so many bytes more."""
        self.until += n_bytes / _SLOWEST
        return self


class _Place:
    """Where a state is written: the key it gets in the end, whose head must be `replaced` then."""

    def __init__(self, key: str, replaced: bytes) -> None:
        self.key, self.replaced = key, replaced
        self.new = f"{key}.new-{secrets.token_hex(8)}"


class RedisState:
    """A state that was found in Redis: its head is read and verified, its payload is not yet."""

    def __init__(
        self, tier: RedisTier, key: str, value: bytes, address: Address, patience: _Patience
    ) -> None:
        self._tier, self._value, self._patience = tier, value, patience
        self.key, self._base = key, address.base
        self._fingerprint = address.owner.fingerprint
        self.next: RedisState | None = None
        self._fetched: bytearray | None = None
        self._head = Head.read(value)
        self._first = value[: self._head.head_bytes]
        self._checksum = value[self._head.head_bytes :]
        if len(self._checksum) != self._head.checksum_bytes:
            raise StateRefused("damaged")
        self.record = tier.codec.record(self._head, self._first, address)
        self.n_bytes = self._head.payload_bytes - self._head.tag_bytes

    @property
    def stored_bytes(self) -> int:
        """How long the payload is as it is stored."""
        return self._head.payload_bytes

    def followers(self) -> Iterator[RedisState]:
        """Yield the blocks that go on where this one ends."""
        state = self
        while state.next is not None and state.next._base == state.record.name:  # noqa: SLF001
            state = state.next
            yield state

    def fetched(self, payload: bytearray) -> None:
        """Take a payload that came together with another's."""
        self._fetched = payload

    def read_into(self, buffer: memoryview) -> None:
        """Read the payload into `buffer` and verify it there.

        Errors: StateRefused.
        """
        if self._head.tag_bytes:
            buffer[:] = self._payload(self._spare())
        else:
            self._payload(buffer)
        self._tier.count_read(self.n_bytes)

    def view(self) -> memoryview:
        """Return the payload, verified, in memory that only the view holds.

        Errors: StateRefused.
        """
        payload = self._payload(self._spare())
        self._tier.count_read(self.n_bytes)
        return memoryview(payload).toreadonly()

    def _spare(self) -> memoryview:
        if self.n_bytes > self._tier.max_state_bytes:
            self._tier.notices.oversize(self._fingerprint, self.n_bytes)
            raise StateRefused("over_budget")
        try:
            return memoryview(bytearray(self._head.payload_bytes))
        except MemoryError as error:
            raise StateRefused("no_memory") from error

    def _payload(self, target: memoryview) -> Any:
        if self._fetched is None:
            self._tier.fetch(self, target, self._patience)
        else:
            target[:], self._fetched = self._fetched, None
        return self._tier.codec.opened_payload(self._head, self._first, target, self._checksum)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, StateRefused) and error.args[0] in _BROKEN:
            self._tier.discard(self.key, self._value, self._patience)


class RedisTier(Counting):
    """States in one namespace of a Redis; see the module for its layout.

    `url` is redis-py's: `redis://[[user]:[password]@]host[:port][/db]`, `rediss://…` with TLS,
    `unix://…`; any node's for a cluster. Nothing is asked of it yet, it may come up later. With
    `hmac_key` forged states are refused and names can't be guessed; with `encryption_key`
    (16, 24 or 32 bytes, AES-GCM) tokens and states are unreadable without it.

    Units:  `max_state_bytes` bytes of one state, or a size such as "512M"; how much all may take is
            the server's to limit (maxmemory). `ttl_s` seconds after its last use a state is removed
            by the server, None: never. A look-up with all it reads, and a write, take `timeout_s`
            seconds at most, and one second more for each 32 MiB. After `n_failures` calls in a row
            that failed none is made for `retry_s` seconds, twice as long after each call that fails
            then, a minute at most.
    Errors: InvalidConfig for settings and URLs that can't be; MissingExtra where a library is
            missing. After that nothing raises, whatever the server does: reasons are counted.
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
        self.namespace = _checked_namespace(namespace)
        self.codec = StateCodec(hmac_key, encryption_key)
        self.codec.require_libraries()
        n_failures = require_int("n_failures", n_failures, minimum=1)
        retry_s = require_seconds("retry_s", retry_s)
        if not isinstance(url, str):
            raise InvalidConfig(f"url must be a str, not {type(url).__name__}")
        self._is_cluster = require_bool("is_cluster", is_cluster)
        self._link = Link(url, self.timeout_s, is_cluster=is_cluster)
        self._asking, self._writing = Circuit(n_failures, retry_s), Circuit(n_failures, retry_s)
        self.notices = RedisNotices(self._link, self.namespace, self.max_state_bytes)
        super().__init__()

    def __repr__(self) -> str:
        """Say where it is and what it may hold; the URL's password is not shown."""
        kept = "kept until evicted" if self.ttl_s is None else f"kept for {self.ttl_s:,.0f} s"
        return (
            f"<RedisTier {self._link.place}, namespace {self.namespace!r}: states of at most "
            f"{self.max_state_bytes:,} bytes, {kept}>"
        )

    # Names

    def _prefix(self, scope: str | None) -> str:
        return f"{self.namespace}:{LAYOUT}:{self.codec.scope(scope).hex()}"

    def _key(self, address: Address) -> str:
        owner = self.codec.owner(address.owner).hex()
        place = f"{address.position:x}-{self.codec.keyed(address.slot).hex()}"
        return f"{self._prefix(address.owner.scope)}:{owner}:{{{place}}}"

    def _keys(self, address: Address) -> list[str]:
        key = self._key(address)
        return [f"{key}:{way}" for way in WAYS]

    def _lengths_key(self, owner: Owner) -> str:
        return f"{self._prefix(owner.scope)}:{{{self.codec.owner(owner).hex()}}}:lengths"

    # Asking

    def _replies(self, commands: Sequence[Command], patience: _Patience) -> list[Any]:
        return self._ask(partial(self._link.ask, commands), commands, patience)

    def _ask(
        self,
        ask: Callable[[float], list[Any]],
        commands: Sequence[Command],
        patience: _Patience,
    ) -> list[Any]:
        """Return the replies.

        Errors: StateRefused where there were none, or the circuit is open.
        """
        with self._lock:
            if not self._asking.lets_through():
                raise StateRefused("circuit_open")
        return self._asked(ask, commands, patience)

    def _asked(
        self,
        ask: Callable[[float], list[Any]],
        commands: Sequence[Command],
        patience: _Patience,
    ) -> list[Any]:
        is_good = False
        try:
            replies = ask(patience.until)
            is_good = True
        except LinkFailed as failure:
            self._note_failure(str(failure))
            raise StateRefused(str(failure)) from failure
        finally:
            with self._lock:
                self._asking.note(is_good=is_good)
        self.notices.answered(commands, replies)
        return replies

    def _note_failure(self, reason: str) -> None:
        """Log why there was no answer, where that is no longer chance."""
        if reason in ("auth", "permission"):
            self.notices.no_access(reason)
            return
        with self._lock:
            is_chance = not self._asking.would_open()
        if not is_chance:
            circuit = self._asking
            self.notices.no_answer(reason, circuit.n_failures, self.timeout_s, circuit.retry_s)

    # Reading

    def find_each(self, wanted: Iterable[tuple[Address, bytes]]) -> Iterator[RedisState | None]:
        """Yield what is stored at each address, in order; many are asked for at once."""
        patience = _Patience(self.timeout_s)
        steps, n_asked = iter(wanted), _FIRST_ASKED
        while batch := list(islice(steps, n_asked)):
            n_asked = _ASKED
            keys = [self._keys(address) for address, _ in batch]
            try:
                heads = iter(self._heads([key for pair in keys for key in pair], patience))
            except StateRefused as refusal:
                self.refuse(str(refusal))
                self.count("misses")
                return
            found = [
                self._best(address, rest, {key: next(heads) for key in pair}, patience)
                for (address, rest), pair in zip(batch, keys, strict=True)
            ]
            for state, follower in pairwise(found):
                if state is not None:
                    state.next = follower
            for state in found:
                self.count("misses" if state is None else "hits")
                yield state

    def _heads(self, keys: Sequence[str], patience: _Patience) -> list[Any]:
        return self._replies([("HGET", key, HEAD) for key in keys], patience)

    def _best(
        self, address: Address, rest: bytes, values: dict[str, Any], patience: _Patience
    ) -> RedisState | None:
        """Return the state that shares most with `rest`, None if there is none."""
        found: list[RedisState] = []
        for key, value in values.items():
            try:
                state = self._opened(key, value, address, patience)
            except StateRefused as refusal:
                self.refuse(str(refusal))
                if str(refusal) in _BROKEN:
                    self.discard(key, value, patience)
            else:
                found += [state] if state else []
        return max(found, key=lambda s: common_tokens(s.record.tokens, rest), default=None)

    def _opened(
        self, key: str, value: Any, address: Address, patience: _Patience
    ) -> RedisState | None:
        if value is None:
            return None
        if isinstance(value, Refused):
            raise StateRefused(value.reason)
        if not isinstance(value, bytes):
            raise StateRefused("garbage")
        return RedisState(self, key, value, address, patience)

    def fetch(self, state: RedisState, target: memoryview, patience: _Patience) -> None:
        """Fill `target` with a payload as it is stored; small ones that follow come along.

        Errors: StateRefused.
        """
        rooms, along = enumerate(_chunks(target)), self._small_followers(state)
        patience.moving(target.nbytes + sum(len(payload) for _, payload in along))
        while group := list(islice(rooms, _CHUNKS_A_CALL)):
            commands: list[Command] = [("HGET", state.key, n) for n, _ in group]
            commands += [("HGET", each.key, 0) for each, _ in along]
            targets = [room for _, room in group] + [memoryview(payload) for _, payload in along]
            replies = self._ask(partial(self._link.fill, commands, targets), commands, patience)
            for (_, room), reply in zip(group, replies, strict=False):
                _require_filled(reply, room.nbytes)
            for (each, payload), reply in zip(along, replies[len(group) :], strict=True):
                if reply == len(payload):
                    each.fetched(payload)
            along = []

    def _small_followers(self, state: RedisState) -> list[tuple[RedisState, bytearray]]:
        """Return the states to fetch together with this one, and room for them."""
        along: list[tuple[RedisState, bytearray]] = []
        if self._is_cluster:  # they are elsewhere
            return along
        n_bytes = 0
        for each in state.followers():
            n_bytes += each.stored_bytes
            if each.stored_bytes > _SMALL or n_bytes > _SMALL_AT_ONCE:
                break
            along.append((each, bytearray(each.stored_bytes)))
        return along

    def lengths(self, owner: Owner) -> set[int]:
        """Return the numbers of tokens of this owner's snapshots."""
        try:
            ask = [("SMEMBERS", self._lengths_key(owner))]
            return _checked_lengths(self._replies(ask, _Patience(self.timeout_s))[0])
        except StateRefused as refusal:
            self.refuse(str(refusal))
            return set()

    def discard(self, key: str, value: Any, patience: _Patience) -> None:
        """Remove a state that is damaged, unless another has taken its place meanwhile."""
        try:
            self._replies([("EVAL", _DISCARD, 1, key, value)], patience)
        except StateRefused as refusal:
            self.refuse(str(refusal))

    # Writing

    def write(self, address: Address, record: Record, payload: memoryview) -> bool:
        """Store a payload; True if it is there now."""
        try:
            return self._write(address, record, payload)
        except StateRefused as refusal:
            self.refuse(str(refusal))
            return False

    def _write(self, address: Address, record: Record, payload: memoryview) -> bool:
        if payload.nbytes > self.max_state_bytes:
            self.notices.oversize(address.owner.fingerprint, payload.nbytes)
            raise StateRefused("over_budget")
        patience = _Patience(self.timeout_s).moving(payload.nbytes)
        for _ in range(_TRIES):
            place = self._free_place(address, record, patience)
            if place is None:
                return True
            if self._is_put(place, self._writes(place, address, record, payload), patience):
                return True
        raise StateRefused("overtaken")

    def _free_place(self, address: Address, record: Record, patience: _Patience) -> _Place | None:
        """Return where to write to; None if it is there already.

        Errors: StateRefused if both ways are taken by blocks of other tokens.
        """
        keys = self._keys(address)
        for key, value in zip(keys, self._heads(keys, patience), strict=True):
            try:
                state = self._opened(key, value, address, patience)
            except StateRefused as refusal:
                if isinstance(value, bytes):
                    self.refuse(str(refusal))
                    return _Place(key, value)
                if str(refusal) != "wrong_type":
                    raise
                self.refuse("wrong_type")
                continue  # it is somebody else's
            if state is None:
                return _Place(key, b"")
            is_held = is_in_place(state.record, record, address.owner.kind)
            if is_held is not None:
                return None if is_held else _Place(key, value)
        raise StateRefused("place_taken")

    def _writes(
        self, place: _Place, address: Address, record: Record, payload: memoryview
    ) -> Iterator[list[Command]]:
        """Yield what is to be sent at once; the last reply tells what became of it."""
        first, stored, checksum = self.codec.packed(address, record, payload)
        chunks = list(_chunks(memoryview(stored)))
        # Not less than a state: a server that is full may evict first what expires first.
        new_ms = _ms(max(self.ttl_s or 0.0, _NEW_S))
        commands: list[Command] = [("EVAL", _BEGIN, 1, place.new, first + checksum, new_ms)]
        for n, chunk in enumerate(chunks):
            commands.append(("HSET", place.new, n, chunk))
            if len(commands) > _CHUNKS_A_CALL:
                yield commands
                commands = [("PEXPIRE", place.new, new_ms)]
        commands += self._lengths_used(address)  # after the payload, which may evict what is old
        end = (len(chunks) + 1, place.replaced, 0 if self.ttl_s is None else _ms(self.ttl_s))
        yield [*commands, ("EVAL", _PUBLISH, 2, place.new, place.key, *end)]
        self.count("written_bytes", sum(chunk.nbytes for chunk in chunks))

    def _is_put(self, place: _Place, writes: Iterator[list[Command]], patience: _Patience) -> bool:
        """Send all; False if another writer was faster.

        Errors: StateRefused.
        """
        with self._lock:
            if not self._writing.lets_through():
                raise StateRefused("writes_paused")
        reason, said = "", b""
        try:
            for commands in writes:
                said = self._last_reply(place, commands, patience)
        except StateRefused as refusal:
            reason = str(refusal)
            raise
        finally:
            with self._lock:
                self._writing.note(is_good=reason not in _NO_WRITES)
                is_open = self._writing.is_open
            if is_open:
                self.notices.not_written(reason)
        if said not in (b"published", b"overtaken"):
            raise StateRefused("removed" if said == b"removed" else "garbage")
        self.notices.written()
        self.count("writes", said == b"published")
        return said == b"published"

    def _last_reply(self, place: _Place, commands: list[Command], patience: _Patience) -> Any:
        replies = self._replies(commands, patience)
        for reply in replies:
            if isinstance(reply, Refused):
                unlink = partial(self._link.ask, [("UNLINK", place.new)])
                with contextlib.suppress(StateRefused):
                    self._ask(unlink, (), patience)
                raise StateRefused(reply.reason)
        return replies[-1]

    def _lengths_used(self, address: Address) -> list[Command]:
        """Return what keeps a snapshot's length known for as long as the state is kept."""
        if address.owner.kind != "snapshot":
            return []
        key = self._lengths_key(address.owner)
        return [("SADD", key, address.position), self._used(key)]

    def _used(self, key: str) -> Command:
        return ("TOUCH", key) if self.ttl_s is None else ("PEXPIRE", key, _ms(self.ttl_s))

    def touch(self, addresses: Sequence[Address]) -> list[int]:
        """Note that these are in use: their time begins anew.

        Return the places in `addresses` of those that are gone.
        """
        keys = [key for address in addresses for key in self._keys(address)]
        commands = [self._used(key) for key in keys]
        for address in addresses:
            commands += self._lengths_used(address)
        try:
            replies = iter(self._replies(commands, _Patience(self.timeout_s)))
        except StateRefused as refusal:
            self.refuse(str(refusal))
            return []
        return [n for n in range(len(addresses)) if not any(islice(replies, len(WAYS)))]

    # Removing

    def remove(self, address: Address) -> None:
        """Remove one state."""
        try:
            self._unlink(self._keys(address))
        except StateRefused as refusal:
            self._not_removed(str(refusal))

    def clear(self, *, scope: str | None = None) -> int:
        """Remove all states of a scope, by default all in the namespace; return how many went."""
        scope = require_scope(scope)
        prefix = f"{self.namespace}:{LAYOUT}" if scope is None else self._prefix(scope)
        return self._remove_below(f"{prefix}:")

    def _remove_below(self, prefix: str) -> int:
        n_removed = 0
        try:
            for keys in self._link.scan(f"{prefix}*"):
                n_removed += self._unlink([key for key in keys if key.startswith(prefix.encode())])
        except (LinkFailed, StateRefused) as failure:
            self._not_removed(str(failure))
        return n_removed

    def _unlink(self, keys: Sequence[str | bytes]) -> int:
        """Remove keys, whether the circuit is open or not; return how many states went.

        Errors: StateRefused.
        """
        if not keys:
            return 0
        commands: list[Command] = [("UNLINK", key) for key in keys]
        ask = partial(self._link.ask, commands)
        replies = self._asked(ask, (), _Patience(self.timeout_s))  # `_not_removed` tells
        for reply in replies:
            if isinstance(reply, Refused):
                raise StateRefused(reply.reason)
        return sum(reply == 1 and _is_state(key) for key, reply in zip(keys, replies, strict=True))

    def _not_removed(self, reason: str) -> None:
        self.refuse(reason)
        stays = "until they are removed" if self.ttl_s is None else f"for {self.ttl_s:,.0f} s"
        _log.warning(
            "states could not be removed from the Redis at %s (%s): they may stay there %s",
            *(self._link.place, reason, stays),
        )

    # Counting

    def stats(self) -> TierStats:
        """Return the counters; what is held, all clients together, is the server's to tell."""
        return self.counted()

    def close(self) -> None:
        """Close the connections; the states stay."""
        self._link.close()

    # Forks

    def after_fork_in_child(self) -> None:
        """Make a new lock, and connections when they are needed: its parent's are not used."""
        super().after_fork_in_child()
        self.notices.forget()
        self._link.forget()
        for circuit in (self._asking, self._writing):
            circuit.note(is_good=True)


def _ms(seconds: float) -> int:
    return max(int(seconds * 1000), 1)


def _chunks(data: memoryview) -> Iterator[memoryview]:
    for at in range(0, data.nbytes, CHUNK_BYTES):
        yield data[at : at + CHUNK_BYTES]


def _require_filled(reply: Any, n_bytes: int) -> None:
    if reply is None:
        raise StateRefused("missing")
    if isinstance(reply, Refused):
        raise StateRefused(reply.reason)
    if reply != n_bytes:
        raise StateRefused("damaged")


def _checked_lengths(reply: Any) -> set[int]:
    if isinstance(reply, Refused):
        raise StateRefused(reply.reason)
    if not isinstance(reply, list | set):
        raise StateRefused("garbage")
    lengths = {int(each) for each in reply if isinstance(each, bytes) and _LENGTH.fullmatch(each)}
    return {length for length in lengths if length <= MAX_TOKENS}


def _is_state(key: str | bytes) -> bool:
    name = key.encode() if isinstance(key, str) else key
    return name.endswith(tuple(b":%d" % way for way in WAYS))


def _checked_namespace(namespace: object) -> str:
    if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
        raise InvalidConfig(
            f"namespace must be 1 to 64 letters, digits and characters of '_.:-', not {namespace!r}"
        )
    return namespace
