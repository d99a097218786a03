"""Trouble is logged once when it begins and once when it ends, however many requests it costs."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.state.engine import Engine
from tests.state.redis_server import RedisServer
from tests.state.test_disk import SECRET, cache_on, found
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.disk import DiskTier
from tokcache.state.tiers.redis import RedisTier

if TYPE_CHECKING:
    from tests.state.media import Medium

WRONG, RIGHT = "gehe1m-wrong", "gehe1m-right"
ALLOWED = "+hget +hset +eval +hlen +rename +del +unlink +pexpire +persist +sadd +smembers +scan"
ALLOWED += " +touch"


class Lines:
    """The lines that tokcache logged, and the number of those already returned."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog, self._n_seen = caplog, 0

    def new(self) -> list[str]:
        """Return the lines since the last call, as "level: text"; none of them has a secret."""
        logged = [record for record in self._caplog.records if record.name.startswith("tokcache")]
        lines = [f"{each.levelname}: {each.getMessage()}" for each in logged[self._n_seen :]]
        self._n_seen = len(logged)
        for line in lines:
            assert "gehe1m" not in line
            assert "tenant" not in line
            numbers = re.findall(r"\d+", line)  # whole ones: a port may contain a token's digits
            assert not set(numbers) & set(map(str, SECRET))
        return lines


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO, "tokcache")
    return Lines(caplog)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as started:
        yield started


def asked(url: str, **settings: Any) -> PrefixStateCache:
    own = {"timeout_s": 2.0, "retry_s": 0.02} | settings
    return cache_on(None, redis=RedisTier(url, **own))


def use(cache: PrefixStateCache, n: int = 6) -> None:
    """Find and save as n requests of a tenant would."""
    for first in range(n):
        tokens = [time.monotonic_ns() % 2**30, first, *SECRET]
        assert found(cache, tokens, scope="tenant-a") == 0
        Engine().save(cache, tokens, scope="tenant-a")
        cache.namespace(b"m", scope="tenant-a").store(tokens, b"state")
        cache.flush()


def until(cache: PrefixStateCache, check: Callable[[], object]) -> None:
    """Use a cache until `check` returns something true."""
    end = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end
        use(cache, 1)
        time.sleep(0.02)


def until_stored(cache: PrefixStateCache) -> None:
    """Use a cache until Redis takes a state."""
    before = cache.stats().redis.writes
    until(cache, lambda: cache.stats().redis.writes > before)


# A Redis that does not answer


def test_each_outage_of_a_redis_logs_one_line_at_its_start_and_one_at_its_end(
    server: RedisServer, lines: Lines
) -> None:
    cache = asked(server.url)
    use(cache)
    assert lines.new() == []
    for _ in range(2):
        server.kill()
        use(cache, 12)
        (line,) = lines.new()
        assert line.startswith(f"WARNING: the Redis at 127.0.0.1:{server.port} failed 3 calls")
        assert "(unreachable)" in line
        assert "check that it runs" in line
        server.start()
        until_stored(cache)
        use(cache)
        assert lines.new() == [
            f"INFO: the Redis at 127.0.0.1:{server.port} answers again: its states are used"
        ]
    cache.close()


def test_a_single_failed_call_logs_nothing(server: RedisServer, lines: Lines) -> None:
    cache = asked(server.url, timeout_s=0.2)
    for _ in range(3):
        use(cache, 2)
        server.pause()
        assert cache.namespace(b"m").find(SECRET) is None
        server.resume()
        use(cache, 2)
    assert cache.stats().refusals == {"redis: timeout": 3}
    assert lines.new() == []
    cache.close()


def test_a_redis_that_hangs_is_logged_once(server: RedisServer, lines: Lines) -> None:
    cache = asked(server.url, timeout_s=0.1)
    use(cache, 1)
    server.pause()
    try:
        use(cache, 6)
    finally:
        server.resume()
    (line,) = lines.new()
    assert "(timeout)" in line
    assert "timeout_s=0.1" in line
    cache.close()


# A Redis that refuses


