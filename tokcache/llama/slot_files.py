"""SlotFiles: prompts of a llama-server begun from saved slots, exactly as if begun from nothing.

A slot is saved at a multiple of `block_tokens` and restored into an erased slot: then the rest of
a prompt is decoded in the same pieces as all of it would have been, and no bit differs. A state
that ends elsewhere, or that holds generated tokens, is never used.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from tokcache.config import require_int
from tokcache.errors import ServerError
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokcache.llama.server import Completion, LlamaServer, SlotFile


@dataclass(frozen=True, slots=True)
class Reused:
    """A completion, and how many of its prompt's tokens came from a file."""

    completion: Completion
    n_restored: int
    first_token_s: float


class SlotFiles:
    """The saved slots of one server, by the tokens they hold.

    The server must decode in pieces of `block_tokens` (ServerProcess does). On a model for which
    the server uses nothing of what it restored (sliding windows), saving and restoring stop.

    Errors: a file that can't be used costs a prefill and counts in `refusals`, by reason.
    """

    def __init__(self, server: LlamaServer, *, block_tokens: int = 256, id_slot: int = 0) -> None:
        self._server = server
        self._block_tokens = require_int("block_tokens", block_tokens, minimum=1)
        self._id_slot = id_slot
        self._files: dict[TokenIds, SlotFile] = {}
        self._seen: set[TokenIds] = set()
        self._is_useless = False
        self.refusals: Counter[str] = Counter()

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.n_bytes for file in self._files.values())

    def complete(self, tokens: Iterable[int], *, n_predict: int, n_probs: int = 0) -> Reused:
        """Return the greedy completion of `tokens`, and keep the state of its whole blocks."""
        started = perf_counter()
        prompt = TokenIds(tokens)
        n_restored = self._restore(prompt)
        n_used = None
        for head in self._worth_saving(prompt, n_restored):
            n_cached = self._server.completion(head, n_predict=0, id_slot=self._id_slot).n_cached
            n_used = n_cached if n_used is None else n_used
            self._save(head)
        completion = self._server.completion(
            prompt, n_predict=n_predict, id_slot=self._id_slot, n_probs=n_probs
        )
        n_used = completion.n_cached if n_used is None else n_used
        later_s = completion.seconds - completion.first_token_s
        first_token_s = perf_counter() - started - later_s
        return Reused(completion, self._noted(n_restored, n_used), first_token_s)

    def _restore(self, prompt: TokenIds) -> int:
        self._server.erase_slot(self._id_slot)
        for n_tokens in range(self._last_boundary(prompt), 0, -self._block_tokens):
            file = self._files.get(prompt[:n_tokens])
            if file is not None:
                return n_tokens if self._is_restored(file) else 0
        return 0

    def _is_restored(self, file: SlotFile) -> bool:
        try:
            if self._server.restore_slot(self._id_slot, file.filename).n_tokens == file.n_tokens:
                return True
        except ServerError:
            pass
        self.refusals["restore_failed"] += 1
        self._files = {tokens: kept for tokens, kept in self._files.items() if kept is not file}
        self._server.erase_slot(self._id_slot)
        return False

    def _noted(self, n_restored: int, n_used: int) -> int:
        if n_used >= n_restored:
            return n_restored
        self.refusals["restore_not_used_by_server"] += 1
        self._is_useless = True
        self._files.clear()
        return n_used

    def _save(self, head: TokenIds) -> None:
        name = hashlib.blake2b(memoryview(head), digest_size=16).hexdigest() + ".bin"
        try:
            self._files[head] = self._server.save_slot(self._id_slot, name)
        except ServerError:  # a full disk, say
            self.refusals["save_failed"] += 1

    def _worth_saving(self, prompt: TokenIds, n_restored: int) -> list[TokenIds]:
        """Return the part that an earlier prompt had too, and all whole blocks: shortest first.

        A file can't be cut shorter and stay exact, so what prompts share needs its own.
        """
        if self._is_useless:
            return []
        steps = range(n_restored + self._block_tokens, len(prompt), self._block_tokens)
        heads = [prompt[:n_tokens] for n_tokens in steps]
        shared = [head for head in heads if head in self._seen]
        self._seen.update(heads)
        return sorted({*shared[-1:], *heads[-1:]}, key=len)

    def _last_boundary(self, prompt: TokenIds) -> int:
        # The last token is always decoded: its logits are what the first new token comes from.
        return (len(prompt) - 1) // self._block_tokens * self._block_tokens
