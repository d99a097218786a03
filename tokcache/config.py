"""Frozen, validated settings."""

from __future__ import annotations

from dataclasses import dataclass

from tokcache.errors import InvalidConfig

MAX_INT = 2**62  # what the native modules hold, with room to add
MAX_SECONDS = 10**9  # thirty years
MAX_SAMPLE_SIZE = 1024  # draws an eviction; the 8 of the default come close to exact LRU


ENGINES = ("auto", "tokenizers", "gigatoken", "fastokens")


def _require_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidConfig(f"{name} must be a number from 0 to 1, not {value!r}")


def require_int(name: str, value: object, minimum: int, maximum: int = MAX_INT) -> int:
    """Return `value` if it is an int from `minimum` to `maximum`, else raise `InvalidConfig`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidConfig(f"{name} must be an int, not {value!r} ({type(value).__name__})")
    if value < minimum:
        raise InvalidConfig(f"{name} must be at least {minimum}, not {value}")
    if value > maximum:
        raise InvalidConfig(f"{name} must be at most {maximum:,}, not {value:,}")
    return value


def require_seconds(name: str, value: object) -> float:
    """Return `value` if it is a number of seconds, else raise `InvalidConfig`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_SECONDS:  # type: ignore[operator]
        raise InvalidConfig(
            f"{name} must be a number of seconds above 0, at most {MAX_SECONDS:,}, not {value!r}"
        )
    return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of a wrapped tokenizer's cache.

    `l1` switches the cache of parts of texts; `engine` names what encodes the parts that are not
    known ("auto": the fastest one installed that proves equal); `verify_rate` is the share of
    texts, put together from parts, that are encoded again in full and compared.

    Units:  `l0_max_entries` texts, `l0_max_bytes` bytes (keys, ids and overhead), over both maps;
            `l1_max_bytes` bytes of the parts; `verify_rate` from 0 to 1.
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

    def __post_init__(self) -> None:
        require_int("l0_max_entries", self.l0_max_entries, minimum=1)
        require_int("l0_max_bytes", self.l0_max_bytes, minimum=1)
        require_int("l0_sample_size", self.l0_sample_size, 1, MAX_SAMPLE_SIZE)
        require_int("l1_max_bytes", self.l1_max_bytes, minimum=1)
        if not isinstance(self.l1, bool):
            raise InvalidConfig(f"l1 must be True or False, not {self.l1!r}")
        if self.engine not in ENGINES:
            raise InvalidConfig(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        _require_share("verify_rate", self.verify_rate)
