"""Exact caches for language-model serving: tokenization results and prefix states."""

from tokcache import llama
from tokcache._version import __version__
from tokcache.config import CacheConfig
from tokcache.errors import TokcacheError
from tokcache.state.cache import PrefixStateCache
from tokcache.stats import CacheStats, L0Stats, StateStats
from tokcache.text.huggingface import wrap
from tokcache.text.l0 import L0Cache
from tokcache.text.patch import patch_transformers, unpatch_transformers
from tokcache.text.token_ids import TokenIds

__all__ = [
    "CacheConfig",
    "CacheStats",
    "L0Cache",
    "L0Stats",
    "PrefixStateCache",
    "StateStats",
    "TokcacheError",
    "TokenIds",
    "__version__",
    "llama",
    "patch_transformers",
    "unpatch_transformers",
    "wrap",
]
