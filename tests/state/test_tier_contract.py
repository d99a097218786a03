"""One contract for every way to give a cache a tier: by path or URL, and made by hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.state.engine import Engine
from tests.state.test_disk import found
from tokcache.errors import InvalidConfig
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.disk import MARKER, DiskTier
from tokcache.state.tiers.redis import RedisTier

if TYPE_CHECKING:
    from tests.state.redis_server import RedisServer

TOKENS = list(range(100, 140))
DISK_WAYS: dict[str, Callable[[Path], Any]] = {
    "a path as a str": str,
    "a Path": lambda path: path,
    "a relative path": os.path.relpath,
    "DiskTier(str)": lambda path: DiskTier(str(path)),
    "DiskTier(Path)": DiskTier,
    "DiskTier(relative)": lambda path: DiskTier(os.path.relpath(path)),
}
DISK_OPTIONS: list[dict[str, Any]] = [
    {"max_bytes": 1 << 20},
    {"max_bytes": "1M"},
    {"max_bytes": np.int64(1 << 20)},
    {"ttl_s": 60.0},
    {"hmac_key": b"k" * 32},
    {"encryption_key": b"e" * 32},
    {"is_synced": False},
]
REDIS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_state_bytes": 1 << 20},
    {"max_state_bytes": "1M"},
    {"ttl_s": None},
    {"ttl_s": 60.0},
    {"timeout_s": 5.0},
    {"namespace": "other"},
    {"hmac_key": b"k" * 32},
    {"encryption_key": b"e" * 32},
    {"is_cluster": False},
    {"n_failures": np.int32(5)},
    {"retry_s": 0.5},
]


def named(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no option"


def disk_makers() -> Iterator[Any]:
    for name, way in DISK_WAYS.items():
        yield pytest.param(lambda path, _, way=way: {"disk": way(path)}, id=name)
    for options in DISK_OPTIONS:
        make = lambda path, _, own=options: {"disk": DiskTier(path, **own)}  # noqa: E731
        yield pytest.param(make, id=f"DiskTier: {named(options)}")


def redis_makers() -> Iterator[Any]:
    yield pytest.param(lambda _, url: {"redis": url()}, id="a URL")
    for options in REDIS_OPTIONS:
        make = lambda _, url, own=options: {"redis": RedisTier(url(), **own)}  # noqa: E731
        yield pytest.param(make, id=f"RedisTier: {named(options)}")


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Callable[[], str]:
    def started() -> str:
        server: RedisServer = request.getfixturevalue("redis_server")
        return server.url

    return started


@pytest.mark.parametrize("make", [*disk_makers(), *redis_makers()])
def test_every_way_keeps_the_contract(
    tmp_path: Path, url: Callable[[], str], make: Callable[[Path, Callable[[], str]], Any]
) -> None:
    """What one cache saves, another finds; its counters tell; it is cleared; it closes."""
    folder = tmp_path / "states"
    cache = PrefixStateCache(block_tokens=8, **make(folder, url))
    assert cache.namespace(b"m").store(TOKENS, b"opaque")
    assert Engine().save(cache, TOKENS) == 40
    assert cache.flush()
    label = "disk" if cache.disk is not None else "redis"
    assert getattr(cache.stats(), label).writes == 6
    cache.close()
    fresh = PrefixStateCache(block_tokens=8, **make(folder, url))
    with fresh.namespace(b"m").find(TOKENS) as handle:  # type: ignore[union-attr]
        assert bytes(handle.state) == b"opaque"
    assert found(fresh, TOKENS) == 40
    stats = fresh.stats()
    assert getattr(stats, label).hits == 6
    assert stats.refusals == {}
    fresh._check()
    fresh.clear()
    fresh.close()
    empty = PrefixStateCache(block_tokens=8, **make(folder, url))
    assert empty.namespace(b"m").find(TOKENS) is None
    assert found(empty, TOKENS) == 0
    empty.close()


@pytest.mark.parametrize("way", DISK_WAYS.values(), ids=DISK_WAYS)
def test_every_way_checks_the_folder(tmp_path: Path, way: Callable[[Path], Any]) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.txt").write_text("dear")
    with pytest.raises(InvalidConfig, match="other files"):
        PrefixStateCache(disk=way(tmp_path / "others"))
    PrefixStateCache(disk=way(tmp_path / "open"))
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(InvalidConfig, match="others may write"):
        PrefixStateCache(disk=way(tmp_path / "open"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="can't be a folder"):
        PrefixStateCache(disk=way(tmp_path / "file" / "d"))
    cache = PrefixStateCache(disk=way(tmp_path / "states"))
    assert (tmp_path / "states" / MARKER).is_file()
    cache.close()


@pytest.mark.parametrize("bad", [7, None, b"path", "", [], 1.5], ids=repr)
def test_what_is_no_path_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidConfig, match="path must be"):
        DiskTier(bad)
    if bad is not None and bad != "":
        with pytest.raises(InvalidConfig, match="disk must be"):
            PrefixStateCache(disk=bad)


@pytest.mark.parametrize("bad", ["yes", 1, None])
def test_flags_are_checked(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(InvalidConfig, match="is_synced"):
        DiskTier(tmp_path, is_synced=bad)
    with pytest.raises(InvalidConfig, match="is_cluster"):
        RedisTier("redis://127.0.0.1", is_cluster=bad)


def test_a_cache_closes_the_tiers_it_made_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(DiskTier, "close", lambda tier: closed.append(tier.path.name))
    monkeypatch.setattr(RedisTier, "close", lambda tier: closed.append(tier.namespace))
    disk, redis = DiskTier(tmp_path / "by hand"), RedisTier("redis://127.0.0.1:1", namespace="hand")
    PrefixStateCache(disk=disk, redis=redis).close()
    assert closed == []
    PrefixStateCache(disk=tmp_path / "by path", redis="redis://127.0.0.1:1").close()
    assert closed == ["by path", "tokcache"]


def test_one_tier_serves_several_caches(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path)
    first, second = (PrefixStateCache(block_tokens=8, disk=disk) for _ in range(2))
    Engine().save(first, TOKENS)
    first.close()
    assert found(second, TOKENS) == 40
    second.close()


def test_an_ephemeral_tier_leaves_nothing_where_it_can_not_be_made_or_was_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InvalidConfig, match="max_bytes"):
        DiskTier.ephemeral(max_bytes=0)
    assert list(tmp_path.iterdir()) == []
    tier = DiskTier.ephemeral(max_bytes="1M")
    tier.close()
    cache = PrefixStateCache(disk=tier)
    cache.namespace(b"m").store([1], b"late")
    cache.flush()
    assert cache.stats().refusals == {"disk: closed": 1}
    assert list(tmp_path.iterdir()) == []
    cache.close()


# Reprs


def test_reprs_say_what_is_held_and_the_budgets(tmp_path: Path) -> None:
    redis = RedisTier("redis://user:geheim@127.0.0.1:1/3", max_state_bytes="1M", ttl_s=60)
    cache = PrefixStateCache(
        ram_bytes="2M", max_entries=5, block_tokens=8, disk=tmp_path / "d", redis=redis
    )
    cache.namespace(b"m", scope="tenant-a").store([1], b"s" * 100)
    held = f"{cache.memory_usage():,}"
    shown = repr(cache)
    assert shown.startswith(
        f"<PrefixStateCache 1 of 5 entries, {held} of 2,097,152 bytes, blocks of 8 tokens"
    )
    assert f"<DiskTier {tmp_path / 'd'}: " in shown
    assert "of 4,294,967,296 bytes>" in shown
    assert (
        "<RedisTier 127.0.0.1:1, namespace 'tokcache': states of at most 1,048,576 bytes, kept "
        "for 60 s>"
    ) in shown
    assert not {"geheim", "tenant"} & set(shown.replace(":", " ").split())
    assert "geheim" not in repr(redis)
    assert "kept until evicted" in repr(RedisTier("redis://127.0.0.1", ttl_s=None))
    cache.close()
