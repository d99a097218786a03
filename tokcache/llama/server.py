"""LlamaServer: the slots of a running llama-server, over HTTP.

The server gets token ids, never text: they come from the wrapped tokenizer, and the vocabulary is
compared before the first of them is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, Self

from tokcache.errors import InvalidTokens, MissingExtra, ServerError, VocabularyMismatch
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType, TracebackType

    from tokenizers import Tokenizer

# Every id is compared up to this many, then ids evenly spread over the vocabulary.
_PROBED_IDS = 4096
_COMPLETION_FIELDS = [
    "content",
    "tokens",
    "stop_type",
    "timings",
    "tokens_evaluated",
    "completion_probabilities",
]


class ServerTokenizer(Protocol):
    """What LlamaServer asks of a wrapped tokenizer."""

    def token_ids(self, text: str, add_special_tokens: bool = True) -> TokenIds:
        """Return the ids of `text`."""

    def unwrap(self) -> Any:
        """Return the plain tokenizer."""


@dataclass(frozen=True, slots=True)
class ServerProps:
    """What a server says of itself. Units: `n_ctx` tokens a slot."""

    n_slots: int
    n_ctx: int
    model_path: str
    build: str
    chat_template: str


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot, as the server lists it; what it holds, llama-server does not tell."""

    id: int
    n_ctx: int
    is_processing: bool


@dataclass(frozen=True, slots=True)
class TokenProbabilities:
    """The likeliest tokens at one position, best first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """What one request brought.

    Units: `n_prompt` ids sent, `n_cached` of them found in the slot; `first_token_s` is the time
    of the whole request less what the server needed for the tokens after the first.
    """

    token_ids: TokenIds
    text: str
    n_prompt: int
    n_cached: int
    stop: str
    seconds: float
    first_token_s: float
    probabilities: tuple[TokenProbabilities, ...]


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A slot that was written to or read from a file in the server's slot folder."""

    filename: str
    n_tokens: int
    n_bytes: int


