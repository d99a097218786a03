"""A Redis that is absent, slow, full, restarted, paused, cut off, read-only, or another program.

No request sees an exception or waits longer than its time-out, nothing wrong is ever served, and
counters say why. `TOKCACHE_FAULTS=N` makes the long tests N times as long.
"""

from __future__ import annotations

import os
import random
import re
import resource
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest

from tests.fault.test_disk_faults import SCALE, exit_code, in_child, prompt
from tests.state.engine import Engine, restored
from tests.state.redis_server import RedisServer, free_port
from tests.state.test_disk import SECRET, cache_on, found
from tokcache.errors import StateRefused
from tokcache.state.cache import PrefixStateCache
from tokcache.state.names import RootKey, child_name, root_name
from tokcache.state.tiers import Address
from tokcache.state.tiers.block_file import HEAD_BYTES, MAGIC
from tokcache.state.tiers.redis import RedisTier
from tokcache.state.tiers.redis.commands import HEAD
from tokcache.state.tiers.redis.reading import CHUNK_BYTES

# Forks of a process with threads are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as started:
        yield started


def cache(url: str, **settings: Any) -> PrefixStateCache:
    own = {"timeout_s": 5.0, "retry_s": 0.05} | settings
    return cache_on(None, redis=RedisTier(url, **own))


def reasons(one: PrefixStateCache) -> set[str]:
    return {reason.removeprefix("redis: ") for reason in one.stats().refusals}


def until_true(check: Callable[[], object], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_asked(one: PrefixStateCache) -> bool:
    """Return whether a look-up is answered, if only by a miss."""
    before = sum(one.stats().refusals.values())
    assert found(one, [3] * 8) == 0
    return sum(one.stats().refusals.values()) == before


# A server that does not answer


def test_an_absent_server_costs_misses_and_then_no_time(tmp_path: Path) -> None:
    port = free_port()
    one = cache(f"redis://127.0.0.1:{port}", retry_s=0.3)
    for _ in range(3):
        assert found(one, SECRET) == 0
    assert one.stats().refusals == {"redis: unreachable": 3}
    began = time.perf_counter()
    for _ in range(50):
        assert found(one, SECRET) == 0
    assert one.namespace(b"m").find([1]) is None
    assert time.perf_counter() - began < 0.3
    assert one.stats().refusals["redis: circuit_open"] >= 50
    Engine().save(one, SECRET)
    assert one.flush(10)
    assert found(one, SECRET) == 40  # from memory
    one._check()
    # Now it starts: a probe notices that, and the next save writes the dropped states.
    with RedisServer(tmp_path / "late") as late:
        late.kill()
        late.port = port
        late.start()
        until_true(lambda: Engine().save(one, SECRET) == 0 and one.flush() and late_states(port))
        assert found(cache(f"redis://127.0.0.1:{port}"), SECRET) == 40
    one.close()


def late_states(port: int) -> bool:
    import redis  # noqa: PLC0415 (an extra)

    with redis.Redis(port=port) as client:
        return client.dbsize() == 5  # type: ignore[no-any-return, unused-ignore]


def test_a_server_that_is_killed_and_restarted_empty(server: RedisServer) -> None:
    one = cache(server.url)
    one._store.touch_s = 0.0
    Engine().save(one, SECRET)
    one.flush()
    server.kill()
    assert found(one, SECRET) == 40
    assert found(one, [1] * 8) == 0
    Engine().save(one, [2] * 8)
    assert one.flush(10)
    assert "unreachable" in reasons(one) <= {"unreachable", "circuit_open"}
    server.start()
    until_true(lambda: is_asked(one))
    assert found(one, SECRET) == 40
    one.flush()
    Engine().save(one, SECRET)
    Engine().save(one, [2] * 8)
    one.flush()
    fresh = cache(server.url)  # lost and dropped states are there again
    assert (found(fresh, SECRET), found(fresh, [2] * 8)) == (40, 8)
    assert reasons(fresh) == set()
    for each in (one, fresh):
        each._check()
        each.close()


def test_a_paused_server_is_waited_for_only_a_few_times(server: RedisServer) -> None:
    one = cache(server.url, timeout_s=0.5, retry_s=1.0)
    Engine().save(one, SECRET)
    one.flush()
    fresh = cache(server.url, timeout_s=0.5, retry_s=1.0)
    fresh._store.touch_s = 1e9  # no calls in the background, which would fail too
    assert found(fresh, SECRET[:8]) == 8
    server.pause()
    try:
        for n_failure in range(3):
            began = time.perf_counter()
            assert found(fresh, SECRET) == 8
            assert 0.3 < time.perf_counter() - began < 5, n_failure
        began = time.perf_counter()
        assert found(fresh, SECRET) == 8
        assert fresh.namespace(b"m").find([1]) is None
        assert time.perf_counter() - began < 0.4
        began = time.perf_counter()
        Engine().save(one, [1] * 8)
        Engine().save(one, [2] * 8)
        one.close()  # waiting writes are tried and given up
        assert time.perf_counter() - began < 8
        assert reasons(fresh) == {"timeout", "circuit_open"}
    finally:
        server.resume()
    until_true(lambda: found(fresh, SECRET) == 40)
    fresh._check()
    fresh.close()


def test_cut_connections_are_made_again(server: RedisServer) -> None:
    writer, reader = cache(server.url), cache(server.url)
    for n in range(10):
        with server.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        Engine().save(writer, [n] * 8)
        writer.flush()
        assert found(reader, [n] * 8) == 8
    for each in (writer, reader):
        assert reasons(each) == set()
        each.close()


def test_a_flush_by_its_owner_costs_misses(server: RedisServer) -> None:
    one = cache(server.url)
    Engine().save(one, SECRET)
    one.flush()
    fresh = cache(server.url)
    assert found(fresh, SECRET[:16]) == 16
    with server.client() as client:
        client.flushall()
    assert found(fresh, SECRET) == 16
    assert reasons(fresh) == set()
    for each in (one, fresh):
        each.close()


# A server that is full or refuses writes


def fill_up(server: RedisServer, policy: str) -> None:
    with server.client() as client:
        client.config_set("maxmemory-policy", policy)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + (6 << 20))


