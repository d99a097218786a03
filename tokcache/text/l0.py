"""L0Cache: the token ids of whole texts, found by the exact text."""

from tokcache.text._implementation import L0Cache

__all__ = ["L0Cache"]
