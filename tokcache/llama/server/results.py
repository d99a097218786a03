"""The answers of a llama-server as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokcache.llama.explanation import Explanation
    from tokcache.state.reasons import Miss
    from tokcache.text.token_ids import TokenIds


@dataclass(frozen=True, slots=True)
class ServerProps:
    """A server's properties.

    `boot` differs at each start of the server; "" if the server does not report it.

    Units: `n_ctx` tokens per slot.
    """

    n_slots: int
    n_ctx: int
    model_path: str
    build: str
    chat_template: str
    boot: str = ""


@dataclass(frozen=True, slots=True)
class ModelMeta:
    """The model's metadata; None for values that the server does not report."""

    n_vocab: int | None = None
    n_ctx_train: int | None = None
    n_embd: int | None = None
    n_params: int | None = None
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot as the server lists it, which does not include the tokens themselves.

    Units: `n_tokens` tokens held, None if the server does not report it.
    """

    id: int
    n_ctx: int
    is_processing: bool
    n_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenProbabilities:
    """The most likely tokens at one position, best first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request.

    Units: `n_prompt` ids sent, `n_cached` of them found in the slot, `n_prefilled` decoded;
    `n_predicted` tokens sampled, `n_held` tokens in the slot afterwards (None: not reported);
    `first_token_s` is the time of the whole request minus the server's time for the tokens after
    the first. A streamed answer's `token_ids` end before the first id that the stream omitted.
    """

    token_ids: TokenIds
    text: str
    n_prompt: int
    n_cached: int
    stop: str
    seconds: float
    first_token_s: float
    probabilities: tuple[TokenProbabilities, ...]
    n_prefilled: int = 0
    n_predicted: int = 0
    n_held: int | None = None
    is_truncated: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a streamed answer; the last one has the `completion` of the whole answer.

    `reused`, in the last one of `stream`: how much of the prompt was reused.
    """

    text: str
    token_ids: TokenIds
    completion: Completion | None = None
    reused: Reused | None = None


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A slot that was written to or read from a file in the server's slot folder."""

    filename: str
    n_tokens: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Reused:
    """A completion, and how much of its prompt was reused.

    Units: the slot held the prompt's first `n_live` tokens by our record, or else the server used
    `n_restored` tokens of a saved file. These are fewer than the tokens in common with the file if
    the server went back to a context checkpoint. `completion.n_cached` counts all tokens that the
    server reused. `first_token_s` includes waiting for a slot, saving its contents and restoring.

    `miss` says why the server reused no more of the prompt; None if it reused all that it can.
    `explanation` has the texts on both sides, if `explain` asked for it. With `splice` the prompt
    took `n_spliced` generated ids of earlier answers in the place of others, and `splice_refusal`
    is the first reason for which an answer kept the ids of its text.
    """

    completion: Completion
    n_restored: int
    first_token_s: float
    n_live: int = 0
    id_slot: int = -1
    miss: Miss | None = None
    explanation: Explanation | None = None
    n_spliced: int = 0
    splice_refusal: str = ""


@dataclass(frozen=True, slots=True)
class ReuseStats:
    """Counters of the slot manager.

    Units: `prompt_tokens` sent. Of these the server decoded neither the `context_tokens`, which its
    slot still held, nor the `restored_tokens` of a saved file. `refusals` counts the times that
    something was not reused, saved or kept, by reason. `misses` counts, by `MissReason`, the
    prompts of which the server decoded more than the last token, `missed_tokens` the other tokens
    that it decoded. `n_stale_files` and `n_stale_bytes` are evicted files that could not be deleted
    because the slot folder can't be reached; new files take their names first.
    """

    requests: int
    hits: int
    prompt_tokens: int
    context_tokens: int
    restored_tokens: int
    restores: int
    saves: int
    erases: int
    restarts: int
    evictions: int
    restore_seconds: float
    save_seconds: float
    n_files: int
    n_bytes: int
    n_stale_files: int
    n_stale_bytes: int
    is_folder_reachable: bool | None
    refusals: Mapping[str, int] = field(default_factory=dict)
    misses: Mapping[str, int] = field(default_factory=dict)
    missed_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def token_hit_rate(self) -> float:
        """The share of prompt tokens that were not decoded, 0.0 before the first."""
        n_reused = self.context_tokens + self.restored_tokens
        return n_reused / self.prompt_tokens if self.prompt_tokens else 0.0
