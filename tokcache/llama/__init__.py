"""llama.cpp in this process, with the caches inside; llama_cpp is imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokcache.errors import MissingExtra

if TYPE_CHECKING:
    from tokcache.llama.inprocess import Llama as Llama
    from tokcache.llama.inprocess import Reuse as Reuse

__all__ = ["Llama", "Reuse"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import llama_cpp  # noqa: F401, PLC0415 (an extra, and 0.3 s)
    except ImportError as error:
        raise MissingExtra(
            f"tokcache.llama.{name} needs llama-cpp-python ({error}): pip install 'tokcache[llama]'"
        ) from error
    from tokcache.llama import inprocess  # noqa: PLC0415 (needs llama_cpp)

    return getattr(inprocess, name)
