"""The tiers below memory: their protocol, and the names that they have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from tokcache.errors import StateRefused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from tokcache.state.names import Kind, RootKey
    from tokcache.stats import TierStats

BROKEN = frozenset({"damaged", "forged", "missing"})
"""Reasons for which a stored state is removed, because no reader can use it."""


class Address(NamedTuple):
    """The place of a state in a tier.

    A block is addressed by values that are known before the block is: `position`, where it starts;
    `base`, the name of the prefix before it; `slot`, the name of `base` and of as many of its first
    tokens as tell two blocks apart that follow `base`. That is the index of a block's children, in
    any tier, for any process. For a snapshot `position` is its number of tokens, `base` the name of
    its root, `slot` its own name.
    """

    root_key: RootKey
    position: int
    base: bytes
    slot: bytes


@dataclass(frozen=True, slots=True)
class Record:
    """The fields stored with a payload.

    Shapes: `tokens` int32 in native order: a block's own, or all of a snapshot's prefix.
    """

    name: bytes
    tokens: bytes
    n_past: int = 0
    priority: int = 0


class Stored(ABC):
    """A payload that a tier found; use it in a `with`, which removes it if it is damaged.

    Errors: StateRefused where the bytes differ from those that were stored.
    """

    record: Record
    n_bytes: int

    @abstractmethod
    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of `n_bytes` with the verified payload."""

    @abstractmethod
    def view(self) -> memoryview:
        """Return the payload, verified and read-only, in no memory of this process if possible."""

    @abstractmethod
    def discard(self) -> None:
        """Remove the state from its tier, unless another one has taken its place."""

    @abstractmethod
    def close(self) -> None:
        """Release its resources; a view stays valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, StateRefused) and str(error) in BROKEN:
            self.discard()
        self.close()


class Tier(Protocol):
    """A store of states below memory, shared with other processes.

    `is_mapped`: views of found states take no memory of this process.

    Errors: any failure costs a miss and a counter by reason; only `check`, and `read_into` and
            `view` of a found state, raise.
    Threads: safe; after a fork, too.
    """

    label: str
    is_mapped: bool

    def check(self) -> None:
        """Raise if states can't be read from or written to the tier now.

        Errors: TierUnavailable; the message has the cause and the cure.
        """

    def find_each(self, wanted: Iterable[tuple[Address, bytes]]) -> Iterator[Stored | None]:
        """Yield the state at each address, in order, and end early where a tier does not answer.

        Of several blocks at one address it is the one that shares most with the tokens given with
        the address. A remote tier asks for several at once; states that the caller does not take
        from the iterator are not counted.
        """

    def lengths(self, root_key: RootKey) -> set[int]:
        """Return the numbers of tokens of the snapshots with this root key."""

    def write(self, address: Address, record: Record, payload: memoryview) -> bool:
        """Store a payload; True if it is there now."""

    def touch(self, addresses: Sequence[Address]) -> list[int]:
        """Note that these are in use; return the indices in `addresses` of those that are gone."""

    def pin(self, addresses: Sequence[Address], *, is_pinned: bool) -> None:
        """Keep these after all others, and from expiring, or no longer; those that are there.

        A tier whose server decides about evictions ignores it.
        """

    def remove(self, address: Address) -> None:
        """Remove one state."""

    def name_model(self, fingerprint: bytes, name: str) -> None:
        """Note a model's name, for those who list states; a tier without a listing ignores it."""

    def clear(self, *, scope: str | None = None) -> int:
        """Remove all states of a scope, by default everything; return the states removed."""

    def refuse(self, reason: str) -> None:
        """Count a state that was not stored or not used."""

    def stats(self) -> TierStats:
        """Return the counters and the bytes held."""

    def close(self) -> None:
        """Release resources; stored states stay."""


def is_in_place(held: Record, new: Record, kind: Kind) -> bool | None:
    """Return whether `held` serves in the place of `new`; None if each needs a place of its own.

    False: `new` takes the place of `held`. Of snapshots of the same tokens the one of the higher
    priority stays. Blocks that followed a replaced block follow a point in the longer one.
    """
    if kind == "snapshot" and held.tokens == new.tokens:
        return held.priority > new.priority
    if held.tokens.startswith(new.tokens):
        return True
    return False if new.tokens.startswith(held.tokens) else None
