"""Many clients at once, some of which leave: no wrong text, no leaked slot or connection."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from tests.gateway.gateways import gateway, httpx, upstream  # isort: skip (skips without extras)

from bench.gateway_soak import MAX_DIFFERENT, Clients, bodies

SECONDS = float(os.environ.get("TOKCACHE_SOAK_S", "10"))
N_CLIENTS = 8


def n_sockets() -> int:
    links = (str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
    return sum(link.startswith("socket:") for link in links)


def test_soak(tmp_path: Path) -> None:
    with (
        upstream(tmp_path / "slots") as one,
        upstream(tmp_path / "slots") as two,
        gateway(tmp_path / "own", one, two, max_queue=64) as served,
    ):
        expected = []
        for body in bodies():
            found = httpx.post(f"{one.url}/v1/chat/completions",
                               json={**body, "cache_prompt": False}, timeout=60)  # fmt: skip
            expected.append(found.json()["choices"][0]["message"]["content"])
        assert len(set(expected)) == len(expected)  # so that a mix-up is seen
        before = n_sockets()
        clients = Clients(served.url, expected, time.monotonic() + SECONDS)
        threads = [threading.Thread(target=clients.work, args=(n,)) for n in range(N_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        served.wait_until_idle()
        counts = clients.counts
        assert not clients.failures
        assert not counts["swapped"], counts
        assert counts["left"] > 3
        assert counts["right"] > 20
        n_whole = counts["right"] + counts["different"]
        assert counts["different"] <= MAX_DIFFERENT * n_whole, counts
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
