"""The router keeps slots, files and scopes apart, whatever comes in which order."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.machines import assert_fails, effort
from tokcache.errors import QueueFull
from tokcache.gateway.routing.admission import MAX_GONE, MAX_SCOPES
from tokcache.gateway.routing.chain import Chain, chat_prompt, text_prompt
from tokcache.gateway.routing.files import Files, SavedFile
from tokcache.gateway.routing.router import Router
from tokcache.gateway.routing.slots import Assignment, Slot, Wish
from tokcache.state.reasons import MissReason

KEY = bytes(32)
TOKENS_PER_CHAR = 0.25


def prompt(texts: list[str], scope: str | None = None) -> Any:
    messages = [{"role": "user", "content": text} for text in texts]
    return chat_prompt({"messages": messages}, KEY, scope)


def router(**given: Any) -> Router:
    limits = {"max_queue": 8, "min_save_tokens": 64, "side_tokens": 100, **given}
    return Router(Files(limits.pop("max_bytes", 1 << 20)), **limits)


def wish(chain: Chain, scope: str | None = None, now: float = 0.0) -> Wish:
    return Wish(chain, scope, "", now)


def answered(
    made: Router, texts: list[str], answer: str, now: float = 0.0, scope: str | None = None
) -> Assignment:
    """Carry a request through as the service does."""
    asked = prompt(texts, scope)
    made.enqueue(wish(asked.chain(), scope, now))
    (assignment,) = made.assign(now)
    carry(made, assignment)
    n_prompt = int(sum(map(len, texts)) * TOKENS_PER_CHAR)
    made.finish(
        assignment,
        asked.chain(answer),
        n_prompt=n_prompt,
        n_cached=assignment.n_promised,
        n_tokens=n_prompt + 5,
    )
    made.release(assignment.slot)
    return assignment


def carry(made: Router, assignment: Assignment) -> None:
    for slot in assignment.save:
        made.admission.saved(
            slot, made.files.new_name(slot.server.pool), slot.n_tokens, slot.n_tokens
        )
    file = assignment.file or (assignment.copied.saved if assignment.copied else None)
    if assignment.is_erased:
        assignment.slot.emptied()
    if assignment.source == "file":
        if file is None or file not in made.files:
            made.not_restored(assignment, "file_gone")
        else:
            made.restored(assignment, file)
    made.read_done(assignment)
    assignment.is_sent = True


def up(made: Router, name: str = "one", *, n_slots: int = 2, can_save: bool = True) -> None:
    made.server_up(name, model="m", pool="p", can_save=can_save, n_slots=n_slots)


LONG = "x" * 4000


def test_a_conversation_keeps_its_slot_and_side_requests_take_another() -> None:
    made = router()
    up(made)
    first = answered(made, [LONG], "a")
    for number in range(3):
        assert answered(made, [f"title {number}"], "t").slot is not first.slot
    again = answered(made, [LONG, "more"], "b")
    assert again.slot is first.slot
    assert again.source == "slot"


def test_without_saving_a_short_request_does_not_displace_a_long_conversation() -> None:
    made = router()
    up(made, can_save=False)
    first = answered(made, [LONG], "a")
    answered(made, ["hello"], "b")
    assert answered(made, [LONG[:700]], "c").slot is not first.slot


def test_a_request_waits_for_a_prefix_that_is_being_decoded_but_not_for_ever() -> None:
    made = router()
    up(made)
    made.enqueue(wish(prompt([LONG, "a"]).chain()))
    (first,) = made.assign(0.0)
    made.enqueue(wish(prompt([LONG, "b"]).chain()))
    assert made.assign(5.0) == []
    made.begun(first.slot, 5.0)
    assert made.assign(5.2) == []
    (second,) = made.assign(7.0)
    assert second.slot is not first.slot
    assert (second.reason, second.detail) == (MissReason.REFUSED, "busy")


def test_another_request_overtakes_one_that_waits_for_a_prefix() -> None:
    made = router()
    up(made)
    made.enqueue(wish(prompt([LONG, "a"]).chain()))
    made.assign(0.0)
    made.enqueue(wish(prompt([LONG, "b"]).chain()))
    made.enqueue(wish(prompt(["other"]).chain()))
    assert len(made.assign(0.1)) == 1


def test_the_queue_is_bounded() -> None:
    made = router(max_queue=2)
    for number in range(2):
        made.enqueue(wish(prompt([str(number)]).chain()))
    with pytest.raises(QueueFull):
        made.enqueue(wish(prompt(["2"]).chain()))


def test_a_request_that_was_never_sent_does_not_take_over_a_slot() -> None:
    made = router()
    made.erases_between_scopes = True
    up(made, n_slots=1)
    made.enqueue(wish(prompt([LONG], "a").chain(), "a"))
    (first,) = made.assign(0.0)
    carry(made, first)
    chain = prompt([LONG], "a").chain("answer")
    made.finish(first, chain, n_prompt=1000, n_cached=0, n_tokens=1005)
    made.release(first.slot)
    for _ in range(2):
        made.enqueue(wish(prompt([LONG], "b").chain(), "b"))
        (second,) = made.assign(0.0)
        assert second.is_erased
        made.read_done(second)
        made.abort(second, has_begun=False)
        made.release(second.slot)


def test_an_answer_of_a_server_that_was_restarted_is_not_recorded() -> None:
    made = router()
    up(made)
    asked = prompt([LONG])
    made.enqueue(wish(asked.chain()))
    (first,) = made.assign(0.0)
    carry(made, first)
    up(made)
    made.finish(first, asked.chain("a"), n_prompt=1000, n_cached=0, n_tokens=1005)
    assert first.slot.n_tokens == 0
    made.abort(first, has_begun=True)
    assert first.slot.n_tokens == 0


def test_an_evicted_file_is_named_to_its_own_tenant_alone() -> None:
    made = router(max_bytes=1500)  # `carry` saves a byte a token
    up(made, n_slots=1)
    assert answered(made, [LONG], "a").reason is MissReason.NEVER_STORED
    for char in "yz":
        assert answered(made, [char * 4000], "b").reason is MissReason.NEVER_STORED
    again = answered(made, [LONG], "c")
    assert (again.reason, again.detail) == (MissReason.EVICTED, "file: max_bytes")
    assert answered(made, ["w" * 4000], "d").reason is MissReason.NEVER_STORED
    made.enqueue(wish(prompt(["y" * 4000], "other").chain(), "other"))
    (assignment,) = made.assign(0.0)
    assert assignment.reason is MissReason.NEVER_STORED
    assert made.misses == {"never_stored": 4, "evicted": 1}
    assert made.missed_tokens["evicted"] == 999


@pytest.mark.parametrize(
    ("given", "detail"),
    [({"min_save_tokens": 2000}, "below_minimum"), ({"max_bytes": 10}, "file_over_budget")],
    ids=["too short", "over the budget"],
)
def test_contents_that_are_not_saved_say_why(given: Any, detail: str) -> None:
    made = router(**given)
    up(made, n_slots=1)
    answered(made, [LONG], "a")
    answered(made, ["y" * 4000], "b")
    again = answered(made, [LONG], "a")
    assert (again.reason, again.detail) == (MissReason.REFUSED, detail)


def displacing(made: Router, texts: list[str]) -> Assignment:
    """Assign a request that takes the only slot, and stop before anything is saved."""
    made.enqueue(wish(prompt(texts).chain()))
    (assignment,) = made.assign(0.0)
    return assignment


def fail_to_save(made: Router) -> None:
    other = displacing(made, ["y" * 4000])
    (slot,) = other.save
    made.not_saved(slot)
    made.read_done(other)
    made.finish(other, prompt(["y" * 4000]).chain("a"), n_prompt=1000, n_cached=0, n_tokens=1005)
    made.release(other.slot)


def fail_to_save_in_idle_time(made: Router) -> None:
    (slot,) = made.servers["one"].slots
    made.begin_save(slot)
    made.not_saved(slot)
    made.release(slot)
    decoded(made, 2.0)  # now a save is not worth its time
    answered(made, ["y" * 4000], "a")


def cut_off(made: Router) -> None:
    other = displacing(made, ["y" * 4000])
    made.read_done(other)
    made.abort(other, has_begun=False)
    made.release(other.slot)


def come_back(made: Router) -> None:
    made.server_down("one")
    up(made, n_slots=1)


def restart_during_an_answer(made: Router) -> None:
    other = displacing(made, [LONG, "more"])
    carry(made, other)
    up(made, n_slots=1)
    made.abort(other, has_begun=True)
    made.release(other.slot)


@pytest.mark.parametrize(
    ("lose", "detail"),
    [
        (fail_to_save, "save_failed"),
        (fail_to_save_in_idle_time, "save_failed"),
        (cut_off, "cut_off"),
        (lambda made: up(made, n_slots=1), "server_restarted"),
        (restart_during_an_answer, "server_restarted"),
        (come_back, "server_away"),
    ],
    ids=["save", "idle save", "cut off", "restart", "restart during an answer", "away"],
)
def test_contents_that_are_lost_say_why(lose: Callable[[Router], Any], detail: str) -> None:
    made = router()
    up(made, n_slots=1)
    answered(made, [LONG], "a")
    lose(made)
    again = answered(made, [LONG], "a")
    assert (again.source, again.reason, again.detail) == ("none", MissReason.REFUSED, detail)


@pytest.mark.parametrize("cause", ["file_gone", "restore_failed", "files_of_another_model"])
def test_files_that_are_dropped_say_why(cause: str) -> None:
    made = router()
    up(made, n_slots=1)
    for char in "xy":
        answered(made, [char * 4000], "a")
    (file,) = made.files
    if cause == "files_of_another_model":
        made.files.clear("p")
    else:
        made.files.drop(file, cause)
    again = answered(made, [LONG], "a")
    assert (again.reason, again.detail) == (
        (MissReason.OTHER_FINGERPRINT, "model")
        if cause == "files_of_another_model"
        else (MissReason.REFUSED, cause)
    )


@pytest.mark.parametrize("is_over", [False, True], ids=["failed", "over the budget"])
def test_an_idle_save_that_failed_is_not_tried_again_and_again(is_over: bool) -> None:
    made = router(max_bytes=10) if is_over else router()
    up(made, n_slots=2)
    for char in "xyz":
        answered(made, [char * 4000], "a", now=1.0)
    slot = made.next_to_save(10.0)
    assert slot is not None
    if is_over:
        assert made.admission.saved(slot, "tokcache-1.bin", slot.n_tokens, 1000) is None
    else:
        made.not_saved(slot)
    other = made.next_to_save(10.0)
    assert other is not slot
    assert other is not None
    made.not_saved(other)
    assert made.next_to_save(10.0) is None


def test_restores_stop_after_three_that_helped_nothing() -> None:
    made = router()
    up(made, n_slots=1)
    answered(made, [LONG], "a")
    for number in range(8):
        asked = prompt([LONG, "b"] if number % 2 else ["y" * 4000])
        made.enqueue(wish(asked.chain()))
        (assignment,) = made.assign(0.0)
        carry(made, assignment)
        made.finish(assignment, asked.chain("a"), n_prompt=1000, n_cached=0, n_tokens=1005)
        made.release(assignment.slot)
    assert made.reasons["restore_not_used_by_server"] == 3
    assert not made.servers["one"].can_restore


def test_the_list_of_files_survives_and_a_damaged_one_is_counted(tmp_path: Any) -> None:
    files = Files(1000)
    chain = prompt([LONG]).chain()
    file = SavedFile("tokcache-1.bin", "p", chain, len(chain), 10, 12, 600)
    assert files.add(file)
    path = tmp_path / "files.json"
    files.write_list(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert LONG[:50] not in path.read_text()
    again = Files(1000)
    assert again.read_list(path) == 1
    found = again.find("p", chain)
    assert found is not None
    assert (found[0].n_tokens, found[1]) == (12, len(chain))
    path.write_text(path.read_text()[:-10])
    assert Files(1000).read_list(path) == 0
    damaged = Files(1000)
    damaged.read_list(path)
    assert damaged.refusals["list_damaged"] == 1


def decoded(made: Router, seconds: float) -> None:
    """Let every save take that long from now on, at 1,000 decoded tokens a second."""
    server = made.servers["one"]
    made.measured(server, 1000, 1.0)
    for _ in range(40):
        made.admission.measured(server, 1000, seconds)


def test_prompts_that_never_come_back_are_saved_no_longer_and_conversations_still_are() -> None:
    made = router()
    up(made, n_slots=1)
    n_saved = 0
    for number in range(60):
        decoded(made, 0.1)
        assignment = answered(made, [f"{number} " + "x" * 4000], "a")
        n_saved += len(assignment.save)
    assert n_saved == 7
    assert made.counts["save_skipped"] == 59 - n_saved
    # A conversation of two turns is another kind of contents.
    answered(made, ["talk " + "y" * 4000], "a")
    answered(made, ["talk " + "y" * 4000, "a", "more"], "b")
    decoded(made, 0.1)
    assert answered(made, ["z" * 4000], "a").save


def test_prompts_that_come_back_are_saved_again() -> None:
    made = router()
    up(made, n_slots=1)
    for number in range(60):
        decoded(made, 0.3)
        answered(made, [f"{number} " + "x" * 4000], "a")
    n_skipped = made.counts["save_skipped"]
    for number in range(60, 120):
        decoded(made, 0.3)
        answered(made, [f"{number % 2} again " + "x" * 4000], "a")
    assert made.counts["save_skipped"] - n_skipped < 30


def numbered(n_prompts: int, scope: str | None) -> list[Chain]:
    """Return the chains of prompts that share nothing."""
    return [prompt([f"{number} " + LONG], scope).chain() for number in range(n_prompts)]


def displace(made: Router, chain: Chain, scope: str | None) -> Wish:
    """Let a prompt lose its slot, and return the request that continues it."""
    slot = Slot(made.servers["one"], 99, scope)
    slot.holds(chain, len(chain), 1000, 1000)
    made.admission.displaced(slot, 0.0)
    return wish(chain, scope)


def test_another_tenants_prompts_do_not_change_which_prompts_of_a_tenant_are_saved() -> None:
    """Saves take time here, so that a prompt is saved only if its scope's prompts come back."""
    of_others = numbered(9 * MAX_GONE, "b")
    seen = []
    for has_other in (False, True):
        made = router(max_bytes=1 << 30)
        up(made, n_slots=1)
        found = []
        for number in range(9):
            decoded(made, 0.3)
            assignment = answered(made, [f"{number % 3} " + LONG], "a", scope="a")
            found.append((len(assignment.save), assignment.source, assignment.detail))
            for other in of_others if has_other else ():
                displace(made, other, "b")
        seen.append(found)
    assert seen[0] == seen[1]
    assert {"none", "file"} == {source for _, source, _ in seen[0]}, seen[0]


