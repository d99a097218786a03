"""llama.cpp with the caches, in this process or through llama-server; imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokcache.errors import MissingExtra

if TYPE_CHECKING:
    from tokcache.llama.explanation import Explanation as Explanation
    from tokcache.llama.fingerprint import state_fingerprint as state_fingerprint
    from tokcache.llama.inprocess import Llama as Llama
    from tokcache.llama.inprocess import Reuse as Reuse
    from tokcache.llama.prewarm import Prewarmed as Prewarmed
    from tokcache.llama.sequence_states import SequenceStates as SequenceStates
    from tokcache.llama.server import AsyncLlamaServer as AsyncLlamaServer
    from tokcache.llama.server import LlamaServer as LlamaServer
    from tokcache.llama.server import SlotSettings as SlotSettings
    from tokcache.llama.server import kv_report as kv_report

__all__ = [
    "AsyncLlamaServer",
    "Explanation",
    "Llama",
    "LlamaServer",
    "Prewarmed",
    "Reuse",
    "SequenceStates",
    "SlotSettings",
    "kv_report",
    "state_fingerprint",
]

_MODULES = {
    "Explanation": "explanation",
    "Llama": "inprocess",
    "Prewarmed": "prewarm",
    "Reuse": "inprocess",
    "SequenceStates": "sequence_states",
    "state_fingerprint": "fingerprint",
    "AsyncLlamaServer": "server",
    "LlamaServer": "server",
    "SlotSettings": "server",
    "kv_report": "server",
}
_IN_PROCESS = {"inprocess", "prewarm", "sequence_states", "fingerprint"}  # they need llama_cpp


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] in _IN_PROCESS:
        try:
            import llama_cpp  # noqa: F401, PLC0415 (an extra, and 0.3 s)
        except ImportError as error:
            raise MissingExtra(
                f"tokcache.llama.{name} needs llama-cpp-python ({error}): "
                "pip install 'tokcache[llama]'"
            ) from error
    return getattr(import_module(f"tokcache.llama.{_MODULES[name]}"), name)
