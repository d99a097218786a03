"""Missed prompts of public bug reports are classified as their reports explain them."""

from __future__ import annotations

import pytest

from tests.differences.real_cases import CASES, Case
from tokcache.differences import compare_requests


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.source)
def test_a_reported_miss_is_classified_as_its_report_says(case: Case) -> None:
    found = compare_requests(case.before, case.after)
    assert (found.kind, found.field) == (case.expected, case.field)
    assert found.n_lost > 0 or found.message == len(case.before.get("messages", ())) - 1


def test_there_are_enough_cases_of_enough_classes() -> None:
    assert len({case.source for case in CASES}) == len(CASES) >= 25
    assert len({case.expected for case in CASES}) >= 13
