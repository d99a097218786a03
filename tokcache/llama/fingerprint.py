"""The fingerprint: one digest of everything that makes two KV states interchangeable.

llama.cpp checks the shape of a state that it loads, not where it comes from: it accepts that of a
fine-tune of the same geometry. Everything that decides the numbers is therefore in the fingerprint.
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
# Raised when the fingerprint is made of other fields, or in another way: old states are never taken
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
# The batches of a prompt, and the number of threads, decide the last bits.
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
        """Stop waiting for the digest; its thread ends if no other object waits for it."""
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
        """Return the files as they are now; None if one of them is not there."""
        try:
            paths = model_files(str(Path(model_path).absolute()))
            files = tuple(LoadedFile(path) for path in paths)
            lora = LoadedFile(str(Path(lora_path).absolute())) if lora_path else None
        except OSError:
            return None
        return cls(files, lora)

    def each(self) -> tuple[LoadedFile, ...]:
        """Return the files of model and adapter."""
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
    """Return the file, or all files of a model that was split into several."""
    found = _SHARD.search(path)
    if found is None:
        return [path]
    stem, n_files = path[: found.start()], int(found[2])
    return [f"{stem}-{number:05d}-of-{found[2]}.gguf" for number in range(1, n_files + 1)]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The settings with which a model and its context were made."""

    context_params: Any
    model_params: Any
    kv_overrides: Mapping[str, Any] | None
    lora_scale: float
    tensor_split: Sequence[float] | None
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, llm: Any) -> LoadedModel:
        """Return those of a llama_cpp.Llama."""
        return cls(
            llm.context_params,
            llm.model_params,
            llm.kv_overrides,
            llm.lora_scale,
            llm.tensor_split,
            llm.metadata,
        )


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

    `context_params` and `model_params` are llama.cpp's own structures, as it was given them.

    A file that is overwritten in place while it is mapped changes the loaded weights, which can't
    be noticed: replace model files by renaming new ones over them.

    Errors: MissingFile for a file that is not there.
    Cost:   reads the model, about a second a gigabyte, unless its digest is known: the process
            keeps it, and the user's cache folder keeps those of files over 16 MiB
            (TOKCACHE_REMEMBER_DIGESTS=0 turns that off). A file that changed in the last two
            seconds is read again by the next call.
    """
    files = LoadedFiles.at(str(model_path), lora_path)
    if files is None:
        raise MissingFile(
            f"{model_path}, another file of a model that was split, or the LoRA file {lora_path} "
            "is not there; pass the path of a GGUF file"
        )
    loaded = LoadedModel(context_params, model_params, kv_overrides, lora_scale, tensor_split, {})
    return fingerprint(loaded, files, None)


def fingerprint(llm: Any, files: LoadedFiles, block_tokens: int | None) -> bytes:
    """Return the digest of everything that decides the numbers in this model's states.

    `block_tokens` is that of reproducible mode, None in the default mode: states of the two never
    meet, for only the first were decoded in pieces that end at its multiples.

    Errors: FileChanged; OSError for a file that can't be read any more.
    """
    return digest_of(describe(llm, files, block_tokens))


def digest_of(parts: Mapping[str, Any]) -> bytes:
    """Return the fingerprint of these fields."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=32).digest()


def describe(llm: Any, files: LoadedFiles, block_tokens: int | None) -> dict[str, Any]:
    """Return the fields of the fingerprint, by name."""
    params = llm.model_params
    tensor_split = None if llm.tensor_split is None else list(llm.tensor_split)
    lora = None if files.lora is None else [files.lora.digest().hex(), llm.lora_scale]
    fields = {
        "version": _VERSION,
        "model": [file.digest().hex() for file in files.model],
        "architecture": llm.metadata.get("general.architecture"),
        "overrides": repr(llm.kv_overrides),
        "lora": lora,
        "context": {name: _plain(llm.context_params, name) for name in _CONTEXT},
        "devices": [params.n_gpu_layers, params.split_mode, params.main_gpu, tensor_split],
        "build": _build(),
    }
    if block_tokens is not None:
        fields["block_tokens"] = block_tokens
        fields["batches"] = {name: _plain(llm.context_params, name) for name in _REPRODUCIBLE}
    return fields


def _plain(params: Any, name: str) -> Any:
    return getattr(params, name, None)


def _build() -> list[Any]:
    return [
        llama_cpp.__version__,
        _SYSTEM.info(),
        llama_cpp.LLAMA_STATE_SEQ_VERSION,
        llama_cpp.LLAMA_SESSION_VERSION,
    ]


class _System:
    """llama.cpp's description of its build and of this CPU.

    llama.cpp writes it into a static string: two threads that ask for it at once get a mixture, or
    end the process. So it is asked for once.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start without an answer and with a lock that no thread of a fork's parent holds."""
        self._lock = threading.Lock()
        self._info: str | None = None

    def info(self) -> str:
        """Return the description."""
        with self._lock:
            if self._info is None:
                said = llama_cpp.llama_print_system_info()
                self._info = str(said.decode("utf-8", "replace"))
            return self._info


_SYSTEM = _System()
call_in_child(_SYSTEM.reset)
