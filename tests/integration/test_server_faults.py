"""Faults that once caused wrong text, kept data or an outage, on real and pretend servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
import time
import warnings
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tests.integration.pretended import PROPS, Pretender, answer, pretend
from tests.integration.served import (
    InLoop,
    Wrapped,
    async_client,
    both_clients,
    client,
    complete,
    port_of,
    prompt,
    serve,
    serve_with_adapter,
    uncached,
)
from tokcache import samples
from tokcache.errors import (
    InvalidAnswer,
    InvalidConfig,
    InvalidScope,
    InvalidText,
    InvalidTokens,
    RequestRejected,
    ServerFailed,
    ServerTimeout,
    ServerUnreachable,
    VocabularyMismatch,
)
from tokcache.llama.server import LlamaServer, SlotSettings, exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.served import Connect
    from tokcache.samples.server_process import ServerProcess


@pytest.fixture
def pretender() -> Pretender:
    return Pretender()


@pytest.fixture
def url(pretender: Pretender) -> Iterator[str]:
    with pretend(pretender) as found:
        yield found


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serve(tmp_path_factory.mktemp("slots")) as running:
        yield running


# -- another model with the same properties ------------------------------------------------------


def test_an_adapter_that_is_scaled_while_the_server_runs_is_another_model(tmp_path: Path) -> None:
    import httpx  # noqa: PLC0415 (an extra)

    with serve_with_adapter(tmp_path) as address, LlamaServer(address) as server:
        tokens = prompt(1, 300)
        with_adapter = complete(server, tokens).completion
        running = server.stream(prompt(2, 200), n_predict=30)
        next(running)
        httpx.post(f"{address}/lora-adapters", json=[{"id": 0, "scale": 0.0}])
        found = complete(server, tokens)
        list(running)  # started with one adapter scale, ended with the other
        assert complete(server, prompt(2, 200)).n_restored == 0
        right = uncached(server, tokens)
        assert (found.n_live, found.n_restored) == (0, 0)
        assert found.completion.token_ids == right.token_ids != with_adapter.token_ids
        assert server.stats().restarts == 0
        assert complete(server, tokens).completion.n_cached == 299


def test_files_of_a_start_with_another_rope_base_are_not_restored(tmp_path: Path) -> None:
    tokens = prompt(1, 200)
    with serve(tmp_path) as running:
        port = port_of(running)
        server = client(running, slot_folder=tmp_path)
        complete(server, tokens)
    with serve(tmp_path, port=port):
        assert complete(server, tokens).n_restored == 199
    with serve(tmp_path, port=port, rope_freq_base=500_000.0):
        found = complete(server, tokens)
        assert found.completion.token_ids == uncached(server, tokens).token_ids
        assert found.n_restored == 0
        assert server.stats().refusals == {"files_of_another_model": 1}
        assert complete(server, tokens).completion.n_cached == 199
    server.close()


def test_files_are_dropped_after_a_restart_if_the_model_cannot_be_compared(
    url: str, pretender: Pretender
) -> None:
    with LlamaServer(url) as server:
        complete(server, prompt(1, 100))
        pretender.say["/props"] = {**PROPS, "media_marker": "two"}
        pretender.say["/completion"] = lambda body: answer(len(body["prompt"]))
        assert complete(server, prompt(1, 100)).n_restored == 0
        assert server.stats().refusals == {"files_of_another_model": 1}


@pytest.mark.parametrize("said", [(503, {"error": "loading"}), (429, b"")])
def test_adapters_that_cannot_be_read_for_a_moment_cost_no_file(
    said: Any, url: str, pretender: Pretender
) -> None:
    pretender.say["/lora-adapters"] = [{"id": 0, "scale": 1.0}]
    with LlamaServer(url) as server:
        complete(server, prompt(1, 100))
        complete(server, prompt(2, 100))
        adapters, pretender.say["/lora-adapters"] = pretender.say["/lora-adapters"], said
        pretender.say["/props"] = {**PROPS, "media_marker": "two"}
        assert complete(server, prompt(1, 100)).n_restored == 0
        pretender.say["/lora-adapters"] = adapters
        assert complete(server, prompt(2, 100)).n_restored == 99
        assert server.stats().refusals == {"server_not_understood": 1}


def test_two_models_in_one_folder_never_share_a_name(tmp_path: Path) -> None:
    tokens = prompt(1, 200)
    with (
        serve(tmp_path) as one,
        serve(tmp_path, model=samples.tiny_model(seed=7)) as other,
        client(one, slot_folder=tmp_path, slot_ids=(0,)) as ours,
        client(other, slot_folder=tmp_path) as theirs,
    ):
        complete(ours, tokens)
        complete(theirs, tokens)
        complete(ours, prompt(2, 200))
        found = complete(ours, tokens)
        assert found.n_restored == 199
        assert found.completion.token_ids == uncached(ours, tokens).token_ids


# -- cleared scopes -------------------------------------------------------------------------------


def test_a_cleared_scope_leaves_nothing_that_was_being_saved_or_served(tmp_path: Path) -> None:
    with serve(tmp_path) as running, client(running, slot_folder=tmp_path) as server:
        server.complete(prompt(1, 400), n_predict=2, scope="a")
        server.clear(scope="a")  # while it is being saved
        assert list(tmp_path.iterdir()) == []
        pieces = server.stream(prompt(2, 400), n_predict=20, scope="a")
        next(pieces)
        server.clear(scope="a")  # while it is being served
        assert list(pieces)[-1].completion is not None
        server.flush(30)
        assert list(tmp_path.iterdir()) == []
        assert all(slot.namespace is None for slot in server._manager.table.slots.values())
        assert complete(server, prompt(1, 400), scope="a").completion.n_cached == 0
        assert complete(server, prompt(1, 400), scope="a").completion.n_cached == 399


def test_clear_without_a_scope_leaves_nothing_of_anyone(tmp_path: Path) -> None:
    kept = prompt(9, 100)
    with serve(tmp_path) as running, client(running, slot_folder=tmp_path) as server:
        for seed, scope in enumerate(("a", "b", None)):
            server.pin(f"chat {scope}", scope=scope)
            complete(server, prompt(seed, 200), scope=scope, conversation=f"chat {scope}")
        pieces = server.stream(prompt(5, 200), n_predict=20, scope="c")
        next(pieces)
        server.clear()  # while one is being served
        assert list(pieces)[-1].completion is not None
        server.flush(30)
        assert list(tmp_path.iterdir()) == []
        assert all(slot.n_tokens == 0 for slot in server.slots())
        records = server._manager.records
        assert (len(records.shelf), records.shelf.pinned, len(records._seen)) == (0, set(), 0)
        for seed, scope in enumerate(("a", "b", None)):
            assert complete(server, prompt(seed, 200), scope=scope).completion.n_cached == 0
        complete(server, kept, scope="b")
        server.clear(scope="a")
        assert complete(server, prompt(0, 200), scope="a").completion.n_cached == 0
        assert complete(server, kept, scope="b").completion.n_cached == 99


def test_clear_overwrites_files_that_can_not_be_deleted_here(tmp_path: Path) -> None:
    secret, other = prompt(1, 200), prompt(2, 200)
    with serve(tmp_path) as running, client(running, max_bytes=500_000) as server:
        for seed in range(3, 9):  # evicts some of the tenant's files without deleting them
            complete(server, prompt(seed, 150), scope="a")
        complete(server, secret, scope="a")
        complete(server, other, scope="b")
        assert server.stats().n_stale_files > 0
        server.clear(scope="a")
        held = [file.read_bytes() for file in tmp_path.iterdir()]
        for seed in range(3, 9):
            assert not any(has_tokens(content, prompt(seed, 150)) for content in held)
        assert not any(has_tokens(content, secret) for content in held)
        assert any(has_tokens(content, other) for content in held)
        assert complete(server, other, scope="b").completion.n_cached == 199
        stats = server.stats()
        assert n_bytes_in(tmp_path) == stats.n_bytes + stats.n_stale_bytes


def has_tokens(content: bytes, tokens: list[int]) -> bool:
    return array("i", tokens[:16]).tobytes() in content


def test_clear_without_a_slot_save_path_leaves_nothing_in_the_slot(tmp_path: Path) -> None:
    tokens = prompt(1, 200)
    with serve(tmp_path, slot_save_path="") as running, client(running) as server:
        slot = complete(server, tokens, scope="a").id_slot
        server.clear(scope="a")
        # A plain call to the server finds nothing either.
        assert server.completion(tokens, n_predict=1, id_slot=slot).n_cached == 0


def test_clear_goes_on_if_one_slot_can_not_be_erased(url: str, pretender: Pretender) -> None:
    with LlamaServer(url) as server:
        for seed in range(2):
            complete(server, prompt(seed, 100), scope="a")
        pretender.say["erase"] = None  # the connection breaks
        with pytest.raises(ServerUnreachable):
            server.clear(scope="a")
        pretender.say["erase"] = {}
        assert len(server._manager.records.shelf) == 0
        for seed in range(2):
            assert complete(server, prompt(seed, 100), scope="a").n_live == 0


def test_scopes_and_pins_hold_with_any_adapters(url: str) -> None:
    lora = [{"id": 0, "scale": 0.5}]
    with LlamaServer(url) as server:
        server.pin("c", scope="a")
        complete(server, prompt(1, 100), scope="a", lora=lora, conversation="c")
        complete(server, prompt(1, 100), scope="b", lora=lora)
        shelf = server._manager.records.shelf
        assert sorted(file.is_pinned for file in shelf) == [False, True]
        server.clear(scope="a")
        assert [file.is_pinned for file in shelf] == [False]
        assert complete(server, prompt(1, 100), scope="a", lora=lora).n_live == 0


def clear_during(server: LlamaServer, pretender: Pretender, path: str, answer: Any) -> None:
    """Clear the scope "a" once, while the server works on a request to `path`."""
    usual = pretender.say[path]

    def say(*asked: Any) -> Any:
        pretender.say[path] = usual
        server.clear(scope="a")
        return answer(*asked)

    pretender.say[path] = say


def filled(server: LlamaServer) -> None:
    """Save a prompt of the scope "a", and fill both slots with prompts of another scope."""
    complete(server, prompt(1, 100), scope="a")
    for seed in (2, 3):
        complete(server, prompt(seed, 100))


@both_clients
@pytest.mark.parametrize("said", ["an error", "another number of tokens"])
def test_a_scope_cleared_while_its_file_is_read_is_not_a_failure_of_the_server(
    said: str, connect: Connect, url: str, pretender: Pretender
) -> None:
    answers = {
        "an error": lambda *_: (400, {"error": {"message": "no such file"}}),
        "another number of tokens": lambda *_: {"n_restored": 3, "n_read": 1},
    }
    # With on_error "raise" a failure of the server would be raised.
    with connect(url, slot_settings=SlotSettings(on_error="raise")) as server:
        filled(server)
        clear_during(server, pretender, "restore", answers[said])
        found = complete(server, prompt(1, 100), scope="a")
        assert (found.n_restored, found.completion.text) == (0, " it")
        assert server.stats().refusals == {"cleared": 1}
        assert server.stats().n_files == 2  # nothing of the cleared scope was kept
        # Without the clearing it is.
        pretender.say["restore"] = answers[said]
        if said == "an error":
            with pytest.raises(RequestRejected, match="no such file"):
                complete(server, prompt(2, 100))
        else:
            assert complete(server, prompt(2, 100)).n_restored == 0
        assert server.stats().refusals == {"cleared": 1, "restore_failed": 1}


@both_clients
def test_a_scope_cleared_before_its_file_is_read_is_not_a_failure_of_the_server(
    connect: Connect, url: str, pretender: Pretender, tmp_path: Path
) -> None:
    def save(body: dict[str, Any], slot: str) -> Any:
        said = pretender.save(body, slot)
        (tmp_path / body["filename"]).write_bytes(bytes(said["n_written"]))
        return said

    pretender.say["save"] = save
    with connect(url, slot_settings=SlotSettings(slot_folder=tmp_path)) as server:
        filled(server)
        clear_during(server, pretender, "/props", lambda *_: PROPS)
        assert complete(server, prompt(1, 100), scope="a").n_restored == 0
        assert server.stats().refusals == {"cleared": 1}
        assert pretender.asked["restore"] == 0
        # Without the clearing it is: one of these two is no longer in a slot.
        for file in tmp_path.iterdir():
            file.unlink()
        for seed in (2, 3):
            complete(server, prompt(seed, 100))
        assert server.stats().refusals == {"cleared": 1, "restore_failed": 1}


# -- wrong arguments of one request ---------------------------------------------------------------


@both_clients
@pytest.mark.parametrize("name", ["scope", "conversation"])
@pytest.mark.parametrize("value", [["a"], 7, b"a", {"a": 1}])
def test_names_of_another_type_are_refused(
    name: str, value: Any, connect: Connect, url: str, pretender: Pretender
) -> None:
    error = InvalidScope if name == "scope" else InvalidConfig
    with connect(url) as server:
        for ask in (server.complete, lambda *a, **k: list(server.stream(*a, **k))):
            with pytest.raises(error, match=name):
                ask(prompt(1, 100), n_predict=1, **{name: value})
        for pin in (server.pin, server.unpin):
            with pytest.raises(error, match=name):
                pin(**{"conversation": "c", name: value})
        if name == "scope":
            for each in (
                lambda scope: server.clear(scope=scope),
                lambda scope: server.token_ids("a", scope=scope),
            ):
                with pytest.raises(error, match=name):
                    each(value)
        assert not pretender.asked
        assert complete(server, prompt(1, 100), conversation="c").completion.text == " it"
        assert complete(server, prompt(1, 100), conversation="c").n_live == 99


class Text(str):
    """A subclass of str."""

    __slots__ = ()


@both_clients
def test_scopes_reach_the_tokenizers_cache_too(connect: Connect, process: ServerProcess) -> None:
    """A hit in the cache would show one tenant that another one sent the text before."""
    tokenizer = Wrapped(samples.tiny_tokenizer())
    with connect(process.url, tokenizer=tokenizer) as server:
        tokenizer.scopes.clear()
        for scope in ("a", Text("b"), None):
            server.complete("some text", n_predict=1, scope=scope)
        list(server.stream("some text", n_predict=1, scope="c"))
        assert tokenizer.scopes == ["a", "b", None, "c"]


@both_clients
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_invalid_text_is_refused_with_the_position(
    is_wrapped: bool, connect: Connect, process: ServerProcess
) -> None:
    import tokcache  # noqa: PLC0415 (the wrapped tokenizer, this test alone)

    plain = Tokenizer.from_file(str(samples.tiny_tokenizer()))
    tokenizer = tokcache.wrap(plain) if is_wrapped else None
    with connect(process.url, tokenizer=tokenizer) as server:
        for each in (
            lambda: server.complete("caf\ud800", n_predict=1),
            lambda: list(server.stream("caf\ud800", n_predict=1)),
            lambda: server.token_ids("caf\ud800"),
            lambda: server.tokenize("caf\ud800"),
        ):
            with pytest.raises(InvalidText, match=r"surrogate.*\b3\b"):
                each()
        with pytest.raises(InvalidConfig, match=r"grammar.*surrogates"):
            server.complete([1, 2], n_predict=1, grammar='root ::= "\ud800"')
        with pytest.raises(InvalidConfig, match="add_special_tokens"):
            server.tokenize("a", add_special_tokens="tenant-a")  # type: ignore[arg-type]
        for wrong in (None, 5, 1.5, ["a"]):
            with pytest.raises(InvalidTokens, match="token id"):
                server.complete(wrong, n_predict=1)  # type: ignore[arg-type]


def test_the_repr_names_the_server_and_counts_saved_slots(tmp_path: Path) -> None:
    with serve(tmp_path) as running, client(running, slot_folder=tmp_path) as server:
        assert repr(server) == (
            f"<LlamaServer {running.url}, model unknown, 0 slots, 0 saved (0 bytes)>"
        )
        complete(server, prompt(1, 100))
        name, n_bytes = samples.tiny_model().name, server.stats().n_bytes
        assert repr(server) == (
            f"<LlamaServer {running.url}, model {name}, 2 slots, 1 saved ({n_bytes:,} bytes)>"
        )


def test_a_truncated_file_does_not_crash_the_server(tmp_path: Path) -> None:
    tokens = prompt(1, 300)
    with serve(tmp_path, n_slots=1) as running, client(running, slot_folder=tmp_path) as server:
        complete(server, tokens)
        (file,) = tmp_path.iterdir()
        complete(server, prompt(2, 300))
        os.truncate(file, file.stat().st_size // 2)
        found = complete(server, tokens)
        assert found.completion.token_ids == uncached(server, tokens).token_ids
        assert server.stats().refusals == {"restore_failed": 1}


def test_a_file_that_crashed_the_server_is_not_read_again(tmp_path: Path) -> None:
    tokens = prompt(1, 300)
    with serve(tmp_path, n_slots=1) as running:
        port = port_of(running)
        server = client(running)  # without access to the folder
        complete(server, tokens)
        (file,) = tmp_path.iterdir()
        complete(server, prompt(2, 300))
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(ServerUnreachable):
            server.complete(tokens, n_predict=1)
    with serve(tmp_path, n_slots=1, port=port):
        assert complete(server, tokens).completion.n_cached == 0
    server.close()


def test_a_wrong_number_of_held_tokens_costs_no_slot(url: str, pretender: Pretender) -> None:
    lie = {"tokens_cached": 2**34}
    pretender.say["/completion"] = lambda body: answer(len(body["prompt"]), **lie)
    with LlamaServer(url, timeout_s=5) as server:
        for _ in range(3):
            with pytest.raises(InvalidAnswer, match=r"tokens_cached.*17,179,869,184"):
                complete(server, prompt(1, 100))
            server.flush(10)
        pretender.say["/completion"] = pretender.complete
        threads = [
            threading.Thread(target=complete, args=(server, prompt(seed, 100))) for seed in range(4)
        ]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        for thread in threads:
            thread.join(10)
        assert time.monotonic() - began < 4


# -- files ----------------------------------------------------------------------------------------


def n_bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_names_are_used_again_if_files_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    budget = 500_000
    with (
        serve(tmp_path, n_slots=1) as running,
        client(running, slot_folder=tmp_path, max_bytes=budget) as server,
    ):
        monkeypatch.setattr(Path, "unlink", refuse)
        for seed in range(12):
            complete(server, prompt(seed, 150))
        stats = server.stats()
        assert stats.is_folder_reachable
        assert stats.refusals["file_not_deleted"] > 0
        assert n_bytes_in(tmp_path) == stats.n_bytes + stats.n_stale_bytes < budget + 200_000
        monkeypatch.undo()


def test_files_of_earlier_clients_count_for_the_budget(tmp_path: Path) -> None:
    budget = 500_000
    with serve(tmp_path, n_slots=1) as running:
        for turn in range(4):
            with client(running, slot_folder=tmp_path, max_bytes=budget) as server:
                for seed in range(2):
                    complete(server, prompt(10 * turn + seed, 150))
                    assert n_bytes_in(tmp_path) <= budget
                # This client's files stay; those that no client can find go first.
                assert complete(server, prompt(10 * turn, 150)).completion.n_cached == 149
        with client(running, slot_folder=tmp_path, max_bytes=200_000) as server:
            complete(server, prompt(1, 10))
            assert 0 < n_bytes_in(tmp_path) <= 200_000


def test_age_is_limited_while_a_client_runs(tmp_path: Path) -> None:
    with (
        serve(tmp_path) as running,
        client(running, slot_folder=tmp_path, max_age_s=0.4) as server,
    ):
        complete(server, prompt(1, 150))
        time.sleep(0.6)
        complete(server, prompt(2, 150))
        assert len(list(tmp_path.iterdir())) == server.stats().n_files == 1


# -- vocabularies ---------------------------------------------------------------------------------


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Wrapped:
    description = json.loads(samples.tiny_tokenizer().read_text())
    change(description)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    return Wrapped(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(normalizer={"type": "Lowercase"}),
        lambda found: found["model"].update(merges=[]),
    ],
)
def test_a_tokenizer_that_splits_plain_words_differently_is_refused(
    change: Callable[[dict[str, Any]], object], process: ServerProcess, tmp_path: Path
) -> None:
    with pytest.raises(VocabularyMismatch, match="quick brown fox"):
        LlamaServer(process.url, tokenizer=changed(tmp_path, change))


def test_a_tokenizer_that_splits_unusual_text_differently_is_only_logged(
    process: ServerProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accents = {"type": "Replace", "pattern": {"String": "\u00e9"}, "content": "e"}
    tokenizer = changed(tmp_path, lambda found: found.update(normalizer=accents))
    with caplog.at_level(logging.WARNING):
        LlamaServer(process.url, tokenizer=tokenizer).close()
    assert "the tokenizer's ids are sent" in caplog.text
    caplog.clear()
    LlamaServer(process.url, tokenizer=Wrapped(samples.tiny_tokenizer())).close()
    assert not caplog.text


# -- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [({"endpoint_slots": False}, None, "501"), ({"api_keys": ["right"]}, "wrong", "401")],
)
def test_a_server_that_lists_no_slots_is_still_reachable(
    settings: dict[str, Any], key: str | None, reason: str, tmp_path: Path
) -> None:
    with (
        serve(tmp_path, **settings) as running,
        LlamaServer(running.url, api_key=key) as server,
    ):
        (state, *_), (blocks, *_) = server.kv_state(), server.kv_report()
        assert state.is_reachable
        assert blocks.is_reachable
        assert reason in state.unknown[0]
        assert reason in blocks.unknown[0]
        assert server.stats().refusals == {"slots_not_listed": 2}
        running.kill()
        assert not server.kv_state()[0].is_reachable
        assert "out of reach" in server.kv_state()[0].unknown[0]


@pytest.mark.parametrize("architecture", ["mamba", "lfm2"])
def test_the_state_of_a_sequence_does_not_grow_with_its_tokens(
    architecture: str, tmp_path: Path
) -> None:
    model = samples.tiny_model(architecture=architecture)
    with (
        serve(tmp_path, n_slots=1, model=model, n_ctx_checkpoints=0) as running,
        client(running, slot_folder=tmp_path) as server,
    ):
        complete(server, prompt(1, 400))
        complete(server, prompt(2, 10))  # too short to be saved, and measured
        (state,) = server.kv_state()
        written = server.save_slot(0, "measured.bin").n_bytes
        assert state.n_tokens == 15
        assert 0.9 * written <= state.n_bytes <= 1.1 * written
        (slot,) = server.kv_report()
        assert sum(block.n_bytes for block in slot.blocks) == state.n_bytes


# -- connections ----------------------------------------------------------------------------------


@both_clients
@pytest.mark.parametrize("separator", ["\\u2028", "\\u2029", "\\u0085"])
def test_a_stream_is_split_at_newlines_only(
    separator: str, connect: Connect, process: ServerProcess
) -> None:
    grammar = f'root ::= "a{separator}b"'
    with connect(process.url) as server:
        expected = complete(server, prompt(1, 80), n_predict=20, grammar=grammar).completion.text
        assert len(expected) == 3
        pieces = server.stream(prompt(1, 80), n_predict=20, grammar=grammar)
        assert "".join(piece.text for piece in pieces) == expected


def test_event_loops_that_ended_leave_no_connection(process: ServerProcess) -> None:
    def n_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    server = async_client(process)
    asyncio.run(server.complete(prompt(1, 80), n_predict=1))
    before = n_open()
    for _ in range(10):
        asyncio.run(server.complete(prompt(1, 80), n_predict=1))
    assert n_open() <= before + 2
    assert len(server._connection._loops) == 1
    asyncio.run(server.aclose())


def test_a_forked_child_does_not_wait_for_its_parent(process: ServerProcess) -> None:
    with client(process) as server:
        pieces = server.stream(prompt(1, 300), n_predict=500, ignore_eos=True)
        next(pieces)
        pieces.close()
        statuses = [in_child(lambda: server.flush(5))]
        is_over = threading.Event()

        def busy() -> None:
            while not is_over.is_set():
                server.stats()
                server.slots()

        threads = [threading.Thread(target=busy) for _ in range(3)]
        for thread in threads:
            thread.start()
        statuses += [in_child(partial(ask_in_child, server, seed)) for seed in range(8)]
        is_over.set()
        for thread in threads:
            thread.join()
    assert statuses == [0] * 9


def test_a_forked_child_uses_an_async_client_of_its_parent(process: ServerProcess) -> None:
    with InLoop(process.url) as server:
        server.complete(prompt(1, 40), n_predict=1)  # the loop's connections stay open

        def ask() -> None:
            found = asyncio.run(server.inner.complete(prompt(1, 40), n_predict=1))
            assert found.n_live == 0  # the child knows of no slot

        statuses = [in_child(ask) for _ in range(4)]
        assert server.complete(prompt(2, 40), n_predict=1).completion.n_prompt == 40
    assert statuses == [0] * 4


def ask_in_child(server: LlamaServer, seed: int) -> None:
    server.stats()
    server.complete(prompt(seed, 40), n_predict=1)


def in_child(do: Callable[[], object]) -> int:
    """Return the exit status of a child; a signal ends one that hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads, on purpose
        pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's handler would not end the child
        signal.alarm(20)
        try:
            do()
            os._exit(0)
        except BaseException:  # noqa: BLE001 (a child must not run the parent's tests)
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@both_clients
def test_slow_saves_do_not_delay_other_slots(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    is_over = threading.Event()

    def save(body: dict[str, Any], slot: str) -> Any:
        if slot != "4":
            is_over.wait(10)
        return pretender.save(body, slot)

    pretender.say["/props"] = {**PROPS, "total_slots": 8}
    pretender.say["save"] = save
    with connect(url, timeout_s=20) as server:
        try:
            for seed in range(5):
                assert server.complete(prompt(seed, 99), n_predict=1).id_slot == seed
            began = time.monotonic()
            assert server.complete([*prompt(4, 99), 9], n_predict=1).n_live == 99
            assert time.monotonic() - began < 2
            with pytest.raises(ServerTimeout, match=r"4 slots .* within 0\.1 s"):
                server.flush(0.1)
        finally:
            is_over.set()


@both_clients
def test_a_dripping_answer_and_an_endless_one_are_ended(
    connect: Connect, url: str, pretender: Pretender, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretender.drip_s = 0.1
    pretender.say["/health"] = b" " * 100
    with connect(url, timeout_s=0.5) as server:
        began = time.monotonic()
        with pytest.raises(ServerTimeout, match="in full"):
            server.health()
        assert time.monotonic() - began < 2
        pretender.drip_s = 0.0
        monkeypatch.setattr(exchange, "_MAX_ANSWER_BYTES", 1000)
        for path in ("/health", "/completion"):
            pretender.say[path] = b" " * 2000
        with pytest.raises(InvalidAnswer, match="more than 1,000 bytes"):
            server.health()
        with pytest.raises(InvalidAnswer, match="more than 1,000 bytes"):
            list(server.stream([1, 2], n_predict=1))


def test_a_paused_server_is_waited_for_once(url: str, pretender: Pretender) -> None:
    with LlamaServer(url, timeout_s=0.5) as server:
        for is_known in (False, True):
            pretender.say["/props"] = lambda _: time.sleep(1)
            n_prompts = pretender.asked["/completion"]
            with pytest.raises(ServerTimeout, match="/props"):
                server.complete(prompt(1, 100), n_predict=1)
            assert pretender.asked["/completion"] == n_prompts
            pretender.say["/props"] = PROPS
            assert complete(server, prompt(1, 100)).completion.n_cached == 99 * is_known


@pytest.mark.parametrize(
    "said",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"status": "ok"}'.decode().encode("utf-16"),
        b"9" * 10_000,
        b'{"status": 1' + b"0" * 400 + b"}",
    ],
)
def test_answers_of_any_shape_are_typed_errors(said: bytes, url: str, pretender: Pretender) -> None:
    pretender.say["/health"] = said
    with LlamaServer(url) as server:
        with pytest.raises(InvalidAnswer):
            server.health()
        pretender.say["/health"] = (500, said)
        with pytest.raises(ServerFailed):
            server.health()


