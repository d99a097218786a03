"""Exact caches for language-model serving: tokenization results and prefix states."""

from typing import TYPE_CHECKING, Any

from tokcache import llama
from tokcache._version import __version__
from tokcache.config import CacheConfig
from tokcache.errors import TokcacheError
from tokcache.state.cache import PrefixStateCache
from tokcache.state.reasons import Miss, MissReason
from tokcache.stats import CacheStats, L0Stats, StateStats, TierStats
from tokcache.text.l0 import L0Cache
from tokcache.text.token_ids import TokenIds
from tokcache.text.wrappers import wrap
from tokcache.text.wrappers.patch import patch_transformers, unpatch_transformers

if TYPE_CHECKING:
    from tokcache.state.tiers.disk import DiskTier as DiskTier
    from tokcache.state.tiers.redis import RedisTier as RedisTier

__all__ = [
    "CacheConfig",
    "CacheStats",
    "DiskTier",
    "L0Cache",
    "L0Stats",
    "Miss",
    "MissReason",
    "PrefixStateCache",
    "RedisTier",
    "StateStats",
    "TierStats",
    "TokcacheError",
    "TokenIds",
    "__version__",
    "llama",
    "patch_transformers",
    "unpatch_transformers",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a tier when it is first used: it would take a quarter of `import tokcache`."""
    if name == "DiskTier":
        from tokcache.state.tiers.disk import DiskTier  # noqa: PLC0415

        return DiskTier
    if name == "RedisTier":
        from tokcache.state.tiers.redis import RedisTier  # noqa: PLC0415

        return RedisTier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
