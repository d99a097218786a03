"""One process prefills a prompt, another restores it from Redis: equal logits, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.models import BLOCK, keep_logits, llama, store
from tests.state.redis_server import RedisServer

PROMPT = list(range(5, 5 + 6 * BLOCK + 9))
WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests.integration.models import llama, store
llm = llama(store(redis={url!r}), reproducible=True, flash_attn={flash})
next(llm.generate({prompt}, temp=0.0))
llm.close()
assert llm.prefix_cache.flush(30)
assert llm.prefix_cache.stats().refusals == {{}}
llm.prefix_cache.close()
"""


def answered(llm: Any) -> list[int]:
    return [token for _, token in zip(range(4), llm.generate(PROMPT, temp=0.0), strict=False)]


@pytest.mark.parametrize("flash", [False, True], ids=["no flash", "flash"])
def test_another_process_continues_bit_for_bit(tmp_path: Path, flash: bool) -> None:
    with RedisServer(tmp_path / "redis") as server:
        root = str(Path(__file__).parents[2])
        code = WRITER.format(root=root, url=server.url, flash=flash, prompt=PROMPT)
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)  # noqa: S603
        settings: dict[str, Any] = {"reproducible": True, "flash_attn": flash}
        cached, uncached = llama(store(redis=server.url), **settings), llama(**settings)
        for llm in (cached, uncached):
            keep_logits(llm)
        assert answered(cached) == answered(uncached)
        assert cached.last_reuse.n_restored == 6 * BLOCK
        ours, theirs = (llm.scores[6 * BLOCK : llm.n_tokens] for llm in (cached, uncached))
        assert np.array_equal(ours.view(np.int32), theirs.view(np.int32))
        stats = cached.prefix_cache.stats()
        assert (stats.redis.hits, stats.refusals) == (6, {})
        server.kill()  # requests are answered without it
        cached.reset()
        assert answered(cached) == answered(uncached)
        for llm in (cached, uncached):
            llm.close()
        cached.prefix_cache.close()