def save_much(one: PrefixStateCache) -> None:
    """Save states of 1.5 MiB, two chunks each."""
    for first in range(12):

        def read(_start: int, _stop: int, buffer: memoryview, first: int = first) -> None:
            buffer[:] = bytes([first]) * len(buffer)

        one.namespace(b"m").save([first], read, lambda *_: 3 << 19)
        one.flush()


def n_right(one: PrefixStateCache) -> int:
    n_found = 0
    for first in range(12):
        with one.namespace(b"m").plan([first]) as plan:
            for block in plan.blocks:
                assert block.payload == bytes([first]) * (3 << 19)
                n_found += 1
    return n_found


def test_a_full_server_still_serves_its_states(server: RedisServer) -> None:
    fill_up(server, "noeviction")
    one = cache(server.url, retry_s=0.2)
    save_much(one)
    assert n_right(one) == 12  # from memory
    assert reasons(one) == {"full", "writes_paused"}
    assert one.stats().refusals["redis: full"] >= 3
    fresh = cache(server.url)
    assert 0 < n_right(fresh) < 6
    assert reasons(fresh) == set()
    with server.client() as client:
        assert not [
            key for key in client.scan_iter() if b".new-" in key
        ]  # failed writes leave no keys
        client.config_set("maxmemory", 0)

    def is_written() -> bool:
        save_much(one)
        return n_right(cache(server.url)) == 12

    until_true(is_written)
    for each in (one, fresh):
        each._check()
        each.close()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "allkeys-random"])
def test_a_state_evicted_by_the_server_is_a_miss(server: RedisServer, policy: str) -> None:
    fill_up(server, policy)
    one = cache(server.url)
    save_much(one)
    fresh = cache(server.url)
    assert 0 < n_right(fresh) < 12
    # A state in several chunks is evicted as a whole, or its eviction is noticed.
    assert reasons(fresh) <= {"missing"}
    if policy == "volatile-ttl":  # new states go last, even while they are written
        assert one.stats().redis.writes == 12
    for each in (one, fresh):
        each.close()


