"""What once brought wrong text, kept data or an outage, with real llama-servers and pretenders."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.pretended import PROPS, Pretender, answer, pretend
from tests.integration.served import N_PREDICT, client, port_of, prompt, serve, uncached
from tokcache import samples
from tokcache.errors import InvalidAnswer, InvalidConfig, ServerUnreachable
from tokcache.llama.server import LlamaServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tokcache.llama.server import Reused


@pytest.fixture
def pretender() -> Pretender:
    return Pretender()


@pytest.fixture
def url(pretender: Pretender) -> Iterator[str]:
    with pretend(pretender) as found:
        yield found


def complete(server: LlamaServer, tokens: list[int], **settings: Any) -> Reused:
    found = server.complete(tokens, n_predict=settings.pop("n_predict", N_PREDICT), **settings)
    server.flush(30)
    return found


# -- another model behind the same words ----------------------------------------------------------

WITH_ADAPTER = """
import sys, xllamacpp
model, adapter, folder = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = model, ["127.0.0.1"], 0
params.n_ctx, params.n_parallel, params.kv_unified = 2048, 2, False
params.slot_save_path, params.endpoint_slots, params.cache_ram_mib = folder + "/", True, 0
params.fit_params, params.n_ctx_checkpoints, params.cache_idle_slots = False, 0, False
params.ui, params.cpuparams.n_threads = False, 1
lora = xllamacpp.CommonAdapterLoraInfo()
lora.path, lora.scale = adapter, 1.0
params.lora_adapters = [lora]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def test_an_adapter_that_is_scaled_while_the_server_runs_is_another_model(tmp_path: Path) -> None:
    import httpx  # noqa: PLC0415 (an extra)

    model = samples.tiny_model()
    command = [sys.executable, "-c", WITH_ADAPTER, str(model), str(samples.tiny_lora(model))]
    with subprocess.Popen(  # noqa: S603 (fixed words)
        [*command, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with LlamaServer(address) as server:
            tokens = prompt(1, 300)
            with_adapter = complete(server, tokens).completion
            running = server.stream(prompt(2, 200), n_predict=30)
            next(running)
            httpx.post(f"{address}/lora-adapters", json=[{"id": 0, "scale": 0.0}])
            found = complete(server, tokens)
            list(running)  # begun with the one, ended with the other
            assert complete(server, prompt(2, 200)).n_restored == 0
            right = uncached(server, tokens)
            assert (found.n_live, found.n_restored) == (0, 0)
            assert found.completion.token_ids == right.token_ids != with_adapter.token_ids
            assert server.reuse_stats().restarts == 0
            assert complete(server, tokens).completion.n_cached == 299
        assert process.stdin is not None
        process.stdin.close()


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
        assert server.reuse_stats().refusals == {"files_of_another_model": 1}
        assert complete(server, tokens).completion.n_cached == 199
    server.close()


def test_a_model_that_cannot_be_asked_is_not_trusted_after_a_restart(
    url: str, pretender: Pretender
) -> None:
    with LlamaServer(url) as server:
        complete(server, prompt(1, 100))
        pretender.say["/props"] = {**PROPS, "media_marker": "two"}
        pretender.say["/completion"] = lambda body: answer(len(body["prompt"]))
        assert complete(server, prompt(1, 100)).n_restored == 0
        assert server.reuse_stats().refusals == {"files_of_another_model": 1}


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
        assert server.reuse_stats().refusals == {"server_not_understood": 1}


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


# -- what was forgotten ---------------------------------------------------------------------------


def test_a_forgotten_scope_leaves_nothing_that_was_being_saved_or_served(tmp_path: Path) -> None:
    with serve(tmp_path) as running, client(running, slot_folder=tmp_path) as server:
        server.complete(prompt(1, 400), n_predict=2, scope="a")
        server.forget("a")  # while it is being saved
        assert list(tmp_path.iterdir()) == []
        pieces = server.stream(prompt(2, 400), n_predict=20, scope="a")
        next(pieces)
        server.forget("a")  # while it is being served
        assert list(pieces)[-1].completion is not None
        server.flush(30)
        assert list(tmp_path.iterdir()) == []
        assert all(slot.space is None for slot in server._manager.table.slots.values())
        assert complete(server, prompt(1, 400), scope="a").completion.n_cached == 0
        assert complete(server, prompt(1, 400), scope="a").completion.n_cached == 399


def test_scopes_and_pins_hold_whatever_the_adapters(url: str) -> None:
    lora = [{"id": 0, "scale": 0.5}]
    with LlamaServer(url) as server:
        server.pin("c", "a")
        complete(server, prompt(1, 100), scope="a", lora=lora, conversation="c")
        complete(server, prompt(1, 100), scope="b", lora=lora)
        shelf = server._manager._shelf
        assert sorted(file.is_pinned for file in shelf) == [False, True]
        server.forget("a")
        assert [file.is_pinned for file in shelf] == [False]
        assert complete(server, prompt(1, 100), scope="a", lora=lora).n_live == 0


# -- one request's fault is not the next one's ----------------------------------------------------


@pytest.mark.parametrize("name", ["scope", "conversation"])
@pytest.mark.parametrize("value", [["a"], 7, b"a", {"a": 1}])
def test_names_of_another_type_are_refused(name: str, value: Any, url: str) -> None:
    with LlamaServer(url) as server:
        for ask in (server.complete, lambda *a, **k: list(server.stream(*a, **k))):
            with pytest.raises(InvalidConfig, match=name):
                ask(prompt(1, 100), n_predict=1, **{name: value})
        with pytest.raises(InvalidConfig, match=name):
            server.pin(**{"conversation": "c", name: value})
        assert complete(server, prompt(1, 100), conversation="c").completion.text == " it"
        assert complete(server, prompt(1, 100), conversation="c").n_live == 99


def test_a_file_that_was_cut_off_does_not_end_the_server(tmp_path: Path) -> None:
    tokens = prompt(1, 300)
    with serve(tmp_path, n_slots=1) as running, client(running, slot_folder=tmp_path) as server:
        complete(server, tokens)
        (file,) = tmp_path.iterdir()
        complete(server, prompt(2, 300))
        os.truncate(file, file.stat().st_size // 2)
        found = complete(server, tokens)
        assert found.completion.token_ids == uncached(server, tokens).token_ids
        assert server.reuse_stats().refusals == {"restore_failed": 1}


def test_a_file_the_server_ended_of_is_not_read_again(tmp_path: Path) -> None:
    tokens = prompt(1, 300)
    with serve(tmp_path, n_slots=1) as running:
        port = port_of(running)
        server = client(running)  # where the folder can't be reached
        complete(server, tokens)
        (file,) = tmp_path.iterdir()
        complete(server, prompt(2, 300))
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(ServerUnreachable):
            server.complete(tokens, n_predict=1)
    with serve(tmp_path, n_slots=1, port=port):
        assert complete(server, tokens).completion.n_cached == 0
    server.close()


def test_a_lie_about_what_a_slot_holds_costs_no_slot(url: str, pretender: Pretender) -> None:
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