def test_each_scope_has_its_own_chance_of_a_return() -> None:
    made = router()
    up(made)
    decoded(made, 0.3)
    for scope in ("never", "always"):
        for chain in numbered(30, scope):
            returned = displace(made, chain, scope)
            if scope == "always":
                made.admission.asked(returned)
    for scope, is_saved in (("never", False), ("always", True)):
        slot = Slot(made.servers["one"], 99, scope)
        chain = prompt(["new " + LONG], scope).chain()
        slot.holds(chain, len(chain), 1000, 1000)
        assert made.admission.is_worth_saving(slot) == is_saved, scope


def test_the_memory_of_displaced_prompts_is_bounded() -> None:
    made = router()
    up(made)
    wishes = [displace(made, chain, "a") for chain in numbered(MAX_GONE + 1, "a")]
    chance = made.admission._chance("a")
    before = chance.n_back
    made.admission.asked(wishes[0])
    assert chance.n_back == before
    made.admission.asked(wishes[1])
    made.admission.asked(wishes[1])
    assert chance.n_back == before + 1
    for number in range(MAX_SCOPES + 1):
        made.admission.asked(wish(wishes[0].chain, f"{number}"))
    assert len(made.admission._chances) == MAX_SCOPES


def test_a_save_counts_only_the_tokens_that_no_file_holds() -> None:
    made = router()
    up(made)
    decoded(made, 0.3)
    slot = Slot(made.servers["one"], 99)
    chain = prompt([LONG, "more"]).chain()
    slot.holds(chain, len(chain), 1000, 1000)
    assert made.admission.is_worth_saving(slot)
    decoded(made, 0.4)  # half of 1.0 - 0.4 s would be spared
    assert not made.admission.is_worth_saving(slot)
    decoded(made, 0.3)
    part = prompt([LONG]).chain()
    assert made.files.add(SavedFile("tokcache-1.bin", "p", part, len(part), 990, 990, 600))
    assert not made.admission.is_worth_saving(slot)