def test_a_replica_and_a_server_without_replicas_take_no_writes(server: RedisServer) -> None:
    one = cache(server.url)
    Engine().save(one, SECRET)
    one.flush()
    with server.client() as client:
        client.config_set("min-replicas-to-write", 1)
        Engine().save(one, [1] * 8)
        one.flush()
        client.config_set("min-replicas-to-write", 0)
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())
    fresh = cache(server.url)
    assert found(fresh, SECRET) == 40
    Engine().save(fresh, [2] * 8)
    fresh.flush()
    assert reasons(one) == {"no_replicas"}
    assert reasons(fresh) == {"read_only"}
    for each in (one, fresh):
        each.close()


# Damaged states


def one_state(server: RedisServer, n_bytes: int, **keys: Any) -> tuple[RedisTier, str, Any]:
    """Store one block; return its tier, its key, and the arguments that find it."""
    tier = RedisTier(server.url, timeout_s=5.0, **keys)
    writer = PrefixStateCache(redis=tier, block_tokens=64)
    rng = random.Random(1)
    writer.namespace(b"m").save(
        list(range(64)),
        lambda _start, _stop, buffer: buffer.__setitem__(slice(None), rng.randbytes(n_bytes)),
        lambda *_: n_bytes,
    )
    writer.close()
    (key,) = server.states()
    root_key, rest = RootKey(b"m", None, "free"), struct.pack("<64i", *range(64))
    root = root_name(root_key)
    return tier, key, (Address(root_key, 0, root, child_name(root, rest[:4])), rest)


def is_served(tier: RedisTier, wanted: Any) -> bool:
    stored = next(tier.find_each([wanted]), None)
    if stored is None:
        return False
    try:
        with stored:
            stored.read_into(memoryview(bytearray(stored.n_bytes)))
            assert stored.view().nbytes == stored.n_bytes
    except StateRefused as refusal:
        tier.refuse(str(refusal))
        return False
    return True


@pytest.mark.parametrize(
    "keys",
    [{}, {"hmac_key": b"k" * 32}, {"encryption_key": b"e" * 32}],
    ids=["plain", "hmac", "encrypted"],
)
def test_every_flipped_byte_and_every_other_length_is_detected(
    server: RedisServer, keys: Any
) -> None:
    tier, key, wanted = one_state(server, 300, **keys)
    assert is_served(tier, wanted)
    rng = random.Random(2)
    with server.client() as client:
        intact = client.hgetall(key)
        assert sorted(intact) == [b"0", HEAD]

        def is_detected(field: bytes, value: bytes | None) -> bool:
            if value is None:
                client.hdel(key, field)
            else:
                client.hset(key, field, value)
            is_right = not is_served(tier, wanted)
            client.hset(key, mapping=intact)  # it may have been removed
            return is_right

        for field, value in intact.items():
            for offset, byte in enumerate(value):
                flipped = bytearray(value)
                flipped[offset] = byte ^ rng.randint(1, 255)
                assert is_detected(field, bytes(flipped)), (field, offset)
            for n_bytes in range(len(value)):
                assert is_detected(field, value[:n_bytes]), (field, n_bytes)
            assert is_detected(field, value + b"\0")
            assert is_detected(field, value * 2)
            assert is_detected(field, None)
    assert is_served(tier, wanted)  # the control: undamaged, it is served
    assert tier.stats().refusals["forged" if "hmac_key" in keys else "damaged"] > 300


def test_chunks_that_are_swapped_or_gone_are_detected_and_removed(server: RedisServer) -> None:
    tier, key, wanted = one_state(server, 3 * CHUNK_BYTES)
    with server.client() as client:
        intact = client.hgetall(key)
        damages: list[dict[bytes, bytes]] = [
            intact | {b"0": intact[b"1"], b"1": intact[b"0"]},
            {field: value for field, value in intact.items() if field != b"1"},
            {field: value for field, value in intact.items() if field != b"2"},
            intact | {b"2": intact[b"2"][:-1]},
            intact | {b"1": intact[b"1"] * 5},
            intact | {b"0": b""},
            intact | {b"0": b"$-1\r\n"},
        ]
        for damaged in damages:
            client.delete(key)
            client.hset(key, mapping=damaged)
            assert not is_served(tier, wanted)
            assert not client.exists(key)  # a damaged state is removed
        client.hset(key, mapping=intact | {b"3": b"of nobody", b"x": b"y"})
        assert is_served(tier, wanted)
        assert tier.stats().refusals == {"damaged": 5, "missing": 2}


