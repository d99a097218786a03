"""The targets: code that reads foreign bytes, with the errors that its callers expect.

A target raises for a fault only. It returns where the bytes are refused with a documented error, or
where they are taken and all that must hold then does hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import tokcache
from tests.fault.test_redis_faults import Stranger
from tests.fault.test_redis_faults import cache as cache_on_redis
from tests.fault.test_redis_faults import use_all as use_all_of
from tests.text.tokenizers_made import byte_level_bpe
from tokcache import differences
from tokcache.errors import (
    ApiError,
    InvalidAnswer,
    InvalidCacheFile,
    InvalidConfig,
    InvalidModel,
    InvalidRequest,
    InvalidTrace,
    MissingFile,
    NothingCached,
    StateRefused,
    Unrecognised,
    UnsupportedTokenizer,
)
from tokcache.gateway import config as gateway_config
from tokcache.gateway.api import body as bodies
from tokcache.gateway.api import messages, rules, streams
from tokcache.gateway.app import AsciiJson
from tokcache.gateway.routing import chain
from tokcache.gateway.routing.files import Files
from tokcache.gateway.servers.upstream import Lines
from tokcache.llama.server import calls
from tokcache.replay import traces
from tokcache.replay.traces.source import Skipped
from tokcache.state.names import RootKey, child_name, root_name
from tokcache.state.tiers import Address, Record
from tokcache.state.tiers.block_file import HEAD_BYTES, StateCodec
from tokcache.state.tiers.disk.file import read_head
from tokcache.text.chat.proof import prove_append_only
from tokcache.text.cuts.regex import syntax
from tokcache.text.wrappers.gguf_tokenizer import read_gguf_strings

CORPUS = Path(__file__).parent / "corpus"
TEXTS = ("", " a  b\n", "hello world", "<s>hello</s> 1234 naïve 東京\r\n\r\nx")
_KEY = b"k" * 32
_ROOT = RootKey(b"fingerprint", "tenant", "free")
_TOKENS = b"".join(token.to_bytes(4, "little") for token in range(40))


@dataclass(frozen=True, slots=True)
class Target:
    """One target; its seeds are the files of `corpus/NAME`."""

    name: str
    about: str
    run: Callable[[bytes], None]

    def seeds(self, names: str = "*") -> list[bytes]:
        """Return the seeds, in the order of their names; `found-*` once found a fault."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).glob(names))]


TARGETS: dict[str, Target] = {}


def target(name: str, about: str) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Register a function as a target."""

    def register(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[name] = Target(name, about, run)
        return run

    return register


# Files of the caches


@cache
def _wrapped() -> Any:
    return tokcache.wrap(byte_level_bpe(), tokcache.CacheConfig(engine="tokenizers"))


@target("cache-file", "a file of cache_dump; its checksum is made right")
def cache_file(data: bytes) -> None:
    """Load a cache file; texts keep the tokenizer's own ids."""
    import hashlib  # noqa: PLC0415 (used here alone)

    wrapped = _wrapped()
    wrapped.cache_clear()
    with _file(data + hashlib.sha256(data).digest()) as path:
        try:
            wrapped.cache_load(path)
        except (InvalidCacheFile, NothingCached):
            return
    for text in TEXTS:
        assert wrapped.token_ids(text).tolist() == byte_level_bpe_ids(text)


@cache
def _plain() -> Tokenizer:
    return byte_level_bpe()


def byte_level_bpe_ids(text: str) -> list[int]:
    """Return the ids without any cache."""
    return list(_plain().encode(text).ids)


@cache
def _address() -> tuple[StateCodec, Address, Record]:
    base = root_name(_ROOT)
    record = Record(child_name(base, _TOKENS), _TOKENS)
    return StateCodec(), Address(_ROOT, 0, base, child_name(base, _TOKENS[:16])), record


def block_file_seed() -> bytes:
    """Return a whole file of a state."""
    codec, address, record = _address()
    first, stored, checksum = codec.packed(address, record, memoryview(b"state" * 50))
    return first + bytes(stored) + checksum


