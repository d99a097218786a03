"""The record of a context against a plain list of its positions, checked after every event."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.machines import assert_fails, effort
from tokcache.llama.context import MIXED, UNKNOWN, Alignment, ContextRecord, RecordCopy, n_shared
from tokcache.state.handles import Clears, Work

N_CTX = 24
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=9)
# Mostly one scope: tokens of two in one context end most claims.
SCOPES = st.sampled_from([None] * 6 + ["a", "b"])
ALIGNMENTS = st.builds(Alignment, st.booleans(), st.sampled_from([2, 4]))


@dataclass(frozen=True)
class Position:
    """One position: its token, whether that token alone wrote it, and together with which others.

    `start` and `stop` are those of the decode or restore; `block` is the length of the aligned
    blocks that were restored, 0 for a decode, None for any other way.
    """

    token: int
    is_known: bool
    start: int
    stop: int
    block: int | None


class ContextMachine(RuleBasedStateMachine):
    @initialize(alignment=ALIGNMENTS, n_batch=st.sampled_from([1, 2, 3, 8]))
    def begin(self, alignment: Alignment, n_batch: int) -> None:
        self.n_batch = n_batch
        self.record = ContextRecord(None, alignment)
        self.record.ids = np.full(N_CTX, 3, np.int32)  # of earlier prompts
        self.held: list[Position] = []
        self.logits: int | None = None
        self.scope: Any = None
        self.clears = Clears()
        self.work: Work | None = None
        self.copies: list[tuple[RecordCopy, list[Position], int | None, Any, Work | None]] = []

    # Decodes

    @rule(tokens=TOKENS, scope=SCOPES)
    def prefill(self, tokens: list[int], scope: str | None) -> None:
        """Decode as Llama.eval does in reproducible mode: each batch ends at a block multiple."""
        tokens = tokens[: N_CTX - len(self.held)]
        self.note_scope(scope)
        while tokens:
            n_block = self.record.alignment.block_tokens
            n = min(len(tokens), self.n_batch, n_block - len(self.held) % n_block)
            self.decode_batch(tokens[:n])
            tokens = tokens[n:]

    @rule(tokens=TOKENS, scope=SCOPES)
    def decode(self, tokens: list[int], scope: str | None) -> None:
        """Decode one batch of any length."""
        tokens = tokens[: min(self.n_batch, N_CTX - len(self.held))]
        self.note_scope(scope)
        if tokens:
            self.decode_batch(tokens)

    def note_scope(self, scope: str | None) -> None:
        self.record.tokens_begin(scope)
        if not self.held:
            if scope != self.scope:
                self.scope, self.work = scope, None
        elif scope != self.scope:
            self.scope = MIXED
            self.held = [replace(each, is_known=False) for each in self.held]

    def decode_batch(self, tokens: list[int]) -> None:
        start, stop = len(self.held), len(self.held) + len(tokens)
        self.record.update_begins()
        self.record.ids[start:stop] = tokens
        self.record.assigned(stop, is_intact=False)  # by llama_cpp
        self.record.decoded(self.n_batch)
        self.held += [Position(token, True, start, stop, 0) for token in tokens]
        self.logits = start

    @rule(n=st.integers(1, 5), is_rest_intact=st.booleans(), is_assigned=st.booleans())
    def decode_that_fails(self, n: int, is_rest_intact: bool, is_assigned: bool) -> None:
        stop = min(len(self.held) + n, N_CTX)
        self.record.update_begins()
        self.record.ids[len(self.held) : stop] = 2
        if is_assigned:
            self.record.assigned(stop, is_intact=False)
        self.record.decode_failed(is_rest_intact=is_rest_intact)
        self.held = self.held if is_rest_intact else []
        self.logits = None

    # Other events

    @rule(n=st.integers(1, 6))
    def image(self, n: int) -> None:
        """A chat handler writes positions without tokens."""
        stop = min(len(self.held) + n, N_CTX)
        self.record.assigned(stop, is_intact=True)
        n = stop - len(self.held)
        self.held += [Position(UNKNOWN, False, len(self.held), stop, None)] * n

    @rule(data=st.data(), is_intact=st.booleans())
    def go_back(self, data: st.DataObject, is_intact: bool) -> None:
        """llama_cpp or a caller assigns a smaller n_tokens; some memories can't go back."""
        n = data.draw(st.integers(0, len(self.held)))
        self.record.assigned(n, is_intact=is_intact)
        self.shorten(n)
        if not is_intact:
            self.held = [replace(each, is_known=False) for each in self.held]

    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        n = data.draw(st.integers(0, len(self.held)))
        self.record.trimmed(n)
        self.shorten(n)

    @rule()
    def reset(self) -> None:
        self.record.reset()
        self.shorten(0)

    def shorten(self, n_tokens: int) -> None:
        if n_tokens < len(self.held):
            self.logits = None
        self.held = self.held[:n_tokens]

    @rule(data=st.data(), tokens=TOKENS, scope=SCOPES)
    def restore(self, data: st.DataObject, tokens: list[int], scope: str | None) -> None:
        """Restore after a common prefix; in reproducible mode whole aligned blocks alone."""
        self.prompt(scope)
        is_reproducible, n_block = self.record.alignment
        start = data.draw(st.integers(0, len(self.held)))
        if is_reproducible:
            start = min(start, self.record.n_aligned) // n_block * n_block
            tokens = tokens[: len(tokens) // n_block * n_block]
        ids = [*(each.token for each in self.held[:start]), *tokens][:N_CTX]
        stop = len(ids)
        assume(stop > start)
        self.record.restored(start, np.array(ids, np.int32))
        block = n_block if is_reproducible else None
        written = [Position(token, True, start, stop, block) for token in ids[start:]]
        self.held = self.held[:start] + written
        self.logits = None

    @rule(scope=SCOPES)
    def prompt(self, scope: str | None) -> None:
        """A prompt may build on the positions of its own scope."""
        if scope != self.scope:
            self.record.reset()
            self.held = []
        work = Work(self.clears, scope)
        self.record.prompt_begins(scope, work, 7)
        self.scope, self.work, self.logits = scope, work, None

    @rule(scope=SCOPES)
    def request(self, scope: str | None) -> None:
        """A request for exactly the held prompt, which is public."""
        assume(self.scope is not MIXED)
        work = Work(self.clears, scope)
        self.record.request_begins(scope, work)
        self.scope, self.work = scope, work

    @rule(tokens=TOKENS, scope=SCOPES)
    def load_state(self, tokens: list[int], scope: str | None) -> None:
        self.record.update_begins()
        ids = np.full(N_CTX, 1, np.int32)
        ids[: len(tokens)] = tokens
        self.record.ids = ids
        self.record.assigned(len(tokens), is_intact=False)
        self.record.loaded(scope)
        self.held = [Position(token, False, 0, len(tokens), None) for token in tokens]
        self.scope, self.work, self.logits = scope, None, None

    @rule(alignment=ALIGNMENTS, is_other_cache=st.booleans())
    def change_settings(self, alignment: Alignment, is_other_cache: bool) -> None:
        self.record.realigned(alignment, is_other_cache=is_other_cache)
        assert self.record.n_aligned == 0
        self.work = None if is_other_cache else self.work

    @precondition(lambda self: self.work is not None)
    @rule()
    def clear_scope(self) -> None:
        assert self.work is not None
        self.clears.add(self.work.scope)

    # Suspended generations

    @rule()
    def suspend(self) -> None:
        kept = (self.record.copy(), list(self.held), self.logits, self.scope, self.work)
        self.copies.append(kept)

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        copy, *kept = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
        self.record.reset()
        self.record.prompt_begins(copy.scope, copy.work, copy.n_prompt)
        self.record.resumed(copy)
        self.held, self.logits, self.scope, self.work = kept

    # After every event

    def n_known(self) -> int:
        unknown = (n for n, each in enumerate(self.held) if not each.is_known)
        return next(unknown, len(self.held))

    def n_aligned(self) -> int:
        """Return how many positions are whole aligned blocks, by how each was written."""
        n_block, n = self.record.alignment.block_tokens, 0
        while n + n_block <= self.n_known():
            block = self.held[n : n + n_block]
            pieces = list(dict.fromkeys((each.start, each.stop) for each in block))
            starts = range(n, n + n_block, self.n_batch)
            as_always = [(at, min(at + self.n_batch, n + n_block)) for at in starts]
            is_decoded = all(each.block == 0 for each in block) and pieces == as_always
            if not is_decoded and not all(each.block == n_block for each in block):
                break
            n += n_block
        return n

    @invariant()
    def check(self) -> None:
        record = self.record
        record._check()
        assert record.held.tolist() == [each.token for each in self.held]
        assert record.n_known == self.n_known()
        assert record.n_aligned <= self.n_aligned()
        assert record.logits_from == self.logits
        assert record.scope is self.scope or record.scope == self.scope
        assert record.work is self.work
        assert record.is_cleared == (self.work is not None and self.work.is_void)
        is_reproducible = record.alignment.is_reproducible
        assert record.n_savable == (record.n_aligned if is_reproducible else record.n_known)
        assert record.may_hold(self.scope)
        ids = record.held.copy()
        assert record.holds_prompt(ids) == (self.logits is not None)
        assert not record.holds_prompt(np.append(ids, np.int32(0)))
        if record.is_repeatable:
            rest = self.held[record.n_aligned :]
            pieces = list(dict.fromkeys((each.start, each.stop) for each in rest))
            assert pieces == list(pairwise([*record.batches, len(self.held)]))


ContextMachine.TestCase.settings = effort(50, 30)
TestContextMachine = ContextMachine.TestCase


def test_logits_that_outlive_a_failed_decode_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = ContextRecord.decode_failed

    def forgetful(self: ContextRecord, *, is_rest_intact: bool) -> None:
        logits = self.logits_from
        failed(self, is_rest_intact=is_rest_intact)
        self.logits_from = logits

    monkeypatch.setattr(ContextRecord, "decode_failed", forgetful)
    assert_fails(ContextMachine)


# A record that never claims anything would pass the machine: these need the claims


def eval_tokens(record: ContextRecord, n: int, n_batch: int, scope: str | None = None) -> None:
    record.tokens_begin(scope)
    while n:
        n_block = record.alignment.block_tokens
        done = min(n, n_batch, n_block - record.n_tokens % n_block)
        record.update_begins()
        record.ids[record.n_tokens : record.n_tokens + done] = 5
        record.assigned(record.n_tokens + done, is_intact=False)
        record.decoded(n_batch)
        n -= done


def record_of(n: int = 0, *, n_batch: int = 4, is_reproducible: bool = True) -> ContextRecord:
    record = ContextRecord(None, Alignment(is_reproducible, 4))
    record.ids = np.zeros(64, np.int32)
    eval_tokens(record, n, n_batch)
    return record


@pytest.mark.parametrize("n_batch", [1, 3, 4, 9])
def test_a_prompt_is_aligned_up_to_its_last_whole_block(n_batch: int) -> None:
    record = record_of(4 * 4 + 3, n_batch=n_batch)
    assert (record.n_tokens, record.n_known, record.n_aligned) == (19, 19, 16)
    assert record.is_repeatable
    eval_tokens(record, 1, n_batch)  # a block that is completed by one token is not aligned
    assert record.n_aligned == (20 if n_batch in (1, 3) else 16)


def test_positions_after_a_cut_are_aligned_again() -> None:
    record = record_of(4 * 4 + 3)
    record.trimmed(10)
    assert (record.n_known, record.n_aligned) == (10, 8)
    assert not record.is_repeatable  # the batch of [8, 12) was cut
    record.trimmed(8)
    assert record.is_repeatable
    eval_tokens(record, 5, 4)
    assert (record.n_known, record.n_aligned, record.batches) == (13, 12, [12])


def test_a_restore_is_aligned_in_reproducible_mode_only() -> None:
    for is_reproducible in (True, False):
        record = record_of(4, is_reproducible=is_reproducible)
        record.restored(4, np.full(12, 5, np.int32))
        assert (record.n_known, record.n_aligned) == (12, 12 if is_reproducible else 0)
        assert record.is_repeatable == is_reproducible


def test_a_batch_that_was_cut_can_not_be_repeated() -> None:
    record = record_of(2)
    eval_tokens(record, 1, 4)
    assert record.is_repeatable
    record.trimmed(1)  # inside the first batch
    assert not record.is_repeatable


def test_a_restore_after_a_foreign_state_does_not_make_it_known() -> None:
    record = record_of(is_reproducible=False)
    record.update_begins()
    record.assigned(8, is_intact=False)
    record.loaded(None)
    record.restored(4, np.full(12, 5, np.int32))
    assert (record.n_tokens, record.n_known) == (12, 0)


def test_a_generation_is_not_aligned_after_a_change_of_settings() -> None:
    record = record_of(8)
    copy = record.copy()
    for n_block, n_aligned in ((8, 0), (4, 8)):
        record.realigned(Alignment(True, n_block))
        record.reset()
        record.resumed(copy)
        assert (record.n_known, record.n_aligned) == (8, n_aligned)


def test_tokens_of_two_scopes_belong_to_neither() -> None:
    record = record_of(8)
    eval_tokens(record, 8, 4, "a")
    assert (record.n_tokens, record.n_known, record.n_aligned) == (16, 0, 0)
    assert record.may_hold(None)
    assert record.may_hold("a")
    assert record.may_hold("b")  # it is not known which
    record.reset()
    eval_tokens(record, 8, 4, "a")
    assert (record.n_known, record.n_aligned) == (8, 8)
    assert not record.may_hold("b")


def test_a_position_that_no_token_wrote_matches_no_prompt() -> None:
    record = record_of(4)
    record.ids[4:] = 7  # of an earlier prompt
    record.assigned(8, is_intact=True)
    prompt = np.array([5] * 4 + [7] * 4, np.int32)
    assert n_shared(record.held, prompt) == 4
    assert n_shared(record.held, record.held) == 4  # nor itself
    assert not record.holds_prompt(prompt)


def test_the_claims_are_checked() -> None:
    """A control: the check finds a record that contradicts itself."""
    changes: dict[str, Any] = {
        "n_known": 9, "n_aligned": 3, "batches": [8, 4], "logits_from": 8, "scope": MIXED
    }  # fmt: skip
    for name, value in changes.items():
        record = record_of(8)
        record._check()
        setattr(record, name, value)
        with pytest.raises(AssertionError):
            record._check()
    record.update_begins()
    with pytest.raises(AssertionError):
        record._check()
