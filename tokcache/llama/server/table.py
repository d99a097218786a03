"""The table of slots: chooses the slot or file that a prompt starts from.

Nothing here talks to the server. Requests that find no free slot wait in a queue. A request waits
for a settling slot only if that slot's contents save it enough decoding.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokcache.llama.server.checkpoints import ANY_DISTANCE
from tokcache.llama.server.namespaces import scope_of
from tokcache.llama.server.settings import STEP_TOKENS
from tokcache.llama.server.slot import Condition, SlotRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokcache.llama.server.shelf import Found, SavedSlot, Shelf
    from tokcache.text.token_ids import TokenIds

# Tokens. llama-server decodes nothing while it writes a slot, so taking another slot saves little
# time.
_WORTH_WAITING = STEP_TOKENS


@dataclass(frozen=True, slots=True)
class Wish:
    """The needs of a request.

    `kinds` are the allowed ways to continue a saved slot; `too_far` is the distance from a
    checkpoint at which the server uses nothing. `is_file_only`: it may not continue the
    live contents of a slot.
    """

    namespace: bytes
    prompt: TokenIds
    conversation: tuple[bytes, str] | None
    kinds: frozenset[str]
    too_far: int = ANY_DISTANCE
    is_file_only: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """The start of a prompt in `slot`: after its `n_live` live tokens, or after a file's."""

    slot: SlotRecord
    n_live: int
    found: Found | None

    @property
    def n_promised(self) -> int:
        """Tokens that need not be decoded."""
        return self.found.n_tokens if self.found else self.n_live


@dataclass(eq=False, slots=True)
class _Waiter:
    wish: Wish
    future: Future[Start]


