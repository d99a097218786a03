"""Conversations and restarts reuse their prefix on every kind of memory, with the same answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.gateways import cached, gateway, httpx, system, upstream, user
from tokcache import samples

N_TURNS, N_ANSWER, N_CTX = 4, 8, 2048
N_TEMPLATE = 4  # tokens that open an answer
Turn = tuple[str, int, int]


def next_turn(messages: list[dict[str, Any]], text: str) -> None:
    messages += [{"role": "assistant", "content": text}, user("And another one?")]


def of_bare_server(folder: Path, model: Path) -> list[Turn]:
    """Return the text, prompt and cached tokens of each turn of a conversation in one slot."""
    turns: list[Turn] = []
    messages = [system(), user("Name a colour.")]
    with upstream(folder, model=model, n_ctx=N_CTX) as server:
        for _ in range(N_TURNS):
            body = {"messages": messages, "max_tokens": N_ANSWER, "temperature": 0, "id_slot": 0}
            url = f"{server.url}/v1/chat/completions"
            answer = httpx.post(url, json=body, timeout=300).json()
            text = answer["choices"][0]["message"]["content"]
            turns.append((text, answer["usage"]["prompt_tokens"], cached(answer)))
            next_turn(messages, text)
    return turns


def of_gateway(folder: Path, model: Path) -> list[Turn]:
    """Return the same with a restart of the llama-server and the gateway after half the turns."""
    turns: list[Turn] = []
    messages = [system(), user("Name a colour.")]
    for _ in range(2):
        with (
            upstream(folder / "slots", model=model, n_ctx=N_CTX) as server,
            gateway(folder / "own", server) as served,
        ):
            for _ in range(N_TURNS // 2):
                answer = served.chat(messages, max_tokens=N_ANSWER)
                text = answer["choices"][0]["message"]["content"]
                turns.append((text, answer["usage"]["prompt_tokens"], cached(answer)))
                next_turn(messages, text)
    return turns


def compare(folder: Path, model: Path) -> None:
    bare, given = of_bare_server(folder / "bare", model), of_gateway(folder, model)
    assert [text for text, _, _ in given] == [text for text, _, _ in bare]
    # A restored window has no older positions to go back to, so the answer and the tokens before
    # it are decoded again.
    for (_, n_prompt, n_cached), (_, n_asked, n_held) in zip(given, bare, strict=True):
        assert n_prompt == n_asked
        assert n_cached >= n_held - N_ANSWER - N_TEMPLATE
    assert all(n_cached > n_prompt // 2 for _, n_prompt, n_cached in given[1:])


@pytest.mark.parametrize("architecture", ["gemma3", "mamba", "granitehybrid", "lfm2-windowed"])
def test_a_restart_loses_nothing_that_the_server_itself_would_reuse(
    tmp_path: Path, architecture: str
) -> None:
    compare(tmp_path, samples.tiny_model(architecture=architecture))


def test_a_restart_loses_nothing_on_a_real_model(tmp_path: Path) -> None:
    path = os.environ.get("TOKCACHE_REAL_MODEL")
    if path is None:
        pytest.skip("TOKCACHE_REAL_MODEL names no GGUF")
    compare(tmp_path, Path(path))
