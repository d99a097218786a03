"""The prompt lengths at which llama-server's context checkpoints are incomplete.

A prompt that differs from a slot's tokens goes back to a context checkpoint. A checkpoint of a
sliding window holds only the window. When llama-server goes back to one, it goes one token further
back than the checkpoint's end and makes the next checkpoint there. That one lacks the window's
first token, so a prompt that starts from it gets different logits. Each repetition loses another
token.
Source: measured with xllamacpp 2026.10 and a window of 32 tokens. 14 saves and restores, each
followed by a prompt that shares the same 151 tokens, began at 146, 145 .. 133; the logits differed
by 0.00, 0.04, 0.10 .. 0.33. Decoding the same prompt in other batches changes them by 0.002.

After the server went back to `n_used` tokens, a prompt may therefore differ before that position,
or after the checkpoint that the server makes shortly before each prompt's end, but not in between.
Recurrent and hybrid models do not have the fault, but a server does not report its model's kind.

A slot keeps a checkpoint of the end of each prompt that it served (`ends`), and may have others. So
a prompt that differs after one of these ends can be continued there. One that differs before an end
is tried, until a restore at that distance from it was not used (`tokcache.llama.server.trust`).
"""

from __future__ import annotations

from dataclasses import dataclass

# Source: checkpoint_offsets in llama.cpp's server-context.cpp.
_BEFORE_END = 4
_ANYWHERE = 2**31
ANY_DISTANCE = _ANYWHERE
_MAX_ENDS = 32  # llama-server keeps so many checkpoints


@dataclass(frozen=True, slots=True)
class Gap:
    """The lengths [start, stop) after which no prompt may differ from a slot's tokens."""

    start: int = 0
    stop: int = 0

    def __bool__(self) -> bool:
        return self.start < self.stop

    def __contains__(self, n_tokens: int) -> bool:
        return self.start <= n_tokens < self.stop


def distance(n_tokens: int, ends: tuple[int, ...]) -> int:
    """Return how far before an end of a prompt `n_tokens` lie; 0 if a checkpoint is near.

    A checkpoint is near if at least half of the tokens come before it.
    """
    before = max((end for end in ends if end - _BEFORE_END <= n_tokens), default=0)
    if 2 * (before - _BEFORE_END) >= n_tokens:
        return 0
    return min((end for end in ends if end - _BEFORE_END > n_tokens), default=n_tokens) - n_tokens


def ends_after(before: tuple[int, ...], *, n_used: int, n_prompt: int) -> tuple[int, ...]:
    """Return the ends in a slot that had those `before`, and then served a prompt.

    The server drops the checkpoints after the `n_used` tokens that it used.
    """
    kept = [end for end in before if end - _BEFORE_END <= n_used and end != n_prompt]
    return (*kept, n_prompt)[-_MAX_ENDS:]


NO_GAP = Gap()
ALL = Gap(0, _ANYWHERE)


def gap_after(before: Gap, *, n_promised: int, n_used: int, n_prompt: int) -> Gap:
    """Return the gap of a slot that had the gap `before` and then served a prompt.

    Units: the slot held the prompt's first `n_promised` tokens; the server used `n_used` of them.
    """
    went_back = n_used < n_promised
    if n_used == 0 or not (went_back or before):
        return NO_GAP
    last = n_prompt - _BEFORE_END
    if last <= n_used:  # the newest checkpoint is the one that lacks a token
        last = _ANYWHERE
    if not went_back:
        return Gap(before.start, last)
    return Gap(min(n_used - 1, before.start) if before else n_used - 1, last)
