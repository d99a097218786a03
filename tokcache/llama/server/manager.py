"""The slot manager: starts every prompt from the slot or the saved file that holds most of it.

A request goes through these steps:
1. `begin()` connects, checks the prompt, and waits for a slot.
2. It checks that the server is the one that we recorded, saves the slot's contents if no file has
   them, and restores a file if that gives the prompt more tokens.
3. The caller sends `job.call()`.
4. `finish()` compares the tokens that the slot should have held with `timings.cache_n`, which the
   server reports, records the slot's contents and has them saved. After an error, `fail()` records
   the part that is certain.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from cachetools import LRUCache

from tokcache._forks import Forkable, tell_of_forks
from tokcache._validate import require_scope, require_size
from tokcache.errors import (
    InvalidAnswer,
    InvalidConfig,
    InvalidTokens,
    PromptTooLong,
    RequestRejected,
    ServerError,
    ServerRefused,
    ServerTimeout,
    ServerUnreachable,
)
from tokcache.llama.server import calls
from tokcache.llama.server.checkpoints import ALL, gap_after
from tokcache.llama.server.model import probe_tokens
from tokcache.llama.server.results import Reused, ReuseStats
from tokcache.llama.server.saver import Saver
from tokcache.llama.server.settings import PART_TOKENS, SlotSettings
from tokcache.llama.server.shelf import (
    NO_ADAPTERS,
    SavedSlot,
    Shelf,
    adapters_of,
    namespace_of,
    scope_key,
    scope_of,
)
from tokcache.llama.server.slot import Condition, SlotRecord
from tokcache.llama.server.table import SlotTable, Start, Wish
from tokcache.llama.server.trust import WHOLE, Trust, is_mostly_used
from tokcache.llama.server.watch import Watch
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from tokcache.llama.server.calls import Call
    from tokcache.llama.server.connection import Connection
    from tokcache.llama.server.results import Completion
    from tokcache.llama.server.steps import Steps

_MAX_SEEN = 65_536
_RESERVED = {"id_slot", "cache_prompt", "n_cache_reuse"}


@dataclass(eq=False, slots=True)
class Job:
    """One request and the slot that it starts from; `start` is None if nothing can be reused."""

    prompt: TokenIds
    settings: dict[str, Any]
    wish: Wish
    started: float = field(default_factory=perf_counter)
    start: Start | None = None
    n_restored: int = 0
    kind: str = WHOLE
    # Tokens that the server reused in the first of several completions; None before the first.
    n_used: int | None = None
    received: list[int] = field(default_factory=list)
    is_over: bool = False
    epoch: int = 0

    @property
    def adapters(self) -> bytes:
        """The key of the adapters that the prompt is decoded with."""
        return adapters_of(self.wish.namespace)

    @property
    def n_promised(self) -> int:
        """The prompt's first tokens that the slot holds by our own record."""
        if self.start is None:
            return 0
        return self.n_restored or self.start.n_live

    def call(self, *, is_stream: bool = False) -> Call[Completion]:
        """Return the request for the server."""
        own: dict[str, Any] = {
            "cache_prompt": self.n_used is not None or self.n_promised > 0,
            "n_cache_reuse": 0,  # shifted states differ from the prompt's
        }
        if self.start is not None:
            own["id_slot"] = self.start.slot.id
        return calls.completion(self.prompt, {**self.settings, **own}, is_stream)


