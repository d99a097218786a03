"""What makes two KV states interchangeable, in one digest.

llama.cpp checks the shape of a state it is given, not where it comes from: a fine-tune of the
same geometry loads without a word. All that decides the numbers is therefore part of the key.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import llama_cpp

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_known: dict[tuple[str, int, int, int], bytes] = {}
_lock = threading.Lock()

# Settings of llama_context_params that change the numbers of a state, or its layout.
# n_ctx is one: some models choose their rope factors by it.
_CONTEXT = (
    "n_ctx",
    "n_seq_max",
    "kv_unified",
    "rope_scaling_type",
    "attention_type",
    "pooling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
    "flash_attn_type",
    "type_k",
    "type_v",
    "embeddings",
    "offload_kqv",
    "op_offload",
    "swa_full",
)
# How a prompt is cut, and by how many threads it is computed, decides the last bits.
_REPRODUCIBLE = ("n_batch", "n_ubatch", "n_threads", "n_threads_batch")


def file_digest(path: str) -> bytes:
    """Return the digest of a file's bytes; a file is read again when size, time or inode changed.

    Cost: reads the file once a process, about a second a gigabyte.
    """
    stat = Path(path).stat()
    key = (str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    with _lock:
        if key not in _known:
            with Path(path).open("rb") as file:
                _known[key] = hashlib.file_digest(file, hashlib.blake2b).digest()
        return _known[key]


def model_files(path: str) -> list[str]:
    """Return the file, or all parts of a model that was split into several."""
    found = _SHARD.search(path)
    if found is None:
        return [path]
    stem, n_parts = path[: found.start()], int(found[2])
    return [f"{stem}-{part:05d}-of-{found[2]}.gguf" for part in range(1, n_parts + 1)]


def fingerprint(llm: Any, block_tokens: int | None) -> bytes:
    """Return the digest of all that decides the numbers in a state of this model and context.

    `block_tokens` is that of reproducible mode, None in the default mode: states of the two never
    meet, for only the first were decoded in pieces that end at its multiples.
    """
    return hashlib.blake2b(
        json.dumps(describe(llm, block_tokens), sort_keys=True).encode(), digest_size=32
    ).digest()


def describe(llm: Any, block_tokens: int | None) -> dict[str, Any]:
    """Return what the fingerprint is made of, by name."""
    parts = {
        "model": [file_digest(file).hex() for file in model_files(llm.model_path)],
        "architecture": llm.metadata.get("general.architecture"),
        "overrides": repr(llm.kv_overrides),
        "lora": _lora(llm),
        "context": {name: _plain(llm.context_params, name) for name in _CONTEXT},
        "devices": _devices(llm),
        "build": _build(),
    }
    if block_tokens is not None:
        parts["block_tokens"] = block_tokens
        parts["batches"] = {name: _plain(llm.context_params, name) for name in _REPRODUCIBLE}
    return parts


def _plain(params: Any, name: str) -> Any:
    return getattr(params, name, None)


def _lora(llm: Any) -> list[Any] | None:
    if not llm.lora_path:
        return None
    return [file_digest(llm.lora_path).hex(), llm.lora_scale]


def _devices(llm: Any) -> list[Any]:
    params = llm.model_params
    split = list(llm.tensor_split) if llm.tensor_split is not None else None
    return [params.n_gpu_layers, params.split_mode, params.main_gpu, split]


def _build() -> list[Any]:
    return [
        llama_cpp.__version__,
        llama_cpp.llama_print_system_info().decode("utf-8", "replace"),
        llama_cpp.LLAMA_STATE_SEQ_VERSION,
        llama_cpp.LLAMA_SESSION_VERSION,
    ]


def memory_kind(llm: Any) -> str:
    """Return what this model remembers with, as the model itself says.

    "attention" alone is cached so far; "sliding window", "recurrent", "hybrid" and "none" are not.
    """
    model = llm.model
    if llama_cpp.llama_get_memory(llm.ctx) is None:
        return "none"
    if llama_cpp.llama_model_is_recurrent(model):
        return "recurrent"
    if llama_cpp.llama_model_is_hybrid(model):
        return "hybrid"
    if llama_cpp.llama_model_n_swa(model) > 0:
        return "sliding window"
    return "attention"
