"""The shelf of saved slots and the table of slots, without a server."""

from __future__ import annotations

import random
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcache import TokenIds
from tokcache._prefix import n_common
from tokcache.llama.server.model import KvShape, kv_shape
from tokcache.llama.server.namespaces import namespace_of
from tokcache.llama.server.results import ModelMeta, SlotFile
from tokcache.llama.server.shelf import SavedSlot, Shelf
from tokcache.llama.server.slot import Condition
from tokcache.llama.server.table import SlotTable, Wish
from tokcache.llama.server.trust import KINDS, WHOLE, Trust

if TYPE_CHECKING:
    from collections.abc import Iterable

STEP = 4
A, B = namespace_of("a"), namespace_of("b")


def shelf(folder: Path | None = None, max_bytes: int = 10_000) -> Shelf:
    return Shelf(
        max_bytes=max_bytes,
        max_age_s=1000.0,
        folder=folder,
        step=STEP,
        trust=Trust("http://127.0.0.1:9", is_strict=False),
    )


def add(
    on: Shelf,
    namespace: bytes,
    tokens: Iterable[int],
    *,
    folder: Path | None = None,
    n_prompt: int | None = None,
    conversation: str | None = None,
    is_pinned: bool = False,
    is_superseding: bool = False,
) -> SavedSlot | None:
    ids = TokenIds(tokens)
    name = on.name_for(namespace, ids, len(ids))
    if folder is not None:
        (folder / name).write_bytes(bytes(10 * len(ids)))
    return on.add(
        SlotFile(name, len(ids), 10 * len(ids)),
        namespace,
        ids,
        n_prompt=len(ids) if n_prompt is None else n_prompt,
        conversation=conversation,
        is_pinned=is_pinned,
        is_superseding=is_superseding,
    )


def check(on: Shelf) -> None:
    """Assert the invariants that hold after every step."""
    assert on.n_bytes == sum(file.n_bytes for file in on) <= on._budget.n_bytes(on.n_bytes)
    listed = {file for files in on._by_chain.values() for file in files}
    assert listed == {file for file in on if len(file.tokens) >= STEP}
    assert all(files for files in on._by_chain.values())


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([A, B]), TOKENS, st.booleans()), max_size=12),
    st.lists(st.tuples(st.sampled_from([A, B]), TOKENS, st.booleans()), max_size=6),
    st.integers(0, 2**32),
)
def test_the_longest_usable_file_is_found(
    stored: list[tuple[bytes, list[int], bool]],
    asked: list[tuple[bytes, list[int], bool]],
    seed: int,
) -> None:
    on = shelf(max_bytes=1200)
    rng = random.Random(seed)
    for namespace, tokens, is_superseding in stored:
        add(on, namespace, tokens, is_superseding=is_superseding, is_pinned=rng.random() < 0.1)
        check(on)
        if len(on) and rng.random() < 0.2:
            on.drop(rng.choice(list(on)))
            check(on)
    for namespace, prompt, is_whole_only in asked:
        ids = TokenIds(prompt)
        found = on.find(namespace, ids, frozenset({WHOLE}) if is_whole_only else KINDS)
        usable = [0]
        for file in on:
            n_same = min(n_common(file.tokens, ids), len(ids) - 1)
            # Files are looked up by whole steps.
            is_listed = n_common(file.tokens, ids) >= STEP
            is_usable = n_same == len(file.tokens) or not is_whole_only
            if file.namespace == namespace and is_listed and is_usable:
                usable.append(n_same)
        assert (found.n_tokens if found else 0) == max(usable)


def test_a_longer_file_replaces_its_beginning() -> None:
    on = shelf()
    add(on, A, range(10), is_superseding=True)
    add(on, B, range(10), is_superseding=True)
    add(on, A, range(20), is_superseding=True)
    assert {(file.namespace, len(file.tokens)) for file in on} == {(A, 20), (B, 10)}
    add(on, A, [*range(10), 99, 98, 97], is_superseding=True)
    assert len(on) == 3


def test_a_turn_replaces_the_one_before_also_with_another_answer() -> None:
    on = shelf()
    add(on, A, [*range(12), 50, 51], n_prompt=12, conversation="c", is_superseding=True)
    add(on, A, [*range(12), 60, 61], n_prompt=12, conversation="d", is_superseding=True)
    add(on, A, [*range(12), *range(70, 80)], n_prompt=20, conversation="c", is_superseding=True)
    assert sorted(len(file.tokens) for file in on) == [14, 22]


def test_files_being_read_or_pinned_are_not_evicted(tmp_path: Path) -> None:
    on = shelf(tmp_path, max_bytes=300)
    read, pinned = add(on, A, range(10), folder=tmp_path), add(on, B, range(10), folder=tmp_path)
    assert read is not None
    assert pinned is not None
    read.n_readers, pinned.is_pinned = 1, True
    assert not on.make_room(200)
    assert add(on, A, range(30, 50), folder=tmp_path) is None
    assert on._trust.refusals == {"file_over_budget": 1}
    assert {file.name for file in tmp_path.iterdir()} == {read.name, pinned.name}
    read.n_readers = 0
    assert on.make_room(200)
    assert [file.name for file in tmp_path.iterdir()] == [pinned.name]


