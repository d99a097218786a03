"""What makes two KV states interchangeable, in one digest.

llama.cpp checks the shape of a state it is given, not where it comes from: a fine-tune of the
same geometry loads without a word. All that decides the numbers is therefore part of the key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp

from tokcache._forks import call_in_child
from tokcache.errors import FileChanged, MissingFile
from tokcache.llama.file_digests import DIGESTS, Hashing, file_identity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# A change of what the fingerprint is made of, or how, makes other keys: old states are never taken
# for new ones. 2: SHA-256 for the files' digests.
_VERSION = 2

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


class LoadedFile:
    """A file as it was just before it was loaded, and the digest of its bytes.

    Threads: safe.
    """

    def __init__(self, path: str) -> None:
        self.path = path  # absolute, for the working directory may change
        self.identity = file_identity(path)
        self._hashing: Hashing | None = None

    def begin(self) -> Hashing:
        """Return the digest, there already or being computed."""
        hashing = self._hashing
        if hashing is None or hashing.is_lost:
            hashing = self._hashing = DIGESTS.begin(self.path, self.identity)
        return hashing

    def release(self) -> None:
        """Stop waiting for the digest: what hashes for nobody else ends."""
        self._hashing = None

    def digest(self) -> bytes:
        """Return the digest of the file's bytes; waits for it.

        Errors: FileChanged; OSError for a file that can't be read any more.
        """
        digest = self.begin().result()
        if file_identity(self.path) != self.identity:
            raise FileChanged(f"{self.path} was changed or replaced after it was loaded")
        return digest


@dataclass(frozen=True, slots=True)
class LoadedFiles:
    """The files of a model and its LoRA adapter, as they were just before they were loaded."""

    model: tuple[LoadedFile, ...]
    lora: LoadedFile | None

    @classmethod
    def at(
        cls, model_path: str, lora_path: str | os.PathLike[str] | None = None
    ) -> LoadedFiles | None:
        """Return the files as they are now; None if one, a part say, is not there."""
        try:
            paths = model_files(str(Path(model_path).absolute()))
            files = tuple(LoadedFile(path) for path in paths)
            lora = LoadedFile(str(Path(lora_path).absolute())) if lora_path else None
        except OSError:
            return None
        return cls(files, lora)

    def each(self) -> tuple[LoadedFile, ...]:
        """Return all of them."""
        return self.model if self.lora is None else (*self.model, self.lora)

    def begin(self) -> bool:
        """Have the files hashed; return whether all digests are there, or have failed."""
        begun = [file.begin() for file in self.each()]
        return all(hashing.is_done for hashing in begun)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all digests are there, or have failed; False if `timeout_s` was too short."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        return all(
            hashing.wait(None if until is None else max(until - time.monotonic(), 0.0))
            for hashing in [file.begin() for file in self.each()]
        )

    def release(self) -> None:
        """Stop waiting for digests."""
        for file in self.each():
            file.release()


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

    A file that is overwritten in place while it is mapped changes the loaded weights, and this
    can't be noticed: replace model files by renaming new ones over them.

    Errors: MissingFile for a file that is not there.
    Cost:   reads the model, about a second a gigabyte, unless its digest is known: the process
            keeps it, and the user's cache folder keeps those of files over 16 MiB
            (TOKCACHE_REMEMBER_DIGESTS=0 turns that off). A file that changed in the last two
            seconds is read again by the next one who asks.
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
        "version": _VERSION,
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


def _lora(llm: Any, file: LoadedFile | None) -> list[Any] | None:
    return None if file is None else [file.digest().hex(), llm.lora_scale]


def _devices(llm: Any) -> list[Any]:
    params = llm.model_params
    split = list(llm.tensor_split) if llm.tensor_split is not None else None
    return [params.n_gpu_layers, params.split_mode, params.main_gpu, split]


def _build() -> list[Any]:
    return [
        llama_cpp.__version__,
        _SYSTEM.info(),
        llama_cpp.LLAMA_STATE_SEQ_VERSION,
        llama_cpp.LLAMA_SESSION_VERSION,
    ]


class _System:
    """What llama.cpp says of its build and this CPU.

    It writes the answer into a static string: two threads that ask at once get a mixture, or end
    the process. So it is asked once.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Ask again at the next call; in the child of a fork another thread may hold the lock."""
        self._lock = threading.Lock()
        self._info: str | None = None

    def info(self) -> str:
        """Return llama.cpp's words."""
        with self._lock:
            if self._info is None:
                said = llama_cpp.llama_print_system_info()
                self._info = str(said.decode("utf-8", "replace"))
            return self._info


_SYSTEM = _System()
call_in_child(_SYSTEM.forget)
