"""TokenIds, an immutable sequence of int32."""

from tokcache.text._implementation import TokenIds

__all__ = ["TokenIds"]
