"""datasets: the fingerprint of a tokenizer, and `map` that finds its results on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.ecosystem.given import TEXTS, Given, case


def _calls(marks: Path) -> int:
    return len(marks.read_text()) if marks.exists() else 0


def _mapped(given: Given, mapper: Callable[..., Any], **kwargs: Any) -> Any:
    """Return the rows of a `map`, and how often the function ran in this process."""
    from datasets import Dataset, load_from_disk

    home = given.folder / "data"
    if not home.exists():
        Dataset.from_dict({"text": TEXTS * 4}).save_to_disk(home)
    marks = given.folder / "marks"
    before = _calls(marks)
    rows = load_from_disk(home).map(mapper, batched=True, batch_size=8, **kwargs)
    calls = _calls(marks) - before
    assert given.mode != "plain" or (calls == 0) == (given.step == 1), "no cache to compare with"
    return {"rows": rows["input_ids"][:], "calls": calls}


def _tokenize(batch: Any, tokenizer: Any, marks: str, **how: Any) -> Any:
    with Path(marks).open("a") as file:
        file.write("x")
    return tokenizer(batch["text"], **how)


@case("datasets", "map, twice in two processes: the second finds its results on disk", n_steps=2)
def datasets_map(given: Given) -> Any:
    marks = str(given.folder / "marks")
    return _mapped(given, _tokenize, fn_kwargs={"tokenizer": given.load(), "marks": marks})


@case("datasets", "map of a closure, padded and cut, twice in two processes", n_steps=2)
def datasets_map_closure(given: Given) -> Any:
    tokenizer, marks = given.load(), str(given.folder / "marks")
    how = {"padding": "max_length", "truncation": True, "max_length": 16}
    return _mapped(given, lambda batch: _tokenize(batch, tokenizer, marks, **how))


@case("datasets", "map in two worker processes (num_proc=2), twice in two processes", n_steps=2)
def datasets_map_workers(given: Given) -> Any:
    marks = str(given.folder / "marks")
    mapper = partial(_tokenize, tokenizer=given.load(), marks=marks)
    return _mapped(given, mapper, num_proc=2)


@case("datasets", "set_transform and with_transform with a tokenizer")
def datasets_transform(given: Given) -> Any:
    from datasets import Dataset

    tokenizer = given.load()
    rows = Dataset.from_dict({"text": TEXTS}).with_transform(lambda row: tokenizer(row["text"]))
    return [rows[index] for index in range(len(TEXTS))]


def _hashes(given: Given) -> dict[str, str]:
    """Return the fingerprint after each of many changes, each to a newly loaded tokenizer."""
    from datasets.fingerprint import Hasher
    from tokenizers import normalizers, pre_tokenizers

    def lowercased(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()

    def split(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    changes: dict[str, Callable[[Any], Any]] = {
        "nothing": lambda _: None,
        "encode": lambda tokenizer: tokenizer.encode(TEXTS[0]),
        "call": lambda tokenizer: tokenizer(TEXTS),
        "call padded": lambda tokenizer: tokenizer(TEXTS, padding=True),
        "call cut": lambda tokenizer: tokenizer(TEXTS, truncation=True, max_length=8),
        "add_tokens": lambda tokenizer: tokenizer.add_tokens(["quick brown"]),
        "add_special": lambda tokenizer: tokenizer.add_special_tokens({"sep_token": "<sep>"}),
        "normalizer": lowercased,
        "pre_tokenizer": split,
        "padding_side": lambda tokenizer: setattr(tokenizer, "padding_side", "left"),
        "truncation_side": lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        "chat_template": lambda tokenizer: setattr(tokenizer, "chat_template", "{{ 'x' }}"),
        "model_max_length": lambda tokenizer: setattr(tokenizer, "model_max_length", 77),
        "split_special": lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
        "truncation": lambda tokenizer: tokenizer.backend_tokenizer.enable_truncation(5),
        "attribute": lambda tokenizer: setattr(tokenizer, "mark", 5),
    }
    found = {}
    for name, change in changes.items():
        tokenizer = given.load()
        change(tokenizer)
        found[name] = Hasher.hash(tokenizer)
        found[f"{name}, closure"] = Hasher.hash(lambda text, of=tokenizer: of(text))
        found[f"{name}, rust"] = Hasher.hash(tokenizer._tokenizer)
    found["class"] = Hasher.hash(type(given.load()))
    return found


@case(
    "datasets",
    "Hasher.hash: equal in two processes, and changed by every change that changes a plain one's",
    n_steps=2,
    only=("sample",),
)
def datasets_hash(given: Given) -> Any:
    path = given.folder / "hashes"
    now = _hashes(given)
    if given.step == 0:
        path.write_text(json.dumps(now))
    before = json.loads(path.read_text())
    groups: dict[str, list[str]] = {}
    for name, value in now.items():
        groups.setdefault(value, []).append(name)
    return {"same": [name for name in now if now[name] == before[name]], "equal": groups.values()}