class SlotManager(Forkable):
    """Routes prompts to slots, saves, restores and erases them, and counts.

    Errors: ServerError and its subclasses; PromptTooLong before any slot is changed.
    Threads: safe, also in event loops. The child of a fork starts without records.
    """

    def __init__(
        self,
        connection: Connection,
        settings: SlotSettings,
        check_model: Callable[[], Steps[None]],
    ) -> None:
        self._connection = connection
        self.settings = settings
        self.trust = Trust(
            connection.url,
            is_strict=settings.on_error == "raise",
            is_reproducible=settings.reproducible,
        )
        self._shelf = _shelf(settings, self.trust)
        # The server would decode tokens of several slots in one batch, in other pieces than alone.
        self.table = SlotTable((), self._shelf, is_one_at_a_time=settings.reproducible)
        self._saver = Saver(connection, settings, self._shelf, self.trust)
        self.watch = Watch(settings, self.table, self._shelf, self.trust, check_model)
        self._seen: LRUCache[bytes, None] = LRUCache(_MAX_SEEN)
        tell_of_forks(self)

    @property
    def refusals(self) -> Counter[str]:
        """Counts of things that were not reused, saved or kept, by reason."""
        return self.trust.refusals

    # -- one request --------------------------------------------------------------------------

    def complete(
        self,
        prompt: TokenIds,
        settings: Mapping[str, Any],
        scope: str | None,
        conversation: str | None,
    ) -> Steps[Reused]:
        """Complete a prompt."""
        job = yield from self.begin(prompt, settings, scope, conversation)
        try:
            completion = yield job.call()
        except BaseException as error:
            self.fail(job, error)
            raise
        return self.finish(job, completion)

    def begin(
        self,
        prompt: TokenIds,
        settings: Mapping[str, Any],
        scope: str | None,
        conversation: str | None,
    ) -> Steps[Job]:
        """Get a slot and prepare it for the prompt."""
        job = self._job(prompt, settings, scope, conversation)
        if not (yield from self.watch.connect()):
            return job
        self._require_servable(prompt)
        job.epoch = self.watch.epoch
        future = self.table.acquire(job.wish)
        try:
            job.start = yield future
        except BaseException:
            self.table.cancel(future)
            raise
        try:
            yield from self._prepare(job)
        except BaseException as error:
            self.fail(job, error)
            raise
        return job

    def finish(self, job: Job, completion: Completion) -> Reused:
        """Record the slot's contents after an answer, and have them saved."""
        try:
            return self._finished(job, completion)
        except BaseException as error:
            self.fail(job, error)
            raise

    def _finished(self, job: Job, completion: Completion) -> Reused:
        n_ctx = self.watch.props.n_ctx if self.watch.props else 0
        if (completion.n_held or 0) > n_ctx > 0:
            raise InvalidAnswer(
                f"{self._connection.url} answered /completion: 'tokens_cached' is"
                f" {completion.n_held:,} in a slot for {n_ctx:,} tokens"
            )
        later_s = completion.seconds - completion.first_token_s
        first_token_s = perf_counter() - job.started - later_s
        n_used = completion.n_cached if job.n_used is None else job.n_used
        self.trust.count("request")
        self.trust.count("prompt_tokens", completion.n_prompt)
        # A restored file replaces all contents of the slot.
        self.trust.count("restored_tokens" if job.n_restored else "context_tokens", n_used)
        self.trust.count("hit", int(n_used > 0))
        if job.start is None:
            return Reused(completion, 0, first_token_s)
        slot, n_live = job.start.slot, job.start.n_live
        slot.loaded(job.adapters)
        self._verify(job, n_used)
        reused = Reused(completion, min(job.n_restored, n_used), first_token_s, n_live, slot.id)
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
        return reused

    def _is_kept(self, job: Job) -> bool:
        """Return whether a request's state may be kept: same model, scope not cleared since."""
        return job.epoch == self.table.epoch and not _started(job).slot.is_condemned

    def fail(self, job: Job, error: BaseException) -> None:
        """Release a slot after an error or an abort, once the server has finished with it."""
        if job.start is None or job.is_over:
            return
        if self.table.slots.get(job.start.slot.id) is not job.start.slot:
            return  # the server no longer has this slot, or it belongs to the parent of a fork
        job.is_over = True
        slot = job.start.slot
        slot.loaded(None)
        if job.start.found is not None:
            self.table.read(job.start.found.file)
        if isinstance(error, ServerRefused):
            slot.lost()
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

    # -- before the completion ----------------------------------------------------------------

    def _job(
        self,
        prompt: TokenIds,
        settings: Mapping[str, Any],
        scope: str | None,
        conversation: str | None,
    ) -> Job:
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
            is_file_only=self.settings.reproducible,
        )
        return Job(prompt, dict(settings), wish)

    def _require_servable(self, prompt: TokenIds) -> None:
        """Refuse ids outside the vocabulary and prompts that leave no room for an answer."""
        n_vocab = self.watch.meta.n_vocab
        extremes = (int(prompt.numpy().min()), int(prompt.numpy().max())) if prompt else ()
        for number in extremes:
            if number < 0 or (n_vocab is not None and number >= n_vocab):
                size = "of unknown size" if n_vocab is None else f"of {n_vocab:,} tokens"
                raise InvalidTokens(
                    f"token {number} is outside the vocabulary ({size}) of the model of"
                    f" {self._connection.url}; encode the prompt with the model's own tokenizer"
                )
        n_ctx = self.watch.props.n_ctx if self.watch.props else 0
        if len(prompt) >= n_ctx > 0:
            raise PromptTooLong(
                f"the prompt has {len(prompt):,} tokens, a slot of {self._connection.url} has room"
                f" for {n_ctx:,} including the answer; shorten it, or start the server with more"
                " context"
            )

    def _prepare(self, job: Job) -> Steps[None]:
        start = yield from self._checked(job)
        slot = start.slot
        if not slot.is_saved and len(slot.tokens) > start.n_live:
            yield from self._saver.save(slot)
        is_kept = start.n_live > 0 or (
            start.found is not None and slot.namespace == job.wish.namespace
        )
        if self.settings.reproducible or (slot.n_held and not is_kept):
            yield from self._saver.erase(slot)
        if start.found is not None:
            yield from self._bring_adapters(job, slot)
            yield from self._restore(job, start)
        if self.settings.reproducible:
            yield from self._stage(job, slot)

    def _checked(self, job: Job) -> Steps[Start]:
        """Check that the server is the one recorded, before sending ids or relying on a record."""
        start = _started(job)
        try:
            props = yield from self.watch.refresh()
            is_emptied = yield from self.watch.check_in(start.slot)
            is_as_recorded = not is_emptied and job.epoch == self.watch.epoch
            if is_as_recorded and not props.boot and start.n_live:
                is_as_recorded = yield from self._is_as_full_as_recorded(start.slot)
        except (ServerUnreachable, ServerTimeout):
            raise
        except ServerError as error:
            # This may be another server: restore nothing into it.
            start.slot.lost()
            job.start = self.table.from_nothing(start)
            self.trust.degrade("server_not_understood", error)
            return job.start
        self.trust.went_well("server_not_understood")
        if not is_as_recorded:
            job.epoch = self.watch.epoch
            job.start = self.table.again(start, job.wish)
        return _started(job)

    def _is_as_full_as_recorded(self, slot: SlotRecord) -> Steps[bool]:
        """Compare a slot's length with the server's list, if restarts can't be recognised."""
        listed = {each.id: each for each in (yield calls.slots())}
        seen = listed.get(slot.id)
        if seen is not None and seen.n_tokens in (None, slot.n_held):
            return True
        self.trust.refuse("slot_changed_by_others")
        slot.lost()
        return False

    def _bring_adapters(self, job: Job, slot: SlotRecord) -> Steps[None]:
        """Apply a request's adapters to a slot before it is restored.

        llama-server empties a slot at the first request with other adapters, even if it was just
        restored. A request that names no adapters empties nothing.

        Cost: decodes one token and empties the slot.
        """
        if job.adapters in (NO_ADAPTERS, slot.adapters):
            return
        slot.reset()
        asked = {"n_predict": 0, "cache_prompt": False, "id_slot": slot.id}
        token = probe_tokens(self.watch.meta.n_vocab)[:1]
        yield calls.completion(token, {**asked, **_adapter_settings(job.settings)})
        slot.loaded(job.adapters)

    def _restore(self, job: Job, start: Start) -> Steps[None]:
        if start.found is None:
            return
        slot, found, began = start.slot, start.found, perf_counter()
        job.start = Start(slot, 0, None)
        slot.lost()
        try:
            if not self._shelf.is_intact(found.file):
                self._drop(found.file)
                self.trust.refuse("cleared" if slot.is_condemned else "restore_failed")
                return
            restored = yield calls.restore_slot(slot.id, found.file.name)
        except ServerUnreachable as error:
            if not isinstance(error, ServerRefused):
                self._drop(found.file)  # reading it may have crashed the server
            raise
        except ServerError as error:
            self._drop(found.file)
            if slot.is_condemned:  # its file was removed while the server read it
                self.trust.refuse("cleared")
            else:
                self.trust.degrade("restore_failed", error)
            return
        finally:
            self.table.read(found.file)
        if restored.n_tokens != found.file.n_saved:
            self._drop(found.file)
            self.trust.refuse("restore_failed")
            yield from self._saver.erase(slot)
            return
        self.trust.count("restore", seconds=perf_counter() - began)
        self.trust.went_well("restore_failed")
        job.n_restored, job.kind = found.n_tokens, found.kind
        with self.table.lock:
            self._shelf.touch(found.file)
            slot.restored(found.file)

    def _stage(self, job: Job, slot: SlotRecord) -> Steps[None]:
        """Decode a prompt's whole blocks alone and save them, so no bit depends on later tokens.

        A file can't be shortened exactly, so a beginning that prompts share gets its own file.
        """
        settings = {"n_predict": 0, **_adapter_settings(job.settings)}
        for head in self._heads(job):
            asked = Job(head, settings, job.wish, job.started, job.start, job.n_restored)
            asked.n_used = job.n_used
            slot.loaded(None)
            completion = yield asked.call()
            slot.loaded(job.adapters)
            job.n_used = completion.n_cached if job.n_used is None else job.n_used
            slot.decoded(job.wish.namespace, head, job.wish.conversation)
            yield from self._saver.save(slot)

    def _heads(self, job: Job) -> list[TokenIds]:
        if not self.trust.kinds(job.adapters):
            return []
        prompt, step = job.prompt, self.settings.block_tokens
        heads = [prompt[:n] for n in range(job.n_restored + step, len(prompt), step)]
        namespace = job.wish.namespace
        digests = [
            namespace + hashlib.blake2b(memoryview(head), digest_size=16).digest() for head in heads
        ]
        with self.table.lock:
            shared = [head for head, key in zip(heads, digests, strict=True) if key in self._seen]
            self._seen.update(dict.fromkeys(digests))
        return sorted({*shared[-1:], *heads[-1:]}, key=len)

    # -- after the completion ---------------------------------------------------------------------

    def _verify(self, job: Job, n_used: int) -> None:
        self.trust.went_back |= 0 < n_used < job.n_promised
        if job.n_restored:
            if self.trust.verify(job.adapters, job.kind, job.n_restored, n_used):
                with self.table.lock:
                    self._shelf.clear(job.adapters)
        elif not is_mostly_used(job.n_promised, n_used):
            self.trust.refuse("slot_not_used_by_server")
        elif job.n_promised:
            self.trust.went_well("slot_not_used_by_server")

    def _record(self, job: Job, completion: Completion, n_used: int) -> None:
        slot = _started(job).slot
        n_expected = completion.n_prompt + max(0, completion.n_predicted - 1)
        n_held = n_expected if completion.n_held is None else completion.n_held
        n_promised, n_prompt = job.n_promised, completion.n_prompt
        gap = gap_after(slot.gap, n_promised=n_promised, n_used=n_used, n_prompt=n_prompt)
        if completion.is_truncated and n_held != n_expected:
            slot.lost()  # the server shifted the context: it no longer holds the tokens sent
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
            or not self._saver.is_worth_saving(namespace, tokens),
        )

    def _drop(self, file: SavedSlot) -> None:
        with self.table.lock:
            self._shelf.drop(file)

    # -- administration ---------------------------------------------------------------

    def pin(self, conversation: str, scope: str | None, *, is_pinned: bool) -> None:
        """Keep a conversation's slot and files from eviction, or allow it again."""
        key = (scope_key(require_scope(scope)), _require_conversation(conversation))
        with self.table.lock:
            self._shelf.pin(key, is_pinned=is_pinned)

    def clear(self, scope: str | None) -> Steps[None]:
        """Clear a scope's records and erase its slots and files; without a scope, all of them.

        Slots in use are erased after their requests.
        """
        key = None if scope is None else scope_key(require_scope(scope))
        with self.table.lock:
            for file in list(self._shelf):
                if key is None or scope_of(file.namespace) == key:
                    self._shelf.drop(file)
            held = self.table.condemn(key)
            self._shelf.pinned = {pin for pin in self._shelf.pinned if key not in (None, pin[0])}
            for seen in [seen for seen in self._seen if key in (None, scope_of(seen))]:
                del self._seen[seen]
        failure: ServerError | None = None
        for slot in held:
            try:
                saving = self._saver.pending(slot)
                if saving is not None and slot.condition is Condition.SETTLING:
                    yield saving
                yield from self._empty_when_idle(slot, key)
            except ServerError as error:  # go on, and erase the other slots
                failure = error
        if failure is not None:
            raise failure
        yield from self._overwrite_stale()

    def _empty_when_idle(self, slot: SlotRecord, scope: bytes | None) -> Steps[None]:
        if not self.table.take(slot):
            return
        try:
            if slot.namespace is not None and scope in (None, scope_of(slot.namespace)):
                yield from self._saver.empty(slot)
        finally:
            slot.release()

    def _overwrite_stale(self) -> Steps[None]:
        """Have the server overwrite dropped files that can't be deleted here with an empty slot."""
        with self.table.lock:
            names = self._shelf.stale_names()
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
                    self._shelf.note_overwritten(name, written.n_bytes)
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
        with self.table.lock:
            counts, shelf = self.trust.counts, self._shelf
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
                restore_seconds=self.trust.seconds["restore"],
                save_seconds=self.trust.seconds["save"],
                n_files=len(shelf),
                n_bytes=shelf.n_bytes,
                n_stale_files=shelf.n_stale_files,
                n_stale_bytes=shelf.n_stale_bytes,
                is_folder_reachable=shelf.is_folder_reachable,
                refusals=dict(self.refusals),
            )

    def before_fork(self) -> None:
        """Take the lock, so that no other thread holds it at the fork."""
        self.table.lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        self.table.lock.release()

    def after_fork_in_child(self) -> None:
        """Start without records: the slots' contents and the files belong to the parent."""
        self._shelf.abandon()
        self.table.abandon()
        self.watch.reset()
        self.trust.after_fork()
        self._saver.after_fork()


def _started(job: Job) -> Start:
    if job.start is None:
        raise ServerError("the request has no slot to prepare")
    return job.start


def _adapter_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a request that change the states it decodes.

    Source: only `lora` does; it makes llama-server empty a slot (launch_slot_with_task in
    server-context.cpp).
    """
    return {name: settings[name] for name in ("lora",) if name in settings}


def _require_conversation(name: Any) -> str:
    if isinstance(name, str):
        return name
    raise InvalidConfig(f"conversation must be a str, not {type(name).__name__}")


def _shelf(settings: SlotSettings, trust: Trust) -> Shelf:
    step = min(PART_TOKENS, settings.block_tokens) if settings.reproducible else PART_TOKENS
    return Shelf(
        max_bytes=require_size("max_bytes", settings.max_bytes),
        max_age_s=settings.max_age_s,
        folder=Path(settings.slot_folder) if settings.slot_folder is not None else None,
        step=step,
        trust=trust,
    )


def _joined(prompt: TokenIds, answer: Iterable[int]) -> TokenIds:
    return TokenIds(np.concatenate([prompt.numpy(), np.fromiter(answer, np.int32)]))