@pytest.mark.parametrize("tokens", [["a"], [1.5], [2**40], [-1], {"a": 1}, "abc"])
def test_ids_of_a_stream_are_checked(tokens: Any, url: str, pretender: Pretender) -> None:
    piece = json.dumps({"content": "a", "tokens": tokens})
    pretender.say["/completion"] = f"data: {piece}\n\n".encode()
    with LlamaServer(url) as server, pytest.raises(InvalidAnswer, match="tokens"):
        list(server.stream([1, 2], n_predict=1))


def test_figures_that_are_too_large_are_typed_errors(url: str, pretender: Pretender) -> None:
    with LlamaServer(url) as server:
        for changes in (
            {"completion_probabilities": [{"top_logprobs": [{"id": 1, "logprob": 10**400}]}]},
            {"timings": {"cache_n": 0, "prompt_n": 2, "predicted_ms": 10**400}},
        ):
            pretender.say["/completion"] = answer(2, **changes)
            with contextlib.suppress(InvalidAnswer):
                assert server.completion([1, 2], n_predict=1).first_token_s > 0


def test_the_charset_of_an_answer_is_ignored(url: str, pretender: Pretender) -> None:
    pretender.headers = {"Content-Type": "text/html; charset=utf-16"}
    pretender.say["/health"] = {"status": "ok"}
    with LlamaServer(url) as server:
        assert server.health() == "ok"


