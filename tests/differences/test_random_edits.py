"""Of 200 random edits of chats, at least 95 % are given the right class."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.differences.random_edits import (
    IN_REQUESTS,
    IN_TEXTS,
    Chat,
    edited_requests,
    edited_texts,
    synthetic_chat,
)
from tokcache.differences import DifferenceClass, classify, compare_requests

N_EDITS = 200
SHARE = 0.95


@pytest.fixture(params=["synthetic", "tau-bench"])
def chats(request: pytest.FixtureRequest) -> list[Chat]:
    if request.param == "synthetic":
        rng = random.Random(5)
        return [synthetic_chat(rng, rng.randint(4, 12)) for _ in range(40)]
    shared: Path = request.getfixturevalue("shared_data")
    found = json.loads((shared / "traces/tau-bench/gpt-4o-airline.json").read_text())
    return [each["traj"] for each in found if len(each["traj"]) >= 10]


def _report(name: str, wrong: Counter[tuple[DifferenceClass, DifferenceClass]]) -> float:
    share = 1 - wrong.total() / N_EDITS
    pairs = ", ".join(f"{made} as {seen}: {n}" for (made, seen), n in wrong.most_common())
    print(f"{name}: {share:.1%} of {N_EDITS} edits right ({pairs or 'none wrong'})")  # noqa: T201 (-s shows it)
    return share


def test_edits_of_requests_are_classified(chats: list[Chat]) -> None:
    rng = random.Random(17)
    wrong: Counter[tuple[DifferenceClass, DifferenceClass]] = Counter()
    for number in range(N_EDITS):
        kind = IN_REQUESTS[number % len(IN_REQUESTS)]
        found = compare_requests(*edited_requests(rng, rng.choice(chats), kind)).kind
        if found is not kind:
            wrong[kind, found] += 1
    assert _report("requests", wrong) >= SHARE


def test_edits_of_rendered_prompts_are_classified(chats: list[Chat]) -> None:
    rng = random.Random(23)
    wrong: Counter[tuple[DifferenceClass, DifferenceClass]] = Counter()
    for number in range(N_EDITS):
        kind = IN_TEXTS[number % len(IN_TEXTS)]
        found = classify(*edited_texts(rng, rng.choice(chats), kind)).kind
        if found is not kind:
            wrong[kind, found] += 1
    assert _report("texts", wrong) >= SHARE
