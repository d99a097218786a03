"""The requests that a llama-server understands, each with a function that reads the answer.

Differences between server versions are accepted. An answer that makes no sense is refused, and the
error quotes it. Nothing here talks to a network.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tokcache._validate import require_bool
from tokcache.errors import (
    InvalidAnswer,
    InvalidConfig,
    InvalidFilename,
    InvalidText,
    InvalidTokens,
)
from tokcache.llama.server.results import (
    Completion,
    ModelMeta,
    ServerProps,
    Slot,
    SlotFile,
    TokenProbabilities,
)
from tokcache.text.token_ids import TokenIds

T = TypeVar("T")
_MAX_SLOTS = 4096
_MAX_COUNT = 2**62
_SHOWN = 80
_FILENAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")
# Settings that turn the answer into several answers or into a form that is not read here.
_UNREADABLE = {"n", "n_cmpl", "post_sampling_probs", "prompt", "stream", "response_fields"}
COMPLETION_FIELDS = (
    "content",
    "tokens",
    "stop",
    "stop_type",
    "timings",
    "tokens_evaluated",
    "tokens_predicted",
    "tokens_cached",
    "truncated",
    "completion_probabilities",
)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request; `is_repeatable` if sending it twice does no harm."""

    method: str
    path: str
    read: Callable[[Any], T]
    body: dict[str, Any] | None = None
    is_repeatable: bool = False
    is_text: bool = False


def health() -> Call[str]:
    """Ask whether the server is ready."""
    return Call("GET", "/health", lambda found: text(found, "status"), is_repeatable=True)


def props() -> Call[ServerProps]:
    """Ask for the server's properties."""

    def read(found: Any) -> ServerProps:
        return ServerProps(
            n_slots=integer(found, "total_slots", _MAX_SLOTS, minimum=1),
            n_ctx=integer(member(found, "default_generation_settings"), "n_ctx", minimum=1),
            model_path=text(found, "model_path", ""),
            build=text(found, "build_info", ""),
            chat_template=text(found, "chat_template", ""),
            # The marker of images in a prompt, drawn at random at each start of the server.
            boot=text(found, "media_marker", ""),
        )

    return Call("GET", "/props", read, is_repeatable=True)


def slots() -> Call[tuple[Slot, ...]]:
    """Ask for the list of slots."""

    def read(found: Any) -> tuple[Slot, ...]:
        listed = tuple(
            Slot(
                id=integer(entry, "id", _MAX_SLOTS),
                n_ctx=integer(entry, "n_ctx"),
                is_processing=bool(
                    entry["state"] if "state" in entry else member(entry, "is_processing")
                ),
                # Until 2025 n_past, unless idle; since then n_prompt_tokens, after the first
                # request.
                n_tokens=optional_integer(entry, "n_past", "n_prompt_tokens"),
            )
            for entry in _list(found, "the list of slots")
        )
        if len({slot.id for slot in listed}) != len(listed):
            raise InvalidAnswer("two slots have the same id")
        return listed

    return Call("GET", "/slots", read, is_repeatable=True)


def model_meta() -> Call[ModelMeta]:
    """Ask for the model's metadata."""

    def read(found: Any) -> ModelMeta:
        models = _list(found.get("data") or [] if isinstance(found, dict) else found, "'data'")
        meta = (models[0].get("meta") if models and isinstance(models[0], dict) else None) or {}
        return ModelMeta(
            n_vocab=optional_integer(meta, "n_vocab"),
            n_ctx_train=optional_integer(meta, "n_ctx_train"),
            n_embd=optional_integer(meta, "n_embd"),
            n_params=optional_integer(meta, "n_params"),
            n_bytes=optional_integer(meta, "size"),
        )

    return Call("GET", "/v1/models", read, is_repeatable=True)


def lora_adapters() -> Call[str]:
    """Ask for the adapters and their scales, which change every state."""

    def read(found: Any) -> str:
        return repr(found) if _list(found, "the list of adapters") else ""

    return Call("GET", "/lora-adapters", read, is_repeatable=True)


