"""Budgets of files: bytes, sizes with a unit, and shares of a disk that are read again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tokcache import _disk_budget
from tokcache._disk_budget import DiskBudget, require_disk_size
from tokcache.errors import InvalidConfig
from tokcache.gateway.config import GatewayConfig, UpstreamConfig
from tokcache.gateway.routing.files import Files
from tokcache.llama.server.records import Records
from tokcache.llama.server.settings import SlotSettings
from tokcache.state.cache import PrefixStateCache
from tokcache.state.tiers.disk import DiskTier

WRONG = ["0%", "0.0%", "120%", "100.5%", "abc%", "-5%", "5%%", "%", "10% used", "free", "1e1%"]


def no_failure(error: OSError) -> None:
    raise error


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("10%", "10%"),
        (" 2.5 % ", "2.5%"),
        ("50% free", "50% free"),
        ("50%FREE", "50% free"),
        ("100%", "100%"),
        ("4K", 4096),
        (7, 7),
    ],
)
def test_a_size_of_files_may_be_a_share_of_their_disk(given: Any, wanted: Any) -> None:
    assert require_disk_size("max_bytes", given) == wanted


@pytest.mark.parametrize("given", WRONG)
def test_a_wrong_share_is_refused_wherever_a_budget_is_given(tmp_path: Path, given: str) -> None:
    for name, use in (
        ("max_bytes", lambda: DiskTier(tmp_path / "states", max_bytes=given)),
        ("max_bytes", lambda: SlotSettings(slot_folder=tmp_path, max_bytes=given)),
        ("max_bytes", lambda: GatewayConfig(model=__file__, max_bytes=given)),
        ("disk_bytes", lambda: PrefixStateCache(disk=tmp_path / "states", disk_bytes=given)),
    ):
        with pytest.raises(InvalidConfig, match=f"{name} must be .*not {given!r}"):
            use()


def test_a_share_is_of_the_disk_or_of_free_space_and_the_files(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    whole = disk.f_blocks * disk.f_frsize
    folder = tmp_path / "not" / "made"
    assert DiskBudget("10%", folder, no_failure).n_bytes(0) == int(whole * 0.1)
    free = DiskBudget("50% free", folder, no_failure).n_bytes(0)
    assert free == pytest.approx(disk.f_bavail * disk.f_frsize / 2, rel=0.05)
    held = DiskBudget("50% free", folder, no_failure).n_bytes(1 << 40)
    assert held == pytest.approx(free + (1 << 39), rel=0.05)
    assert DiskBudget(1000, None, no_failure).n_bytes(5) == 1000


def test_the_disk_is_read_again_but_not_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    failures: list[OSError] = []
    statvfs = os.statvfs

    def counting(path: Any) -> os.statvfs_result:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(5, "Input/output error")
        return statvfs(path)

    monkeypatch.setattr(os, "statvfs", counting)
    budget = DiskBudget("10%", tmp_path, failures.append)
    first = [budget.n_bytes(0) for _ in range(1000)]
    assert calls == 1
    monkeypatch.setattr(_disk_budget, "REREAD_S", 0.0)
    assert [budget.n_bytes(0), budget.n_bytes(0)] == first[:2]  # the second reading fails
    assert (calls, [error.errno for error in failures]) == (3, [5])


def test_a_share_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="slot_folder"):
        SlotSettings(max_bytes="10%")
    url = "http://127.0.0.1:8080"
    with pytest.raises(InvalidConfig, match="slot_folder"):
        GatewayConfig(upstreams=(UpstreamConfig(url=url),), max_bytes="10%")
    config = GatewayConfig(
        upstreams=(UpstreamConfig(url=url, slot_folder=str(tmp_path)),), max_bytes="10 % free"
    )
    assert (config.max_bytes, config.upstream_folder) == ("10% free", tmp_path)
    for disk in (None, DiskTier(tmp_path / "states")):
        with pytest.raises(InvalidConfig, match="disk_bytes is the budget of a folder"):
            PrefixStateCache(disk=disk, disk_bytes="10%")


def test_the_files_of_servers_may_take_a_share_of_their_disk(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    share = int(disk.f_blocks * disk.f_frsize * 0.1)
    assert Files("10%", tmp_path).max_bytes == share
    settings = SlotSettings(slot_folder=tmp_path, max_bytes="10%")
    shelf = Records("http://127.0.0.1:8080", settings).shelf
    assert [shelf.make_room(n) for n in (share, share + 1)] == [True, False]


def test_disk_bytes_is_the_budget_of_the_folder(tmp_path: Path) -> None:
    cache = PrefixStateCache(disk=tmp_path, disk_bytes="3M")
    assert cache.disk is not None
    assert cache.disk.max_bytes == 3 << 20
    cache.close()
