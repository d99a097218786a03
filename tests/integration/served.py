"""Real llama-servers for tests, prompts for them, and what is right."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from tokcache import TokenIds, samples

pytest.importorskip("xllamacpp", reason="needs tokcache[demo]")
pytest.importorskip("httpx", reason="needs tokcache[server]")

from bench import soak
from tokcache.llama.server import Completion, LlamaServer, SlotSettings
from tokcache.llama.server_process import ServerProcess

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 64
N_CTX = 1024
N_PREDICT = 6


class Wrapped:
    """What LlamaServer asks of a wrapped tokenizer, and no more."""

    def __init__(self, path: Path) -> None:
        self._plain = Tokenizer.from_file(str(path))

    def token_ids(self, text: str, *, add_special_tokens: bool = True) -> TokenIds:
        return TokenIds(self._plain.encode(text, add_special_tokens=add_special_tokens).ids)

    def unwrap(self) -> Tokenizer:
        return self._plain


def serve(folder: Path, *, port: int = 0, n_slots: int = 2, **settings: Any) -> ServerProcess:
    """Start a server whose saved slots lie in `folder`."""
    model = settings.pop("model", None) or samples.tiny_model()
    return ServerProcess(
        model,
        n_ctx=settings.pop("n_ctx", N_CTX),
        n_slots=n_slots,
        block_tokens=BLOCK,
        n_threads=1,
        port=port,
        slot_folder=folder,
        overrides=settings,
    )


def port_of(process: ServerProcess) -> int:
    return int(process.url.rpartition(":")[2])


def client(process: ServerProcess, **settings: Any) -> LlamaServer:
    """Return a client whose slots are kept as `settings` say."""
    return LlamaServer(process.url, timeout_s=60, slot_settings=SlotSettings(**settings))


def prompt(seed: int, n_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 2048) for _ in range(n_tokens)]


def uncached(server: LlamaServer, tokens: list[int], n_predict: int = N_PREDICT) -> Completion:
    """Return what the server says with nothing cached."""
    return server.completion(tokens, n_predict=n_predict, id_slot=0, n_probs=4, cache_prompt=False)


def is_right(given: Completion, expected: Completion) -> bool:
    """Return whether two greedy answers are equal, or part where two tokens are as likely."""
    if len(given.token_ids) != len(expected.token_ids):
        return False
    found = soak.gap(given, expected)
    # A place within an unfinished character is not told; none of these prompts parts there.
    return found is not None and found <= soak.NEAR_TIE