def test_a_slot_that_was_used_just_now_is_not_saved_yet() -> None:
    made = router()
    up(made)
    for char in "xyz":
        answered(made, [char * 4000], "a", now=10.0)
    for slot in made.servers["one"].slots:
        made.release(slot, 10.0)
    assert made.next_to_save(10.2) is None
    assert made.next_to_save(10.4) is not None


def test_a_save_that_takes_longer_than_decoding_is_left_out() -> None:
    made = router()
    up(made, n_slots=1)
    answered(made, [LONG], "a")
    decoded(made, 2.0)
    assert not answered(made, ["y" * 4000], "a").save
    decoded(made, 0.01)
    assert answered(made, ["z" * 4000], "a").save


def test_a_slot_whose_contents_are_saved_is_given_away_first() -> None:
    made = router(side_tokens=0)
    up(made)
    saved = answered(made, ["y" * 4000], "a").slot
    other = answered(made, [LONG], "a").slot
    assert saved is not other
    # The other one was used before, but it would have to be saved.
    saved.used_at, other.used_at = other.used_at, saved.used_at
    made.admission.saved(saved, made.files.new_name("p"), saved.n_tokens, saved.n_tokens)
    assert answered(made, ["z" * 4000], "a").slot is saved


def test_the_next_slot_to_give_away_is_saved_while_its_server_is_idle() -> None:
    made = router()
    up(made)
    answered(made, [LONG], "a", now=1.0)
    answered(made, ["y" * 4000], "a", now=2.0)
    assert made.next_to_save(9.0) is None  # no conversation lost its slot so far
    third = answered(made, ["z" * 4000], "a", now=10.0)
    slots = made.servers["one"].slots
    oldest = min(slots, key=lambda slot: slot.used_at)
    assert oldest is not third.slot
    assert made.next_to_save(10.1) is oldest
    assert made.next_to_save(69.0) is oldest
    assert made.next_to_save(71.0) is None  # no conversation lost its slot in the last minute
    made.begin_save(oldest)
    assert made.next_to_save(11.0) is None
    made.enqueue(wish(prompt([LONG, "w"]).chain(), now=11.0))
    (assignment,) = made.assign(11.0)
    assert assignment.slot is third.slot
    made.read_done(assignment)
    made.release(assignment.slot)
    made.admission.saved(oldest, made.files.new_name("p"), oldest.n_tokens, oldest.n_tokens)
    made.release(oldest)
    assert made.next_to_save(12.0) is None  # one slot can be given away at once


