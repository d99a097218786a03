"""`tokcache states`: each command, on folders that caches wrote."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from tests.state.engine import Engine
from tests.state.test_disk import cache_on, files, found
from tokcache.cli.states import states
from tokcache.state.tiers.disk import DiskTier

if TYPE_CHECKING:
    from typer.testing import Result


def run(*args: object) -> Result:
    return CliRunner().invoke(states, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cache = cache_on(tmp_path / "d")
    Engine().save(cache, list(range(24)), scope="tenant-a")
    Engine().save(cache, list(range(16)), scope="tenant-b")
    Engine().save(cache, list(range(8)))
    cache.close()
    return tmp_path / "d"


def test_ls_shows_digests_instead_of_names(folder: Path) -> None:
    done = run("ls", folder)
    assert done.exit_code == 0
    assert "tenant" not in done.output
    digest = DiskTier(folder).codec.scope("tenant-a").hex()
    assert digest[:12] in done.output
    assert "seconds ago" in done.output
    assert len([line for line in done.output.splitlines() if "ago" in line]) == 3


def test_ls_names_the_models_whose_names_were_noted(tmp_path: Path) -> None:
    cache = cache_on(tmp_path / "d")
    cache.name_model(b"m", "gemma [b]3[/b].gguf")
    Engine().save(cache, list(range(24)), scope="tenant-a")
    Engine().save(cache, list(range(8)))
    cache.close()
    tier = DiskTier(tmp_path / "d")
    shown = [line for line in run("ls", tmp_path / "d").output.splitlines() if "ago" in line]
    roots = {file.root for file in tier.files()}
    assert len(roots) == len(shown) == 2
    assert all(any(f"gemma [b]3[/b].gguf ({root[:4]})" in line for line in shown) for root in roots)
    # The name goes with the last state of its folder.
    assert run("prune", tmp_path / "d", "--max-bytes", 0).exit_code == 0
    assert files(tmp_path / "d") == []
    assert not list((tmp_path / "d").rglob("model"))


def test_ls_names_the_scopes_that_the_caller_knows(folder: Path) -> None:
    done = run("ls", folder, "--scope", "tenant-a", "--scope", "tenant-c")
    assert done.exit_code == 0
    codec = DiskTier(folder).codec
    assert codec.scope("tenant-a").hex()[:12] not in done.output
    assert codec.scope("tenant-b").hex()[:12] in done.output
    assert codec.scope(None).hex()[:12] not in done.output
    shown = [line.split()[1] for line in done.output.splitlines() if "ago" in line]
    assert sorted(shown) == sorted(["tenant-a", "(shared)", codec.scope("tenant-b").hex()[:12]])
    assert "tenant-c" not in done.output


def test_ls_names_the_scopes_of_a_folder_with_a_key_only_with_that_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_on(DiskTier(tmp_path, hmac_key=b"k" * 32))
    Engine().save(cache, [1, 2, 3], scope="tenant-a")
    cache.close()
    monkeypatch.setenv("GOOD", (b"k" * 32).hex())
    assert "tenant-a" not in run("ls", tmp_path, "--scope", "tenant-a").output
    done = run("ls", tmp_path, "--scope", "tenant-a", "--hmac-key-env", "GOOD")
    assert "tenant-a" in done.output


def test_stats_counts(folder: Path) -> None:
    done = run("stats", folder)
    assert done.exit_code == 0
    size = sum(path.stat().st_size for path in files(folder))
    assert "States:         6" in done.output
    assert f"{size:,}" in done.output
    assert "Scopes:         3" in done.output


def test_verify_finds_damaged_files_and_removes_them_with_remove(folder: Path) -> None:
    assert run("verify", folder).exit_code == 0
    first, second = files(folder)[:2]
    data = bytearray(first.read_bytes())
    data[-20] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    misfiled = files(folder)[2]
    misfiled.rename(misfiled.with_name(misfiled.name.replace("-", "0-", 1)))
    done = run("verify", folder)
    assert done.exit_code == 1
    assert "3 of 6 whole, 3 not" in done.output
    assert done.output.count("damaged: ") == 2
    assert done.output.count("misfiled: ") == 1
    assert len(files(folder)) == 6
    run("verify", folder, "--remove")
    assert len(files(folder)) == 4


def test_verify_needs_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_on(DiskTier(tmp_path, hmac_key=b"k" * 32))
    Engine().save(cache, [1, 2, 3])
    cache.close()
    monkeypatch.setenv("GOOD", (b"k" * 32).hex())
    monkeypatch.setenv("WRONG", (b"w" * 32).hex())
    monkeypatch.setenv("NO_HEX", "key")
    assert run("verify", tmp_path, "--hmac-key-env", "GOOD").exit_code == 0
    assert "forged" in run("verify", tmp_path, "--hmac-key-env", "WRONG").output
    assert "other_keys" in run("verify", tmp_path).output
    for name in ("NO_HEX", "MISSING"):
        done = run("verify", tmp_path, "--hmac-key-env", name)
        assert done.exit_code == 2
        assert name in done.output


def test_prune_removes_one_scope(folder: Path) -> None:
    done = run("prune", folder, "--scope", "tenant-a")
    assert done.exit_code == 0
    assert "3 states removed" in done.output
    cache = cache_on(folder)
    hits = [found(cache, list(range(8)), scope=scope) for scope in ("tenant-a", "tenant-b", None)]
    assert hits == [0, 8, 8]
    assert "1 states removed" in run("prune", folder, "--shared").output


def test_prune_enforces_a_budget_and_an_age(folder: Path) -> None:
    sizes = [path.stat().st_size for path in files(folder)]
    done = run("prune", folder, "--max-bytes", sum(sizes) - 1)
    assert "1 states removed" in done.output
    old = files(folder)[0]
    os.utime(old, (time.time() - 1000,) * 2)
    done = run("prune", folder, "--ttl-s", 500)
    assert "1 states removed" in done.output
    assert not old.exists()
    assert "0 states removed" in run("prune", folder, "--max-bytes", "1M").output
    assert "0 states removed" in run("prune", folder, "--max-bytes", "50% free").output
    wrong = run("prune", folder, "--max-bytes", "120%")
    assert (wrong.exit_code, "--max-bytes must be above 0%" in wrong.output) == (2, True)
    assert "4 states removed" in run("prune", folder, "--max-bytes", 0).output


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--scope", "a", "--max-bytes", "3"),
        ("--scope", "a", "--shared"),
        ("--ttl-s", "-1"),
        ("--max-bytes", "-1"),
        ("--max-bytes", "4GB"),
        ("--max-bytes", "much"),
    ],
)
def test_prune_without_a_choice_is_an_error(folder: Path, args: tuple[str, ...]) -> None:
    assert run("prune", folder, *args).exit_code == 2
    assert len(files(folder)) == 6


@pytest.mark.parametrize("command", ["ls", "stats", "verify", "prune"])
def test_the_error_for_another_folder_describes_it(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.txt").write_text("dear")
    for path, expected in (
        (tmp_path / "missing", "there is no folder"),
        (tmp_path / "others" / "thesis.txt", "is a file"),
        (tmp_path / "empty", "is an empty folder"),
        (tmp_path / "others", "is not a folder of states"),
    ):
        done = run(command, path)
        assert done.exit_code == 2
        assert expected in done.output
        assert str(path) in done.output
    assert not (tmp_path / "missing").exists()
    assert list((tmp_path / "empty").iterdir()) == []
    assert len(list((tmp_path / "others").iterdir())) == 1


def test_ls_of_a_folder_without_states(tmp_path: Path) -> None:
    cache_on(tmp_path / "d").close()
    done = run("ls", tmp_path / "d")
    assert done.exit_code == 0
    assert done.output == f"{tmp_path / 'd'} holds no states\n"
    assert "States:         0" in run("stats", tmp_path / "d").output
