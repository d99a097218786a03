"""The disk tier: what one process wrote, another finds; nobody finds anything else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.state.engine import Engine, restored, state_of
from tokcache.errors import InvalidConfig, MissingExtra
from tokcache.state.behind import Job, WriteBehind
from tokcache.state.blocks import Owner
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.disk import DiskTier

SECRET = list(range(7001, 7041))  # a prompt that must not be found where it was removed
KEYS = [{}, {"hmac_key": b"k" * 32}, {"encryption_key": b"e" * 32}]
KEYS += [{"hmac_key": b"k" * 32, "encryption_key": b"e" * 16}]
IDS = ["plain", "hmac", "encrypted", "both"]


def cache_on(disk: Any, **settings: Any) -> PrefixStateCache:
    return PrefixStateCache(**{"block_tokens": 8, "max_entries": 1000, "disk": disk, **settings})


def found(cache: PrefixStateCache, tokens: list[int], **key: Any) -> int:
    with cache.plan(tokens, **{"fingerprint": b"m", **key}) as plan:
        return restored(plan, tokens) if plan.blocks else 0


def all_bytes(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())


def int32(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.suffix in (".0", ".1"))


@pytest.mark.parametrize("keys", KEYS, ids=IDS)
@pytest.mark.parametrize("aligned", [False, True])
def test_after_a_restart_the_first_prompt_comes_from_the_disk(
    tmp_path: Path, keys: Any, aligned: bool
) -> None:
    first = cache_on(DiskTier.open(tmp_path, **keys))
    Engine().save(first, SECRET, aligned=aligned)
    branch = [*SECRET[:21], *range(20)]
    Engine().save(first, branch, aligned=aligned)
    first.close()
    second = cache_on(DiskTier.open(tmp_path, **keys))
    for tokens in (SECRET, branch):
        expected = len(tokens) // 8 * 8 if aligned else len(tokens)
        assert found(second, tokens, aligned=aligned) == expected
    second._check()
    assert second.stats().promoted_tokens == (40 + 24 if aligned else 40 + 20)
    assert found(second, SECRET, scope="a", aligned=aligned) == 0
    assert found(second, SECRET, fingerprint=b"n", aligned=aligned) == 0
    assert found(second, SECRET, aligned=not aligned) == 0
    assert second.stats().refusals == {}
    second.close()


def test_another_process_finds_short_blocks_and_points_inside_blocks(tmp_path: Path) -> None:
    ours, theirs = cache_on(tmp_path), cache_on(tmp_path)
    Engine().save(ours, [1, 2, 3])
    Engine().save(ours, [1, 2, 3, 4, 5, 6])
    Engine().save(ours, [1, 2, 3, 4, 9, 9, 9])
    assert ours.flush()
    assert found(theirs, [1, 2, 3, 4, 9, 9, 9]) == 7
    assert found(theirs, [1, 2, 3, 4, 5, 6]) == 6
    # What it found there it extends there, and the first finds that.
    Engine().save(theirs, [1, 2, 3, 4, 9, 9, 9, 8, 8])
    assert theirs.flush()
    assert found(ours, [1, 2, 3, 4, 9, 9, 9, 8, 8]) == 9
    assert ours.stats().disk.hits > 0
    for cache in (ours, theirs):
        cache._check()
        cache.close()


def test_blocks_that_two_processes_stored_at_once_both_find_a_place(tmp_path: Path) -> None:
    caches = [cache_on(DiskTier.open(tmp_path)) for _ in range(2)]
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 7, 7]]
    for cache, tokens in zip(caches, prompts, strict=True):
        Engine().save(cache, tokens)
    for cache in caches:
        cache.close()
    assert [found(cache_on(tmp_path), tokens) for tokens in prompts] == [6, 6]
    # One that has the first in memory builds on that.
    both = cache_on(tmp_path)
    assert [found(both, tokens) for tokens in prompts] == [6, 3]
    Engine().save(both, prompts[1])
    both.close()
    fresh = cache_on(tmp_path)
    assert [found(fresh, tokens) for tokens in prompts] == [6, 6]
    fresh._check()


def test_a_longer_block_takes_the_place_of_the_shorter_and_keeps_what_follows(
    tmp_path: Path,
) -> None:
    writer = cache_on(tmp_path)
    Engine().save(writer, [1, 2, 3])
    Engine().save(writer, [1, 2, 3, 9, 9])
    writer.close()
    # Saved by a process that had not looked: the block [1, 2, 3, 4, 5].
    blind = cache_on(tmp_path)
    blind._below, below = (), blind._below
    Engine().save(blind, [1, 2, 3, 4, 5])
    blind._below = below
    Engine().save(blind, [1, 2, 3, 4, 5])  # what is not there yet is written now
    blind.close()
    fresh = cache_on(tmp_path)
    assert found(fresh, [1, 2, 3, 4, 5]) == 5
    assert found(fresh, [1, 2, 3, 9, 9]) == 5
    fresh.close()


def test_what_memory_evicted_is_served_by_the_disk(tmp_path: Path) -> None:
    cache = cache_on(tmp_path, max_entries=2)
    prompts = [[first] * 20 for first in range(10)]
    for tokens in prompts:
        Engine().save(cache, tokens)
        cache.flush()
    assert [found(cache, tokens) for tokens in prompts] == [20] * 10
    assert cache.stats().evictions > 0
    cache._check()
    cache.close()


def test_what_memory_has_no_room_for_is_served_from_the_file(tmp_path: Path) -> None:
    writer = cache_on(tmp_path)
    Engine().save(writer, SECRET)
    writer.close()
    tiny = cache_on(tmp_path, ram_bytes=3000)
    assert found(tiny, SECRET) == 40
    tiny._check()
    assert tiny.memory_usage() <= 3000
    tiny.close()


def test_files_are_private_and_named_by_digests(tmp_path: Path) -> None:
    cache = cache_on(tmp_path / "d")
    Engine().save(cache, SECRET, scope="tenant-a")
    cache.close()
    for path in (tmp_path / "d").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600)
        assert "tenant" not in str(path)
        if path.is_file():
            assert b"tenant" not in path.read_bytes()
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700


def test_encrypted_files_show_neither_tokens_nor_states(tmp_path: Path) -> None:
    secrets = int32(SECRET[:8]), state_of(SECRET, 0, 8)
    for name, keys, shows in (("a", {}, True), ("b", {"encryption_key": b"e" * 32}, False)):
        cache = cache_on(DiskTier.open(tmp_path / name, **keys))  # type: ignore[arg-type]
        Engine().save(cache, SECRET)
        cache.close()
        held = all_bytes(tmp_path / name)
        assert [secret in held for secret in secrets] == [shows, shows]


@pytest.mark.parametrize("keys", KEYS, ids=IDS)
def test_removing_a_scope_takes_its_bytes_off_the_disk(tmp_path: Path, keys: Any) -> None:
    cache = cache_on(DiskTier.open(tmp_path, **keys))
    other = list(range(9001, 9041))
    Engine().save(cache, SECRET, scope="a")
    Engine().save(cache, other, scope="b")
    Engine().save(cache, other)
    cache.store(SECRET, b"the state of a", fingerprint=b"m", scope="a")
    cache.flush()
    n_before = len(files(tmp_path))
    assert cache.remove(scope="a") == 6
    assert len(files(tmp_path)) == n_before - 6
    held = all_bytes(tmp_path)
    for secret in (int32(SECRET[:8]), state_of(SECRET, 8, 16), b"the state of a"):
        assert secret not in held
    assert found(cache, SECRET, scope="a") == 0
    assert cache.find(SECRET, fingerprint=b"m", scope="a") is None
    assert found(cache, other, scope="b") == found(cache, other) == 40
    assert cache.remove(scope="a") == 0
    cache.clear()
    assert files(tmp_path) == []
    assert found(cache, other) == 0
    cache.close()


def test_what_waits_to_be_written_is_not_written_after_its_removal(tmp_path: Path) -> None:
    cache = cache_on(DiskTier.open(tmp_path))
    gate = threading.Event()
    cache._below[0].writer.put(Job("other", 0, lambda: gate.wait(10)))
    Engine().save(cache, SECRET, scope="a")
    assert cache.remove(scope="a") == 5
    gate.set()
    assert cache.flush()
    assert files(tmp_path) == []
    cache._check()
    cache.close()


def test_another_key_finds_nothing_and_destroys_nothing(tmp_path: Path) -> None:
    good = cache_on(DiskTier.open(tmp_path, hmac_key=b"a" * 32))
    Engine().save(good, SECRET)
    good.close()
    n_files = len(files(tmp_path))
    for keys in ({"hmac_key": b"b" * 32}, {}, {"encryption_key": b"a" * 32}):
        bad = cache_on(DiskTier.open(tmp_path, **keys))  # type: ignore[arg-type]
        assert found(bad, SECRET) == 0
        bad.close()
    assert len(files(tmp_path)) == n_files
    assert found(cache_on(DiskTier.open(tmp_path, hmac_key=b"a" * 32)), SECRET) == 40


def test_a_file_sealed_with_another_key_is_refused_where_it_is_put(tmp_path: Path) -> None:
    for name, key in (("a", b"a" * 32), ("b", b"b" * 32)):
        cache = cache_on(DiskTier.open(tmp_path / name, hmac_key=key))
        Engine().save(cache, [1, 2, 3])
        cache.close()
    (ours,), (forged,) = files(tmp_path / "a"), files(tmp_path / "b")
    ours.write_bytes(forged.read_bytes())
    cache = cache_on(DiskTier.open(tmp_path / "a", hmac_key=b"a" * 32))
    assert found(cache, [1, 2, 3]) == 0
    assert cache.stats().refusals == {"disk: forged": 1}
    assert not ours.exists()
    cache.close()


def test_a_file_of_another_scope_is_refused_where_it_is_put(tmp_path: Path) -> None:
    cache = cache_on(tmp_path)
    Engine().save(cache, [1, 2, 3], scope="a")
    Engine().save(cache, [1, 2, 3], scope="b")
    Engine().save(cache, [1, 2, 3], fingerprint=b"n", scope="a")
    cache.close()
    paths = files(tmp_path)
    assert len(paths) == 3
    everyone = [path.read_bytes() for path in paths]
    cache = cache_on(tmp_path)
    for path in paths:
        for content in everyone:
            if content == path.read_bytes():
                continue
            own = path.read_bytes()
            path.write_bytes(content)
            owners = (b"m", "a"), (b"m", "b"), (b"n", "a")
            hits = [found(cache_on(tmp_path), [1, 2, 3], fingerprint=f, scope=s) for f, s in owners]
            assert sorted(hits) == [0, 3, 3]
            path.write_bytes(own)
    cache.close()


@pytest.mark.parametrize("scope", ["../../x", "a/b", "\0", "", ".", "a" * 5000, "\ud800"])
def test_a_crafted_scope_stays_in_its_folder(tmp_path: Path, scope: str) -> None:
    cache = cache_on(tmp_path / "d")
    Engine().save(cache, [1, 2, 3], scope=scope)
    Engine().save(cache, [1, 2, 3])
    cache.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert found(cache_on(tmp_path / "d"), [1, 2, 3], scope=scope) == 3
    assert found(cache_on(tmp_path / "d"), [1, 2, 3], scope=scope + "x") == 0
    assert cache.remove(scope=scope) == 1
    assert len(files(tmp_path)) == 1
    cache.close()


def test_the_budget_holds_and_the_least_recent_goes(tmp_path: Path) -> None:
    disk = DiskTier.open(tmp_path, max_bytes=8000)
    cache = cache_on(disk, block_tokens=64)
    for first in range(60):
        Engine().save(cache, [first] * 64)
        cache.flush()
        assert sum(file.n_bytes for file in disk.files()) <= 8000
    cache.close()
    fresh = cache_on(disk, block_tokens=64)
    hits = [found(fresh, [first] * 64) for first in range(60)]
    n_kept = sum(map(bool, hits))
    assert 3 < n_kept < 10
    assert hits[-n_kept:] == [64] * n_kept
    assert disk.stats().evictions == 60 - n_kept
    fresh.close()


def test_one_state_over_the_budget_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    cache = cache_on(DiskTier.open(tmp_path, max_bytes=3000))
    cache.store([1], bytes(100), fingerprint=b"m")
    cache.store([2], bytes(5000), fingerprint=b"m")
    cache.flush()
    assert cache.stats().refusals == {"disk: over_budget": 1}
    assert len(files(tmp_path)) == 1
    cache.close()


def test_what_is_used_in_memory_does_not_grow_old_on_disk(tmp_path: Path) -> None:
    disk = DiskTier.open(tmp_path)
    cache = cache_on(disk)
    cache._touch_s = 0.0
    Engine().save(cache, [1] * 16)
    Engine().save(cache, [2] * 16)
    cache.flush()
    old = time.time() - 1000
    for path in files(tmp_path):
        os.utime(path, (old, old))
    assert found(cache, [1] * 16) == 16
    cache.flush()
    ages = sorted(time.time() - file.used_at > 500 for file in disk.files())
    assert ages == [False, False, True, True]
    cache.close()


def test_states_expire_on_disk(tmp_path: Path) -> None:
    cache = cache_on(tmp_path)
    Engine().save(cache, [1, 2, 3])
    cache.close()
    tier = DiskTier.open(tmp_path, ttl_s=100)
    early = cache_on(tier)
    assert found(early, [1, 2, 3]) == 3
    early.close()
    (path,) = files(tmp_path)
    os.utime(path, (time.time() - 200,) * 2)
    late = cache_on(tier)
    assert found(late, [1, 2, 3]) == 0
    assert late.stats().refusals == {"disk: expired": 1}
    assert tier.prune() == 0
    assert files(tmp_path) == []


def test_a_full_queue_drops_and_counts_and_the_next_save_writes_what_is_missing(
    tmp_path: Path,
) -> None:
    cache = cache_on(tmp_path, queue_bytes=100)
    gate = threading.Event()
    cache._below[0].writer.put(Job(None, 0, lambda: gate.wait(10)))
    assert Engine().save(cache, SECRET) == 40  # 32 bytes a block: three wait, two are dropped
    assert cache.stats().refusals == {"disk: queue_full": 1}
    gate.set()
    assert cache.flush()
    assert len(files(tmp_path)) == 3
    Engine().save(cache, SECRET)
    assert cache.flush()
    assert len(files(tmp_path)) == 5
    cache._check()
    cache.close()


def test_a_cache_that_nobody_closed_is_written_all_the_same(tmp_path: Path) -> None:
    cache = cache_on(tmp_path)
    writer = cache._below[0].writer
    writer.put(Job(None, 0, lambda: time.sleep(0.2)))
    Engine().save(cache, SECRET)
    began = time.perf_counter()
    del cache
    assert time.perf_counter() - began < 0.15  # nothing waits where a cache is let go
    assert writer.flush(10)
    assert not writer.put(Job(None, 0, list))
    assert found(cache_on(tmp_path), SECRET) == 40


def test_a_writer_ends_its_thread_and_takes_nothing_afterwards() -> None:
    writer = WriteBehind("test", 100)
    ran: list[int] = []
    assert writer.put(Job(None, 1, lambda: ran.append(1)))
    assert writer.close()
    assert ran == [1]
    assert not writer.put(Job(None, 1, lambda: ran.append(2)))
    assert not any(t.name == "tokcache-test" for t in threading.enumerate())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_writes_and_the_parent_goes_on(tmp_path: Path) -> None:
    cache = cache_on(tmp_path)
    Engine().save(cache, [1] * 8)
    cache.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            Engine().save(cache, [2] * 8)
            code = 0 if cache.flush(10) and found(cache, [1] * 8) == 8 else 2
        finally:
            os._exit(code)
    Engine().save(cache, [3] * 8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert cache.flush(10)
    fresh = cache_on(tmp_path)
    assert [found(fresh, [first] * 8) for first in (1, 2, 3)] == [8, 8, 8]
    cache.close()


def test_the_end_of_the_interpreter_writes_what_waits(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.state.engine import Engine
from tokcache.state.cache import PrefixStateCache
cache = PrefixStateCache(block_tokens=8, disk={str(tmp_path)!r})
Engine().save(cache, list(range(80)))
"""
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    assert found(cache_on(tmp_path), list(range(80))) == 80


