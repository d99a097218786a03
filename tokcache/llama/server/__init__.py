"""Clients of llama-server that reuse its slots by prefix."""

from tokcache.llama.server.async_client import AsyncLlamaServer
from tokcache.llama.server.client import LlamaServer, kv_report
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
    "AsyncLlamaServer",
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
    "SlotSettings",
    "TokenProbabilities",
    "kv_report",
]
