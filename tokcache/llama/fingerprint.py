"""What makes two KV states interchangeable, in one digest.

llama.cpp checks the shape of a state it is given, not where it comes from: a fine-tune of the
same geometry loads without a word. All that decides the numbers is therefore part of the key.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp

from tokcache.errors import MissingFile

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_known: dict[_File, bytes] = {}
_lock = threading.Lock()

# Settings of llama_context_params that change the numbers of a state, or its layout.
# n_ctx is one: some models choose their rope factors by it.
_CONTEXT = (
    "n_ctx",
    "n_seq_max",
    "n_rs_seq",
    "kv_unified",
    "ctx_type",
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


class FileChanged(OSError):
    """A file on disk is no longer the one that was loaded, so its digest would be another's."""


@dataclass(frozen=True, slots=True)
class _File:
    """What tells a file from one that took its place, and from itself after a change."""

    path: str  # absolute, for the working directory may change
    resolved: str
    device: int
    inode: int
    n_bytes: int
    mtime_ns: int

    def digest(self) -> bytes:
        """Return the digest of the file's bytes.

        Cost: reads the file once a process, about a second a gigabyte.
        """
        with _lock:
            digest = _known.get(self) or _read_digest(self.path)
            # Looked at after the reading: what was read is then what was there at the loading.
            if _file(self.path) != self:
                raise FileChanged(f"{self.path} was changed or replaced after it was loaded")
            _known[self] = digest
            return digest


def _file(path: str) -> _File:
    stat = Path(path).stat()
    resolved = str(Path(path).resolve())
    return _File(path, resolved, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _read_digest(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


@dataclass(frozen=True, slots=True)
class LoadedFiles:
    """The files of a model and its LoRA adapter, as they were just before they were loaded."""

    model: tuple[_File, ...]
    lora: _File | None

    @classmethod
    def at(
        cls, model_path: str, lora_path: str | os.PathLike[str] | None = None
    ) -> LoadedFiles | None:
        """Return the files as they are now; None if one, a part say, is not there."""
        try:
            files = tuple(_file(path) for path in model_files(str(Path(model_path).absolute())))
            lora = _file(str(Path(lora_path).absolute())) if lora_path else None
        except OSError:
            return None
        return cls(files, lora)


def model_files(path: str) -> list[str]:
    """Return the file, or all parts of a model that was split into several."""
    found = _SHARD.search(path)
    if found is None:
        return [path]
    stem, n_parts = path[: found.start()], int(found[2])
    return [f"{stem}-{part:05d}-of-{found[2]}.gguf" for part in range(1, n_parts + 1)]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What `describe` asks of a llama_cpp.Llama."""

    context_params: Any
    model_params: Any
    kv_overrides: Any
    lora_scale: float
    tensor_split: Sequence[float] | None
    metadata: Mapping[str, str]


def state_fingerprint(
    model_path: str | os.PathLike[str],
    context_params: Any,
    model_params: Any,
    *,
    kv_overrides: Mapping[str, Any] | None = None,
    tensor_split: Sequence[float] | None = None,
    lora_path: str | os.PathLike[str] | None = None,
    lora_scale: float = 1.0,
) -> bytes:
    """Return the fingerprint of the states of a model that was loaded with these settings.

    `context_params` and `model_params` are llama.cpp's own structures, as they were handed to it.

    Errors: MissingFile for a file that is not there.
    Cost:   reads the model once a process, about a second a gigabyte.
    """
    files = LoadedFiles.at(str(model_path), lora_path)
    if files is None:
        raise MissingFile(f"{model_path}, a part of it or the LoRA file {lora_path} is not there")
    loaded = _Loaded(context_params, model_params, kv_overrides, lora_scale, tensor_split, {})
    return fingerprint(loaded, files, None)


def fingerprint(llm: Any, files: LoadedFiles, block_tokens: int | None) -> bytes:
    """Return the digest of all that decides the numbers in a state of this model and context.

    `block_tokens` is that of reproducible mode, None in the default mode: states of the two never
    meet, for only the first were decoded in pieces that end at its multiples.

    Errors: FileChanged; OSError for a file that can't be read any more.
    """
    return hashlib.blake2b(
        json.dumps(describe(llm, files, block_tokens), sort_keys=True).encode(), digest_size=32
    ).digest()


def describe(llm: Any, files: LoadedFiles, block_tokens: int | None) -> dict[str, Any]:
    """Return what the fingerprint is made of, by name."""
    parts = {
        "model": [file.digest().hex() for file in files.model],
        "architecture": llm.metadata.get("general.architecture"),
        "overrides": repr(llm.kv_overrides),
        "lora": _lora(llm, files.lora),
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


def _lora(llm: Any, file: _File | None) -> list[Any] | None:
    return None if file is None else [file.digest().hex(), llm.lora_scale]


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
