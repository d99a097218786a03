"""/tokenize and count_tokens give the server's own answers, from the cache once that is proven."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, processors

from tests.gateway.gateways import SYSTEM, Gateway, gateway, httpx, system, upstream, user
from tokcache import samples
from tokcache.gateway.tenants import new_key

pytest.importorskip("llama_cpp", reason="needs tokcache[llama]")

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from tokcache.gateway.routing.slots import Slot
    from tokcache.samples.server_process import ServerProcess


def changed_tokenizer(path: Path, *, has_bos: bool = True, is_reversed: bool = False) -> Path:
    """Write the tiny tokenizer with a token before each text, or with other merges."""
    made = json.loads(samples.tiny_tokenizer().read_text())
    if is_reversed:
        made["model"]["merges"] = made["model"]["merges"][:100]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    if has_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<|endoftext|>", "$A"],
            pair=["<|endoftext|>", "$A", "$B"],
            special_tokens=[("<|endoftext|>", 0)],
        )
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return samples.tiny_model(changed_tokenizer(folder / "tokenizer.json"), folder=folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[ServerProcess]:
    with upstream(tmp_path_factory.mktemp("slots"), model=model) as process:
        yield process


def served_with(folder: Path, server: ServerProcess, tokenizer: Any, **settings: Any) -> Any:
    upstreams = [{"url": server.url, "tokenizer": str(tokenizer) if tokenizer else None}]
    return gateway(folder, upstreams=upstreams, **settings)


def asked(served: Gateway, body: Any, **headers: str) -> Any:
    answer = served.http.post("/tokenize", content=json.dumps(body), headers=headers)
    return answer.status_code, answer.json()


def wait_for_proof(served: Gateway, **headers: str) -> None:
    """Ask until the tokenizer is proven, or is found to be unusable."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = served.service.router.reasons["tokenizer_pending"]
        assert asked(served, {"content": "hello"}, **headers)[0] == 200
        if served.service.router.reasons["tokenizer_pending"] == before:
            return
        time.sleep(0.05)
    raise AssertionError("the proof did not end")


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, server: ServerProcess, model: Path
) -> Iterator[Gateway]:
    with served_with(tmp_path_factory.mktemp("own"), server, model) as made:
        wait_for_proof(made)
        assert made.service.router.reasons["tokenizer_pending"] >= 1
        yield made


TEXTS = ["", "hello", "<|im_start|>user\nhé<|im_end|>", "def f(x):\n\treturn 31415.92\r\n" * 200,
         "\u65e5\u672c \U0001f600 a\0b", " <|endoftext|> x"]  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {}, {"add_special": True}, {"with_pieces": True}, {"add_special": True, "with_pieces": True},
    {"add_special": "yes", "with_pieces": 1, "parse_special": None}, {"parse_special": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "none")
def test_proven_forms_are_the_servers_and_come_from_the_cache(
    served: Gateway, server: ServerProcess, settings: dict[str, Any]
) -> None:
    for text in TEXTS:
        body = {"content": text, **settings}
        bare = httpx.post(f"{server.url}/tokenize", json=body).json()
        n_before = served.service.tokens.counts["cache"]
        for _ in range(2):
            assert asked(served, body) == (200, bare)
        assert served.service.tokens.counts["cache"] == n_before + 2


@pytest.mark.parametrize(
    "body",
    [{"content": "a <|im_start|> b", "parse_special": False}, {"content": ["a b", 5, "c"]},
     {"content": 5}, {"content": "\ud800"}, {}, {"content": "x", "parse_special": False,
                                                 "with_pieces": True}],
    ids=range(6),
)  # fmt: skip
def test_other_forms_are_answered_by_the_server_itself(
    served: Gateway, server: ServerProcess, body: dict[str, Any]
) -> None:
    counts, reasons = served.service.tokens.counts, served.service.router.reasons
    before = counts["server"], reasons["tokenize_form"]
    bare = httpx.post(f"{server.url}/tokenize", content=json.dumps(body))
    assert asked(served, body) == (bare.status_code, bare.json())
    assert (counts["server"], reasons["tokenize_form"]) == (before[0] + 1, before[1] + 1)


def test_a_count_is_the_usage_of_the_same_request(served: Gateway) -> None:
    body = {"model": "any", "system": SYSTEM, "messages": [user("hi <|im_end|> there")]}
    n_before = served.service.tokens.counts["cache"]
    counted = served.http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert served.service.tokens.counts["cache"] == n_before + 1
    usage = served.http.post("/v1/messages", json={**body, "max_tokens": 1}).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    told = served.http.get("/metrics").text
    assert 'tokcache_gateway_tokenizations_total{source="cache"}' in told
    assert 'reason="tokenizer_pending"' in told


