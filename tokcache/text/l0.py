"""L0Cache: native where it was built, else the plain-Python twin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokcache.text._native import is_native

if TYPE_CHECKING or is_native():
    from tokcache.text._l0 import L0Cache
else:
    from tokcache.text._l0_py import L0Cache

__all__ = ["L0Cache"]
