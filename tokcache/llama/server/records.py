"""Everything that is recorded about one server: its slots, the saved files and the counters.

The table's lock guards slots and files together. Whoever saves, restores or watches works on one
slot and reports the result here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from cachetools import LRUCache

from tokcache.llama.answers import Answers
from tokcache.llama.server.misses import SlotMisses
from tokcache.llama.server.namespaces import adapters_of, scope_of
from tokcache.llama.server.results import ReuseStats
from tokcache.llama.server.settings import STEP_TOKENS
from tokcache.llama.server.shelf import Shelf
from tokcache.llama.server.table import SlotTable
from tokcache.llama.server.trust import PROMPT, Trust

if TYPE_CHECKING:
    from tokcache.llama.server.results import SlotFile
    from tokcache.llama.server.settings import SlotSettings
    from tokcache.llama.server.shelf import SavedSlot
    from tokcache.llama.server.slot import SlotRecord
    from tokcache.text.token_ids import TokenIds

_MAX_SEEN, _MAX_CLEARS = 65_536, 1024


class Records:
    """The slots, the files and the evidence of one server, and the rules between them.

    Threads: safe.
    """

    def __init__(self, url: str, settings: SlotSettings) -> None:
        self._settings = settings
        self.trust = Trust(
            url, is_strict=settings.on_error == "raise", is_reproducible=settings.reproducible
        )
        self.shelf = Shelf(
            max_bytes=settings.max_bytes,
            max_age_s=settings.max_age_s,
            folder=Path(settings.slot_folder) if settings.slot_folder is not None else None,
            step=min(STEP_TOKENS, settings.block_tokens) if settings.reproducible else STEP_TOKENS,
            trust=self.trust,
        )
        # The server would decode tokens of several slots in one batch, in other pieces than alone.
        self.table = SlotTable((), self.shelf, is_one_at_a_time=settings.reproducible)
        self.misses = SlotMisses(
            self.shelf,
            self.table,
            self.trust.kinds,
            aligned_to=settings.block_tokens if settings.reproducible else None,
        )
        self.answers = Answers()  # by namespace
        # Digests of the first blocks of prompts, each with its namespace.
        self._seen: LRUCache[bytes, None] = LRUCache(_MAX_SEEN)
        # The number of the last clear of each scope; None: the last one of all scopes.
        self._clears: LRUCache[bytes | None, int] = LRUCache(_MAX_CLEARS)
        self._n_clears = 0

    # -- saving and restoring a slot --------------------------------------------------------------

    def is_worth_saving(self, namespace: bytes | None, tokens: TokenIds) -> bool:
        """Return whether a slot that holds `tokens` should be saved."""
        if namespace is None or len(tokens) < self._settings.min_save_tokens:
            return False
        return bool(self.trust.kinds(adapters_of(namespace)))

    def name_for(self, slot: SlotRecord) -> str | None:
        """Return the name of the file to save a slot in, None if it should not be saved now.

        It should not if it is not worth it, if a file covers it, or if the budget is too small.
        """
        with slot.lock:
            slot.saving()
            if slot.namespace is None or not self.is_worth_saving(slot.namespace, slot.tokens):
                return None
            is_whole_only = self._is_whole_only(slot.namespace)
            if self.shelf.covers(
                slot.namespace, slot.tokens, slot.n_held, is_whole_only=is_whole_only
            ):
                return None
            if not self.shelf.make_room(int((self.trust.kv_bytes_per_token or 0) * slot.n_held)):
                self.trust.refuse("file_over_budget")
                slot.not_saved("file_over_budget")
                return None
            return self.shelf.name_for(slot.namespace, slot.tokens, slot.n_held)

    def saved(self, slot: SlotRecord, file: SlotFile) -> None:
        """Record that the server saved a slot, unless its scope was cleared meanwhile."""
        if file.n_tokens:
            self.trust.saved = file
        with slot.lock:
            if slot.namespace is None or slot.is_condemned:
                self.shelf.note_stale(file.filename)
                return
            slot.saved(file.n_tokens)
            self.shelf.add(
                file,
                slot.namespace,
                slot.tokens,
                n_prompt=slot.n_prompt,
                conversation=slot.conversation[1] if slot.conversation else None,
                is_pinned=slot.conversation in self.shelf.pinned,
                is_superseding=not self._is_whole_only(slot.namespace),
                gap=slot.gap,
                ends=slot.ends,
            )

    def _is_whole_only(self, namespace: bytes) -> bool:
        # If the server can't use a part of a file, a longer file does not replace a shorter one.
        # Nor does it where prompts part shortly before their ends, and a file ends at that place.
        adapters = adapters_of(namespace)
        is_needed = self.trust.n_apart(adapters) > 0 or PROMPT not in self.trust.kinds(adapters)
        return self._settings.reproducible or is_needed

    def not_saved(self, slot: SlotRecord, name: str, reason: str) -> None:
        """Record why a slot was not saved: its file may exist, maybe half written."""
        with self.table.lock:
            # An earlier file of this name, of the same contents, may be half overwritten.
            self.shelf.drop_name(name, reason)
            slot.not_saved(reason)

    def restored(self, slot: SlotRecord, file: SavedSlot) -> None:
        """Record that the server read `file` into a slot."""
        with self.table.lock:
            self.shelf.touch(file)
            slot.restored(file)

    def drop(self, file: SavedSlot) -> None:
        """Drop a file that can't be used."""
        with self.table.lock:
            self.shelf.drop(file, "restore_failed")

    def replaced(self, slot: SlotRecord, cause: str = "overwritten", *, n_kept: int = 0) -> None:
        """Remember that a slot is about to lose all but its first tokens, if no file has them."""
        with self.table.lock:
            namespace, tokens = slot.namespace, slot.tokens
            is_kept = len(tokens) <= n_kept or self._settings.reproducible
            # Nothing is remembered of a scope that was cleared.
            if namespace is None or is_kept or slot.is_condemned:
                return
            is_whole_only = self._is_whole_only(namespace)
            if self.shelf.covers(namespace, tokens, slot.n_held, is_whole_only=is_whole_only):
                return
            if cause == "overwritten":  # or rather: not saved before
                if not self.trust.can_save:
                    cause = "no_slot_save_path"
                elif len(tokens) < self._settings.min_save_tokens:
                    cause = "below_minimum"
                elif not self.trust.kinds(adapters_of(namespace)):
                    cause = "restore_not_used_by_server"
                elif slot.unsaved:
                    cause = slot.unsaved
                elif self.shelf.removals.has(namespace, tokens):
                    return  # its file was evicted
            self.shelf.removals.note(namespace, tokens, cause)

    def lose(self, slot: SlotRecord, cause: str) -> None:
        """Record that a slot's contents are gone or not known any more, and why."""
        with self.table.lock:
            self.replaced(slot, cause)
            slot.lost()

    def shared_head(self, namespace: bytes, heads: list[TokenIds]) -> TokenIds | None:
        """Return the longest of `heads`, a prompt's beginnings, that another prompt had too."""
        digests = [
            namespace + hashlib.blake2b(memoryview(head), digest_size=16).digest() for head in heads
        ]
        with self.table.lock:
            shared = [head for head, key in zip(heads, digests, strict=True) if key in self._seen]
            self._seen.update(dict.fromkeys(digests))
        return shared[-1] if shared else None

    # -- the server and its tenants ---------------------------------------------------------------

    def restarted(self, n_slots: int, *, is_first: bool, is_other: bool) -> None:
        """Reset the records for a new start of the server, maybe with another model."""
        with self.table.lock:
            if is_other:
                self.drop_files()
            # The new start may have a slot folder or context checkpoints.
            self.shelf.restrict(self.trust.restart())
            self.shelf.sweep()
            if is_first:
                self.shelf.take_stock()
            for slot in self.table.slots.values():
                self.replaced(slot, "server_restarted")
            self.table.reset_contents()
            self.table.resize(self._settings.slot_ids or range(n_slots))

    def drop_files(self) -> None:
        """Drop all files and records of slots: the server has another model.

        Everything that was learned about the old one is dropped, too.
        """
        with self.table.lock:
            self.trust.refuse("files_of_another_model", len(self.shelf))
            self.shelf.clear(cause="files_of_another_model")
            self.answers.clear()
            for slot in self.table.slots.values():
                self.lose(slot, "files_of_another_model")
            self.trust.reset()

    def clear(self, scope: bytes | None) -> list[SlotRecord]:
        """Clear a scope's files, pins and digests; return its slots, those in use condemned."""
        with self.table.lock:
            self._n_clears += 1
            self._clears[scope] = self._n_clears
            for file in list(self.shelf):
                if scope is None or scope_of(file.namespace) == scope:
                    self.shelf.drop(file)
            self.misses.clear(lambda each: scope in (None, scope_of(each)))
            self.answers.clear(lambda each: scope in (None, scope_of(each)))
            held = self.table.condemn(scope)
            self.shelf.pinned = {
                pin for pin in self.shelf.pinned if scope is not None and pin[0] != scope
            }
            for seen in [seen for seen in self._seen if scope in (None, scope_of(seen))]:
                del self._seen[seen]
        return held

    def cleared_at(self, scope: bytes) -> int:
        """Return a number that is another one once the scope was cleared.

        It may also change if the clears of a thousand other scopes displaced that of this one.
        """
        with self.table.lock:
            return max(self._clears.get(scope, 0), self._clears.get(None, 0))

    def stats(self) -> ReuseStats:
        """Return the counters."""
        with self.table.lock:
            counts, seconds, shelf = self.trust.counts, self.trust.seconds, self.shelf
            return ReuseStats(
                requests=counts["request"],
                hits=counts["hit"],
                prompt_tokens=counts["prompt_tokens"],
                context_tokens=counts["context_tokens"],
                restored_tokens=counts["restored_tokens"],
                restores=counts["restore"],
                saves=counts["save"],
                erases=counts["erase"],
                restarts=counts["restart"],
                evictions=shelf.n_evictions,
                restore_seconds=seconds["restore"],
                save_seconds=seconds["save"],
                n_files=len(shelf),
                n_bytes=shelf.n_bytes,
                n_stale_files=len(shelf.stale),
                n_stale_bytes=sum(shelf.stale.values()),
                is_folder_reachable=shelf.folder.is_reachable,
                refusals=dict(self.trust.refusals),
                misses={str(reason): n for reason, n in self.trust.misses.items()},
                missed_tokens={str(reason): n for reason, n in self.trust.missed_tokens.items()},
            )

    def abandon(self) -> None:
        """Start without records in the child of a fork: slots and files are the parent's."""
        self.shelf.abandon()
        self.table.abandon()
        self.answers.reset()
        self.trust.after_fork()
