"""Faults of a disk tier: killed writers, damaged files, a full disk, a clock that jumps.

Damaged states are never served, finished ones are never lost, and no request sees an exception.
`TOKCACHE_FAULTS=N` makes the long tests N times as long; 10 kills a writer 1,000 times.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.state.engine import Engine, restored
from tests.state.test_disk import all_bytes, cache_on, files, found, int32
from tokcache import _disk_budget
from tokcache.errors import StateRefused
from tokcache.state.cache import PrefixStateCache
from tokcache.state.names import RootKey, child_name, root_name
from tokcache.state.tiers import Address
from tokcache.state.tiers.block_file import HEAD_BYTES, MAGIC
from tokcache.state.tiers.disk import DiskTier
from tokcache.state.tiers.disk.folder import MARKER

SCALE = float(os.environ.get("TOKCACHE_FAULTS", "1"))
# Forks of a process with threads are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a fork; return its process id. The child's exit code is 1 if it raises."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001  (nothing may leave a forked child)
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)
    raise AssertionError


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def prompt(n: int) -> list[int]:
    rng = random.Random(n)
    return [n % 7, n % 3, *rng.choices(range(50_000), k=rng.randint(1, 60))]


# Killed writers


def test_a_killed_writer_leaves_no_damage_and_loses_no_finished_state(tmp_path: Path) -> None:
    np.empty(1)  # loaded here, not in every child
    rng, n_finished = random.Random(4), 0
    n_rounds = int(100 * SCALE)
    for n_round in range(n_rounds):
        receiver, sender = os.pipe()

        def work(sender: int = sender, n_round: int = n_round) -> None:
            tier = DiskTier(tmp_path, is_synced=n_round % 2 == 0)
            cache = cache_on(tier, max_entries=50)
            for n in range(100_000):
                Engine().save(cache, prompt(1000 * n_round + n))
                cache.flush()
                os.write(sender, struct.pack("<I", 1000 * n_round + n))

        pid = in_child(work)
        os.close(sender)
        if n_round % 2:  # on a busy machine it may not finish a state in the time below
            select.select([receiver], [], [], 30)
        time.sleep(rng.uniform(0.005, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        with os.fdopen(receiver, "rb") as pipe:
            reported = pipe.read()
        reader = cache_on(DiskTier(tmp_path), max_entries=100_000)
        for (n,) in struct.iter_unpack("<I", reported[: len(reported) // 4 * 4]):
            assert found(reader, prompt(n)) == len(prompt(n))
            n_finished += 1
        assert reader.stats().refusals == {}
    assert n_finished >= n_rounds // 2
    assert list(tmp_path.rglob(".new-*")) != []  # some were killed in the middle of a file
    for path in tmp_path.rglob(".new-*"):
        os.utime(path, (time.time() - 10_000,) * 2)
    DiskTier(tmp_path).prune()
    assert list(tmp_path.rglob(".new-*")) == []


# Damaged files


def one_file(tmp_path: Path, n_bytes: int, **keys: Any) -> tuple[DiskTier, Path]:
    tier = DiskTier(tmp_path / "d", **keys)
    cache = PrefixStateCache(disk=tier, block_tokens=64)
    rng = random.Random(1)
    cache.namespace(b"m").save(
        list(range(64)),
        lambda _start, _stop, buffer: buffer.__setitem__(slice(None), rng.randbytes(n_bytes)),
        lambda *_: n_bytes,
    )
    cache.close()
    (path,) = files(tmp_path)
    return tier, path


def is_served(tier: DiskTier) -> bool:
    cache = PrefixStateCache(disk=tier, block_tokens=64)
    with cache.namespace(b"m").plan(list(range(64))) as plan:
        return bool(plan.blocks)


@pytest.mark.parametrize(
    ("n_bytes", "keys"),
    [
        (64 << 10, {}),
        (1 << 10, {"hmac_key": b"k" * 32}),
        (1 << 10, {"encryption_key": b"e" * 32}),
    ],
    ids=["plain", "hmac", "encrypted"],
)
def test_every_flipped_byte_is_detected(tmp_path: Path, n_bytes: int, keys: Any) -> None:
    tier, path = one_file(tmp_path, n_bytes, **keys)
    assert is_served(tier)
    rng, intact, kept = random.Random(2), path.read_bytes(), tmp_path / "kept"
    kept.hardlink_to(path)
    fd = os.open(kept, os.O_WRONLY)
    address, rest = address_of(tier, path)
    opened = tier.find(address, rest)
    assert opened is not None
    buffer = memoryview(bytearray(opened.n_bytes))
    for offset, byte in enumerate(intact):
        os.pwrite(fd, bytes([byte ^ rng.randint(1, 255)]), offset)
        if offset % 97 == 0 or offset < 1000:
            assert not is_read(tier, address, rest), offset
        else:  # beyond the head: detected in a file opened before, too
            with pytest.raises(StateRefused):
                opened.read_into(buffer)
        os.pwrite(fd, bytes([byte]), offset)
        if not path.exists():  # a damaged file is removed
            path.hardlink_to(kept)
    opened.read_into(buffer)
    opened.close()
    os.close(fd)
    assert is_served(tier)  # the control: undamaged, it is served


def test_every_truncation_and_every_longer_file_is_detected(tmp_path: Path) -> None:
    tier, path = one_file(tmp_path, 64 << 10)
    kept = tmp_path / "kept"
    kept.hardlink_to(path)
    address, rest = address_of(tier, path)
    intact = path.read_bytes()
    kept.write_bytes(intact + b"\0")
    assert not is_read(tier, address, rest)
    for n_bytes in range(len(intact) - 1, -1, -1):
        if not path.exists():
            path.hardlink_to(kept)
        os.truncate(kept, n_bytes)
        assert not is_read(tier, address, rest), n_bytes
    kept.write_bytes(intact)
    path.hardlink_to(kept)
    assert is_served(tier)


def address_of(tier: DiskTier, path: Path) -> Any:
    """Return the arguments of `find` for the only file."""
    root_key = RootKey(b"m", None, "free")
    root, rest = root_name(root_key), int32(list(range(64)))
    address = Address(root_key, 0, root, child_name(root, rest[:4]))
    assert path.name == tier._files.names(address)[0]
    return address, rest


def is_read(tier: DiskTier, address: Any, rest: bytes) -> bool:
    stored = tier.find(address, rest)
    if stored is None:
        return False
    try:
        with stored:
            stored.read_into(memoryview(bytearray(stored.n_bytes)))
    except StateRefused:
        return False
    return True


@pytest.mark.parametrize("offset", [8, 10, 12, 16, 24, 32])
@pytest.mark.parametrize("value", [0, 1, 0x7FFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF])
def test_a_header_with_absurd_lengths_is_refused_before_memory_is_taken(
    tmp_path: Path, offset: int, value: int
) -> None:
    tier, path = one_file(tmp_path, 1024)
    data = bytearray(path.read_bytes())
    assert data[:8] == MAGIC
    size = 2 if offset < 12 else 4 if offset < 16 else 8
    data[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if data == path.read_bytes():
        return
    # A forger without a key can make the checksum right: it is xxhash.
    n_head = HEAD_BYTES + 64 * 4
    data[n_head : n_head + 16] = tier.codec.checksum(bytes(data[:n_head]))
    data[-16:] = tier.codec.checksum(bytes(data[:-16]))
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not is_served(tier)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_anything_but_a_regular_file_is_refused(tmp_path: Path) -> None:
    tier, path = one_file(tmp_path, 1024)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert not is_served(tier)
    assert tier.stats().refusals == {"symlink": 1}
    path.unlink()
    os.mkfifo(path)
    assert not is_served(tier)
    path.unlink()
    path.mkdir()
    assert not is_served(tier)
    path.rmdir()
    elsewhere.rename(path)
    assert is_served(tier)


@pytest.mark.parametrize("level", [1, 2])
def test_a_folder_that_is_a_link_is_not_followed(tmp_path: Path, level: int) -> None:
    tier, path = one_file(tmp_path, 1024)
    folder = path.parents[level - 1]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert not is_served(tier)
    cache = cache_on(tier)
    Engine().save(cache, [1, 2, 3])
    cache.flush()
    assert "disk: symlink" in cache.stats().refusals
    assert len(list((tmp_path / "elsewhere").rglob("*.0"))) == 1  # nothing was written through it
    assert list(tier.files()) == []
    cache.close()


# A disk that fails


@contextmanager
def tiny_file_system(path: Path, n_bytes: int) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    path.mkdir(exist_ok=True)
    options = f"size={n_bytes}".encode()
    if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, options):
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.umount2(str(path).encode(), 2)


def save_much(cache: PrefixStateCache) -> None:
    """Save more than a small disk takes, and find all states in memory nevertheless."""
    for first in range(40):
        assert cache.namespace(b"m").store([first], bytes(16_000))
        cache.flush()
        with cache.namespace(b"m").find([first]) as handle:  # type: ignore[union-attr]
            assert handle.n_bytes == 16_000


def test_a_full_disk_costs_only_the_states_that_do_not_fit(tmp_path: Path) -> None:
    with tiny_file_system(tmp_path / "full", 200_000):
        cache = cache_on(tmp_path / "full" / "d")
        save_much(cache)
        refusals = cache.stats().refusals
        assert refusals["disk: full"] > 20
        cache.close()
        fresh = cache_on(tmp_path / "full" / "d")
        assert 5 < sum(fresh.namespace(b"m").find([n]) is not None for n in range(40)) < 20
        assert not list((tmp_path / "full").rglob(".new-*"))
        fresh.close()


def test_a_share_of_a_disk_that_shrinks_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_disk_budget, "REREAD_S", 0.0)
    disk = tmp_path / "shrinks"
    with tiny_file_system(disk, 2_000_000):
        cache = PrefixStateCache(disk=disk / "d", disk_bytes="50%", max_entries=100)
        save_much(cache)
        assert cache.disk is not None
        assert cache.disk.max_bytes == pytest.approx(1_000_000, rel=0.01)
        assert cache.stats().disk.n_bytes > 40 * 16_000
        libc = ctypes.CDLL(None, use_errno=True)
        assert not libc.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 32, b"size=1000000")
        cache.namespace(b"m").store([1000], bytes(16_000))
        cache.flush()
        stats = cache.stats()
        assert cache.disk.max_bytes == pytest.approx(500_000, rel=0.01)
        assert 300_000 < stats.disk.n_bytes < 500_000
        assert (stats.disk.evictions > 10, stats.refusals) == (True, {})
        cache.close()
        fresh = cache_on(disk / "d")
        with fresh.namespace(b"m").find([1000]) as handle:  # type: ignore[union-attr]
            assert handle.n_bytes == 16_000
        fresh.close()


def test_a_share_of_free_space_makes_room_on_a_disk_that_others_fill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_disk_budget, "REREAD_S", 0.0)
    disk = tmp_path / "filled"
    with tiny_file_system(disk, 1_000_000):
        cache = PrefixStateCache(disk=disk / "d", disk_bytes="80% free", max_entries=100)
        save_much(cache)
        assert cache.disk is not None
        n_before = cache.stats().disk.n_bytes
        assert n_before > 600_000
        with pytest.raises(OSError, match="No space left"):
            (disk / "other").write_bytes(bytes(1_000_000))
        for n in (1000, 1001):  # there is room for neither until the oldest are removed
            cache.namespace(b"m").store([n], bytes(16_000))
            cache.flush()
            with cache_on(disk / "d").namespace(b"m").find([n]) as handle:  # type: ignore[union-attr]
                assert handle.n_bytes == 16_000
        stats = cache.stats()
        assert stats.disk.n_bytes < n_before
        assert stats.refusals == {}
        cache.close()


def test_a_file_over_the_size_limit_is_removed(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        cache = cache_on(tmp_path)
        save_much(cache)
        cache.namespace(b"m").store([99], bytes(100))
        cache.close()
        assert cache.disk is not None
        assert cache.disk.stats().refusals == {"full": 40}

    assert exit_code(in_child(work)) == 0
    assert len(files(tmp_path)) == 1
    assert not list(tmp_path.rglob(".new-*"))


def test_a_lost_permission_costs_a_miss(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):  # pytest closes its own to other users
        if folder.stat().st_uid == os.geteuid() and "pytest-of" in str(folder):
            folder.chmod(0o755)

    def work() -> None:
        if os.geteuid() == 0:  # root has every right
            (tmp_path / "own").mkdir()
            os.chown(tmp_path / "own", 65534, 65534)
            os.seteuid(65534)
        cache = cache_on(tmp_path / "own" / "d")
        Engine().save(cache, [1] * 8)
        cache.flush()
        (tmp_path / "own" / "d" / "1").chmod(0)
        Engine().save(cache, [2] * 8)
        cache.flush()
        assert found(cache, [2] * 8) == 8
        assert found(cache_on(cache.disk), [1] * 8) == 0
        assert cache.clear(scope="a") == 0
        refusals = cache.stats().refusals
        assert set(refusals) == {"disk: permission"}, refusals
        (tmp_path / "own" / "d" / "1").chmod(0o700)
        Engine().save(cache, [2] * 8)
        cache.flush()
        fresh = cache_on(cache.disk)
        assert [found(fresh, [n] * 8) for n in (1, 2)] == [8, 8]

    assert exit_code(in_child(work)) == 0


def test_a_folder_that_is_deleted_while_in_use(tmp_path: Path) -> None:
    cache = cache_on(tmp_path / "d")
    Engine().save(cache, [1] * 8)
    cache.flush()
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # noqa: S603, S607
    assert found(cache, [1] * 9) == 8  # from memory
    assert found(cache, [5] * 8) == 0
    assert cache.namespace(b"m").find([5] * 8) is None
    Engine().save(cache, [2] * 8)
    assert cache.flush()
    assert found(cache_on(tmp_path / "d"), [2] * 8) == 8  # the folder was made again
    assert (tmp_path / "d" / MARKER).is_file()
    assert cache.clear(scope="a") == 0
    cache.clear()
    cache.close()


def test_a_damaged_count_of_bytes_is_counted_again(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, max_bytes=20_000)
    for damage in (b"", b"\xff" * 8, b"\0" * 8, b"abc"):
        (tmp_path / "usage").write_bytes(damage)
        cache = cache_on(tier)
        for first in range(60):
            cache.namespace(b"m").store([first], bytes(1000))
            cache.flush()
        if damage != b"\0" * 8:  # a count that is too low is corrected by the next pruning
            assert sum(file.n_bytes for file in tier.files()) <= 20_000
        tier.prune()
        assert sum(file.n_bytes for file in tier.files()) <= 20_000
        assert cache.stats().refusals == {}
        cache.close()


# Many at once


def test_processes_that_write_read_and_prune_one_folder(tmp_path: Path) -> None:
    seconds = 4 * SCALE

    def work(seed: int) -> None:
        rng, until = random.Random(seed), time.monotonic() + seconds
        tier = DiskTier(tmp_path, max_bytes=60_000, is_synced=False)
        while time.monotonic() < until:
            cache = cache_on(tier, max_entries=rng.choice([3, 50]))
            for _ in range(30):
                tokens = prompt(rng.randint(0, 150))
                with cache.namespace(b"m").plan(tokens) as plan:
                    assert restored(plan, tokens) == plan.n_tokens
                Engine().save(cache, tokens)
                if rng.random() < 0.02:
                    tier.prune(rng.randint(0, 60_000))
                if rng.random() < 0.01:
                    cache.clear()
            cache._check()
            cache.close()
        assert not set(tier.stats().refusals) - {"place_taken"}, tier.stats()
        assert tier.stats().hits > 0

    children = [in_child(lambda seed=seed: work(seed)) for seed in range(3)]  # type: ignore[misc]
    assert [exit_code(pid) for pid in children] == [0, 0, 0]
    tier = DiskTier(tmp_path, max_bytes=60_000)
    assert sum(file.n_bytes for file in tier.files()) <= 60_000 + 3 * 2000
    assert tier.prune() <= 60_000


# Clocks


def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.time()]
    monkeypatch.setattr("tokcache.state.tiers.disk.files.time.time", lambda: now[0])
    tier = DiskTier(tmp_path, ttl_s=1000)
    cache = cache_on(tier)
    Engine().save(cache, [1] * 8)
    cache.flush()
    for path in files(tmp_path):  # written while the clock was a year ahead
        os.utime(path, (now[0] + 365 * 86400,) * 2)
    assert found(cache_on(tier), [1] * 8) == 8
    assert all(abs(file.used_at - time.time()) < 100 for file in tier.files())
    for path in files(tmp_path):
        os.utime(path, (now[0] + 365 * 86400,) * 2)
    tier.prune()
    assert all(abs(file.used_at - now[0]) < 100 for file in tier.files())
    now[0] -= 365 * 86400  # the clock goes back: no state is too old, nothing fails
    assert found(cache_on(tier), [1] * 8) == 8
    tier.prune()
    now[0] += 3 * 365 * 86400
    assert found(cache_on(tier), [1] * 8) == 0
    assert tier.prune() == 0
    cache.close()


def test_an_error_of_the_system_while_reading_costs_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, _ = one_file(tmp_path, 1024)

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "the disk is dying")

    monkeypatch.setattr("tokcache.state.tiers.disk.file.os.preadv", broken)
    cache = PrefixStateCache(disk=tier, block_tokens=64)
    with cache.namespace(b"m").plan(list(range(64))) as plan:
        assert plan.blocks == []
    assert cache.stats().refusals == {"disk: error": 1}
    cache._check()
    assert all_bytes(tmp_path) != b""


# Long runs


def test_memory_stays_flat_over_many_rounds(tmp_path: Path) -> None:
    def resident_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    tier = DiskTier(tmp_path, max_bytes=100_000, is_synced=False)
    cache = cache_on(tier, max_entries=20, ram_bytes=300_000)
    rng = random.Random(5)

    def run(rounds: int) -> None:
        for _ in range(rounds):
            tokens = prompt(rng.randint(0, 400))
            with cache.namespace(b"m").plan(tokens) as plan:
                assert plan.restore(lambda *_: None, trim=lambda _: None) == plan.n_tokens
            cache.namespace(b"m").save(tokens, lambda *_: None, lambda a, b: 8 * (b - a))

    run(1000)
    cache.flush()
    before = resident_kib()
    run(int(3000 * SCALE))
    cache.flush()
    assert resident_kib() - before < 4096
    cache._check()
    cache.close()
