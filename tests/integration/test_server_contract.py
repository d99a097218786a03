"""One contract of both clients, LlamaServer and AsyncLlamaServer, on a real llama-server."""

from __future__ import annotations

import asyncio
import inspect
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.served import (
    N_CTX,
    N_PREDICT,
    InLoop,
    Wrapped,
    both_clients,
    complete,
    is_right,
    prompt,
    serve,
    uncached,
)
from tokcache import TokenIds, samples
from tokcache.errors import ServerError, ServerUnreachable, VocabularyMismatch
from tokcache.llama.server import AsyncLlamaServer, LlamaServer, SlotSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.served import Connect
    from tokcache.samples.server_process import ServerProcess


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[ServerProcess]:
    with serve(folder, endpoint_metrics=True) as running:
        yield running


@pytest.fixture(params=[LlamaServer, InLoop], ids=["LlamaServer", "AsyncLlamaServer"])
def server(
    request: pytest.FixtureRequest, process: ServerProcess, folder: Path
) -> Iterator[LlamaServer]:
    tokenizer = Wrapped(samples.tiny_tokenizer())
    settings = SlotSettings(slot_folder=folder)
    with request.param(process.url, tokenizer=tokenizer, slot_settings=settings) as made:
        yield made


def public(kind: type) -> dict[str, Any]:
    return {name: each for name, each in vars(kind).items() if not name.startswith("_")}


def test_every_method_has_one_of_the_same_name_and_signature() -> None:
    plain, awaited = public(LlamaServer), public(AsyncLlamaServer)
    assert set(plain) - {"close"} == set(awaited) - {"aclose"}
    for name in set(plain) - {"close"}:
        ours, theirs = inspect.signature(plain[name]), inspect.signature(awaited[name])
        assert ours.parameters == theirs.parameters, name
        if name == "stream":
            assert inspect.isasyncgenfunction(awaited[name])
        else:
            assert inspect.iscoroutinefunction(awaited[name]), name
            assert ours.return_annotation == theirs.return_annotation, name
    constructors = [inspect.signature(kind.__init__) for kind in (LlamaServer, AsyncLlamaServer)]
    assert constructors[0] == constructors[1]


def test_the_server_is_described(server: LlamaServer) -> None:
    assert server.health() == "ok"
    props = server.props()
    assert (props.n_slots, props.n_ctx) == (2, N_CTX)
    assert [(slot.id, slot.n_ctx) for slot in server.slots()] == [(0, N_CTX), (1, N_CTX)]
    assert server.model_meta().n_vocab == 2048
    before = server.metrics()["llamacpp:prompt_tokens_total"]
    server.completion(prompt(1, 100), n_predict=1, cache_prompt=False)
    assert server.metrics()["llamacpp:prompt_tokens_total"] == before + 100
    assert repr(server).endswith(
        f"LlamaServer {server.url}, model unknown, 0 slots, 0 saved (0 bytes)>"
    )


def test_text_is_encoded_and_decoded(server: LlamaServer) -> None:
    text = "<|im_start|>user\nWhat does it cost?<|im_end|>"
    ids = server.token_ids(text)
    assert isinstance(ids, TokenIds)
    assert server.tokenize(text) == ids
    assert server.detokenize(ids) == text
    assert server.complete(text, n_predict=1).completion.n_prompt == len(ids)


@both_clients
def test_text_is_encoded_by_the_server_without_a_tokenizer(
    connect: Connect, process: ServerProcess
) -> None:
    with connect(process.url) as server:
        assert server.token_ids("What is it?") == server.tokenize("What is it?")
        assert server.complete("What is it?", n_predict=1).completion.text


def test_a_slot_is_saved_restored_and_erased(server: LlamaServer, folder: Path) -> None:
    tokens = prompt(2, 200)
    server.completion(tokens, n_predict=0, id_slot=0, cache_prompt=False)
    saved = server.save_slot(0, "kept.bin")
    assert saved.n_tokens == len(tokens)
    assert saved.n_bytes == (folder / "kept.bin").stat().st_size
    server.erase_slot(0)
    assert server.completion(tokens, n_predict=1, id_slot=0).n_cached == 0
    server.erase_slot(0)
    assert server.restore_slot(0, "kept.bin") == saved
    assert server.completion([*tokens, 9], n_predict=1, id_slot=0).n_cached == len(tokens)


def test_prompts_start_from_slots_and_files(server: LlamaServer) -> None:
    tokens = prompt(3, 200)
    first = complete(server, tokens, n_probs=2)
    assert (first.n_live, first.n_restored, first.completion.n_cached) == (0, 0, 0)
    likeliest = first.completion.probabilities[0].token_ids[0]
    assert likeliest == first.completion.token_ids[0]
    again = complete(server, tokens)
    assert (again.n_live, again.n_restored) == (199, 0)
    for seed in (4, 5):  # other contents for both slots
        complete(server, prompt(seed, 200))
    restored = complete(server, tokens)
    assert (restored.n_live, restored.n_restored) == (0, 199)
    stats = server.stats()
    assert (stats.requests, stats.hits, stats.restores) == (5, 2, 1)
    assert (stats.context_tokens, stats.restored_tokens) == (199, 199)
    assert is_right(restored.completion, uncached(server, tokens))
    (state,) = (slot for slot in server.kv_state() if slot.id == restored.id_slot)
    assert (state.n_layers, state.source, state.is_reachable) == (4, "model", True)
    (report,) = (slot for slot in server.kv_report() if slot.id == restored.id_slot)
    assert sum(block.n_tokens for block in report.blocks) == 200 + N_PREDICT - 1


