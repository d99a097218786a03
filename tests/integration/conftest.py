"""A llama-server of the tests' own, its folder of saved slots, and a client, for each module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tokcache.llama.server import LlamaServer
    from tokcache.samples.server_process import ServerProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slots")


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[ServerProcess]:
    from tests.integration.served import serve  # noqa: PLC0415 (skips without a llama-server)

    with serve(folder) as running:
        yield running


@pytest.fixture
def server(process: ServerProcess, folder: Path) -> Iterator[LlamaServer]:
    from tests.integration.served import client  # noqa: PLC0415 (as above)

    with client(process, slot_folder=folder) as made:
        yield made