def metrics() -> Call[dict[str, float]]:
    """Ask for the counters of a server that was started with --metrics."""

    def read(found: str) -> dict[str, float]:
        figures = {}
        for line in found.splitlines():
            if not line or line.startswith("#"):
                continue
            name, _, value = line.rpartition(" ")
            try:
                figures[name] = float(value)
            except ValueError:
                raise InvalidAnswer(f"a metric must be a number, not {_short(line)}") from None
        return figures

    return Call("GET", "/metrics", read, is_repeatable=True, is_text=True)


def tokenize(content: str, *, add_special: bool) -> Call[TokenIds]:
    """Ask for the token ids of a text."""
    require_bool("add_special_tokens", add_special)
    asked = {"content": require_text(content), "add_special": add_special, "parse_special": True}
    return Call("POST", "/tokenize", lambda found: token_ids(found, "tokens"), asked, True)


def require_text(content: str) -> str:
    """Return `content` if it is a str that UTF-8 can hold, else raise InvalidText."""
    if not isinstance(content, str):
        raise InvalidText(f"text must be a str, not {type(content).__name__}; decode bytes first")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise InvalidText(
            f"text has a lone surrogate, U+{ord(content[error.start]):04X}, at position"
            f" {error.start}; it is half of a character"
        ) from None
    return content


def detokenize(tokens: Iterable[int]) -> Call[str]:
    """Ask for the text of token ids."""
    asked = {"tokens": plain(tokens)}
    return Call("POST", "/detokenize", lambda found: text(found, "content"), asked, True)


def completion(
    tokens: Iterable[int], settings: Mapping[str, Any], is_stream: bool = False
) -> Call[Completion]:
    """Ask for a completion; a stream omits the ids of tokens that end within a character."""
    asked = {
        "prompt": plain(tokens),
        "return_tokens": True,
        "response_fields": list(COMPLETION_FIELDS),
        **({"stream": True, "timings_per_token": False} if is_stream else {}),
        **settings,
    }
    return Call("POST", "/completion", read_completion, asked)


def require_settings(settings: Mapping[str, Any]) -> None:
    """Raise InvalidConfig for a setting that can't be sent or whose answer can't be read."""
    for name in _UNREADABLE & settings.keys():
        raise InvalidConfig(f"{name} changes the form of the answer; leave it out")
    for name, value in settings.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidConfig(f"{name}: {_short(value)} can't be sent: {error}") from None


def save_slot(id_slot: int, filename: str) -> Call[SlotFile]:
    """Ask the server to write a slot to a file."""
    return _slot_action(id_slot, "save", filename, "n_saved", "n_written")


def restore_slot(id_slot: int, filename: str) -> Call[SlotFile]:
    """Ask the server to read a slot from a file."""
    return _slot_action(id_slot, "restore", filename, "n_restored", "n_read")


def erase_slot(id_slot: int) -> Call[None]:
    """Ask the server to empty a slot."""
    return Call("POST", f"/slots/{id_slot}?action=erase", lambda _: None, {})


def _slot_action(
    id_slot: int, action: str, filename: str, n_tokens: str, n_bytes: str
) -> Call[SlotFile]:
    require_filename(filename)

    def read(found: Any) -> SlotFile:
        return SlotFile(filename, integer(found, n_tokens), integer(found, n_bytes))

    return Call("POST", f"/slots/{id_slot}?action={action}", read, {"filename": filename})


def require_filename(name: str) -> str:
    """Return `name` if it is one plain file name, else raise InvalidFilename."""
    if isinstance(name, str) and _FILENAME.fullmatch(name) and ".." not in name:
        return name
    raise InvalidFilename(
        f"{name!r} can't name a slot file; use 1 to 128 letters, digits, '.', '_' and '-', without"
        " a folder"
    )


def plain(tokens: Iterable[int]) -> list[int]:
    """Return `tokens` as a list, or raise InvalidTokens."""
    if isinstance(tokens, str | bytes):
        raise InvalidTokens(f"expected token ids, not {type(tokens).__name__}")
    return (tokens if isinstance(tokens, TokenIds) else TokenIds(tokens)).tolist()


