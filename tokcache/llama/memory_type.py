"""MemoryType: the kind of memory that a model has, as the model itself says, and its rules.

Attention keeps a row for each position: any part of it can be saved at any time, and cut anywhere.
A window drops old positions: a state must be saved before the window has moved on, and a sequence
can be cut only where the window before the cut is still there. A recurrent memory holds only the
state after its last position: it is saved there, and never cut.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import llama_cpp

# The architectures whose memories in llama.cpp were shown exact here (llama_kv_cache and its
# windowed, recurrent and hybrid relatives). Any other may have another memory (latent or indexed
# attention, windows in chunks, rows that layers share), and runs uncached until it is shown exact.
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
    """.split()  # noqa: SIM905 (ninety names are easier to read in this form)
)
_CELLS = 256  # llama.cpp rounds the number of a window's cells up to a multiple of it


@dataclass(frozen=True, slots=True)
class MemoryType:
    """The memory that holds the sequences of a context.

    Units: `window` is how many positions windowed layers look back, 0 if no layer has a window;
           `n_cells` how many they keep, of all sequences together, before old ones are dropped;
           `n_fresh` how many of its last positions one sequence is sure to find there.
    """

    kind: str
    window: int = 0
    n_cells: int = 0
    n_fresh: int = 0
    has_attention: bool = True
    is_recurrent: bool = False
    refusal: str | None = None  # the reason why its states are neither saved nor restored

    @classmethod
    def of(cls, ctx: Any, *, swa_full: bool = False) -> MemoryType:
        """Return the memory type of the model of this context."""
        model = llama_cpp.llama_get_model(ctx)
        is_recurrent = bool(llama_cpp.llama_model_is_recurrent(model))
        is_hybrid = bool(llama_cpp.llama_model_is_hybrid(model))
        window = 0 if is_recurrent else int(llama_cpp.llama_model_n_swa(model))
        if llama_cpp.llama_get_memory(ctx) is None:
            return cls("none", refusal="memory: none")
        # Source: llama_kv_cache_iswa of llama.cpp, for sequences that share one pool.
        n_seq_max = int(llama_cpp.llama_n_seq_max(ctx))
        n_cells = int(llama_cpp.llama_n_ctx(ctx))
        if window and not swa_full:
            wanted = window * n_seq_max + int(llama_cpp.llama_n_ubatch(ctx))
            n_cells = min(n_cells, -(-wanted // _CELLS) * _CELLS)
        name = architecture(model)
        kind = "recurrent" if is_recurrent else "hybrid" if is_hybrid else "attention"
        if window:
            kind = "hybrid with a window" if is_hybrid else "sliding window"
        return cls(
            kind,
            window,
            n_cells,
            n_cells - window * n_seq_max,
            has_attention=not is_recurrent,
            is_recurrent=is_recurrent or is_hybrid,
            refusal=None if name in ARCHITECTURES else f"architecture: {name}",
        )

    @property
    def is_plain(self) -> bool:
        """Whether it keeps every position, and can be saved at any later time."""
        return self.has_attention and not (self.window or self.is_recurrent)

    def stops(self, block_tokens: int, *, is_reproducible: bool) -> int:
        """Return the step of the positions at which a decode has to stop and save; 0: nowhere."""
        if self.is_plain:
            return 0
        if is_reproducible or self.is_recurrent or block_tokens <= self.n_fresh:
            return block_tokens
        return self.block_tokens(block_tokens)

    def block_tokens(self, at_most: int) -> int:
        """Return how many positions a block may have, if any number may have been decoded.

        A block must not be longer than a window: llama.cpp leaves positions that the window does
        not see any more out of a state, and the hole would not be noticed.
        """
        return at_most if self.is_recurrent or not self.window else min(at_most, self.window)

    def why_not_reproducible(self, block_tokens: int, n_ctx: int) -> str | None:
        """Return why aligned blocks would not give the last bits of an uncached run.

        A restored window must be in the cells where decoding would have put it: flash attention
        adds them up in the order of the cells.
        """
        if self.window and block_tokens > self.window:
            return "window_smaller_than_block"
        if self.window and self.n_cells < n_ctx and self.n_cells % block_tokens:
            return "window_not_aligned"
        return None


def architecture(model: Any) -> str:
    """Return llama.cpp's name for the model's architecture."""
    buffer = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_meta_val_str(model, b"general.architecture", buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")
