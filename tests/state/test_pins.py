"""Pins of prefixes: evicted and pruned after all others, in this process and later ones."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from tokcache import DiskTier, PrefixStateCache
from tokcache.state.store import block_address
from tokcache.state.tiers import Record

if TYPE_CHECKING:
    from pathlib import Path

    from tokcache.state.namespace import Namespace

BLOCK, N_BYTES = 4, 1000


def n_bytes(start: int, stop: int) -> int:
    return (stop - start) * N_BYTES


def fill(_start: int, _stop: int, buffer: memoryview) -> None:
    buffer[:] = bytes(len(buffer))


def save(states: Namespace, tokens: list[int]) -> None:
    assert states.save(tokens, fill, n_bytes) > 0


def held(states: Namespace, tokens: list[int]) -> int:
    with states.plan(tokens) as plan:
        return plan.n_tokens


def prompt(n: int) -> list[int]:
    return [1000 * n + at for at in range(1, 9)]


def made(**settings: Any) -> tuple[PrefixStateCache, Namespace]:
    cache = PrefixStateCache(
        **{"block_tokens": BLOCK, "ram_bytes": "1M", "max_entries": 4, **settings}
    )
    return cache, cache.namespace(b"model")


@pytest.mark.parametrize("budget", [{"max_entries": 3}, {"ram_bytes": 40_000, "max_entries": 99}])
def test_a_pinned_prefix_survives_the_pressure_of_other_prompts(budget: dict[str, Any]) -> None:
    cache, states = made(**budget)
    save(states, prompt(0))
    assert states.pin(prompt(0)) == (8, 8)
    # The chat uses the pinned blocks and its own together: they must not be evicted together.
    save(states, [*prompt(0), *prompt(1)])
    assert held(states, [*prompt(0), *prompt(1)]) == 16
    for n in range(2, 40):
        save(states, prompt(n))
        cache._check()
    assert cache.stats().evictions > 30
    assert held(states, [*prompt(0), *prompt(1)]) == 8


def test_pinned_prefixes_are_evicted_when_nothing_else_is_left() -> None:
    cache, states = made()
    for n in range(8):
        save(states, prompt(n))
        states.pin(prompt(n))
        cache._check()
    assert [held(states, prompt(n)) for n in range(8)] == [0] * 4 + [8] * 4


def test_an_unpinned_prefix_is_evicted_as_others_are() -> None:
    cache, states = made()
    for n in (0, 1):
        save(states, prompt(n))
        states.pin(prompt(n))
    for n in range(2, 9):  # evictions pass over the pinned ones
        save(states, prompt(n))
    assert states.pin(prompt(0), is_pinned=False) == (8, 8)
    for n in range(9, 16):
        save(states, prompt(n))
    assert [held(states, prompt(n)) for n in (0, 1)] == [0, 8]
    cache._check()


def test_a_trunk_stays_pinned_until_all_pins_that_need_it_have_ended() -> None:
    for ended in ([0, 1], [0, 2], [1, 2]):
        cache, states = made(max_entries=5)
        trunk = prompt(0)
        prefixes = [trunk, [*trunk, *prompt(1)], [*trunk, *prompt(2)]]
        for tokens in prefixes:
            save(states, tokens)
            states.pin(tokens)
        for n in ended:
            states.pin(prefixes[n], is_pinned=False)
        (left,) = set(range(3)) - set(ended)
        for n in range(3, 20):
            save(states, prompt(n))
        assert [held(states, each) for each in prefixes] == [
            len(prefixes[left]) if n == left else 8 for n in range(3)
        ]
        cache._check()


def test_a_pinned_snapshot_is_evicted_last_and_survives_its_conversation() -> None:
    cache, states = made(conversation_snapshots=2)
    opening = prompt(0)

    def filled(tokens: list[int]) -> bool:
        return states.fill(tokens, 100, lambda _: None, n_opening=8)

    assert filled(opening)
    assert states.pin(opening) == (8, 8)
    for n in range(1, 9):
        assert filled([*opening, n])
        assert filled(prompt(n))
        cache._check()
    found = states.find(opening)
    assert found is not None
    assert found.n_tokens == 8
    found.close()
    assert states.pin(opening, is_pinned=False) == (8, 8)
    for n in range(1, 9):
        filled(prompt(n))
    assert states.find(opening) is None


def test_pinned_states_do_not_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    _, states = made(ttl_s=5)
    for n in range(2):
        save(states, prompt(n))
    states.pin(prompt(0))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    assert [held(states, prompt(n)) for n in range(2)] == [8, 0]


def test_a_folder_prunes_pinned_files_last_in_a_later_process_too(tmp_path: Path) -> None:
    for n, is_kept in ((0, True), (1, False)):
        cache, states = made(disk=DiskTier(tmp_path / "states"))
        save(states, prompt(n))
        if is_kept:
            cache.flush()
            states.pin(prompt(n))
        cache.close()
    tier = DiskTier(tmp_path / "states", ttl_s=50)
    files = list(tier.files())
    assert [file.is_pinned for file in sorted(files, key=lambda file: file.used_at)] == [
        True,
        True,
        False,
        False,
    ]
    for file in files:  # pinned ones are used least recently, and all are older than `ttl_s`
        os.utime(tier.path / file.path, (0, 0) if file.is_pinned else (1, 1))
    tier.prune("1M")
    assert [file.is_pinned for file in tier.files()] == [True, True]
    cache, states = made(disk=tier)
    assert held(states, prompt(0)) == 8
    # The pin of states that this process has not pinned ends, too.
    states.pin(prompt(0), is_pinned=False)
    cache.close()
    assert not any(file.is_pinned for file in tier.files())
    tier.prune(0)
    assert not list(tier.files())


def test_a_longer_block_in_the_place_of_a_pinned_file_is_pinned(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "states")
    cache, states = made(disk=tier, block_tokens=8)
    save(states, prompt(0)[:3])
    states.pin(prompt(0)[:3])
    cache.close()
    # Another process that has not seen the short block stores a longer one in its place.
    other, others = made(block_tokens=8)
    save(others, prompt(0))
    index = other._store.memory.index
    ((root_key, root),) = index.roots.items()
    (node,) = root.children.values()
    address = block_address(index, node, root_key)
    assert tier.write(address, Record(node.name, node.tokens), memoryview(bytes(8000)))
    (file,) = tier.files()
    assert file.is_pinned
    assert file.n_bytes > 8000


def test_a_prefix_that_is_not_held_whole_is_not_pinned() -> None:
    _, states = made()
    save(states, prompt(0))
    assert states.pin([*prompt(0), 5]) == (8, 8)
    for n in range(1, 9):
        save(states, prompt(n))
    assert held(states, prompt(0)) == 0
    assert states.pin([]) == (0, 0)
