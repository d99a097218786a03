"""Chooses once, for every name, between the native modules and the reference implementation.

The core looks these names up here when it uses them (`implementation.Walk`), so that a test
which replaces all of them in this one place runs everything on the other implementation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokcache.text import _pickling
from tokcache.text._native import is_native

if TYPE_CHECKING or is_native():
    from tokcache.text._l0 import L0Cache
    from tokcache.text._token_ids import TokenIds
    from tokcache.text.chat._freezing import freeze, freeze_messages
    from tokcache.text.segments._l1 import CodePoints, IdLengths, SegmentCache, Walk
else:
    from tokcache.text._reference.freezing import freeze, freeze_messages
    from tokcache.text._reference.l0 import L0Cache
    from tokcache.text._reference.segments import CodePoints, IdLengths, SegmentCache, Walk
    from tokcache.text._reference.token_ids import TokenIds

__all__ = [
    "CodePoints",
    "IdLengths",
    "L0Cache",
    "SegmentCache",
    "TokenIds",
    "Walk",
    "freeze",
    "freeze_messages",
]

_pickling.token_ids = TokenIds
