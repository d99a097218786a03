"""Saves, erases and settles slots, on the request's path or in the background."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tokcache.errors import ServerError, ServerTimeout, ServerUnreachable
from tokcache.llama.server import calls
from tokcache.llama.server.model import probe_tokens
from tokcache.llama.server.steps import Steps, drive

if TYPE_CHECKING:
    from tokcache.llama.server.connection import Connection
    from tokcache.llama.server.records import Records
    from tokcache.llama.server.settings import SlotSettings
    from tokcache.llama.server.slot import SlotRecord

_MAX_WORKERS = 4096  # one for each slot, so no save waits for another
_LOOK_AGAIN_S = 0.05
_log = logging.getLogger(__name__)


class Saver:
    """Saves and erases slots for the requests that have them.

    Threads: safe; nobody else may change the slot until it is released.
    """

    def __init__(
        self,
        connection: Connection,
        settings: SlotSettings,
        records: Records,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._lock = threading.Lock()
        self._records = records
        self._trust = records.trust
        self._pending: dict[SlotRecord, Future[None]] = {}
        self._workers = self._new_workers()

    def save(self, slot: SlotRecord, *, is_count_known: bool = True) -> Steps[None]:
        """Write a slot to a file, unless a file already covers it or the budget is too small."""
        name = self._records.name_for(slot)
        if name is None:
            return
        began = perf_counter()
        try:
            saved = yield calls.save_slot(slot.id, name)
        except ServerError as error:
            self._records.not_saved(slot, name, "save_failed")
            self._trust.degrade("save_failed", error)
            return
        is_as_recorded = (
            saved.n_tokens == slot.n_held or not is_count_known or slot.namespace is None
        )
        if not is_as_recorded or saved.n_tokens < self._settings.min_save_tokens:
            self._trust.refuse("slot_changed_by_others")
            self._records.not_saved(slot, name, "slot_changed_by_others")
            self._records.lose(slot, "slot_changed_by_others")
            return
        self._trust.count("save", seconds=perf_counter() - began)
        self._trust.went_well("save_failed", "no_slot_save_path", "slot_changed_by_others")
        self._records.saved(slot, saved)

    def erase(self, slot: SlotRecord) -> Steps[None]:
        """Empty a slot."""
        slot.lost()
        if not self._trust.can_save:
            return  # the next request empties the slot with "cache_prompt": false
        try:
            yield calls.erase_slot(slot.id)
            self._trust.count("erase")
            self._trust.went_well("erase_failed")
        except ServerUnreachable:
            raise
        except ServerError as error:
            self._trust.degrade("erase_failed", error)

    def empty(self, slot: SlotRecord) -> Steps[None]:
        """Empty a slot and leave none of its tokens in the server's memory."""
        yield from self.erase(slot)
        # A server without a slot folder can't erase: decoding one token replaces the contents.
        if not self._trust.can_save:
            slot.loaded(None)
            asked = {"n_predict": 0, "cache_prompt": False, "id_slot": slot.id}
            yield calls.completion(probe_tokens(None)[:1], asked)

    def settle(self, slot: SlotRecord, *, is_known: bool) -> Steps[None]:
        """Save or erase a slot once the server has noticed that the request is over.

        The server delays saving and erasing until the slot is idle. Without them, ask until it is:
        the next completion must not reach a busy slot.
        """
        if is_known and self._records.is_worth_saving(slot.namespace, slot.tokens):
            yield from self.save(slot, is_count_known=False)
            if slot.n_held:
                return
        self._records.replaced(slot, "overwritten" if is_known else "cut_off")
        yield from self.erase(slot)
        if self._trust.can_save:
            return
        deadline = perf_counter() + self._connection.timeout_s
        while perf_counter() < deadline:
            try:
                listed = yield calls.slots()
            except ServerError:
                return
            if not any(each.id == slot.id and each.is_processing for each in listed):
                return
            threading.Event().wait(_LOOK_AGAIN_S)

    def in_background(self, slot: SlotRecord, steps: Steps[None]) -> None:
        """Perform steps in the background, then release the slot."""
        slot.settle()
        with self._lock:
            workers = self._workers
        try:
            task = workers.submit(self._work, slot, steps)
        except RuntimeError:  # the saver was closed
            self._work(slot, steps)
            return
        with self._lock:
            self._pending[slot] = task

    def pending(self, slot: SlotRecord) -> Future[None] | None:
        """Return the future of a slot's background steps, None if it never had any."""
        with self._lock:
            return self._pending.get(slot)

    def _work(self, slot: SlotRecord, steps: Steps[Any]) -> None:
        try:
            drive(steps, self._connection)
            if slot.is_condemned:
                drive(self.empty(slot), self._connection)
        except ServerError as error:
            self._records.lose(slot, "settling_failed")
            self._trust.refuse("settling_failed")
            _log.debug("slot %d: %s", slot.id, error)
        finally:
            slot.release()

    def flush(self, timeout_s: float | None) -> None:
        """Wait until all pending saves are done."""
        with self._lock:
            pending = list(self._pending.values())
        _, late = wait(pending, timeout_s)
        if late:
            raise ServerTimeout(
                f"{len(late)} slots of {self._connection.url} were not saved within {timeout_s:g} s"
            )

    def close(self) -> None:
        """Wait until all pending saves are done, and end the threads."""
        self._workers.shutdown(wait=True)

    def after_fork(self) -> None:
        """Start with new threads: those of the parent do not run in the child."""
        self._lock = threading.Lock()
        self._pending = {}
        self._workers = self._new_workers()

    @staticmethod
    def _new_workers() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_MAX_WORKERS, thread_name_prefix="tokcache-slots")
