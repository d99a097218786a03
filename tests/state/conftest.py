"""A Redis for the whole run, emptied for each test; tests that stop one start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.state.media import DiskMedium, Medium, RedisMedium
from tests.state.redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(redis_of_all: RedisServer) -> RedisServer:
    with redis_of_all.client() as client:
        client.flushall()
    return redis_of_all


@pytest.fixture(params=["disk", "redis"])
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Medium:
    if request.param == "disk":
        return DiskMedium(tmp_path)
    return RedisMedium(request.getfixturevalue("redis_server"))
