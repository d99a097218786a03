"""Finds the demo's tokenizer (file, folder or hub name) and its chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from tokcache.errors import InvalidPrompts, MissingFile, UnsupportedTokenizer
from tokcache.replay.traces.chats import neutral_text
from tokcache.samples import tiny_tokenizer
from tokcache.text.wrappers.gguf_tokenizer import is_gguf, read_gguf_tokenizer

if TYPE_CHECKING:
    from tokcache.demo.prompts import Prompt

# First bytes of other files that people pass as a tokenizer.json, and the kind of each.
_OTHER_FILES = (
    (b"\n\x0e\n\x05<unk>", "is a SentencePiece model"),
    (b"PK", "is an archive"),
)


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """A tokenizer.json or a GGUF, its tokenizer_config.json, and the name to show.

    `in_gguf` is the tokenizer of a GGUF as JSON.
    """

    name: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    in_gguf: str | None = None

    def load(self) -> Tokenizer:
        """Return a new tokenizer, shared with nobody."""
        if self.in_gguf is not None:
            return Tokenizer.from_str(self.in_gguf)
        try:
            return Tokenizer.from_file(str(self.path))
        except Exception as error:  # noqa: BLE001 (tokenizers raises Exception itself)
            with self.path.open("rb") as file:
                start = file.read(16)
            kind = next((kind for magic, kind in _OTHER_FILES if start.startswith(magic)), None)
            if kind is None:
                raise UnsupportedTokenizer(f"{self.path} holds no tokenizer: {error}") from None
            raise UnsupportedTokenizer(
                f"{self.path} {kind}; pass the tokenizer.json of the model, or its folder or hub "
                "name"
            ) from None


def find_tokenizer(named: str | None) -> TokenizerSource:
    """Return the tokenizer of a file, a folder or a hub name; the tiny one if `named` is None.

    Errors: MissingFile if a path does not exist or a hub name can't be fetched; those of
            `read_gguf_tokenizer` for a GGUF.
    """
    if named is None:
        return _from_file(tiny_tokenizer(), "tokcache's tiny one, 2,048 tokens")
    if not named:
        raise MissingFile("the tokenizer has no name; give a file, a folder or a hub name")
    path = Path(named)
    if path.is_dir():
        return _from_file(path / "tokenizer.json", named)
    looks_like_path = named.endswith((".json", ".gguf")) or named.startswith((".", "/", "~"))
    return _from_file(path, named) if path.exists() or looks_like_path else _from_hub(named)


def _from_file(path: Path, name: str) -> TokenizerSource:
    if not path.is_file():
        raise MissingFile(f"no such tokenizer file: {path}")
    if is_gguf(path):
        found = read_gguf_tokenizer(path)
        return TokenizerSource(name, path, found.config, found.tokenizer.to_str())
    return TokenizerSource(name, path, _config(path.with_name("tokenizer_config.json")))


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # optional: the tokenizer.json is enough
        return {}
    return found if isinstance(found, dict) else {}


def _from_hub(name: str) -> TokenizerSource:
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 (comes with tokenizers, slow)
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415 (same)

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # reported once, below
    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
        try:
            config = Path(hf_hub_download(name, "tokenizer_config.json"))
        except EntryNotFoundError:
            config = path.with_name("tokenizer_config.json")
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MissingFile(
            f"{name!r} is not a file, and the hub gave no tokenizer.json for it: {reason}"
        ) from None
    return TokenizerSource(name, path, _config(config))


Dicts = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Turns the messages of a chat, and its tools, into one text.

    Errors: InvalidPrompts if the tokenizer's template refuses the messages.
    """

    name: str
    write: Callable[[Dicts, Dicts | None], str]

    def text(self, prompt: Prompt) -> str:
        """Return the text of a prompt for the tokenizer."""
        if not prompt.messages:
            return prompt.text
        messages = [{"role": each.role, "content": each.content} for each in prompt.messages]
        return self.write(messages, None)


def chat_format(source: TokenizerSource, tokenizer: Tokenizer) -> ChatFormat:
    """Return the tokenizer's own chat template; if it has none, ChatML or plain labels."""
    template = source.config.get("chat_template")
    if isinstance(template, str):
        try:
            return ChatFormat("the tokenizer's template", _template_writer(template, source.config))
        except ImportError:  # jinja2 is optional: llama-cpp-python and transformers bring it
            pass
    if tokenizer.token_to_id("<|im_start|>") is not None:
        return ChatFormat("ChatML", _write_chatml)
    return ChatFormat("plain labels, as the tokenizer has no template", neutral_text)


def _write_chatml(messages: Dicts, tools: Dicts | None = None) -> str:
    parts = ["".join(f"{json.dumps(tool)}\n" for tool in tools or ())]
    for each in messages:
        calls = "".join("\n" + json.dumps(one["function"]) for one in each.get("tool_calls", ()))
        parts.append(f"<|im_start|>{each['role']}\n{each['content']}{calls}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


def _template_writer(template: str, config: dict[str, Any]) -> Callable[[Dicts, Dicts | None], str]:
    from jinja2 import TemplateError  # noqa: PLC0415 (comes with other packages)
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415 (same)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja2's escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = as_json
    special = {}
    for key in ("bos_token", "eos_token"):
        found = config.get(key)
        found = found.get("content") if isinstance(found, dict) else found
        special[key] = found if isinstance(found, str) else ""
    compiled: list[Any] = []  # once, and not before there is a chat to write

    def write(messages: Dicts, tools: Dicts | None) -> str:
        try:
            if not compiled:
                compiled.append(environment.from_string(template))
            text: str = compiled[0].render(
                messages=[dict(each) for each in messages],
                tools=tools,
                add_generation_prompt=True,
                **special,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidPrompts(
                f"the tokenizer's chat template refuses these messages: {error}"
            ) from None
        return text

    return write
