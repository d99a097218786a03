"""The Redis tier against real servers: keys, time, rights, TLS, clusters, many tiers at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis.crc import key_slot

import tokcache
from tests.state.engine import Engine
from tests.state.redis_server import RedisServer
from tests.state.test_disk import SECRET, cache_on, files, found
from tokcache.errors import InvalidConfig, MissingExtra
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers import Address
from tokcache.state.tiers.redis import RedisTier
from tokcache.state.tiers.redis.circuit import Circuit
from tokcache.state.tiers.redis.reading import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokcache.state.tiers.redis.link import Link


def tier(server: RedisServer, **settings: Any) -> RedisTier:
    return RedisTier(server.url, **{"timeout_s": 10.0, **settings})


def cache(server: RedisServer, **settings: Any) -> PrefixStateCache:
    return cache_on(None, redis=tier(server), **settings)


def keys(server: RedisServer) -> list[str]:
    with server.client() as client:
        return sorted(key.decode() for key in client.scan_iter(count=1000))


# Names


def test_the_tiers_are_public_names() -> None:
    assert tokcache.RedisTier is RedisTier
    assert tokcache.DiskTier.__name__ == "DiskTier"
    with pytest.raises(AttributeError, match="no_such_name"):
        tokcache.no_such_name  # noqa: B018  # type: ignore[attr-defined]


def test_a_cache_takes_a_url(redis_server: RedisServer) -> None:
    ours = PrefixStateCache(redis=redis_server.url, block_tokens=8)
    Engine().save(ours, SECRET)
    ours.close()
    theirs = PrefixStateCache(redis=redis_server.url, block_tokens=8)
    assert found(theirs, SECRET) == 40
    assert theirs.redis is not None
    assert theirs.redis.stats().hits == 5
    assert theirs.disk is None
    theirs.close()


def test_keys_are_of_digests_and_all_of_a_state_is_in_one_slot(redis_server: RedisServer) -> None:
    ours = cache(redis_server)
    Engine().save(ours, SECRET, scope="tenant-a")
    ours.namespace(b"m", scope="tenant-a").store([1], bytes(3 * CHUNK_BYTES))
    ours.close()
    digest = "[0-9a-f]{64}"
    state = re.compile(rf"tokcache:1:{digest}:{digest}:\{{[0-9a-f]+-{digest}\}}:[01]")
    lengths = re.compile(rf"tokcache:1:{digest}:\{{{digest}\}}:lengths")
    found_keys = keys(redis_server)
    assert len(found_keys) == 7
    assert sum(bool(state.fullmatch(key)) for key in found_keys) == 6
    assert sum(bool(lengths.fullmatch(key)) for key in found_keys) == 1
    own = tier(redis_server)
    address = Address(tokcache.state.names.RootKey(b"m", "t", "free"), 3, b"base", b"slot")
    places = own._keys.places(address)
    assert len({key_slot(key.encode()) for key in (*places, f"{places[0]}.new-1")}) == 1
    assert len({key_slot(key.encode()) for key in found_keys}) > 4  # states are spread


def test_namespaces_are_apart(redis_server: RedisServer) -> None:
    for name in ("a", "a.1", "b"):
        one = cache_on(None, redis=tier(redis_server, namespace=name))
        Engine().save(one, SECRET)
        one.close()
    with redis_server.client() as client:
        client.set("a:1", "somebody else's")
        client.set("somebody", "else's")
        client.set("a:1x", "theirs")
    other = cache_on(None, redis=tier(redis_server, namespace="c"))
    assert found(other, SECRET) == 0
    own = cache_on(None, redis=tier(redis_server, namespace="a"))
    assert found(own, SECRET) == 40
    own.clear()
    left = keys(redis_server)
    assert [key for key in left if key.startswith("a:")] == ["a:1", "a:1x"]
    assert "somebody" in left
    assert sum(key.startswith(("a.1:", "b:")) for key in left) == 10
    own.close()


def test_a_pattern_in_a_namespace_is_refused(redis_server: RedisServer) -> None:
    for name in ("*", "a*", "", "a b", "{a}", "a:1", "a?", "[a]", "x" * 65, "\n"):
        with pytest.raises(InvalidConfig, match="namespace"):
            tier(redis_server, namespace=name)


# Work done


class Counted:
    """Counts the calls of a link."""

    def __init__(self, link: Link) -> None:
        self.link, self.n_commands = link, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def ask(self, commands: Sequence[Any], until: float) -> list[Any]:
        self.n_commands.append(len(commands))
        return self.link.ask(commands, until)

    def fill(self, commands: Sequence[Any], rooms: Any, until: float) -> list[Any]:
        self.n_commands.append(-len(commands))
        return self.link.fill(commands, rooms, until)


def counted(one: PrefixStateCache) -> Counted:
    assert one.redis is not None
    link = Counted(one.redis._calls.link)
    one.redis._calls.link = link  # type: ignore[assignment]
    one._store.touch_s = 1e9  # no calls in the background, which would be counted
    return link


def test_a_long_prompt_takes_few_round_trips(redis_server: RedisServer) -> None:
    tokens = list(range(8192))
    ours = cache_on(None, redis=tier(redis_server), block_tokens=256)
    Engine().save(ours, tokens)
    ours.close()
    theirs = cache_on(None, redis=tier(redis_server), block_tokens=256)
    link = counted(theirs)
    assert found(theirs, tokens) == 8192
    # Heads of 8 blocks, two places each, and their payloads; then those of 24.
    assert link.n_commands == [16, -8, 48, -24]
    assert theirs.stats().redis.hits == 32
    link.n_commands.clear()
    assert found(theirs, [*tokens[:300], *range(50_000, 58_000)]) == 300  # from memory
    assert link.n_commands == [16]
    link.n_commands.clear()
    assert found(theirs, list(range(60_000, 68_000))) == 0
    assert link.n_commands == [16]
    theirs.close()


@pytest.mark.parametrize(
    ("block_bytes", "n_commands"),
    [(100_000, [16, -8, 24, -12]), (300_000, [16, *[-1] * 8, 24, *[-1] * 12])],
)
def test_small_payloads_are_fetched_together(
    redis_server: RedisServer, block_bytes: int, n_commands: list[int]
) -> None:
    tokens, payloads = list(range(160)), [os.urandom(block_bytes) for _ in range(20)]

    def read(start: int, _stop: int, buffer: memoryview) -> None:
        buffer[:] = payloads[start // 8]

    ours = cache(redis_server)
    ours.namespace(b"m").save(tokens, read, lambda *_: block_bytes)
    ours.close()
    theirs = cache(redis_server)
    link = counted(theirs)
    with theirs.namespace(b"m").plan(tokens) as plan:
        assert [block.payload for block in plan.blocks] == payloads
    assert link.n_commands == n_commands
    assert theirs.stats().redis.read_bytes == 20 * block_bytes
    # A damaged payload is detected when it is its turn; the blocks before it are used.
    states = {int(key.partition("{")[2].partition("-")[0], 16): key for key in keys(redis_server)}
    with redis_server.client() as client:
        client.hset(states[40], "0", bytes(block_bytes))
        client.hdel(states[104], "0")
    harmed = cache(redis_server)
    with harmed.namespace(b"m").plan(tokens) as plan:
        assert [block.payload for block in plan.blocks] == payloads[:5]
    assert harmed.stats().refusals == {"redis: damaged": 1}
    for each in (theirs, harmed):
        each._check()
        each.close()


def test_a_write_takes_two_round_trips_and_one_if_the_state_is_there(
    redis_server: RedisServer,
) -> None:
    ours = cache_on(None, redis=tier(redis_server))
    link = counted(ours)
    ours.namespace(b"m").store([1], bytes(CHUNK_BYTES + 1))
    assert ours.flush()
    assert link.n_commands == [2, 6]  # heads; lengths and their time, begin, two chunks, publish
    again = cache_on(None, redis=tier(redis_server))
    link = counted(again)
    again.namespace(b"m").store([1], bytes(CHUNK_BYTES + 1), priority=-1)
    assert again.flush()
    assert link.n_commands == [2]
    for each in (ours, again):
        each.close()


def test_snapshots_of_many_lengths_take_few_round_trips(redis_server: RedisServer) -> None:
    ours = cache(redis_server)
    for n_tokens in range(1, 60):
        ours.namespace(b"m").store([*SECRET[:1], *[n_tokens] * n_tokens], b"x")
    ours.namespace(b"m").store(SECRET[:1], b"the one")
    ours.close()
    theirs = cache(redis_server)
    link = counted(theirs)
    with theirs.namespace(b"m").find(SECRET * 2) as handle:  # type: ignore[union-attr]
        assert bytes(handle.state) == b"the one"
    assert link.n_commands == [1, 16, 104, -1]  # lengths; heads of 8, of 52; one payload
    link.n_commands.clear()
    with theirs.namespace(b"m").find(SECRET[:1]) as handle:  # type: ignore[union-attr]
        assert bytes(handle.state) == b"the one"
    assert link.n_commands == []  # from memory
    theirs.close()


# Several tiers


def test_states_found_in_one_tier_are_written_to_the_other(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    remote = cache(redis_server)
    Engine().save(remote, SECRET)
    remote.namespace(b"m").store([5, 6], b"whole")
    remote.close()
    both = cache_on(tmp_path / "a", redis=tier(redis_server))
    assert found(both, SECRET) == 40
    assert both.namespace(b"m").find([5, 6]) is not None
    assert both.stats().redis.hits == 6
    assert both.stats().disk.hits == 0
    assert both.flush()
    assert len(files(tmp_path / "a")) == 6
    both.close()
    with redis_server.client() as client:
        client.flushall()
    # Now only the disk has the states; they are copied to memory and to Redis.
    again = cache_on(tmp_path / "a", redis=tier(redis_server))
    assert found(again, SECRET) == 40
    assert again.namespace(b"m").find([5, 6]) is not None
    assert again.stats().disk.hits == 6
    assert again.flush()
    assert len(redis_server.states()) == 6
    assert again.stats().refusals == {}
    again._check()
    again.close()


def test_a_chain_is_assembled_from_disk_and_redis(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    ours = cache_on(tmp_path, redis=tier(redis_server))
    Engine().save(ours, SECRET)
    ours.close()
    positions = {int(path.name.partition("-")[0], 16): path for path in files(tmp_path)}
    held = {int(key.partition("{")[2].partition("-")[0], 16): key for key in redis_server.states()}
    assert sorted(positions) == sorted(held) == [0, 8, 16, 24, 32]
    with redis_server.client() as client:
        client.delete(held[0], held[24])
    for position in (8, 16, 32):
        positions[position].unlink()
    theirs = cache_on(tmp_path, redis=tier(redis_server))
    assert found(theirs, SECRET) == 40
    assert (theirs.stats().disk.hits, theirs.stats().redis.hits) == (2, 3)
    assert theirs.flush()
    assert len(files(tmp_path)) == len(redis_server.states()) == 5  # both have all blocks again
    theirs.close()


def test_removal_empties_both_tiers(redis_server: RedisServer, tmp_path: Path) -> None:
    both = cache_on(tmp_path, redis=tier(redis_server))
    for scope in ("a", "b"):
        Engine().save(both, SECRET, scope=scope)
    both.flush()
    assert both.clear(scope="a") == 5
    assert len(files(tmp_path)) == len(redis_server.states()) == 5
    both.clear()
    assert files(tmp_path) == []
    assert redis_server.states() == {}
    both.close()


# Time


def test_states_live_for_ttl_s_after_their_last_use(redis_server: RedisServer) -> None:
    ours = cache_on(None, redis=tier(redis_server, ttl_s=100.0))
    ours._store.touch_s = 0.0
    Engine().save(ours, [1] * 8)
    Engine().save(ours, [2] * 8)
    ours.namespace(b"m").store([1], b"x")
    ours.flush()
    with redis_server.client() as client:
        assert all(90_000 < client.pttl(key) <= 100_000 for key in keys(redis_server))
        for key in keys(redis_server):
            client.pexpire(key, 50_000)
        assert found(ours, [1] * 8) == 8  # from memory; Redis learns of the use later
        assert ours.namespace(b"m").find([1]) is not None
        ours.flush()
        young = [client.pttl(key) > 60_000 for key in keys(redis_server)]
        assert sorted(young) == [False, True, True, True]  # two states, the lengths
    ours.close()


def test_states_expire(redis_server: RedisServer) -> None:
    ours = cache_on(None, redis=tier(redis_server, ttl_s=0.05))
    Engine().save(ours, SECRET)
    ours.namespace(b"m").store([1], b"x")
    ours.close()
    time.sleep(0.1)
    fresh = cache(redis_server)
    assert found(fresh, SECRET) == 0
    assert fresh.namespace(b"m").find([1]) is None
    assert fresh.stats().refusals == {}
    assert keys(redis_server) == []
    fresh.close()


def test_without_ttl_s_states_stay(redis_server: RedisServer) -> None:
    ours = cache_on(None, redis=tier(redis_server, ttl_s=None))
    ours._store.touch_s = 0.0
    Engine().save(ours, SECRET)
    ours.namespace(b"m").store([1], b"x")
    ours.flush()
    assert found(ours, SECRET) == 40
    ours.flush()
    with redis_server.client() as client:
        assert {client.pttl(key) for key in keys(redis_server)} == {-1}
    assert ours.stats().refusals == {}
    ours.close()


# Sizes


def test_a_state_over_the_limit_is_refused(redis_server: RedisServer) -> None:
    ours = cache_on(None, redis=tier(redis_server, max_state_bytes=1000))
    ours.namespace(b"m").store([1], bytes(1001))
    ours.namespace(b"m").store([2], bytes(1000))
    ours.flush()
    assert ours.stats().refusals == {"redis: over_budget": 1}
    assert len(redis_server.states()) == 1
    ours.close()


def test_no_value_is_larger_than_a_chunk(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "small", "proto-max-bulk-len 1mb") as server:
        ours = cache(server)
        state = os.urandom(5 * CHUNK_BYTES + 7)
        assert ours.namespace(b"m").store([1], state)
        ours.close()
        (held,) = server.states().values()
        assert max(map(len, held.values())) == CHUNK_BYTES
        theirs = cache(server)
        with theirs.namespace(b"m").find([1]) as handle:  # type: ignore[union-attr]
            assert handle.state == state
        theirs.close()


# Users, rights and connections


def with_user(url: str, user: str) -> str:
    return url.replace("redis://", f"redis://{user}@")


def test_a_password_and_a_user_with_few_rights_by_url(tmp_path: Path) -> None:
    allowed = "-@all +hget +hset +eval +hlen +rename +del +unlink +expire +pexpire +persist"
    allowed += " +sadd +smembers +scan +touch"
    acl = f"user states on >geheim%40 ~tokcache:* {allowed}"
    with RedisServer(tmp_path / "r", "requirepass s3cret", acl) as server:
        for user, is_let_in in (
            (":s3cret", True),
            ("states:geheim%2540", True),
            (":wrong", False),
            ("states:wrong", False),
            ("", False),
        ):
            url = with_user(server.url, user) if user else server.url
            one = PrefixStateCache(redis=url, block_tokens=8)
            Engine().save(one, SECRET)
            one.flush()
            fresh = PrefixStateCache(redis=url, block_tokens=8)
            assert found(fresh, SECRET) == (40 if is_let_in else 0), user
            refusals = one.stats().refusals
            assert not refusals if is_let_in else "redis: auth" in refusals, (user, refusals)
            one.clear()
            assert found(fresh, SECRET) == (40 if is_let_in else 0)  # its memory
            for each in (one, fresh):
                each.close()


def test_a_missing_right_costs_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    acl = "user reader on nopass ~tokcache:* -@all +hget +smembers +scan"
    with RedisServer(tmp_path / "r", acl) as server:
        writer = cache(server)
        Engine().save(writer, SECRET)
        reader = PrefixStateCache(redis=with_user(server.url, "reader"), block_tokens=8)
        writer.flush()
        assert found(reader, SECRET) == 40
        Engine().save(reader, [1] * 8)
        reader.flush()
        assert reader.stats().refusals == {"redis: permission": 1}
        assert reader.clear() == 6  # of its memory
        assert len(server.states()) == 5
        assert "could not be removed" in caplog.text
        for each in (writer, reader):
            each.close()


def test_a_unix_socket(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "r", f"unixsocket {tmp_path}/s") as server:
        url = f"unix://{tmp_path}/s"
        ours = PrefixStateCache(redis=url, block_tokens=8)
        Engine().save(ours, SECRET)
        ours.close()
        assert found(cache(server), SECRET) == 40
        assert found(PrefixStateCache(redis=url, block_tokens=8), SECRET) == 40


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a self-signed certificate of this host."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    host = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    secret, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, secret.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(host, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(secret, hashes.SHA256())
    )
    key, cert = folder / "key.pem", folder / "cert.pem"
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key.write_bytes(secret.private_bytes(pem, pkcs8, plain))
    cert.write_bytes(made.public_bytes(pem))
    return key, cert


def test_tls_by_url(tmp_path: Path) -> None:
    key, cert = certificate(tmp_path)
    options = f"tls-cert-file {cert}", f"tls-key-file {key}", "tls-auth-clients no"
    with RedisServer(tmp_path / "r", *options, tls=True) as server:
        url = server.url.replace("redis://", "rediss://")
        ours = PrefixStateCache(redis=f"{url}?ssl_ca_certs={cert}", block_tokens=8)
        Engine().save(ours, SECRET)
        state = os.urandom(2 * CHUNK_BYTES + 9)
        ours.namespace(b"m").store([1], state)
        ours.flush()
        theirs = PrefixStateCache(redis=f"{url}?ssl_ca_certs={cert}", block_tokens=8)
        assert found(theirs, SECRET) == 40
        with theirs.namespace(b"m").find([1]) as handle:  # type: ignore[union-attr]
            assert handle.state == state
        assert theirs.stats().refusals == ours.stats().refusals == {}
        # A server whose certificate is not trusted is not used.
        stranger = PrefixStateCache(redis=url, block_tokens=8)
        assert found(stranger, SECRET) == 0
        assert stranger.stats().refusals == {"redis: unreachable": 1}
        for each in (ours, theirs, stranger):
            each.close()


# Clusters


class Cluster:
    """Three servers that share the slots."""

    def __init__(self, folder: Path) -> None:
        self.servers = [
            RedisServer(
                folder / str(n),
                *(
                    "cluster-enabled yes",
                    "cluster-node-timeout 2000",
                    f"cluster-port {_bus_port()}",
                ),
                "cluster-require-full-coverage no",
            )
            for n in range(3)
        ]
        bounds = [*range(0, 16384, 16384 // 3 + 1), 16384]
        for server, (start, stop) in zip(self.servers, pairwise(bounds), strict=True):
            with server.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", start, stop - 1)
                client.execute_command(
                    *("CLUSTER MEET", "127.0.0.1", self.servers[0].port, self._bus(0))
                )
        until = time.monotonic() + 20
        while not all(map(self._is_ready, self.servers)):
            assert time.monotonic() < until
            time.sleep(0.05)

    def _bus(self, n: int) -> int:
        return int(self.servers[n].options[2].split()[1])

    def _is_ready(self, server: RedisServer) -> bool:
        with server.client() as client:
            info = client.execute_command("CLUSTER INFO")
            nodes = client.execute_command("CLUSTER NODES")
        return (
            "ok" in str(info.get("cluster_state"))
            and info.get("cluster_known_nodes") == "3"
            and sum(bool(node["slots"]) for node in nodes.values()) == 3
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.kill()


def _bus_port() -> int:
    from tests.state.redis_server import free_port  # noqa: PLC0415

    return free_port()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


def on_cluster(cluster: Cluster, n: int = 0, **settings: Any) -> PrefixStateCache:
    own = RedisTier(cluster.servers[n].url, **{"timeout_s": 5.0, "is_cluster": True} | settings)
    return cache_on(None, redis=own)


def test_a_cluster_holds_states_in_all_its_nodes(cluster: Cluster) -> None:
    ours = on_cluster(cluster)
    state = os.urandom(2 * CHUNK_BYTES + 1)
    Engine().save(ours, SECRET, scope="a")
    Engine().save(ours, SECRET)
    assert ours.namespace(b"m", scope="a").store([1, 2], state)
    ours.close()
    assert ours.stats().refusals == {}
    assert [len(server.states()) > 0 for server in cluster.servers] == [True] * 3
    theirs = on_cluster(cluster, 1)
    assert found(theirs, SECRET, scope="a") == found(theirs, SECRET) == 40
    with theirs.namespace(b"m", scope="a").find([1, 2, 3]) as handle:  # type: ignore[union-attr]
        assert handle.state == state
    theirs._store.touch_s = 0.0
    assert found(theirs, SECRET) == 40
    assert theirs.flush()
    assert theirs.clear(scope="a") == 6
    assert sum(len(server.states()) for server in cluster.servers) == 5
    theirs.clear()
    assert [keys(server) for server in cluster.servers] == [[], [], []]
    assert theirs.stats().refusals == {}
    theirs.close()


def test_a_stopped_node_of_a_cluster_costs_only_its_own_states(cluster: Cluster) -> None:
    ours = on_cluster(cluster)
    for n in range(12):
        Engine().save(ours, [n] * 8)
    ours.flush()
    theirs = on_cluster(cluster, timeout_s=0.5, n_failures=100)
    victim = cluster.servers[2]
    n_lost = len(victim.states())
    assert 0 < n_lost < 12
    victim.pause()
    try:
        assert sum(found(theirs, [n] * 8) > 0 for n in range(12)) == 12 - n_lost
    finally:
        victim.resume()
    assert set(theirs.stats().refusals) <= {"redis: timeout", "redis: cluster_down"}
    until = time.monotonic() + 20
    while sum(found(theirs, [n] * 8) > 0 for n in range(12)) < 12:
        assert time.monotonic() < until
        time.sleep(0.1)
    for each in (ours, theirs):
        each.clear()
        each.close()


def test_slots_that_move_to_another_node_are_followed(cluster: Cluster) -> None:
    ours = on_cluster(cluster)
    tokens = [77] * 8
    Engine().save(ours, tokens)
    ours.flush()
    (source,) = (server for server in cluster.servers if server.states())
    target = next(server for server in cluster.servers if server is not source)
    (key,) = source.states()
    slot = key_slot(key.encode())
    with source.client() as client:
        client.delete(key)
    with target.client() as client:
        new = client.execute_command("CLUSTER MYID")
    for server in (target, source, *cluster.servers):
        with server.client() as client:
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", new)
    theirs = on_cluster(cluster)
    ours._store.touch_s = 0.0
    assert found(ours, tokens) == 8  # reports the use to the former node, which redirects it
    assert ours.flush()
    until = time.monotonic() + 10
    while not target.states():
        assert time.monotonic() < until
        found(ours, tokens)
        ours.flush()
        Engine().save(ours, tokens)
        ours.flush()
    assert set(ours.stats().refusals) <= {"redis: moved"}
    assert found(theirs, tokens) == 8
    for each in (ours, theirs):
        each.clear()
        each.close()


def test_a_single_server_given_as_a_cluster_costs_a_miss(redis_server: RedisServer) -> None:
    one = cache_on(None, redis=tier(redis_server, is_cluster=True))
    assert found(one, SECRET) == 0
    Engine().save(one, SECRET)
    one.flush()
    assert set(one.stats().refusals) <= {"redis: cluster_down", "redis: circuit_open"}
    one.close()


# Threads and forks


def test_many_threads_ask_at_once(redis_server: RedisServer) -> None:
    ours = cache(redis_server)
    prompts = [[n, *range(100 * n, 100 * n + 30)] for n in range(16)]
    for tokens in prompts:
        Engine().save(ours, tokens)
    ours.close()
    theirs = cache(redis_server)
    wrong: list[object] = []

    def work(n: int) -> None:
        try:
            for step in range(16):
                tokens = prompts[(n + step) % 16]
                if found(theirs, tokens) != 31:
                    wrong.append(tokens)
        except BaseException as error:  # noqa: BLE001  (it would be lost in a thread)
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert theirs.stats().refusals == {}
    theirs._check()
    theirs.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_uses_connections_of_its_own(redis_server: RedisServer) -> None:
    ours = cache(redis_server)
    Engine().save(ours, SECRET)
    ours.flush()
    fresh = cache(redis_server)
    assert found(fresh, SECRET[:8]) == 8

    def clients() -> set[str]:
        with redis_server.client() as client:
            return {each["id"] for each in client.client_list() if each["cmd"] != "client|list"}

    before = clients()
    assert before
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            is_found = found(fresh, SECRET) == 40
            Engine().save(fresh, [5] * 8)
            code = 0 if is_found and fresh.flush(10) and len(clients()) > len(before) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert before <= clients()  # the child closed no connection of its parent
    assert found(fresh, [5] * 8) == 8
    assert found(fresh, SECRET) == 40
    assert fresh.stats().refusals == {}
    for each in (ours, fresh):
        each.close()


def test_waiting_writes_are_done_when_the_interpreter_ends(redis_server: RedisServer) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.state.engine import Engine
from tokcache.state.cache import PrefixStateCache
cache = PrefixStateCache(block_tokens=8, redis={redis_server.url!r})
Engine().save(cache, list(range(80)))
"""
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert found(cache(redis_server), list(range(80))) == 80


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        {"max_state_bytes": 0},
        {"ttl_s": 0},
        {"ttl_s": "1"},
        {"ttl_s": float("inf")},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"timeout_s": None},
        {"namespace": "a b"},
        {"namespace": None},
        {"n_failures": 0},
        {"retry_s": -1},
        {"hmac_key": b"short"},
        {"encryption_key": b"e" * 17},
    ],
)
def test_invalid_settings_are_refused(settings: Any) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        RedisTier("redis://127.0.0.1", **settings)


