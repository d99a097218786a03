"""What a server's slots hold, in figures: the model's own, and our record of what was sent."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokcache.errors import ServerError
from tokcache.llama.server import calls
from tokcache.llama.server.model import KvShape, kv_shape
from tokcache.llama.server.settings import PART_TOKENS

if TYPE_CHECKING:
    from tokcache.llama.server.manager import SlotManager
    from tokcache.llama.server.results import Slot
    from tokcache.llama.server.table import SlotRecord


@dataclass(frozen=True, slots=True)
class SlotKv:
    """The KV state of one slot.

    `source` says where the bytes come from: "model" (the model file's figures and the K and V
    types that were given), "measured" (what the last saved slot wrote) or "unknown"; `unknown`
    why a figure is 0. Units: `n_kv_dim` values a token in all layers, `share` of `n_ctx` held.
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
    """Up to 64 tokens of a slot, from `start` on.

    `score`: what losing it would cost: once and each time it was reused, times the share of the
    slot's tokens that stand on it (the early ones carry all that follow). Units: `idle_s` since
    the slot was last used.
    """

    start: int
    n_tokens: int
    n_uses: int
    score: float
    idle_s: float
    n_bytes: int


@dataclass(frozen=True, slots=True)
class SlotBlocks:
    """The blocks of one slot, earliest first."""

    url: str
    id: int
    is_reachable: bool
    conversation: str | None = None
    is_pinned: bool = False
    blocks: tuple[KvBlock, ...] = ()


class KvReader:
    """Reads a server's slots for reports; the model file is read once a model."""

    def __init__(self, url: str, manager: SlotManager) -> None:
        self._url = url
        self._manager = manager
        self._shapes: dict[tuple[Any, ...], KvShape] = {}

    def state(self) -> Generator[Any, Any, tuple[SlotKv, ...]]:
        """Return the KV state of each slot; figures are 0 when the server is away."""
        seen = yield from self._seen()
        if seen is None:
            return tuple(SlotKv(self._url, number, False) for number in self._known_ids())
        shape, slots = seen
        return tuple(self._kv(shape, slot) for slot in slots)

    def blocks(self) -> Generator[Any, Any, tuple[SlotBlocks, ...]]:
        """Return the blocks of each slot; none when the server is away."""
        seen = yield from self._seen()
        if seen is None:
            return tuple(SlotBlocks(self._url, number, False) for number in self._known_ids())
        shape, slots = seen
        token_bytes = self._token_bytes(shape)[0]
        return tuple(self._slot_blocks(slot.id, token_bytes) for slot in slots)

    def _known_ids(self) -> list[int]:
        return sorted(self._manager.table.slots) or [0]

    def _seen(self) -> Generator[Any, Any, tuple[KvShape, tuple[Slot, ...]] | None]:
        try:
            yield from self._manager.watch.refresh()
            slots = yield calls.slots()
        except ServerError:
            self._manager.trust.refuse("server_away")
            return None
        props, meta = self._manager.watch.props, self._manager.watch.meta
        key = (props.model_path if props else "", meta)
        if key not in self._shapes:
            self._shapes = {key: kv_shape(*key)}
        return self._shapes[key], slots

    def _token_bytes(self, shape: KvShape) -> tuple[float, str]:
        computed = shape.token_bytes(self._manager.settings.kv_type)
        if computed is not None and shape.memory == "attention":
            return computed, "model"
        if self._manager.trust.token_bytes is not None:
            return self._manager.trust.token_bytes, "measured"
        return computed or 0.0, "model" if computed else "unknown"

    def _held(self, slot: Slot) -> int:
        if slot.n_tokens is not None:
            return slot.n_tokens
        record = self._manager.table.slots.get(slot.id)
        return record.n_held if record else 0

    def _kv(self, shape: KvShape, slot: Slot) -> SlotKv:
        n_tokens = self._held(slot)
        token_bytes, source = self._token_bytes(shape)
        return SlotKv(
            url=self._url,
            id=slot.id,
            is_reachable=True,
            n_layers=shape.n_layers,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            n_kv_dim=shape.n_kv_dim,
            n_ctx=slot.n_ctx,
            n_tokens=n_tokens,
            n_bytes=round(token_bytes * n_tokens),
            share=n_tokens / slot.n_ctx if slot.n_ctx else 0.0,
            memory=shape.memory,
            source=source,
            unknown=shape.unknown,
        )

    def _slot_blocks(self, number: int, token_bytes: float) -> SlotBlocks:
        record = self._manager.table.slots.get(number)
        if record is None:
            return SlotBlocks(self._url, number, True)
        with self._manager.table.lock:
            conversation = record.conversation[1] if record.conversation else None
            is_pinned = self._manager.table.is_pinned(record)
            blocks = tuple(_blocks(record, token_bytes))
        return SlotBlocks(self._url, number, True, conversation, is_pinned, blocks)


def _blocks(record: SlotRecord, token_bytes: float) -> list[KvBlock]:
    idle_s = time.monotonic() - (record.used_at or record.since)
    blocks = []
    for part, start in enumerate(range(0, record.n_held, PART_TOKENS)):
        n_tokens = min(PART_TOKENS, record.n_held - start)
        n_uses = record.reuse[part] if part < len(record.reuse) else 0
        standing = (record.n_held - start) / record.n_held
        score = (1 + n_uses) * standing
        blocks.append(
            KvBlock(start, n_tokens, n_uses, score, idle_s, round(token_bytes * n_tokens))
        )
    return blocks