@pytest.mark.parametrize("user", ["", f":{WRONG}@", f"nobody:{WRONG}@"])
def test_each_refusal_of_the_password_is_logged_once(
    tmp_path: Path, lines: Lines, user: str
) -> None:
    with RedisServer(tmp_path / "r", f"requirepass {RIGHT}") as server:
        cache = asked(server.url.replace("redis://", f"redis://{user}"))
        place = f"the Redis at 127.0.0.1:{server.port}"
        for _ in range(2):
            use(cache)
            (line,) = lines.new()
            assert line.startswith(f"WARNING: {place} ")
            assert ("refuses the user or password" if user else "its URL has none") in line
            assert "redis://USER:PASSWORD@" in line
            with server.client(password=RIGHT) as client:
                client.acl_setuser("nobody", enabled=True, passwords=[f"+{WRONG}"], keys=["*"])
                client.execute_command("ACL", "SETUSER", "nobody", "+@all")
                if user in ("", f":{WRONG}@"):
                    client.config_set("requirepass", WRONG if user else "")
                until_stored(cache)
                assert lines.new() == [f"INFO: {place} answers again: its states are used"]
                client.config_set("requirepass", RIGHT)
                client.execute_command("ACL", "SETUSER", "nobody", "resetpass")
                client.client_kill_filter(_type="normal", skipme=True)
        use(cache)
        assert len(lines.new()) == 1
        cache.close()


def test_a_refused_password_is_logged_after_one_call(tmp_path: Path, lines: Lines) -> None:
    with RedisServer(tmp_path / "r", f"requirepass {RIGHT}") as server:
        cache = PrefixStateCache(redis=server.url.replace("redis://", f"redis://:{WRONG}@"))
        assert cache.namespace(b"m").find(SECRET) is None
        assert len(lines.new()) == 1
        cache.close()


def test_a_redis_that_comes_back_with_a_password_logs_another_line(
    tmp_path: Path, lines: Lines
) -> None:
    with RedisServer(tmp_path / "r") as server:
        cache = asked(server.url)
        server.kill()
        use(cache)
        server.options = (f"requirepass {RIGHT}",)
        server.start()
        until(cache, lambda: "redis: auth" in cache.stats().refusals)
        use(cache)
        away, refused = lines.new()
        assert "(unreachable)" in away
        assert "its URL has none" in refused
        cache.close()


def test_each_loss_of_a_right_is_logged_once(tmp_path: Path, lines: Lines) -> None:
    acl = "user states on nopass ~tokcache:* -@all +hget +smembers"
    with RedisServer(tmp_path / "r", acl) as server:
        cache = asked(server.url.replace("redis://", "redis://states:any@"))
        for _ in range(2):
            use(cache, 8)
            (line,) = lines.new()
            assert line.startswith(
                f"WARNING: the user of the Redis at 127.0.0.1:{server.port} may not use EVAL"
            )
            assert "(NOPERM)" in line
            assert f"~tokcache:* and {ALLOWED}" in line
            with server.client() as client:
                client.execute_command("ACL", "SETUSER", "states", *ALLOWED.split())
                until_stored(cache)
                use(cache)
                (line,) = lines.new()
                assert line.startswith("INFO: the user of the Redis at 127.0.0.1:")
                assert line.endswith(" has the rights it needs")
                client.execute_command("ACL", "SETUSER", "states", "-eval")
        cache.close()


def test_the_rights_named_in_the_warning_suffice(tmp_path: Path, lines: Lines) -> None:
    acl = f"user states on nopass ~tokcache:* -@all {ALLOWED}"
    with RedisServer(tmp_path / "r", acl) as server:
        cache = asked(server.url.replace("redis://", "redis://states:any@"))
        use(cache)
        cache._store.touch_s = 0.0
        Engine().save(cache, SECRET)
        assert found(cache, SECRET) == 40
        cache.flush()
        cache.clear(scope="tenant-a")
        cache.clear()
        assert cache.stats().refusals == {}
        assert lines.new() == []
        cache.close()


def test_each_time_a_redis_is_full_is_logged_once(server: RedisServer, lines: Lines) -> None:
    cache = asked(server.url)
    with server.client() as client:
        for _ in range(2):
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")
            use(cache, 12)
            (line,) = lines.new()
            assert line.startswith(f"WARNING: the Redis at 127.0.0.1:{server.port} stores no more")
            assert "(full)" in line
            assert "allkeys-lru" in line
            client.config_set("maxmemory", "0")
            until_stored(cache)
            use(cache)
            assert lines.new() == [
                f"INFO: the Redis at 127.0.0.1:{server.port} stores states again"
            ]
    cache.close()