@pytest.mark.parametrize(
    "url",
    [
        "http://:geheim@127.0.0.1",
        "127.0.0.1:6379",
        "",
        "redis://:gehe/im@127.0.0.1",
        "redis://:geheim@127.0.0.1:port",
        "redis://:geheim@127.0.0.1:99999999",
        "redis://:geheim@127.0.0.1?no_such_option=1",
        "redis://:geheim@127.0.0.1?socket_timeout=soon",
        "redis://:geheim@[127.0.0.1",
    ],
)
def test_an_invalid_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(InvalidConfig, match="URL of a Redis must be") as caught:
        RedisTier(url)
    assert "gehe" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_values_other_than_urls_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="redis must be a URL"):
        PrefixStateCache(redis=7)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="url must be a str"):
        RedisTier(7)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="no databases"):
        RedisTier("redis://127.0.0.1/3", is_cluster=True)


def test_options_of_the_url_do_not_change_the_settings_of_the_tier(
    redis_server: RedisServer,
) -> None:
    url = f"{redis_server.url}?decode_responses=true&protocol=3&health_check_interval=1&db=2"
    ours = PrefixStateCache(redis=url, block_tokens=8)
    Engine().save(ours, SECRET)
    ours.close()
    with redis_server.client(db=2) as client:
        assert client.dbsize() == 5
    assert found(PrefixStateCache(redis=url, block_tokens=8), SECRET) == 40


