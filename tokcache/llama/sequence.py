"""Blocks and snapshots of a llama.cpp context's sequences, through its public API.

A block is copied to a scratch sequence that shares its cells, and read from or written to there;
that works in a context whose sequences share one pool of cells (`kv_unified`). Anywhere else
llama_memory_seq_cp ends the process, so it is asked before.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np

from tokcache.errors import StateError

SCRATCH = 1  # the id is written into the bytes: always the same one
_BytePointer = ctypes.POINTER(ctypes.c_uint8)


def _pointer(buffer: Any) -> Any:
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    return ctypes.cast(address, _BytePointer)


class Sequence:
    """One sequence of a context: its blocks and its snapshots.

    Errors: StateError where llama.cpp refuses; the sequence is then as it was before.
    Threads: the context's: one at a time.
    """

    def __init__(self, ctx: Any, *, is_unified: bool, seq_id: int = 0) -> None:
        self._ctx = ctx
        self._memory = llama_cpp.llama_get_memory(ctx)
        self._seq_id = seq_id
        self.has_blocks = is_unified and llama_cpp.llama_n_seq_max(ctx) > SCRATCH
        self._sizes: dict[int, int] = {}

    def end(self) -> int:
        """Return the position after the last one held, 0 if none is."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, self._seq_id)) + 1

    def trim(self, n_tokens: int) -> bool:
        """Remove the positions from `n_tokens` on; False if this memory can't (nothing changed)."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, self._seq_id, n_tokens, -1))

    def clear(self) -> None:
        """Remove all positions."""
        llama_cpp.llama_memory_seq_rm(self._memory, self._seq_id, -1, -1)

    def _require_blocks(self) -> None:
        if not self.has_blocks:
            raise StateError(
                "blocks need a context with kv_unified=True and n_seq_max of at least "
                f"{SCRATCH + 1}; this one has n_seq_max={llama_cpp.llama_n_seq_max(self._ctx)}"
            )

    def block_bytes(self, start: int, stop: int) -> int:
        """Return the size of the state of positions [start, stop).

        It depends on their number alone, so it is asked of llama.cpp once for each number.
        """
        n_tokens = stop - start
        if n_tokens not in self._sizes:
            self._require_blocks()
            self._lend(start, stop)
            size = int(llama_cpp.llama_state_seq_get_size(self._ctx, SCRATCH))
            self._free_scratch()
            self._sizes[n_tokens] = size
        return self._sizes[n_tokens]

    def read_block(self, start: int, stop: int, buffer: memoryview) -> None:
        """Copy the state of positions [start, stop) into a buffer of exactly its size."""
        self._require_blocks()
        self._lend(start, stop)
        try:
            self._require_span(start, stop)
            written = llama_cpp.llama_state_seq_get_data(
                self._ctx, _pointer(buffer), buffer.nbytes, SCRATCH
            )
        finally:
            self._free_scratch()
        if written != buffer.nbytes:
            raise StateError(f"block [{start}, {stop}) has {written} bytes, not {buffer.nbytes}")

    def write_block(self, start: int, stop: int, buffer: memoryview) -> None:
        """Set positions [start, stop), the next of this sequence, from what `read_block` gave."""
        self._require_blocks()
        if self.end() != start:
            raise StateError(f"block [{start}, {stop}) can't follow position {self.end() - 1}")
        read = llama_cpp.llama_state_seq_set_data(
            self._ctx, _pointer(buffer), buffer.nbytes, SCRATCH
        )
        try:
            if read != buffer.nbytes:
                raise StateError(f"llama.cpp took {read} of a block's {buffer.nbytes} bytes")
            self._require_span(start, stop)
            llama_cpp.llama_memory_seq_cp(self._memory, SCRATCH, self._seq_id, start, stop)
        finally:
            self._free_scratch()
        if self.end() != stop:
            raise StateError(f"block [{start}, {stop}) ends at position {self.end() - 1}")

    def _lend(self, start: int, stop: int) -> None:
        self._free_scratch()
        llama_cpp.llama_memory_seq_cp(self._memory, self._seq_id, SCRATCH, start, stop)

    def _free_scratch(self) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, SCRATCH, -1, -1)

    def _require_span(self, start: int, stop: int) -> None:
        first = llama_cpp.llama_memory_seq_pos_min(self._memory, SCRATCH)
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, SCRATCH)
        if (first, last) != (start, stop - 1):
            raise StateError(f"positions {first} to {last} came for block [{start}, {stop})")

    def snapshot(self) -> memoryview:
        """Return the state of the whole sequence."""
        size = int(llama_cpp.llama_state_seq_get_size(self._ctx, self._seq_id))
        buffer = np.empty(size, np.uint8).data
        written = llama_cpp.llama_state_seq_get_data(
            self._ctx, _pointer(buffer), size, self._seq_id
        )
        if written != size:
            raise StateError(f"a snapshot has {written} bytes, not {size}")
        return buffer

    def load_snapshot(self, buffer: memoryview) -> None:
        """Put the sequence back to what it was at a snapshot."""
        self.clear()
        read = llama_cpp.llama_state_seq_set_data(
            self._ctx, _pointer(buffer), buffer.nbytes, self._seq_id
        )
        if read != buffer.nbytes:
            self.clear()
            raise StateError(f"llama.cpp took {read} of a snapshot's {buffer.nbytes} bytes")