@target("block-file", "a state in a file, as the disk tier reads it; its checksums are made right")
def block_file(data: bytes) -> None:
    """Read a head and a payload; a state that is served has the tokens that its name says."""
    codec, address, record = _address()
    handle = os.memfd_create("state")
    try:
        os.write(handle, _with_checksums(codec, data))
        head, first = read_head(handle, len(data))
        found = codec.record(head, first, address)
        payload = memoryview(bytearray(head.payload_bytes))
        os.preadv(handle, [payload], head.head_bytes)
        checksum = os.pread(handle, head.checksum_bytes, head.head_bytes + head.payload_bytes)
        codec.opened_payload(head, first, payload, checksum)
    except StateRefused:
        return
    finally:
        os.close(handle)
    assert (found.name, found.tokens) == (record.name, record.tokens)


def _with_checksums(codec: StateCodec, data: bytes) -> bytes:
    """Return the bytes with right checksums, so that a fuzzer reaches the checks after them."""
    end = HEAD_BYTES + len(_TOKENS)
    if len(data) < end + 32:
        return data
    first = data[:end] + codec.checksum(data[:end])
    payload = data[end + 16 : -16]
    return first + payload + codec.checksum(first, payload)


@target("redis-answers", "what a Redis answers, or whatever listens in its place")
def redis_answers(data: bytes) -> None:
    """Use all methods of a cache whose Redis answers with these bytes, a part at a time."""
    answers = data.split(b"|") or [b""]

    def answer(connection: socket.socket) -> None:
        n_asked = 0
        while connection.recv(1 << 16):
            connection.sendall(answers[n_asked % len(answers)])
            n_asked += 1

    with Stranger(answer) as stranger:
        use_all_of(cache_on_redis(stranger.url, timeout_s=0.02, retry_s=60.0))


@target("gateway-list", "the list of saved slots that a gateway left on disk")
def gateway_list(data: bytes) -> None:
    """Read a list; a damaged one is counted, and the files that it names can be dropped."""
    with _file(data) as path:
        files = Files(1 << 20)
        files.read_list(path)
        for file in list(files):
            files.drop(file)
        assert len(files) == 0
        assert files.n_bytes == 0
        files.write_list(path)
        assert Files(1 << 20).read_list(path) == 0


# Files of other programs


@target("tokenizer-json", "a tokenizer.json; ids are compared with those of tokenizers")
def tokenizer_json(data: bytes) -> None:
    """Wrap a tokenizer; each text has the ids, or the error, that it has without the cache."""
    try:
        own = Tokenizer.from_str(data.decode())
        wanted = [_outcome(own, text) for text in TEXTS]
    except BaseException as error:
        if type(error).__name__ in ("Exception", "PanicException", "UnicodeDecodeError"):
            return  # tokenizers itself refuses the file, or panics
        raise
    try:
        wrapped = tokcache.wrap(own)
    except UnsupportedTokenizer:
        return
    for text, outcome in zip(TEXTS * 2, wanted * 2, strict=True):
        assert _outcome(wrapped, text) == outcome


def _outcome(tokenizer: Any, text: str) -> Any:
    try:
        return list(tokenizer.encode(text).ids)
    except Exception as error:  # noqa: BLE001 (tokenizers raises Exception itself)
        return str(error)


@target("pattern", "the pattern of a pre-tokenizer")
def pattern(data: bytes) -> None:
    """Parse a pattern; a construct that is not modelled is refused by its name and place."""
    with contextlib.suppress(Unrecognised, UnicodeDecodeError):
        syntax.parse(data.decode())


@target("chat-template", "a chat template, read by the proof")
def chat_template(data: bytes) -> None:
    """Prove a template, or find the reason why not."""
    proof = prove_append_only(data.decode("utf-8", "replace"))
    assert proof.proven or proof.reason


@target("gguf", "the metadata of a GGUF")
def gguf(data: bytes) -> None:
    """Read the strings of a file's metadata."""
    with _file(b"GGUF\3\0\0\0" + data) as path, contextlib.suppress(InvalidModel):
        read_gguf_strings(path, "t")


@target("trace", "a log or trace for tokcache replay")
def trace(data: bytes) -> None:
    """Read all requests and blocks of a trace; broken records are counted."""
    with _file(data) as path, contextlib.suppress(InvalidTrace):
        opened = traces.open_trace(str(path), Skipped())
        with contextlib.closing(opened.source):
            for _ in opened.requests() if opened.has_text else opened.blocks():
                pass


