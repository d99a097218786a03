"""Blocks and snapshots of a llama.cpp context's sequences, through its public API.

A block is copied to a scratch sequence that shares its cells, and read from or written to there;
that works in a context whose sequences share one pool of cells (`kv_unified`). Anywhere else
llama_memory_seq_cp ends the process, so the context is checked first.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from tokcache.errors import StateError

if TYPE_CHECKING:
    from tokcache.llama.memory_type import MemoryType

SCRATCH = 1  # the id is written into the bytes: always the same one
_PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: all but full attention
_BytePointer = ctypes.POINTER(ctypes.c_uint8)


def _pointer(buffer: Any) -> Any:
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    return ctypes.cast(address, _BytePointer)


class Sequence:
    """One sequence of a context: its blocks and its snapshots.

    `is_alone`: no other sequence holds anything, but for the scratch one between two calls.

    Errors: StateError where llama.cpp refuses; the sequence is then as it was before.
    Threads: the context's: one at a time.
    """

    def __init__(
        self,
        ctx: Any,
        memory: MemoryType,
        *,
        is_unified: bool,
        seq_id: int = 0,
        scratch: int = SCRATCH,
        is_alone: bool = True,
    ) -> None:
        self._ctx = ctx
        self._kind = memory
        self._memory = llama_cpp.llama_get_memory(ctx)
        self._seq_id, self._scratch, self.is_alone = seq_id, scratch, is_alone
        self.has_blocks = is_unified and llama_cpp.llama_n_seq_max(ctx) > max(scratch, seq_id)
        self._sizes: dict[int, int] = {}

    # Its positions

    def end(self) -> int:
        """Return the position after the last one held, 0 if none is."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, self._seq_id)) + 1

    def _first(self) -> int:
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, self._seq_id))

    def is_at(self, n_tokens: int) -> bool:
        """Return whether it holds `n_tokens` positions, and those that the next one needs."""
        if not n_tokens:
            return self.end() == 0
        return self.end() == n_tokens and self._has_before(n_tokens, is_cut=False)

    def holds(self, n_tokens: int, *, in_place: bool = False) -> bool:
        """Return whether the first `n_tokens` positions are there, as before the rest came.

        `in_place`: in the same cells, too.
        """
        end = self.end()
        if n_tokens in (0, end):
            return True
        if in_place and self._kind.window and self._first() > 0:
            return False
        return n_tokens < end and self._has_before(n_tokens, is_cut=True)

    def keeps_all(self) -> bool:
        """Return whether every position is still there, so that each can be saved now."""
        return self._kind.has_attention and not self._kind.is_recurrent and self._first() <= 0

    def _has_before(self, n_tokens: int, *, is_cut: bool) -> bool:
        """Return whether the positions that position `n_tokens` looks back at are there.

        llama.cpp reports that it cut a window even where it has dropped the positions before.
        """
        if self._kind.is_recurrent:
            return not is_cut and self._first() == n_tokens - 1
        first = self._first()
        return not self._kind.window or first == 0 or first <= n_tokens - self._kind.window + 1

    def trim(self, n_tokens: int, *, in_place: bool = False) -> bool:
        """Remove the positions from `n_tokens` on; False if this memory can't (nothing changed)."""
        if not self.holds(n_tokens, in_place=in_place):
            return False
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, self._seq_id, n_tokens, -1))

    def clear(self) -> None:
        """Remove all positions; the next ones go to the first cells again."""
        if self.is_alone:
            llama_cpp.llama_memory_clear(self._memory, False)
        else:
            llama_cpp.llama_memory_seq_rm(self._memory, self._seq_id, -1, -1)

    def behaves(self) -> bool:
        """Return whether this memory, which must not be empty, behaves as its kind does."""
        self._require_blocks()
        sizes = [
            llama_cpp.llama_state_seq_get_size_ext(self._ctx, self._seq_id, flags)
            for flags in (0, _PARTIAL)
        ]
        end = self.end()
        self._lend(0, end)
        can_go_back = llama_cpp.llama_memory_seq_rm(self._memory, self._scratch, end - 1, -1)
        self._free_scratch()
        kind = self._kind
        has_two_parts = kind.has_attention and not kind.is_plain
        return has_two_parts == (sizes[1] < sizes[0]) and kind.is_recurrent != bool(can_go_back)

    def synchronize(self) -> None:
        """Wait until decodes that are still running, on a GPU, are complete."""
        llama_cpp.llama_synchronize(self._ctx)

    def branch_from(self, source: Sequence, n_tokens: int) -> None:
        """Hold the first `n_tokens` positions of another sequence, in the same cells, and no more.

        The other one must hold them (`holds`), and both must share one pool of cells.
        """
        self._require_blocks()
        self.clear()
        if n_tokens == source.end():
            source._drop_outside_window()
        llama_cpp.llama_memory_seq_cp(self._memory, source._seq_id, self._seq_id, 0, n_tokens)
        if self.end() != n_tokens:
            raise StateError(f"a fork of {n_tokens} positions ends at position {self.end() - 1}")

    def _drop_outside_window(self) -> None:
        """Free the cells of positions that a window has left behind.

        llama.cpp uses such a cell again where it belongs to one sequence; cells that branches
        share would stay for ever. The part of the state that is not full attention holds only the
        window, so reading it and writing it back frees the others.
        """
        # One that is still whole may be kept so on purpose (swa_full); of a hybrid only the
        # recurrent part's position is known.
        has_left = self._kind.is_recurrent or 0 < self._first() < self.end() - self._kind.window
        if not self._kind.window or not has_left:
            return
        self._write_part(self._read_part(self._seq_id))

    def _read_part(self, seq_id: int) -> memoryview:
        """Return the part of a sequence's state that is not full attention."""
        size = int(llama_cpp.llama_state_seq_get_size_ext(self._ctx, seq_id, _PARTIAL))
        part = np.empty(size, np.uint8).data
        written = llama_cpp.llama_state_seq_get_data_ext(
            self._ctx, _pointer(part), size, seq_id, _PARTIAL
        )
        if written != size:
            raise StateError(f"llama.cpp wrote {written} of {size} bytes")
        return part

    def _write_part(self, part: memoryview) -> None:
        read = llama_cpp.llama_state_seq_set_data_ext(
            self._ctx, _pointer(part), part.nbytes, self._seq_id, _PARTIAL
        )
        if read != part.nbytes:
            raise StateError(f"llama.cpp took {read} of {part.nbytes} bytes")

    # Blocks

    def _require_blocks(self) -> None:
        if not self.has_blocks:
            raise StateError(
                "blocks need a context with kv_unified=True and n_seq_max of at least "
                f"{self._scratch + 1}; this one has n_seq_max="
                f"{llama_cpp.llama_n_seq_max(self._ctx)}"
            )

    def block_bytes(self, start: int, stop: int) -> int:
        """Return the size of the state of positions [start, stop).

        It depends on their number alone, so llama.cpp computes it once for each number.
        """
        n_tokens = stop - start
        if n_tokens not in self._sizes:
            self._require_blocks()
            self._lend(start, stop)
            size = int(llama_cpp.llama_state_seq_get_size(self._ctx, self._scratch))
            self._free_scratch()
            self._sizes[n_tokens] = size
        return self._sizes[n_tokens]

    def read_block(self, start: int, stop: int, buffer: memoryview) -> None:
        """Copy the state of positions [start, stop) into a buffer of exactly its size.

        Of a recurrent memory that is the present state, and `stop` must be its end.
        """
        self._require_blocks()
        self._lend(start, stop)
        try:
            self._require_span(start, stop)
            written = llama_cpp.llama_state_seq_get_data(
                self._ctx, _pointer(buffer), buffer.nbytes, self._scratch
            )
        finally:
            self._free_scratch()
        if written != buffer.nbytes:
            raise StateError(f"block [{start}, {stop}) has {written} bytes, not {buffer.nbytes}")

    def write_block(self, start: int, stop: int, buffer: memoryview) -> None:
        """Set positions [start, stop), the next of this sequence, from the bytes of `read_block`.

        Without attention the sequence has one state, and it is replaced.
        """
        self._require_blocks()
        if self._kind.has_attention and self.end() != start:
            raise StateError(f"block [{start}, {stop}) can't follow position {self.end() - 1}")
        self._load_scratch(start, stop, buffer)
        llama_cpp.llama_memory_seq_cp(self._memory, self._scratch, self._seq_id, start, stop)
        self._free_scratch()
        if self.end() != stop:
            raise StateError(f"block [{start}, {stop}) ends at position {self.end() - 1}")

    def can_go_back(self) -> bool:
        """Return whether `go_back` works here: the rest of the state is full attention."""
        kind = self._kind
        return self.has_blocks and kind.is_recurrent and kind.has_attention and not kind.window

    def go_back(self, start: int, stop: int, buffer: memoryview) -> None:
        """Hold the first `stop` of the present positions, given the bytes of [start, stop).

        A recurrent state can't be cut: the one after `stop` positions comes from the bytes. The
        rows of attention stay in their cells, so the cost does not depend on how many there are.

        Errors: StateError; the positions of the sequence are then undefined: clear it.
        """
        self._require_blocks()
        if stop >= self.end():
            raise StateError(f"position {stop} is not before the end, {self.end()}")
        self._load_scratch(start, stop, buffer)
        try:
            part = self._read_part(self._scratch)
        finally:
            self._free_scratch()
        self._write_part(part)
        is_cut = llama_cpp.llama_memory_seq_rm(self._memory, self._seq_id, stop, -1)
        if not is_cut or not self.is_at(stop):
            raise StateError(f"going back to position {stop} ends at position {self.end() - 1}")

    def _load_scratch(self, start: int, stop: int, buffer: memoryview) -> None:
        read = llama_cpp.llama_state_seq_set_data(
            self._ctx, _pointer(buffer), buffer.nbytes, self._scratch
        )
        try:
            if read != buffer.nbytes:
                raise StateError(f"llama.cpp took {read} of a block's {buffer.nbytes} bytes")  # noqa: TRY301
            self._require_span(start, stop)
        except StateError:
            self._free_scratch()
            raise

    def _lend(self, start: int, stop: int) -> None:
        self._free_scratch()
        llama_cpp.llama_memory_seq_cp(self._memory, self._seq_id, self._scratch, start, stop)

    def _free_scratch(self) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)

    def _require_span(self, start: int, stop: int) -> None:
        first = llama_cpp.llama_memory_seq_pos_min(self._memory, self._scratch)
        last = llama_cpp.llama_memory_seq_pos_max(self._memory, self._scratch)
        if (first, last) != (stop - 1 if self._kind.is_recurrent else start, stop - 1):
            raise StateError(f"positions {first} to {last} came for block [{start}, {stop})")

    # Snapshots

    def is_movable(self) -> bool:
        """Return whether a snapshot puts every position into the cell where it was."""
        window = self._kind.window
        return not window or self.end() <= window or len(self._spans()) > 1

    def _spans(self) -> list[tuple[int, int]]:
        """Return the positions of each part of a snapshot.

        A window that has dropped nothing is read in parts no longer than it is: each then goes back
        to its cells.
        """
        end, step = self.end(), self._kind.window
        is_windowed = step and not self._kind.is_recurrent and self.has_blocks
        if not is_windowed or end <= step or self._first() > 0:
            return [(0, end)]
        return [(start, min(start + step, end)) for start in range(0, end, step)]

    def snapshot(self) -> list[memoryview]:
        """Return the state of the whole sequence, in parts."""
        spans = self._spans()
        if len(spans) == 1:
            size = int(llama_cpp.llama_state_seq_get_size(self._ctx, self._seq_id))
            buffer = np.empty(size, np.uint8).data
            written = llama_cpp.llama_state_seq_get_data(
                self._ctx, _pointer(buffer), size, self._seq_id
            )
            if written != size:
                raise StateError(f"a snapshot has {written} bytes, not {size}")
            return [buffer]
        parts = []
        for start, stop in spans:
            parts.append(np.empty(self.block_bytes(start, stop), np.uint8).data)
            self.read_block(start, stop, parts[-1])
        return parts

    def load_snapshot(self, parts: list[memoryview], n_tokens: int) -> None:
        """Put the sequence back to the `n_tokens` positions that it held at a snapshot.

        Errors: StateError; the sequence is then empty.
        """
        self.clear()
        try:
            if len(parts) == 1:
                whole = parts[0]
                read = llama_cpp.llama_state_seq_set_data(
                    self._ctx, _pointer(whole), whole.nbytes, self._seq_id
                )
                if read != whole.nbytes:
                    raise StateError(f"llama.cpp took {read} of a snapshot's {whole.nbytes} bytes")  # noqa: TRY301
            else:
                step = self._kind.window
                for start, part in zip(range(0, n_tokens, step), parts, strict=True):
                    self.write_block(start, min(start + step, n_tokens), part)
            if not self.is_at(n_tokens):
                raise StateError(f"a snapshot of {n_tokens} positions ends at {self.end()}")  # noqa: TRY301
        except StateError:
            self.clear()
            raise
