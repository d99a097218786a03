"""Decides which slot serves a request, and the saves and restores before that. No I/O.

1. `enqueue` takes a request; `assign` gives requests to idle slots and returns the assignments.
2. The service saves, restores and erases as an assignment says and reports each with `saved`,
   `restored` and `emptied`; then it sends the request to the assigned slot.
3. `finish`, `reject` or `abort` records the slot's contents afterwards; `release` makes it idle.

A slot serves one request at a time. A request goes where most of its prefix is held: a slot whose
conversation it continues, else a saved file or another conversation's slot, which is saved first.
It waits while a busy slot decodes a prefix that it needs, and then about as long as decoding takes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from tokcache.errors import QueueFull
from tokcache.gateway.routing.admission import Admission
from tokcache.gateway.routing.chain import EMPTY, Chain
from tokcache.gateway.routing.choice import (
    MIN_RESTORE_TOKENS,
    Choice,
    choices,
    rank,
    rank_of_equals,
)
from tokcache.gateway.routing.slots import Assignment, Server, Slot, Wish
from tokcache.llama.server.removals import reason_of_cause
from tokcache.state.reasons import MissReason

if TYPE_CHECKING:
    from tokcache.gateway.routing.files import Files, SavedFile

_MIN_WAIT_TOKENS = 256
_MAX_BYPASSED_S = 2.0  # a request that waited so long is served before later ones
_MIN_SHARE_WAIT_S, _MAX_SHARE_WAIT_S = 1.0, 10.0
_FEW_SLOTS = 3
_FIRST_TOKENS_PER_CHAR = 0.3
_KEPT = 0.9  # the weight of the past in a running mean


class Router:
    """Owns the slots, the queue and the choice between them.

    Threads: not safe; used from one event loop.
    """

    def __init__(
        self, files: Files, *, max_queue: int, min_save_tokens: int, side_tokens: int
    ) -> None:
        self.files = files
        self.servers: dict[str, Server] = {}
        self.queue: list[Wish] = []
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.missed_tokens: Counter[str] = Counter()
        self.erases_between_scopes = False
        self.admission = Admission(files, self.counts, min_save_tokens)
        self._max_queue = max_queue
        self._side_tokens = side_tokens
        self._tokens_per_char = _FIRST_TOKENS_PER_CHAR
        self._clock = itertools.count(1)

    # -- servers ------------------------------------------------------------------------------

    def server_up(self, name: str, *, model: str, pool: str, can_save: bool, n_slots: int) -> None:
        """Record that a server started, or restarted with empty slots."""
        server = self.servers.setdefault(name, Server(name))
        for slot in server.slots:
            self.lose(slot, "server_restarted")
        server.model, server.pool, server.can_save = model, pool, can_save
        server.is_up = True
        server.epoch += 1
        server.n_useless_restores = 0
        while len(server.slots) < n_slots:
            server.slots.append(Slot(server, len(server.slots)))
        del server.slots[n_slots:]
        for slot in server.slots:
            # A server that ran before this process may hold anybody's tokens.
            slot.is_dirty = True

    def server_down(self, name: str) -> None:
        """Record that a server can't be reached; the contents of its slots are lost."""
        server = self.servers[name]
        server.is_up = False
        server.epoch += 1
        for slot in server.slots:
            self.lose(slot, "server_away")

    def idle(self, model: str = "") -> list[Slot]:
        """Return the idle slots of the servers that are up and have the model."""
        return [
            slot
            for server in self.servers.values()
            if server.is_up and model in ("", server.model)
            for slot in server.slots
            if not slot.is_busy
        ]

    # -- the queue ----------------------------------------------------------------------------

    def enqueue(self, wish: Wish) -> None:
        """Queue a request, or raise QueueFull."""
        if len(self.queue) >= self._max_queue:
            self.reasons["queue_full"] += 1
            raise QueueFull(1 + len(self.queue) // 8)
        self.admission.asked(wish)
        self.queue.append(wish)

    def cancel(self, wish: Wish) -> None:
        """Remove a request that no longer waits."""
        if wish in self.queue:
            self.queue.remove(wish)

    def assign(self, now: float) -> list[Assignment]:
        """Give queued requests to idle slots; a request may prefer to wait."""

        def turn(idle: list[Slot], wish: Wish) -> tuple[int, float]:
            # First those that waited long, then those that continue an idle slot.
            if now - wish.arrived > _MAX_BYPASSED_S:
                return 0, wish.arrived
            is_continued = any(slot.is_continued_by(wish) for slot in idle)
            return (1 if is_continued else 2), wish.arrived

        made = []
        while self.queue and (idle := self.idle()):
            for wish in sorted(self.queue, key=partial(turn, idle)):
                own_idle = self.idle(wish.model)
                if not own_idle:
                    continue
                best = self._best(wish, own_idle)
                if self._is_worth_waiting(wish, best, now):
                    wish.has_waited_for_prefix = True
                    continue
                self.queue.remove(wish)
                made.append(self._assigned(wish, best, now))
                break
            else:
                break
        return made

    def _best(self, wish: Wish, idle: list[Slot]) -> Choice:
        is_side = self._is_side(wish)
        found = list(choices(self.files, wish, idle))
        ranks = [rank(each, wish, is_side=is_side, side_tokens=self._side_tokens) for each in found]
        highest = max(ranks)
        equals = [each for each, its in zip(found, ranks, strict=True) if its == highest]
        if len(equals) == 1:
            return equals[0]
        # Whether a slot would be saved is asked only for these, because it takes a look-up.
        return max(
            equals,
            key=lambda each: rank_of_equals(
                each, wish, needs_save=self.admission.is_worth_saving(each.slot)
            ),
        )

    def _is_side(self, wish: Wish) -> bool:
        n_chars = wish.chain.stop_at(len(wish.chain))
        return n_chars * self._tokens_per_char < self._side_tokens

    def _is_worth_waiting(self, wish: Wish, best: Choice, now: float) -> bool:
        """Return whether a busy slot will hold much more, sooner than it could be decoded."""
        for server in self.servers.values():
            if not server.is_up or not server.can_restore or wish.model not in ("", server.model):
                continue
            for slot in server.slots:
                if not slot.is_busy or slot.scope != wish.scope:
                    continue
                n_shared = slot.coming.n_common(wish.chain)
                n_tokens = int(wish.chain.stop_at(n_shared) * self._tokens_per_char)
                n_more = n_tokens - best.n_gained
                if n_more < _MIN_WAIT_TOKENS or now - wish.arrived > _MAX_SHARE_WAIT_S:
                    continue
                # Decoding the prefix a second time would not be ready before the first time is.
                # After that the slot is free when the answer ends, which may take long.
                wait_s = max(_MIN_SHARE_WAIT_S, n_more / server.tokens_per_s)
                if slot.begun_at is None or now - slot.begun_at < wait_s:
                    return True
        return False

    def _assigned(self, wish: Wish, choice: Choice, now: float) -> Assignment:
        slot = choice.slot
        made = Assignment(
            wish, slot, choice.source, choice.n_gained, file=choice.file, copied=choice.copied
        )
        made.n_links, made.epoch = choice.n_links, slot.server.epoch
        if choice.n_links < len(wish.chain) - 1:  # more than the last piece has to be decoded
            made.reason, made.detail = self._why(wish, choice.n_links)
        if choice.copied is not None:
            choice.copied.is_busy = True
            if not self.admission.is_saved(choice.copied):
                made.save.append(choice.copied)
        keeps_all = choice.source == "slot" and slot.is_continued_by(wish)
        if not keeps_all and self.admission.displaced(slot, now):
            made.save.append(slot)
        is_of_another = slot.is_dirty and slot.scope != wish.scope
        made.is_erased = is_of_another and self.erases_between_scopes
        if choice.file is not None:
            choice.file.n_readers += 1
        slot.is_busy = True
        slot.coming, slot.begun_at = wish.chain, None
        others = [each for each in slot.server.slots if each is not slot]
        is_only = len(others) + 1 >= _FEW_SLOTS and not any(each.is_side for each in others)
        slot.is_side = is_only and self._is_side(wish)
        slot.used_at = next(self._clock)
        self.counts[f"plan_{choice.source}"] += 1
        return made

    def _why(self, wish: Wish, n_links: int) -> tuple[MissReason, str]:
        """Return why no more than the first `n_links` links of a request are reused."""
        if wish.has_waited_for_prefix:
            return MissReason.REFUSED, "busy"
        removal = self.files.removal(wish.scope, wish.chain)
        if removal is not None and removal.n_tokens > n_links:
            return reason_of_cause(removal.cause)
        if n_links:
            return MissReason.DIFFERENT_TEXT, ""
        is_lost = self.files.has_forgotten(wish.scope)
        return (MissReason.NOT_KNOWN if is_lost else MissReason.NEVER_STORED), ""

    # -- reports of the service ---------------------------------------------------------------

    def next_to_save(self, now: float) -> Slot | None:
        """Return an idle slot to save now; the caller calls `begin_save` for it."""
        return None if self.queue else self.admission.next_to_save(self.servers.values(), now)

    def begin_save(self, slot: Slot) -> None:
        """Keep a slot from other requests while it is saved; one that continues it waits."""
        slot.is_busy = True
        slot.coming, slot.begun_at = slot.chain, None

    def lose(self, slot: Slot, cause: str) -> None:
        """Record that a slot's contents are gone or not known any more, and why."""
        if len(slot.chain) and not self.admission.is_saved(slot):
            self.files.note_removal(slot.scope, slot.chain, slot.unsaved or cause)
        slot.lost()

    def not_saved(self, slot: Slot) -> None:
        """Record that the server could not save a slot; the contents stay until they give way."""
        self.reasons["save_failed"] += 1
        slot.unsaved = "save_failed"
        self.files.note_removal(slot.scope, slot.chain, "save_failed")

    def restored(self, made: Assignment, file: SavedFile) -> None:
        """Record that the assigned slot holds a file's contents."""
        self.counts["restore"] += 1
        self.files.touch(file)
        slot = made.slot
        slot.scope = made.wish.scope
        slot.holds(file.chain, file.n_prompt_links, file.n_prompt, file.n_tokens)
        slot.saved, slot.ids = file, file.ids

    def not_restored(self, made: Assignment, reason: str) -> None:
        """Record that a file could not be restored; a failed restore empties the slot."""
        self.reasons[reason] += 1
        made.source, made.n_promised = "none", 0
        made.reason, made.detail = MissReason.REFUSED, reason
        made.slot.lost()

    def least_to_restore(self, made: Assignment) -> int:
        """Return the tokens that a file must hold of a request to be better than its slot is."""
        return self._live(made)[1] + MIN_RESTORE_TOKENS

    def not_worth_restoring(self, made: Assignment, reason: str) -> None:
        """Record that a file was not restored, so that the slot keeps its contents."""
        self.reasons[reason] += 1
        made.n_links, made.n_promised = self._live(made)
        made.source = "slot" if made.n_promised else "none"
        made.reason, made.detail = MissReason.TEMPLATE, reason

    def _live(self, made: Assignment) -> tuple[int, int]:
        """Return the links, and the tokens, that an assigned slot holds of its request."""
        slot, wish = made.slot, made.wish
        n_links = slot.chain.n_common(wish.chain) if slot.scope == wish.scope else 0
        return n_links, slot.tokens_at(n_links)

    def read_done(self, made: Assignment) -> None:
        """Record that an assignment no longer needs its file or the slot that it copies."""
        if made.file is not None:
            made.file.n_readers -= 1
            made.file = None
        if made.copied is not None:
            made.copied.is_busy = False
            made.copied = None

    def finish(
        self, made: Assignment, chain: Chain, *, n_prompt: int, n_cached: int, n_tokens: int
    ) -> None:
        """Record an answer, and compare the promise with the tokens used."""
        slot, wish = made.slot, made.wish
        slot.holds(chain, len(wish.chain), n_prompt, n_tokens)
        slot.scope = wish.scope
        slot.is_shared = made.n_links > 0 or wish.has_waited_for_prefix
        slot.n_uses += 1
        if made.epoch != slot.server.epoch:
            self.lose(slot, "server_restarted")
        n_chars = wish.chain.stop_at(len(wish.chain))
        if n_chars and n_prompt:
            share = n_prompt / n_chars
            self._tokens_per_char = _KEPT * self._tokens_per_char + (1 - _KEPT) * share
        self.counts["request"] += 1
        self.counts["prompt_tokens"] += n_prompt
        self.counts["cached_tokens"] += n_cached
        self.counts["restored_tokens"] += n_cached if made.source == "file" else 0
        is_kept = 2 * n_cached >= made.n_promised
        server = slot.server
        if made.source == "file":
            server.n_useless_restores = 0 if is_kept else server.n_useless_restores + 1
        if made.n_promised >= MIN_RESTORE_TOKENS and not is_kept:
            is_file = made.source == "file"
            made.detail = "restore_not_used_by_server" if is_file else "slot_changed_by_others"
            made.reason = MissReason.REFUSED
            self.reasons[made.detail] += 1
        elif made.detail == "busy":
            self.reasons["busy"] += 1
        if made.reason is not None:
            self.misses[made.reason] += 1
            self.missed_tokens[made.reason] += max(0, n_prompt - 1 - n_cached)

    def reject(self, made: Assignment) -> None:
        """Record that the server rejected the request; the slot's contents are as before."""
        if made.is_sent:  # for safety, as if it had decoded some of the prompt
            made.slot.scope, made.slot.is_dirty = made.wish.scope, True
        self.counts["rejected"] += 1

    def abort(self, made: Assignment, *, has_begun: bool) -> None:
        """Record that a request was cut off; only the shared prefix, or the prompt, is certain."""
        slot, wish = made.slot, made.wish
        self.counts["aborted"] += 1
        if not made.is_sent:
            # The slot may still hold the tokens of its scope, or half of a restored file.
            self.lose(slot, "cut_off")
            return
        slot.scope = wish.scope
        slot.is_dirty = True
        if has_begun:
            n_chars = wish.chain.stop_at(len(wish.chain))
            n_tokens = int(n_chars * self._tokens_per_char)
            slot.holds(wish.chain, len(wish.chain), n_tokens, n_tokens)
        else:
            links, stops = slot.chain.links[: made.n_links], slot.chain.stops[: made.n_links]
            slot.holds(Chain(links, stops), made.n_links, made.n_promised, made.n_promised)
        if made.epoch != slot.server.epoch:
            self.lose(slot, "server_restarted")

    def begun(self, slot: Slot, now: float) -> None:
        """Record that a slot's prompt was decoded and its answer began."""
        slot.begun_at = now

    def measured(self, server: Server, n_tokens: int, seconds: float) -> None:
        """Record how long a server took to decode part of a prompt."""
        if n_tokens >= _MIN_WAIT_TOKENS and seconds > 0:
            server.tokens_per_s = n_tokens / seconds

    def release(self, slot: Slot, now: float = 0.0) -> None:
        """Make a slot idle."""
        slot.is_busy = False
        slot.idle_since = now
        slot.coming = EMPTY
