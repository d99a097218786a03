"""Answers /tokenize and counts tokens from the cache of a tokenizer that gives its server's ids.

1. The first request for a server's tokens starts the proof in the background: the tokenizer of the
   model file is read and wrapped in a thread, and its ids of the probe are compared with those of
   the server's own /tokenize. Until that is done, the server answers.
2. A server that has started again is proven again, because it may have another model.
3. Texts are cached under their tenant's scope, so no answer is faster because another tenant asked.

Forms that the proof does not cover (`parse_special` off, a list as content) go to the server.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from tokcache.errors import ServerError, TokcacheError, UnsupportedTokenizer
from tokcache.gateway.api.errors import upstream_error
from tokcache.llama.server import calls
from tokcache.text.wrappers import wrap
from tokcache.text.wrappers.gguf_tokenizer import gguf_probe_texts, is_gguf

if TYPE_CHECKING:
    from tokcache.gateway.servers.upstream import Look, Upstream
    from tokcache.text.token_ids import TokenIds
    from tokcache.text.tokenizer import WrappedTokenizer

_OK = 200
# Probe texts that are also encoded with the special tokens at their ends; one request each.
_N_WITH_SPECIAL = 40
_BETWEEN = 0  # the id between two texts of the probe
_log = logging.getLogger("tokcache.gateway")


@dataclass(eq=False, slots=True)
class _Proof:
    """The tokenizer of one start of a server; `reason` says why there is none yet, or never."""

    look: Look
    reason: str = "tokenizer_pending"
    wrapped: WrappedTokenizer | None = None
    # The piece of each id that was asked for; llama-server gives bytes where it is not UTF-8.
    pieces: dict[int, str | list[int]] = field(default_factory=dict)


class ProvenTokenizers:
    """The tokenizers of all servers, by URL; `counts` has the answers by source, cache or server.

    Errors:  ApiError with llama-server's own error; ServerError.
    Threads: not safe; one event loop.
    """

    def __init__(
        self, reasons: Counter[str], in_background: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._reasons = reasons
        self._in_background = in_background
        self._proofs: dict[str, _Proof] = {}
        self._wrapped: dict[str, WrappedTokenizer] = {}

    async def count(
        self, upstream: Upstream, look: Look, chat: dict[str, Any], scope: str | None
    ) -> int:
        """Return the tokens of a chat completion's prompt, as its usage counts them.

        The server renders it. Its text has no BOS, which the ids of the prompt have.
        """
        status, found = await upstream.post("/apply-template", json.dumps(chat).encode())
        if status != _OK:
            raise upstream_error(status, found)
        asked = {"content": calls.text(found, "prompt"), "add_special": True}
        ids = await self._ids(self._proof(upstream, look), asked, scope)
        if ids is not None:
            return len(ids)
        return len(await self._of_server(upstream, asked))

    async def prompt_ids(
        self, upstream: Upstream, look: Look, chat: bytes, scope: str | None
    ) -> TokenIds | None:
        """Return the ids of a chat completion's prompt, None if they are not known for certain."""
        proof = self._proof(upstream, look)
        if proof.wrapped is None:
            return None
        try:
            status, found = await upstream.post("/apply-template", chat)
            if status != _OK:
                self._reasons["prompt_ids_unknown"] += 1
                return None
            return await proof.wrapped.atoken_ids(
                calls.text(found, "prompt"), add_special_tokens=True, scope=scope
            )
        except TokcacheError:
            self._reasons["prompt_ids_unknown"] += 1
            return None

    def may_know_ids(self, upstream: Upstream, look: Look) -> bool:
        """Return whether a server's tokenizer is proven, or may be; this starts no proof."""
        proof = self._proofs.get(upstream.url)
        if proof is None or proof.look != look:
            return upstream.tokenizer is not None
        return proof.wrapped is not None or proof.reason == "tokenizer_pending"

    async def tokenize(
        self, upstream: Upstream, look: Look, raw: bytes, body: dict[str, Any], scope: str | None
    ) -> tuple[int, Any]:
        """Return the status and the answer of /tokenize."""
        proof = self._proof(upstream, look)
        ids = await self._ids(proof, body, scope)
        if ids is None:
            return await upstream.post("/tokenize", raw)
        if body.get("with_pieces") is not True:
            return _OK, {"tokens": ids.tolist()}
        listed = ids.tolist()
        unknown = sorted(set(listed) - proof.pieces.keys())
        if unknown:
            asked = {"content": unknown, "with_pieces": True}
            told = await self._of_server(upstream, asked)
            proof.pieces |= {one["id"]: one["piece"] for one in told}
        return _OK, {"tokens": [{"id": each, "piece": proof.pieces[each]} for each in listed]}

    async def _ids(self, proof: _Proof, body: dict[str, Any], scope: str | None) -> TokenIds | None:
        """Return the ids of a text, None if the server must be asked; count which and why.

        As in llama-server, a setting that is not a boolean has its default.
        """
        text, ids = body.get("content"), None
        if not isinstance(text, str) or body.get("parse_special") is False:
            self._reasons["tokenize_form"] += 1
        elif proof.wrapped is None:
            self._reasons[proof.reason] += 1
        else:
            add_special = body.get("add_special") is True
            try:
                ids = await proof.wrapped.atoken_ids(
                    text, add_special_tokens=add_special, scope=scope
                )
            except TokcacheError:  # a lone surrogate, for which the server has its own error
                self._reasons["tokenize_form"] += 1
        self.counts["server" if ids is None else "cache"] += 1
        return ids

    async def _of_server(self, upstream: Upstream, body: dict[str, Any]) -> list[Any]:
        status, found = await upstream.post("/tokenize", json.dumps(body).encode())
        if status != _OK:
            raise upstream_error(status, found)
        return list(calls.member(found, "tokens"))

    # -- the proof ----------------------------------------------------------------------------

    def _proof(self, upstream: Upstream, look: Look) -> _Proof:
        """Return the proof of a server as it runs now; start it if there is none."""
        proof = self._proofs.get(upstream.url)
        if proof is None or proof.look != look:
            proof = self._proofs[upstream.url] = _Proof(look)
            if upstream.tokenizer is None:
                proof.reason = "tokenizer_not_given"
            else:
                self._in_background(self._prove(upstream, upstream.tokenizer, proof))
        return proof

    async def _prove(self, upstream: Upstream, path: str, proof: _Proof) -> None:
        try:
            if path not in self._wrapped:
                self._wrapped[path] = await asyncio.to_thread(_read, path)
            wrapped = self._wrapped[path]
            difference = await self._difference(upstream, wrapped)
        except ServerError as error:
            # The next request tries again.
            _log.warning("%s could not be asked for the probe: %s", upstream.url, error)
            if self._proofs.get(upstream.url) is proof:
                del self._proofs[upstream.url]
        except TokcacheError as error:
            _log.warning("%s tokenizes itself: %s", upstream.url, error)
            proof.reason = "tokenizer_unreadable"
        else:
            if difference is not None:
                _log.warning("%s tokenizes itself: %s has other ids", upstream.url, difference)
                proof.reason = "tokenizer_differs"
                return
            proof.wrapped = wrapped

    async def _difference(self, upstream: Upstream, wrapped: WrappedTokenizer) -> str | None:
        """Return the first text of the probe whose ids differ from the server's."""
        plain = wrapped.unwrap()
        texts = ["\0", "a\0b", *await asyncio.to_thread(gguf_probe_texts, plain)]
        found = await asyncio.to_thread(plain.encode_batch, texts, add_special_tokens=False)
        # The server encodes each text of a list by itself.
        content, expected, owners = [], [], []
        for text, encoded in zip(texts, found, strict=True):
            content += [text, _BETWEEN]
            expected += [*encoded.ids, _BETWEEN]
            owners += [text] * (len(encoded.ids) + 1)
        given = await self._of_server(upstream, {"content": content})
        if given != expected:
            pairs = enumerate(zip(given, expected, strict=False))
            at = next((i for i, (one, two) in pairs if one != two), -1)
            return f"{owners[at]!r}"
        for text in texts[:_N_WITH_SPECIAL]:
            given = await self._of_server(upstream, {"content": text, "add_special": True})
            if given != plain.encode(text).ids:
                return f"{text!r} with special tokens"
        return None


def _read(path: str) -> WrappedTokenizer:
    """Return the wrapped tokenizer of a GGUF or a tokenizer.json."""
    if is_gguf(path):
        return wrap(path)
    try:
        return wrap(Tokenizer.from_file(path))
    except TokcacheError:
        raise
    except Exception as error:  # noqa: BLE001 (tokenizers raises Exception itself)
        raise UnsupportedTokenizer(
            f"{path} is neither a GGUF nor a tokenizer.json: {error}; set `tokenizer` to one"
        ) from None
