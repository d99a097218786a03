"""Names and forms of components in serialised tokenizers that several rules ask for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.models import BPE

__all__ = ["BYTE_NAME", "BYTE_NAMES", "MARKER", "MARKS_BLANKS", "has_all_bytes", "stages_of"]

MARKER = "\u2581"  # stands for a blank (SentencePiece)
MARKS_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": MARKER}
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")  # a byte that is no token's, with byte_fallback
BYTE_NAMES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def stages_of(state: Any) -> list[Any]:
    """Return the normalizers or pre-tokenizers of which a serialised one consists, in order."""
    if state is None:
        return []
    if state["type"] == "Sequence":
        parts = state["normalizers"] if "normalizers" in state else state["pretokenizers"]
        return [stage for one in parts for stage in stages_of(one)]
    return [state]


def has_all_bytes(model: BPE) -> bool:
    """Return whether every character that is no token becomes tokens of its bytes."""
    return model.byte_fallback and all(model.token_to_id(name) is not None for name in BYTE_NAMES)
