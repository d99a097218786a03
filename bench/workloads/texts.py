"""Long texts of five kinds: from real corpora if present, else from Python or written here.

Pieces come in seeded order, each once. If there are not enough (the interface strings in Russian
and Chinese are short), a Markov chain over their words or characters makes new sentences in the
same language: repetitions would flatter every cache. The few sentences written here still repeat,
so the bars apply to the real corpora.
"""

# ruff: noqa: RUF001 (texts in Russian and Chinese)

from __future__ import annotations

import argparse
import dataclasses
import gzip
import inspect
import json
import pathlib
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics  # English that every Python installation has
from typing import Any

from bench.workloads.chats import record
from bench.workloads.data import read_json_lines, shared_file, strings

_RUSSIAN = (
    "Библиотека открыта каждый день, кроме воскресенья, с девяти утра до восьми вечера.",
    "Чтобы продлить книгу, напишите номер читательского билета и название книги.",
    "Если книга уже заказана другим читателем, продлить её нельзя, но можно встать в очередь.",
    "Штраф за день просрочки невелик, однако долг свыше пяти рублей закрывает доступ к залам.",
    "Новый билет выдают в тот же день: нужен паспорт и старый билет, если он сохранился.",
    "Зимой читальный зал переезжает на второй этаж, потому что внизу слишком холодно.",
    "Дети до двенадцати лет берут книги вместе с родителями, старшие приходят сами.",
)
_CHINESE = (
    "图书馆每天开放，星期日除外，时间是上午九点到晚上八点。",
    "续借图书时，请写明读者证号码和书名，我们会在当天回复。",
    "如果这本书已经被别的读者预约，就不能续借，但是可以排队等候。",
    "逾期一天的罚款不多，不过欠款超过五元就不能进入阅览室。",
    "新的读者证当天就能领取，需要身份证和旧证，旧证丢失也没有关系。",
    "冬天阅览室搬到二楼，因为楼下太冷，书也容易受潮。",
    "十二岁以下的儿童要和父母一起借书，大一点的孩子可以自己来。",
)
SENTENCES = {
    "English": "The committee meets again on the 14th of March, at half past nine, in room 207. ",
    "code": "assert candidate([14, 3, 207]) == sorted([207, 14, 3]), 'an inserted case'\n",
    "JSON": '{"inserted": true, "room": 207, "begins": "2024-03-14T09:30:00"}\n',
    "Russian": "Комитет снова собирается четырнадцатого марта, в половине десятого, в зале 207. ",
    "Chinese": "委员会将于三月十四日上午九点半在二〇七室再次开会。",
}


def _interface_strings(language: str, otherwise: tuple[str, ...]) -> list[str]:
    file = shared_file("corpora", "i18n", f"{language}.json")
    if file is None:
        return list(otherwise)
    return _each_once(strings(json.loads(file.read_text(encoding="utf-8"))))


def _english() -> list[str]:
    folder = ("corpora", "mt_bench")
    questions = shared_file(*folder, "question.jsonl")
    answers = shared_file(*folder, "reference_answer_gpt-4.jsonl")
    if questions is None or answers is None:
        return [part for text in topics.values() for part in text.split("\n\n")]
    asked = [turn for one in _lines(questions) for turn in one["turns"]]
    replies = [turn for one in _lines(answers) for turn in one["choices"][0]["turns"]]
    return _each_once([*asked, *replies, *_said("assistant")])


def _code() -> list[str]:
    file = shared_file("corpora", "human-eval", "HumanEval.jsonl.gz")
    if file is None:
        return [inspect.getsource(one) for one in (argparse, dataclasses, inspect, pathlib, json)]
    problems = read_json_lines(gzip.decompress(file.read_bytes()).decode())
    return [one["prompt"] + one["canonical_solution"] + one["test"] for one in problems]


def _json() -> list[str]:
    found = [text for text in _said("tool") if text.startswith(("{", "["))]
    rng = random.Random(3)
    return _each_once(found) or [json.dumps(record(rng, f"M{i:06d}")) for i in range(600)]


def _said(role: str) -> list[str]:
    file = shared_file("traces", "tau-bench", "gpt-4o-airline.json")
    if file is None:
        return []
    dialogues = json.loads(file.read_text(encoding="utf-8"))
    messages = [message for dialogue in dialogues for message in dialogue["traj"]]
    return [one["content"] for one in messages if one["role"] == role and one["content"]]


def _lines(file: Path) -> list[Any]:
    return read_json_lines(file.read_text(encoding="utf-8"))


def _each_once(found: Iterator[str] | list[str]) -> list[str]:
    return list(dict.fromkeys(text for text in found if text.strip()))


_PIECES: dict[str, Callable[[], list[str]]] = {
    "English": _english,
    "code": _code,
    "JSON": _json,
    "Russian": lambda: _interface_strings("ru", _RUSSIAN),
    "Chinese": lambda: _interface_strings("zh", _CHINESE),
}
KINDS = tuple(_PIECES)


@cache
def pieces(kind: str) -> tuple[str, ...]:
    """Return the pieces that texts of this kind are assembled from."""
    return tuple(_PIECES[kind]())


def endless(kind: str, seed: int) -> Iterator[str]:
    """Yield every piece once, in seeded order, then sentences made from their words."""
    rng = random.Random(f"{kind} {seed}")
    known = list(pieces(kind))
    rng.shuffle(known)
    yield from known
    follow: dict[str, list[str]] = defaultdict(list)
    for piece in known:
        units = _units(piece, kind)
        for left, right in zip(units, [*units[1:], ""], strict=True):
            follow[left].append(right)
    starts = [_units(piece, kind)[0] for piece in known]
    while True:
        yield "".join(_walk(follow, rng.choice(starts), rng))


def _units(piece: str, kind: str) -> list[str]:
    return list(piece) if kind == "Chinese" else re.findall(r"\s*\S+", piece)


def _walk(follow: dict[str, list[str]], unit: str, rng: random.Random) -> Iterator[str]:
    for _ in range(60):
        if not unit:
            return
        yield unit
        unit = rng.choice(follow[unit])


def documents(kind: str, n_bytes: int, n_documents: int, seed: int) -> list[str]:
    """Return `n_documents` texts of equal size, together at most `n_bytes` of UTF-8."""
    source, each = endless(kind, seed), n_bytes // n_documents
    return [_filled(source, each) for _ in range(n_documents)]


def _filled(source: Iterator[str], n_bytes: int) -> str:
    parts, size = [], 0
    while size < n_bytes:
        part = next(source)
        parts.append(part)
        size += len(part.encode()) + 1
    return "\n".join(parts).encode()[:n_bytes].decode(errors="ignore")


def text(kind: str, n_bytes: int, seed: int = 1) -> str:
    """Return one text of `n_bytes` of UTF-8, without an incomplete last character."""
    return documents(kind, n_bytes, 1, seed)[0]