@target("requests", "the two requests, or the log, of tokcache why")
def requests(data: bytes) -> None:
    """Compare two requests, and read both together as a log."""
    before, _, after = data.partition(b"\n--\n")
    with contextlib.suppress(InvalidRequest):
        differences.compare_requests(
            differences.read_request(before, "before"), differences.read_request(after, "after")
        )
    with contextlib.suppress(InvalidRequest):
        entries, _ = differences.read_log(data, "log", skips_broken=True)
        for _ in differences.compare_session([each.request for each in entries]):
            pass


@target("gateway-config", "the TOML file of tokcache serve")
def gateway_settings(data: bytes) -> None:
    """Load a configuration."""
    with _file(data) as path, contextlib.suppress(InvalidConfig, MissingFile):
        gateway_config.load(path, {}, {})


# What arrives over HTTP


@target("body", "the body of a request to the gateway")
def body(data: bytes) -> None:
    """Read a body as each API does; adding a setting changes no other member."""
    try:
        found = bodies.read_object(data)
        bodies.require_one_answer(found)
        bodies.require_no_fetches(found)
    except ApiError:
        return
    changed = json.loads(bodies.with_settings(data, {"id_slot": 3}))
    assert json.dumps(changed, sort_keys=True) == json.dumps(
        {**found, "id_slot": 3}, sort_keys=True
    )
    rules.suggested(found)
    rules.apply(found, rules.RULES)
    for prompt in (chain.chat_prompt, chain.text_prompt, chain.responses_prompt):
        with contextlib.suppress(ApiError, RecursionError):
            prompt(found, _KEY, None).chain("answer")
    with contextlib.suppress(ApiError):
        chat = messages.to_chat(found)
        with contextlib.suppress(ApiError, RecursionError):
            chain.chat_prompt(chat, _KEY, None)


_ANSWERS: tuple[type[Any], ...] = (
    streams.ChatAnswer,
    streams.TextAnswer,
    streams.ResponsesAnswer,
    messages.MessageAnswer,
)


@target("events", "the stream of events of a llama-server behind the gateway")
def events(data: bytes) -> None:
    """Put an answer of each API together, and translate it."""
    for kind in _ANSWERS:
        answer = kind()
        with contextlib.suppress(InvalidAnswer):
            made = messages.MessageEvents(answer, "msg_1", "model")
            list(made.start())
            try:
                for name, event in Lines().feed(data):
                    if event != b"[DONE]":
                        found = bodies.event_object(event)
                        answer.feed({"error": found} if name == "error" else found)
                        told = list(made.feed(found)) if kind is streams.ChatAnswer else []
                        json.dumps([*told, found])
            except (AttributeError, KeyError, TypeError, ValueError, ApiError):
                continue  # those that Turn.events turns into an error of the API
            answer.element()
            AsciiJson(answer.body())
            if kind is streams.ChatAnswer:
                list(made.end())
                AsciiJson(messages.from_chat(answer, "msg_1", "model"))


_CALLS: tuple[Callable[[], calls.Call[Any]], ...] = (
    calls.health,
    calls.props,
    calls.slots,
    calls.model_meta,
    calls.lora_adapters,
    lambda: calls.tokenize("a", add_special=False),
    lambda: calls.detokenize([1]),
    lambda: calls.completion([1], {}),
    lambda: calls.save_slot(0, "a"),
    lambda: calls.erase_slot(0),
)


@target("server-answer", "an answer of a llama-server to tokcache.llama.LlamaServer")
def server_answer(data: bytes) -> None:
    """Read the answer to each call."""
    with contextlib.suppress(InvalidAnswer):
        calls.metrics().read(data.decode("utf-8", "replace"))
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return
    for call in _CALLS:
        with contextlib.suppress(InvalidAnswer):
            call().read(found)


@contextlib.contextmanager
def _file(data: bytes) -> Any:
    with tempfile.TemporaryDirectory(prefix="tokcache-fuzz-") as folder:
        path = Path(folder) / "input"
        path.write_bytes(data)
        yield path
