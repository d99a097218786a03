"""The storage of tiers below memory, for tests that every tier has to pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.state.test_disk import all_bytes, cache_on, files
from tokcache.state.tiers.disk import DiskTier

if TYPE_CHECKING:
    from tests.state.redis_server import RedisServer
    from tokcache.state.cache import PrefixStateCache


class Medium(ABC):
    """The storage that several processes share."""

    label: str

    @abstractmethod
    def tier(self, **settings: Any) -> Any:
        """Return a tier that another process could have opened."""

    def cache(self, tier: Any = None, **settings: Any) -> PrefixStateCache:
        """Return a cache of that tier and memory, and no other tier."""
        return cache_on(**{"disk": None, self.label: tier or self.tier(), **settings})

    @abstractmethod
    def states(self) -> dict[str, Any]:
        """Return the stored states by name, as they are stored."""

    @abstractmethod
    def names(self) -> set[str]:
        """Return the names of all files or keys, states or not."""

    @abstractmethod
    def put(self, name: str, state: Any) -> None:
        """Replace a stored state."""

    @abstractmethod
    def all_bytes(self) -> bytes:
        """Return all stored bytes, names included."""


class DiskMedium(Medium):
    label = "disk"

    def __init__(self, path: Path) -> None:
        self.path = path

    def tier(self, **settings: Any) -> DiskTier:
        return DiskTier(self.path, **settings)

    def states(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in files(self.path)}

    def names(self) -> set[str]:
        return {str(path) for path in self.path.rglob("*")}

    def put(self, name: str, state: bytes) -> None:
        Path(name).write_bytes(state)

    def all_bytes(self) -> bytes:
        names = "\n".join(str(path.relative_to(self.path)) for path in self.path.rglob("*"))
        return all_bytes(self.path) + names.encode()


class RedisMedium(Medium):
    label = "redis"

    def __init__(self, server: RedisServer) -> None:
        self.server = server

    def tier(self, **settings: Any) -> Any:
        from tokcache.state.tiers.redis import RedisTier  # noqa: PLC0415 (an extra)

        return RedisTier(self.server.url, **{"timeout_s": 10.0, **settings})

    def states(self) -> dict[str, dict[bytes, bytes]]:
        return self.server.states()

    def names(self) -> set[str]:
        with self.server.client() as client:
            return {key.decode() for key in client.scan_iter(count=1000)}

    def put(self, name: str, state: dict[bytes, bytes]) -> None:
        with self.server.client() as client:
            client.delete(name)
            client.hset(name, mapping=state)

    def all_bytes(self) -> bytes:
        return self.server.all_bytes()