def test_stale_names_are_used_first_and_counted() -> None:
    on = shelf(max_bytes=250)
    first = add(on, A, range(10))
    assert on.folder.is_reachable is False
    add(on, A, range(20, 40))  # evicts the first one
    assert first is not None
    assert on.stale == {first.name: 100}
    assert on.name_for(B, TokenIds(range(5)), 5) == first.name
    assert on.stale == {}
    on.note_stale(first.name)
    assert on.stale == {first.name: 0}


def table(n_slots: int) -> SlotTable:
    return SlotTable(range(n_slots), shelf())


def wish(tokens: Iterable[int], namespace: bytes = A) -> Wish:
    return Wish(namespace, TokenIds(tokens), None, KINDS)


def test_a_slot_goes_to_the_request_that_waits_longest() -> None:
    of = table(1)
    first, second, third = (of.acquire(wish(range(n))) for n in (5, 6, 7))
    assert (first.done(), second.done(), third.done()) == (True, False, False)
    first.result().slot.release()
    assert second.done()
    of.cancel(third)
    of.cancel(second)  # it had the slot, which is now free
    assert of.slots[0].condition is Condition.FREE
    with pytest.raises(CancelledError):
        third.result(0)


def test_a_cancelled_request_is_skipped() -> None:
    of = table(1)
    first, second, third = (of.acquire(wish(range(5))) for _ in range(3))
    assert second.cancel()
    first.result().slot.release()
    assert third.done()


def test_only_requests_that_gain_much_wait_for_a_settling_slot() -> None:
    of = table(2)
    held = of.acquire(wish(range(90))).result().slot
    held.decoded(A, TokenIds(range(90)), None)
    held.settle()
    follower = of.acquire(wish(range(100)))
    passer = of.acquire(wish([*range(20), *range(100, 200)]))  # 20 tokens are not worth the wait
    assert not follower.done()
    assert passer.result().slot is not held
    held.release()
    assert follower.result().slot is held
    assert follower.result().n_live == 90


def test_the_least_valuable_slot_is_taken() -> None:
    of = table(3)
    for number, (used_at, is_saved) in enumerate([(1.0, False), (2.0, True), (3.0, True)]):
        slot = of.slots[number]
        tokens = TokenIds(range(number * 100, number * 100 + 20))
        slot.decoded(A, tokens, (A, "pinned") if number == 1 else None)
        slot.used_at, slot.is_saved = used_at, is_saved
    of.shelf.pinned.add((A, "pinned"))
    taken = [of.acquire(wish(range(900, 910))).result().slot.id for _ in range(3)]
    assert taken == [2, 0, 1]


def test_a_slot_can_be_used_after_a_fork_by_a_thread_that_did_not_fork() -> None:
    of = table(1)
    slot = of.slots[0]
    of.lock.acquire()  # as before a fork; in the child nobody releases this lock
    of.abandon()
    reader = threading.Thread(target=slot.release, daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()


def test_one_at_a_time_gives_one_slot_only() -> None:
    of = SlotTable(range(3), shelf(), is_one_at_a_time=True)
    first, second = of.acquire(wish(range(5))), of.acquire(wish(range(6)))
    assert not second.done()
    first.result().slot.settle()
    assert not second.done()
    first.result().slot.release()
    assert second.done()


def test_a_model_file_that_cannot_be_read_is_reported_as_unknown(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(20))
    for path, why in (
        ("", "can't be reached"),
        ("/no/such.gguf", "can't be reached"),
        (str(damaged), "can't be read"),
        (str(tmp_path), "can't be reached"),
    ):
        shape = kv_shape(path, ModelMeta())
        assert (shape.n_layers, shape.n_kv_dim, shape.memory) == (0, 0, "")
        assert why in shape.unknown[0]
        assert shape.kv_bytes_per_token("f16") is None


def test_a_file_of_another_model_is_not_taken_for_the_servers() -> None:
    pytest.importorskip("gguf", reason="needs tokcache[demo]")
    from tokcache import samples  # noqa: PLC0415 (needs gguf)

    path = str(samples.tiny_model())
    assert kv_shape(path, ModelMeta(n_embd=128)).n_kv_heads == (2, 2, 2, 2)
    assert "another model" in kv_shape(path, ModelMeta(n_embd=64)).unknown[0]


def test_bytes_follow_the_types_of_keys_and_values() -> None:
    shape = KvShape(n_layers=2, n_kv_heads=(1, 1), n_kv_dim=128)
    assert shape.kv_bytes_per_token("f16") == 256
    assert shape.kv_bytes_per_token("f32") == 512
    assert shape.kv_bytes_per_token("q8_0") == 136
