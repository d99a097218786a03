"""Below: a tier below memory as one cache uses it, with its write queue and its back-off."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from tokcache._disk_budget import require_disk_size
from tokcache.errors import InvalidConfig, StateRefused
from tokcache.state.tiers.backoff import Worth
from tokcache.state.write_behind import Job, WriteBehind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokcache.state.index import Node
    from tokcache.state.snapshot_index import Snapshot
    from tokcache.state.tiers import Address, Tier

_log = logging.getLogger("tokcache")


@dataclass(frozen=True, slots=True, eq=False)
class Below:
    """A tier below memory, its write queue, and its bit in `written` of a block.

    `worth` says for which models it is not asked, because prefilling is faster.
    """

    tier: Tier
    writer: WriteBehind
    bit: int
    is_owned: bool
    worth: Worth = field(default_factory=Worth)

    @contextlib.contextmanager
    def counting_failures(self) -> Iterator[None]:
        """Count a failure of the tier, of any kind, and go on after the block: it is a miss."""
        try:
            yield
        except StateRefused as refusal:
            self.tier.refuse(str(refusal))
        except Exception:  # noqa: BLE001  (the request goes on without the tier)
            _log.warning("the %s tier failed", self.tier.label, exc_info=True)
            self.tier.refuse("error")

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

    def pin_later(self, addresses: list[Address], *, is_pinned: bool) -> None:
        """Pin these states after the writes that wait, or end their pins; else it is counted."""
        pin = partial(self.tier.pin, addresses, is_pinned=is_pinned)
        if addresses and not self.writer.put(Job(addresses[0].root_key.scope, 0, pin)):
            self.tier.refuse("queue_full")


def open_tiers(
    disk: object, disk_bytes: int | str | None, redis: object, queue_bytes: int
) -> tuple[Below, ...]:
    """Return the tiers of these arguments, nearest first; those made here are owned.

    Errors: InvalidConfig.
    """
    opened: list[tuple[Tier, bool]] = []
    if disk_bytes is not None and not isinstance(disk, str | os.PathLike):
        kind = "None" if disk is None else f"a {type(disk).__name__}"
        raise InvalidConfig(
            f"disk_bytes is the budget of a folder given as disk, and disk is {kind}; give a "
            "folder, or max_bytes to the DiskTier"
        )
    # Each tier is imported only where it is used: its libraries are optional.
    if disk is not None:
        from tokcache.state.tiers.disk.tier import DEFAULT_BYTES, DiskTier  # noqa: PLC0415

        if isinstance(disk, str | os.PathLike):
            size = disk_bytes
            if size is not None:  # named as it was given here, where it is wrong
                size = require_disk_size("disk_bytes", size)
            opened.append((DiskTier(disk, max_bytes=DEFAULT_BYTES if size is None else size), True))
        elif isinstance(disk, DiskTier):
            opened.append((disk, False))
        else:
            kind = type(disk).__name__
            raise InvalidConfig(f"disk must be a path, a DiskTier or None, not {kind}")
    if redis is not None:
        from tokcache.state.tiers.redis import RedisTier  # noqa: PLC0415

        if isinstance(redis, str):
            opened.append((RedisTier(redis), True))
        elif isinstance(redis, RedisTier):
            opened.append((redis, False))
        else:
            kind = type(redis).__name__
            raise InvalidConfig(f"redis must be a URL, a RedisTier or None, not {kind}")
    return tuple(
        Below(tier, WriteBehind(tier.label, queue_bytes), 1 << n, is_owned)
        for n, (tier, is_owned) in enumerate(opened)
    )