def test_the_error_for_a_missing_library_has_the_pip_command() -> None:
    code = """
import sys
sys.modules["redis"] = sys.modules["redis.exceptions"] = None
import tokcache
try:
    tokcache.PrefixStateCache(redis="redis://127.0.0.1")
except tokcache.TokcacheError as error:
    print(type(error).__name__, error)
from tokcache import *
"""
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(MissingExtra.__name__)
    assert "pip install 'tokcache[redis]'" in done.stdout


def test_redis_py_is_new_enough() -> None:
    assert int(redis.__version__.split(".")[0]) >= 6


# The circuit


def test_a_circuit_opens_after_failures_in_a_row_and_probes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("tokcache.state.tiers.redis.circuit.time.monotonic", lambda: now[0])
    circuit = Circuit(3, 1.0)

    def call(*, is_good: bool) -> bool:
        if not circuit.lets_through():
            return False
        circuit.note(is_good=is_good)
        return True

    assert [call(is_good=good) for good in (False, False, True, False, False)] == [True] * 5
    assert not circuit.is_open  # never three in a row
    assert call(is_good=False)
    delays = []
    for _ in range(9):
        began = now[0]
        assert not call(is_good=True)
        while not circuit.lets_through():
            now[0] += 0.5
        assert not circuit.lets_through()  # one probe at a time
        circuit.note(is_good=False)
        delays.append(now[0] - began)
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    now[0] += 60
    assert call(is_good=True)
    assert not circuit.is_open
    assert [call(is_good=False) for _ in range(4)] == [True, True, True, False]
    now[0] += 1  # the delay is one second again
    assert call(is_good=True)