def test_a_state_that_replaced_a_damaged_one_is_not_removed(server: RedisServer) -> None:
    tier, key, wanted = one_state(server, 2 * CHUNK_BYTES)
    stored = next(tier.find_each([wanted]))
    assert stored is not None
    with server.client() as client:
        new = client.hgetall(key) | {HEAD: b"another head", b"0": b"another payload"}
        client.hset(key, mapping=new)
        with pytest.raises(StateRefused, match="damaged"), stored:
            stored.read_into(memoryview(bytearray(stored.n_bytes)))
        assert client.hgetall(key) == new


@pytest.mark.parametrize("offset", [8, 10, 12, 16, 24, 32])
@pytest.mark.parametrize("value", [0, 1, 0x7FFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF])
def test_a_head_with_absurd_lengths_is_refused_before_memory_is_taken(
    server: RedisServer, offset: int, value: int
) -> None:
    tier, key, _wanted = one_state(server, 1024)
    with server.client() as client:
        head = bytearray(client.hget(key, HEAD))
        assert head[:8] == MAGIC
        size = 2 if offset < 12 else 4 if offset < 16 else 8
        head[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if bytes(head) == client.hget(key, HEAD):
            return
        # A forger without a key can make the checksums right: they are xxhash.
        n_head = HEAD_BYTES + 64 * 4
        head[n_head : n_head + 16] = tier.codec.checksum(bytes(head[:n_head]))
        head[-16:] = tier.codec.checksum(bytes(head[:-16]), client.hget(key, "0"))
        client.hset(key, HEAD, bytes(head))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = PrefixStateCache(redis=tier, block_tokens=64)
    with reader.namespace(b"m").plan(list(range(64))) as plan:
        assert not plan.blocks
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert sum(reader.stats().refusals.values()) == 1
    reader._check()
    reader.close()


def test_keys_of_other_programs_are_unchanged(server: RedisServer) -> None:
    one = cache(server.url)
    Engine().save(one, [1, 2, 3])
    one.namespace(b"m").store([1], b"x")
    one.flush()
    with server.client() as client:
        ours = [key for key in client.scan_iter() if not key.endswith(b":lengths")]
        lengths = next(key for key in client.scan_iter() if key.endswith(b":lengths"))
        client.flushall()
        for key in (*ours, lengths):
            client.set(key, "a thesis")
        fresh = cache(server.url)
        assert found(fresh, [1, 2, 3]) == 0
        assert fresh.namespace(b"m").find([1, 2]) is None
        Engine().save(fresh, [1, 2, 3])  # the second place is free
        fresh.flush()
        assert reasons(fresh) == {"wrong_type"}
        assert found(cache(server.url), [1, 2, 3]) == 3
        assert {client.get(key) for key in ours} == {b"a thesis"}
        client.set("other", "things")
        client.delete(lengths)
        client.sadd(lengths, "a", "-1", "0", "99999999999999999999", "1", b"\xff", "16777217")
        assert fresh.redis is not None
        assert fresh.redis.lengths(RootKey(b"m", None, "snapshot")) == {1}
        fresh.clear()  # all of its namespace, other kinds of keys too
        assert list(client.scan_iter()) == [b"other"]
        fresh.close()
    one.close()


class Meddling:
    """Calls a function just before the n-th call of a tier."""

    def __init__(self, tier: RedisTier, n_call: int, meddle: Callable[[], object]) -> None:
        self._link, self._left, self._meddle = tier._calls.link, n_call, meddle
        tier._calls.link = self  # type: ignore[assignment]

    def ask(self, commands: Any, until: float) -> list[Any]:
        self._left -= 1
        if self._left == 0:
            self._meddle()
        return self._link.ask(commands, until)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)


