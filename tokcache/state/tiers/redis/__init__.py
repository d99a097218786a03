"""RedisTier: states in a Redis or Valkey server, or a cluster, shared by any number of hosts."""

from tokcache.state.tiers.redis.tier import RedisTier

__all__ = ["RedisTier"]
