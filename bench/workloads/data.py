"""Finds the real tokenizers and corpora, which the project does not contain."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokcache.errors import MissingFile
from tokcache.samples import tiny_tokenizer

_NEXT_TO_THE_REPOSITORY = Path(__file__).resolve().parents[3] / "shared" / "data"
TINY = "tiny"


def shared_data() -> Path | None:
    """Return the folder that TOKCACHE_SHARED_DATA names, or the one next to the repository."""
    folder = Path(os.environ.get("TOKCACHE_SHARED_DATA") or _NEXT_TO_THE_REPOSITORY)
    return folder if folder.is_dir() else None


def shared_file(*parts: str) -> Path | None:
    """Return a file of that folder, or None if it is absent."""
    folder = shared_data()
    file = folder.joinpath(*parts) if folder else None
    return file if file and file.is_file() else None


def tokenizer_file(name: str) -> Path:
    """Return a tokenizer.json by the name of a real tokenizer, by path, or the sample's.

    Errors: MissingFile if there is none.
    """
    if name == TINY:
        return tiny_tokenizer()
    path = Path(name)
    candidates = [path, path / "tokenizer.json", shared_file("tokenizers", name, "tokenizer.json")]
    found = next((file for file in candidates if file and file.is_file()), None)
    if found is None:
        raise MissingFile(
            f"no tokenizer {name!r}; pass a tokenizer.json, {TINY!r}, or name the folder of real"
            " ones in TOKCACHE_SHARED_DATA"
        )
    return found


def default_tokenizers(*names: str) -> list[str]:
    """Return those of `names` that are present, or only the tiny one."""
    here = [name for name in names if shared_file("tokenizers", name, "tokenizer.json")]
    return here or [TINY]


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add the option `--tokenizer`, which may be given several times."""
    parser.add_argument(
        "--tokenizer",
        action="append",
        help="a tokenizer.json, a real one's name, or tiny; repeatable",
    )


def strings(found: Any) -> Iterator[str]:
    """Yield every string value inside parsed JSON."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, dict | list):
        for value in found.values() if isinstance(found, dict) else found:
            yield from strings(value)


def read_json_lines(text: str) -> list[Any]:
    """Return the value of each line."""
    return [json.loads(line) for line in text.splitlines() if line.strip()]
