"""Arguments are checked in one place, so every caller accepts and refuses the same values."""

from __future__ import annotations

import numpy as np
import pytest

from tokcache._validate import (
    require_bool,
    require_int,
    require_scope,
    require_seconds,
    require_share,
    require_size,
)
from tokcache.errors import InvalidConfig, InvalidScope


@pytest.mark.parametrize(
    ("given", "n_bytes"),
    [
        (4096, 4096),
        (np.int64(4096), 4096),
        ("4096", 4096),
        ("64M", 64 << 20),
        ("4G", 4 << 30),
        ("4 GiB", 4 << 30),
        ("1.5g", 3 << 29),
        ("512kib", 512 << 10),
        ("2T", 2 << 40),
    ],
)
def test_a_size_may_have_a_unit(given: object, n_bytes: int) -> None:
    assert require_size("max_bytes", given) == n_bytes


@pytest.mark.parametrize(
    "given",
    ["", "4GB", "G", "-4G", "4X", "1e9", "٤G", "0", 0, -1, 4.0, True, None, b"4G", "9" * 30],
)
def test_invalid_sizes_are_refused_and_the_setting_is_named(given: object) -> None:
    with pytest.raises(InvalidConfig, match="max_bytes must be"):
        require_size("max_bytes", given)


def test_the_error_for_a_size_lists_the_units() -> None:
    with pytest.raises(InvalidConfig, match=r"\"64M\".*powers of 1,024.*'4GB'"):
        require_size("max_bytes", "4GB")


@pytest.mark.parametrize("given", [1, np.int64(1), np.uint8(1)])
def test_integers_of_numpy_become_int(given: object) -> None:
    found = require_int("n", given, minimum=1)
    assert type(found) is int
    assert found == 1


@pytest.mark.parametrize("given", [True, 1.0, np.float64(1), "1", None, 0, 2**63])
def test_invalid_integers_are_refused_and_the_setting_is_named(given: object) -> None:
    with pytest.raises(InvalidConfig, match="n must be"):
        require_int("n", given, minimum=1)


class Tenant(str):
    __slots__ = ()


def test_a_scope_is_a_str_or_none() -> None:
    assert require_scope(None) is None
    assert require_scope("tenant-a") == "tenant-a"
    assert type(require_scope(Tenant("tenant-a"))) is str


@pytest.mark.parametrize("given", [5, b"tenant", True, ("a",)])
def test_invalid_scopes_are_refused(given: object) -> None:
    with pytest.raises(InvalidScope, match="scope must be a str or None"):
        require_scope(given)


def test_flags_shares_and_seconds_are_checked() -> None:
    assert require_bool("on", True) is True
    assert require_share("rate", 1) == 1.0
    assert require_seconds("ttl_s", 5) == 5.0
    for check, bad in (
        (require_bool, 1),
        (require_share, 1.5),
        (require_share, True),
        (require_seconds, 0),
        (require_seconds, float("nan")),
    ):
        with pytest.raises(InvalidConfig, match="x must be"):
            check("x", bad)