@pytest.mark.parametrize("n_call", [1, 2, 3, 4])
def test_a_state_removed_while_it_is_written_never_appears_in_part(
    server: RedisServer, n_call: int
) -> None:
    tier = RedisTier(server.url, timeout_s=5.0)
    one = cache_on(None, redis=tier)
    state = os.urandom(20 * CHUNK_BYTES)
    Meddling(tier, n_call, lambda: cache(server.url).clear())
    assert one.namespace(b"m").store([1], state)
    one.flush()
    is_complete = n_call <= 2  # removed before any write
    assert reasons(one) == (set() if is_complete else {"removed"})
    handle = cache(server.url).namespace(b"m").find([1])
    assert (handle is not None) == is_complete
    assert handle is None or handle.state == state
    with server.client() as client:
        assert not [key for key in client.scan_iter() if b".new-" in key]
    one.close()


def test_two_writers_at_once_each_get_a_place(server: RedisServer) -> None:
    """Both have seen that the first place is free; the second then sees that it is taken."""
    prompts = [[1, 2, 3, 4], [1, 7, 8, 9]]
    tier = RedisTier(server.url, timeout_s=5.0)
    one, other = cache_on(None, redis=tier), cache(server.url)

    def meddle() -> None:
        Engine().save(other, prompts[1])
        other.flush()

    Meddling(tier, 3, meddle)  # after the look-up and the heads: before the write
    Engine().save(one, prompts[0])
    one.flush()
    assert len(server.states()) == 2
    assert [found(cache(server.url), tokens) for tokens in prompts] == [4, 4]
    assert reasons(one) == reasons(other) == set()
    for each in (one, other):
        each.close()


# Other programs than Redis


