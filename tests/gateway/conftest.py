"""A llama-server and a gateway in front of it, one of each for a module's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateways import Gateway, gateway, upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokcache.samples.server_process import ServerProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with upstream(tmp_path_factory.mktemp("slots")) as process:
        yield process


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, server: ServerProcess) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway"), server) as made:
        yield made
