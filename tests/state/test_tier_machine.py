"""Two caches with one tier against a plain set of prefixes, with restarts and damage."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.machines import assert_fails, effort
from tests.state.engine import Engine, restored
from tests.state.media import DiskMedium, Medium, RedisMedium
from tokcache.state.tiers.disk import DiskTier

if TYPE_CHECKING:
    from tests.state.redis_server import RedisServer
    from tokcache.state.cache import PrefixStateCache

TOKENS = st.lists(st.integers(0, 2), max_size=12)
WHO = st.integers(0, 1)
SCOPES = st.sampled_from([None, "a"])


class SharedTier(RuleBasedStateMachine):
    """Every save reaches the tier before the next step: then no state may be missing anywhere."""

    medium: Medium
    settings: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str | None, set[tuple[int, ...]]] = {None: set(), "a": set()}
        self.snapshots: dict[str | None, dict[tuple[int, ...], bytes]] = {None: {}, "a": {}}
        self.is_damaged = False
        self.caches = [self.opened(max_entries) for max_entries in (1000, 2)]

    def opened(self, max_entries: int) -> PrefixStateCache:
        tier = self.medium.tier(hmac_key=b"k" * 32, **self.settings)
        return self.medium.cache(tier, block_tokens=4, max_entries=max_entries)

    @rule(who=WHO, scope=SCOPES, tokens=TOKENS)
    def save(self, who: int, scope: str | None, tokens: list[int]) -> None:
        Engine().save(self.caches[who], tokens, scope=scope)
        assert self.caches[who].flush()
        self.stored[scope].update(tuple(tokens[: n + 1]) for n in range(len(tokens)))

    @rule(who=WHO, scope=SCOPES, tokens=TOKENS)
    def find(self, who: int, scope: str | None, tokens: list[int]) -> None:
        with self.caches[who].namespace(b"m", scope=scope).plan(tokens) as plan:
            assert restored(plan, tokens) == plan.n_tokens
            known = self.stored[scope]
            best = max((n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in known), default=0)
            assert plan.n_tokens <= best
            if not self.is_damaged:
                assert plan.n_tokens == best

    @precondition(lambda self: not self.is_damaged)
    @rule(who=WHO, scope=SCOPES, tokens=TOKENS.filter(bool), state=st.binary(max_size=8))
    def store(self, who: int, scope: str | None, tokens: list[int], state: bytes) -> None:
        # A cache that has an older state of these tokens in memory would still serve that.
        if tuple(tokens) in self.snapshots[scope]:
            return
        if self.caches[who].namespace(b"m", scope=scope).store(tokens, state):
            assert self.caches[who].flush()
            self.snapshots[scope][tuple(tokens)] = state

    @rule(who=WHO, scope=SCOPES, tokens=TOKENS)
    def find_snapshot(self, who: int, scope: str | None, tokens: list[int]) -> None:
        known = self.snapshots[scope]
        handle = self.caches[who].namespace(b"m", scope=scope).find(tokens)
        best = [n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in known]
        if handle is None:
            assert self.is_damaged or not best
            return
        with handle:
            assert bytes(handle.state) == known[tuple(tokens[: handle.n_tokens])]
            assert self.is_damaged or handle.n_tokens == best[-1]

    @rule(who=WHO)
    def restart(self, who: int) -> None:
        max_entries = self.caches[who].max_entries
        self.caches[who].close()
        self.caches[who] = self.opened(max_entries)

    @rule(scope=SCOPES)
    def clear(self, scope: str | None) -> None:
        for cache in self.caches:
            cache.clear(scope=scope)
        for stored in (self.stored, self.snapshots):
            for each in [scope] if scope is not None else list(stored):
                stored[each].clear()

    @precondition(lambda self: bool(self.medium.states()))
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        states = self.medium.states()
        name = data.draw(st.sampled_from(sorted(states)))
        self.medium.put(name, self.damaged(states[name], data))
        self.is_damaged = True

    def damaged(self, state: Any, data: st.DataObject) -> Any:
        content = bytearray(state)
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        return bytes(content)

    @invariant()
    def holds(self) -> None:
        for cache in self.caches:
            cache._check()
            refusals: dict[str, Any] = dict(cache.stats().refusals)
            if not self.is_damaged:
                assert refusals == {}

    def teardown(self) -> None:
        for cache in self.caches:
            cache.close()


class SharedDisk(SharedTier):
    settings = {"is_synced": False}  # noqa: RUF012 (never changed)

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.medium = DiskMedium(self.folder)
        super().__init__()

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


class SharedRedis(SharedTier):
    settings = {}  # noqa: RUF012 (never changed)
    server: RedisServer

    def __init__(self) -> None:
        with self.server.client() as client:
            client.flushall()
        self.medium = RedisMedium(self.server)
        super().__init__()

    def damaged(self, state: Any, data: st.DataObject) -> Any:
        field = data.draw(st.sampled_from(sorted(state)))
        if data.draw(st.booleans()) or not state[field]:
            return {name: value for name, value in state.items() if name != field} or {b"a": b""}
        return state | {field: super().damaged(state[field], data)}


TestSharedDisk = SharedDisk.TestCase
TestSharedDisk.settings = effort(15, 20)
TestSharedRedis = pytest.mark.usefixtures("machines_redis")(SharedRedis.TestCase)
TestSharedRedis.settings = effort(10, 20)


@pytest.fixture
def machines_redis(redis_server: RedisServer) -> None:
    SharedRedis.server = redis_server


def test_a_clear_that_leaves_the_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskTier, "clear", lambda *_, **__: 0)
    assert_fails(SharedDisk, n_examples=200, n_steps=25)
