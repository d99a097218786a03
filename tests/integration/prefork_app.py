"""A WSGI service that wraps its tokenizer before gunicorn forks; test_prefork.py runs it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import tokcache

signal.alarm(240)  # ends the parent, and its children with it, if the test does not
tok: Any = tokcache.wrap(
    AutoTokenizer.from_pretrained(os.environ["TOKENIZER"]),
    tokcache.CacheConfig(engine="tokenizers"),
)
WRAPPED_IN = os.getpid()


def n_threads() -> int:
    """Return the number of threads of this process, those of native code included."""
    return len(list(Path("/proc/self/task").iterdir()))


def answer(texts: list[str]) -> dict[str, Any]:
    """Encode texts in every way; report the process too, and its threads before and after."""
    before = n_threads()
    batch = [ids.tolist() for ids in tok.token_ids_batch(texts)]
    after = n_threads()
    later = asyncio.run(tok.atoken_ids(texts[0] + texts[-1]))
    return {
        "ids": batch,
        "later": later.tolist(),
        "called": tok(texts)["input_ids"],
        "wrapped_in": WRAPPED_IN,
        "pid": os.getpid(),
        "n_threads": [before, after],
        "n_hits": tok.cache_stats().l0.hits,
    }


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer a list of texts, in JSON."""
    texts = json.loads(environ["wsgi.input"].read())
    body = json.dumps(answer(texts)).encode()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]
