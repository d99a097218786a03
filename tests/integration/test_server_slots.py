"""The slot manager against real llama-servers: routing, saving, restarts, limits, scopes."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.served import (
    BLOCK,
    N_PREDICT,
    Wrapped,
    async_client,
    client,
    complete,
    is_right,
    port_of,
    prompt,
    serve,
    uncached,
)
from tokcache import samples
from tokcache.errors import (
    InvalidConfig,
    PromptTooLong,
    ServerRefused,
    ServerUnsupported,
    VocabularyMismatch,
)
from tokcache.llama.server import LlamaServer, SlotSettings, kv_report
from tokcache.llama.server.slot import Condition

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tokcache.llama.server import Reused
    from tokcache.samples.server_process import ServerProcess


def is_idle(server: LlamaServer) -> bool:
    server.flush(30)
    slots = server._manager.table.slots.values()
    return all(slot.condition is Condition.FREE for slot in slots) and not any(
        slot.is_processing for slot in server.slots()
    )


def test_six_sessions_on_two_slots_prefill_only_new_tokens(
    server: LlamaServer, folder: Path
) -> None:
    sessions = [prompt(seed, 150) for seed in range(6)]
    n_prompt = n_cached = 0
    for turn in range(3):
        for tokens in sessions:
            found = complete(server, tokens)
            # The last turn and its answer, except the last token, which was never decoded.
            n_known = len(tokens) - 21 if turn else 0
            assert found.completion.n_cached == n_known
            assert is_right(found.completion, uncached_elsewhere(server, tokens))
            n_prompt, n_cached = n_prompt + len(tokens), n_cached + n_known
            tokens += [*found.completion.token_ids, *prompt(len(tokens), 20)]
    stats = server.stats()
    assert (stats.requests, stats.hits) == (18, 12)
    assert stats.prompt_tokens == n_prompt
    assert (stats.context_tokens, stats.restored_tokens) == (
        0,
        n_cached,
    )  # no slot is kept
    assert stats.token_hit_rate == n_cached / n_prompt
    assert stats.n_files == len(list(folder.iterdir())) == 6
    assert stats.n_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert stats.is_folder_reachable
    assert not stats.refusals


EXPECTED: dict[tuple[int, ...], Any] = {}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    with serve(tmp_path_factory.mktemp("reference"), n_slots=1) as running, client(running) as made:
        REFERENCE.append(made)
        yield made
        REFERENCE.clear()


REFERENCE: list[LlamaServer] = []


@pytest.fixture(autouse=True)
def _with_reference(reference: LlamaServer) -> None:
    """Serve the expected answers from a server that no client manages."""


def uncached_elsewhere(_server: object, tokens: list[int]) -> Any:
    return uncached(REFERENCE[0], tokens)


def test_a_branching_prompt_uses_a_file_and_leaves_the_slot_as_it_is(
    server: LlamaServer,
) -> None:
    shared = prompt(50, 100)
    first = complete(server, shared + prompt(51, 300))
    branch = complete(server, shared + prompt(52, 40))
    assert branch.completion.n_cached == branch.n_restored == len(shared)
    assert branch.id_slot != first.id_slot
    # The slot of the first prompt is unchanged.
    again = complete(server, shared + prompt(51, 300))
    assert (again.n_live, again.n_restored) == (399, 0)


def test_a_live_slot_is_preferred_to_its_file(server: LlamaServer) -> None:
    tokens = prompt(60, 120)
    first = complete(server, tokens)
    longer = [*tokens, *first.completion.token_ids, 7, 8, 9]
    found = complete(server, longer)
    assert (found.id_slot, found.n_restored) == (first.id_slot, 0)
    assert found.n_live == found.completion.n_cached == len(longer) - 4
    stats = server.stats()
    assert (stats.context_tokens, stats.restored_tokens) == (len(longer) - 4, 0)
    assert stats.token_hit_rate == (len(longer) - 4) / (len(tokens) + len(longer))


def test_a_restart_after_a_kill_is_noticed_and_served_from_files(tmp_path: Path) -> None:
    sessions = [prompt(seed, 200) for seed in range(3)]
    with serve(tmp_path) as running:
        port = port_of(running)
        server = client(running, slot_folder=tmp_path)
        answers = [complete(server, tokens) for tokens in sessions]
        running.kill()
        with pytest.raises(ServerRefused, match="out of reach"):
            server.complete(sessions[0], n_predict=1)
    assert all(not slot.is_reachable and slot.n_bytes == 0 for slot in server.kv_state())
    with serve(tmp_path, port=port):
        for tokens, answer in zip(sessions, answers, strict=True):
            found = complete(server, tokens)
            assert found.n_restored == found.completion.n_cached == len(tokens) - 1
            assert is_right(found.completion, answer.completion) or is_right(
                found.completion, uncached_elsewhere(server, tokens)
            )
        assert server.stats().restarts == 1
        assert is_idle(server)
    server.close()


def test_a_quick_restart_is_noticed_before_a_record_is_used(tmp_path: Path) -> None:
    tokens = prompt(1, 200)
    with serve(tmp_path) as running:
        port = port_of(running)
        server = client(running, slot_folder=tmp_path)
        complete(server, tokens)
        running.kill()
    with serve(tmp_path, port=port):
        found = complete(server, tokens)
        # No request failed in between, and the old record would match the whole prompt.
        assert (found.n_live, found.n_restored, found.completion.n_cached) == (0, 199, 199)
    with serve(tmp_path, port=port, n_slots=3):
        found = complete(server, tokens)
        # llama.cpp refuses states with another number of streams.
        assert (found.n_live, found.n_restored, found.completion.n_cached) == (0, 0, 0)
        assert server.stats().refusals == {"restore_failed": 1}
        assert len(server._manager.table.slots) == 3
        assert complete(server, tokens).completion.n_cached == 199
    server.close()


def test_files_of_another_model_are_never_restored(tmp_path: Path) -> None:
    tokens = prompt(1, 200)
    other = samples.tiny_model(seed=5)
    with serve(tmp_path) as running:
        port = port_of(running)
        server = client(running, slot_folder=tmp_path)
        complete(server, tokens)
        (file,) = (file.name for file in tmp_path.iterdir())
        content = (tmp_path / file).read_bytes()
        running.kill()
    with serve(tmp_path, port=port, model=other):
        found = complete(server, tokens)
        right = uncached(server, tokens)
        assert found.completion.n_cached == 0
        assert found.completion.token_ids == right.token_ids
        assert server.stats().refusals["files_of_another_model"] == 1
        # llama-server alone accepts the file without an error and answers wrongly.
        (tmp_path / file).write_bytes(content)
        server.restore_slot(0, file)
        wrong = server.completion(tokens, n_predict=N_PREDICT, id_slot=0)
        assert wrong.n_cached == 199
        assert wrong.token_ids != right.token_ids
    server.close()


def test_another_vocabulary_after_a_restart_is_an_error(tmp_path: Path) -> None:
    from tests.test_samples import bundled  # noqa: PLC0415 (real data, this test alone)

    tokenizer, other = Wrapped(samples.tiny_tokenizer()), bundled("gpt2")
    with serve(tmp_path) as running:
        port = port_of(running)
        server = LlamaServer(running.url, tokenizer=tokenizer)
        text = "What does it cost to renew a card? " * 20
        assert server.complete(text, n_predict=2).completion.n_prompt > BLOCK
        running.kill()
    sizes: dict[str, Any] = {"n_layers": 1, "n_embd": 32, "n_heads": 1, "n_kv_heads": 1, "n_ff": 32}
    with serve(tmp_path, port=port, model=samples.tiny_model(other, **sizes)):
        for _ in range(2):
            with pytest.raises(VocabularyMismatch, match="for the tokenizer and"):
                server.complete(text, n_predict=2)
    server.close()


def test_scopes_share_nothing_and_slots_are_erased_between_them(server: LlamaServer) -> None:
    tokens = prompt(70, 200)
    first = complete(server, tokens, scope="a")
    other = complete(server, tokens, scope="b")
    public = complete(server, tokens)
    assert [each.completion.n_cached for each in (first, other, public)] == [0, 0, 0]
    assert server.stats().erases >= 1
    for scope in ("a", "b", None):
        found = complete(server, tokens, scope=scope)
        assert found.completion.n_cached == 199
        assert is_right(found.completion, uncached_elsewhere(server, tokens))


def test_a_scope_can_be_cleared(server: LlamaServer, folder: Path) -> None:
    tokens = prompt(71, 200)
    before = set(folder.iterdir())
    complete(server, tokens, scope="a")
    assert set(folder.iterdir()) - before
    server.clear(scope="a")
    assert set(folder.iterdir()) == before
    assert complete(server, tokens, scope="a").completion.n_cached == 0


def test_without_a_slot_save_path_slots_are_reused_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, other = prompt(1, 200), prompt(2, 200)
    with serve(tmp_path, slot_save_path="") as running:
        with client(running) as server:
            for each in (tokens, other, prompt(3, 200)):
                complete(server, each)
            assert complete(server, other).completion.n_cached == 199
            assert complete(server, tokens).completion.n_cached == 0
            # The server can't erase slots, so the request must ignore the slot's contents.
            assert complete(server, tokens, scope="a").completion.n_cached == 0
            assert server.stats().refusals == {"no_slot_save_path": 1}
            pieces = server.stream(tokens, n_predict=500)
            next(pieces)
            pieces.close()
            assert is_idle(server)
        (message,) = caplog.messages
        assert "start llama-server with --slot-save-path" in message
        with (
            client(running, on_error="raise", save_when="overwritten", slot_ids=(0,)) as strict,
        ):
            strict.complete(prompt(4, 200), n_predict=1)
            with pytest.raises(ServerUnsupported, match="--slot-save-path"):
                strict.complete(prompt(5, 200), n_predict=1)


@pytest.mark.parametrize("architecture", ["gemma3", "mamba", "lfm2"])
def test_restores_that_the_server_does_not_use_stop_with_one_warning(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = samples.tiny_model(architecture=architecture)
    shared = prompt(1, 300)
    with (
        serve(tmp_path, n_slots=1, model=model, n_ctx_checkpoints=0) as running,
        client(running, slot_folder=tmp_path) as server,
        caplog.at_level(logging.WARNING),
    ):
        for seed in range(3):  # a part of the saved tokens
            complete(server, prompt(90 + seed, 200))
            found = complete(server, [*shared, *prompt(seed, 50)])
            assert is_right(found.completion, uncached(server, [*shared, *prompt(seed, 50)]))
            server._manager.table.reset_contents()
        # So far before a prompt's end there need be no checkpoint: that is not an error.
        assert server.stats().refusals["restore_not_used_by_server"] == 1
        assert caplog.messages == []
        complete(server, prompt(95, 200))
        complete(server, [*shared, *prompt(2, 50)[:48], 5, 6])  # near the end
        assert server.stats().refusals["restore_not_used_by_server"] == 2
        assert len([m for m in caplog.messages if "tokcache.llama.Llama" in m]) == 1
        first = complete(server, shared)
        complete(server, prompt(99, 100))
        longer = [*shared, *first.completion.token_ids, 5, 6, 7]
        found = complete(server, longer)  # all saved tokens
        if architecture == "gemma3":
            assert found.completion.n_cached == 0
            assert list(tmp_path.iterdir()) == []
        else:
            assert found.n_restored == found.completion.n_cached == len(longer) - 4
        assert is_right(found.completion, uncached(server, longer))


def test_many_requests_on_few_slots_get_right_answers(server: LlamaServer) -> None:
    heads = [prompt(seed, 120) for seed in range(4)]
    prompts = [heads[n % 4] + prompt(100 + n, 30) for n in range(32)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda each: server.complete(each, n_predict=N_PREDICT), prompts))
    for tokens, each in zip(prompts, found, strict=True):
        assert is_right(each.completion, uncached_elsewhere(server, tokens))
    assert is_idle(server)
    assert sum(each.completion.n_cached > 0 for each in found) > 16


def test_event_loops_of_several_threads_share_the_slots(
    process: ServerProcess, folder: Path
) -> None:
    prompts = [prompt(200 + n % 3, 100) for n in range(6)]
    server = async_client(process, slot_folder=folder)

    async def ask() -> list[Reused]:
        return await asyncio.gather(*(server.complete(each, n_predict=6) for each in prompts))

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: asyncio.run(ask()), range(2)):
            for tokens, each in zip(prompts, found, strict=True):
                assert is_right(each.completion, uncached_elsewhere(server, tokens))
    asyncio.run(server.flush(30))
    slots = server._manager.table.slots.values()
    assert [slot.condition for slot in slots] == [Condition.FREE] * 2
    asyncio.run(server.aclose())


def test_a_stream_is_the_same_completion(server: LlamaServer) -> None:
    tokens = prompt(80, 150)
    expected = complete(server, tokens).completion
    pieces = list(server.stream(tokens, n_predict=N_PREDICT))
    last = pieces[-1].completion
    assert last is not None
    assert last.text == "".join(piece.text for piece in pieces) == expected.text
    # A stream omits ids only after an unfinished character.
    assert expected.token_ids[: len(last.token_ids)] == last.token_ids
    assert (last.n_cached, last.stop, last.n_predicted) == (149, "limit", N_PREDICT)
    assert 0 < last.first_token_s <= last.seconds
    assert is_idle(server)


def test_an_aborted_stream_frees_its_slot_and_keeps_its_tokens(server: LlamaServer) -> None:
    tokens = prompt(81, 150)
    pieces = server.stream(tokens, n_predict=800)
    next(pieces)
    pieces.close()
    assert is_idle(server)
    found = complete(server, tokens)
    assert found.completion.n_cached == 149
    assert is_right(found.completion, uncached_elsewhere(server, tokens))


def test_a_cancelled_request_frees_its_slot_and_fails_no_other(process: ServerProcess) -> None:
    tokens = prompt(82, 150)

    async def cancelled() -> Any:
        async with async_client(process) as server:
            table = server._manager.table
            asked = [
                asyncio.create_task(server.complete(tokens, n_predict=n))
                for n in (700, 700, 700, 4)
            ]
            # The slots are known after the first request has connected.
            while not table.slots or not all(  # noqa: ASYNC110
                slot.condition is Condition.BUSY for slot in table.slots.values()
            ):
                await asyncio.sleep(0)
            for task in asked[:3]:  # two have a slot, one waits in the queue
                task.cancel()
            ended = await asyncio.gather(*asked, return_exceptions=True)
            await server.flush(30)
            assert all(slot.condition is Condition.FREE for slot in table.slots.values())
            assert not any(slot.is_processing for slot in await server.slots())
            return ended

    *ended, last = asyncio.run(cancelled())
    assert [type(each) for each in ended] == [asyncio.CancelledError] * 3
    assert len(last.completion.token_ids) == 4


def test_a_slow_save_delays_no_other_request(server: LlamaServer) -> None:
    """A request waits for a settling slot only if it profits from its contents."""
    table = server._manager.table
    first = complete(server, prompt(83, 200))
    slot = table.slots[first.id_slot]
    slot.settle()
    try:
        other = server.complete(prompt(84, 200), n_predict=1)
        assert other.id_slot != first.id_slot
        waiting = threading.Thread(
            target=server.complete, args=(prompt(83, 200),), kwargs={"n_predict": 1}
        )
        waiting.start()
        waiting.join(0.2)
        # Its file serves as well, so it does not wait.
        assert not waiting.is_alive()
    finally:
        slot.release()


def test_bytes_are_bounded_if_the_folder_is_reachable(process: ServerProcess, folder: Path) -> None:
    before = set(folder.iterdir())
    budget = 500_000
    with client(process, slot_folder=folder, max_bytes=budget) as server:
        for seed in range(12):
            complete(server, prompt(300 + seed, 150))
            ours = set(folder.iterdir()) - before
            assert sum(file.stat().st_size for file in ours) <= budget
        stats = server.stats()
        assert stats.evictions > 0
        assert 0 < stats.n_bytes <= budget
        assert complete(server, prompt(300, 150)).completion.n_cached == 0
    with client(process, slot_folder=folder, max_bytes=1000) as server:
        complete(server, prompt(320, 150))
        assert server.stats().n_files == 0
        assert server.stats().refusals["file_over_budget"] == 1


def test_names_are_used_again_if_the_folder_is_out_of_reach(tmp_path: Path) -> None:
    budget = 500_000
    with serve(tmp_path) as running, client(running, max_bytes=budget) as server:
        for seed in range(14):
            complete(server, prompt(300 + seed, 150))
        stats = server.stats()
        assert stats.is_folder_reachable is False
        files = list(tmp_path.iterdir())
        assert stats.n_files + stats.n_stale_files == len(files) <= 4
        total = sum(file.stat().st_size for file in files)
        assert stats.n_bytes + stats.n_stale_bytes == total
        found = complete(server, prompt(313, 150))
        assert is_right(found.completion, uncached_elsewhere(server, prompt(313, 150)))


def test_pinned_conversations_are_not_evicted(process: ServerProcess, folder: Path) -> None:
    with client(process, slot_folder=folder, max_bytes=500_000) as server:
        server.pin("kept")
        complete(server, prompt(400, 150), conversation="kept")
        for seed in range(8):
            complete(server, prompt(401 + seed, 150))
        assert complete(server, prompt(400, 150), conversation="kept").completion.n_cached == 149
        server.unpin("kept")
        for seed in range(8):
            complete(server, prompt(401 + seed, 150))
        assert complete(server, prompt(400, 150)).completion.n_cached == 0


def test_old_files_are_deleted_also_those_of_earlier_clients(
    process: ServerProcess, folder: Path
) -> None:
    with client(process, slot_folder=folder) as server:
        complete(server, prompt(500, 150))
    left = set(folder.iterdir())
    (folder / "someone-elses.bin").write_bytes(b"kept")
    for file in left:
        os.utime(file, (1, 1))
    with client(process, slot_folder=folder, max_age_s=0.2) as server:
        complete(server, prompt(501, 150))
        assert not left & set(folder.iterdir())
        time.sleep(0.25)
        server._manager.records.shelf.sweep()
        assert [file.name for file in folder.iterdir()] == ["someone-elses.bin"]
    (folder / "someone-elses.bin").unlink()


def test_a_damaged_file_costs_a_prefill_and_is_counted(server: LlamaServer, folder: Path) -> None:
    tokens = prompt(600, 200)
    before = set(folder.iterdir())
    complete(server, tokens)
    (file,) = set(folder.iterdir()) - before
    for seed in (601, 602):  # other contents for both slots
        complete(server, prompt(seed, 200))
    file.write_bytes(file.read_bytes()[:1000])
    found = complete(server, tokens)
    assert found.completion.n_cached == 0
    assert is_right(found.completion, uncached_elsewhere(server, tokens))
    assert server.stats().refusals == {"restore_failed": 1}


def test_a_server_that_empties_idle_slots_is_logged_once_with_the_cure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Use llama-server's default settings, except the size of its cache in memory."""
    chats = [prompt(1, 200), prompt(2, 200)]
    own = {"kv_unified": True, "cache_idle_slots": True, "cache_ram_mib": 64}
    settings: dict[str, Any] = {"min_save_tokens": 1000, "slot_folder": tmp_path}
    with serve(tmp_path, **own) as running:
        port = port_of(running)
        server = client(running, **settings)
        with caplog.at_level(logging.INFO, "tokcache"):
            for _ in range(4):
                for tokens in chats:
                    assert complete(server, tokens).completion.n_cached == 0
        assert server.stats().refusals == {"slot_not_used_by_server": 6}
        (message,) = caplog.messages
        assert "--no-cache-idle-slots" in message
    caplog.clear()
    with serve(tmp_path, port=port, **{**own, "cache_idle_slots": False}):
        with caplog.at_level(logging.INFO, "tokcache"):
            for _ in range(6):
                for tokens in chats:
                    complete(server, tokens)
        (message,) = caplog.messages
        assert "over: the server decoded tokens again" in message
    caplog.clear()
    with serve(tmp_path, port=port, **own), caplog.at_level(logging.INFO, "tokcache"):
        for _ in range(3):
            for tokens in chats:
                complete(server, tokens)
        assert len(caplog.messages) == 1
    server.close()


