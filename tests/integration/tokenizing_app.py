"""A small tokenization service; test_fastapi.py runs it with uvicorn."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from prometheus_client import CollectorRegistry, make_asgi_app
from pydantic import BaseModel
from transformers import AutoTokenizer

import tokcache
from tokcache.observe.prometheus import Collector
from tokcache.text.wrappers.patch import patch_transformers

_LIFE_S = 240  # the service ends itself then, if the test does not

patch_transformers(tokcache.CacheConfig(engine="tokenizers"))
tok: Any = AutoTokenizer.from_pretrained(os.environ["TOKENIZER"])
registry = CollectorRegistry()
Collector(registry).add("chat", tok)
n_ticks = 0


async def tick() -> None:
    """Count the iterations of the event loop."""
    global n_ticks  # noqa: PLW0603 (one loop, one counter)
    while True:
        await asyncio.sleep(0.001)
        n_ticks += 1


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Tick while the server runs."""
    asyncio.get_running_loop().call_later(_LIFE_S, os.kill, os.getpid(), signal.SIGTERM)
    ticker = asyncio.create_task(tick())
    yield
    ticker.cancel()


app = FastAPI(lifespan=lifespan)
app.mount("/metrics", make_asgi_app(registry))


class Ask(BaseModel):
    """A text to be tokenized."""

    text: str
    add_special_tokens: bool = True
    scope: str | None = None


class Chat(BaseModel):
    """Messages to be rendered and tokenized."""

    messages: list[dict[str, str]]


@app.post("/tokenize")
async def tokenize(ask: Ask) -> dict[str, Any]:
    """Return the ids of a text."""
    try:
        ids = await tok.atoken_ids(
            ask.text, add_special_tokens=ask.add_special_tokens, scope=ask.scope
        )
    except TypeError as error:
        raise HTTPException(400, str(error)) from error
    return {"ids": ids.tolist()}


@app.post("/digest")
async def digest(ask: Ask) -> dict[str, Any]:
    """Return a digest of the ids of a long text, and the event loop's iterations meanwhile."""
    before = n_ticks
    ids = await tok.atoken_ids(ask.text, add_special_tokens=ask.add_special_tokens)
    meanwhile = n_ticks - before
    return {"n": len(ids), "sha256": hashlib.sha256(ids).hexdigest(), "n_ticks": meanwhile}


@app.post("/chat")
def chat(ask: Chat) -> dict[str, Any]:
    """Return the ids of a conversation; FastAPI runs a plain function in a thread."""
    return dict(tok.apply_chat_template(ask.messages, add_generation_prompt=True))
