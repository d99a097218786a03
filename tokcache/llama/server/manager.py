"""The slot manager: starts every prompt from the slot or the saved file that holds most of it.

A request goes through these steps:
1. `begin()` connects, checks the prompt, and waits for a slot.
2. `Preparation` checks that the server is the one that we recorded, saves the slot's contents if no
   file has them, and restores a file if that gives the prompt more tokens.
3. The caller sends `job.call()`.
4. `finish()` compares the tokens that the slot should have held with `timings.cache_n`, which the
   server reports, records the slot's contents and has them saved. After an error, `fail()` records
   the part that is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tokcache._forks import Forkable, tell_of_forks
from tokcache._validate import require_scope
from tokcache.errors import (
    InvalidAnswer,
    InvalidConfig,
    InvalidTokens,
    PromptTooLong,
    RequestRejected,
    ServerError,
    ServerRefused,
    ServerUnreachable,
)
from tokcache.llama.explanation import explained
from tokcache.llama.server import calls
from tokcache.llama.server.checkpoints import ALL, gap_after
from tokcache.llama.server.job import Job
from tokcache.llama.server.misses import MAX_SHOWN, is_same_text
from tokcache.llama.server.namespaces import adapters_of, namespace_of, scope_key, scope_of
from tokcache.llama.server.preparation import Preparation
from tokcache.llama.server.records import Records
from tokcache.llama.server.results import Reused, ReuseStats
from tokcache.llama.server.saver import Saver
from tokcache.llama.server.slot import Condition
from tokcache.llama.server.table import Wish
from tokcache.llama.server.trust import WHOLE, is_mostly_used
from tokcache.llama.server.watch import Watch
from tokcache.state.reasons import MissReason
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from tokcache.llama.server.connection import Connection
    from tokcache.llama.server.results import Completion
    from tokcache.llama.server.settings import SlotSettings
    from tokcache.llama.server.steps import Steps
    from tokcache.state.reasons import Miss

_RESERVED = {"id_slot", "cache_prompt", "n_cache_reuse"}


class SlotManager(Forkable):
    """Routes prompts to slots, saves, restores and erases them, and counts.

    `connection` is for the threads that save in the background.

    Errors: ServerError and its subclasses; PromptTooLong before any slot is changed.
    Threads: safe, also in event loops. The child of a fork starts without records.
    """

    def __init__(
        self,
        connection: Connection,
        settings: SlotSettings,
        check_model: Callable[[], Steps[None]],
    ) -> None:
        self._url = connection.url
        self.settings = settings
        self.records = Records(connection.url, settings)
        self.table, self.trust = self.records.table, self.records.trust
        self.watch = Watch(settings.slot_ids, check_model)
        self._saver = Saver(connection, settings, self.records)
        self._preparation = Preparation(settings, self.records, self._saver, self.watch)
        tell_of_forks(self)

    def refresh(self) -> Steps[None]:
        """Read the server's identity; reset the records if it was restarted or replaced."""
        return self._preparation.refresh()

    # -- one request --------------------------------------------------------------------------

    def complete(
        self,
        prompt: TokenIds,
        settings: Mapping[str, Any],
        scope: str | None,
        conversation: str | None,
        *,
        explain: bool = False,
    ) -> Steps[Reused]:
        """Complete a prompt; with `explain`, return the texts where its reuse ended, too."""
        job = yield from self.begin(prompt, settings, scope, conversation)
        try:
            completion = yield job.call()
        except BaseException as error:
            self.fail(job, error)
            raise
        reused = self.finish(job, completion)
        if explain and reused.miss is not None:
            reused = yield from self._explained(job, reused, reused.miss)
        return reused

    def _explained(self, job: Job, reused: Reused, miss: Miss) -> Steps[Reused]:
        """Add the texts on both sides of the place where the reuse of a prompt ended.

        The answer is returned without them if the server does not give them.
        """
        parting, at = job.parting, miss.at_token
        after = parting.after if parting is not None and parting.n_same == at else TokenIds()
        try:
            shared = (yield calls.detokenize(job.prompt[:at].tolist())) if at else ""
            held = (yield calls.detokenize(after.tolist())) if after else ""
            new = yield calls.detokenize(job.prompt[at : at + MAX_SHOWN].tolist())
        except ServerError:
            self.trust.refuse("explanation_failed")
            return reused
        # The slot may have been released since, so its record does not show that.
        if self.records.cleared_at(scope_of(job.wish.namespace)) != job.cleared_at:
            return reused
        is_different = miss.reason is MissReason.DIFFERENT_TEXT
        is_generated = parting is not None and parting.is_generated
        if is_different and is_generated and is_same_text(held, new):
            miss = miss._replace(reason=MissReason.RE_ENCODING)
        found = explained(miss, shared, held, new)
        return replace(reused, miss=found.miss, explanation=found)

    def begin(
        self,
        prompt: TokenIds,
        settings: Mapping[str, Any],
        scope: str | None,
        conversation: str | None,
    ) -> Steps[Job]:
        """Get a slot and prepare it for the prompt."""
        reserved = _RESERVED & set(settings)
        if reserved:
            raise InvalidConfig(
                f"{', '.join(sorted(reserved))}: set by the slot manager; completion() takes them"
            )
        calls.require_settings(settings)
        namespace = namespace_of(require_scope(scope), settings.get("lora"))
        kinds = self.trust.kinds(adapters_of(namespace))
        if conversation is not None:
            _require_conversation(conversation)
        wish = Wish(
            namespace=namespace,
            prompt=prompt,
            conversation=(scope_of(namespace), conversation) if conversation is not None else None,
            kinds=kinds & {WHOLE} if self.settings.reproducible else kinds,
            too_far=self.trust.too_far(adapters_of(namespace)),
            is_file_only=self.settings.reproducible,
        )
        job = Job(prompt, dict(settings), wish)
        job.cleared_at = self.records.cleared_at(scope_of(namespace))
        if not (yield from self._preparation.connect()):
            return job
        self._require_servable(prompt)
        job.epoch = self.table.epoch
        future = self.table.acquire(wish)
        try:
            job.start = yield future
        except BaseException:
            self.table.cancel(future)
            raise
        try:
            yield from self._preparation.prepare(job)
        except BaseException as error:
            self.fail(job, error)
            raise
        return job

    def _require_servable(self, prompt: TokenIds) -> None:
        """Refuse ids outside the vocabulary and prompts that leave no room for an answer."""
        n_vocab = self.watch.meta.n_vocab
        extremes = (int(prompt.numpy().min()), int(prompt.numpy().max())) if prompt else ()
        for number in extremes:
            if number < 0 or (n_vocab is not None and number >= n_vocab):
                size = "of unknown size" if n_vocab is None else f"of {n_vocab:,} tokens"
                raise InvalidTokens(
                    f"token {number} is outside the vocabulary ({size}) of the model of"
                    f" {self._url}; encode the prompt with the model's own tokenizer"
                )
        n_ctx = self.watch.props.n_ctx if self.watch.props else 0
        if len(prompt) >= n_ctx > 0:
            raise PromptTooLong(
                f"the prompt has {len(prompt):,} tokens, a slot of {self._url} has room for"
                f" {n_ctx:,} including the answer; shorten it, or start the server with more"
                " context"
            )

    def finish(self, job: Job, completion: Completion) -> Reused:
        """Record the slot's contents after an answer, and have them saved."""
        later_s = completion.seconds - completion.first_token_s
        first_token_s = perf_counter() - job.began - later_s
        n_used = completion.n_cached if job.n_used is None else job.n_used
        try:
            self._count(job, completion, n_used)
            misses = self.records.misses
            misses.note_prefill(job, completion.n_prefilled, completion.first_token_s)
            miss = misses.find(job, n_used)
            if miss is not None:
                self.trust.count_miss(miss)
            if job.start is None:
                return Reused(completion, 0, first_token_s, miss=miss)
            slot, n_live = job.slot, job.start.n_live
            slot.loaded(job.adapters)
            self._verify(job, n_used)
            n_restored = min(job.n_restored, n_used)
            reused = Reused(completion, n_restored, first_token_s, n_live, slot.id, miss)
            with self.table.lock:
                is_kept = self._is_kept(job)
                if is_kept:
                    self._record(job, completion, n_used)
                job.is_over = True
                if is_kept and (slot.is_saved or self.settings.save_when != "answered"):
                    slot.release()
                    return reused
            steps = self._saver.save(slot) if is_kept else self._saver.erase(slot)
            self._saver.in_background(slot, steps)
        except BaseException as error:
            self.fail(job, error)
            raise
        return reused

    def _is_kept(self, job: Job) -> bool:
        """Return whether a request's state may be kept: same model, scope not cleared since."""
        return job.epoch == self.table.epoch and not job.slot.is_condemned

    def fail(self, job: Job, error: BaseException) -> None:
        """Release a slot after an error or an abort, once the server has finished with it."""
        if job.start is None or job.is_over:
            return
        if self.table.slots.get(job.slot.id) is not job.slot:
            return  # the server no longer has this slot, or it belongs to the parent of a fork
        job.is_over = True
        slot = job.slot
        slot.loaded(None)
        if job.start.found is not None:
            self.table.read(job.start.found.file)
        if isinstance(error, ServerRefused):
            self.records.lose(slot, "server_away")
        is_kept = self._is_kept(job)
        if isinstance(error, ServerRefused | RequestRejected) and is_kept:
            slot.release()
            return
        # Before the first token it is unknown whether the server has changed the slot.
        is_lost = isinstance(error, ServerUnreachable | InvalidAnswer)
        is_known = bool(job.received) and is_kept and not is_lost
        if is_known:
            slot.aborted(
                job.wish.namespace,
                _joined(job.prompt, job.received),
                job.wish.conversation,
                n_prompt=len(job.prompt),
                # Only the end of an answer reports how much the server used.
                gap=ALL if job.n_promised and self.trust.went_back else slot.gap,
            )
        self._saver.in_background(slot, self._saver.settle(slot, is_known=is_known))

    # -- after the completion ---------------------------------------------------------------------

    def _count(self, job: Job, completion: Completion, n_used: int) -> None:
        n_ctx = self.watch.props.n_ctx if self.watch.props else 0
        if (completion.n_held or 0) > n_ctx > 0:
            raise InvalidAnswer(
                f"{self._url} answered /completion: 'tokens_cached' is {completion.n_held:,} in a"
                f" slot for {n_ctx:,} tokens"
            )
        self.trust.count("request")
        self.trust.count("prompt_tokens", completion.n_prompt)
        # A restored file replaces all contents of the slot.
        self.trust.count("restored_tokens" if job.n_restored else "context_tokens", n_used)
        self.trust.count("hit", int(n_used > 0))

    def _verify(self, job: Job, n_used: int) -> None:
        self.trust.went_back |= 0 < n_used < job.n_promised
        if job.n_restored:
            self.trust.note_parting(job.adapters, job.n_from_end, job.n_restored - n_used)
            if self.trust.verify(job.adapters, job.kind, job.n_restored, n_used, job.n_before):
                with self.table.lock:
                    self.records.shelf.clear(job.adapters, cause="restore_not_used_by_server")
        elif not is_mostly_used(job.n_promised, n_used):
            self.trust.refuse("slot_not_used_by_server")
        elif job.n_promised:
            self.trust.went_well("slot_not_used_by_server")

    def _record(self, job: Job, completion: Completion, n_used: int) -> None:
        slot = job.slot
        n_expected = completion.n_prompt + max(0, completion.n_predicted - 1)
        n_held = n_expected if completion.n_held is None else completion.n_held
        n_promised, n_prompt = job.n_promised, completion.n_prompt
        gap = gap_after(slot.gap, n_promised=n_promised, n_used=n_used, n_prompt=n_prompt)
        if completion.is_truncated and n_held != n_expected:
            # The server shifted the context: it no longer holds the tokens that were sent.
            slot.decoded(job.wish.namespace, job.prompt, job.wish.conversation, n_used=n_used)
            self.records.lose(slot, "context_shifted")
            return
        namespace = job.wish.namespace
        tokens = _joined(job.prompt, completion.token_ids)[:n_held]
        slot.answered(
            namespace,
            tokens,
            job.wish.conversation,
            n_prompt=min(len(job.prompt), len(tokens)),
            n_held=n_held,
            n_used=n_used,
            gap=gap,
            # Reproducible mode saved the blocks before: it never restores a file with an answer.
            is_saved=self.settings.reproducible
            or not self.records.is_worth_saving(namespace, tokens),
        )

    # -- administration ---------------------------------------------------------------

    def pin(self, conversation: str, scope: str | None, *, is_pinned: bool) -> None:
        """Keep a conversation's slot and files from eviction, or allow it again."""
        key = (scope_key(require_scope(scope)), _require_conversation(conversation))
        with self.table.lock:
            self.records.shelf.pin(key, is_pinned=is_pinned)

    def clear(self, scope: str | None) -> Steps[None]:
        """Clear a scope's records and erase its slots and files; without a scope, all of them.

        Slots in use are erased after their requests.
        """
        key = None if scope is None else scope_key(require_scope(scope))
        failure: ServerError | None = None
        for slot in self.records.clear(key):
            try:
                saving = self._saver.pending(slot)
                if saving is not None and slot.condition is Condition.SETTLING:
                    yield saving
                if not self.table.take(slot):
                    continue  # condemned: the saver empties it after its request
                try:
                    # While we waited, another request may have filled the slot for another scope.
                    if slot.namespace is not None and key in (None, scope_of(slot.namespace)):
                        yield from self._saver.empty(slot)
                finally:
                    slot.release()
            except ServerError as error:  # go on, and erase the other slots
                failure = error
        if failure is not None:
            raise failure
        yield from self._overwrite_stale()

    def _overwrite_stale(self) -> Steps[None]:
        """Have the server overwrite dropped files that can't be deleted here with an empty slot."""
        shelf = self.records.shelf
        with self.table.lock:
            names = list(shelf.stale)
        if not names or not self.trust.can_save:
            return
        # An empty wish matches no slot, so this waits its turn and gets the least valuable one.
        future = self.table.acquire(Wish(b"", TokenIds(), None, frozenset()))
        try:
            slot = (yield future).slot
        except BaseException:
            self.table.cancel(future)
            raise
        try:
            yield from self._saver.empty(slot)
            for name in names:
                written = yield calls.save_slot(slot.id, name)
                with self.table.lock:
                    if name in shelf.stale:
                        shelf.stale[name] = written.n_bytes
        finally:
            slot.release()

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until all pending saves are done."""
        self._saver.flush(timeout_s)

    def close(self) -> None:
        """Wait until all pending saves are done; the files stay."""
        self._saver.close()

    def stats(self) -> ReuseStats:
        """Return the counters."""
        return self.records.stats()

    def before_fork(self) -> None:
        """Take the lock, so that no other thread holds it at the fork."""
        self.table.lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        self.table.lock.release()

    def after_fork_in_child(self) -> None:
        """Start without records: the slots' contents and the files belong to the parent."""
        self.records.abandon()
        self.watch.reset()
        self._saver.after_fork()


def _require_conversation(name: Any) -> str:
    if isinstance(name, str):
        return name
    raise InvalidConfig(f"conversation must be a str, not {type(name).__name__}")


def _joined(prompt: TokenIds, answer: Iterable[int]) -> TokenIds:
    return TokenIds(np.concatenate([prompt.numpy(), np.fromiter(answer, np.int32)]))
