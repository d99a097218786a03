"""Reading states from a Redis: heads of many at once, then the payloads that are asked for."""

from __future__ import annotations

import re
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from tokcache._prefix import common_tokens
from tokcache.errors import StateRefused
from tokcache.state.tiers import BROKEN, Stored
from tokcache.state.tiers.block_file import MAX_TOKENS, Head
from tokcache.state.tiers.redis.commands import DISCARD, HEAD, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tokcache.state.names import RootKey
    from tokcache.state.tiers import Address
    from tokcache.state.tiers.block_file import StateCodec
    from tokcache.state.tiers.counters import TierCounters
    from tokcache.state.tiers.redis.calls import Calls, Deadline
    from tokcache.state.tiers.redis.commands import Command, StateKeys
    from tokcache.state.tiers.redis.notices import RedisNotices

CHUNK_BYTES = 1 << 20  # every server takes that: its proto-max-bulk-len is at least as large
CHUNKS_A_CALL = 8
_SMALL, _SMALL_AT_ONCE = 256 << 10, 2 << 20  # bytes that take less time than a round trip
_FIRST_ASKED, _ASKED = 8, 64  # addresses looked up in one call: most prompts are new, or short
_LENGTH = re.compile(rb"[1-9][0-9]{0,8}")


class RedisState(Stored):
    """A state that was found in Redis: its head is read and verified, its payload is not yet."""

    def __init__(
        self, reader: StateReader, key: str, value: bytes, address: Address, deadline: Deadline
    ) -> None:
        self._reader, self._value, self._deadline = reader, value, deadline
        self.key, self._base = key, address.base
        self._fingerprint = address.root_key.fingerprint
        self.next: RedisState | None = None
        self._fetched: bytearray | None = None
        self._head = Head.read(value)
        self._first = value[: self._head.head_bytes]
        self._checksum = value[self._head.head_bytes :]
        if len(self._checksum) != self._head.checksum_bytes:
            raise StateRefused("damaged")
        self.record = reader.codec.record(self._head, self._first, address)
        self.n_bytes = self._head.payload_bytes - self._head.tag_bytes

    @property
    def stored_bytes(self) -> int:
        """The length of the payload as it is stored."""
        return self._head.payload_bytes

    def followers(self) -> Iterator[RedisState]:
        """Yield the blocks that continue where this one ends."""
        state = self
        while state.next is not None and state.next._base == state.record.name:  # noqa: SLF001
            state = state.next
            yield state

    def fetched(self, payload: bytearray) -> None:
        """Take a payload that came together with another state's."""
        self._fetched = payload

    def read_into(self, buffer: memoryview) -> None:
        """Read the payload into `buffer` and verify it there.

        Errors: StateRefused.
        """
        if self._head.tag_bytes:
            buffer[:] = self._payload(self._new_buffer())
        else:
            self._payload(buffer)
        self._reader.counters.count("read_bytes", self.n_bytes)

    def view(self) -> memoryview:
        """Return the payload, verified, in memory that only the view holds.

        Errors: StateRefused.
        """
        payload = self._payload(self._new_buffer())
        self._reader.counters.count("read_bytes", self.n_bytes)
        return memoryview(payload).toreadonly()

    def _new_buffer(self) -> memoryview:
        self._reader.require_size(self.n_bytes, self._fingerprint)
        try:
            return memoryview(bytearray(self._head.payload_bytes))
        except MemoryError as error:
            raise StateRefused("no_memory") from error

    def _payload(self, target: memoryview) -> Any:
        if self._fetched is None:
            self._reader.fetch(self, target, self._deadline)
        else:
            target[:], self._fetched = self._fetched, None
        codec = self._reader.codec
        return codec.opened_payload(self._head, self._first, target, self._checksum)

    def discard(self) -> None:
        """Remove the state, unless another one has taken its place."""
        self._reader.discard(self.key, self._value, self._deadline)

    def close(self) -> None:
        """Do nothing: it holds no resources."""


