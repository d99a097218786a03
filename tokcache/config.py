"""Frozen, validated settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache._validate import require_bool, require_int, require_share, require_size
from tokcache.errors import InvalidConfig

# Entries compared for one eviction; the default of 8 comes close to exact LRU.
MAX_SAMPLE_SIZE = 1024

# Of longer texts that L1 puts together, L0 stores one in a few.
LONG_CHARS = 2048
ADMIT_ONE_IN = 8

ENGINES = ("auto", "tokenizers", "gigatoken", "fastokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of a wrapped tokenizer's cache.

    L0 caches whole texts. `l1` switches L1, the cache of chunks and segments, on or off. `engine`
    names the encoder of uncached text ("auto": the fastest installed one that proves equal to the
    tokenizer, which it does in the background; tokenizers encodes until then).
    `render_max_bytes` is the size of the cache of rendered chats; 0 switches it off.
    `verify_rate` is the share of answers assembled from cached parts (segments, rendered messages)
    that are compared with the tokenizer's own answer for the whole.

    Units:  `l0_max_entries` counts texts and `l0_max_bytes` bytes (keys, ids and overhead), both
            over the two maps of L0; `l1_max_bytes` is the bytes of L1, `render_max_bytes` those of
            rendered chats; `verify_rate` is from 0 to 1. A size may be a str such as "64M"; it is
            stored as an int.
    Errors: InvalidConfig for a size or count that is below 1 (`render_max_bytes`: below 0) or not
            an int, a sample size above 1,024, an unknown engine or a rate out of range.
    """

    l0_max_entries: int = 10_000
    l0_max_bytes: int = 64 << 20
    l0_sample_size: int = 8
    l1: bool = True
    l1_max_bytes: int = 64 << 20
    render_max_bytes: int = 16 << 20
    engine: str = "auto"
    verify_rate: float = 0.0

    if TYPE_CHECKING:  # sizes may be passed as int or str; the attributes are int

        def __init__(
            self,
            *,
            l0_max_entries: int = 10_000,
            l0_max_bytes: int | str = "64M",
            l0_sample_size: int = 8,
            l1: bool = True,
            l1_max_bytes: int | str = "64M",
            render_max_bytes: int | str = "16M",
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
            "render_max_bytes": require_size("render_max_bytes", self.render_max_bytes, 0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        require_bool("l1", self.l1)
        if self.engine not in ENGINES:
            raise InvalidConfig(f"engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")
        require_share("verify_rate", self.verify_rate)
