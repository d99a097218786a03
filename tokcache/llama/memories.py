"""What a model remembers with, as the model itself says, and what its states can do therefore.

Attention keeps a row for each position: any part of it can be saved at any time, and cut anywhere.
A window forgets: what is to be saved must be saved before the window has moved on, and a sequence
can be cut only where the window before the cut is still there. A recurrent memory holds the state
after its last position and no other: it is saved where it is, and never cut.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import llama_cpp

# The architectures that llama.cpp gives the memories that were shown exact here (llama_kv_cache,
# its windowed, recurrent and hybrid relatives). What is not in it may have another: latent or
# indexed attention, windows in chunks, rows that layers share. It runs uncached until it was
# shown exact, too.
# Source: llama_model::create_memory and LLM_ARCH_NAMES of llama.cpp.
ARCHITECTURES = frozenset(
    """
    afmoe apertus arcee arctic baichuan bailingmoe bailingmoe2 bitnet bloom chatglm codeshell
    cohere2 command-r dbrx deci deepseek dots1 ernie4_5 ernie4_5-moe exaone exaone-moe exaone4
    falcon falcon-h1 gemma gemma2 gemma3 glm4 glm4moe gpt-oss gpt2 gptj gptneox granite
    granitehybrid granitemoe grok grovemoe hunyuan-dense hunyuan-moe internlm2 jais jais2 jamba
    lfm2 lfm2moe llama mamba mamba2 minicpm minicpm3 minimax-m2 mistral3 mpt nemotron nemotron_h
    nemotron_h_moe olmo olmo2 olmoe openelm orion pangu-embedded phi2 phi3 phimoe plamo plamo2
    plm qwen qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3vl qwen3vlmoe
    refact seed_oss smallthinker smollm3 stablelm starcoder starcoder2 xverse
    """.split()  # noqa: SIM905 (ninety names read best so)
)
_CELLS = 256  # llama.cpp rounds the number of a window's cells up to a multiple of it


@dataclass(frozen=True, slots=True)
class Memory:
    """What the sequences of a context are kept in.

    Units: `window` positions that windowed layers look back, 0 where all are seen; `n_cells`
           positions that they keep, of all sequences together, before they forget; `n_fresh`
           positions that one sequence can be sure to find there after it has decoded them.
    """

    kind: str
    window: int = 0
    n_cells: int = 0
    n_fresh: int = 0
    has_attention: bool = True
    is_recurrent: bool = False
    refusal: str | None = None  # why its states are neither saved nor restored

    @classmethod
    def of(cls, ctx: Any, *, swa_full: bool = False) -> Memory:
        """Return what the model of this context remembers with."""
        model = llama_cpp.llama_get_model(ctx)
        is_recurrent = bool(llama_cpp.llama_model_is_recurrent(model))
        is_hybrid = bool(llama_cpp.llama_model_is_hybrid(model))
        window = 0 if is_recurrent else int(llama_cpp.llama_model_n_swa(model))
        if llama_cpp.llama_get_memory(ctx) is None:
            return cls("none", refusal="memory: none")
        n_cells = _n_window_cells(ctx, window, swa_full=swa_full)
        kind = "recurrent" if is_recurrent else "hybrid" if is_hybrid else "attention"
        if window:
            kind = "hybrid with a window" if is_hybrid else "sliding window"
        return cls(
            kind,
            window,
            n_cells,
            n_cells - window * int(llama_cpp.llama_n_seq_max(ctx)),
            has_attention=not is_recurrent,
            is_recurrent=is_recurrent or is_hybrid,
            refusal=_why_unknown(model),
        )

    @property
    def is_plain(self) -> bool:
        """Whether it keeps every position, and can be saved at any later time."""
        return self.has_attention and not (self.window or self.is_recurrent)

    def stops(self, block_tokens: int, *, is_exact: bool) -> int:
        """Return the step of the positions at which a decode has to stop and save; 0: none has."""
        if self.is_plain:
            return 0
        if is_exact or self.is_recurrent or block_tokens <= self.n_fresh:
            return block_tokens
        return self.block_tokens(block_tokens)

    def block_tokens(self, at_most: int) -> int:
        """Return how many positions a block may have, if any number may have been decoded.

        A window's must not be longer than it is: llama.cpp leaves out of a state what the window
        does not see any more, and the hole would not be noticed.
        """
        return at_most if self.is_recurrent or not self.window else min(at_most, self.window)

    def why_inexact(self, block_tokens: int, n_ctx: int) -> str | None:
        """Return why blocks on the grid would not give the last bits of an uncached run.

        A restored window must come to lie in the cells where decoding would have put it: flash
        attention adds them up in the order in which they lie.
        """
        if self.window and block_tokens > self.window:
            return "window_smaller_than_block"
        if self.window and self.n_cells < n_ctx and self.n_cells % block_tokens:
            return "window_off_the_grid"
        return None


def _n_window_cells(ctx: Any, window: int, *, swa_full: bool) -> int:
    """Return how many cells the windowed layers have.

    Source: llama_kv_cache_iswa of llama.cpp, for sequences that share one pool.
    """
    n_ctx = int(llama_cpp.llama_n_ctx(ctx))
    if not window or swa_full:
        return n_ctx
    n_cells = window * llama_cpp.llama_n_seq_max(ctx) + llama_cpp.llama_n_ubatch(ctx)
    return int(min(n_ctx, -(-n_cells // _CELLS) * _CELLS))


def _why_unknown(model: Any) -> str | None:
    name = architecture(model)
    return None if name in ARCHITECTURES else f"architecture: {name}"


def architecture(model: Any) -> str:
    """Return llama.cpp's name for the model's architecture."""
    buffer = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_meta_val_str(model, b"general.architecture", buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")
