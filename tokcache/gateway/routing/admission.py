"""Decides whether contents that lose their slot are saved first.

Contents that share a prefix with another request, such as a conversation of two turns, always are.
Of a prompt that was seen once and shares nothing, saving takes a known time now, and pays back only
if the prompt comes back. The chance of that is learned for each scope: prompts that were given away
are remembered by a digest, saved or not, so that returns are seen of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokcache.gateway.routing.slots import Server, Slot, Wish

_MAX_GONE = 4096
_KEPT = 0.98  # the weight of the past at each displacement: the last 50 count
_KEPT_SAVE = 0.8


@dataclass(slots=True)
class Chance:
    """How often prompts of a scope came back after they had lost their slot; first one of two."""

    n_gone: float = 2.0
    n_back: float = 1.0

    @property
    def share(self) -> float:
        """Return the chance of a return."""
        return min(1.0, self.n_back / self.n_gone)


class Admission:
    """Knows the chance of a return and the time of a save.

    Units: times in seconds.
    """

    def __init__(self) -> None:
        self._chances: dict[str | None, Chance] = {}
        self._gone: dict[bytes, Chance] = {}
        self._save_s_per_token: dict[str, float] = {}

    def pays(self, slot: Slot, n_lost: int) -> bool:
        """Return whether saving a slot takes less time than is expected to be spared."""
        if slot.is_shared:
            return True
        save_s = self._save_s_per_token.get(slot.server.name, 0.0) * slot.n_tokens
        spared_s = n_lost / slot.server.tokens_per_s
        # A restore takes about as long as a save.
        return self._chance(slot.scope).share * (spared_s - save_s) > save_s

    def displaced(self, slot: Slot) -> None:
        """Record that a slot's contents give way to another request."""
        if slot.is_shared or not slot.n_prompt_links:
            return
        chance = self._chance(slot.scope)
        chance.n_gone = _KEPT * chance.n_gone + 1
        chance.n_back *= _KEPT
        self._gone[slot.chain.links[slot.n_prompt_links - 1]] = chance
        if len(self._gone) > _MAX_GONE:
            del self._gone[next(iter(self._gone))]

    def asked(self, wish: Wish) -> None:
        """Record the return of contents that a request continues."""
        for link in wish.chain.links:
            if (chance := self._gone.pop(link, None)) is not None:
                chance.n_back += 1

    def saved(self, server: Server, n_tokens: int, seconds: float) -> None:
        """Record how long a save took."""
        found = seconds / max(1, n_tokens)
        known = self._save_s_per_token.get(server.name, found)
        self._save_s_per_token[server.name] = _KEPT_SAVE * known + (1 - _KEPT_SAVE) * found

    def _chance(self, scope: str | None) -> Chance:
        return self._chances.setdefault(scope, Chance())