def test_an_ephemeral_tier_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tier = DiskTier.ephemeral()
    cache = cache_on(tier)
    Engine().save(cache, [1] * 8)
    cache.close()
    assert files(tier.path) != []  # the tier is its owner's to close
    tier.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(InvalidConfig, match="other files"):
        DiskTier.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["thesis.txt"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    DiskTier.open(tmp_path / "d")
    (tmp_path / "d").chmod(0o777)
    with pytest.raises(InvalidConfig, match="others may write"):
        DiskTier.open(tmp_path / "d")


def test_a_folder_that_can_not_be_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="can't be a folder"):
        DiskTier.open(tmp_path / "file" / "d")
    with pytest.raises(InvalidConfig, match="disk must be"):
        PrefixStateCache(disk=7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_bytes": 0},
        {"ttl_s": 0},
        {"ttl_s": "1"},
        {"hmac_key": b"short"},
        {"hmac_key": "k" * 32},
        {"encryption_key": b"e" * 17},
        {"encryption_key": b"e" * 33},
    ],
)
def test_settings_that_can_not_be_are_refused(tmp_path: Path, settings: Any) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        DiskTier.open(tmp_path, **settings)


def test_a_missing_library_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(MissingExtra, match="pip install"):
        DiskTier.open(tmp_path, encryption_key=b"e" * 32)
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(MissingExtra, match="pip install"):
        DiskTier.open(tmp_path)


def test_an_unfinished_removal_is_finished_by_the_next_open(tmp_path: Path) -> None:
    cache = cache_on(tmp_path)
    Engine().save(cache, SECRET, scope="a")
    cache.close()
    scope = DiskTier.open(tmp_path).sealer.scope("a").hex()
    (tmp_path / "1" / scope).rename(tmp_path / "1" / ".gone-0")  # and then the power failed
    assert int32(SECRET[:8]) in all_bytes(tmp_path)
    DiskTier.open(tmp_path)
    assert int32(SECRET[:8]) not in all_bytes(tmp_path)


def test_names_depend_on_all_that_makes_states_differ(tmp_path: Path) -> None:
    tier = DiskTier.open(tmp_path, hmac_key=b"k" * 32)
    owners = [
        Owner(b"m", None, "free"),
        Owner(b"m", "", "free"),
        Owner(b"m", "a", "free"),
        Owner(b"ma", "", "free"),
        Owner(b"m", "a", "grid"),
        Owner(b"m", "a", "whole"),
    ]
    assert len({tier.sealer.owner(owner) for owner in owners}) == len(owners)
