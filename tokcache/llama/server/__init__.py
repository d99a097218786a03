"""A client of llama-server that reuses its slots by prefix."""

from tokcache.llama.server.client import LlamaServer, kv_report
from tokcache.llama.server.manager import SlotManager
from tokcache.llama.server.report import KvBlock, SlotBlocks, SlotKv
from tokcache.llama.server.results import (
    Completion,
    ModelMeta,
    Piece,
    Reused,
    ReuseStats,
    ServerProps,
    Slot,
    SlotFile,
    TokenProbabilities,
)
from tokcache.llama.server.settings import SlotSettings

__all__ = [
    "Completion",
    "KvBlock",
    "LlamaServer",
    "ModelMeta",
    "Piece",
    "ReuseStats",
    "Reused",
    "ServerProps",
    "Slot",
    "SlotBlocks",
    "SlotFile",
    "SlotKv",
    "SlotManager",
    "SlotSettings",
    "TokenProbabilities",
    "kv_report",
]