def unproven(folder: Path, kind: str) -> Path | None:
    if kind == "tokenizer_not_given":
        return None
    if kind == "tokenizer_differs":
        return changed_tokenizer(folder / "tokenizer.json", is_reversed=True)
    (folder / "broken.json").write_text("{}")
    return folder / "broken.json"


@pytest.mark.parametrize(
    "reason", ["tokenizer_not_given", "tokenizer_differs", "tokenizer_unreadable"]
)
def test_a_tokenizer_that_is_not_proven_is_not_used(
    tmp_path: Path, server: ServerProcess, reason: str
) -> None:
    with served_with(tmp_path / "own", server, unproven(tmp_path, reason)) as made:
        wait_for_proof(made)
        body = {"content": "def function(value): return value", "add_special": True}
        bare = httpx.post(f"{server.url}/tokenize", json=body).json()
        assert asked(made, body) == (200, bare)
        assert made.service.router.reasons[reason] > 0
        assert made.service.tokens.counts["cache"] == 0


def test_a_token_before_each_text_must_be_the_servers(
    tmp_path: Path, server: ServerProcess
) -> None:
    other = changed_tokenizer(tmp_path / "tokenizer.json", has_bos=False)
    with served_with(tmp_path / "own", server, other) as made:
        wait_for_proof(made)
        assert made.service.router.reasons["tokenizer_differs"] > 0
        assert made.service.tokens.counts["cache"] == 0


def test_a_server_that_starts_again_with_another_model_is_proven_again(tmp_path: Path) -> None:
    body = {"content": "def function(value): return value"}
    tokenizer = samples.tiny_tokenizer()
    with upstream(tmp_path / "a") as first, served_with(tmp_path / "own", first, tokenizer) as made:
        port = int(first.url.rpartition(":")[2])
        wait_for_proof(made)
        short = asked(made, body)[1]["tokens"]
        n_cached = made.service.tokens.counts["cache"]
        assert n_cached >= 1
        first.kill()
        server = made.service.router.servers[first.url]
        deadline = time.monotonic() + 30
        while server.is_up and time.monotonic() < deadline:
            time.sleep(0.05)
        other = changed_tokenizer(tmp_path / "tokenizer.json", has_bos=False, is_reversed=True)
        model = samples.tiny_model(other, folder=tmp_path)
        with upstream(tmp_path / "b", model=model, port=port):
            while not server.is_up and time.monotonic() < deadline:
                time.sleep(0.05)
            wait_for_proof(made)
            long = asked(made, body)[1]["tokens"]
            assert len(long) > len(short)
            assert made.service.router.reasons["tokenizer_differs"] > 0


def test_no_tenant_meets_the_texts_of_another(
    tmp_path: Path, server: ServerProcess, model: Path
) -> None:
    made = {name: new_key() for name in ("a", "b")}
    tenants = [{"name": name, "key_sha256": digest} for name, (_, digest) in made.items()]
    headers = {name: {"authorization": f"Bearer {key}"} for name, (key, _) in made.items()}
    with served_with(tmp_path / "own", server, model, tenants=tenants) as served:
        wait_for_proof(served, **headers["a"])
        wrapped = served.service.tokens._wrapped[str(model)]
        text = "a text of one tenant " * 20
        misses = []
        for name in ("a", "a", "b", "b"):
            before = wrapped.cache_stats().l0.misses
            assert asked(served, {"content": text}, **headers[name])[0] == 200
            misses.append(wrapped.cache_stats().l0.misses - before)
        assert misses == [1, 0, 1, 0]
        # Nor are the pieces of its ids there sooner.
        tokens, asked_for = served.service.tokens, []
        of_server = tokens._of_server

        async def counted(upstream: Any, body: dict[str, Any]) -> Any:
            asked_for.append(body)
            return await of_server(upstream, body)

        tokens._of_server = counted
        numbers = []
        for name in ("a", "a", "b", "b"):
            before = len(asked_for)
            asked(served, {"content": text, "with_pieces": True}, **headers[name])
            numbers.append(len(asked_for) - before)
        assert numbers == [1, 0, 1, 0]
        assert served.http.post("/tokenize", json={"content": text}).status_code == 401


