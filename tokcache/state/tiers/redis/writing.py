"""Writing states to a Redis.

1. The heads in both places show whether the state is there already, or which place is free.
2. The state is written under a temporary key that expires, several chunks a call.
3. A script renames the key into its place, if that still holds the head seen in step 1 and no
   chunk was evicted; otherwise the write starts again.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING

from tokcache.errors import StateRefused
from tokcache.state.tiers import Address, Record, is_in_place
from tokcache.state.tiers.redis.commands import BEGIN, PUBLISH, Refused
from tokcache.state.tiers.redis.reading import CHUNKS_A_CALL, chunks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokcache.state.tiers.redis.calls import Calls, Deadline
    from tokcache.state.tiers.redis.commands import Command, StateKeys
    from tokcache.state.tiers.redis.notices import RedisNotices
    from tokcache.state.tiers.redis.reading import StateReader

_NEW_MS = 60_000  # a state that is being written lives at least that long
_TRIES = 3


class _Target:
    """The key that a state gets in the end, and the head there that it replaces."""

    def __init__(self, key: str, replaced: bytes) -> None:
        self.key, self.replaced = key, replaced
        self.new = f"{key}.new-{secrets.token_hex(8)}"


class StateWriter:
    """Writes of states."""

    def __init__(
        self, calls: Calls, keys: StateKeys, reader: StateReader, notices: RedisNotices
    ) -> None:
        self._calls, self._keys, self._reader, self._notices = calls, keys, reader, notices

    def write(self, address: Address, record: Record, payload: memoryview) -> None:
        """Store a payload, if it is not there yet.

        Errors: StateRefused.
        """
        self._reader.require_size(payload.nbytes, address.root_key.fingerprint)
        deadline = self._calls.deadline()
        deadline.extend(payload.nbytes)
        for _ in range(_TRIES):
            target = self._free_target(address, record, deadline)
            if target is None:
                return
            if self._is_put(target, self._writes(target, address, record, payload), deadline):
                return
        raise StateRefused("overtaken")

    def _free_target(self, address: Address, record: Record, deadline: Deadline) -> _Target | None:
        """Return where to write to; None if the state is there already.

        Errors: StateRefused if both places hold blocks of other tokens.
        """
        keys = self._keys.places(address)
        for key, value in zip(keys, self._reader.heads(keys, deadline), strict=True):
            try:
                state = self._reader.opened(key, value, address, deadline)
            except StateRefused as refusal:
                if isinstance(value, bytes):
                    self._reader.counters.refuse(str(refusal))
                    return _Target(key, value)
                if str(refusal) != "wrong_type":
                    raise
                self._reader.counters.refuse("wrong_type")
                continue  # another program's key
            if state is None:
                return _Target(key, b"")
            is_held = is_in_place(state.record, record, address.root_key.kind)
            if is_held is not None:
                return None if is_held else _Target(key, value)
        raise StateRefused("place_taken")

    def _writes(
        self, target: _Target, address: Address, record: Record, payload: memoryview
    ) -> Iterator[list[Command]]:
        """Yield the commands of each call; the last reply of all is that of the script."""
        first, stored, checksum = self._reader.codec.packed(address, record, payload)
        parts = list(chunks(memoryview(stored)))
        # Not less than a state: a server that is full may evict first the keys that expire first.
        new_ms = max(self._keys.ttl_ms, _NEW_MS)
        commands: list[Command] = [("EVAL", BEGIN, 1, target.new, first + checksum, new_ms)]
        for n, chunk in enumerate(parts):
            commands.append(("HSET", target.new, n, chunk))
            if len(commands) > CHUNKS_A_CALL:
                yield commands
                commands = [("PEXPIRE", target.new, new_ms)]
        # After the payload, for which a server may evict keys that were not used for long.
        commands += self._keys.lengths_used(address)
        end = (len(parts) + 1, target.replaced, self._keys.ttl_ms)
        yield [*commands, ("EVAL", PUBLISH, 2, target.new, target.key, *end)]
        self._reader.counters.count("written_bytes", sum(chunk.nbytes for chunk in parts))

    def _is_put(self, target: _Target, writes: Iterator[list[Command]], deadline: Deadline) -> bool:
        """Send all; False if another writer was faster.

        Errors: StateRefused.
        """
        outcome = b""
        with self._calls.writing():
            for commands in writes:
                replies = self._calls.ask(commands, deadline)
                refused = [reply for reply in replies if isinstance(reply, Refused)]
                if refused:
                    with contextlib.suppress(StateRefused):  # otherwise it expires
                        self._calls.ask_anyway([("UNLINK", target.new)], deadline)
                    raise StateRefused(refused[0].reason)
                outcome = replies[-1]
        if outcome not in (b"published", b"overtaken"):
            raise StateRefused("removed" if outcome == b"removed" else "garbage")
        self._notices.written()
        self._reader.counters.count("writes", outcome == b"published")
        return bool(outcome == b"published")
