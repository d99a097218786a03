"""`LlamaServer.complete(splice=True)` on a real llama-server, each condition by itself."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.served import Wrapped, both_clients
from tokcache import samples
from tokcache.errors import InvalidConfig
from tokcache.llama.server import LlamaServer, SlotSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.served import Connect
    from tokcache.llama.server import Reused
    from tokcache.samples.server_process import ServerProcess

START, END = "<|im_start|>", "<|im_end|>"
LETTERS = "etaoinsr"  # the tokenizer has merges for these
OPENER = f"{START}assistant\n"
ASKED = f"{START}user\nHow far is it to the moon?{END}\n{OPENER}"
MORE = f"{END}\n{START}user\nAnd back?{END}\n{OPENER}"
N = 24


@pytest.fixture(scope="module")
def tokenizer() -> Wrapped:
    return Wrapped(samples.tiny_tokenizer())


@pytest.fixture
def server(process: ServerProcess, folder: Path, tokenizer: Wrapped) -> Iterator[LlamaServer]:
    settings = SlotSettings(slot_folder=folder)
    with LlamaServer(process.url, tokenizer=tokenizer, slot_settings=settings) as made:
        made.clear()
        yield made


def ask(
    server: LlamaServer, prompt: Any, *, allowed: str | list[int] = LETTERS, n: int = N, **more: Any
) -> Reused:
    """Ask for a sampled answer in these ids or single letters alone."""
    plain: Any = Wrapped(samples.tiny_tokenizer()).unwrap()
    if isinstance(allowed, str):
        allowed = [plain.token_to_id(letter) for letter in allowed]
    bias = [[each, 100.0] for each in allowed]
    settings = {"temperature": 1.0, "seed": 3, "logit_bias": bias, "splice": True, **more}
    found = server.complete(prompt, n_predict=n, **settings)
    server.flush(30)
    return found


def again(server: LlamaServer, prompt: str, **more: Any) -> tuple[int, str]:
    found = ask(server, prompt, n=1, **more)
    return found.n_spliced, found.splice_refusal


@both_clients
def test_a_sampled_answer_is_reused_to_its_end_with_splice_and_not_without(
    process: ServerProcess, folder: Path, tokenizer: Wrapped, connect: Connect
) -> None:
    n_cached: dict[bool, int] = {}
    texts: set[str] = set()
    for is_on in (True, False):
        settings = SlotSettings(slot_folder=folder)
        with connect(process.url, tokenizer=tokenizer, slot_settings=settings) as server:
            server.clear()
            first = ask(server, ASKED, splice=is_on)
            texts.add(first.completion.text)
            prompt = ASKED + first.completion.text + MORE
            found = ask(server, prompt, n=1, splice=is_on)
            n_cached[is_on] = found.completion.n_cached
            n_held = first.completion.n_prompt + N - 1  # the last generated id is not decoded
            if is_on:
                assert (found.n_spliced, found.splice_refusal) == (N, "")
                assert found.completion.n_cached == n_held
                assert found.n_live == n_held
                held = getattr(server, "inner", server)._manager.table.slots[found.id_slot].tokens
                assert server.detokenize(held[: found.completion.n_prompt]) == prompt
                assert server.stats().refusals["splice_no_answer"] == 1
            else:
                assert (found.n_spliced, found.splice_refusal) == (0, "")
                assert found.completion.n_cached < n_held
    assert len(texts) == 1
    assert n_cached[True] > n_cached[False]


def test_every_answer_of_a_chat_is_spliced(server: LlamaServer) -> None:
    prompt = ASKED
    for n in range(4):
        found = ask(server, prompt, seed=n, n=10)
        assert found.n_spliced == 10 * n
        assert found.splice_refusal == ("" if n else "splice_no_answer")
        prompt += found.completion.text + MORE


def test_an_answer_that_its_end_token_ended_is_spliced_without_it(server: LlamaServer) -> None:
    found = ask(server, ASKED, grammar='root ::= "there"')
    assert (found.completion.text, found.completion.stop) == ("there", "eos")
    assert again(server, ASKED + "there" + MORE) == (5, "")


def test_an_answer_whose_scope_is_cleared_while_it_is_generated_is_forgotten(
    server: LlamaServer,
) -> None:
    def clear() -> None:
        while not any(slot.is_processing for slot in server.slots()):
            time.sleep(0.005)
        server.clear(scope="a")

    clears = threading.Thread(target=clear)
    clears.start()
    ask(server, ASKED, scope="a", n=900)
    clears.join()
    assert len(server._manager.records.answers) == 0


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda text: ASKED.replace("moon", "sun") + text + MORE, "splice_no_answer"),
        (lambda text: ASKED + text[:-1] + "Q" + MORE, "splice_other_text"),
        (lambda text: ASKED + text[3:] + MORE, "splice_trimmed"),
        (lambda text: ASKED + text + "\n" + MORE, "splice_no_added_token_follows"),
        (lambda text: ASKED + text, "splice_no_added_token_follows"),
    ],
    ids=["another beginning", "edited", "trimmed", "text follows", "nothing follows"],
)
def test_an_answer_that_stands_otherwise_keeps_the_ids_of_its_text(
    server: LlamaServer, change: Callable[[str], str], refusal: str
) -> None:
    text = ask(server, ASKED).completion.text
    assert again(server, change(text)) == (0, refusal)
    assert server.stats().refusals[refusal] >= 1
    assert again(server, ASKED + text + MORE) == (N, "")


def test_a_control_token_in_an_answer_refuses_it(server: LlamaServer, tokenizer: Wrapped) -> None:
    start = tokenizer.token_ids(START, add_special_tokens=False).tolist()
    assert len(start) == 1
    text = ask(server, ASKED, allowed=start, n=3).completion.text
    assert again(server, ASKED + text + "e" + MORE) == (0, "splice_added_token")


def test_an_answer_that_ended_within_a_character_is_refused(
    server: LlamaServer, tokenizer: Wrapped
) -> None:
    whole = tokenizer.token_ids("\u65e5", add_special_tokens=False).tolist()
    assert len(whole) > 1
    text = ask(server, ASKED, allowed=whole[:1], n=1).completion.text
    assert again(server, ASKED + text + "e" + MORE) == (0, "splice_partial_character")


def test_an_answer_is_spliced_in_its_own_scope_alone(server: LlamaServer) -> None:
    prompt = ASKED + ask(server, ASKED, scope="a").completion.text + MORE
    for scope in ("b", None):
        assert again(server, prompt, scope=scope) == (0, "splice_no_answer")
    assert again(server, prompt, scope="a") == (N, "")


def test_cleared_answers_are_forgotten(server: LlamaServer) -> None:
    prompts = {s: ASKED + ask(server, ASKED, scope=s).completion.text + MORE for s in ("a", "b")}
    server.clear(scope="a")
    assert len(server._manager.records.answers) == 1
    assert again(server, prompts["a"], scope="a") == (0, "splice_no_answer")
    assert again(server, prompts["b"], scope="b") == (N, "")
    server.clear()
    assert len(server._manager.records.answers) == 0


def test_an_answer_asked_for_without_splice_is_not_remembered(server: LlamaServer) -> None:
    text = ask(server, ASKED, splice=False).completion.text
    assert again(server, ASKED + text + MORE) == (0, "splice_no_answer")


def test_splice_needs_the_tokenizer_of_the_model(process: ServerProcess) -> None:
    with LlamaServer(process.url) as server:
        with pytest.raises(InvalidConfig, match=r"tokenizer=…"):
            ask(server, ASKED)
        with pytest.raises(InvalidConfig, match="splice"):
            ask(server, ASKED, splice=1)
