"""DiskTier: states in the files of one folder, shared by any number of processes."""

from tokcache.state.tiers.disk.tier import DiskTier

__all__ = ["DiskTier"]
