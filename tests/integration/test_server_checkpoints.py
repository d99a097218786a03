"""Saved slots of sliding window, recurrent and hybrid models: reuse after a restart, exactness."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.served import N_PREDICT, client, port_of, prompt, serve
from tokcache import samples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tokcache.llama.server import Completion, LlamaServer, Reused

ARCHITECTURES = ("gemma3", "mamba2", "lfm2", "falcon-h1")
TOKENS = prompt(1, 151)
# llama-server makes a checkpoint 4 tokens before a prompt's end, and one n_ubatch (64) before
# that. From a checkpoint of a sliding window one token fewer is used.
LAST = {"gemma3": 146, "mamba2": 147, "lfm2": 147, "falcon-h1": 147}
FIRST = {"gemma3": 86, "mamba2": 87, "lfm2": 87, "falcon-h1": 87}


@pytest.fixture
def clients() -> Iterator[contextlib.ExitStack]:
    """Close clients that a test uses with several servers."""
    with contextlib.ExitStack() as opened:
        yield opened


def serve_one(folder: Path, architecture: str, port: int = 0, **settings: Any) -> Any:
    """Serve with slot 0 for the client and slot 1 for the expected answers."""
    model = samples.tiny_model(architecture=architecture, seed=settings.pop("seed", 0))
    return serve(folder, port=port, n_slots=2, model=model, **settings)


def complete(server: LlamaServer, tokens: list[int], **settings: Any) -> Reused:
    found = server.complete(tokens, n_predict=N_PREDICT, n_probs=4, **settings)
    server.flush(30)
    return found


def uncached(server: LlamaServer, tokens: list[int]) -> Completion:
    return server.completion(tokens, n_predict=N_PREDICT, n_probs=4, id_slot=1, cache_prompt=False)


def require_same(found: Completion, expected: Completion, tolerance: float = 1e-2) -> None:
    """Assert that two greedy answers have the same text and, up to rounding, the same logits.

    After a tie of two tokens they may differ.
    """
    ours, theirs = found.token_ids.tolist(), expected.token_ids.tolist()
    assert len(ours) == len(theirs)
    for n, (one, other) in enumerate(zip(found.probabilities, expected.probabilities, strict=True)):
        known = dict(zip(other.token_ids, other.logprobs, strict=True))
        both = [
            (known[t], p) for t, p in zip(one.token_ids, one.logprobs, strict=True) if t in known
        ]
        assert len(both) >= 2
        assert max(abs(a - b) for a, b in both) < tolerance
        if ours[n] != theirs[n]:
            assert known[theirs[n]] - known[ours[n]] < tolerance
            return


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_slot_is_continued_after_a_restart(
    architecture: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    clients: contextlib.ExitStack,
) -> None:
    with serve_one(tmp_path, architecture) as running:
        port = port_of(running)
        server = client(running, slot_folder=tmp_path, slot_ids=(0,))
        clients.enter_context(server)
        answer = complete(server, TOKENS).completion.token_ids.tolist()
    n_answered = len(TOKENS) + N_PREDICT - 1  # the last token was never decoded
    n_whole = LAST[architecture] if architecture == "gemma3" else n_answered
    prompts = {
        "the same": (TOKENS, LAST[architecture]),
        "with the answer": ([*TOKENS, *answer, *prompt(9, 20)], n_whole),
        "with another answer": ([*TOKENS, *prompt(9, 20)], LAST[architecture]),
        "parts within": ([*TOKENS[:120], *prompt(9, 40)], FIRST[architecture]),
    }
    with serve_one(tmp_path, architecture, port=port), caplog.at_level(logging.WARNING):
        assert complete(server, TOKENS).n_restored == LAST[architecture]
        for name, (tokens, n_reused) in prompts.items():
            complete(server, prompt(50, 100))  # other contents for the slot
            found = complete(server, tokens)
            assert found.n_restored == found.completion.n_cached, name
            assert found.n_restored == n_reused, name
            require_same(found.completion, uncached(server, tokens))
        # A prompt that differs before the first checkpoint is decoded; other restores go on.
        complete(server, prompt(50, 100))
        early = [*TOKENS[:80], *prompt(9, 40)]
        found = complete(server, early)
        assert found.completion.n_cached == 0
        require_same(found.completion, uncached(server, early))
        complete(server, prompt(50, 100))
        assert complete(server, TOKENS).n_restored == LAST[architecture]
        assert server.stats().refusals == {"restore_not_used_by_server": 1}
        assert caplog.messages == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chats_that_share_their_beginning_alone_do_not_end_the_restores_of_others(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two chats take turns in one slot; both begin alike, where the server has no checkpoint."""
    shared, thinking = prompt(70, 100), [7, 8]
    chats = [[*shared, *prompt(71 + n, 150)] for n in range(2)]
    with (
        serve_one(tmp_path, architecture) as running,
        client(running, slot_folder=tmp_path, slot_ids=(0,)) as server,
        caplog.at_level(logging.WARNING),
    ):
        for turn in range(3):
            for n, chat in enumerate(chats):
                found = complete(server, [*chat, *thinking])
                require_same(found.completion, uncached(server, [*chat, *thinking]), 2e-2)
                if turn:  # the last prompt's thinking was opened, and is dropped
                    assert found.n_restored >= len(chat) - 40 - 5
                chats[n] = [*chat, *prompt(80 + 2 * turn + n, 40)]
        assert server.stats().refusals == {"restore_not_used_by_server": 1}
        assert caplog.messages == []


