"""L0Cache, which finds the token ids of whole texts by the exact text."""

from tokcache.text._implementation import L0Cache

__all__ = ["L0Cache"]
