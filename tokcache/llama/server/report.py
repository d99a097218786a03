"""Reports on slots: the size of their KV state, and the value of each block of tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tokcache.errors import ServerError, ServerTimeout, ServerUnreachable
from tokcache.llama.server import calls
from tokcache.llama.server.model import KvShape, kv_shape
from tokcache.llama.server.settings import STEP_TOKENS

if TYPE_CHECKING:
    from tokcache.llama.server.manager import SlotManager
    from tokcache.llama.server.results import Slot
    from tokcache.llama.server.slot import SlotRecord
    from tokcache.llama.server.steps import Steps


# Bytes of a token in a file besides its state: its id, and the record of its cell in the KV cache.
# Source: the difference between files of 400 and 15 tokens of a hybrid model (xllamacpp).
_ID_BYTES, _CELL_BYTES = 4, 12


@dataclass(frozen=True, slots=True)
class SlotKv:
    """The KV state of one slot.

    `source` says where the bytes come from: "model" (the sizes in the model file and `kv_type` of
    the settings), "measured" (the size of the last saved file, which includes its context
    checkpoints, each a copy of a window or of a recurrent state) or "unknown". `unknown` gives the
    reasons why a figure is 0.

    Units: `n_kv_dim` counts the values of one token in all layers; `share` is `n_tokens` over
           `n_ctx`.
    """

    url: str
    id: int
    is_reachable: bool
    n_layers: int = 0
    n_heads: int = 0
    n_kv_heads: tuple[int, ...] = ()
    n_kv_dim: int = 0
    n_ctx: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    share: float = 0.0
    memory: str = ""
    source: str = "unknown"
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KvBlock:
    """Up to 64 tokens of a slot, from position `start`.

    `score` estimates the cost of losing the block: (1 + reuses) times the share of the slot's
    tokens that depend on it, which are its own and all later ones.

    Units: `idle_s` seconds since the slot was last used.
    """

    start: int
    n_tokens: int
    n_uses: int
    score: float
    idle_s: float
    n_bytes: int


@dataclass(frozen=True, slots=True)
class SlotBlocks:
    """The blocks of one slot, earliest first; none for an empty slot or one without a record.

    If the server's slots can't be read, `unknown` gives the reason.
    """

    url: str
    id: int
    is_reachable: bool
    conversation: str | None = None
    is_pinned: bool = False
    blocks: tuple[KvBlock, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _NotSeen:
    """The reason why a server's slots can't be read, and whether it can be reached."""

    is_reachable: bool
    reason: str


class KvReader:
    """Reads a server's slots for reports, and each model file once."""

    def __init__(self, url: str, manager: SlotManager) -> None:
        self._url = url
        self._manager = manager
        self._shape_key: tuple[Any, ...] | None = None  # of the model file that was read last
        self._shape = KvShape()

    def state(self) -> Steps[tuple[SlotKv, ...]]:
        """Return the KV state of each slot; figures are 0 if the server can't be reached."""
        seen = yield from self._read_slots()
        if isinstance(seen, _NotSeen):
            return tuple(
                SlotKv(self._url, number, seen.is_reachable, unknown=(seen.reason,))
                for number in self._known_ids()
            )
        shape, slots = seen
        states = []
        for slot in slots:
            n_tokens = self._n_held(slot)
            n_bytes, source = self._bytes(shape, n_tokens)
            state = SlotKv(
                url=self._url,
                id=slot.id,
                is_reachable=True,
                n_layers=shape.n_layers,
                n_heads=shape.n_heads,
                n_kv_heads=shape.n_kv_heads,
                n_kv_dim=shape.n_kv_dim,
                n_ctx=slot.n_ctx,
                n_tokens=n_tokens,
                n_bytes=n_bytes,
                share=n_tokens / slot.n_ctx if slot.n_ctx else 0.0,
                memory=shape.memory,
                source=source,
                unknown=shape.unknown,
            )
            states.append(state)
        return tuple(states)

    def blocks(self) -> Steps[tuple[SlotBlocks, ...]]:
        """Return the blocks of each slot; none if the server can't be reached."""
        seen = yield from self._read_slots()
        if isinstance(seen, _NotSeen):
            return tuple(
                SlotBlocks(self._url, number, seen.is_reachable, unknown=(seen.reason,))
                for number in self._known_ids()
            )
        shape, slots = seen
        reports = []
        for slot in slots:
            record = self._manager.table.slots.get(slot.id)
            if record is None:
                reports.append(SlotBlocks(self._url, slot.id, True))
                continue
            with self._manager.table.lock:
                conversation = record.conversation[1] if record.conversation else None
                is_pinned = record.conversation in self._manager.table.shelf.pinned
                blocks = tuple(_blocks(record, self._bytes(shape, record.n_held)[0]))
            reports.append(SlotBlocks(self._url, slot.id, True, conversation, is_pinned, blocks))
        return tuple(reports)

    def _known_ids(self) -> list[int]:
        return sorted(self._manager.table.slots) or [0]  # every server has a slot 0

    def _read_slots(self) -> Steps[tuple[KvShape, tuple[Slot, ...]] | _NotSeen]:
        try:
            yield from self._manager.refresh()
            slots = yield calls.slots()
        except ServerError as error:
            is_reachable = not isinstance(error, ServerUnreachable | ServerTimeout)
            self._manager.trust.refuse("slots_not_listed" if is_reachable else "server_away")
            return _NotSeen(is_reachable, str(error))
        self._manager.trust.went_well("slots_not_listed")
        props, meta = self._manager.watch.props, self._manager.watch.meta
        key = (props, meta)
        # Read the file again after a restart of the server: it may hold another model.
        if key != self._shape_key:
            self._shape = yield partial(kv_shape, props.model_path if props else "", meta)
            self._shape_key = key
        return self._shape, slots

    def _bytes(self, shape: KvShape, n_tokens: int) -> tuple[int, str]:
        """Return the bytes of `n_tokens` in a slot, and the source of that figure."""
        kv_bytes_per_token = shape.kv_bytes_per_token(self._manager.settings.kv_type) or 0.0
        saved = self._manager.trust.saved
        if not n_tokens:
            return 0, "model" if shape.n_layers else "unknown"
        if saved is None or shape.memory == "attention":
            source = "model" if kv_bytes_per_token else "unknown"
            return round(kv_bytes_per_token * n_tokens), source
        if shape.memory in {"recurrent", "hybrid"}:
            # One recurrent state, as large for any length, plus the attention state of each token.
            file_bytes_per_token = _ID_BYTES + (
                _CELL_BYTES + kv_bytes_per_token if kv_bytes_per_token else 0
            )
            state_bytes = max(0.0, saved.n_bytes - file_bytes_per_token * saved.n_tokens)
            return round(state_bytes + kv_bytes_per_token * n_tokens), "measured"
        # A sliding window, or an unknown memory: as much per token as in the saved file.
        return round(saved.n_bytes / saved.n_tokens * n_tokens), "measured"

    def _n_held(self, slot: Slot) -> int:
        if slot.n_tokens is not None:
            return slot.n_tokens
        record = self._manager.table.slots.get(slot.id)
        return record.n_held if record else 0


def _blocks(record: SlotRecord, n_bytes: int) -> list[KvBlock]:
    idle_s = time.monotonic() - (record.used_at or record.since)
    blocks = []
    for number, start in enumerate(range(0, record.n_held, STEP_TOKENS)):
        n_tokens = min(STEP_TOKENS, record.n_held - start)
        n_uses = record.reuse[number] if number < len(record.reuse) else 0
        share_depending = (record.n_held - start) / record.n_held
        score = (1 + n_uses) * share_depending
        block_bytes = round(n_bytes * n_tokens / record.n_held)
        blocks.append(KvBlock(start, n_tokens, n_uses, score, idle_s, block_bytes))
    return blocks
