"""Decides whether contents that lose their slot are saved first, and records the files.

Contents that share a prefix with another request, such as a conversation of two turns, are always
saved. A prompt that was seen once and shares nothing is saved only if that is expected to spare
time: saving it takes a known time now, and spares decoding only if the prompt comes back. How
likely that is, is learned in each scope: a digest of every prompt that lost its slot is remembered,
saved or not, and looked up in later requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cachetools import FIFOCache, LRUCache

from tokcache.gateway.routing.chain import EMPTY, Chain
from tokcache.gateway.routing.files import Files, SavedFile

if TYPE_CHECKING:
    from tokcache.gateway.routing.slots import Server, Slot, Wish

MAX_SCOPES, MAX_GONE = 1024, 512
# The weight that the counts of a scope keep when one more prompt loses its slot; so about the last
# 50 prompts count.
_KEPT = 0.98
_KEPT_SAVE = 0.8  # the weight that the mean time of a save keeps at the next one
# A slot that will soon be given away is saved while its server has nothing to do.
_MIN_IDLE_S, _PRESSURE_S = 0.3, 60.0
_SLOTS_PER_SAVED = 4


@dataclass(slots=True)
class Chance:
    """How many prompts of a scope lost their slot, and how many of these came back.

    Both numbers fade, and start as if one of two had come back. `gone` has the last link of each
    prompt that has not come back so far.
    """

    n_gone: float = 2.0
    n_back: float = 1.0
    gone: FIFOCache[bytes, None] = field(default_factory=lambda: FIFOCache(MAX_GONE))

    @property
    def share(self) -> float:
        """Return the share of prompts that came back."""
        return min(1.0, self.n_back / self.n_gone)


class Admission:
    """Knows which slots are saved, how many prompts come back, and how long a save takes.

    Units: times in seconds.
    """

    def __init__(self, files: Files, counts: Counter[str], min_tokens: int) -> None:
        self._files = files
        self._counts = counts
        self._min_tokens = min_tokens
        self._displaced_at = float("-inf")
        self._chances: LRUCache[str | None, Chance] = LRUCache(MAX_SCOPES)
        self._save_s_per_token: dict[str, float] = {}

    def is_saved(self, slot: Slot) -> bool:
        """Return whether a file holds all that a slot holds."""
        if slot.saved is None or slot.saved not in self._files:
            slot.saved = self._files.covers(slot.server.pool, slot.chain)
        return slot.saved is not None

    def is_savable(self, slot: Slot) -> bool:
        """Return whether a slot's contents are lost with it and could be saved."""
        is_long = slot.n_tokens >= self._min_tokens and len(slot.chain) > 0
        return is_long and slot.server.can_restore and not self.is_saved(slot)

    def is_worth_saving(self, slot: Slot) -> bool:
        """Return whether saving a slot before it is given away is expected to save time."""
        if not self.is_savable(slot):
            return False
        if slot.is_shared:
            return True
        held = self._files.find(slot.server.pool, slot.chain)
        n_lost = slot.n_tokens - (slot.tokens_at(held[1]) if held else 0)
        save_s = self._save_s_per_token.get(slot.server.name, 0.0) * slot.n_tokens
        spared_s = n_lost / slot.server.tokens_per_s
        # A restore takes about as long as a save.
        return self._chance(slot.scope).share * (spared_s - save_s) > save_s

    def displaced(self, slot: Slot, now: float) -> bool:
        """Record that a slot's contents give way to another request; return whether to save them.

        If they are not saved, the reason is remembered for a request that asks for them later.
        """
        is_saved_now = self.is_worth_saving(slot)
        if not is_saved_now and len(slot.chain) and not self.is_saved(slot):
            cause = "save_skipped"
            if not slot.server.can_save:
                cause = "no_slot_save_path"
            elif slot.unsaved:
                cause = slot.unsaved
            elif slot.n_tokens < self._min_tokens:
                cause = "below_minimum"
            elif not slot.server.can_restore:
                cause = "restore_not_used_by_server"
            else:
                self._counts["save_skipped"] += 1
            self._files.note_removal(slot.scope, slot.chain, cause)
        if slot.n_tokens >= self._min_tokens:
            self._displaced_at = now
            if slot.n_prompt_links and not slot.is_shared:
                chance = self._chance(slot.scope)
                chance.n_gone = _KEPT * chance.n_gone + 1
                chance.n_back *= _KEPT
                chance.gone[slot.chain.links[slot.n_prompt_links - 1]] = None
        return is_saved_now

    def next_to_save(self, servers: Iterable[Server], now: float) -> Slot | None:
        """Return an idle slot to save now, because a request would soon have to wait for that.

        Only idle servers are considered, because llama-server decodes nothing while it saves; and
        only if a conversation lost its slot in the last 60 s. Returns the least recently used slot.
        """
        if now - self._displaced_at > _PRESSURE_S:
            return None
        for server in servers:
            if not server.can_restore or any(slot.is_busy for slot in server.slots):
                continue
            unsaved = [slot for slot in server.slots if self.is_worth_saving(slot)]
            n_free = len(server.slots) - len(unsaved)
            # A save that failed is tried again only when the contents give way.
            untried = [slot for slot in unsaved if not slot.unsaved]
            if untried and n_free < max(1, len(server.slots) // _SLOTS_PER_SAVED):
                oldest = min(untried, key=lambda slot: slot.used_at)
                if now - oldest.idle_since >= _MIN_IDLE_S:
                    return oldest
        return None

    def saved(
        self,
        slot: Slot,
        name: str,
        n_tokens: int,
        n_bytes: int,
        *,
        seconds: float = 0.0,
        ids: Chain = EMPTY,
    ) -> SavedFile | None:
        """Record a slot's new file and how long it took; None if it is over the budget."""
        self.measured(slot.server, n_tokens, seconds)
        file = SavedFile(
            name=name,
            pool=slot.server.pool,
            chain=slot.chain,
            n_prompt_links=slot.n_prompt_links,
            n_prompt=slot.n_prompt,
            n_tokens=n_tokens,
            n_bytes=n_bytes,
            ids=ids,
            scope=slot.scope,
        )
        self._counts["save"] += 1
        is_listed = self._files.add(file)
        if ids:
            slot.ids, slot.chat_body = ids, None
        slot.saved, slot.unsaved = (file, "") if is_listed else (None, "file_over_budget")
        return slot.saved

    def measured(self, server: Server, n_tokens: int, seconds: float) -> None:
        """Record how long a save took."""
        found = seconds / max(1, n_tokens)
        known = self._save_s_per_token.get(server.name, found)
        self._save_s_per_token[server.name] = _KEPT_SAVE * known + (1 - _KEPT_SAVE) * found

    def asked(self, wish: Wish) -> None:
        """Record that a request came; it may continue prompts that lost their slot."""
        chance = self._chance(wish.scope)
        for link in wish.chain.links:
            if link in chance.gone:
                del chance.gone[link]
                chance.n_back += 1

    def _chance(self, scope: str | None) -> Chance:
        return self._chances.setdefault(scope, Chance())
