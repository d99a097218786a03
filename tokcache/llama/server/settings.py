"""How slots are kept and reused: frozen, validated settings."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tokcache._validate import require_bool, require_int, require_seconds, require_size
from tokcache.errors import InvalidConfig
from tokcache.llama.server.model import require_kv_type

PART_TOKENS = 64  # what reports and look-ups count in


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSettings:
    """How slots are kept and reused.

    `slot_folder` is the server's --slot-save-path where this process can reach it: files are
    deleted there. `slot_ids` are the slots to use, all by default. `on_error`: "degrade" serves
    without reuse what can't be saved or restored, and counts it; "raise" raises.
    `reproducible` restores only what was decoded in pieces that end at multiples of
    `block_tokens`, into an empty slot: with full attention, answers and their probabilities are
    those of an uncached run on the same server (tests/integration/test_server_slots.py). The
    server must decode in pieces of `block_tokens`, every slot in a stream of its own (--batch-size,
    --ubatch-size, --no-kv-unified), and serve nobody else, for it decodes tokens of several slots
    in one batch; requests take turns. For models with a sliding window, recurrent and hybrid ones
    it must run with --ctx-checkpoints 0 then, for it stops decoding where it makes a checkpoint.
    `kv_type` is the server's --cache-type-k and -v, which it does not tell. `save_when`
    "answered" saves a slot after each answer, off the request's path, so that a restart of the
    server loses nothing; "overwritten" saves it before another prompt takes the slot.

    Units:  `max_bytes` of all files, an int or a size such as "8G", with those that earlier clients
            left in `slot_folder`; `max_age_s` since a file was last used; prompts shorter than
            `min_save_tokens` are not saved.
    Errors: InvalidConfig.
    """

    slot_folder: str | os.PathLike[str] | None = None
    max_bytes: int | str = 8 << 30
    max_age_s: float = 7 * 24 * 3600.0
    min_save_tokens: int = PART_TOKENS
    slot_ids: tuple[int, ...] | None = None
    on_error: str = "degrade"
    reproducible: bool = False
    block_tokens: int = 256
    kv_type: str = "f16"
    save_when: str = "answered"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_bytes", require_size("max_bytes", self.max_bytes))
        for name in ("min_save_tokens", "block_tokens"):
            require_int(name, getattr(self, name), minimum=1)
        require_bool("reproducible", self.reproducible)
        if self.on_error not in ("degrade", "raise"):
            raise InvalidConfig(f"on_error must be 'degrade' or 'raise', not {self.on_error!r}")
        if self.save_when not in ("answered", "overwritten"):
            raise InvalidConfig(
                f"save_when must be 'answered' or 'overwritten', not {self.save_when!r}"
            )
        require_seconds("max_age_s", self.max_age_s)
        for number in self.slot_ids or ():
            require_int("slot_ids", number, minimum=0)
        if self.slot_ids is not None and not self.slot_ids:
            raise InvalidConfig("slot_ids must name at least one slot")
        require_kv_type(self.kv_type)