class Machine(RuleBasedStateMachine):
    """Requests of three scopes on two servers, in any order, with failures in between."""

    def __init__(self) -> None:
        super().__init__()
        self.router = router(max_bytes=4000)
        self.router.erases_between_scopes = True
        self.running: list[tuple[Assignment, Any]] = []
        self.now = 0.0
        self.asked: dict[Wish, Any] = {}
        self.fails_next = False
        # Whose tokens each slot really holds.
        self.holder: dict[Any, str] = {}
        for name in ("one", "two"):
            up(self.router, name)

    texts = strategies.lists(
        strategies.sampled_from(["hi", "x" * 600, "y" * 2000, "z" * 5000]), min_size=1, max_size=4
    )

    @rule(texts=texts, scope=strategies.sampled_from(["a", "b", None]))
    def ask(self, texts: list[str], scope: str | None) -> None:
        asked = prompt(texts, scope)
        made = Wish(asked.chain(), scope, "", self.now)
        self.asked[made] = asked
        try:
            self.router.enqueue(made)
        except QueueFull:
            return
        self._assign()

    def _assign(self) -> None:
        for made in self.router.assign(self.now):
            scope = made.wish.scope
            for slot in made.save:
                assert slot.is_busy
            if made.file is not None:
                assert made.file.chain.n_common(made.wish.chain) > 0
            if made.copied is not None:
                assert made.copied.scope == scope
            if made.source == "slot":
                assert made.slot.scope == scope
            holder = self.holder.get(made.slot)
            assert made.is_erased or holder in (None, f"{scope}")
            if (
                self.fails_next
            ):  # the client leaves, or the server fails, before the request is sent
                self.fails_next = False
                self.router.read_done(made)
                self.router.abort(made, has_begun=False)
                self.router.release(made.slot)
                continue
            copied = made.copied
            carry(self.router, made)
            self.holder[made.slot] = f"{scope}"
            if copied is not None:
                assert not copied.is_busy
            self.running.append((made, self.asked[made.wish]))

    @precondition(lambda self: self.running)
    @rule(answer=strategies.sampled_from(["ok", "w" * 1000]), share=strategies.floats(0, 1))
    def finish(self, answer: str, share: float) -> None:
        made, asked = self.running.pop(0)
        n_chars = made.wish.chain.stop_at(len(made.wish.chain))
        n_prompt = max(1, int(n_chars * TOKENS_PER_CHAR))
        self.router.finish(
            made,
            asked.chain(answer),
            n_prompt=n_prompt,
            n_cached=int(share * n_prompt),
            n_tokens=n_prompt + int(len(answer) * TOKENS_PER_CHAR),
        )
        self._released(made)

    @precondition(lambda self: self.running)
    @rule(has_begun=strategies.booleans())
    def abort(self, has_begun: bool) -> None:
        made, _ = self.running.pop()
        self.router.abort(made, has_begun=has_begun)
        self._released(made)

    @precondition(lambda self: self.running)
    @rule()
    def reject(self) -> None:
        made, _ = self.running.pop()
        self.router.reject(made)
        self._released(made)

    def _released(self, made: Assignment) -> None:
        self.router.release(made.slot)
        self._assign()

    @rule()
    def fail_next(self) -> None:
        self.fails_next = True

    @rule(name=strategies.sampled_from(["one", "two"]))
    def restart(self, name: str) -> None:
        self.router.server_down(name)
        up(self.router, name)
        for slot in self.router.servers[name].slots:
            self.holder.pop(slot, None)
        self._assign()

    @rule(is_saved=strategies.booleans())
    def save_while_idle(self, is_saved: bool) -> None:
        slot = self.router.next_to_save(self.now)
        if slot is None:
            return
        assert not slot.is_busy
        self.router.begin_save(slot)
        name = self.router.files.new_name(slot.server.pool)
        if is_saved:
            self.router.admission.saved(slot, name, slot.n_tokens, slot.n_tokens)
        else:
            self.router.not_saved(slot)
            self.router.files.note_stale(slot.server.pool, name)
        self.router.release(slot, self.now)
        self._assign()

    @rule(
        at=strategies.integers(0, 9),
        cause=strategies.sampled_from(["file_gone", "restore_failed"]),
    )
    def drop_file(self, at: int, cause: str) -> None:
        files = list(self.router.files)  # in the order in which they were added: names are random
        if files:
            self.router.files.drop(files[at % len(files)], cause)

    @rule(is_up=strategies.booleans())
    def stop(self, is_up: bool) -> None:
        """A server goes away; it comes back with the next restart."""
        if not is_up:
            self.router.server_down("two")
            for slot in self.router.servers["two"].slots:
                self.holder.pop(slot, None)

    @rule(seconds=strategies.floats(0.1, 20))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self._assign()

    @invariant()
    def a_slot_has_one_request_and_files_stay_within_the_budget(self) -> None:
        busy = [s for server in self.router.servers.values() for s in server.slots if s.is_busy]
        assert sorted(map(id, busy)) == sorted(id(made.slot) for made, _ in self.running)
        assert self.router.files.n_bytes == sum(f.n_bytes for f in self.router.files) <= 4000
        assert all(file.n_readers == 0 for file in self.router.files)

    @invariant()
    def files_are_found_by_all_their_links(self) -> None:
        expected: dict[tuple[str, bytes], set[SavedFile]] = {}
        for file in self.router.files:
            for link in file.chain.links:
                expected.setdefault((file.pool, link), set()).add(file)
        held = self.router.files._by_link
        assert {key: set(files) for key, files in held.items()} == expected

    @invariant()
    def nobody_waits_long_while_a_slot_is_idle(self) -> None:
        late = [w for w in self.router.queue if self.now - w.arrived > 15]
        assert not (late and self.router.idle())