def test_a_redirect_names_its_location(url: str, pretender: Pretender) -> None:
    pretender.headers = {"Location": "https://elsewhere.example/props"}
    pretender.say["/health"] = (302, b"")
    with LlamaServer(url) as server, pytest.raises(RequestRejected, match=r"elsewhere\.example"):
        server.health()


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_s": None}, "timeout_s"),
        ({"timeout_s": "5"}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"connect_timeout_s": float("nan")}, "timeout_s"),
        ({"api_key": "a\nb"}, "api_key"),
        ({"api_key": "schlüssel"}, "api_key"),
        ({"verify": "/no/such.pem"}, r"verify.*such\.pem"),
        ({"verify": __file__}, "verify"),
        ({"verify": 7}, "verify"),
        ({"slot_settings": {"a": 1}}, "SlotSettings"),
        ({"tokenizer": Tokenizer(BPE())}, r"tokcache\.wrap"),
        *(
            ({"url": url}, "URL")
            for url in (
                None,
                "",
                "localhost:8080",
                "http://127.0.0.1:99999",
                "ftp://x",
                "http://user name@[::1",
                "http://",
            )
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        LlamaServer(**{"url": "https://127.0.0.1:9", **settings})


@both_clients
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": float("nan")},
        {"stop": {"a"}},
        {"lora": {1, 2}},
        {"n_cmpl": 2},
        {"post_sampling_probs": True},
        {"stream": True},
    ],
)
def test_settings_that_cannot_be_sent_or_read_are_refused_before_a_slot_is_touched(
    settings: dict[str, Any], connect: Connect, url: str, pretender: Pretender
) -> None:
    with connect(url) as server:
        for call in (
            server.complete,
            server.completion,
            lambda *a, **k: list(server.stream(*a, **k)),
        ):
            with pytest.raises(InvalidConfig, match=next(iter(settings))):
                call([1, 2], n_predict=1, **settings)
    assert not pretender.asked