def test_other_users_of_a_slot_cost_a_prefill_and_no_wrong_answer(
    server: LlamaServer, process: ServerProcess
) -> None:
    tokens = prompt(610, 200)
    first = complete(server, tokens)
    with LlamaServer(process.url) as other:
        other.completion(prompt(611, 100), n_predict=1, id_slot=first.id_slot)
    found = complete(server, tokens)
    assert is_right(found.completion, uncached_elsewhere(server, tokens))
    assert server.stats().refusals == {"slot_not_used_by_server": 1}
    assert complete(server, tokens).completion.n_cached == 199


def test_a_prompt_beyond_the_context_changes_no_slot(server: LlamaServer) -> None:
    complete(server, prompt(620, 200))
    before = [slot.n_held for slot in server._manager.table.slots.values()]
    with pytest.raises(PromptTooLong, match=r"1,024 tokens.*room for 1,024"):
        server.complete(prompt(621, 1024), n_predict=1)
    assert [slot.n_held for slot in server._manager.table.slots.values()] == before
    with pytest.raises(InvalidConfig, match="id_slot"):
        server.complete(prompt(622, 10), n_predict=1, id_slot=3)
    with (
        LlamaServer(server.url, slot_settings=SlotSettings(slot_ids=(1, 7))) as other,
        pytest.raises(InvalidConfig, match="names slot 7, the server has 2"),
    ):
        other.complete(prompt(624, 10), n_predict=1)
    with pytest.raises(PromptTooLong, match="exceeds the available context"):
        server.completion(prompt(623, 3000), n_predict=1)