Machine.TestCase.settings = effort(25, 30)
TestMachine = Machine.TestCase


def test_a_slot_that_is_not_erased_between_scopes_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assigned = Router._assigned

    def unerased(self: Router, *given: Any) -> Assignment:
        made = assigned(self, *given)
        made.is_erased = False
        return made

    monkeypatch.setattr(Router, "_assigned", unerased)
    assert_fails(Machine)


def test_a_file_that_stays_listed_by_a_link_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlist(self: Files, file: SavedFile) -> None:
        del self._files[file.name]
        self.n_bytes -= file.n_bytes
        for link in file.chain.links[:-1]:
            held = self._by_link[file.pool, link]
            del held[file]
            if not held:
                del self._by_link[file.pool, link]

    monkeypatch.setattr(Files, "_unlist", unlist)
    assert_fails(Machine)


def test_a_released_slot_that_stays_busy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def abort(self: Router, made: Assignment, *, has_begun: bool) -> None:
        self.lose(made.slot, f"cut_off {has_begun}")
        made.slot.server.slots[0].is_busy = True

    monkeypatch.setattr(Router, "abort", abort)
    assert_fails(Machine)


def test_a_short_look_up_of_a_common_prefix_equals_a_plain_one() -> None:
    rng = random.Random(5)
    for _ in range(200):
        texts = [rng.choice("ab") * rng.randrange(1, 1500) for _ in range(4)]
        others = [*texts[: rng.randrange(4)], "c"]
        one, other = prompt(texts).chain(), prompt(others).chain()
        plain = 0
        while plain < min(len(one), len(other)) and one.links[plain] == other.links[plain]:
            plain += 1
        assert one.n_common(other) == plain


