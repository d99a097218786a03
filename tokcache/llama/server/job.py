"""One request of the slot manager, from its arrival to its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tokcache.errors import ServerError
from tokcache.llama.server import calls
from tokcache.llama.server.namespaces import adapters_of
from tokcache.llama.server.trust import WHOLE

if TYPE_CHECKING:
    from tokcache.llama.server.calls import Call
    from tokcache.llama.server.removals import Removal
    from tokcache.llama.server.results import Completion
    from tokcache.llama.server.slot import SlotRecord
    from tokcache.llama.server.table import Start, Wish
    from tokcache.text.token_ids import TokenIds


@dataclass(frozen=True, slots=True)
class Parting:
    """The contents that had most of a prompt when it got its slot.

    `after` are the ids with which they go on, `is_generated` if the model generated these;
    `refusal` is why they could not be used although they hold the whole prompt or more of it than
    the chosen ones. `has_other`: the scope has the prompt's beginning with other adapters.

    Units: `n_same` tokens in common with the prompt.
    """

    n_same: int
    after: TokenIds
    is_generated: bool
    refusal: str
    removal: Removal | None
    has_other: bool
    is_forgotten: bool


@dataclass(eq=False, slots=True)
class Job:
    """A request and the slot that it starts from; `start` is None if nothing can be reused."""

    prompt: TokenIds
    settings: dict[str, Any]
    wish: Wish
    began: float = field(default_factory=perf_counter)
    start: Start | None = None
    n_restored: int = 0
    kind: str = WHOLE
    # How far before an end of a prompt in the restored file this one differs, and before its last.
    n_before: int = 0
    n_from_end: int = 0
    # Tokens that the server reused in the first of several completions; None before the first.
    n_used: int | None = None
    received: list[int] = field(default_factory=list)
    is_over: bool = False
    epoch: int = 0
    # When the scope was last cleared before the request, see Records.cleared_at.
    cleared_at: int = 0
    # The contents that had most of the prompt, None if those that it starts from have all of it.
    parting: Parting | None = None
    # Why the chosen file or slot could not be used.
    refusal: str = ""

    @property
    def slot(self) -> SlotRecord:
        """The slot that the request has."""
        if self.start is None:
            raise ServerError("the request has no slot to prepare")
        return self.start.slot

    @property
    def adapters(self) -> bytes:
        """The key of the adapters that the prompt is decoded with."""
        return adapters_of(self.wish.namespace)

    @property
    def n_promised(self) -> int:
        """The prompt's first tokens that the slot holds by our own record."""
        if self.start is None:
            return 0
        return self.n_restored or self.start.n_live

    def call(self, *, is_stream: bool = False) -> Call[Completion]:
        """Return the request for the server."""
        own: dict[str, Any] = {
            "cache_prompt": self.n_used is not None or self.n_promised > 0,
            "n_cache_reuse": 0,  # shifted states differ from the prompt's
        }
        if self.start is not None:
            own["id_slot"] = self.start.slot.id
        return calls.completion(self.prompt, {**self.settings, **own}, is_stream)


def adapter_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a request that change the states it decodes.

    Source: only `lora` does; it makes llama-server empty a slot (launch_slot_with_task in
    server-context.cpp).
    """
    return {name: settings[name] for name in ("lora",) if name in settings}
