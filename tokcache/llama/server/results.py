"""What a llama-server answers, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokcache.text.token_ids import TokenIds


@dataclass(frozen=True, slots=True)
class ServerProps:
    """What a server says of itself.

    `boot` differs each time the server is started; "" from servers that don't tell.
    Units: `n_ctx` tokens a slot.
    """

    n_slots: int
    n_ctx: int
    model_path: str
    build: str
    chat_template: str
    boot: str = ""


@dataclass(frozen=True, slots=True)
class ModelMeta:
    """What a server says of its model; None where this server does not tell."""

    n_vocab: int | None = None
    n_ctx_train: int | None = None
    n_embd: int | None = None
    n_params: int | None = None
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot, as the server lists it; which tokens it holds, llama-server does not tell.

    Units: `n_tokens` tokens held, None from a server that does not tell.
    """

    id: int
    n_ctx: int
    is_processing: bool
    n_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenProbabilities:
    """The likeliest tokens at one position, best first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """What one request brought.

    Units: `n_prompt` ids sent, `n_cached` of them found in the slot, `n_prefilled` decoded;
    `n_predicted` tokens sampled, `n_held` tokens in the slot afterwards (None: not told);
    `first_token_s` is the time of the whole request less what the server needed for the tokens
    after the first. A streamed answer's `token_ids` end where the stream left one out.
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
    """A part of a streamed answer; the last one has the whole answer's `completion`."""

    text: str
    token_ids: TokenIds
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A slot that was written to or read from a file in the server's slot folder."""

    filename: str
    n_tokens: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Reused:
    """A completion, and how much of its prompt was there already.

    Units: `n_live` first tokens of the prompt that the slot held by our record, or else
    `n_restored` tokens of a saved file that the server used, which are fewer than the prompt has
    in common with the file where the server goes back to a context checkpoint;
    `completion.n_cached` is all that the server used. `first_token_s` includes waiting for a
    slot, saving what it held, and restoring.
    """

    completion: Completion
    n_restored: int
    first_token_s: float
    n_live: int = 0
    id_slot: int = -1


@dataclass(frozen=True, slots=True)
class ReuseStats:
    """Counters of the slot manager.

    Units: `prompt_tokens` sent; of these the server decoded neither the `context_tokens`, which its
    slot still held, nor the `restored_tokens` of a saved file; `refusals` what was not reused,
    saved or kept, by reason; `n_stale_files` evicted files that lie on where the slot folder can't
    be reached, `n_stale_bytes` their bytes (their names are used again first).
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

    @property
    def token_hit_rate(self) -> float:
        """Prompt tokens that were not decoded over all prompt tokens, 0.0 before the first."""
        n_reused = self.context_tokens + self.restored_tokens
        return n_reused / self.prompt_tokens if self.prompt_tokens else 0.0
