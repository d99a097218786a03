"""The gateway's folder: one process uses it, and only its own files are deleted there."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.gateway.gateways import SYSTEM, Gateway, gateway, system, upstream, user
from tests.gateway.test_saving import wait_for
from tokcache import samples
from tokcache.errors import InvalidConfig
from tokcache.gateway.config import load
from tokcache.gateway.routing.files import Files, remove_strangers
from tokcache.gateway.service import Service

if TYPE_CHECKING:
    from pathlib import Path

NOWHERE = "http://127.0.0.1:9"


def service(folder: Path | None, **flags: Any) -> Service:
    given = {"upstreams": [NOWHERE], "folder": folder and str(folder), **flags}
    return Service(load(None, given, {}))


async def start_and_stop(*made: Service) -> None:
    try:
        for each in made:
            await each.start()
    finally:
        for each in made:
            await each.stop()


def test_a_second_gateway_on_a_folder_is_refused_with_the_first_ones_process(
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidConfig, match=f"process {os.getpid()}, port 8000") as caught:
        asyncio.run(start_and_stop(service(tmp_path), service(tmp_path)))
    assert "--folder" in str(caught.value)
    asyncio.run(start_and_stop(service(tmp_path)))


def test_two_gateways_have_two_folders_by_default() -> None:
    one, two = service(None), service(None, port=8001)
    assert one.folder.path != two.folder.path


@pytest.mark.parametrize("is_file", [True, False])
def test_a_folder_that_can_not_be_used_is_named(tmp_path: Path, is_file: bool) -> None:
    folder = tmp_path / "file" if is_file else tmp_path / "file" / "below"
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidConfig, match="--folder") as caught:
        asyncio.run(start_and_stop(service(folder)))
    assert str(folder) in str(caught.value)


def test_a_slot_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "slots").write_text("x")
    with pytest.raises(InvalidConfig, match="--folder"):
        asyncio.run(
            start_and_stop(service(tmp_path, upstreams=None, model=str(samples.tiny_model())))
        )


def test_a_start_that_fails_leaves_the_list(tmp_path: Path) -> None:
    asyncio.run(start_and_stop(service(tmp_path)))
    (tmp_path / "files.json").write_text("kept")
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(InvalidConfig, match="damaged"):
        asyncio.run(start_and_stop(service(tmp_path)))
    assert (tmp_path / "files.json").read_text() == "kept"


def test_only_files_of_the_own_gateway_are_strangers(tmp_path: Path) -> None:
    names = []
    for owner in ("one", "two"):
        files = Files(1 << 20)
        files.owner = owner
        names.append(files.new_name("pool"))
        (tmp_path / names[-1]).touch()
    assert remove_strangers(tmp_path, files) == 1
    assert [path.name for path in tmp_path.iterdir()] == [names[0]]


def test_the_pin_of_a_warm_prompt_ends_when_its_file_changes_or_goes(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    warm.mkdir()

    def pinned() -> list[str]:
        with gateway(tmp_path / "own", server, warm_folder=str(warm)) as served:
            counts = served.service.counts
            wait_for(lambda: counts["warmed"] or not any(warm.iterdir()))
            return [file.name for file in served.service.files if file.is_pinned]

    with upstream(tmp_path / "slots") as server:
        found = []
        for number in range(2):
            body = {"messages": [system(f"{number}. {SYSTEM}"), user("hi")]}
            (warm / "prompt.json").write_text(json.dumps(body))
            found.append(pinned())
        assert [len(each) for each in found] == [1, 1]
        assert found[0] != found[1]
        (warm / "prompt.json").unlink()
        assert pinned() == []
        with gateway(tmp_path / "own", server) as served:
            assert len(served.service.files) == 2
            assert not any(file.is_pinned for file in served.service.files)


def test_two_models_of_one_file_name_are_refused(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        paths.append(folder / "model.gguf")
        shutil.copy(samples.tiny_model(seed=seed), paths[-1])
    with (
        upstream(tmp_path / "a", model=paths[0]) as one,
        upstream(tmp_path / "b", model=paths[1]) as two,
    ):
        with pytest.raises(InvalidConfig, match="--alias") as caught:
            Gateway(load(None, {"upstreams": [one.url, two.url], "folder": str(tmp_path)}, {}))
        assert one.url in str(caught.value)
        assert two.url in str(caught.value)
        # A server that changes its model later is not used.
        port = int(two.url.rpartition(":")[2])
        two.kill()
        with gateway(tmp_path / "own", upstreams=[one.url, two.url]) as served:
            with upstream(tmp_path / "b", model=paths[1], port=port):
                wait_for(lambda: served.service.router.reasons["model_name_taken"])
                assert served.chat([user("hi")])
            with upstream(tmp_path / "b", model=paths[0], port=port):
                servers = served.service.router.servers.values()
                wait_for(lambda: all(server.is_up for server in servers))
