"""Names and values in serialised tokenizers that several modules compare with."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.models import BPE

__all__ = ["BYTE_NAME", "BYTE_NAMES", "MARKER", "MARKS_BLANKS", "has_all_bytes", "stages_of"]

MARKER = "\u2581"  # SentencePiece's character for a space
MARKS_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": MARKER}
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")  # the token of a byte, with byte_fallback
BYTE_NAMES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def stages_of(state: Any) -> list[Any]:
    """Return the stages of a serialised normalizer or pre-tokenizer, in order."""
    if state is None:
        return []
    if state["type"] == "Sequence":
        parts = state["normalizers"] if "normalizers" in state else state["pretokenizers"]
        return [stage for one in parts for stage in stages_of(one)]
    return [state]


def has_all_bytes(model: BPE) -> bool:
    """Return whether a character without a token of its own becomes the tokens of its bytes."""
    return model.byte_fallback and all(model.token_to_id(name) is not None for name in BYTE_NAMES)
