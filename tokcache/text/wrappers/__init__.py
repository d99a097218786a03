"""`wrap`, which returns a tokenizer with a cache and the methods and results of the original."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tokcache.config import CacheConfig
from tokcache.errors import InvalidConfig, MissingFile, UnsupportedTokenizer
from tokcache.text._native import log_missing_extension
from tokcache.text.tokenizer import WrappedTokenizer
from tokcache.text.wrappers.backend import Backend
from tokcache.text.wrappers.gguf_tokenizer import is_gguf, read_gguf_tokenizer
from tokcache.text.wrappers.tokenizers import TokenizersWrapper, accept_wrappers
from tokcache.text.wrappers.transformers import is_fast_transformers, wrap_transformers


def wrap(tokenizer: Any, config: CacheConfig | None = None) -> WrappedTokenizer:
    """Return a new tokenizer with the methods and results of `tokenizer`, and a cache.

    `tokenizer` is a `tokenizers.Tokenizer` or a fast transformers tokenizer, and is not changed; or
    the path of a GGUF, whose tokenizer becomes a `tokenizers.Tokenizer` that gives llama.cpp's ids:
    `gguf_tokenizer` says how this is proven. A wrapped tokenizer is returned as it is. A tokenizer
    that can't be copied, because a component is written in Python, is used in place, and its
    answers are never cached.

    Errors: UnsupportedTokenizer for any other kind; InvalidConfig for a `config` that is
            not a CacheConfig, or differs from the one a wrapped tokenizer has. For a path:
            MissingFile, InvalidModel, MissingExtra, and UnsupportedTokenizer where the ids differ
            from llama.cpp's.
    Cost:   with `engine="tokenizers"` 3 to 30 ms for most tokenizers, 0.1 to 0.5 s for phi-3-mini,
            t5-small and deepseek-v3; the vocabulary is shared, not copied. With gigatoken or
            fastokens, where installed, `wrap` takes no longer: their proof and tables take 0.7 to
            3 s in the background (`wait_for_engine` waits for it) and 50 to 190 MiB.
    """
    log_missing_extension()
    if config is not None and not isinstance(config, CacheConfig):
        raise InvalidConfig(f"config must be a CacheConfig or None, not {config!r}")
    if isinstance(tokenizer, WrappedTokenizer):
        own = tokenizer._tokcache.config  # noqa: SLF001 (ours)
        if config is not None and config != own:
            raise InvalidConfig(
                f"this tokenizer is already wrapped with {own}, not {config}; wrap the plain one, "
                "which unwrap() returns"
            )
        return tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        path = Path(tokenizer)
        if not path.is_file():
            raise MissingFile(
                f"no such model file: {path}; wrap takes the path of a GGUF, or a loaded tokenizer"
            )
        if not is_gguf(path):
            raise UnsupportedTokenizer(
                f"{path} is not a GGUF; load a tokenizer.json with tokenizers.Tokenizer.from_file "
                "and wrap the result"
            )
        tokenizer = read_gguf_tokenizer(path).tokenizer
    if isinstance(tokenizer, Tokenizer):
        accept_wrappers()
        return TokenizersWrapper(Backend(tokenizer, config), None)
    if is_fast_transformers(tokenizer):
        wrapper: WrappedTokenizer = wrap_transformers(tokenizer, config)
        return wrapper
    raise UnsupportedTokenizer(
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} can't be wrapped; pass a "
        "tokenizers.Tokenizer or a fast transformers tokenizer (transformers 5, "
        "AutoTokenizer.from_pretrained(…) with is_fast True)"
    )
