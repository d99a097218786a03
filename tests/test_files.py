"""Files appear completely or not at all, and only their owner can read them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tokcache._files import atomic_file, write_temporary


@pytest.mark.parametrize("is_synced", [False, True])
def test_a_file_appears_when_its_block_has_ended(tmp_path: Path, is_synced: bool) -> None:
    path = tmp_path / "list"
    with atomic_file(path, is_synced=is_synced) as file:
        file.write(b"new")
        assert Path(file.name).parent == tmp_path
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    target, path = tmp_path / "elsewhere", tmp_path / "list"
    target.write_bytes(b"other")
    path.symlink_to(target)
    with atomic_file(path) as file:
        file.write(b"new")
    assert target.read_bytes() == b"other"
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"


def test_parts_are_written_whole_though_the_system_takes_few_bytes_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [bytes(parts[0])[:3]]))
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        name = write_temporary(folder, ".new-", (b"", b"abcdefgh", memoryview(b"ijk")))
    finally:
        os.close(folder)
    assert name.startswith(".new-")
    assert (tmp_path / name).read_bytes() == b"abcdefghijk"
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("is_removed", [True, False], ids=["removed", "disk refuses"])
def test_a_full_disk_is_reported_though_removing_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    def broken(*_: object, **_options: object) -> None:
        raise OSError(errno.EIO, "broken")

    folder = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(os, "writev", full)
    if not is_removed:
        monkeypatch.setattr(os, "unlink", broken)
    try:
        with pytest.raises(OSError, match="no space"):
            write_temporary(folder, ".new-", (b"abc",))
    finally:
        os.close(folder)
    assert len(list(tmp_path.iterdir())) == (0 if is_removed else 1)
