"""Many clients at once, some of which leave: no wrong text, no leaked slot or connection."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

from tests.gateway.gateways import gateway, httpx, upstream  # isort: skip (skips without extras)

from bench.gateway_soak import MAX_DIFFERENT, bodies

SECONDS = float(os.environ.get("TOKCACHE_SOAK_S", "10"))
N_CLIENTS = 8


def n_sockets() -> int:
    links = (str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
    return sum(link.startswith("socket:") for link in links)


def test_soak(tmp_path: Path) -> None:
    asked = bodies()
    with (
        upstream(tmp_path / "slots") as one,
        upstream(tmp_path / "slots") as two,
        gateway(tmp_path / "own", one, two, max_queue=64) as served,
    ):
        expected = []
        for body in asked:
            found = httpx.post(f"{one.url}/v1/chat/completions",
                               json={**body, "cache_prompt": False}, timeout=60)  # fmt: skip
            expected.append(found.json()["choices"][0]["message"]["content"])
        failures: list[str] = []
        n_right, n_different, n_left = 0, 0, 0
        lock = threading.Lock()
        deadline = time.monotonic() + SECONDS

        def work(seed: int) -> None:
            nonlocal n_right, n_different, n_left
            rng = random.Random(seed)
            with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
                while time.monotonic() < deadline:
                    number = rng.randrange(len(asked))
                    try:
                        if rng.random() < 0.3:
                            body = {**asked[number], "stream": True, "max_tokens": 200}
                            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                                for _ in zip(answer.iter_lines(), range(rng.randrange(9)),
                                             strict=False):  # fmt: skip
                                    pass
                            n_left += 1
                            continue
                        answer = client.post("/v1/chat/completions", json=asked[number])
                        told = answer.json()["choices"][0]["message"]["content"]
                    except Exception as error:  # noqa: BLE001 (reported below)
                        failures.append(repr(error))
                        return
                    with lock:
                        n_right += told == expected[number]
                        n_different += told != expected[number]

        before = n_sockets()
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(N_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        served.wait_until_idle()
        assert n_left > 3
        assert n_right > 20
        assert n_different <= MAX_DIFFERENT * (n_right + n_different), (n_right, n_different)
        slots = [s for server in served.service.router.servers.values() for s in server.slots]
        assert not any(slot.is_busy for slot in slots)
        assert all(file.n_readers == 0 for file in served.service.files)
        assert not served.service.router.queue
        time.sleep(6)  # idle connections to the servers end after 4 s
        assert served.http.get("/health").status_code == 200
        assert n_sockets() <= before + 8
        for process in (one, two):
            listed = httpx.get(f"{process.url}/slots").json()
            assert not any(slot["is_processing"] for slot in listed)
