"""The slots of a server and its saved files: requests in any order, with clears and restarts.

The model knows what each slot really holds and which request has it. No server is involved: the
machine does what the session and the saver do with the records.
"""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.machines import assert_fails, effort
from tokcache import TokenIds
from tokcache._prefix import n_common
from tokcache.llama.server import table as table_module
from tokcache.llama.server.checkpoints import NO_GAP
from tokcache.llama.server.namespaces import namespace_of, scope_key
from tokcache.llama.server.records import Records
from tokcache.llama.server.results import SlotFile
from tokcache.llama.server.settings import SlotSettings
from tokcache.llama.server.shelf import Shelf
from tokcache.llama.server.slot import Condition, SlotRecord
from tokcache.llama.server.table import SlotTable, Start, Wish
from tokcache.llama.server.trust import KINDS

N_SLOTS, MAX_BYTES = 2, 600
# Prompts of few blocks, so that they share beginnings.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(
    lambda drawn: tuple(token for token in drawn for _ in range(40))
)
SCOPES = st.sampled_from([None, "a", "b"])
Tokens = tuple[int, ...]


class SlotTableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        settings = SlotSettings(max_bytes=MAX_BYTES, min_save_tokens=8)
        self.records = Records("http://127.0.0.1:9", settings)
        self.records.table.resize(range(N_SLOTS))
        self.table, self.shelf = self.records.table, self.records.shelf
        self.waiting: list[tuple[Future[Start], str | None, Tokens]] = []
        self.running: list[tuple[Start, str | None, Tokens]] = []
        self.settling: list[SlotRecord] = []
        # The scope and tokens that the server really has in each slot, and in each file.
        self.held: dict[int, tuple[str | None, Tokens]] = {}
        self.files: dict[str, tuple[str | None, Tokens]] = {}

    # ---- requests

    @rule(scope=SCOPES, prompt=PROMPTS)
    def ask(self, scope: str | None, prompt: Tokens) -> None:
        wish = Wish(namespace_of(scope), TokenIds(prompt), None, KINDS)
        self.waiting.append((self.table.acquire(wish), scope, prompt))
        self.take_starts()

    def take_starts(self) -> None:
        """Prepare the slots of the requests that have one by now, as a session does."""
        for each in list(self.waiting):
            future, scope, prompt = each
            if not future.done():
                continue
            self.waiting.remove(each)
            start = future.result()
            slot = start.slot
            assert slot.condition is Condition.BUSY
            assert all(other.slot is not slot for other, _, _ in self.running)
            assert slot not in self.settling
            if start.found is not None:
                assert start.n_live == 0
                file_scope, tokens = self.files[start.found.file.name]
                assert file_scope == scope  # a file of another scope is never restored
                assert tokens[: start.n_promised] == prompt[: start.n_promised]
                self.records.restored(slot, start.found.file)
                self.held[slot.id] = file_scope, tokens
                self.table.read(start.found.file)
            elif start.n_live:
                held_scope, tokens = self.held[slot.id]
                assert held_scope == scope  # nor are another scope's live tokens continued
                assert tokens[: start.n_live] == prompt[: start.n_live]
            assert start.n_promised < len(prompt)
            self.running.append((start, scope, prompt))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        future, _, _ = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.table.cancel(future)
        with pytest.raises(CancelledError):
            future.result(0)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), answer=st.lists(st.integers(0, 1), max_size=20))
    def answer(self, data: st.DataObject, answer: list[int]) -> None:
        self.end(data.draw(st.integers(0, len(self.running) - 1)), answer)

    @rule(asked=st.lists(st.tuples(SCOPES, PROMPTS), min_size=1, max_size=5))
    def serve(self, asked: list[tuple[str | None, Tokens]]) -> None:
        """Serve requests one after the other from beginning to end, and save their slots."""
        for scope, prompt in asked:
            self.ask(scope, prompt)
            if self.running:
                self.end(len(self.running) - 1, [1])
            if self.settling:
                self.settle_first(is_saved=True)

    def end(self, number: int, answer: list[int]) -> None:
        start, scope, prompt = self.running.pop(number)
        whole, slot = (*prompt, *answer), start.slot
        self.records.replaced(slot, n_kept=n_common(slot.tokens, TokenIds(whole)))
        slot.answered(
            namespace_of(scope),
            TokenIds(whole),
            None,
            n_prompt=len(prompt),
            n_held=len(whole),
            n_used=start.n_promised,
            gap=NO_GAP,
            is_saved=False,
        )
        self.held[slot.id] = scope, whole
        slot.settle()
        self.settling.append(slot)
        self.take_starts()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        start, _, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.records.lose(start.slot, "cut_off")
        self.held.pop(start.slot.id, None)
        start.slot.release()
        self.take_starts()

    @precondition(lambda self: self.settling)
    @rule(is_saved=st.booleans())
    def settle(self, is_saved: bool) -> None:
        self.settle_first(is_saved=is_saved)

    def settle_first(self, *, is_saved: bool) -> None:
        """Save a slot, or fail to, or erase it, as the saver does."""
        slot = self.settling.pop(0)
        if slot.is_condemned:
            self.held.pop(slot.id, None)
            slot.lost()
        elif (name := self.records.name_for(slot)) is not None:
            scope, tokens = self.held[slot.id]
            if is_saved:
                self.records.saved(slot, SlotFile(name, len(tokens), len(tokens)))
                self.files[name] = scope, tokens
            else:
                self.records.not_saved(slot, name, "save_failed")
                self.files.pop(name, None)
        slot.release()
        self.take_starts()

    # ---- the server and its tenants

    @rule(scope=st.sampled_from(["a", "b"]))
    def clear(self, scope: str) -> None:
        cleared = self.records.clear(scope_key(scope))
        for slot in cleared:
            if slot.condition is Condition.FREE:
                assert self.table.take(slot)
                slot.lost()
                self.held.pop(slot.id, None)
                slot.release()
            else:
                assert slot.is_condemned
        assert all(self.files[file.name][0] != scope for file in self.shelf)
        for number, (own, _) in self.held.items():
            slot = self.table.slots[number]
            assert own != scope or slot.is_condemned
        self.take_starts()

    @precondition(lambda self: not self.running and not self.settling)
    @rule()
    def restart(self) -> None:
        self.records.restarted(N_SLOTS, is_first=False, is_other=False)
        self.held.clear()
        assert all(not slot.n_held and not slot.tokens for slot in self.table.slots.values())
        self.take_starts()

    @rule(at=st.integers(0, 9))
    def drop_file(self, at: int) -> None:
        files = list(self.shelf)  # in the order in which they were added: names are random
        if files:
            self.records.drop(files[at % len(files)])

    # ---- invariants

    @invariant()
    def every_slot_has_one_user(self) -> None:
        conditions = {slot.id: slot.condition for slot in self.table.slots.values()}
        expected = dict.fromkeys(conditions, Condition.FREE)
        expected |= {start.slot.id: Condition.BUSY for start, _, _ in self.running}
        expected |= {slot.id: Condition.SETTLING for slot in self.settling}
        assert conditions == expected
        assert len(self.running) + len(self.settling) <= N_SLOTS

    @invariant()
    def records_say_what_the_server_holds(self) -> None:
        for slot in self.table.slots.values():
            busy = any(start.slot is slot for start, _, _ in self.running)
            if slot.namespace is not None and not busy:
                scope, tokens = self.held[slot.id]
                assert slot.namespace == namespace_of(scope)
                assert tuple(slot.tokens) == tokens[: len(slot.tokens)]
        for file in self.shelf:
            scope, tokens = self.files[file.name]
            assert file.namespace == namespace_of(scope)
            assert tuple(file.tokens) == tokens

    @invariant()
    def files_stay_within_the_budget(self) -> None:
        assert self.shelf.n_bytes == sum(file.n_bytes for file in self.shelf) <= MAX_BYTES
        assert all(file.n_readers == 0 for file in self.shelf)
        listed = {file for files in self.shelf._by_chain.values() for file in files}
        assert listed <= set(self.shelf)
        by_namespace = {file for files in self.shelf._by_namespace.values() for file in files}
        assert by_namespace == set(self.shelf)

    @invariant()
    def nobody_waits_while_all_slots_are_free(self) -> None:
        is_idle = all(slot.condition is Condition.FREE for slot in self.table.slots.values())
        assert not (is_idle and self.waiting)


