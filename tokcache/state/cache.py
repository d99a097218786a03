"""PrefixStateCache: states of token prefixes, in blocks or as snapshots, in memory and below.

It knows neither text nor the engine: tokens come as int32 ids. The engine's state comes and goes
through two functions that copy the positions [start, stop) from and to a buffer, or as opaque bytes
for a whole prefix.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tokcache.state.blocks import BlockCache
from tokcache.state.namespace import Namespace
from tokcache.state.snapshots import SnapshotStore
from tokcache.state.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokcache.state.handles import Work
    from tokcache.state.reasons import Miss
    from tokcache.state.tiers import Tier
    from tokcache.state.tiers.disk import DiskTier
    from tokcache.state.tiers.redis import RedisTier
    from tokcache.stats import StateStats


class PrefixStateCache:
    """States of token prefixes: in memory, on a disk that outlives the process, in Redis.

    ```python
    ns = cache.namespace(fingerprint, scope="tenant-a")
    with ns.plan(tokens, max_tokens=len(tokens) - 1) as plan:
        n_past = plan.restore(load)
    ns.save(tokens, read, n_bytes)
    ```

    `disk` is a folder or a DiskTier, `redis` a URL or a RedisTier: saved states are written to
    each of them by a thread of its own, and states that are not in memory are looked up on the
    disk, then in Redis. A tier that is made here from a path or URL is closed with the cache; a
    DiskTier or RedisTier that you pass may serve several caches and stays open.

    Units:  `ram_bytes` bytes, or a size such as "4G", of all that is retained in memory (states,
            tokens, overhead, buffers waiting for their next use); `disk_bytes` of the files in a
            folder given as `disk`, by default 4 GiB: bytes, a size, or a share of the disk such as
            "10%" or "50% free", as `max_bytes` of DiskTier; `max_entries` stored prefixes
            (ends of chains, and snapshots); `block_tokens` positions a block at most; prefixes
            below `min_tokens` are neither saved nor used; `conversation_snapshots` snapshots of one
            conversation at most, and at most half of `max_entries`; `ttl_s` seconds after its last
            use a state is removed; `queue_bytes` bytes, or a size, of states that may wait to be
            written to a tier, by default a quarter of `ram_bytes`: more are not written, and
            counted.
    Errors: InvalidConfig for anything below 1. A state that can't be stored or read costs a miss
            and a counter, never an exception.
    Cost:   a look-up costs the prompt's length, not the number of entries.
    Threads: safe; after a fork the child keeps stored states, except those in use at the fork.
    """

    def __init__(
        self,
        *,
        ram_bytes: int | str = 256 << 20,
        max_entries: int = 32,
        block_tokens: int = 256,
        conversation_snapshots: int = 48,
        disk: str | os.PathLike[str] | DiskTier | None = None,
        disk_bytes: int | str | None = None,
        redis: str | RedisTier | None = None,
        min_tokens: int = 1,
        ttl_s: float | None = None,
        queue_bytes: int | str | None = None,
        enabled: bool = True,
    ) -> None:
        self._store = Store(
            ram_bytes=ram_bytes,
            max_entries=max_entries,
            block_tokens=block_tokens,
            conversation_snapshots=conversation_snapshots,
            min_tokens=min_tokens,
            ttl_s=ttl_s,
            disk=disk,
            disk_bytes=disk_bytes,
            redis=redis,
            queue_bytes=queue_bytes,
            enabled=enabled,
        )
        self._blocks = BlockCache(self._store)
        self._snapshots = SnapshotStore(self._store)

    def namespace(
        self,
        fingerprint: bytes,
        *,
        scope: str | None = None,
        public_prefix: object = (),
        aligned: bool = False,
    ) -> Namespace:
        """Return the states of one model and scope, to look up and save.

        `fingerprint` covers everything that decides the numbers in a state: model, settings, build.
        `public_prefix` are token ids that prompts may begin with and that are no scope's secret: a
        system prompt, say; they are stored once for all scopes. `aligned` is for states that were
        decoded in pieces that end at multiples of `block_tokens`, and finds no others.

        Errors: InvalidConfig, InvalidScope, InvalidTokens.
        Cost:   a few microseconds, and a copy of `public_prefix`.
        """
        return Namespace(
            self._store,
            self._blocks,
            self._snapshots,
            fingerprint=fingerprint,
            scope=scope,
            public_prefix=public_prefix,
            aligned=aligned,
        )

    def name_model(
        self, fingerprint: bytes, name: str, parts: Mapping[str, object] | None = None
    ) -> None:
        """Note the name of a fingerprint's model, which `tokcache states ls` then shows.

        It is no part of any key. On disk it is kept as it is, readable without the keys. With
        `parts`, whatever the fingerprint was made of, by name, a miss for the reason
        `other_fingerprint` says which of them differ; they stay in this process.
        """
        if parts is not None:
            with self._store.lock:
                self._store.parts.note(fingerprint, parts)
        for each in self._store.below:
            each.tier.name_model(fingerprint, name)

    # Settings

    @property
    def ram_bytes(self) -> int:
        """The number of bytes that memory may retain."""
        return self._store.ram_bytes

    @property
    def max_entries(self) -> int:
        """The number of stored prefixes that memory may hold."""
        return self._store.max_entries

    @property
    def block_tokens(self) -> int:
        """The number of positions that a block has at most."""
        return self._store.block_tokens

    @property
    def disk(self) -> DiskTier | None:
        """The disk tier, None without one."""
        return self._tier_below("disk")  # type: ignore[return-value]

    @property
    def redis(self) -> RedisTier | None:
        """The Redis tier, None without one."""
        return self._tier_below("redis")  # type: ignore[return-value]

    def _tier_below(self, label: str) -> Tier | None:
        tiers = (below.tier for below in self._store.below)
        return next((tier for tier in tiers if tier.label == label), None)

    # Everything

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was saved is in the lower tiers; False if that took too long.

        Writes that a tier refused are counted, not waited for.
        """
        return self._store.flush(timeout_s)

    def clear(self, *, scope: str | None = None) -> int:
        """Remove a tenant's states from every tier, or everything; return the states removed.

        With a `scope` only its states are removed: the public beginning of its prompts stays, and
        counters keep their values. Without one everything is removed, including the shared scope
        and the counters of look-ups and memory, and a disk tier's folder and a Redis tier's
        namespace are emptied for all that share them. The shared scope alone can't be cleared,
        because the states of tenants continue it. Operations under way bring nothing back: writes
        that wait are dropped, saves and promotions that have begun store nothing, open handles and
        plans yield nothing more. States in the memory or queue of another cache or process are not
        cleared. If a tier fails to remove states, a counter and a line in the log say so.

        Errors: InvalidScope.
        """
        return self._store.clear(scope=scope)

    def begin(self, scope: str | None) -> Work:
        """Return an object that becomes void when `scope` is cleared.

        Errors: InvalidScope.
        """
        return self._store.begin(scope)

    def close(self) -> None:
        """Finish waiting writes, then empty memory; after that nothing is found or stored.

        States in the tiers below stay; an ephemeral tier's folder goes with its tier.
        """
        self._store.close()

    # Counting

    def count_prompt(
        self,
        n_tokens: int,
        *,
        context_tokens: int = 0,
        restored_tokens: int = 0,
        miss: Miss | None = None,
    ) -> None:
        """Count a prompt, and its tokens that were in the engine's context or were restored.

        `miss` is why no more of it was reused. `plan`, `find` and the handles they return count
        prompts themselves. Call this for prompts that need no look-up, because the context held all
        but the last token, and after `plan(…, counts_tokens=False)`.

        Errors: InvalidConfig.
        """
        self._store.count_prompt(
            n_tokens,
            context_tokens=context_tokens,
            restored_tokens=restored_tokens,
            miss=miss,
        )

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""
        self._store.refuse(reason)

    def stats(self) -> StateStats:
        """Return the counters and the states held now."""
        return self._store.stats()

    def memory_usage(self) -> int:
        """Return the bytes retained: states, tokens, overhead and buffers for their next use."""
        return self._store.memory_usage()

    def __len__(self) -> int:
        """Return the number of entries in memory: ends of chains, and snapshots."""
        with self._store.lock:
            return self._store.memory.n_entries

    def __bool__(self) -> bool:
        """Return True: an empty cache is a cache."""
        return True

    def __repr__(self) -> str:
        """Return its contents, budgets and tiers in one line."""
        below = "".join(f", {each.tier!r}" for each in self._store.below)
        return (
            f"<PrefixStateCache {len(self):,} of {self.max_entries:,} entries, "
            f"{self.memory_usage():,} of {self.ram_bytes:,} bytes, "
            f"blocks of {self.block_tokens:,} tokens{below}>"
        )

    def _check(self) -> None:
        """Verify every invariant; for tests."""
        self._store.check()
