"""Adapters with one interface for exact-string caches: tokcache and its alternatives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, Protocol

import cachebox
import cachetools
import lru

from tokcache import L0Cache, TokenIds


class ExactCache(Protocol):
    """The timed calls: `hit` looks up a stored text, `miss` a new one, which it then stores."""

    hit: Callable[[str], Any]
    miss: Callable[[str], Any]


class Tokcache:
    """tokcache.L0Cache."""

    def __init__(self, capacity: int, ids: TokenIds) -> None:
        cache = L0Cache(max_entries=capacity, max_bytes=1 << 40)
        get, put = cache.get, cache.put
        self.cache = cache
        self.hit = get
        self.miss = lambda text: put(text, ids)


class Dict:
    """A dict without bound or recency: the lower limit for Python code."""

    def __init__(self, capacity: int, ids: TokenIds) -> None:
        del capacity
        self.cache: dict[Hashable, Any] = {}
        self.hit = self.cache.__getitem__
        self.miss = lambda text: self.cache.__setitem__(text, ids)


class LruCache:
    """functools.lru_cache around a function that returns a prepared answer."""

    def __init__(self, capacity: int, ids: TokenIds) -> None:
        self.hit = self.miss = lru_cache(maxsize=capacity)(lambda _text: ids)


class Cachetools:
    """cachetools.LRUCache."""

    def __init__(self, capacity: int, ids: TokenIds) -> None:
        cache: Any = cachetools.LRUCache(maxsize=capacity)
        self.hit = cache.__getitem__
        self.miss = lambda text: cache.__setitem__(text, ids)


class Cachebox:
    """cachebox.LRUCache (Rust)."""

    def __init__(self, capacity: int, ids: TokenIds) -> None:
        cache: Any = cachebox.LRUCache(capacity)
        self.hit = cache.__getitem__
        self.miss = lambda text: cache.__setitem__(text, ids)


class LruDict:
    """lru-dict (C)."""

    def __init__(self, capacity: int, ids: TokenIds) -> None:
        cache: Any = lru.LRU(capacity)
        self.hit = cache.__getitem__
        self.miss = lambda text: cache.__setitem__(text, ids)