def test_an_answer_that_fills_the_context_is_recorded_as_it_is(server: LlamaServer) -> None:
    tokens = prompt(630, 1000)
    found = server.complete(tokens, n_predict=100, ignore_eos=True)
    server.flush(30)
    assert found.completion.is_truncated
    assert found.completion.n_held is not None
    again = complete(server, [*tokens, *found.completion.token_ids[:10]])
    assert again.completion.n_cached == 1009
    assert not server.stats().refusals


def test_reproducible_mode_is_bit_for_bit_on_several_slots(
    process: ServerProcess, folder: Path
) -> None:
    rng = random.Random(1)
    settings: dict[str, Any] = {"slot_folder": folder, "reproducible": True, "block_tokens": BLOCK}
    heads = [prompt(seed, 200) for seed in (700, 701, 702)]
    with client(process, **settings) as server:
        n_restored = 0
        for n in range(12):
            tokens = [*rng.choice(heads), *prompt(710 + n, rng.randrange(1, 200))]
            found = complete(server, tokens, n_probs=4)
            expected = uncached_elsewhere(server, tokens)
            assert found.completion.probabilities == expected.probabilities
            n_restored += found.n_restored
        assert n_restored >= 3 * 192


def test_reproducible_requests_take_turns(process: ServerProcess, folder: Path) -> None:
    settings: dict[str, Any] = {"slot_folder": folder, "reproducible": True, "block_tokens": BLOCK}
    prompts = [prompt(730, 130) + prompt(740 + n, 60 + n) for n in range(12)]
    with client(process, **settings) as server, ThreadPoolExecutor(6) as pool:
        found = list(
            pool.map(lambda each: server.complete(each, n_predict=N_PREDICT, n_probs=4), prompts)
        )
        for tokens, each in zip(prompts, found, strict=True):
            expected = uncached_elsewhere(server, tokens)
            assert each.completion.probabilities == expected.probabilities
        assert sum(each.n_restored for each in found) >= 9 * 128