# Disks


def test_a_missing_folder_is_logged_and_made_again(tmp_path: Path, lines: Lines) -> None:
    folder = tmp_path / "d"
    cache = cache_on(folder)
    use(cache)
    for _ in range(2):
        shutil.rmtree(folder)
        for n in range(5):
            assert found(cache, [n, 1, 2]) == 0
        (line,) = lines.new()
        assert line.startswith(f"WARNING: the folder of states {folder} is gone")
        use(cache)
        assert lines.new() == [f"INFO: the folder of states {folder} is there again"]
    cache.close()


def test_a_full_disk_is_logged_once(tmp_path: Path, lines: Lines) -> None:
    from tests.fault.test_disk_faults import tiny_file_system  # noqa: PLC0415 (it imports us)

    with tiny_file_system(tmp_path / "full", 200_000):
        cache = cache_on(tmp_path / "full" / "d")
        for _ in range(2):
            for first in range(30):
                cache.namespace(b"m").store([first], bytes(20_000))
                cache.namespace(b"m").store([first, 2], b"small")  # may still fit
                cache.flush()
            (line,) = lines.new()
            assert line.startswith(f"WARNING: states can't be written to {tmp_path / 'full' / 'd'}")
            assert "free some space, or lower max_bytes" in line
            cache.clear()
            for first in range(3):
                cache.namespace(b"m").store([first], bytes(20_000))
            cache.flush()
            (line,) = lines.new()
            assert line.startswith("INFO: states are written to ")
        cache.close()


# States that are too large


def test_a_prompt_over_the_budget_is_logged_once_a_model(lines: Lines) -> None:
    cache = PrefixStateCache(ram_bytes=20_000)
    for n in range(5):
        assert not cache.namespace(b"m").store([n], bytes(30_000))
        assert cache.namespace(b"m").store([n], bytes(100))  # others fit all the while
        assert Engine().save(cache, list(range(9000)), b"m") == 0
    (line,) = lines.new()
    assert line.startswith("WARNING: the state of a prompt of 1 tokens takes 3")
    assert "more than ram_bytes=20,000" in line
    assert Engine().save(cache, list(range(9000)), b"n", scope="tenant-a") == 0
    (line,) = lines.new()
    assert "a prompt of 9,000 tokens" in line
    assert cache.stats().refusals == {"over_budget": 11}
    cache.clear()
    cache.namespace(b"m").store([1], bytes(30_000))
    assert len(lines.new()) == 1
    cache.close()


def test_a_state_over_the_budget_of_a_tier_is_logged_once_a_model(
    medium: Medium, lines: Lines
) -> None:
    budget = {"disk": "max_bytes", "redis": "max_state_bytes"}[medium.label]
    cache = medium.cache(medium.tier(**{budget: 10_000}))
    for fingerprint in (b"m", b"n"):
        for n in range(5):
            cache.namespace(fingerprint).store([n], bytes(20_000))
            cache.namespace(fingerprint).store([n, 1], bytes(100))
        cache.flush()
        (line,) = lines.new()
        assert line.startswith("WARNING: a state ")
        assert budget in line
    assert cache.stats().refusals == {f"{medium.label}: over_budget": 10}
    cache.close()


def test_a_log_handler_may_use_the_cache(lines: Lines) -> None:
    """No line is logged while the lock is held: a handler that reads the cache would block."""
    cache = PrefixStateCache(ram_bytes=20_000)
    seen: list[str] = []

    class Asking(logging.Handler):
        def emit(self, _record: logging.LogRecord) -> None:
            seen.append(f"{cache!r} {cache.stats().n_entries}")

    handler = Asking()
    logging.getLogger("tokcache").addHandler(handler)
    try:
        cache.namespace(b"m").store([1], bytes(30_000))
        Engine().save(cache, list(range(9000)), b"n")
    finally:
        logging.getLogger("tokcache").removeHandler(handler)
    assert len(seen) == len(lines.new()) == 2


def test_a_closed_ephemeral_tier_logs_nothing(lines: Lines) -> None:
    tier = DiskTier.ephemeral()
    cache = cache_on(tier)
    use(cache, 1)
    tier.close()
    use(cache, 2)
    assert lines.new() == []
    cache.close()