class SlotTable:
    """The slots of one server, and the queue of requests that wait for one.

    Threads: safe, by `lock`, which also guards the slots and the shelf. It is never held during a
             request to the server.
    """

    def __init__(self, ids: Iterable[int], shelf: Shelf, *, is_one_at_a_time: bool = False) -> None:
        self._is_one_at_a_time = is_one_at_a_time
        self.lock = threading.RLock()
        self.shelf = shelf
        self.slots = {number: self._new_slot(number) for number in ids}
        self.epoch = 0
        self._waiters: deque[_Waiter] = deque()

    def acquire(self, wish: Wish) -> Future[Start]:
        """Return a future of the start for `wish`; it is done once a slot is free."""
        waiter = _Waiter(wish, Future())
        with self.lock:
            self._waiters.append(waiter)
            self._wake()
        return waiter.future

    def cancel(self, future: Future[Start]) -> None:
        """Leave the queue; release the slot if the request already has one."""
        with self.lock:
            self._waiters = deque(each for each in self._waiters if each.future is not future)
            if not future.cancel():
                self._unread(future.result())
                future.result().slot.release()

    def again(self, start: Start, wish: Wish) -> Start:
        """Choose a start again in the same slot, after records were reset."""
        with self.lock:
            self._unread(start)
            slot, found = start.slot, self._found(wish)
            live = self._live(wish, [slot], slot.condition)
            n_live = live[1] if live else 0
            if n_live and n_live >= (found.n_tokens if found else 0):
                return Start(slot, n_live, None)
            return self._with_file(slot, found)

    def take(self, slot: SlotRecord) -> bool:
        """Take one slot if it is free, before the queue."""
        with self.lock:
            is_free = slot.condition is Condition.FREE
            if is_free:
                slot.begin(None)
            return is_free

    def abandon(self) -> None:
        """Start empty in the child of a fork, where other threads' requests do not run."""
        self.lock = threading.RLock()
        # The child may still read a parent's stream to its end, which records that in its slot.
        for slot in self.slots.values():
            slot.lock = self.lock
        self.slots.clear()
        self._waiters.clear()

    def from_nothing(self, start: Start) -> Start:
        """Return a start in the same slot that reuses nothing."""
        with self.lock:
            self._unread(start)
            return Start(start.slot, 0, None)

    def read(self, file: SavedSlot) -> None:
        """Record that one reader of a file has finished."""
        with self.lock:
            file.n_readers -= 1

    def resize(self, ids: Iterable[int]) -> None:
        """Set the slots that the server has."""
        with self.lock:
            wanted = set(ids)
            for number in wanted - set(self.slots):
                self.slots[number] = self._new_slot(number)
            for number in set(self.slots) - wanted:
                del self.slots[number]
            self._wake()

    def reset_contents(self) -> None:
        """Reset all slots: the server was restarted."""
        with self.lock:
            self.epoch += 1
            for slot in self.slots.values():
                slot.reset()

    def condemn(self, scope: bytes | None) -> list[SlotRecord]:
        """Return the slots with prompts of a scope, or of any; condemn those in use."""
        with self.lock:
            held = [
                slot
                for slot in self.slots.values()
                if any(
                    namespace and scope in (None, scope_of(namespace))
                    for namespace in (slot.namespace, slot.user)
                )
            ]
            for slot in held:
                slot.condemn()
            return held

    def _new_slot(self, number: int) -> SlotRecord:
        return SlotRecord(number, self.lock, self._wake)

    def _wake(self) -> None:
        waiting: deque[_Waiter] = deque()
        while self._waiters:
            waiter = self._waiters.popleft()
            start = self._choose(waiter.wish)
            if start is None:
                waiting.append(waiter)
            elif waiter.future.set_running_or_notify_cancel():
                start.slot.begin(waiter.wish.namespace)
                waiter.future.set_result(start)
            else:
                self._unread(start)
        self._waiters = waiting

    def _unread(self, start: Start) -> None:
        if start.found is not None:
            start.found.file.n_readers -= 1

    def _choose(self, wish: Wish) -> Start | None:
        free = [slot for slot in self.slots.values() if slot.condition is Condition.FREE]
        if self._is_one_at_a_time and len(free) < len(self.slots):
            return None
        found = self._found(wish)
        n_file = found.n_tokens if found else 0
        live = self._live(wish, free)
        if not free:
            return None
        settling = self._live(wish, self.slots.values(), Condition.SETTLING)
        n_gained = (settling[1] if settling else 0) - max(n_file, live[1] if live else 0)
        if n_gained >= _WORTH_WAITING:
            return None
        if live is not None and live[1] > 0:
            slot, n_live = live
            # If a file serves as well, keep a slot that would lose most of its contents.
            if n_live > n_file or (n_live == n_file and 2 * n_live >= slot.n_held):
                return Start(slot, n_live, None)
        # Otherwise take the slot whose loss costs least.
        slot = min(
            free,
            key=lambda slot: (
                slot.n_held > 0,
                slot.conversation in self.shelf.pinned,
                not slot.is_saved,
                slot.used_at,
            ),
        )
        return self._with_file(slot, found)

    def _with_file(self, slot: SlotRecord, found: Found | None) -> Start:
        if found is not None:
            found.file.n_readers += 1
        return Start(slot, 0, found)

    def _found(self, wish: Wish) -> Found | None:
        if not wish.kinds:
            return None
        return self.shelf.find(wish.namespace, wish.prompt, wish.kinds, wish.too_far)

    def _live(
        self, wish: Wish, slots: Iterable[SlotRecord], condition: Condition = Condition.FREE
    ) -> tuple[SlotRecord, int] | None:
        """Return the slot that holds most of a prompt, and the number of tokens."""
        if wish.is_file_only:
            return None
        matches = [
            (slot, slot.n_usable(wish.prompt, wish.too_far))
            for slot in slots
            if slot.namespace == wish.namespace and slot.condition is condition
        ]
        # For equal matches take the slot that holds fewer other tokens.
        return max(matches, key=lambda match: (match[1], -match[0].n_held), default=None)