def test_kv_figures_are_the_models_own(process: ServerProcess, folder: Path) -> None:
    with client(process, slot_folder=folder) as server:
        found = complete(server, prompt(800, 200))
        state = {slot.id: slot for slot in server.kv_state()}[found.id_slot]
        assert (state.n_layers, state.n_heads, state.n_kv_heads) == (4, 4, (2, 2, 2, 2))
        assert (state.n_kv_dim, state.memory, state.source) == (4 * 2 * 64, "attention", "model")
        assert (state.n_ctx, state.n_tokens) == (1024, 205)
        assert state.share == 205 / 1024
        # llama.cpp writes the cells and a header of less than 3 %.
        (file,) = server._manager.records.shelf
        assert state.n_bytes <= file.n_bytes <= 1.03 * state.n_bytes


def test_kv_figures_are_those_of_the_file_that_is_served_now(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    # Both models have the same number of parameters and the same width of K and V.
    first, second = (samples.tiny_model(n_heads=n, n_kv_heads=n // 2) for n in (4, 8))
    shutil.copy(first, path)
    with serve(tmp_path, model=path) as running:
        port, server = port_of(running), client(running)
        assert {state.n_heads for state in server.kv_state()} == {4}
    shutil.copy(second, tmp_path / "new.gguf")
    (tmp_path / "new.gguf").replace(path)
    with serve(tmp_path, model=path, port=port):
        assert {state.n_heads for state in server.kv_state()} == {8}
    server.close()


@pytest.mark.parametrize(
    ("architecture", "memory"),
    [("gemma3", "sliding window"), ("mamba", "recurrent"), ("lfm2", "hybrid")],
)
def test_other_memories_are_measured(architecture: str, memory: str, tmp_path: Path) -> None:
    model = samples.tiny_model(architecture=architecture)
    with serve(tmp_path, model=model) as running, client(running, slot_folder=tmp_path) as server:
        found = complete(server, prompt(1, 200))
        state = {slot.id: slot for slot in server.kv_state()}[found.id_slot]
        (file,) = server._manager.records.shelf
        assert (state.memory, state.source) == (memory, "measured")
        # A file also has the ids and a header.
        assert 0.95 * file.n_bytes <= state.n_bytes <= file.n_bytes


def test_the_report_has_the_blocks_of_many_servers(
    server: LlamaServer, process: ServerProcess, tmp_path: Path
) -> None:
    tokens = prompt(810, 150)
    for _ in range(3):
        found = complete(server, tokens, conversation="c")
    with serve(tmp_path, n_slots=1) as running:
        other = client(running)
        complete(other, prompt(1, 70))
        report = kv_report(server, other)
        running.kill()
    assert [(slot.url, slot.is_reachable) for slot in report] == [
        (process.url, True),
        (process.url, True),
        (other.url, True),
    ]
    blocks = report[found.id_slot].blocks
    assert report[found.id_slot].conversation == "c"
    assert [(block.start, block.n_tokens, block.n_uses) for block in blocks] == [
        (0, 64, 2),
        (64, 64, 2),
        (128, 27, 0),
    ]
    scores = [block.score for block in blocks]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 3.0
    assert sum(block.n_bytes for block in blocks) == 155 * 1024
    away = kv_report(other)
    assert [(slot.is_reachable, slot.blocks) for slot in away] == [(False, ())]
    other.close()


def test_a_forked_child_starts_without_records(server: LlamaServer) -> None:
    tokens = prompt(820, 150)
    complete(server, tokens)
    pid = os.fork()
    if pid == 0:
        try:
            found = server.complete(tokens, n_predict=2)
            server.flush(30)
            os._exit(0 if found.n_live == found.n_restored == 0 else 1)
        except BaseException:  # noqa: BLE001 (a child must not run the parent's tests)
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert is_right(complete(server, tokens).completion, uncached_elsewhere(server, tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "ignore"}, "on_error"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_bytes": "8GB"}, "max_bytes"),
        ({"max_age_s": 0}, "max_age_s"),
        ({"max_age_s": "1"}, "max_age_s"),
        ({"reproducible": "yes"}, "reproducible"),
        ({"slot_ids": ()}, "at least one slot"),
        ({"slot_ids": (-1,)}, "slot_ids"),
        ({"kv_type": "q9"}, "kv_type"),
        ({"save_when": "never"}, "save_when"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        SlotSettings(**settings)


def test_sizes_have_units() -> None:
    assert SlotSettings(max_bytes="4G").max_bytes == SlotSettings(max_bytes=4 << 30).max_bytes
