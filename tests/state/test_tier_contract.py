"""One contract for tiers that a cache makes from a path or URL and for those passed to it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.state.engine import Engine
from tests.state.redis_server import RedisServer, free_port
from tests.state.test_disk import found
from tokcache.errors import InvalidConfig, TierUnavailable
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.disk import DiskTier
from tokcache.state.tiers.disk.folder import MARKER
from tokcache.state.tiers.redis import RedisTier

if TYPE_CHECKING:
    from tests.state.media import Medium

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
def test_tiers_made_in_every_way_keep_the_contract(
    tmp_path: Path, url: Callable[[], str], make: Callable[[Path, Callable[[], str]], Any]
) -> None:
    """A second cache finds the states of the first; counters are right; it clears and closes."""
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
def test_disk_tiers_made_in_every_way_check_the_folder(
    tmp_path: Path, way: Callable[[Path], Any]
) -> None:
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
def test_values_other_than_paths_are_refused(bad: Any) -> None:
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


def test_a_cache_closes_only_the_tiers_that_it_made(
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


def test_a_failed_or_closed_ephemeral_tier_leaves_no_files(
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


def test_reprs_show_contents_and_budgets(tmp_path: Path) -> None:
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


# Checks


def test_a_check_of_a_usable_tier_passes_and_leaves_nothing(medium: Medium) -> None:
    cache = medium.cache()
    Engine().save(cache, TOKENS)
    cache.flush()
    before = medium.states(), medium.names()
    tier = medium.tier()
    tier.check()
    assert (medium.states(), medium.names()) == before
    assert tier.stats().refusals == {}
    assert (tier.stats().writes, tier.stats().hits, tier.stats().misses) == (0, 0, 0)
    cache.close()


def test_a_check_reports_a_missing_folder(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "d")
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(TierUnavailable, match=r"/d \(No such file.*makes it again"):
        tier.check()


def test_a_check_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, max_bytes="1M")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tokcache.state.tiers.disk.files.os.writev", full)
    with pytest.raises(TierUnavailable, match=r"No space left.*lower max_bytes \(now 1,048,576\)"):
        tier.check()
    assert list(tmp_path.rglob(".new-*")) == []


def test_a_check_reports_why_a_redis_is_out_of_reach(redis_server: RedisServer) -> None:
    port = free_port()
    with pytest.raises(TierUnavailable, match=rf"127.0.0.1:{port} can't .*Connection refused.*URL"):
        RedisTier(f"redis://127.0.0.1:{port}").check()
    with pytest.raises(TierUnavailable, match=r"no-such-host.invalid:6379 can't be reached \("):
        RedisTier("redis://no-such-host.invalid", timeout_s=5.0).check()
    with pytest.raises(TierUnavailable, match="whether it wants TLS"):
        RedisTier(redis_server.url.replace("redis:", "rediss:"), timeout_s=1.0).check()
    redis_server.pause()
    try:
        with pytest.raises(TierUnavailable, match=r"within timeout_s=0.2.*allow more time"):
            RedisTier(redis_server.url, timeout_s=0.2).check()
    finally:
        redis_server.resume()


def test_a_check_reports_that_another_program_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        tier = RedisTier(f"redis://127.0.0.1:{listener.getsockname()[1]}", timeout_s=5.0)
        with pytest.raises(TierUnavailable, match="does not answer as a Redis does"):
            tier.check()
        thread.join()
        tier.close()


def test_a_check_reports_a_wrong_user_password_or_right(tmp_path: Path) -> None:
    acl = "user reader on >geheim ~tokcache:* -@all +hget +smembers +scan"
    with RedisServer(tmp_path / "r", "requirepass s3cret", acl) as server:
        at = server.url.removeprefix("redis://")
        RedisTier(f"redis://:s3cret@{at}", timeout_s=5.0).check()
        for user, text in (
            ("", "wants a user and password, and its URL has none"),
            (":wr0ng@", "refuses the user or password of its URL"),
            ("reader:wr0ng@", "refuses the user or password of its URL"),
            ("reader:geheim@", r"may not use EVAL, HSET, .*grant it ~tokcache:\* and \+hget"),
        ):
            with pytest.raises(TierUnavailable, match=text) as caught:
                RedisTier(f"redis://{user}{at}", timeout_s=5.0).check()
            assert not {"wr0ng", "geheim"} & set(re.split(r"\W", str(caught.value)))


def test_a_check_reports_a_server_that_takes_no_writes(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "r") as server, server.client() as client:
        tier = RedisTier(server.url, timeout_s=5.0, n_failures=1, retry_s=60.0)
        cache = PrefixStateCache(redis=tier)
        client.config_set("maxmemory", 1)
        with pytest.raises(TierUnavailable, match=r"full.*raise its maxmemory"):
            tier.check()
        for n in range(2):
            assert cache.namespace(b"m").store([n], b"state")
            assert cache.flush()
        assert cache.stats().refusals == {"redis: full": 1, "redis: writes_paused": 1}
        client.config_set("maxmemory", 0)
        tier.check()
        assert cache.namespace(b"m").store([2], b"state")  # writes are not paused any more
        assert cache.flush()
        assert cache.stats().redis.writes == 1
        cache.close()
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())
        with pytest.raises(TierUnavailable, match=r"read_only.*name the primary"):
            tier.check()


def test_a_check_reports_a_wrong_is_cluster(redis_server: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(TierUnavailable, match="leave out is_cluster=True"):
        RedisTier(redis_server.url, is_cluster=True, timeout_s=5.0).check()
    options = "cluster-enabled yes", f"cluster-port {free_port()}"
    with RedisServer(tmp_path / "alone", *options) as alone:
        with pytest.raises(TierUnavailable, match="not part of a cluster that works"):
            RedisTier(alone.url, timeout_s=5.0).check()
        with alone.client() as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            until = time.monotonic() + 20
            while "ok" not in str(client.execute_command("CLUSTER INFO")["cluster_state"]):
                assert time.monotonic() < until
                time.sleep(0.05)
        RedisTier(alone.url, is_cluster=True, timeout_s=5.0).check()


def test_a_check_that_passes_closes_the_circuit(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "r") as server:
        tier = RedisTier(server.url, timeout_s=5.0, n_failures=1, retry_s=60.0)
        server.kill()
        cache = PrefixStateCache(redis=tier)
        assert [cache.namespace(b"m").find([1]) for _ in range(3)] == [None] * 3
        assert cache.stats().refusals == {"redis: unreachable": 1, "redis: circuit_open": 2}
        server.start()
        tier.check()
        assert cache.namespace(b"m").find([1]) is None
        assert cache.stats().refusals == {"redis: unreachable": 1, "redis: circuit_open": 2}
        cache.close()
