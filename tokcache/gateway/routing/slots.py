"""Slots, servers, requests and assignments: the things that the router decides about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokcache.gateway.routing.chain import EMPTY, Chain
from tokcache.gateway.routing.files import SavedFile, tokens_at

if TYPE_CHECKING:
    from tokcache.state.reasons import MissReason

_MAX_USELESS = 3  # a server that used less than half of so many restored files gets no more
_FIRST_TOKENS_PER_S = 1_000.0


@dataclass(eq=False, slots=True)
class Slot:
    """One slot and its contents by our record; `saved` is a file that holds them too.

    Units: `n_tokens` held; the first `n_prompt` of them are the chain's first `n_prompt_links`.
    """

    server: Server
    id: int
    scope: str | None = None
    chain: Chain = EMPTY
    n_prompt_links: int = 0
    n_prompt: int = 0
    n_tokens: int = 0
    saved: SavedFile | None = None
    # Why the last save of the contents failed; "" if none did.
    unsaved: str = ""
    # The chat completion whose prompt it holds, until the ids of that are known.
    chat_body: bytes | None = None
    # The chain of its prompt's token ids, empty where they are not known.
    ids: Chain = EMPTY
    is_busy: bool = False
    is_side: bool = False
    # The contents share a prefix with another request, for example an earlier turn.
    is_shared: bool = False
    # May hold tokens of a scope, even if the record of them was lost.
    is_dirty: bool = False
    coming: Chain = EMPTY
    # When its request's prompt was decoded; None before that.
    begun_at: float | None = None
    used_at: int = 0
    idle_since: float = 0.0
    n_uses: int = 0

    def tokens_at(self, n_links: int) -> int:
        """Return about how many tokens the first `n_links` links take."""
        return tokens_at(self.chain, n_links, self.n_prompt_links, self.n_prompt)

    def is_continued_by(self, wish: Wish) -> bool:
        """Return whether a request begins with all of the slot's prompt."""
        held = self.n_prompt_links
        return held > 0 and self.scope == wish.scope and self.chain.n_common(wish.chain) >= held

    def holds(self, chain: Chain, n_links: int, n_prompt: int, n_tokens: int) -> None:
        """Record new contents."""
        self.chain, self.n_prompt_links = chain, n_links
        self.n_prompt, self.n_tokens = n_prompt, n_tokens
        self.saved = None
        self.unsaved = ""
        self.chat_body, self.ids = None, EMPTY
        self.is_dirty = True

    def lost(self) -> None:
        """Record that the contents are unknown."""
        is_dirty = self.is_dirty
        self.holds(EMPTY, 0, 0, 0)
        self.is_dirty = is_dirty

    def emptied(self) -> None:
        """Record that the slot was erased."""
        self.lost()
        self.is_dirty = False
        self.scope = None


@dataclass(eq=False, slots=True)
class Server:
    """One llama-server as the router sees it; `pool` names the servers that share its files."""

    name: str
    model: str = ""
    pool: str = ""
    can_save: bool = False
    is_up: bool = False
    # Starts and failures so far; a request of an earlier epoch has lost its slot.
    epoch: int = 0
    slots: list[Slot] = field(default_factory=list)
    tokens_per_s: float = _FIRST_TOKENS_PER_S
    # Restores after which the server used less than half, less those of which it used more.
    n_useless_restores: int = 0

    @property
    def can_restore(self) -> bool:
        """Return whether restores are tried: not after three that helped nothing."""
        return self.can_save and self.n_useless_restores < _MAX_USELESS


@dataclass(eq=False, slots=True)
class Wish:
    """A request that waits for a slot.

    Units: `arrived` in seconds of any monotonic clock.
    """

    chain: Chain
    scope: str | None
    model: str
    arrived: float
    has_waited_for_prefix: bool = False


@dataclass(eq=False, slots=True)
class Assignment:
    """A request, its slot, and the steps before it is sent.

    The steps are, in this order: save each slot in `save`, erase, restore `file` (or the file that
    `copied` was saved to). `reason` says why the promise is not larger, `detail` has the code of a
    refusal or the budget.
    """

    wish: Wish
    slot: Slot
    source: str = "none"
    n_promised: int = 0
    reason: MissReason | None = None
    detail: str = ""
    save: list[Slot] = field(default_factory=list)
    is_erased: bool = False
    file: SavedFile | None = None
    copied: Slot | None = None
    n_links: int = 0
    epoch: int = 0
    # All steps are done and the request was sent, so the slot holds its tokens.
    is_sent: bool = False
