"""A FastAPI service under load: right answers, each text encoded once, a free event loop."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tokcache.samples import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"The {n}th question: what is a prefix cache? " * (n % 7 + 1) for n in range(24)]
_RANDOM = random.Random(3)
# No word occurs twice, so all of the text has to be encoded, which takes about a second.
LONG = " ".join("".join(_RANDOM.choices(ascii_lowercase, k=9)) for _ in range(100_000))


def _wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended while starting"
        try:
            httpx.get(f"{url}/metrics/", timeout=10)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("the server did not answer within two minutes")


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise


@pytest.fixture(scope="module")
def home() -> Path:
    return tiny_tokenizer().parent


@pytest.fixture(scope="module")
def url(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.create_server(("127.0.0.1", 0)) as listening, log.open("wb") as output:
        fd, address = listening.fileno(), f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = subprocess.Popen(  # noqa: S603 (our own app)
            [sys.executable, "-m", "uvicorn", "tests.integration.tokenizing_app:app",
             "--fd", str(fd), "--log-level", "warning", "--no-access-log",
             "--timeout-keep-alive", "120"],  # a client may be slow to use a connection again
            cwd=ROOT, env={**os.environ, "TOKENIZER": str(home)}, pass_fds=[fd],
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            _wait_until_ready(address, server)
            yield address
        finally:
            _end(server)
    assert "Traceback" not in log.read_text()
    assert "ERROR" not in log.read_text()


@pytest.fixture(scope="module")
def plain(home: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)

    return AutoTokenizer.from_pretrained(home)


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=32)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=60)


async def ask_all(server: httpx.AsyncClient, path: str, bodies: list[Any]) -> list[Any]:
    """Send 32 requests at a time, because httpx is slow with a long queue."""
    gate = asyncio.Semaphore(32)

    async def one(body: Any) -> Any:
        async with gate:
            return await ask(server, path, **body)

    return await asyncio.gather(*map(one, bodies))


async def ask(server: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await server.post(path, json=body)
    answer.raise_for_status()
    return answer.json()


def metrics(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics/", timeout=60).text)
    samples = [sample for family in families for sample in family.samples]
    return {one.name: one.value for one in samples if one.labels.get("model") == "chat"}


def test_answers_under_load_equal_the_plain_tokenizers(url: str, plain: Any) -> None:
    asked = [
        {"text": text, "add_special_tokens": special, "scope": scope}
        for text in TEXTS
        for special in (True, False)
        for scope in (None, "tenant")
    ]

    async def load() -> list[Any]:
        async with client(url) as server:
            return await ask_all(server, "/tokenize", asked * 8)

    before = metrics(url)
    answers = asyncio.run(load())
    for one, answer in zip(asked * 8, answers, strict=True):
        expected = plain.encode(one["text"], add_special_tokens=one["add_special_tokens"])
        assert answer["ids"] == expected
    after = metrics(url)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["tokcache_encode_texts_total"] == len(asked)
    hits, shared = grown["tokcache_l0_hits_total"], grown["tokcache_encode_shared_total"]
    assert hits + shared == 7 * len(asked)
    assert grown["tokcache_l0_insertions_total"] == len(asked)
    assert after["tokcache_l0_bytes"] <= after["tokcache_l0_max_bytes"]


def test_the_event_loop_stays_free_while_a_long_text_is_encoded(url: str, plain: Any) -> None:
    async def load() -> tuple[Any, list[bool], list[Any]]:
        async with client(url) as server:
            await ask(server, "/tokenize", text="known already")
            long = asyncio.create_task(ask(server, "/digest", text=LONG))
            done: list[bool] = []
            answers: list[Any] = []
            while not long.done() and len(answers) < 20:
                answers.append(await ask(server, "/tokenize", text="known already"))
                done.append(long.done())
            return await long, done, answers

    long, done, answers = asyncio.run(load())
    expected = plain.encode(LONG)
    assert long["n"] == len(expected)
    assert long["sha256"] == hashlib.sha256(array("i", expected)).hexdigest()
    assert long["n_ticks"] >= 20
    assert done.count(False) >= 5  # other requests were answered first
    assert all(one == answers[0] for one in answers)


def test_a_long_text_that_many_ask_for_is_encoded_once(url: str) -> None:
    text = "Once for all. " + LONG[: 1 << 19]

    async def load() -> list[Any]:
        async with client(url) as server:
            return await ask_all(server, "/digest", [{"text": text}] * 16)

    before = metrics(url)
    answers = asyncio.run(load())
    assert len({one["sha256"] for one in answers}) == 1
    name = "tokcache_encode_texts_total"
    assert metrics(url)[name] - before[name] == 1


def test_chats_encoded_in_threads_equal_the_plain_tokenizers(url: str, plain: Any) -> None:
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "It depends."}]
        for text in TEXTS
    ]

    async def load() -> list[Any]:
        async with client(url) as server:
            return await ask_all(server, "/chat", [{"messages": one} for one in chats * 4])

    for one, answer in zip(chats * 4, asyncio.run(load()), strict=True):
        assert answer == plain.apply_chat_template(one, add_generation_prompt=True).data


def test_bad_input_is_refused_and_other_requests_succeed(url: str, plain: Any) -> None:
    async def load() -> list[httpx.Response]:
        async with client(url) as server:
            post = server.post
            lone = post("/tokenize", content=b'{"text": "a\\ud800b"}')
            asked = [lone, post("/tokenize", json={"text": 3})]
            good = [post("/tokenize", json={"text": "in between"}) for _ in range(4)]
            return await asyncio.gather(*asked, *good)

    lone, number, *good = asyncio.run(load())
    assert lone.status_code in (400, 422)
    assert number.status_code == 422
    assert [one.json()["ids"] for one in good] == [plain.encode("in between")] * 4
