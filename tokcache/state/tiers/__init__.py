"""Where the bytes of states are kept below memory; every such tier has one face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from tokcache.state.names import Kind, Owner
    from tokcache.stats import TierStats


class Address(NamedTuple):
    """Where a tier keeps a state.

    A block is addressed by what a prompt tells before the block is known: `position`, where it
    starts; `base`, the name of the prefix before it; `slot`, the name of `base` and of the first
    of its tokens, as many as tell two blocks that follow `base` apart. That is the index of a
    block's children, in any tier, for any process. For the state of a whole prefix `position` is
    its number of tokens, `base` its owner's root, `slot` its name.
    """

    owner: Owner
    position: int
    base: bytes
    slot: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """The fields stored with a payload.

    Shapes: `tokens` int32 in native order: a block's own, or all of a whole prefix.
    """

    name: bytes
    tokens: bytes
    n_past: int = 0
    priority: int = 0


class Stored(Protocol):
    """A payload that a tier found; open until it is closed.

    Errors: StateRefused where the bytes are not those that were stored.
    """

    record: Record
    n_bytes: int

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of `n_bytes` with the verified payload."""

    def view(self) -> memoryview:
        """Return the payload, verified and read-only, in no memory of this process if possible."""

    def __enter__(self) -> Self:
        """Keep it open."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""


class LowerTier(Protocol):
    """A store of states below memory, shared with other processes.

    `is_mapped`: views of found states take no memory of this process.

    Errors: whatever goes wrong costs a miss and a counter by reason; only `read_into` and `view`
            of a found state raise.
    Threads: safe; after a fork, too.
    """

    label: str
    is_mapped: bool

    def find_each(self, wanted: Iterable[tuple[Address, bytes]]) -> Iterator[Stored | None]:
        """Yield the state at each address, in order, until that can't be known.

        Of several blocks in one place it is the one that shares most with the tokens given with
        the address. A tier that is far away asks for several at once; states that nobody takes from
        the iterator are not counted.
        """

    def lengths(self, owner: Owner) -> set[int]:
        """Return the numbers of tokens of this owner's snapshots."""

    def write(self, address: Address, record: Record, payload: memoryview) -> bool:
        """Store a payload; True if it is there now."""

    def touch(self, addresses: Sequence[Address]) -> list[int]:
        """Note that these are in use; return the places in `addresses` of those that are gone."""

    def remove(self, address: Address) -> None:
        """Remove one state."""

    def clear(self, *, scope: str | None = None) -> int:
        """Remove all states of a scope, by default everything; return how many went."""

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""

    def stats(self) -> TierStats:
        """Return the counters and the states held."""

    def close(self) -> None:
        """Release resources; stored states stay."""


def is_in_place(held: Record, new: Record, kind: Kind) -> bool | None:
    """Return whether `held` serves in the place of `new`; None if both need one of their own.

    False: `new` is to take the place of `held`. Of snapshots of the same tokens the one of the
    higher priority stays. Blocks that followed a replaced block follow a point in the longer one.
    """
    if kind == "snapshot" and held.tokens == new.tokens:
        return held.priority > new.priority
    if held.tokens.startswith(new.tokens):
        return True
    return False if new.tokens.startswith(held.tokens) else None
