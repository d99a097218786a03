"""Brings a slot to the state that a prompt starts from, before its completion is requested."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from tokcache.errors import ServerError, ServerRefused, ServerTimeout, ServerUnreachable
from tokcache.llama.server import calls
from tokcache.llama.server.checkpoints import distance
from tokcache.llama.server.job import Job, adapter_settings
from tokcache.llama.server.model import probe_tokens
from tokcache.llama.server.namespaces import NO_ADAPTERS
from tokcache.llama.server.table import Start
from tokcache.llama.server.trust import PROMPT

if TYPE_CHECKING:
    from tokcache.llama.server.records import Records
    from tokcache.llama.server.saver import Saver
    from tokcache.llama.server.settings import SlotSettings
    from tokcache.llama.server.steps import Steps
    from tokcache.llama.server.watch import Watch

_MIN_HEAD = 64  # tokens to decode, below which a second file saves less than it costs


class Preparation:
    """Checks the server, and saves, erases, restores and decodes as a prompt needs it.

    Threads: safe; each job has its slot alone.
    """

    def __init__(
        self, settings: SlotSettings, records: Records, saver: Saver, watch: Watch
    ) -> None:
        self._settings = settings
        self._records = records
        self._saver = saver
        self._watch = watch

    def connect(self) -> Steps[bool]:
        """Read the server's identity once; return False if its answers are not understood."""
        if self._watch.identity is not None:
            return True
        try:
            yield from self.refresh()
        except (ServerUnreachable, ServerTimeout):
            raise
        except ServerError as error:
            self._records.trust.degrade("server_not_understood", error)
            return False
        return True

    def refresh(self) -> Steps[None]:
        """Read the server's identity; reset the records if it was restarted or replaced."""
        identity = yield from self._watch.look_for_change()
        if identity is None:
            return
        with self._records.table.lock:
            known = self._watch.identity
            if identity == known:
                return  # another request noticed it first
            self._watch.identity = identity
            is_restart = known is not None and identity.props != known.props
            self._records.trust.count("restart", int(is_restart))
            self._records.restarted(
                identity.props.n_slots,
                is_first=known is None,
                is_other=known is not None and identity.state_key != known.state_key,
            )

    def prepare(self, job: Job) -> Steps[None]:
        """Bring the slot of a job to the state that its prompt starts from."""
        start = yield from self._checked(job)
        slot = start.slot
        job.parting = self._records.misses.parting(job.wish, start)
        if not slot.is_saved and len(slot.tokens) > start.n_live:
            yield from self._saver.save(slot)
        if job.parting is not None or not start.n_live:
            self._records.replaced(slot, n_kept=start.n_live)
        is_kept = start.n_live > 0 or (
            start.found is not None and slot.namespace == job.wish.namespace
        )
        if self._settings.reproducible or (slot.n_held and not is_kept):
            yield from self._saver.erase(slot)
        if start.found is not None:
            yield from self._restore(job, start)
        if self._settings.reproducible:
            yield from self._stage(job)
        elif n_apart := self._records.trust.n_apart(job.adapters):
            yield from self._stop_before_end(job, n_apart)

    def _checked(self, job: Job) -> Steps[Start]:
        """Check that the server is the one recorded, before sending ids or relying on a record."""
        start, table, trust = job.start, self._records.table, self._records.trust
        if start is None:
            raise ServerError("the request has no slot to prepare")
        try:
            yield from self.refresh()
            is_emptied = yield from self._compare_model(job)
            is_as_recorded = not is_emptied and job.epoch == table.epoch
            has_boot_mark = self._watch.props is not None and self._watch.props.boot
            if is_as_recorded and not has_boot_mark and start.n_live:
                # Restarts can't be recognised, so compare the slot's length with the server's list.
                listed = {each.id: each.n_tokens for each in (yield calls.slots())}
                slot = start.slot
                if listed.get(slot.id, -1) not in (None, slot.n_held):
                    trust.refuse("slot_changed_by_others")
                    self._records.lose(slot, "slot_changed_by_others")
                    is_as_recorded = False
        except (ServerUnreachable, ServerTimeout):
            raise
        except ServerError as error:
            # This may be another server: restore nothing into it.
            self._records.lose(start.slot, "server_not_understood")
            job.refusal = "server_not_understood"
            job.start = table.from_nothing(start)
            trust.degrade("server_not_understood", error)
            return job.start
        trust.went_well("server_not_understood")
        if not is_as_recorded:
            job.epoch = table.epoch
            start = job.start = table.again(start, job.wish)
        return start

    def _compare_model(self, job: Job) -> Steps[bool]:
        """Compare the model's probabilities, once per start; return whether that was done now."""
        table, watch = self._records.table, self._watch
        epoch = table.epoch
        if watch.compared_epoch == epoch:
            return False
        probabilities = yield from watch.probe(job.slot)
        with table.lock:
            if watch.compared_epoch == epoch or table.epoch != epoch:
                return True  # another request compared them first, or the server changed again
            if not watch.remember_and_compare(probabilities) and len(self._records.shelf):
                self._records.drop_files()
                table.reset_contents()
            watch.compared_epoch = table.epoch
        return True

    def _restore(self, job: Job, start: Start) -> Steps[None]:
        """Have the server read the file that was found into the slot."""
        slot, found, began = start.slot, start.found, perf_counter()
        records, trust = self._records, self._records.trust
        if found is None:
            return
        # llama-server empties a slot at the first request with other adapters, even if it was just
        # restored, so apply the request's adapters first. A request that names none empties
        # nothing. This decodes one token.
        if job.adapters not in (NO_ADAPTERS, slot.adapters):
            slot.reset()
            asked = {"n_predict": 0, "cache_prompt": False, "id_slot": slot.id}
            token = probe_tokens(self._watch.meta.n_vocab)[:1]
            yield calls.completion(token, {**asked, **adapter_settings(job.settings)})
            slot.loaded(job.adapters)
        job.start = Start(slot, 0, None)
        slot.lost()
        # If the scope is cleared meanwhile, its file is deleted or overwritten: then the failure is
        # not the server's.
        try:
            if not records.shelf.folder.is_intact(found.file.name, found.file.n_bytes):
                records.drop(found.file)
                job.refusal = "cleared" if slot.is_condemned else "restore_failed"
                trust.refuse(job.refusal)
                return
            restored = yield calls.restore_slot(slot.id, found.file.name)
        except ServerUnreachable as error:
            if not isinstance(error, ServerRefused):
                records.drop(found.file)  # reading it may have crashed the server
            raise
        except ServerError as error:
            records.drop(found.file)
            job.refusal = "cleared" if slot.is_condemned else "restore_failed"
            if slot.is_condemned:
                trust.refuse(job.refusal)
            else:
                trust.degrade(job.refusal, error)
            return
        finally:
            records.table.read(found.file)
        if restored.n_tokens != found.file.n_saved:
            records.drop(found.file)
            job.refusal = "cleared" if slot.is_condemned else "restore_failed"
            trust.refuse(job.refusal)
            yield from self._saver.erase(slot)
            return
        trust.count("restore", seconds=perf_counter() - began)
        trust.went_well("restore_failed")
        job.n_restored, job.kind = found.n_tokens, found.kind
        if found.kind == PROMPT:
            job.n_before = distance(found.n_tokens, found.file.ends)
            job.n_from_end = found.file.n_prompt - found.n_tokens
        records.restored(slot, found.file)

    def _stop_before_end(self, job: Job, n_apart: int) -> Steps[None]:
        """Decode a prompt up to its last `n_apart` tokens alone, and save the slot there."""
        head, slot = job.prompt[: len(job.prompt) - n_apart], job.slot
        if len(head) - job.n_promised < _MIN_HEAD:
            return
        settings = {"n_predict": 0, **adapter_settings(job.settings)}
        asked = Job(head, settings, job.wish, job.began, job.start, job.n_restored)
        slot.loaded(None)
        completion = yield asked.call()
        slot.loaded(job.adapters)
        job.n_used = completion.n_cached
        slot.decoded(job.wish.namespace, head, job.wish.conversation, n_used=job.n_used)
        yield from self._saver.save(slot)

    def _stage(self, job: Job) -> Steps[None]:
        """Decode a prompt's whole blocks alone and save them, so no bit depends on later tokens.

        A file can't be shortened exactly, so a beginning that prompts share gets its own file.
        """
        if not self._records.trust.kinds(job.adapters):
            return
        prompt, step, slot = job.prompt, self._settings.block_tokens, job.slot
        heads = [prompt[:n] for n in range(job.n_restored + step, len(prompt), step)]
        shared = self._records.shared_head(job.wish.namespace, heads)
        saved = heads[-1:] if shared is None else sorted({shared, *heads[-1:]}, key=len)
        settings = {"n_predict": 0, **adapter_settings(job.settings)}
        for head in saved:
            asked = Job(head, settings, job.wish, job.began, job.start, job.n_restored)
            asked.n_used = job.n_used
            slot.loaded(None)
            completion = yield asked.call()
            slot.loaded(job.adapters)
            job.n_used = completion.n_cached if job.n_used is None else job.n_used
            n_used = completion.n_cached
            slot.decoded(job.wish.namespace, head, job.wish.conversation, n_used=n_used)
            yield from self._saver.save(slot)
