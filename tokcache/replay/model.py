"""Measures prefill, the size of states, and their restoring with a model in this process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from statistics import median
from time import perf_counter

from tokcache.errors import InvalidModel, MissingExtra, MissingFile
from tokcache.replay.result import Prefill
from tokcache.state.cache import PrefixStateCache

_N_TOKENS, _N_ROUNDS = 512, 3


def measure(path: Path) -> Prefill:
    """Return the rates of prompts of 512 tokens, the median of three.

    Errors: MissingFile, MissingExtra, InvalidModel.
    Cost:   loads the model; six prompts.
    """
    if not path.is_file():
        raise MissingFile(f"no such model file: {path}")
    try:
        from tokcache.llama import Llama  # noqa: PLC0415 (an extra)
    except ImportError:
        raise MissingExtra(
            "--model needs llama-cpp-python: pip install 'tokcache[llama]', or give "
            "--prefill-rate and --kv-bytes-per-token"
        ) from None
    states = PrefixStateCache(ram_bytes=1 << 40, max_entries=1000, block_tokens=_N_TOKENS // 4)
    llm = Llama(str(path), prefix_cache=states, n_ctx=2 * _N_TOKENS, verbose=False)
    with contextlib.closing(llm):
        llm.wait_for_fingerprint()  # otherwise nothing is stored
        prefill_s = []
        for number in range(_N_ROUNDS + 1):
            ids = [(37 * at + 11 * number) % min(llm.n_vocab(), 1000) for at in range(_N_TOKENS)]
            prefill_s.append(_first_token_s(llm, ids))
        n_bytes = states.stats().n_bytes / ((_N_ROUNDS + 1) * _N_TOKENS)
        before = states.stats()
        for number in range(_N_ROUNDS):  # stored above; the context holds the last one
            ids = [(37 * at + 11 * number) % min(llm.n_vocab(), 1000) for at in range(_N_TOKENS)]
            _first_token_s(llm, ids)
        after = states.stats()
    restored = after.restored_tokens - before.restored_tokens
    restore_s = after.restore_seconds - before.restore_seconds
    if not n_bytes:
        raise InvalidModel(f"{path}: its states are not stored: {dict(after.refusals)}")
    return Prefill(
        _N_TOKENS / median(prefill_s[1:]),
        n_bytes,
        restored / restore_s if restored and restore_s else None,
        f"measured with {path.name} on this machine: prompts of {_N_TOKENS} tokens",
    )


def _first_token_s(llm: object, ids: list[int]) -> float:
    began = perf_counter()
    stream = llm.generate(ids, temp=0.0)  # type: ignore[attr-defined]
    next(stream)
    seconds = perf_counter() - began
    stream.close()  # stores the state
    return seconds
