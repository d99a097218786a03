"""Frozen, validated settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache._validate import require_bool, require_int, require_share, require_size
from tokcache.errors import InvalidConfig

MAX_SAMPLE_SIZE = 1024  # draws an eviction; the 8 of the default come close to exact LRU


ENGINES = ("auto", "tokenizers", "gigatoken", "fastokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of a wrapped tokenizer's cache.

    `l1` switches the cache of parts of texts; `engine` names what encodes the parts that are not
    known ("auto": the fastest one installed that proves equal); `verify_rate` is the share of
    texts, put together from parts, that are encoded again in full and compared.

    Units:  `l0_max_entries` texts, `l0_max_bytes` bytes (keys, ids and overhead), over both maps;
            `l1_max_bytes` bytes of the parts; `verify_rate` from 0 to 1. A size may be a str such
            as "64M"; it is an int afterwards.
    Errors: InvalidConfig for anything below 1 or not an int, a sample above 1,024, an unknown
            engine or a rate out of range.
    """

    l0_max_entries: int = 10_000
    l0_max_bytes: int = 64 << 20
    l0_sample_size: int = 8
    l1: bool = True
    l1_max_bytes: int = 64 << 20
    engine: str = "auto"
    verify_rate: float = 0.0

    if TYPE_CHECKING:  # sizes are read as int, and given as int or str

        def __init__(
            self,
            *,
            l0_max_entries: int = 10_000,
            l0_max_bytes: int | str = "64M",
            l0_sample_size: int = 8,
            l1: bool = True,
            l1_max_bytes: int | str = "64M",
            engine: str = "auto",
            verify_rate: float = 0.0,
        ) -> None: ...

    def __post_init__(self) -> None:
        checked = {
            "l0_max_entries": require_int("l0_max_entries", self.l0_max_entries, minimum=1),
            "l0_max_bytes": require_size("l0_max_bytes", self.l0_max_bytes),
            "l0_sample_size": require_int(
                "l0_sample_size", self.l0_sample_size, 1, MAX_SAMPLE_SIZE
            ),
            "l1_max_bytes": require_size("l1_max_bytes", self.l1_max_bytes),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # it is frozen
        require_bool("l1", self.l1)
        if self.engine not in ENGINES:
            raise InvalidConfig(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        require_share("verify_rate", self.verify_rate)
