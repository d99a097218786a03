"""The ways in which idle slots can serve a request, and which of them is best. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokcache.gateway.routing.files import Files, SavedFile
    from tokcache.gateway.routing.slots import Slot, Wish

MIN_RESTORE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Choice:
    """A slot for a request; `net` is the gain in tokens less half of the tokens that are lost."""

    slot: Slot
    net: float
    n_gained: int
    n_links: int
    source: str
    file: SavedFile | None = None
    copied: Slot | None = None


def choices(files: Files, wish: Wish, idle: list[Slot]) -> Iterator[Choice]:
    """Yield, for each idle slot, the ways in which it can serve a request."""
    own = [(slot, slot.chain.n_common(wish.chain)) for slot in idle if slot.scope == wish.scope]
    pools = {slot.server.pool for slot in idle if slot.server.can_restore}
    found = {pool: files.find(pool, wish.chain) for pool in pools}
    for slot in idle:
        server = slot.server
        n_links = slot.chain.n_common(wish.chain) if slot.scope == wish.scope else 0
        n_live = slot.tokens_at(n_links)
        net = n_live - _loss(slot, n_live)
        yield Choice(slot, net, n_live, n_links, "slot" if n_live else "none")
        if not server.can_restore:
            continue
        # A restored file replaces all that the slot holds.
        least, loss = n_live + MIN_RESTORE_TOKENS, _loss(slot, 0)
        match found[server.pool]:
            case (file, n_links) if file.tokens_at(n_links) >= least:
                n_gained = file.tokens_at(n_links)
                yield Choice(slot, n_gained - loss, n_gained, n_links, "file", file)
        # A copy of another conversation's slot leaves that one as it is.
        for other, n_links in own:
            n_gained = other.tokens_at(n_links)
            is_copyable = other is not slot and other.server.can_save
            if n_gained >= least and is_copyable and other.server.pool == server.pool:
                yield Choice(slot, n_gained - loss, n_gained, n_links, "file", None, other)


def _loss(slot: Slot, n_kept: int) -> float:
    """Return the tokens that nobody could get back, at half of their worth."""
    if slot.saved is not None or slot.server.can_restore:
        return 0.0
    return max(0, slot.n_tokens - n_kept) / 2


def rank(choice: Choice, wish: Wish, *, is_side: bool, side_tokens: int) -> tuple[float, ...]:
    """Return the order of choices: tokens gained, then the least disturbance."""
    slot = choice.slot
    is_continued = choice.source == "slot" and slot.is_continued_by(wish)
    is_small = slot.n_tokens < side_tokens
    # Side requests take the place of small contents; other requests leave the side slot alone.
    is_fitting = is_small if is_side else not slot.is_side
    return (
        choice.net,
        is_continued,
        slot.n_tokens == 0 or is_continued,
        is_fitting,
        is_small,
        choice.copied is None,
    )


def rank_of_equals(choice: Choice, wish: Wish, *, needs_save: bool) -> tuple[float, ...]:
    """Return the order of choices of one rank: no save, the longest unused, the idlest server.

    Token ids do not decide here, because those of the request cost an `/apply-template`. They would
    decide nothing: of 3,132 simulated requests like those of `bench/gateway.py`, 11 had two slots
    of one rank, which shared equally many tokens with the request. Where slots are saved there was
    none: the second chat with a prefix has it saved, and later ones take the file.
    """
    slot = choice.slot
    is_continued = choice.source == "slot" and slot.is_continued_by(wish)
    n_idle = sum(not each.is_busy for each in slot.server.slots)
    return is_continued or not needs_save, -slot.used_at, n_idle
