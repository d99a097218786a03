"""Where a prompt can't leave a slot, for llama-server's context checkpoints are not whole there.

A checkpoint of a sliding window holds just the window. When llama-server goes back to one, it goes
back one token further than the checkpoint ends, and makes the next checkpoint there: that one
lacks the window's first token, and a prompt that is begun from it has other logits. Each time that
is repeated another token is missing.
Source: measured with xllamacpp 2026.10 and a window of 32 tokens: 14 saves and restores, each
followed by a prompt that shares the same 151 tokens, began at 146, 145 .. 133; the logits differed
by 0.00, 0.04, 0.10 .. 0.33, where other pieces of the same prompt make 0.002.

So after the server went back to `n_used` tokens, a prompt may leave the slot before that, or at
the checkpoint that the server makes shortly before each prompt's end, and not between. Recurrent
and hybrid models do not have the fault, but a server does not tell what its model is.
"""

from __future__ import annotations

from dataclasses import dataclass

# Source: checkpoint_offsets in llama.cpp's server-context.cpp.
_BEFORE_END = 4
_ANYWHERE = 2**31


@dataclass(frozen=True, slots=True)
class Gap:
    """Lengths from `start` to before `stop` at which no prompt may leave a slot."""

    start: int = 0
    stop: int = 0

    def __bool__(self) -> bool:
        return self.start < self.stop

    def __contains__(self, n_tokens: int) -> bool:
        return self.start <= n_tokens < self.stop


NO_GAP = Gap()
ALL = Gap(0, _ANYWHERE)


def gap_after(before: Gap, *, n_promised: int, n_used: int, n_prompt: int) -> Gap:
    """Return the gap of a slot that had `before` and then served a prompt.

    Units: `n_promised` first tokens of the prompt were in the slot, `n_used` of them used.
    """
    went_back = n_used < n_promised
    if n_used == 0 or not (went_back or before):
        return NO_GAP
    last = n_prompt - _BEFORE_END
    if last <= n_used:  # no whole checkpoint was made after the one that lacks a token
        last = _ANYWHERE
    if not went_back:
        return Gap(before.start, last)
    return Gap(min(n_used - 1, before.start) if before else n_used - 1, last)
