"""Frozen, validated settings."""

from __future__ import annotations

from dataclasses import dataclass

from tokcache.errors import InvalidConfig


def require_int(name: str, value: object, minimum: int) -> int:
    """Return `value` if it is an int of at least `minimum`, else raise `InvalidConfig`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidConfig(f"{name} must be an int, not {value!r} ({type(value).__name__})")
    if value < minimum:
        raise InvalidConfig(f"{name} must be at least {minimum}, not {value}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of a wrapped tokenizer's cache.

    Units:  `l0_max_entries` texts, `l0_max_bytes` bytes (keys, ids and overhead), over both maps.
    Errors: InvalidConfig for anything below 1 or not an int.
    """

    l0_max_entries: int = 10_000
    l0_max_bytes: int = 64 << 20
    l0_sample_size: int = 8

    def __post_init__(self) -> None:
        for name in ("l0_max_entries", "l0_max_bytes", "l0_sample_size"):
            require_int(name, getattr(self, name), minimum=1)
