"""Namespace: the states of one model and scope; it binds the parts of their names once."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from tokcache._prefix import common_tokens
from tokcache._validate import require_bool, require_scope
from tokcache.errors import InvalidConfig
from tokcache.state.names import TOKEN_BYTES, RootKey, token_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokcache.state.blocks import BlockCache
    from tokcache.state.handles import BlockIO, RestorePlan, StateHandle
    from tokcache.state.reasons import Miss
    from tokcache.state.snapshots import SnapshotStore
    from tokcache.state.store import Store

_SAME: Any = object()


class Namespace:
    """The states of one fingerprint and scope in a cache; `PrefixStateCache.namespace` makes it.

    Blocks (`plan`, `save`) share the common beginning of prefixes, to the token; snapshots
    (`store`, `find`) are any engine's bytes, one for a whole prefix. The tokens that a prompt has
    in common with `public_prefix` are kept in the shared scope, the rest in `scope`.

    Errors: InvalidTokens for ids that are not int32. A state that can't be stored or read costs a
            miss and a counter, never an exception.
    Cost:   a look-up costs the prompt's length, not the number of entries.
    Threads: safe.
    """

    __slots__ = ("_blocks", "_chain", "_public", "_single", "_snapshots", "_store")

    def __init__(
        self,
        store: Store,
        blocks: BlockCache,
        snapshots: SnapshotStore,
        *,
        fingerprint: bytes,
        scope: str | None,
        public_prefix: object,
        aligned: bool,
    ) -> None:
        self._store, self._blocks, self._snapshots = store, blocks, snapshots
        if not isinstance(fingerprint, bytes):
            raise InvalidConfig(f"fingerprint must be bytes, not {type(fingerprint).__name__}")
        scope = require_scope(scope)
        is_aligned = require_bool("aligned", aligned)
        self._chain = RootKey(fingerprint, scope, "aligned" if is_aligned else "free")
        self._single = RootKey(fingerprint, scope, "snapshot")
        self._public = token_bytes(public_prefix)

    @property
    def fingerprint(self) -> bytes:
        """The bytes that identify model, settings and build: all that decides a state's numbers."""
        return self._chain.fingerprint

    @property
    def scope(self) -> str | None:
        """The tenant whose states these are; None is the shared scope."""
        return self._chain.scope

    @property
    def public_prefix(self) -> memoryview:
        """Token ids that prompts may begin with and that are no scope's secret: read-only int32."""
        return memoryview(array("i", self._public)).toreadonly()

    @property
    def aligned(self) -> bool:
        """Whether its blocks were decoded in pieces that end at multiples of `block_tokens`."""
        return self._chain.kind == "aligned"

    @property
    def block_tokens(self) -> int:
        """The number of positions that a block has at most."""
        return self._store.block_tokens

    @property
    def min_tokens(self) -> int:
        """The number of tokens below which prefixes are neither saved nor used."""
        return self._store.min_tokens

    def __repr__(self) -> str:
        """Return the scope of the states, and the beginning of the fingerprint."""
        n_public = len(self._public) // TOKEN_BYTES
        return (
            f"<Namespace {self.fingerprint[:8].hex()}, scope {self.scope!r}"
            f"{f', {n_public:,} public tokens' if n_public else ''}"
            f"{', aligned' if self.aligned else ''}>"
        )

    def replace(
        self,
        *,
        fingerprint: bytes = _SAME,
        scope: str | None = _SAME,
        public_prefix: object = _SAME,
        aligned: bool = _SAME,
    ) -> Namespace:
        """Return a namespace of the same cache that differs in these.

        Errors: InvalidConfig, InvalidScope, InvalidTokens.
        """
        return Namespace(
            self._store,
            self._blocks,
            self._snapshots,
            fingerprint=self.fingerprint if fingerprint is _SAME else fingerprint,
            scope=self.scope if scope is _SAME else scope,
            public_prefix=self.public_prefix if public_prefix is _SAME else public_prefix,
            aligned=self.aligned if aligned is _SAME else aligned,
        )

    def _n_public(self, tokens: bytes) -> int:
        """Return the number of public tokens that `tokens` begin with."""
        return common_tokens(self._public, tokens) if self._public else 0

    # Blocks

    def plan(
        self,
        tokens: object,
        *,
        max_tokens: int | None = None,
        counts_tokens: bool = True,
        explain: bool = False,
        last_only: bool = False,
        n_known: int = 0,
    ) -> RestorePlan:
        """Return the blocks of the longest stored prefix of `tokens`; empty on a miss.

        `max_tokens` bounds the prefix: an engine must decode at least the last token itself. An
        aligned namespace finds whole blocks, so that the prefix ends at a multiple of
        `block_tokens`. With `counts_tokens=False` only the look-up is counted: the caller counts
        its prompts with `count_prompt`. `plan.miss` says why no more was found; with `explain` it
        has the first tokens with which the nearest held prefix of this scope goes on.

        `last_only` is for states that stand for all positions before them, as a recurrent memory's
        do: of blocks in a tier below only the last one's state is read, and that not if the plan
        serves no more than `n_known` tokens. Load no other block of that plan.

        Errors: InvalidTokens, InvalidConfig.
        """
        wanted = token_bytes(tokens)
        return self._blocks.plan(
            self._chain,
            wanted,
            self._n_public(wanted) if self._public else 0,
            max_tokens=max_tokens,
            counts_tokens=counts_tokens,
            explain=explain,
            last_only=last_only,
            n_known=n_known,
        )

    def save(
        self,
        tokens: object,
        read: BlockIO,
        n_bytes: Callable[[int, int], int],
        *,
        priority: int = 0,
        last_only: bool = False,
    ) -> int:
        """Store the state of `tokens` where it is not stored yet; return the new positions.

        `n_bytes(start, stop)` returns the size of the state of these positions, `read(start, stop,
        buffer)` copies it into a buffer of that size: only the new blocks are read. Blocks that
        follow a public prefix are useful only with it, and evicted first. An aligned namespace
        leaves out the tokens beyond the last multiple of `block_tokens`. States of lower
        `priority` are evicted first. `last_only` as for `plan`.

        Errors: InvalidTokens, InvalidConfig.
        """
        wanted = token_bytes(tokens)
        n_public = self._n_public(wanted)
        return self._blocks.save(
            *(self._chain, wanted, n_public, read, n_bytes), priority=priority, last_only=last_only
        )

    def pin(self, tokens: object, *, is_pinned: bool = True) -> tuple[int, int]:
        """Evict the states of `tokens` after all that are not pinned, or as others again.

        These are the blocks, if memory holds all of them, and the snapshot of all `tokens`. They
        do not expire in memory or in a folder, where the pin outlives the process. The common
        beginning of two pinned prefixes stays pinned until both pins have ended. A pin of a handle
        is stronger: it keeps its state in any case.

        Return how many of the tokens memory holds, and how many of these every tier below has, or
        is about to get (`flush` of the cache waits for that).

        Errors: InvalidTokens.
        """
        held = token_bytes(tokens)
        blocks = self._blocks.pin(self._chain, held, self._n_public(held), is_pinned=is_pinned)
        if not held:
            return blocks
        snapshot = self._snapshots.pin_exact(self._key_of(held), held, is_pinned=is_pinned)
        return max(blocks, snapshot)

    # Snapshots

    def store(
        self,
        tokens: object,
        state: object,
        *,
        n_past: int | None = None,
        priority: int = 0,
        pin: bool = False,
    ) -> bool:
        """Store the bytes of the state after all of `tokens`; False if there is no room for it.

        The bytes are copied. A state of the same tokens with the same priority is replaced.
        `n_past` is the engine's own count of positions, by default the number of tokens. States of
        lower `priority` are evicted first; `pin` keeps the state from being evicted or expiring,
        until it is removed. A state of public tokens alone goes to the shared scope.

        Errors: InvalidTokens for no tokens; InvalidConfig for a state that is not a bytes-like
                object, and for numbers out of range.
        """
        held = token_bytes(tokens)
        root_key = self._key_of(held)
        return self._snapshots.store(
            root_key, held, state, n_past=n_past, priority=priority, pin=pin
        )

    def fill(
        self,
        tokens: object,
        n_bytes: int,
        read: Callable[[memoryview], object],
        *,
        n_opening: int = 0,
    ) -> bool:
        """Store as `store` does the state that `read` copies into a buffer of `n_bytes`.

        If it raises, nothing is stored, and it is counted. States with the same first `n_opening`
        tokens are of one conversation: beyond `conversation_snapshots` of the cache, the least
        recently used of them is removed. With 0 the number has no bound of its own.
        """
        held = token_bytes(tokens)
        return self._snapshots.fill(self._key_of(held), held, n_bytes, read, n_opening=n_opening)

    def _key_of(self, held: bytes) -> RootKey:
        is_public = self._n_public(held) * TOKEN_BYTES == len(held)
        return self._single._replace(scope=None) if is_public else self._single

    def find(self, tokens: object, *, is_counted: bool = True) -> StateHandle | None:
        """Return the state of the longest stored prefix of `tokens`, None if there is none.

        Of equal length the one of the highest priority is returned; states of public tokens alone
        are looked up in the shared scope, too. Close the handle, or use it in a `with`: until then
        its state is not evicted. `is_counted=False` is for look-ups that the caller counts.

        Errors: InvalidTokens.
        """
        wanted = token_bytes(tokens)
        return self._snapshots.find(
            self._single, wanted, self._n_public(wanted), is_counted=is_counted
        )

    def find_miss(self, tokens: object, *, n_found: int = 0) -> Miss:
        """Return why `find` returned no state, or none of more than `n_found` of the tokens.

        `find` counts the same reasons. Nothing is looked up below memory.

        Errors: InvalidTokens.
        """
        return self._snapshots.miss(self._single, token_bytes(tokens), n_found=n_found)

    def handle(self, tokens: object) -> StateHandle | None:
        """Return the state in memory of exactly these tokens; counts as no look-up and no use."""
        return self._snapshots.handle(self._single, token_bytes(tokens))

    # Counting

    def note_prefill(self, n_tokens: int, seconds: float) -> None:
        """Note how long the engine took to prefill `n_tokens`.

        Reads from a tier below memory that take longer than that are counted. Once they have cost a
        quarter of a second, the tier is not asked for this model's states for half a minute, then
        it is tried again. A state that a tier is expected to give back slower than that is not
        written there. Without this call every tier is always asked, and given all states.

        Errors: InvalidConfig.
        """
        self._store.note_prefill(n_tokens, seconds, self.fingerprint, self.scope)

    def prefill_seconds(self, n_tokens: int) -> float | None:
        """Return how long prefilling `n_tokens` takes, None before `note_prefill` in this scope."""
        with self._store.lock:
            return self._store.own_seconds(n_tokens, self.fingerprint, self.scope)

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""
        self._store.refuse(reason)

    def count_restored(
        self, n_tokens: int, seconds: float, *, n_in_context: int = 0, is_hit: bool = False
    ) -> None:
        """Count positions restored after `n_in_context` that were there, and an uncounted hit."""
        self._store.count_restored(n_tokens, seconds, n_in_context=n_in_context, is_hit=is_hit)