@pytest.mark.parametrize("architecture", ["mamba2", "lfm2", "falcon-h1"])
def test_a_second_file_ends_where_prompts_part(architecture: str, tmp_path: Path) -> None:
    """Prompts end with tokens that are dropped later, before the last checkpoint of the server."""
    thinking = [*range(7, 14)]
    chats = [prompt(60 + n, 250) for n in range(2)]
    with (
        serve_one(tmp_path, architecture) as running,
        client(running, slot_folder=tmp_path, slot_ids=(0,)) as server,
    ):
        for turn in range(4):
            for n, chat in enumerate(chats):
                chats[n] = longer = [*chat, *prompt(80 + 2 * turn + n, 100)]
                found = complete(server, [*longer, *thinking])
                require_same(found.completion, uncached(server, [*longer, *thinking]), 2e-2)
                if turn == 1 and n == 0:  # the first that parts there goes far back
                    assert found.n_restored < len(chat) - 16
                if turn == 3:
                    assert found.n_restored == len(chat)
        assert server.stats().refusals == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_checkpoints_nothing_is_reused_and_the_log_names_the_option(
    architecture: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    clients: contextlib.ExitStack,
) -> None:
    with serve_one(tmp_path, architecture, n_ctx_checkpoints=0) as running:
        port = port_of(running)
        server = client(running, slot_folder=tmp_path, slot_ids=(0,))
        clients.enter_context(server)
        complete(server, TOKENS)
    with serve_one(tmp_path, architecture, port=port, n_ctx_checkpoints=0):
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                found = complete(server, TOKENS)
                assert found.n_restored == found.completion.n_cached == 0
                require_same(found.completion, uncached(server, TOKENS))
                complete(server, prompt(50, 100))
        assert server.stats().refusals == {"restore_not_used_by_server": 1}
        (message,) = caplog.messages
        assert "--ctx-checkpoints 32" in message
        assert "used 0 of the 150 tokens" in message
    # After a restart with that option, restores are tried again, with newly written files.
    with serve_one(tmp_path, architecture, port=port):
        assert complete(server, TOKENS).completion.n_cached == 0
        complete(server, prompt(50, 100))
        assert complete(server, TOKENS).n_restored == LAST[architecture]
        assert server.stats().refusals == {"restore_not_used_by_server": 1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_stay_right_after_any_number_of_restores(architecture: str, tmp_path: Path) -> None:
    """llama-server alone loses a token of the window each time it goes back to a checkpoint."""
    with (
        serve_one(tmp_path, architecture) as running,
        client(running, slot_folder=tmp_path, slot_ids=(0,)) as server,
    ):
        complete(server, TOKENS, conversation="chat")
        chat = [*TOKENS, 7, 8, 9]
        for turn in range(6):
            complete(server, prompt(50, 100))  # other contents for the slot
            branch = [*TOKENS, *prompt(100 + turn, 20)]
            found = complete(server, branch)
            assert found.n_restored >= LAST[architecture] - 1
            require_same(found.completion, uncached(server, branch))
            complete(server, prompt(50, 100))
            # Like a chat template that drops thinking: a turn differs at the last one's end.
            chat = [*chat[:-3], *prompt(200 + turn, 25)]
            found = complete(server, chat, conversation="chat")
            assert found.n_restored >= len(chat) - 25 - 3 - 5
            # Turns are decoded in other pieces than the whole chat, which changes llama.cpp's
            # logits by a tenth of the effect of one missing token.
            require_same(found.completion, uncached(server, chat), 2e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_slot_in_use_stays_right_after_the_server_went_back(
    architecture: str, tmp_path: Path
) -> None:
    with (
        serve_one(tmp_path, architecture) as running,
        client(running, slot_folder=tmp_path, slot_ids=(0,), min_save_tokens=1000) as server,
    ):
        complete(server, TOKENS)
        for turn in range(4):
            # The first prompt is so long that the shared tokens leave the window, the second so
            # short that the server makes a checkpoint at the position that it went back to.
            for n_more in (400, 20):
                tokens = [*TOKENS, *prompt(100 + turn, n_more)]
                found = complete(server, tokens)
                assert found.n_restored == 0
                require_same(found.completion, uncached(server, tokens))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_comparison_fails_for_a_wrong_state(architecture: str, tmp_path: Path) -> None:
    """Control: with a state of other weights, used up to the checkpoint, the text differs."""
    with serve_one(tmp_path, architecture, seed=5) as running, client(running) as server:
        server.completion(TOKENS, n_predict=N_PREDICT, id_slot=0)
        server.save_slot(0, "wrong.bin")
    with serve_one(tmp_path, architecture) as running, client(running) as server:
        server.restore_slot(0, "wrong.bin")
        found = server.completion(TOKENS, n_predict=N_PREDICT, id_slot=0, n_probs=4)
        assert found.n_cached == LAST[architecture]
        with pytest.raises(AssertionError):
            require_same(found, uncached(server, TOKENS))