class StateReader:
    """Look-ups of states, and of the lengths of snapshots.

    Units: `max_state_bytes` bytes that one state may have.
    """

    def __init__(
        self,
        calls: Calls,
        keys: StateKeys,
        codec: StateCodec,
        counters: TierCounters,
        notices: RedisNotices,
        *,
        max_state_bytes: int,
        is_cluster: bool,
    ) -> None:
        self.codec, self.counters = codec, counters
        self._calls, self._keys, self._notices = calls, keys, notices
        self._max_state_bytes, self._is_cluster = max_state_bytes, is_cluster

    def require_size(self, n_bytes: int, fingerprint: bytes) -> None:
        """Check the size of a state.

        Errors: StateRefused.
        """
        if n_bytes > self._max_state_bytes:
            self._notices.oversize(fingerprint, n_bytes)
            raise StateRefused("over_budget")

    def find_each(self, wanted: Iterable[tuple[Address, bytes]]) -> Iterator[RedisState | None]:
        """Yield the state at each address, in order; many are asked for at once."""
        deadline = self._calls.deadline()
        steps, n_asked = iter(wanted), _FIRST_ASKED
        while batch := list(islice(steps, n_asked)):
            n_asked = _ASKED
            keys = [self._keys.places(address) for address, _ in batch]
            try:
                heads = iter(self.heads([key for pair in keys for key in pair], deadline))
            except StateRefused as refusal:
                self.counters.refuse(str(refusal))
                self.counters.count("misses")
                return
            found = [
                self._best(address, rest, {key: next(heads) for key in pair}, deadline)
                for (address, rest), pair in zip(batch, keys, strict=True)
            ]
            for state, follower in pairwise(found):
                if state is not None:
                    state.next = follower
            for state in found:
                self.counters.count("misses" if state is None else "hits")
                yield state

    def heads(self, keys: Sequence[str], deadline: Deadline) -> list[Any]:
        """Return the head at each key, None where there is none.

        Errors: StateRefused.
        """
        return self._calls.ask([("HGET", key, HEAD) for key in keys], deadline)

    def _best(
        self, address: Address, rest: bytes, values: dict[str, Any], deadline: Deadline
    ) -> RedisState | None:
        """Return the state that shares most with `rest`, None if there is none."""
        found: list[RedisState] = []
        for key, value in values.items():
            try:
                state = self.opened(key, value, address, deadline)
            except StateRefused as refusal:
                self.counters.refuse(str(refusal))
                if str(refusal) in BROKEN:
                    self.discard(key, value, deadline)
            else:
                found += [state] if state else []
        return max(found, key=lambda s: common_tokens(s.record.tokens, rest), default=None)

    def opened(
        self, key: str, value: Any, address: Address, deadline: Deadline
    ) -> RedisState | None:
        """Return the state whose head is `value`, None if that is None.

        Errors: StateRefused.
        """
        if value is None:
            return None
        if isinstance(value, Refused):
            raise StateRefused(value.reason)
        if not isinstance(value, bytes):
            raise StateRefused("garbage")
        return RedisState(self, key, value, address, deadline)

    def fetch(self, state: RedisState, target: memoryview, deadline: Deadline) -> None:
        """Fill `target` with a payload as it is stored; small ones that follow come along.

        Errors: StateRefused.
        """
        along: list[tuple[RedisState, bytearray]] = []
        n_along = 0
        for each in () if self._is_cluster else state.followers():  # a cluster has them elsewhere
            n_along += each.stored_bytes
            if each.stored_bytes > _SMALL or n_along > _SMALL_AT_ONCE:
                break
            along.append((each, bytearray(each.stored_bytes)))
        deadline.extend(target.nbytes + sum(len(payload) for _, payload in along))
        rooms = enumerate(chunks(target))
        while group := list(islice(rooms, CHUNKS_A_CALL)):
            commands: list[Command] = [("HGET", state.key, n) for n, _ in group]
            commands += [("HGET", each.key, 0) for each, _ in along]
            targets = [room for _, room in group] + [memoryview(payload) for _, payload in along]
            replies = self._calls.fill(commands, targets, deadline)
            for (_, room), reply in zip(group, replies, strict=False):
                if isinstance(reply, Refused):
                    raise StateRefused(reply.reason)
                if reply != room.nbytes:
                    raise StateRefused("missing" if reply is None else "damaged")
            for (each, payload), reply in zip(along, replies[len(group) :], strict=True):
                if reply == len(payload):
                    each.fetched(payload)
            along = []

    def lengths(self, root_key: RootKey) -> set[int]:
        """Return the numbers of tokens of the snapshots with this root key.

        Errors: StateRefused.
        """
        ask = [("SMEMBERS", self._keys.lengths(root_key))]
        (reply,) = self._calls.ask(ask, self._calls.deadline())
        if isinstance(reply, Refused):
            raise StateRefused(reply.reason)
        if not isinstance(reply, list | set):
            raise StateRefused("garbage")
        named = [each for each in reply if isinstance(each, bytes) and _LENGTH.fullmatch(each)]
        return {length for each in named if (length := int(each)) <= MAX_TOKENS}

    def discard(self, key: str, value: Any, deadline: Deadline) -> None:
        """Remove a state that is damaged, unless another has taken its place meanwhile."""
        try:
            self._calls.ask([("EVAL", DISCARD, 1, key, value)], deadline)
        except StateRefused as refusal:
            self.counters.refuse(str(refusal))


def chunks(data: memoryview) -> Iterator[memoryview]:
    """Yield `data` in the chunks in which it is stored."""
    for at in range(0, data.nbytes, CHUNK_BYTES):
        yield data[at : at + CHUNK_BYTES]
