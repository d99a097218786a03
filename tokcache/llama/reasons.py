"""The reasons why a Llama's states are neither saved nor restored, each with its cure."""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """The cause, and the cure."""

    why: str
    cure: str


REASONS = {
    "logits_all": Reason(
        "a state holds no logits, and logits_all needs those of every position",
        "pass logits_all=False (llama_cpp.server: --logits_all false); for logprobs make another "
        "Llama",
    ),
    "embedding_context": Reason(
        "a context for embeddings does not keep the state of a prompt",
        "make another Llama without embedding=True for completions",
    ),
    "draft_model": Reason(
        "a state holds no logits, and a draft model needs those of several positions",
        "leave out draft_model",
    ),
    "memory": Reason(
        "the model has no memory that could be saved: it is an encoder",
        "leave out prefix_cache",
    ),
    "architecture": Reason(
        "its states were not shown to be exact (tokcache.llama.memory_type names those that were)",
        "leave out prefix_cache, or use a model of a known architecture",
    ),
    "context_without_blocks": Reason(
        "the context has no second sequence in one pool of cells to copy blocks through",
        "leave context_params.n_seq_max and kv_unified as Llama sets them",
    ),
    "window_smaller_than_block": Reason(
        "with reproducible=True a block must not be longer than the model's sliding window",
        "pass PrefixStateCache(block_tokens=…) no larger than the window, or reproducible=False",
    ),
    "window_not_aligned": Reason(
        "with reproducible=True the cells of the sliding window must be a multiple of a block's",
        "pass PrefixStateCache(block_tokens=…) that divides 256, swa_full=True, or "
        "reproducible=False",
    ),
}


def explained(reason: str) -> str:
    """Return the reason with its cause and cure; one that is not in the table as it is."""
    known = REASONS.get(reason.partition(":")[0])
    return reason if known is None else f"{reason} ({known.why}); {known.cure}"


def is_known(reason: str) -> bool:
    """Return whether the table has the reason."""
    return reason.partition(":")[0] in REASONS