def test_a_stream_is_the_same_completion(server: LlamaServer) -> None:
    tokens = prompt(6, 150)
    expected = complete(server, tokens).completion
    pieces = list(server.stream(tokens, n_predict=N_PREDICT))
    last = pieces[-1].completion
    assert last is not None
    assert last.text == "".join(piece.text for piece in pieces) == expected.text
    assert (last.n_cached, last.stop, last.n_predicted) == (149, "limit", N_PREDICT)
    assert server.stats().hits == 1


def test_an_aborted_stream_frees_its_slot_and_keeps_its_tokens(server: LlamaServer) -> None:
    tokens = prompt(7, 150)
    pieces = server.stream(tokens, n_predict=800)
    next(pieces)
    began = time.monotonic()
    pieces.close()
    server.flush(30)
    assert time.monotonic() - began < 5
    assert not any(slot.is_processing for slot in server.slots())
    assert complete(server, tokens).completion.n_cached == 149


def test_scopes_are_separate_and_can_be_cleared(server: LlamaServer, folder: Path) -> None:
    tokens = prompt(8, 150)
    before = set(folder.iterdir())
    server.pin("chat", scope="a")
    complete(server, tokens, scope="a", conversation="chat")
    complete(server, tokens, scope="b")
    assert server.stats().hits == 0
    assert any(slot.is_pinned for slot in server.kv_report())
    server.unpin("chat", scope="a")
    assert not any(slot.is_pinned for slot in server.kv_report())
    server.clear(scope="a")
    assert len(set(folder.iterdir()) - before) == server.stats().n_files == 1
    assert complete(server, tokens, scope="a").completion.n_cached == 0
    assert complete(server, tokens, scope="b").completion.n_cached == 149
    server.clear()
    assert (server.stats().n_files, set(folder.iterdir())) == (0, before)


@both_clients
def test_the_tokenizer_of_another_model_is_refused(
    connect: Connect, process: ServerProcess, tmp_path: Path
) -> None:
    content = samples.tiny_tokenizer().read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("<|im_end|>", "<|other|>"))
    with pytest.raises(VocabularyMismatch, match="other"):
        connect(process.url, tokenizer=Wrapped(tmp_path / "tokenizer.json"))


def test_an_async_client_checks_the_tokenizer_at_its_first_request_at_the_latest(
    process: ServerProcess, tmp_path: Path
) -> None:
    content = samples.tiny_tokenizer().read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("<|im_end|>", "<|other|>"))

    async def ask() -> None:
        server = AsyncLlamaServer(process.url, tokenizer=Wrapped(tmp_path / "tokenizer.json"))
        for asked in ("text", [1, 2]):
            with pytest.raises(VocabularyMismatch, match="other"):
                await server.complete(asked, n_predict=1)
            with pytest.raises(VocabularyMismatch, match="other"):
                await anext(server.stream(asked, n_predict=1))
        with pytest.raises(VocabularyMismatch, match="other"):
            await server.token_ids("text")
        assert (await server.stats()).requests == 0
        await server.aclose()

    asyncio.run(ask())


class Slow(Wrapped):
    """A tokenizer that takes a quarter of a second a text."""

    def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        time.sleep(0.25)
        return super().token_ids(text, add_special_tokens=add_special_tokens, scope=scope)


def test_an_event_loop_stays_free_while_a_tokenizer_works(process: ServerProcess) -> None:
    async def longest_pause_s(doing: Any) -> float:
        task, pauses = asyncio.create_task(doing), [0.0]
        while not task.done():
            began = time.monotonic()
            await asyncio.sleep(0.005)
            pauses.append(time.monotonic() - began)
        await task
        return max(pauses)

    async def check() -> None:
        server = AsyncLlamaServer(process.url, tokenizer=Slow(samples.tiny_tokenizer()))
        for doing in (
            server.__aenter__(),
            server.token_ids("a text"),
            server.complete("a text", n_predict=1),
        ):
            assert await longest_pause_s(doing) < 0.2
        await server.aclose()

    asyncio.run(check())


@both_clients
def test_a_closed_client_says_so(connect: Connect, process: ServerProcess) -> None:
    server: Any = connect(process.url)
    server.health()
    server.close()
    in_loop = isinstance(server, InLoop)
    ask = partial(asyncio.run, server.inner.health()) if in_loop else server.health
    with pytest.raises(ServerUnreachable, match="this client was closed"):
        ask()


@both_clients
def test_errors_have_the_servers_message(connect: Connect, process: ServerProcess) -> None:
    with connect(process.url) as server:
        with pytest.raises(ServerError, match="exceeds the available context size"):
            server.completion(prompt(1, 3000), n_predict=1)
        with pytest.raises(ServerError, match="Unable to restore slot"):
            server.restore_slot(0, "absent.bin")
