"""Argument checks that several rooms share: numbers, sizes, flags, URLs and scopes."""

from __future__ import annotations

import re
from decimal import Decimal
from operator import index

from tokcache.errors import InvalidConfig, InvalidScope

MAX_INT = 2**62  # the native modules count in 64 bits; this leaves room to add
MAX_SECONDS = 10**9  # about thirty years

_USER = re.compile(r"(?<=//).*@", re.DOTALL)
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?(?:([KMGT])(?:iB)?)?", re.ASCII | re.IGNORECASE)
_FACTORS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def require_int(name: str, value: object, minimum: int, maximum: int = MAX_INT) -> int:
    """Return `value` as an int if it is an integer from `minimum` to `maximum`.

    NumPy integers are integers; a bool is not.

    Errors: InvalidConfig.
    """
    if type(value) is int and minimum <= value <= maximum:
        return value  # every request is checked a few times
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidConfig(f"{name} must be an int, not {value!r} ({type(value).__name__})")
    number = index(value)
    if number < minimum:
        raise InvalidConfig(f"{name} must be at least {minimum}, not {number}")
    if number > maximum:
        raise InvalidConfig(f"{name} must be at most {maximum:,}, not {number:,}")
    return number


def require_size(name: str, value: object, minimum: int = 1) -> int:
    """Return a size in bytes, given as an int or as a str such as "64M", "1.5G" or "4GiB".

    Units:  K, M, G and T are powers of 1,024. "4GB" is refused: it may mean a power of 1,000.
    Errors: InvalidConfig.
    """
    if not isinstance(value, str):
        return require_int(name, value, minimum)
    n_bytes = parsed_size(value)
    if n_bytes is None:
        raise InvalidConfig(
            f'{name} must be a number of bytes or a size such as "64M", "1.5G" or "4GiB" '
            f"(powers of 1,024), not {value!r}"
        )
    return require_int(name, n_bytes, minimum)


def parsed_size(value: str) -> int | None:
    """Return the bytes of a size such as "64M"; None for any other text."""
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        return None
    factor = _FACTORS[found[2].upper()] if found[2] else 1
    return int(Decimal(found[1]) * factor)


def require_seconds(name: str, value: object) -> float:
    """Return `value` if it is a number of seconds above 0.

    Errors: InvalidConfig.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_SECONDS:  # type: ignore[operator]
        raise InvalidConfig(
            f"{name} must be a number of seconds above 0, at most {MAX_SECONDS:,}, not {value!r}"
        )
    return float(value)  # type: ignore[arg-type]


def require_share(name: str, value: object) -> float:
    """Return `value` if it is a number from 0 to 1.

    Errors: InvalidConfig.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:  # type: ignore[operator]
        raise InvalidConfig(f"{name} must be a number from 0 to 1, not {value!r}")
    return float(value)  # type: ignore[arg-type]


def require_bool(name: str, value: object) -> bool:
    """Return `value` if it is True or False.

    Errors: InvalidConfig.
    """
    if not isinstance(value, bool):
        raise InvalidConfig(f"{name} must be True or False, not {value!r}")
    return value


def without_password(url: object) -> str:
    """Return the repr of a URL for an error, with *** in place of a user and password.

    A URL that can't be parsed may have its password anywhere before the last "@".
    """
    return _USER.sub("***@", repr(url))


def require_scope(scope: object) -> str | None:
    """Return `scope` if it is a str or None; a subclass of str becomes a plain str.

    Errors: InvalidScope.
    """
    if scope is None or type(scope) is str:
        return scope
    if isinstance(scope, str):
        return str.__str__(scope)
    raise InvalidScope(f"scope must be a str or None, not {type(scope).__name__}")
