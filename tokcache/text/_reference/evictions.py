"""The reference implementation of the memory of evictions."""

from __future__ import annotations

from collections.abc import Hashable

_MAX_EVICTIONS = 4096  # remembered; the native one has as many rows


class Evictions:
    """Tells whether a missing entry was evicted, from digests of the keys of the last evictions."""

    def __init__(self) -> None:
        self._scopes: dict[int, Hashable] = {}  # digest of a key -> its scope, oldest first
        self._is_full = False

    def note(self, key: Hashable, scope: Hashable) -> None:
        """Remember that an entry was evicted."""
        self._scopes.pop(hash(key), None)
        if len(self._scopes) == _MAX_EVICTIONS:
            del self._scopes[next(iter(self._scopes))]
            self._is_full = True
        self._scopes[hash(key)] = scope

    def why(self, key: Hashable) -> str:
        """Return why a look-up missed: `new`, `evicted` or `not_known`."""
        if hash(key) in self._scopes:
            return "evicted"
        return "not_known" if self._is_full else "new"

    def forget(self, scope: Hashable) -> None:
        """Forget the evictions of a scope."""
        self._scopes = {key: own for key, own in self._scopes.items() if own != scope}
