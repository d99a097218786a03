"""How slots are kept and reused: frozen, validated settings."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tokcache._disk_budget import require_disk_size
from tokcache._validate import require_bool, require_int, require_seconds
from tokcache.errors import InvalidConfig
from tokcache.llama.server.model import require_kv_type

STEP_TOKENS = 64  # the step in which reports and look-ups count tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSettings:
    """How slots are kept and reused.

    `slot_folder` is the server's --slot-save-path as this process reaches it, to delete files.
    `slot_ids` are the slots to use, by default all. If a slot can't be saved or restored,
    `on_error` "degrade" serves the prompt without reuse and counts that; "raise" raises.
    `reproducible` restores only states that were decoded in pieces ending at multiples of
    `block_tokens`, into an empty slot. With full attention, answers and probabilities then equal
    those of an uncached run on the same server (tests/integration/test_server_slots.py). The
    server must decode in pieces of `block_tokens` with a separate stream for each slot
    (--batch-size, --ubatch-size, --no-kv-unified). It must serve nobody else, because it decodes
    tokens of several slots in one batch; requests take turns. For models with a sliding window,
    recurrent and hybrid models it must also run with --ctx-checkpoints 0, because making a
    checkpoint ends a piece. `kv_type` is the server's --cache-type-k and -v, which it does not
    report. `save_when` "answered" saves a slot after each answer, off the request's path, so a
    restart of the server loses nothing; "overwritten" saves it before another prompt gets the slot.

    Units:  `max_bytes` of all files, those of earlier clients in `slot_folder` included, as an int,
            a size such as "8G", or a share of the folder's disk such as "10%" or "50% free", which
            is read again every few seconds; `max_age_s` since a file was last used; prompts shorter
            than `min_save_tokens` are not saved.
    Errors: InvalidConfig.
    """

    slot_folder: str | os.PathLike[str] | None = None
    max_bytes: int | str = 8 << 30
    max_age_s: float = 7 * 24 * 3600.0
    min_save_tokens: int = STEP_TOKENS
    slot_ids: tuple[int, ...] | None = None
    on_error: str = "degrade"
    reproducible: bool = False
    block_tokens: int = 256
    kv_type: str = "f16"
    save_when: str = "answered"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_bytes", require_disk_size("max_bytes", self.max_bytes))
        if isinstance(self.max_bytes, str) and self.slot_folder is None:
            raise InvalidConfig(
                f"max_bytes={self.max_bytes!r} is a share of the disk of slot_folder, which is not "
                "given; name the folder, or give max_bytes in bytes"
            )
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
