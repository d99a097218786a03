"""SnapshotIndex: the snapshots in memory, by root key and tokens."""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING

from tokcache._prefix import common_tokens
from tokcache.state.names import DIGEST_BYTES, TOKEN_BYTES, RootKey, root_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Python objects of one state: itself, its name, places in dicts, heap item. Its tokens and its
# root key's names are added. Checked by tests/state/test_snapshots.py::test_overhead_is_counted.
SNAPSHOT_BYTES = 1700
_MAX_LOOKED_AT = 16


class Snapshot:
    """The state after all of `tokens`; `is_kept` ones are never evicted, `is_pinned` ones last."""

    __slots__ = (
        "__weakref__",
        "conversation",
        "hits",
        "is_dead",
        "is_kept",
        "is_pinned",
        "is_queued",
        "n_bytes",
        "n_past",
        "name",
        "pins",
        "priority",
        "root_key",
        "tick",
        "tokens",
        "touched_s",
        "used_at",
        "used_s",
        "written",
    )
    children: tuple[()] = ()

    def __init__(
        self, root_key: RootKey, name: bytes, tokens: bytes, n_past: int, priority: int
    ) -> None:
        self.root_key, self.name, self.tokens = root_key, name, tokens
        self.n_past, self.priority = n_past, priority
        self.conversation = b""  # the name of the tokens that tell it from others; empty: none
        self.n_bytes = 0
        self.hits = 0
        self.pins = 0
        self.tick = 0
        self.used_s = self.touched_s = self.used_at = 0.0
        self.written = 0
        self.is_dead = self.is_queued = self.is_kept = self.is_pinned = False

    @property
    def n_tokens(self) -> int:
        """The number of tokens of the prefix."""
        return len(self.tokens) // TOKEN_BYTES


def prefix_names(
    root_key: RootKey, tokens: bytes, lengths: Iterable[int]
) -> Iterator[tuple[int, bytes]]:
    """Yield (n, the name of the first n tokens) for ascending `lengths`, in one pass."""
    person = b"tokcache.whole.2".ljust(16, b"\0")
    state = blake2b(root_name(root_key), digest_size=DIGEST_BYTES, person=person)
    done = 0
    view = memoryview(tokens)
    for n_tokens in lengths:
        stop = n_tokens * TOKEN_BYTES
        state.update(view[done:stop])
        done = stop
        yield n_tokens, state.digest()


class SnapshotIndex:
    """The states by root key and name; not thread-safe: the store holds its lock.

    The same tokens may be held once for each priority.
    """

    def __init__(self) -> None:
        self._named: dict[tuple[RootKey, bytes], dict[int, Snapshot]] = {}
        self._lengths: dict[RootKey, Counter[int]] = {}
        self._of_root: dict[RootKey, dict[Snapshot, None]] = {}
        self._talks: dict[bytes, dict[Snapshot, None]] = {}
        self.n_states = 0

    def lengths(self, root_key: RootKey) -> set[int]:
        """Return the numbers of tokens of the states with this root key."""
        return set(self._lengths.get(root_key, ()))

    def get(self, root_key: RootKey, name: bytes, tokens: bytes) -> Snapshot | None:
        """Return the state of these tokens that has the highest priority."""
        held = self._named.get((root_key, name))
        best = held[max(held)] if held else None
        return best if best is not None and best.tokens == tokens else None

    def nearest(self, root_key: RootKey, tokens: bytes) -> list[tuple[int, bool]]:
        """Return how far `tokens` begin as the newest states do, and whether those go on then."""
        newest = islice(reversed(self._of_root.get(root_key, {})), _MAX_LOOKED_AT)
        same = [(common_tokens(each.tokens, tokens), each.n_tokens) for each in newest]
        return [(n_same, n_same < n_tokens) for n_same, n_tokens in same]

    def same(self, snapshot: Snapshot) -> Snapshot | None:
        """Return the state that `snapshot` would replace."""
        return self._named.get((snapshot.root_key, snapshot.name), {}).get(snapshot.priority)

    def of_conversation(self, snapshot: Snapshot) -> list[Snapshot]:
        """Return the states of the same conversation, itself included; none if it has none."""
        return list(self._talks.get(snapshot.conversation, ()))

    def add(self, snapshot: Snapshot) -> None:
        """Add a state; its place must be free."""
        held = self._named.setdefault((snapshot.root_key, snapshot.name), {})
        if snapshot.priority in held:
            raise AssertionError("two states in one place")
        held[snapshot.priority] = snapshot
        self._lengths.setdefault(snapshot.root_key, Counter())[snapshot.n_tokens] += 1
        self._of_root.setdefault(snapshot.root_key, {})[snapshot] = None
        if snapshot.conversation:
            self._talks.setdefault(snapshot.conversation, {})[snapshot] = None
        self.n_states += 1

    def remove(self, snapshot: Snapshot) -> None:
        """Take out a state."""
        key = (snapshot.root_key, snapshot.name)
        del self._named[key][snapshot.priority]
        if not self._named[key]:
            del self._named[key]
        lengths = self._lengths[snapshot.root_key]
        lengths[snapshot.n_tokens] -= 1
        if not lengths[snapshot.n_tokens]:
            del lengths[snapshot.n_tokens]
        del self._of_root[snapshot.root_key][snapshot]
        if snapshot.conversation:
            del self._talks[snapshot.conversation][snapshot]
            if not self._talks[snapshot.conversation]:
                del self._talks[snapshot.conversation]
        if not lengths:
            del self._lengths[snapshot.root_key]
            del self._of_root[snapshot.root_key]
        snapshot.is_dead = True
        self.n_states -= 1

    def __iter__(self) -> Iterator[Snapshot]:
        return iter([each for held in self._named.values() for each in held.values()])

    def _check(self) -> None:
        found = list(self)
        if len(found) != self.n_states or any(each.is_dead for each in found):
            raise AssertionError("states miscounted, or a dead one among them")
        talks = [(name, each) for name, held in self._talks.items() for each in held]
        if {*talks} != {(each.conversation, each) for each in found if each.conversation}:
            raise AssertionError("states of another conversation, or too few")
        for root_key, lengths in self._lengths.items():
            if lengths != Counter(each.n_tokens for each in found if each.root_key == root_key):
                raise AssertionError("lengths miscounted")
            if {*self._of_root[root_key]} != {each for each in found if each.root_key == root_key}:
                raise AssertionError("states of another root, or too few")
