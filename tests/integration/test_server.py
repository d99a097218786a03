"""LlamaServer, its reproducible mode and ServerProcess against a real llama-server."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

import tokcache
from tests.integration.served import Wrapped
from tests.test_samples import bundled
from tokcache import samples
from tokcache.errors import (
    InvalidConfig,
    InvalidTokens,
    MissingFile,
    ServerError,
    VocabularyMismatch,
)

pytest.importorskip("xllamacpp", reason="needs tokcache[demo]")
pytest.importorskip("httpx", reason="needs tokcache[server]")

from tokcache.llama.server import AsyncLlamaServer, Completion, LlamaServer, SlotSettings
from tokcache.samples.server_process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 64
N_PREDICT = 10


@pytest.fixture(scope="module")
def process() -> Iterator[ServerProcess]:
    settings: dict[str, Any] = {"n_ctx": 2048, "n_slots": 2, "block_tokens": BLOCK, "n_threads": 2}
    with ServerProcess(samples.tiny_model(), **settings) as running:
        yield running


@pytest.fixture(scope="module")
def server(process: ServerProcess) -> Iterator[LlamaServer]:
    with LlamaServer(process.url, tokenizer=Wrapped(samples.tiny_tokenizer())) as client:
        yield client


def reproducible(url: str) -> LlamaServer:
    """Return a client that manages slot 0 alone, in reproducible mode."""
    settings = SlotSettings(reproducible=True, block_tokens=BLOCK, slot_ids=(0,), min_save_tokens=1)
    return LlamaServer(url, slot_settings=settings)


def prompt(seed: int, n_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 2048) for _ in range(n_tokens)]


def uncached(server: LlamaServer, tokens: list[int]) -> Completion:
    server.erase_slot(1)
    return server.completion(tokens, n_predict=N_PREDICT, id_slot=1, n_probs=8)


def test_the_server_reports_its_properties(process: ServerProcess, server: LlamaServer) -> None:
    assert server.health() == "ok"
    props = server.props()
    assert (props.n_slots, props.n_ctx) == (2, 2048)
    assert Path(props.model_path) == samples.tiny_model()
    assert props.chat_template == samples.CHAT_TEMPLATE
    assert [(slot.id, slot.is_processing) for slot in server.slots()] == [(0, False), (1, False)]
    assert server.model_meta().n_vocab == 2048
    assert process.url.startswith("http://127.0.0.1:")


def test_a_prompt_found_in_the_slot_is_counted_and_timed(server: LlamaServer) -> None:
    tokens = prompt(1, 300)
    first = uncached(server, tokens)
    again = server.completion([*tokens, 5, 6], n_predict=N_PREDICT, id_slot=1)
    assert (first.n_prompt, first.n_cached) == (300, 0)
    assert (again.n_prompt, again.n_cached) == (302, 300)
    assert len(first.token_ids) == N_PREDICT
    assert len(set(first.token_ids)) > 3
    assert 0 < first.first_token_s < first.seconds
    likeliest = [position.token_ids[0] for position in first.probabilities]
    assert likeliest == first.token_ids.tolist()
    ignored = server.completion(tokens, n_predict=1, id_slot=1, cache_prompt=False)
    assert ignored.n_cached == 0


# Lengths near each end of a block, and those at which llama-server splits the last batch.
LENGTHS = [1, 2, 63, 64, 65, 66, 68, 69, 127, 128, 129, 132, 133, 200, 256, 257, 500]


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_a_restored_slot_answers_bit_for_bit_like_an_uncached_one(
    n_tokens: int, server: LlamaServer
) -> None:
    tokens = prompt(n_tokens, n_tokens)
    expected = uncached(server, tokens)
    with reproducible(server.url) as managed:
        for round_number in range(2):
            found = managed.complete(tokens, n_predict=N_PREDICT, n_probs=8)
            reusable = (n_tokens - 1) // BLOCK * BLOCK
            assert found.n_restored == (reusable if round_number else 0)
            assert found.completion.n_cached == reusable
            assert found.completion.token_ids == expected.token_ids
            assert found.completion.probabilities == expected.probabilities


def test_the_comparison_fails_for_a_cut_within_a_block(server: LlamaServer) -> None:
    differ = 0
    for seed in range(10):
        tokens = prompt(seed, 300)
        expected = uncached(server, tokens)
        server.erase_slot(1)
        server.completion(tokens[: BLOCK + 17], n_predict=0, id_slot=1)
        other = server.completion(tokens, n_predict=N_PREDICT, id_slot=1, n_probs=8)
        differ += other.probabilities != expected.probabilities
    assert differ


def test_branches_reuse_their_common_prefix(server: LlamaServer) -> None:
    shared = prompt(3, 4 * BLOCK + 10)
    branches = [shared + prompt(seed, 2 * BLOCK) for seed in (4, 5, 6)]
    with reproducible(server.url) as managed:
        found = [managed.complete(branch, n_predict=N_PREDICT, n_probs=8) for branch in branches]
        assert managed.stats().n_bytes > 0
    # The common prefix is known from the second branch on; the third one reuses it.
    assert [reused.n_restored for reused in found] == [0, 0, 4 * BLOCK]
    for branch, reused in zip(branches, found, strict=True):
        assert reused.completion.probabilities == uncached(server, branch).probabilities


def test_a_damaged_file_costs_a_prefill_and_is_counted(
    server: LlamaServer, process: ServerProcess
) -> None:
    tokens = prompt(8, 3 * BLOCK)
    before = set(process.slot_folder.iterdir())
    with reproducible(server.url) as managed:
        managed.complete(tokens, n_predict=1)
        (made,) = set(process.slot_folder.iterdir()) - before
        made.write_bytes(made.read_bytes()[:1000])
        found = managed.complete(tokens, n_predict=N_PREDICT, n_probs=8)
        assert found.n_restored == 0
        assert managed.stats().refusals == {"restore_failed": 1}
        assert found.completion.probabilities == uncached(server, tokens).probabilities
        assert managed.complete(tokens, n_predict=1).n_restored == 2 * BLOCK


def test_a_server_does_not_import_modules_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("xllamacpp", "numpy", "tokcache"):
        tmp_path.joinpath(f"{name}.py").write_text(f"open('imported {name}', 'w').close()\n")
    model = samples.tiny_model()
    monkeypatch.chdir(tmp_path)
    with ServerProcess(model, n_ctx=256) as running, LlamaServer(running.url) as server:
        assert server.health() == "ok"
    assert not list(tmp_path.glob("imported *"))


@pytest.mark.parametrize("architecture", ["gemma3", "mamba", "lfm2"])
def test_other_memories_stay_exact_and_report_unused_restores(architecture: str) -> None:
    model = samples.tiny_model(architecture=architecture)
    with (
        ServerProcess(
            model,
            n_ctx=1024,
            n_slots=2,
            block_tokens=BLOCK,
            n_threads=2,
            # Making a checkpoint would end a piece and so change the bits.
            overrides={"n_ctx_checkpoints": 0},
        ) as running,
        reproducible(running.url) as server,
    ):
        tokens = prompt(7, 300)
        prompts = [tokens, tokens, tokens + prompt(8, 200), tokens]
        found = [server.complete(each, n_predict=N_PREDICT, n_probs=8) for each in prompts]
        for each, reused in zip(prompts, found, strict=True):
            assert reused.completion.probabilities == uncached(server, each).probabilities
        restored = [reused.n_restored for reused in found]
        stats = server.stats()
        if stats.refusals:
            assert stats.refusals == {"restore_not_used_by_server": 1}
            assert restored == [0, 0, 0, 0]
            assert stats.n_bytes == 0
        else:
            assert restored == [0, 256, 256, 256]
        assert bool(stats.refusals) == (architecture == "gemma3")


def test_errors_contain_the_servers_message(server: LlamaServer) -> None:
    with pytest.raises(ServerError, match="exceeds the available context size"):
        server.completion(prompt(1, 3000), n_predict=1)
    with pytest.raises(ServerError, match="invalid tokens"):
        server.completion([99_999], n_predict=1)
    with pytest.raises(ServerError, match="Unable to restore slot"):
        server.restore_slot(0, "absent.bin")
    with pytest.raises(ServerError, match="not be empty"):
        server.completion([], n_predict=1)
    with pytest.raises(InvalidTokens, match="str"):
        server.completion("text", n_predict=1)  # type: ignore[arg-type]
    assert server.health() == "ok"


def test_an_unreachable_server_is_named() -> None:
    url = "http://127.0.0.1:9"
    client = LlamaServer(url, timeout_s=2)
    with pytest.raises(ServerError, match=f"{url} is out of reach"):
        client.health()
    client.close()


def test_a_server_that_is_not_llama_server_is_an_error() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as page:
        thread = threading.Thread(target=page.serve_forever)
        thread.start()
        try:
            client = LlamaServer(f"http://127.0.0.1:{page.server_port}")
            with pytest.raises(ServerError, match="is a llama-server there"):
                client.health()
            client.close()
        finally:
            page.shutdown()
            thread.join()


def variant(tmp_path: Path, old: str, new: str) -> Wrapped:
    """Return the tiny tokenizer with one piece renamed in every entry."""
    description = json.loads(samples.tiny_tokenizer().read_text())
    vocab = description["model"]["vocab"]
    if old in vocab:
        vocab[new] = vocab.pop(old)
    for token in description["added_tokens"]:
        token["content"] = new if token["content"] == old else token["content"]
    merges = [pair for pair in description["model"]["merges"] if "".join(pair) != old]
    description["model"]["merges"] = [pair for pair in merges if old not in pair]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    return Wrapped(path)


@pytest.mark.parametrize(
    ("old", "new"), [("<|im_end|>", "<|finis|>"), ("Ġstatement", "Ġstatemint")]
)
def test_one_different_piece_is_found_and_named(
    old: str, new: str, server: LlamaServer, tmp_path: Path
) -> None:
    with pytest.raises(VocabularyMismatch, match=new.removeprefix("Ġ").replace("|", r"\|")):
        LlamaServer(server.url, tokenizer=variant(tmp_path, old, new))


def test_a_larger_vocabulary_is_refused(server: LlamaServer, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(samples.tiny_tokenizer()))
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(VocabularyMismatch, match=r"2,049 tokens.*has 2,048"):
        LlamaServer(server.url, tokenizer=Wrapped(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("name", ["qwen2.5", "gpt2", "phi-3-mini", "t5-small"])
def test_a_real_tokenizer_and_its_own_model_agree(name: str) -> None:
    source = bundled(name)
    sizes: dict[str, Any] = {"n_layers": 1, "n_embd": 32, "n_heads": 1, "n_kv_heads": 1, "n_ff": 32}
    with ServerProcess(samples.tiny_model(source, **sizes), n_ctx=256) as running:
        LlamaServer(running.url, tokenizer=Wrapped(source)).close()
        with pytest.raises(VocabularyMismatch, match="for the tokenizer and"):
            LlamaServer(running.url, tokenizer=Wrapped(samples.tiny_tokenizer()))


def test_models_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"absent\.gguf"):
        ServerProcess(tmp_path / "absent.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(samples.tiny_model().read_bytes()[:5000])
    with pytest.raises(ServerError, match="end of its log"):
        ServerProcess(damaged)
    with pytest.raises(InvalidConfig, match="n_ctx"):
        ServerProcess(samples.tiny_model(), n_ctx=0)


def test_closing_ends_the_server_and_removes_its_files() -> None:
    with ServerProcess(samples.tiny_model(), n_ctx=256) as running:
        folder = running.slot_folder
        assert folder.is_dir()
        pid = running.pid
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    running.close()


def test_the_server_ends_when_its_parent_is_killed() -> None:
    code = (
        "import sys, time; from tokcache.samples.server_process import ServerProcess;"
        "s = ServerProcess(sys.argv[1], n_ctx=256); print(s.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(samples.tiny_model())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:  # noqa: S603
        assert parent.stdout is not None
        server_pid = int(parent.stdout.readline())
        assert is_running(server_pid)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(server_pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(server_pid)


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):  # a process without a parent may stay as a zombie
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_the_public_names_are_those_of_tokcache_llama() -> None:
    assert tokcache.llama.LlamaServer is LlamaServer
    assert tokcache.llama.AsyncLlamaServer is AsyncLlamaServer
