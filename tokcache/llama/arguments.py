"""Checks of the arguments of Llama, before llama.cpp or llama_cpp fails over them less clearly."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokcache.errors import InvalidConfig, InvalidModel, InvalidText, MissingFile
from tokcache.state.cache import PrefixStateCache
from tokcache.text.token_ids import TokenIds


def checked_cache(cache: Any) -> PrefixStateCache | None:
    """Return a prefix cache or None.

    Errors: InvalidConfig.
    """
    if cache is None or isinstance(cache, PrefixStateCache):
        return cache
    raise InvalidConfig(f"prefix_cache must be a PrefixStateCache or None, not {cache!r}")


def checked_model(path: str | os.PathLike[str]) -> str:
    """Return the path of a GGUF file.

    Errors: InvalidModel, MissingFile.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise InvalidModel(
            f"model_path must be the path of a GGUF file, a str or a Path, not {path!r}"
        )
    file = Path(path)
    if not os.fspath(path) or not file.is_file():
        found = "" if not os.fspath(path) else f" {file}"
        is_folder = found and file.is_dir()
        raise MissingFile(
            f"there is no model file{found}{', it is a folder' if is_folder else ''}; "
            "pass the path of a GGUF file"
        )
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise InvalidModel(
            f"{file} is not a GGUF file: it begins with {magic!r}, not b'GGUF'; convert the model "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    return str(file)


def check_lora(path: object) -> None:
    """Raise MissingFile unless `path` is None or a file."""
    if path is not None and not Path(str(path)).is_file():
        raise MissingFile(f"there is no LoRA file {path}; pass the path of a GGUF adapter")


def checked_prompt(prompt: Any) -> Any:
    """Return a prompt as llama_cpp takes it: a str, or a list of ids.

    Errors: InvalidText. llama_cpp raises TypeError, ValueError and UnicodeEncodeError.
    """
    if isinstance(prompt, list):
        return prompt
    if isinstance(prompt, TokenIds):
        return prompt.tolist()
    if not isinstance(prompt, str):
        cure = "; decode it" if isinstance(prompt, (bytes, bytearray)) else ""
        raise InvalidText(
            f"prompt must be a str, a list of ids or TokenIds, not {type(prompt).__name__}{cure}"
        )
    _require_utf8("prompt", prompt)
    return prompt


def checked_texts(texts: Any) -> Any:
    """Return one str or a list of them, as llama_cpp takes them.

    Errors: InvalidText.
    """
    if isinstance(texts, str):
        return texts
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, bytearray)):
        raise InvalidText(f"input must be a str or a list of them, not {type(texts).__name__}")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidText(f"input {position} must be a str, not {type(text).__name__}")
    return texts


def checked_messages(messages: Any) -> Any:
    """Return a chat's messages unless they can't be messages.

    Errors: InvalidText.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidText(
            "messages must be a list of dicts with 'role' and 'content', "
            f"not {type(messages).__name__}"
        )
    if isinstance(messages, list | tuple):
        for n, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, str):
                _require_utf8(f"messages[{n}]['content']", content)
    return messages


def _require_utf8(name: str, text: str) -> None:
    """Raise InvalidText if `text` has a lone surrogate: llama.cpp takes UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidText(
            f"{name} has a lone surrogate at position {error.start}, which is not text; replace "
            "it (text.encode('utf-8', 'replace').decode())"
        ) from None
