"""SlotFiles: the slot manager on one slot of a llama-server, in reproducible mode.

A prompt that starts from a saved slot gets exactly the results of an uncached run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokcache._validate import require_int
from tokcache.llama.server.settings import SlotSettings
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable

    from tokcache.llama.server import LlamaServer, Reused


class SlotFiles:
    """The saved states of one slot of a server, found by their tokens.

    The server must decode in pieces of `block_tokens` (ServerProcess does). If its model does not
    have full attention, it must run without context checkpoints; for a model with a sliding window
    it then reuses nothing of a restored state, so saving and restoring stop.

    Errors: a file that can't be used costs a prefill and counts in `refusals`, by reason.
    """

    def __init__(self, server: LlamaServer, *, block_tokens: int = 256, id_slot: int = 0) -> None:
        require_int("block_tokens", block_tokens, minimum=1)
        self._manager = server.manage(
            SlotSettings(
                reproducible=True,
                block_tokens=block_tokens,
                slot_ids=(id_slot,),
                min_save_tokens=1,
            )
        )

    @property
    def refusals(self) -> Counter[str]:
        """Number of states not reused or not saved, by reason."""
        return self._manager.refusals

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return self._manager.stats().n_bytes

    def complete(self, tokens: Iterable[int], *, n_predict: int, n_probs: int = 0) -> Reused:
        """Return the greedy completion of `tokens`; save the state of its complete blocks."""
        settings = {"n_predict": n_predict, "temperature": 0.0, "n_probs": n_probs}
        return self._manager.drive(self._manager.complete(TokenIds(tokens), settings, None, None))