class LlamaServer:
    """A client of one llama-server.

    Errors: ServerError with the server's own words, or when it can't be reached;
            VocabularyMismatch at once if `tokenizer` is not the model's; MissingExtra.
    Threads: safe; a slot serves one request at a time.
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer: ServerTokenizer | None = None,
        timeout_s: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        self._httpx = _httpx()
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url
        self._client = self._httpx.Client(base_url=url, timeout=timeout_s, headers=headers)
        self._tokenizer = tokenizer
        if tokenizer is not None:
            try:
                self._require_vocabulary(_backend(tokenizer))
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._client.close()

    def health(self) -> str:
        """Return "ok", or raise ServerError with what keeps the server from serving."""
        return str(self._call("GET", "/health")["status"])

    def props(self) -> ServerProps:
        """Return what the server says of itself."""
        found = self._call("GET", "/props")
        return ServerProps(
            n_slots=found["total_slots"],
            n_ctx=found["default_generation_settings"]["n_ctx"],
            model_path=found["model_path"],
            build=found.get("build_info", ""),
            chat_template=found.get("chat_template", ""),
        )

    def slots(self) -> tuple[Slot, ...]:
        """Return the slots; the server must have been started with its slots endpoint."""
        found = self._call("GET", "/slots")
        return tuple(Slot(slot["id"], slot["n_ctx"], slot["is_processing"]) for slot in found)

    def n_vocab(self) -> int | None:
        """Return the model's vocabulary size, None if this server does not tell."""
        models = self._call("GET", "/v1/models").get("data") or [{}]
        size = (models[0].get("meta") or {}).get("n_vocab")
        return None if size is None else int(size)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> TokenIds:
        """Return the ids that the server's own tokenizer makes of `text`."""
        asked = {"content": text, "add_special": add_special_tokens, "parse_special": True}
        return TokenIds(self._call("POST", "/tokenize", asked)["tokens"])

    def detokenize(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`, special tokens included."""
        return str(self._call("POST", "/detokenize", {"tokens": _plain(tokens)})["content"])

    def token_ids(self, text: str, add_special_tokens: bool = True) -> TokenIds:
        """Return the ids of `text`: the wrapped tokenizer's, or the server's if there is none."""
        if self._tokenizer is None:
            return self.tokenize(text, add_special_tokens)
        return self._tokenizer.token_ids(text, add_special_tokens=add_special_tokens)

    def completion(
        self,
        tokens: Iterable[int],
        *,
        n_predict: int,
        id_slot: int = -1,
        temperature: float = 0.0,
        cache_prompt: bool = True,
        n_probs: int = 0,
        **settings: Any,
    ) -> Completion:
        """Decode `tokens` in a slot and return what the model says after them.

        `settings` go into the request as they are. With `n_predict=0` the slot holds `tokens`
        and nothing else afterwards.
        """
        # Not streamed: a stream leaves out the ids of tokens that end within a character.
        asked = {
            "prompt": _plain(tokens),
            "n_predict": n_predict,
            "id_slot": id_slot,
            "temperature": temperature,
            "cache_prompt": cache_prompt,
            "n_probs": n_probs,
            "return_tokens": True,
            "response_fields": _COMPLETION_FIELDS,
            **settings,
        }
        started = perf_counter()
        found = self._call("POST", "/completion", asked)
        return _completion(found, perf_counter() - started)

    def save_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Write a slot's state to `filename` in the server's slot folder."""
        found = self._slot(id_slot, "save", filename)
        return SlotFile(filename, found["n_saved"], found["n_written"])

    def restore_slot(self, id_slot: int, filename: str) -> SlotFile:
        """Read a slot's state back; the slot is empty after a failure."""
        found = self._slot(id_slot, "restore", filename)
        return SlotFile(filename, found["n_restored"], found["n_read"])

    def erase_slot(self, id_slot: int) -> None:
        """Empty a slot."""
        self._slot(id_slot, "erase", None)

    def _slot(self, id_slot: int, action: str, filename: str | None) -> Any:
        asked = {} if filename is None else {"filename": filename}
        return self._call("POST", f"/slots/{id_slot}?action={action}", asked)

    def _call(self, method: str, path: str, asked: dict[str, Any] | None = None) -> Any:
        try:
            response = self._client.request(method, path, json=asked)
        except (self._httpx.HTTPError, self._httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ServerError(f"llama-server at {self.url} is out of reach: {reason}") from error
        if response.is_success:
            return self._json(response)
        raise ServerError(
            f"llama-server at {self.url} answered {path} with {response.status_code}:"
            f" {_message(response)}"
        )

    def _json(self, response: Any) -> Any:
        try:
            return response.json()
        except ValueError:
            raise ServerError(
                f"{self.url} did not answer in JSON; is a llama-server there?"
            ) from None

    def _require_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Raise VocabularyMismatch unless ids mean the same text on both sides.

        Decoding is compared, not encoding: ids are all that is sent, and llama.cpp splits some
        texts in its own way with the very same vocabulary.
        """
        n_ours, n_theirs = tokenizer.get_vocab_size(), self.n_vocab()
        if n_theirs is not None and n_ours > n_theirs:
            raise VocabularyMismatch(
                f"the tokenizer has {n_ours:,} tokens, the model of {self.url} has {n_theirs:,};"
                " pass the model's own tokenizer"
            )
        ids = _probe_ids(tokenizer)
        if self._decodes_alike(tokenizer, ids):
            return
        first = next((i for i in ids if not self._decodes_alike(tokenizer, [i])), ids[0])
        raise VocabularyMismatch(
            f"token {first} is {_decode(tokenizer, [first])!r} for the tokenizer and"
            f" {self.detokenize([first])!r} for the model of {self.url};"
            " pass the model's own tokenizer"
        )

    def _decodes_alike(self, tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
        # SentencePiece decoders differ in the one space they put before a text.
        ours, theirs = _decode(tokenizer, ids), self.detokenize(ids)
        return ours.removeprefix(" ") == theirs.removeprefix(" ")


def _httpx() -> ModuleType:
    try:
        import httpx  # noqa: PLC0415 (an extra)
    except ImportError:
        raise MissingExtra("LlamaServer needs httpx: pip install 'tokcache[server]'") from None
    return httpx


def _plain(tokens: Iterable[int]) -> list[int]:
    if isinstance(tokens, str | bytes):
        raise InvalidTokens(f"token ids were expected, not {type(tokens).__name__}")
    return TokenIds(tokens).tolist()


def _message(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or "nothing"


def _completion(found: dict[str, Any], seconds: float) -> Completion:
    timings = found["timings"]
    later_s = max(float(timings.get("predicted_ms") or 0.0), 0.0) / 1000
    positions = found.get("completion_probabilities") or []
    return Completion(
        token_ids=TokenIds(found["tokens"]),
        text=found["content"],
        n_prompt=found["tokens_evaluated"],
        n_cached=timings["cache_n"],
        stop=found["stop_type"],
        seconds=seconds,
        first_token_s=seconds - later_s,
        probabilities=tuple(_probabilities(position) for position in positions),
    )


def _probabilities(position: dict[str, Any]) -> TokenProbabilities:
    top = position["top_logprobs"]
    return TokenProbabilities(
        tuple(entry["id"] for entry in top), tuple(entry["logprob"] for entry in top)
    )


def _backend(tokenizer: ServerTokenizer) -> Tokenizer:
    plain = tokenizer.unwrap()
    backend: Tokenizer = getattr(plain, "backend_tokenizer", plain)
    return backend


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def _probe_ids(tokenizer: Tokenizer) -> list[int]:
    """Return ids whose text can be compared: added tokens, and others evenly spread."""
    n_vocab = tokenizer.get_vocab_size()
    spread = range(0, n_vocab, max(1, n_vocab // _PROBED_IDS))
    ids = sorted({*spread, *tokenizer.get_added_tokens_decoder()})
    # A lone byte of a longer character has no text of its own.
    return [i for i in ids if (text := _decode(tokenizer, [i])) and "\ufffd" not in text]