# The number of messages comes first, so no prompt of a conversation begins as the one before it.
COUNTING = (
    "{{ messages | length }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize("is_counting", [False, True], ids=["appends", "counts"])
def test_a_file_is_restored_only_for_a_prompt_with_its_ids(
    tmp_path: Path, model: Path, is_counting: bool
) -> None:
    settings: dict[str, Any] = {"chat_template": COUNTING} if is_counting else {}
    with upstream(tmp_path / "slots", model=model, **settings) as process:
        upstreams = [{"url": process.url, "slot_folder": str(tmp_path / "slots"),
                      "tokenizer": str(model)}]  # fmt: skip
        with gateway(tmp_path / "own", upstreams=upstreams) as made:
            wait_for_proof(made)
            chats = [[system(f"{n}. {SYSTEM}"), user("hi")] for n in range(3)]
            told = []
            for _ in range(2):
                for messages in chats:
                    answer = made.chat(messages)
                    told.append(answer["tokcache"])
                    messages += [answer["choices"][0]["message"], user("Go on")]
            router = made.service.router
            assert made.service.files
            assert all(file.ids for file in made.service.files)
            if is_counting:
                assert router.reasons["different_ids"] > 0
                assert router.counts["restore"] == 0
                assert ("template", "different_ids") in {
                    (each["reason"], each["detail"]) for each in told
                }
                assert "file" not in {each["plan"] for each in told}
            else:
                assert router.reasons["different_ids"] == 0
                assert router.counts["restore"] > 0
                assert "file" in {each["plan"] for each in told}
        # A restart finds the ids of the files again.
        with gateway(tmp_path / "own", upstreams=upstreams) as made:
            assert made.service.files
            assert all(file.ids for file in made.service.files)
            # The tokenizer is not proven yet, so nothing speaks against a restore.
            answer = made.chat(chats[0])
            assert made.service.router.reasons["different_ids"] == 0
            assert answer["tokcache"]["plan"] == "file"


def in_loop(served: Gateway, work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that runs in the gateway's own loop."""
    loop = next(iter(served.service._tasks)).get_loop()
    return asyncio.run_coroutine_threadsafe(work, loop).result(30)


def test_ids_that_do_not_come_are_counted(served: Gateway) -> None:
    service = served.service
    (server,) = service.upstreams.values()
    look, reasons = service.watch.looks[server.url], service.router.reasons
    body = json.dumps({"messages": [user("hi")]}).encode()
    n_before = reasons["prompt_ids_unknown"]
    ids = in_loop(served, service.tokens.prompt_ids(server, look, body, None))
    assert reasons["prompt_ids_unknown"] == n_before
    for chat, n_tokens in ((b'{"messages": 5}', None), (body, len(ids) + 1)):
        assert not in_loop(served, service._ids(server, chat, None, n_tokens=n_tokens))
    assert reasons["prompt_ids_unknown"] == n_before + 2


def only_slot(served: Gateway) -> Slot:
    (server,) = served.service.router.servers.values()
    (slot,) = server.slots
    return slot


def test_a_restored_slot_has_the_ids_of_its_file(tmp_path: Path, model: Path) -> None:
    chats = [[system(f"{n}. {SYSTEM}"), user("hi")] for n in range(3)]
    with upstream(tmp_path / "slots", model=model, n_slots=1) as process:
        upstreams = [{"url": process.url, "slot_folder": str(tmp_path / "slots"),
                      "tokenizer": str(model)}]  # fmt: skip
        with gateway(tmp_path / "own", upstreams=upstreams) as made:
            wait_for_proof(made)
            made.chat(chats[0])
            slot, files = only_slot(made), made.service.files
            assert slot.chat_body is not None
            made.chat(chats[1])
            (file,) = files
            assert file.ids
            # The file is restored for a request that the server then rejects.
            body = {"messages": [*chats[0], user("go on")], "grammar": "root ::= ("}
            assert made.http.post("/v1/chat/completions", json=body).status_code == 400
            made.wait_until_idle()
            assert made.service.router.counts["restore"] == 1
            assert slot.ids == file.ids
            assert only_slot(made).chat_body is None
            files.drop(file)
            made.chat(chats[2])
            assert [each.ids for each in files if each.chain == file.chain] == [file.ids]


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_the_body_of_a_chat_is_kept_only_where_its_ids_can_be_found(
    tmp_path: Path, model: Path, has_tokenizer: bool
) -> None:
    other = changed_tokenizer(tmp_path / "tokenizer.json", is_reversed=True)
    with upstream(tmp_path / "slots", model=model, n_slots=1) as process:
        upstreams = [{"url": process.url, "slot_folder": str(tmp_path / "slots"),
                      "tokenizer": str(other) if has_tokenizer else None}]  # fmt: skip
        with gateway(tmp_path / "own", upstreams=upstreams) as made:
            wait_for_proof(made)
            made.chat([system(), user("hi")])
            assert only_slot(made).n_tokens > 0
            assert only_slot(made).chat_body is None
