"""A tokenizer wrapped before a fork works in the children, in parallel; all processes end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tokcache.samples import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"The {n}th question: what is a prefix cache, and why {n}? " * 40 for n in range(200)]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture(scope="module")
def home() -> Path:
    return tiny_tokenizer().parent


@pytest.fixture(scope="module")
def plain(home: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)

    return AutoTokenizer.from_pretrained(home)


def quiet(**more: str) -> dict[str, str]:
    """Return an environment in which libraries report errors only."""
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", **more}
    env.pop("TOKENIZERS_PARALLELISM", None)
    return env


def answered(url: str, texts: list[str]) -> Any:
    end = time.monotonic() + 120
    while True:
        try:
            return httpx.post(url, json=texts, timeout=60).raise_for_status().json()
        except httpx.TransportError:
            assert time.monotonic() < end, "no worker answered within two minutes"
            time.sleep(0.1)


def ended(server: subprocess.Popen[bytes]) -> int:
    server.terminate()
    try:
        return server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise


@pytest.fixture(scope="module")
def url(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("gunicorn") / "log"
    with socket.create_server(("127.0.0.1", 0)) as listening, log.open("wb") as output:
        fd = listening.fileno()
        server = subprocess.Popen(  # noqa: S603 (our own app)
            [sys.executable, "-m", "gunicorn", "tests.integration.prefork_app:app", "--preload",
             "--workers", "2", "--bind", f"fd://{fd}", "--log-level", "error",
             "--timeout", "60", "--graceful-timeout", "10", "--no-control-socket"],
            cwd=ROOT, env=quiet(TOKENIZER=str(home)), pass_fds=[fd],
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            code = ended(server)
    assert (code, log.read_text()) == (0, "")


@pytest.fixture(scope="module")
def by_worker(url: str) -> dict[int, Any]:
    """Return the first answer of each of two workers to the same texts."""
    found: dict[int, Any] = {}
    for _ in range(200):
        with ThreadPoolExecutor(4) as pool:
            for one in pool.map(lambda _: answered(url, TEXTS), range(4)):
                earlier = found.get(one["pid"], one)
                found[one["pid"]] = min(earlier, one, key=lambda each: each["n_hits"])
        if len(found) == 2:
            return found
    pytest.fail("only one worker ever answered")


def test_every_worker_encodes_as_the_plain_tokenizer(by_worker: dict[int, Any], plain: Any) -> None:
    expected = [plain.encode(text) for text in TEXTS]
    for answer in by_worker.values():
        assert answer["ids"] == answer["called"] == expected
        assert answer["later"] == plain.encode(TEXTS[0] + TEXTS[-1])
        assert answer["wrapped_in"] != answer["pid"]
    assert len({answer["wrapped_in"] for answer in by_worker.values()}) == 1


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
def test_the_workers_encode_in_parallel(by_worker: dict[int, Any]) -> None:
    for answer in by_worker.values():
        before, after = answer["n_threads"]
        assert before == 1  # the child has none of the parent's threads
        assert after > before  # the encoder's threads: it still encodes in parallel


def test_the_workers_answer_again_from_their_caches(
    url: str, by_worker: dict[int, Any], plain: Any
) -> None:
    again = answered(url, TEXTS)
    assert again["n_hits"] >= by_worker[again["pid"]]["n_hits"] + len(TEXTS)
    assert again["ids"] == [plain.encode(text) for text in TEXTS]


# ---- the end of a process

USED = """
import asyncio, sys
from tokenizers import Tokenizer
import tokcache
tok = tokcache.wrap(Tokenizer.from_file(sys.argv[1]), tokcache.CacheConfig(engine="tokenizers"))
async def main():
    return await asyncio.gather(*(tok.atoken_ids(f"text {n}") for n in range(50)))
assert len(asyncio.run(main())) == 50
tok.token_ids_batch([f"another {n}" for n in range(50)])
"""

IN_FLIGHT = """
import threading
long = " ".join(f"word{n * 7919}" for n in range(200_000))
thread = threading.Thread(target=tok.token_ids, args=(long,), daemon=True)
thread.start()
async def leave():
    task = asyncio.create_task(tok.atoken_ids(long + "."))
    await asyncio.sleep(0)
    task.cancel()
asyncio.run(leave())
"""

FORKED = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
assert asyncio.run(tok.atoken_ids("text 3")) == tok.token_ids("text 3")
assert len(tok.token_ids("not seen before the fork")) > 0
if child:
    assert os.waitpid(child, 0)[1] == 0
"""

KEPT = """
import atexit
atexit.register(lambda: tok.token_ids("said at the end"))
sys.modules["kept"] = tok
"""


@pytest.mark.parametrize(
    "more", ["", IN_FLIGHT, FORKED, KEPT], ids=["used", "flight", "fork", "kept"]
)
def test_an_interpreter_ends_without_output(more: str, home: Path) -> None:
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", USED + more, home / "tokenizer.json"],
        capture_output=True, text=True, check=False, timeout=60,
        env=quiet(),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
