"""The folder in which tokcache keeps its own files: samples, digests of model files."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """Return TOKCACHE_CACHE_DIR, or tokcache's folder in the user's cache; it may not exist.

    The path is relative if the system does not know the user's home directory.
    """
    chosen = os.environ.get("TOKCACHE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs  # noqa: PLC0415 (`import tokcache` stays lean)

    return platformdirs.user_cache_path("tokcache", appauthor=False)