class Stranger:
    """Listens, and calls a function to answer each connection."""

    def __init__(self, answer: Callable[[socket.socket], object]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:  # one accepted during __exit__ is in no list
            self._answer(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def always(answer: bytes) -> Callable[[socket.socket], None]:
    def run(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            connection.sendall(answer)

    return run


def use_all(one: PrefixStateCache) -> None:
    """Use every method that asks or writes."""
    assert found(one, SECRET) == 0
    Engine().save(one, SECRET)
    one._store.touch_s = 0.0
    assert found(one, SECRET) == 40
    assert one.namespace(b"m").find([1, 2]) is None
    one.namespace(b"m").store([1, 2], b"state")
    assert one.flush(20)
    with one.namespace(b"m").find([1, 2]) as handle:  # type: ignore[union-attr]
        assert bytes(handle.state) == b"state"
    one.clear(scope="a")
    one.clear()
    one._check()
    one.close()


GARBAGE = [
    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    b"220 mail ready\r\n",
    b"SSH-2.0-OpenSSH_9\r\n",
    b"\r\n",
    b"\0" * 100,
    b"+OK\r\n" * 100,
    b":1\r\n" * 100,
    b"$-1\r\n" * 7,
    b"$5\r\nhello\r\n" * 100,
    b"$4\r\nhello\r\n" * 100,
    b"$99999999999999999999\r\n",
    b"$-7\r\n",
    b"$abc\r\n",
    b"*2\r\n$1\r\n7\r\n*0\r\n" * 100,
    b"*1\r\n" * 5000,
    b"*-1\r\n" * 100,
    b"*99999999\r\n",
    b"*0\r\n" * 100,
    b"%1\r\n+a\r\n+b\r\n" * 20,
    b">2\r\n+a\r\n+b\r\n" * 20,
    b"-\r\n" * 100,
    b"-ERR \xff\xfe\r\n" * 100,
    b"-MOVED 1 127.0.0.1:1\r\n" * 100,
    b"-MOVED nonsense\r\n" * 100,
    b"-ASK 3999 127.0.0.1:6381\r\n" * 100,
    b"x" * 100_000,
]


@pytest.mark.parametrize("answer", GARBAGE, ids=lambda answer: repr(answer[:16]))
@pytest.mark.parametrize("is_cluster", [False, True])
def test_a_server_that_answers_garbage_costs_misses(answer: bytes, is_cluster: bool) -> None:
    with Stranger(always(answer)) as stranger:
        one = cache(stranger.url, timeout_s=0.05, retry_s=60.0, is_cluster=is_cluster)
        began = time.perf_counter()
        use_all(one)
        assert time.perf_counter() - began < 5


def test_random_garbage_costs_misses() -> None:
    rng = random.Random(6)
    parts = [b"$", b"*", b"+", b"-", b":", b"\r\n", b"1", b"0", b"9", b"OK", b"head", b"published"]

    def answer(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            connection.sendall(b"".join(rng.choices(parts, k=rng.randint(1, 60))))

    with Stranger(answer) as stranger:
        for _ in range(int(30 * SCALE)):
            use_all(cache(stranger.url, timeout_s=0.02, retry_s=60.0))


@pytest.mark.parametrize(
    ("line", "reason", "opens"),
    [
        (b"-LOADING Redis is loading the dataset in memory", "loading", True),
        (b"-NOAUTH Authentication required.", "auth", True),
        (b"-WRONGPASS invalid username-password pair", "auth", True),
        (b"-BUSY Redis is busy running a script", "busy", True),
        (b"-CLUSTERDOWN Hash slot not served", "cluster_down", True),
        (b"-MASTERDOWN Link with MASTER is down", "cluster_down", True),
        (b"-ERR max number of clients reached", "unreachable", True),
        (b"-MOVED 3999 127.0.0.1:6381", "moved", False),
        (b"-NOPERM this user has no permissions", "permission", False),
        (b"-WRONGTYPE Operation against a key", "wrong_type", False),
        (b"-ERR unknown command 'HGET'", "server_error", False),
    ],
)
def test_the_errors_of_a_server_are_counted_by_reason(
    line: bytes, reason: str, opens: bool
) -> None:
    def answer(connection: socket.socket) -> None:
        while asked := connection.recv(1 << 16):
            connection.sendall((line + b"\r\n") * len(re.findall(rb"\*\d+\r\n\$", asked)))

    with Stranger(answer) as stranger:
        one = cache(stranger.url, retry_s=60.0)
        for _ in range(5):
            assert found(one, SECRET[:4]) == 0
        assert reasons(one) == ({reason, "circuit_open"} if opens else {reason})
        one.close()


def test_a_server_that_sends_too_slowly_is_given_up(server: RedisServer) -> None:
    """Each byte comes within the time-out of a socket, but all of them together do not."""

    def drip(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        for byte in b"$1000000\r\n" + b"x" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    with Stranger(drip) as stranger:
        one = cache(stranger.url, timeout_s=0.3)
        began = time.perf_counter()
        assert found(one, SECRET) == 0
        assert 0.2 < time.perf_counter() - began < 2
        assert reasons(one) == {"timeout"}
        one.close()
    # A payload has the time that its size allows, and no more.
    tier, _, wanted = one_state(server, 2 * CHUNK_BYTES)
    with Proxy(server, pause_s=0.05, n_bytes=1 << 10) as proxy:
        slow = RedisTier(proxy.url, timeout_s=0.3)
        began = time.perf_counter()
        assert not is_served(slow, wanted)
        assert time.perf_counter() - began < 3
        assert slow.stats().refusals == {"timeout": 1}
        slow.close()
    assert is_served(tier, wanted)


class Proxy(Stranger):
    """A proxy of a real server: slow, or one that cuts connections anywhere."""

    def __init__(
        self,
        server: RedisServer,
        *,
        pause_s: float = 0.0,
        n_bytes: int = 1 << 16,
        cut_after: Callable[[], int] = lambda: 1 << 60,
    ) -> None:
        self._server, self._pause_s, self._n_bytes = server, pause_s, n_bytes
        self._cut_after = cut_after
        super().__init__(self._through)

    def _through(self, connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._server.port)) as upstream:
            left = [self._cut_after()]
            there = threading.Thread(target=self._pump, args=(connection, upstream, left))
            there.start()
            self._pump(upstream, connection, left)
            there.join()

    def _pump(self, source: socket.socket, target: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(self._n_bytes):
                time.sleep(self._pause_s)
                target.sendall(data[: max(left[0], 0)])
                left[0] -= len(data)
                if left[0] <= 0:
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_connections_cut_anywhere_cost_only_time(server: RedisServer) -> None:
    rng = random.Random(7)
    seconds = 3 * SCALE
    wrong: list[object] = []
    n_found = [0]

    def work(seed: int, url: str) -> None:
        own, until = random.Random(seed), time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                one = cache(url, timeout_s=1.0, retry_s=0.01)
                for _ in range(10):
                    tokens = prompt(own.randint(0, 60))
                    with one.namespace(b"m").plan(tokens) as plan:
                        assert restored(plan, tokens) == plan.n_tokens
                        n_found[0] += plan.n_tokens > 0
                    Engine().save(one, tokens)
                    state = bytes([tokens[0]]) * (CHUNK_BYTES + 5)
                    one.namespace(b"m").store(tokens[:2], state)
                    with suppress(AttributeError), one.namespace(b"m").find(tokens[:3]) as got:  # type: ignore[union-attr]
                        assert got.state == bytes([tokens[0]]) * (CHUNK_BYTES + 5)
                one._check()
                one.close()
                allowed = {"unreachable", "timeout", "circuit_open", "place_taken", "overtaken"}
                assert reasons(one) <= allowed | {"missing"}, one.stats().refusals
        except BaseException as error:  # noqa: BLE001  (it would be lost in a thread)
            wrong.append(error)

    cut = lambda: int(2 ** rng.uniform(5, 23))  # noqa: E731
    with Proxy(server, cut_after=cut) as proxy:
        threads = [threading.Thread(target=work, args=(n, proxy.url)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert n_found[0] > 10
    fresh = cache(server.url)
    n_served = sum(found(fresh, prompt(n)) > 0 for n in range(61))
    assert n_served > 10
    assert reasons(fresh) == set()  # unfinished states are never seen
    with server.client() as client:
        assert all(client.ttl(key) > 0 for key in client.scan_iter(count=1000))
    fresh.close()


# Killed writers


def test_a_killed_writer_leaves_no_damage_and_loses_no_finished_state(
    server: RedisServer,
) -> None:
    rng, n_finished, n_left = random.Random(4), 0, 0
    for n_round in range(int(25 * SCALE)):
        receiver, sender = os.pipe()

        def work(sender: int = sender, n_round: int = n_round) -> None:
            one = cache(server.url)
            for n in range(100_000):
                Engine().save(one, prompt(1000 * n_round + n))
                one.namespace(b"m").store([n_round, n], bytes([n % 256]) * (3 * CHUNK_BYTES))
                one.flush()
                os.write(sender, struct.pack("<I", n))

        pid = in_child(work)
        os.close(sender)
        if n_round % 2:  # on a busy machine it may not finish a state in the time below
            select.select([receiver], [], [], 30)
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        with os.fdopen(receiver, "rb") as pipe:
            reported = pipe.read()
        reader = cache(server.url)
        for (n,) in struct.iter_unpack("<I", reported[: len(reported) // 4 * 4]):
            tokens = prompt(1000 * n_round + n)
            assert found(reader, tokens) == len(tokens)
            with reader.namespace(b"m").find([n_round, n]) as handle:  # type: ignore[union-attr]
                assert handle.state == bytes([n % 256]) * (3 * CHUNK_BYTES)
            n_finished += 1
        assert reader.stats().refusals == {}
        reader.close()
        with server.client() as client:
            keys = list(client.scan_iter(count=1000))
            n_left += sum(b".new-" in key for key in keys)
            assert all(client.ttl(key) > 0 for key in keys)
            client.flushall()
    assert n_finished > 10
    assert n_left > 0  # some were killed in the middle of a state; those expire


# Long runs


@contextmanager
def growth_kib() -> Iterator[list[int]]:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    before, grown = resident(), [0]
    yield grown
    grown[0] = resident() - before


def test_memory_stays_flat_over_many_rounds(server: RedisServer) -> None:
    own = RedisTier(server.url, timeout_s=5.0)
    one = cache_on(None, redis=own, max_entries=20, ram_bytes=300_000)
    rng = random.Random(5)

    def run(rounds: int) -> None:
        for _ in range(rounds):
            tokens = prompt(rng.randint(0, 400))
            with one.namespace(b"m").plan(tokens) as plan:
                assert plan.restore(lambda *_: None, trim=lambda _: None) == plan.n_tokens
            one.namespace(b"m").save(tokens, lambda *_: None, lambda a, b: 8 * (b - a))
        one.flush()

    run(500)
    with growth_kib() as grown:
        run(int(1000 * SCALE))
    assert grown[0] < 4096
    one._check()
    one.close()
