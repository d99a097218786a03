"""The reasons of misses against a plain model of two scopes and two fingerprints.

The model knows everything that was ever saved and evicted, expired or cleared, scope by scope. It
repeats no digest and no tree: it says which claims are true. A claim that is wrong fails; a claim
that is missing may only be one that the documentation allows to be missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.machines import assert_fails, effort
from tests.state.engine import Engine
from tokcache._prefix import n_common
from tokcache.state.cache import PrefixStateCache
from tokcache.state.memory import StateMemory
from tokcache.state.reasons import Miss, MissReason
from tokcache.state.removals import N_ROWS

if TYPE_CHECKING:
    import pytest

    from tokcache.state.index import Node

KEYS = st.tuples(st.sampled_from([b"m", b"n"]), st.sampled_from([None, "a"]))
# Prompts of few tokens, so that they share beginnings, and repeated, so that blocks are long.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(
    lambda drawn: [token for token in drawn for _ in range(3)]
)
Key = tuple[bytes, str | None]
Prompt = tuple[int, ...]


def held(cache: PrefixStateCache) -> dict[Key, set[Prompt]]:
    """Return every prefix that memory holds, as a walk over the whole tree finds it."""
    found: dict[Key, set[Prompt]] = {}

    def walk(node: Any, before: Prompt, prefixes: set[Prompt]) -> None:
        own = tuple(memoryview(node.tokens).cast("i"))
        whole = (*before, *own)
        prefixes.update(whole[: len(before) + n + 1] for n in range(len(own)))
        for child in node.children.values():
            walk(child, whole[: child.start], prefixes)

    for root_key, root in cache._store.memory.index.roots.items():
        walk(root, (), found.setdefault(root_key[:2], set()))
    return found


class MissMachine(RuleBasedStateMachine):
    max_entries = 3
    ttl_s: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixStateCache(
            max_entries=self.max_entries, block_tokens=6, ttl_s=self.ttl_s
        )
        self.ever: dict[Key, set[Prompt]] = {}  # held at some time since the last clear
        self.evicted: dict[Key, set[Prompt]] = {}
        self.expired: dict[Key, set[Prompt]] = {}
        self.removed: set[Key] = set()
        self.now = held(self.cache)
        self.saved: list[tuple[Key, list[int]]] = []

    def follow(self, removed: dict[Key, set[Prompt]]) -> None:
        """Note what has gone since the last step as removed in this way."""
        now = held(self.cache)
        for key, prefixes in self.now.items():
            gone = prefixes - now.get(key, set())
            for other in (self.evicted, self.expired):
                other.setdefault(key, set()).difference_update(gone)
            removed.setdefault(key, set()).update(gone)
            self.removed |= {key} if gone else set()
        for key, prefixes in now.items():
            self.ever.setdefault(key, set()).update(prefixes)
        self.now = now

    @rule(saves=st.lists(st.tuples(KEYS, TOKENS), min_size=1, max_size=6))
    def save(self, saves: list[tuple[Key, list[int]]]) -> None:
        for key, tokens in saves:
            Engine().save(self.cache, tokens, *key)
            self.saved.append((key, tokens))
            self.follow(self.evicted)

    @rule(key=KEYS, n=st.integers(1, 4))
    def save_many(self, key: Key, n: int) -> None:
        for first in range(n):
            Engine().save(self.cache, [10 + first] * 7, *key)
            self.follow(self.evicted)

    @precondition(lambda self: self.ttl_s is not None)
    @rule()
    def expire(self) -> None:
        for node in self.cache._store.memory.index.nodes():
            node.used_s -= 1000.0
        self.cache._store.memory._swept_s -= 1000.0
        with self.cache.namespace(b"other").plan([1]):  # the sweep
            pass
        self.follow(self.expired)

    @precondition(lambda self: len(self.saved) > 8)
    @rule(scope=st.sampled_from(["a", None]))
    def clear(self, scope: str | None) -> None:
        self.cache.clear(scope=scope)
        for each in (self.ever, self.evicted, self.expired):
            for key in [key for key in each if scope in (None, key[1])]:
                del each[key]
        self.removed = {key for key in self.removed if scope not in (None, key[1])}
        self.now, self.saved = held(self.cache), []

    @rule(key=KEYS, tokens=TOKENS)
    def find(self, key: Key, tokens: list[int]) -> None:
        self.check_find(key, tokens)

    def check_find(self, key: Key, tokens: list[int]) -> None:
        with self.cache.namespace(key[0], scope=key[1]).plan(tokens, explain=True) as plan:
            miss, n_found = plan.miss, plan.n_tokens
        wanted = tuple(tokens)
        now = self.now.get(key, set())
        assert n_found == max((n_common(wanted, each) for each in now), default=0)
        assert (miss is None) == (n_found == len(wanted))
        if miss is not None:
            assert (miss.at_token, miss.n_missed) == (n_found, len(wanted) - n_found)
            self.check(key, wanted, miss)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), more=TOKENS)
    def find_saved(self, data: st.DataObject, more: list[int]) -> None:
        """Look for a prompt that was saved in this or another scope, and for one like it."""
        key, tokens = data.draw(st.sampled_from(self.saved[-12:]))
        n_cut = data.draw(st.integers(0, len(tokens) - 1))
        for each in (tokens, [*tokens[:n_cut], *more]):
            self.check_find(key, each)
            self.check_find((b"m", "a"), each)

    def check(self, key: Key, wanted: Prompt, miss: Miss) -> None:
        """Raise AssertionError if the claim of a miss is not true, or a better one is."""
        at, reason = miss.at_token, miss.reason
        now = self.now.get(key, set())
        next_one = wanted[: at + 1]
        if reason in (MissReason.EVICTED, MissReason.EXPIRED):
            removed = self.evicted if reason is MissReason.EVICTED else self.expired
            assert miss.n_removed >= min(16, (miss.n_missed + 1) // 2)
            assert wanted[: at + miss.n_removed] in removed[key]
            assert wanted[: at + miss.n_removed] not in now
        elif reason is MissReason.DIFFERENT_TEXT:
            assert at
            assert any(len(each) > at and each[:at] == wanted[:at] for each in now)
            assert (*wanted[:at], *miss.held_tokens) in now
            assert miss.held_tokens[0] != wanted[at]
        elif reason is MissReason.OTHER_FINGERPRINT:
            other = next(each for each in (b"m", b"n") if each != key[0])
            assert not at
            assert any(each[:1] == next_one for each in self.now.get((other, key[1]), ()))
            assert next_one not in self.ever.get(key, set()) or self.is_full()
        elif reason is MissReason.NEVER_STORED:
            assert next_one not in self.ever.get(key, set())
            assert not at or not any(len(each) > at and each[:at] == wanted[:at] for each in now)
        else:
            assert reason is MissReason.NOT_KNOWN  # only after a removal in this namespace
            assert key in self.removed

    def is_full(self) -> bool:
        return any(table.has_lost for table in self.cache._store.memory.removals._tables.values())

    @invariant()
    def holds(self) -> None:
        self.cache._check()
        for table in self.cache._store.memory.removals._tables.values():
            assert len(table._keys) <= 8 * N_ROWS


class ExpiringMachine(MissMachine):
    max_entries = 1000
    ttl_s = 100.0


TestEvictions = MissMachine.TestCase
TestEvictions.settings = effort(20, 30)
TestExpirations = ExpiringMachine.TestCase
TestExpirations.settings = effort(12, 25)


def test_an_eviction_that_is_told_as_an_expiry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    note = StateMemory._note_removal

    def told_otherwise(self: StateMemory, node: Node, _cause: str) -> None:
        note(self, node, "ttl_s")

    monkeypatch.setattr(StateMemory, "_note_removal", told_otherwise)
    assert_fails(MissMachine)