def member(found: Any, name: str) -> Any:
    """Return the member `name` of a JSON object."""
    if not isinstance(found, dict):
        raise InvalidAnswer(f"expected an object with {name!r}, not {_short(found)}")
    if name not in found:
        raise InvalidAnswer(f"{name!r} is missing in {_short(found)}")
    return found[name]


def integer(found: Any, name: str, maximum: int = _MAX_COUNT, minimum: int = 0) -> int:
    """Return an integer member from `minimum` to `maximum`."""
    value = member(found, name)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not minimum <= value <= maximum:
        raise InvalidAnswer(
            f"{name!r} must be an integer from {minimum} to {maximum:,}, not {_short(value)}"
        )
    return int(value)


def optional_integer(found: Any, *names: str) -> int | None:
    """Return the first of `names` that is present, None if all are missing."""
    for name in names:
        if isinstance(found, dict) and found.get(name) is not None:
            return integer(found, name)
    return None


def number(found: Any, name: str) -> float:
    """Return a number member; llama-server writes null for minus infinity."""
    value = member(found, name)
    if value is None:
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidAnswer(f"{name!r} must be a number, not {_short(value)}")
    try:
        return float(value)
    except OverflowError:
        raise InvalidAnswer(f"{name!r} must be a number, not {_short(value)}") from None


def text(found: Any, name: str, default: str | None = None) -> str:
    """Return a string member."""
    if default is not None and isinstance(found, dict) and found.get(name) is None:
        return default
    value = member(found, name)
    if not isinstance(value, str):
        raise InvalidAnswer(f"{name!r} must be a string, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _list(found: Any, name: str) -> list[Any]:
    if not isinstance(found, list):
        raise InvalidAnswer(f"{name} must be a list, not {_short(found)}")
    return found


def token_ids(found: Any, name: str) -> TokenIds:
    """Return a member that is a list of token ids."""
    value = _list(member(found, name), repr(name))
    try:
        ids = TokenIds(value)
    except (InvalidTokens, TypeError, ValueError, OverflowError) as error:
        raise InvalidAnswer(f"{name!r} must hold token ids: {error}") from None
    if ids and int(ids.numpy().min()) < 0:
        raise InvalidAnswer(f"{name!r} must hold token ids, not {_short(value)}")
    return ids


def read_completion(found: Any) -> Completion:
    """Read a completion; the connection fills in its times."""
    timings = member(found, "timings")
    n_prompt = integer(found, "tokens_evaluated")
    n_prefilled = integer(timings, "prompt_n", minimum=-1)
    n_cached = optional_integer(timings, "cache_n")
    if n_cached is None:  # servers of 2024
        n_cached = max(0, n_prompt - n_prefilled)
    if n_cached > n_prompt:
        raise InvalidAnswer(f"'cache_n' is {n_cached:,} for a prompt of {n_prompt:,} tokens")
    probabilities = []
    for position in _list(found.get("completion_probabilities") or [], "probabilities"):
        top = _list(member(position, "top_logprobs"), "'top_logprobs'")
        ids, logprobs = (
            [integer(each, "id") for each in top],
            [number(each, "logprob") for each in top],
        )
        probabilities.append(TokenProbabilities(tuple(ids), tuple(logprobs)))
    return Completion(
        token_ids=token_ids(found, "tokens") if "tokens" in found else TokenIds(),
        text=text(found, "content"),
        n_prompt=n_prompt,
        n_cached=n_cached,
        stop=text(found, "stop_type", ""),
        seconds=0.0,
        first_token_s=0.0,
        probabilities=tuple(probabilities),
        n_prefilled=max(0, n_prefilled),
        n_predicted=optional_integer(found, "tokens_predicted") or 0,
        n_held=optional_integer(found, "tokens_cached"),
        is_truncated=bool(found.get("truncated")),
    )


def predicted_seconds(found: Any) -> float:
    """Return the seconds that the server took for the tokens after the first."""
    value = member(found, "timings").get("predicted_ms")
    if not isinstance(value, int | float) or not 0 <= value <= _MAX_COUNT:
        return 0.0
    return float(value) / 1000
