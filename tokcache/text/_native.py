"""The decision, made once, between the native modules and their reference implementation."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

_log = logging.getLogger("tokcache")

NATIVE = ("_token_ids", "_l0", "segments._l1", "chat._freezing")


def _is_switched_off() -> bool:
    return os.environ.get("TOKCACHE_NO_EXTENSIONS", "") not in ("", "0")


@cache
def is_native() -> bool:
    """Return whether the native modules are built and not switched off."""
    return not _is_switched_off() and all(
        find_spec(f"tokcache.text.{name}") is not None for name in NATIVE
    )


@cache
def log_missing_extension() -> None:
    """Log once that the native modules were not built, so that the slower reference runs."""
    if not is_native() and not _is_switched_off():
        _log.warning(
            "the native modules were not built, so the reference implementation in Python is used "
            "(same results, slower look-ups); to build them, install a C compiler and reinstall "
            "tokcache"
        )