TestSlotTableMachine = SlotTableMachine.TestCase
TestSlotTableMachine.settings = effort(40, 30)


# ---- planted faults


def test_a_slot_of_another_scope_that_is_continued_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def live(
        _self: SlotTable, wish: Wish, slots: Any, condition: Condition = Condition.FREE
    ) -> tuple[SlotRecord, int] | None:
        found = [(slot, slot.n_usable(wish.prompt)) for slot in slots
                 if slot.condition is condition]  # fmt: skip
        return max(found, key=lambda each: each[1], default=None)

    monkeypatch.setattr(SlotTable, "_live", live)
    assert_fails(SlotTableMachine)


def test_a_file_that_keeps_a_reader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotTable, "read", lambda *_: None)
    assert_fails(SlotTableMachine)


def test_a_request_that_is_not_woken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "_WORTH_WAITING", -1_000_000)
    assert_fails(SlotTableMachine)


def test_a_clear_that_leaves_files_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shelf, "drop", lambda *_: None)
    assert_fails(SlotTableMachine)


def test_a_failed_save_drops_the_earlier_file_of_its_name() -> None:
    """A slot that is too short to be found again by its tokens is saved under one name twice."""
    machine = SlotTableMachine()
    prompt = (0,) * 40
    machine.ask(None, prompt)
    machine.ask(None, prompt)
    for _ in range(2):
        machine.end(0, [1])
    machine.settle_first(is_saved=True)
    (file,) = machine.shelf
    machine.settle_first(is_saved=False)
    assert not len(machine.shelf)
    assert file.name in machine.shelf.stale
    machine.records_say_what_the_server_holds()
