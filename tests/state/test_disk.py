"""The disk tier: its files, budget, times and checks of its folder."""

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

from tests.state.engine import Engine, restored
from tokcache.errors import InvalidConfig, MissingExtra
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.disk import DiskTier
from tokcache.state.write_behind import Job, WriteBehind

SECRET = list(range(7001, 7041))  # a prompt that no file may contain after its removal
KEYS = [{}, {"hmac_key": b"k" * 32}, {"encryption_key": b"e" * 32}]
KEYS += [{"hmac_key": b"k" * 32, "encryption_key": b"e" * 16}]
IDS = ["plain", "hmac", "encrypted", "both"]


def cache_on(disk: Any, **settings: Any) -> PrefixStateCache:
    return PrefixStateCache(**{"block_tokens": 8, "max_entries": 1000, "disk": disk, **settings})


def found(cache: PrefixStateCache, tokens: list[int], **key: Any) -> int:
    with cache.namespace(**{"fingerprint": b"m", **key}).plan(tokens) as plan:
        return restored(plan, tokens) if plan.blocks else 0


def all_bytes(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())


def int32(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.suffix in (".0", ".1"))


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


@pytest.mark.parametrize("scope", ["../../x", "a/b", "\0", "", ".", "a" * 5000, "\ud800"])
def test_a_crafted_scope_stays_in_its_folder(tmp_path: Path, scope: str) -> None:
    cache = cache_on(tmp_path / "d")
    Engine().save(cache, [1, 2, 3], scope=scope)
    Engine().save(cache, [1, 2, 3])
    cache.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert found(cache_on(tmp_path / "d"), [1, 2, 3], scope=scope) == 3
    assert found(cache_on(tmp_path / "d"), [1, 2, 3], scope=scope + "x") == 0
    assert cache.clear(scope=scope) == 1
    assert len(files(tmp_path)) == 1
    cache.close()


def test_the_budget_holds_and_the_least_recently_used_is_evicted(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, max_bytes=8000)
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
    cache = cache_on(DiskTier(tmp_path, max_bytes=3000))
    cache.namespace(b"m").store([1], bytes(100))
    cache.namespace(b"m").store([2], bytes(5000))
    cache.flush()
    assert cache.stats().refusals == {"disk: over_budget": 1}
    assert len(files(tmp_path)) == 1
    cache.close()


def test_use_in_memory_keeps_a_state_young_on_disk(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path)
    cache = cache_on(disk)
    cache._store.touch_s = 0.0
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
    tier = DiskTier(tmp_path, ttl_s=100)
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


def test_a_closed_writer_has_no_thread_and_accepts_no_jobs() -> None:
    writer = WriteBehind("test", 100)
    ran: list[int] = []
    assert writer.put(Job(None, 1, lambda: ran.append(1)))
    assert writer.close()
    assert ran == [1]
    assert not writer.put(Job(None, 1, lambda: ran.append(2)))
    assert not any(t.name == "tokcache-test" for t in threading.enumerate())


def test_waiting_writes_are_done_when_the_interpreter_ends(tmp_path: Path) -> None:
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


def test_an_ephemeral_tier_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tier = DiskTier.ephemeral()
    cache = cache_on(tier)
    Engine().save(cache, [1] * 8)
    cache.close()
    assert files(tier.path) != []  # closing the cache does not close the tier
    tier.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(InvalidConfig, match="other files"):
        DiskTier(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["thesis.txt"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    DiskTier(tmp_path / "d")
    (tmp_path / "d").chmod(0o777)
    with pytest.raises(InvalidConfig, match="others may write"):
        DiskTier(tmp_path / "d")


def test_an_unusable_path_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="can't be a folder"):
        DiskTier(tmp_path / "file" / "d")
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
def test_invalid_settings_are_refused(tmp_path: Path, settings: Any) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        DiskTier(tmp_path, **settings)


def test_the_error_for_a_missing_library_has_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(MissingExtra, match="pip install"):
        DiskTier(tmp_path, encryption_key=b"e" * 32)
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(MissingExtra, match="pip install"):
        DiskTier(tmp_path)


def test_an_interrupted_removal_is_finished_by_the_next_tier(tmp_path: Path) -> None:
    cache = cache_on(tmp_path)
    Engine().save(cache, SECRET, scope="a")
    cache.close()
    scope = DiskTier(tmp_path).codec.scope("a").hex()
    (tmp_path / "1" / scope).rename(tmp_path / "1" / ".gone-0")  # as after a power failure
    assert int32(SECRET[:8]) in all_bytes(tmp_path)
    DiskTier(tmp_path)
    assert int32(SECRET[:8]) not in all_bytes(tmp_path)


def put_junk(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize(
    "put",
    [
        os.mkfifo,
        os.mkdir,
        put_junk,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.with_name("absent")),
    ],
    ids=["fifo", "folder", "junk", "link to a device", "dangling link"],
)
@pytest.mark.parametrize("is_counted_first", [True, False])
def test_the_tier_works_with_anything_in_place_of_the_usage_file(
    tmp_path: Path, put: Any, is_counted_first: bool
) -> None:
    cache = cache_on(tmp_path / "d")
    cache.namespace(b"m").store([1], b"x" * 3000)
    cache.flush()
    usage = tmp_path / "d" / "usage"
    usage.unlink()
    put(usage)
    if is_counted_first:
        assert cache.stats().disk.n_bytes < 10_000
    cache.namespace(b"m").store([2], b"y" * 3000)
    cache.flush()
    assert cache.stats().disk.refusals == {}
    assert cache.stats().disk.n_bytes < 10_000
    other = cache_on(tmp_path / "d")
    assert other.namespace(b"m").find([2]) is not None
    assert not (tmp_path / "d" / "absent").exists()


def test_a_path_with_a_null_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="can't be a path"):
        PrefixStateCache(disk=f"{tmp_path}/a\0b")
