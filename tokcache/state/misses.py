"""MissFinder: finds, at the end of a look-up, why a prompt was not found further.

The first of these that holds is the reason:

1. Nothing could be found: the cache is disabled or closed, its scope was cleared during the
   look-up, or the prompt is below `min_tokens`.
2. A tier had a state and refused it during this look-up: damaged, expired, out of reach.
3. This process removed the state that continues the prompt, or could not store it.
4. A held prefix continues in another way: different text.
5. A tier was not asked, because reading from it takes longer than prefilling.
6. The scope has the prompt's beginning under another fingerprint.
7. Rows of removals are lost, or one cannot be told from another: not known.
8. This process has never held more of the prompt, and no tier has it.

Nothing here looks at the states of another scope.
"""

from __future__ import annotations

from array import array
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from tokcache._prefix import common_tokens
from tokcache.state.names import TOKEN_BYTES
from tokcache.state.reasons import Miss, MissReason, reason_of_tier

if TYPE_CHECKING:
    from tokcache.state.index import Node
    from tokcache.state.names import RootKey
    from tokcache.state.path import Path
    from tokcache.state.removals import Removal
    from tokcache.state.store import Store

_MAX_LOOKED_AT = 16  # children of a point, roots of a scope
_MIN_SAME = 16  # tokens: fewer, such as a BOS, are the same in unrelated prompts
_MAX_HELD = 256
_REMOVED = {
    "ram_bytes": MissReason.EVICTED,
    "max_entries": MissReason.EVICTED,
    "ttl_s": MissReason.EXPIRED,
    "conversation_snapshots": MissReason.EVICTED,
}


class _Why(NamedTuple):
    """A reason, and the fields of a Miss that only some reasons have."""

    reason: MissReason
    detail: str = ""
    n_removed: int = 0
    removed_at: float | None = None


_DIFFERENT_TEXT = _Why(MissReason.DIFFERENT_TEXT)
_NEVER_STORED, _NOT_KNOWN = _Why(MissReason.NEVER_STORED), _Why(MissReason.NOT_KNOWN)


