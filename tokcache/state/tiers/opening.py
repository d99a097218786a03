"""The tiers below memory as one cache uses them: opened, each with its queue and its back-off."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokcache.errors import InvalidConfig
from tokcache.state.tiers.backoff import Worth
from tokcache.state.write_behind import Job, WriteBehind

if TYPE_CHECKING:
    from tokcache.state.index import Node
    from tokcache.state.snapshot_index import Snapshot
    from tokcache.state.tiers import LowerTier


@dataclass(frozen=True, slots=True, eq=False)
class Below:
    """A tier below memory, its write queue, and its bit in `written` of a block.

    `worth`: for which models it is left alone, because prefilling is faster.
    """

    tier: LowerTier
    writer: WriteBehind
    bit: int
    is_owned: bool
    worth: Worth = field(default_factory=Worth)

    def write(self, held: Node | Snapshot, job: Job) -> bool:
        """Queue the write of a payload; False, and nothing changed, if the queue is full."""
        held.pins += 1
        held.written |= self.bit
        held.touched_s = time.monotonic()
        if self.writer.put(job):
            return True
        held.pins -= 1
        held.written &= ~self.bit
        return False


def open_tiers(disk: object, redis: object, queue_bytes: int) -> tuple[Below, ...]:
    """Return the tiers of these arguments, nearest first; those made here are owned.

    Errors: InvalidConfig.
    """
    opened = (each for each in (_opened_disk(disk), _opened_redis(redis)) if each)
    return tuple(
        Below(tier, WriteBehind(tier.label, queue_bytes), 1 << n, is_owned)
        for n, (tier, is_owned) in enumerate(opened)
    )


def _opened_disk(disk: object) -> tuple[LowerTier, bool] | None:
    if disk is None:
        return None
    from tokcache.state.tiers.disk import DiskTier  # noqa: PLC0415 (only where it is used)

    if isinstance(disk, DiskTier):
        return disk, False
    if isinstance(disk, str | os.PathLike):
        return DiskTier(disk), True
    raise InvalidConfig(f"disk must be a path, a DiskTier or None, not {type(disk).__name__}")


def _opened_redis(redis: object) -> tuple[LowerTier, bool] | None:
    if redis is None:
        return None
    from tokcache.state.tiers.redis import RedisTier  # noqa: PLC0415 (only where it is used)

    if isinstance(redis, RedisTier):
        return redis, False
    if isinstance(redis, str):
        return RedisTier(redis), True
    raise InvalidConfig(f"redis must be a URL, a RedisTier or None, not {type(redis).__name__}")
