"""Frozen, validated settings."""

from __future__ import annotations

from dataclasses import dataclass

from tokcache.errors import InvalidConfig

MAX_INT = 2**62  # what the native modules hold, with room to add
MAX_SAMPLE_SIZE = 1024  # draws an eviction; the 8 of the default come close to exact LRU


def require_int(name: str, value: object, minimum: int, maximum: int = MAX_INT) -> int:
    """Return `value` if it is an int from `minimum` to `maximum`, else raise `InvalidConfig`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidConfig(f"{name} must be an int, not {value!r} ({type(value).__name__})")
    if value < minimum:
        raise InvalidConfig(f"{name} must be at least {minimum}, not {value}")
    if value > maximum:
        raise InvalidConfig(f"{name} must be at most {maximum:,}, not {value:,}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of a wrapped tokenizer's cache.

    Units:  `l0_max_entries` texts, `l0_max_bytes` bytes (keys, ids and overhead), over both maps.
    Errors: InvalidConfig for anything below 1 or not an int, or a sample above 1,024.
    """

    l0_max_entries: int = 10_000
    l0_max_bytes: int = 64 << 20
    l0_sample_size: int = 8

    def __post_init__(self) -> None:
        require_int("l0_max_entries", self.l0_max_entries, minimum=1)
        require_int("l0_max_bytes", self.l0_max_bytes, minimum=1)
        require_int("l0_sample_size", self.l0_sample_size, 1, MAX_SAMPLE_SIZE)