def test_another_tenant_changes_no_reason_that_a_tenant_sees() -> None:
    """Tenant "a" sends the same requests with and without tenant "b", which sends the same ones."""
    rng = random.Random(4)
    texts = [[LONG], [LONG, "more"], ["y" * 3000], [LONG[:1000] + "z" * 900], [LONG, "again"]]
    asked = [rng.choice(texts) for _ in range(40)]
    seen = []
    for has_other in (False, True):
        made = router(max_bytes=1 << 30)
        up(made, n_slots=3)
        found = []
        for each in asked:
            for scope in ("b", "a") if has_other else ("a",):
                own = prompt(each, scope)
                made.enqueue(wish(own.chain(), scope))
                (assignment,) = made.assign(0.0)
                carry(made, assignment)
                n_prompt = int(sum(map(len, each)) * TOKENS_PER_CHAR)
                counts = {"n_cached": assignment.n_promised, "n_tokens": n_prompt + 5}
                made.finish(assignment, own.chain("x"), n_prompt=n_prompt, **counts)
                made.release(assignment.slot)
                if scope == "a":
                    found.append((assignment.n_promised, assignment.reason, assignment.detail))
        seen.append(found)
    assert seen[0] == seen[1]
    assert len({reason for _, reason, _ in seen[0]}) > 2


def test_the_chain_of_very_many_ids_stops_at_a_million() -> None:
    lengths = [len(text_prompt({"prompt": [1] * n}, KEY, None).chain()) for n in (64, 1 << 21)]
    assert lengths == [2, (1 << 20) // 32]
