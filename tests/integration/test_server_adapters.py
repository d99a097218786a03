"""Requests that name LoRA adapters, against real llama-servers: reuse, trust, exactness."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration import served
from tests.integration.served import BLOCK, N_PREDICT, prompt, serve_with_adapter
from tokcache import samples
from tokcache.errors import RequestRejected
from tokcache.llama.server import LlamaServer, SlotSettings
from tokcache.llama.server.namespaces import adapters_key
from tokcache.llama.server.slot import Condition

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokcache.llama.server import Completion

HALF: dict[str, Any] = {"lora": [{"id": 0, "scale": 0.5}]}
NONE: dict[str, Any] = {"lora": [{"id": 0, "scale": 0.0}]}
WHOLE: dict[str, Any] = {}  # as the server was started: scale 1


complete = partial(served.complete, n_probs=4)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serve_with_adapter(folder) as address:
        yield address


def client(url: str, folder: Path, **settings: Any) -> LlamaServer:
    return LlamaServer(
        url, timeout_s=60, slot_settings=SlotSettings(slot_folder=folder, **settings)
    )


def right(server: LlamaServer, tokens: list[int], **settings: Any) -> Completion:
    return server.completion(
        tokens, n_predict=N_PREDICT, id_slot=1, n_probs=4, cache_prompt=False, **settings
    )


def test_a_requests_adapters_are_applied_before_a_restore(
    url: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama-server empties a slot at a request with other adapters, even after a restore."""
    tokens = prompt(1, 200)
    expected = {}
    with client(url, folder, slot_ids=(0,)) as server:
        for name, settings in (("half", HALF), ("none", NONE), ("whole", WHOLE)):
            expected[name] = right(server, tokens, **settings)
        assert len({answer.token_ids for answer in expected.values()}) == 3
        for turn in range(3):
            for name, settings in (("half", HALF), ("none", NONE), ("whole", WHOLE)):
                found = complete(server, tokens, **settings)
                assert found.completion.token_ids == expected[name].token_ids
                # The only slot held other adapters before, so each turn starts from a file.
                assert found.n_restored == found.completion.n_cached == (199 if turn else 0)
        assert server.stats().refusals == {}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_requests_adapters_are_applied_after_a_restart_too(tmp_path: Path) -> None:
    tokens = prompt(2, 200)
    with serve_with_adapter(tmp_path) as address:
        port = int(address.rpartition(":")[2])
        server = client(address, tmp_path)
        first = complete(server, tokens, **HALF)
    with serve_with_adapter(tmp_path, port=port):
        found = complete(server, tokens, **HALF)
        assert found.n_restored == found.completion.n_cached == 199
        assert found.completion.token_ids == first.completion.token_ids
        assert server.stats().refusals == {}
    server.close()


def test_failed_restores_with_one_adapter_do_not_stop_those_with_others(
    url: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, other = prompt(3, 200), prompt(4, 200)
    with client(url, folder, slot_ids=(0,)) as server, caplog.at_level(logging.WARNING):
        complete(server, tokens, **HALF)
        complete(server, tokens)
        complete(server, other, **NONE)
        # As if the server had emptied the slots with this adapter.
        half = adapters_key(HALF["lora"])
        for kind in ("prompt", "whole"):
            assert server._manager.trust.verify(half, kind, 100, 0) == (kind == "whole")
        server._manager.records.shelf.clear(half)
        assert complete(server, tokens).completion.n_cached == 199
        assert complete(server, other, **NONE).completion.n_cached == 199
        assert complete(server, tokens, **HALF).completion.n_cached == 0
        assert complete(server, other, **NONE).completion.n_cached == 199
        assert complete(server, tokens, **HALF).completion.n_cached == 0
    messages = [message for message in caplog.messages if "no longer restored" in message]
    assert len(messages) == 2
    assert all("with lora [[0, 0.5]]" in message for message in messages)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_reproducible_mode_saves_states_decoded_with_the_adapters(
    architecture: str, tmp_path: Path
) -> None:
    model = samples.tiny_model(architecture=architecture)
    with serve_with_adapter(tmp_path, model) as address:
        settings: dict[str, Any] = {"reproducible": True, "block_tokens": BLOCK}
        with client(address, tmp_path, slot_ids=(0,), **settings) as server:
            for turn in range(2):
                for adapters in (HALF, NONE, WHOLE):
                    tokens = [*prompt(5, 150), *prompt(6 + turn, 40)]
                    found = complete(server, tokens, **adapters)
                    expected = right(server, tokens, **adapters)
                    assert found.completion.token_ids == expected.token_ids
                    if architecture == "llama":
                        assert found.completion.probabilities == expected.probabilities
                        assert found.n_restored == (128 if turn else 0)
            assert (architecture != "llama") or server.stats().refusals == {}


def test_without_a_slot_save_path_adapters_do_not_share_slots() -> None:
    """llama-server alone would continue a state of another adapter, and answer wrongly."""
    tokens = prompt(7, 200)
    with serve_with_adapter("") as address, LlamaServer(address) as server:
        complete(server, tokens, **HALF)
        found = complete(server, tokens)
        assert found.completion.n_cached == 0
        assert found.completion.token_ids == right(server, tokens).token_ids
        assert server.stats().refusals == {"no_slot_save_path": 1}


def test_adapters_that_the_server_refuses_cost_no_slot_and_no_file(url: str, folder: Path) -> None:
    tokens = prompt(8, 200)
    wrong: dict[str, Any] = {"lora": {"id": 0, "scale": 1.0}}
    with client(url, folder, slot_ids=(0,)) as server:
        complete(server, tokens)
        for _ in range(2):
            with pytest.raises(RequestRejected, match="lora"):
                server.complete(tokens, n_predict=1, **wrong)
        assert server._manager.table.slots[0].condition is Condition.FREE
        assert complete(server, tokens).completion.n_cached == 199


def test_the_same_adapters_have_the_same_key() -> None:
    one = adapters_key([{"id": 1, "scale": 1}, {"id": 0, "scale": 0.5}])
    assert one == adapters_key(({"scale": 0.5, "id": 0}, {"id": 1, "scale": 1.0}))
    assert adapters_key(None) == adapters_key([]) == adapters_key(())
    different = [
        None,
        [{"id": 0, "scale": 1.0}],
        [{"id": 1, "scale": 1.0}],
        [{"id": 0, "scale": 10**400}],
        [{"id": 0}],
        [{"id": True, "scale": 1.0}],
        "abc",
        {"id": 0, "scale": 1.0},
    ]
    assert len({adapters_key(each) for each in different}) == len(different)