class MissFinder:
    """Explains the end of a look-up of blocks; the store's lock is held.

    Cost: a bounded number of digests and comparisons, whatever the cache holds; the names of blocks
          in memory are computed once each, and only after a removal in this namespace.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._memory = store, store.memory

    def find(self, path: Path, wanted: bytes, *, n_found: int, n_asked: int, explain: bool) -> Miss:
        """Return why the look-up of `wanted` ended at the end of `path`.

        Units: of the prompt's `n_asked` tokens the plan serves `n_found`.
        """
        at, is_other, node = path.n_tokens, False, None
        store, why, root = self._store, None, path.root
        if (  # seldom: a new prompt is the usual miss
            path.nodes
            or path.refusal
            or not (store.min_tokens <= n_asked and at <= n_found and store.enabled)
            or store.is_closed
            or path.work.is_void
        ):
            why = self._impossible(path, n_found, n_asked)
        if why is None:
            is_alike = False
            # At the very beginning, blocks that may be cut anywhere have no token in common.
            if at or path.loose or (root is not None and root.grain > TOKEN_BYTES):
                n_same, is_other, node = self._nearest(path, wanted)
                at += n_same
            if self._memory.removals.has(path.root_key):
                why, is_alike = self._removed(path, wanted)
            if why is None and is_other and at:
                why = _DIFFERENT_TEXT
            why = why or self._unheld(path, wanted, is_alike=is_alike)
        n_missed = n_asked - n_found
        return Miss(
            why.reason,
            at,
            n_missed,
            store.own_seconds(n_missed, *path.root_key[:2]),
            why.detail,
            why.n_removed,
            why.removed_at,
            _held_tokens(node, at) if explain and at else (),
        )

    def _impossible(self, path: Path, n_found: int, n_asked: int) -> _Why | None:
        """Return the reason of a look-up that could find nothing more."""
        store, detail = self._store, ""
        if not store.enabled:
            detail = "disabled"
        elif store.is_closed:
            detail = "closed"
        elif path.work.is_void:
            detail = "cleared"
        elif path.nodes and path.nodes[-1].start >= path.n_tokens:
            detail = "payload_lost"
        elif n_asked < store.min_tokens or n_found < path.n_tokens:
            detail = "below_minimum"
        if detail:
            return _Why(MissReason.REFUSED, detail)
        if path.refusal:
            return _Why(reason_of_tier(path.refusal.rpartition(": ")[2]), path.refusal)
        return None

    def _nearest(self, path: Path, wanted: bytes) -> tuple[int, bool, Node | None]:
        """Return how the nearest held prefix goes on after the path.

        The tokens that it has in common with the rest of `wanted` (only an aligned block can have
        some), whether it goes on in another way, and the block in which it does, if memory has it.
        """
        at = path.n_tokens
        if path.loose:
            return 0, at < path.loose[-1][1], None
        if path.root is None:
            return 0, False, None
        last = path.last
        if at < last.stop:
            return 0, True, last
        if not last.n_after:
            return 0, False, None
        rest = wanted[at * TOKEN_BYTES :]
        first = rest[:TOKEN_BYTES]
        nearest: tuple[int, int, Node | None] = (0, -1, None)
        for each in _following(last):
            is_alike = each.tokens[:TOKEN_BYTES] == first
            n_same = common_tokens(each.tokens, rest) if is_alike else 0
            if (n_same, each.tick) > nearest[:2]:
                nearest = n_same, each.tick, each
        return nearest[0], True, nearest[2]

    def _removed(self, path: Path, wanted: bytes) -> tuple[_Why | None, bool]:
        """Return why this process does not hold the rest any more.

        Or None, and whether it may have removed a block that goes on like the prompt. Only for a
        namespace of which a removal is remembered. A block that
        was removed started at the end of the path, or where a held block starts that was filed
        later, was cut elsewhere, and begins in the same way.
        """
        removals, key, at = self._memory.removals, path.root_key, path.n_tokens
        places = [(path.point(), at)]
        if not path.loose:
            starts = [node for node in path.nodes[-_MAX_LOOKED_AT:] if node.start < at]
            places += [(node.base, node.start) for node in reversed(starts)]
        n_needed = min(_MIN_SAME, (len(wanted) // TOKEN_BYTES - at + 1) // 2)
        is_alike = False
        for point, start in places:
            rest = wanted[start * TOKEN_BYTES :]
            found = removals.find(key, point, rest, self._memory.index.grain(key))
            if found is None:
                continue
            if found.n_tokens - (at - start) >= n_needed:
                n_removed = found.n_tokens - (at - start)
                why = reason_of_removal(self._store, key, found)
                return _Why(*why, n_removed, found.removed_at), False
            is_alike |= found.n_most > at - start
        return None, is_alike

    def _unheld(self, path: Path, wanted: bytes, *, is_alike: bool) -> _Why:
        """Return the reason for tokens that neither follow a held prefix nor were removed."""
        key = path.root_key
        for each in self._store.below:
            if each.worth.rests(key.fingerprint):
                return _Why(MissReason.SLOWER_THAN_PREFILL, each.tier.label)
        if not (path.n_tokens or is_alike):
            roots = self._memory.index.firsts.get(key.scope, [])
            for root in roots[:_MAX_LOOKED_AT]:
                other = root.root_key
                if other.fingerprint == key.fingerprint:
                    continue
                child = root.children.get((0, wanted[: root.grain]))
                if child is None:
                    continue
                n_same = common_tokens(child.tokens, wanted)
                if n_same >= _MIN_SAME or 2 * n_same * TOKEN_BYTES >= len(wanted):
                    differing = self._store.parts.differing(key.fingerprint, other.fingerprint)
                    return _Why(MissReason.OTHER_FINGERPRINT, differing)
        is_lost = is_alike or self._memory.removals.has_forgotten(key)
        return _NOT_KNOWN if is_lost else _NEVER_STORED


def reason_of_removal(store: Store, root_key: RootKey, found: Removal) -> tuple[MissReason, str]:
    """Return the reason and the detail of a state that was removed; the store's lock is held."""
    if found.cause not in _REMOVED:
        return MissReason.REFUSED, found.cause
    copies = [each for each in store.below if each.bit & found.written]
    for each in copies:
        if each.worth.rests(root_key.fingerprint):
            return MissReason.SLOWER_THAN_PREFILL, each.tier.label
    tiers = ", ".join(["ram", *(each.tier.label for each in copies)])
    return _REMOVED[found.cause], f"{tiers}: {found.cause}"


def _following(node: Node) -> list[Node]:
    """Return some of the blocks that follow the last token of a block."""
    children = islice(node.children.values(), _MAX_LOOKED_AT)
    return [each for each in children if each.start == node.stop]


def _held_tokens(node: Node | None, at: int) -> tuple[int, ...]:
    """Return the tokens of a block from `at` on, and those of the blocks last used after it."""
    tokens = b""
    while node is not None and len(tokens) < _MAX_HELD * TOKEN_BYTES:
        tokens += node.tokens[max(at - node.start, 0) * TOKEN_BYTES :]
        node = max(_following(node), key=lambda each: each.tick, default=None)
    return tuple(array("i", tokens[: _MAX_HELD * TOKEN_BYTES]))
