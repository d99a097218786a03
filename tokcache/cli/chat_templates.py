"""Finds the chat templates of a tokenizer, a GGUF or a .jinja file, and the encoder of texts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcache.demo.tokenizers import TokenizerSource, find_tokenizer
from tokcache.errors import InvalidTemplate, MissingFile, UnsupportedTokenizer
from tokcache.text.chat.audit import Encoder
from tokcache.text.wrappers import wrap
from tokcache.text.wrappers.gguf_tokenizer import is_gguf, read_gguf_strings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokcache.config import CacheConfig

_KEY = "tokenizer.chat_template"
_DEFAULT = "default"
_MAX_BYTES = 4 << 20
# Templates without a tokenizer get the most common texts of these tokens.
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """Templates by name, the variables that each rendering passes, and the encoder of texts.

    `why_text_only` is the reason if there is no encoder.
    """

    name: str
    templates: dict[str, str]
    variables: dict[str, Any] = field(default_factory=lambda: dict(_TOKENS))
    encoder: Encoder | None = None
    why_text_only: str | None = None
    by_transformers: bool = False


def find_chat_templates(named: str, tokenizer: str | None, config: CacheConfig) -> ChatTemplates:
    """Return the templates of a .jinja file, a GGUF, or a tokenizer's file, folder or hub name.

    `tokenizer` encodes the texts of a .jinja file.

    Errors: InvalidTemplate if there is none or it can't be read; those of `find_tokenizer`.
    """
    path = Path(named)
    if named.endswith((".jinja", ".jinja2", ".j2")):
        templates = {_DEFAULT: _read(path)}
        if tokenizer is None:
            why = "a template file has no tokenizer; give one with --tokenizer"
            return ChatTemplates(named, templates, why_text_only=why)
        source = find_tokenizer(tokenizer)
        return ChatTemplates(named, templates, _variables(source), _encoder(source, config))
    try:
        source = find_tokenizer(named)
    except UnsupportedTokenizer as error:
        # llama.cpp has read the file, but its tokenizer could not be built or differed.
        if not is_gguf(path):
            raise
        return ChatTemplates(named, _of_gguf(path), why_text_only=str(error))
    in_gguf = source.in_gguf is not None
    templates = _of_gguf(path) if in_gguf else dict(_of_folder(source, named))
    if not templates:
        raise InvalidTemplate(
            f"{named} has no chat template; pass the folder of a chat model, or a .jinja file"
        )
    encoder = _encoder(source if tokenizer is None else find_tokenizer(tokenizer), config)
    return ChatTemplates(named, templates, _variables(source), encoder, by_transformers=not in_gguf)


def _of_gguf(path: Path) -> dict[str, str]:
    found = read_gguf_strings(path, _KEY)
    return {key.removeprefix(_KEY).strip(".") or _DEFAULT: text for key, text in found.items()}


def _of_folder(source: TokenizerSource, named: str) -> Iterator[tuple[str, str]]:
    """Yield the templates of a tokenizer's configuration and of the files next to it.

    Source: transformers, `PreTrainedTokenizerBase.from_pretrained`: a file comes before the
            configuration, which may hold a list of named templates.
    """
    found = source.config.get("chat_template")
    if isinstance(found, str):
        yield _DEFAULT, found
    elif isinstance(found, list):
        for each in found:
            if isinstance(each, dict) and isinstance(each.get("template"), str):
                yield str(each.get("name", _DEFAULT)), each["template"]
    folder = source.path.parent
    if not Path(named).exists():
        _download(named)
    processor = folder / "chat_template.json"
    if processor.is_file():
        try:
            inside = json.loads(_read(processor)).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise InvalidTemplate(f"{processor} is not an object of JSON: {error}") from None
        if isinstance(inside, str):
            yield _DEFAULT, inside
    if (folder / "chat_template.jinja").is_file():
        yield _DEFAULT, _read(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        yield path.stem, _read(path)


def _download(name: str) -> None:
    """Fetch a model's template into the hub's cache, if it is a file of its own."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 (comes with tokenizers, slow)
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415 (same)

    try:
        hf_hub_download(name, "chat_template.jinja")
    except EntryNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MissingFile(f"the hub gave no chat_template.jinja for {name!r}: {reason}") from None


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidTemplate(f"{path} is larger than {_MAX_BYTES >> 20} MiB: not a template")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingFile(f"no such template file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidTemplate(f"{path} can't be read as UTF-8 text: {error}") from None


def _variables(source: TokenizerSource) -> dict[str, Any]:
    """Return the special tokens by name, as transformers passes them to a template."""
    found = {}
    for name, value in source.config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _encoder(source: TokenizerSource, config: CacheConfig) -> Encoder:
    wrapped, plain = wrap(source.load(), config), source.load()
    return Encoder(
        lambda text: wrapped.token_ids(text, add_special_tokens=False),
        lambda text: plain.encode(text, add_special_tokens=False).ids,
    )