def test_ids_outside_the_vocabulary_empty_no_slot(process: ServerProcess) -> None:
    with client(process, slot_ids=(0,)) as server:
        complete(server, prompt(1, 100))
        for tokens in ([-1], [5, 2048], [2**31 - 1]):
            with pytest.raises(InvalidTokens, match=str(tokens[-1])):
                server.complete(tokens, n_predict=1)
        assert complete(server, prompt(1, 100)).n_live == 99


# -- after close() --------------------------------------------------------------------------------


def test_a_request_during_close_fails_with_the_reason(process: ServerProcess) -> None:
    server = client(process)
    errors: list[BaseException] = []

    def ask(*, is_stream: bool) -> None:
        settings: dict[str, Any] = {"n_predict": 800, "ignore_eos": True}
        try:
            if is_stream:
                list(server.stream(prompt(1, 100), **settings))
            else:
                server.complete(prompt(2, 100), **settings)
        except BaseException as error:  # noqa: BLE001 (checked below)
            errors.append(error)

    threads = [threading.Thread(target=ask, kwargs={"is_stream": is_it}) for is_it in (True, False)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.close()
    for thread in threads:
        thread.join(30)
    assert [type(error) for error in errors] == [ServerUnreachable] * len(errors)
    for ask_again in (
        lambda: server.complete([1, 2], n_predict=1),
        server.health,
    ):
        with pytest.raises(ServerUnreachable, match="closed"):
            ask_again()
    server.close()
