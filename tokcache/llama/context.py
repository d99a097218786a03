"""ContextRecord: which tokens a llama.cpp context holds, and how each position was written.

llama.cpp keeps states, but not the tokens that they come from. The record keeps the tokens and
three claims about the first positions of the context:

    0 <= n_aligned <= n_known <= n_tokens

1. `n_tokens`: positions that the context holds. `ids` has their tokens, or UNKNOWN where something
   other than a token wrote the position (an image).
2. `n_known`: positions that were written by a decode of exactly these tokens, for one scope, or by
   a restore. Only their state may be stored.
3. `n_aligned`: positions that were decoded in pieces that end at multiples of `block_tokens`.
   Reproducible mode reuses only these.

`batches` has the starts of the decodes after `n_aligned`; `logits_from` is the start of the decode
whose logits can be sampled from, None if the next sample needs a decode.

llama_cpp.Llama and its chat handlers assign `n_tokens`, too. Between `update_begins` and the method
that ends the update (`decoded`, `decode_failed`, `loaded`) an assignment belongs to the update. Any
other assignment comes from outside (`assigned`); the positions that it adds are not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tokcache.state.handles import Work

UNKNOWN = -1  # no token has this id
MIXED: Any = object()  # the scope of tokens that were decoded for several scopes; equals no scope


class Alignment(NamedTuple):
    """The settings that decide where a prompt is split; `n_aligned` counts under these."""

    is_reproducible: bool
    block_tokens: int


@dataclass(frozen=True, slots=True)
class RecordCopy:
    """The record at one moment, for a generation that is resumed later."""

    ids: NDArray[np.int32]
    n_known: int
    n_aligned: int
    alignment: Alignment
    batches: tuple[int, ...]
    logits_from: int | None
    n_prompt: int
    stops: tuple[int, ...]
    n_opening: int
    scope: Any
    work: Work | None
    has_unsaved: bool


class ContextRecord:
    """The record of one context; see the module for its claims.

    Attributes are to be read. Only the methods change them, one for each event in the context.

    Units:   positions, which are tokens; `n_prompt` is the length of the present prompt, `stops` is
             where its decode stops for a save that can't be made later, and its first `n_opening`
             tokens tell its conversation from others, 0 if that is not known.
    Threads: the context's: one at a time.
    """

    def __init__(self, scope: str | None, alignment: Alignment) -> None:
        self.ids: NDArray[np.int32] = np.empty(0, np.int32)  # llama_cpp assigns one of n_ctx ids
        self.n_tokens = self.n_known = self.n_aligned = 0
        self.alignment = alignment
        self.batches: list[int] = []
        self.logits_from: int | None = None
        self.n_prompt = self.n_opening = 0
        self.stops: tuple[int, ...] = ()
        self.scope: Any = scope  # None, a name or MIXED
        self.work: Work | None = None  # void once that scope was cleared
        self.has_unsaved = False  # whether some states could not be stored yet
        self._update_from: int | None = None  # where the update under way began

    # Questions

    @property
    def held(self) -> NDArray[np.int32]:
        """The ids of all positions; a view."""
        return self.ids[: self.n_tokens]

    @property
    def n_savable(self) -> int:
        """How many positions have a state that may be stored."""
        return self.n_aligned if self.alignment.is_reproducible else self.n_known

    @property
    def is_cleared(self) -> bool:
        """Whether the scope of the held positions was cleared since they were decoded."""
        return self.work is not None and self.work.is_void

    @property
    def is_repeatable(self) -> bool:
        """Whether `n_aligned` and `batches` tell how every position was decoded."""
        first = self.batches[0] if self.batches else self.n_tokens
        return self.n_known == self.n_tokens and first == self.n_aligned

    def may_hold(self, scope: str | None) -> bool:
        """Return whether tokens of `scope` may be among the held ones."""
        return self.scope is MIXED or self.scope == scope

    def holds_prompt(self, ids: NDArray[np.int32]) -> bool:
        """Return whether the context holds this prompt, nothing more, and its logits."""
        return self.logits_from is not None and np.array_equal(self.held, ids)

    # Decodes and other updates

    def tokens_begin(self, scope: str | None) -> None:
        """Note that tokens are about to be decoded for `scope`, after the held ones.

        Tokens of two scopes in one context belong to neither: nothing of them is stored or reused.
        """
        if not self.n_tokens:
            if scope != self.scope:
                self.scope, self.work = scope, None
        elif self.scope != scope:
            self.scope, self.n_known, self.n_aligned = MIXED, 0, 0

    def update_begins(self) -> None:
        """Note that an update begins; it owns assignments of `n_tokens` until a method ends it."""
        self._update_from = self.n_tokens

    def decoded(self, n_batch: int) -> None:
        """Note that a decode of at most `n_batch` tokens is complete."""
        start, stop = self._end_update(), self.n_tokens
        if self.n_known == start:
            self.n_known = stop
        self.batches.append(start)
        self.logits_from = start
        # A block is aligned if it was decoded as one, in batches of n_batch from its start.
        first, n_block = self.n_aligned, self.alignment.block_tokens
        if (
            stop - first == n_block
            and self.n_known == stop
            and self.batches == list(range(first, stop, n_batch))
        ):
            self.n_aligned = stop
            self.batches.clear()

    def decode_failed(self, *, is_rest_intact: bool) -> None:
        """Note that a decode failed: positions before it are intact, or the context is empty."""
        start = self._end_update()
        self.logits_from = None
        if is_rest_intact:
            self.n_tokens = start
        else:
            self.reset()

    def loaded(self, scope: str | None) -> None:
        """Note that a state from outside replaced the whole context, and `ids` with it."""
        self._end_update()
        self.n_known = self.n_aligned = 0
        self.batches.clear()
        self.logits_from = None
        self.scope, self.work, self.has_unsaved = scope, None, False

    def _end_update(self) -> int:
        start = self.n_tokens if self._update_from is None else self._update_from
        self._update_from = None
        return start

    # Changes other than decodes

    def assigned(self, n_tokens: int, *, is_intact: bool) -> None:
        """Note that llama_cpp, a chat handler or a caller assigned `n_tokens`.

        `is_intact`: the first `n_tokens` positions have not changed.
        """
        if self._update_from is not None:
            self.n_tokens = n_tokens
        elif n_tokens > self.n_tokens:
            # Something else wrote these positions, an image for example. The ids that lay there
            # belong to an earlier prompt, and must not match one.
            self.ids[self.n_tokens : n_tokens] = UNKNOWN
            self.n_tokens = n_tokens
        else:
            self._shorten(n_tokens, is_intact=is_intact)

    def trimmed(self, n_tokens: int) -> None:
        """Note that the positions from `n_tokens` on were removed, and the others are intact."""
        self._shorten(n_tokens, is_intact=True)

    def reset(self) -> None:
        """Note that all positions were removed."""
        self._shorten(0, is_intact=True)
        self.logits_from = self._update_from = None

    def _shorten(self, n_tokens: int, *, is_intact: bool) -> None:
        if n_tokens < self.n_tokens:
            self.logits_from = None  # they belong to a position that was removed
        if is_intact:
            # If a batch was cut, the batches no longer tell how the positions were decoded.
            is_cut = n_tokens < self.n_tokens and n_tokens not in self.batches
            self.batches = [] if is_cut else [at for at in self.batches if at < n_tokens]
            self.n_known = min(self.n_known, n_tokens)
        else:
            self.batches, self.n_known = [], 0
        n_block = self.alignment.block_tokens
        self.n_aligned = min(self.n_aligned, self.n_known) // n_block * n_block
        self.n_tokens = n_tokens
        self.has_unsaved &= n_tokens > 0

    def restored(self, start: int, ids: NDArray[np.int32]) -> None:
        """Note that positions from `start` on were loaded, and the context now holds just `ids`."""
        stop = len(ids)
        self.ids[start:stop] = ids[start:]
        self.n_tokens = stop
        self.n_known = stop if self.n_known >= start else min(self.n_known, stop)
        is_reproducible, n_block = self.alignment
        is_aligned = is_reproducible and self.n_aligned >= start and self.n_known == stop
        self.n_aligned = stop // n_block * n_block if is_aligned else 0
        self.batches.clear()
        self.logits_from, self.has_unsaved = None, False

    # Requests

    def prompt_begins(self, scope: str | None, work: Work | None, n_prompt: int) -> None:
        """Note that a prompt of `n_prompt` tokens begins, of which the held positions are a prefix.

        Until its first decode there are no logits.
        """
        self.request_begins(scope, work)
        self.n_prompt, self.logits_from = n_prompt, None
        self.stops, self.n_opening = (), 0

    def stops_at(self, stops: tuple[int, ...], n_opening: int) -> None:
        """Note where the decode of the present prompt stops, and how its conversation begins."""
        self.stops, self.n_opening = stops, n_opening

    def request_begins(self, scope: str | None, work: Work | None) -> None:
        """Note that the held positions, and those that follow, serve a request of `scope`."""
        self.scope, self.work = scope, work

    def saved(self, *, has_unsaved: bool) -> None:
        """Note that states were stored; `has_unsaved`: some could not be stored yet."""
        self.has_unsaved = has_unsaved

    def realigned(self, alignment: Alignment, *, is_other_cache: bool = False) -> None:
        """Note that prompts are split elsewhere from now on: no position counts as aligned.

        `is_other_cache`: the prefix cache in which the work was begun is not used any more.
        """
        self.alignment, self.n_aligned = alignment, 0
        if is_other_cache:
            self.work = None

    # Generations that are suspended

    def copy(self) -> RecordCopy:
        """Return a copy for `resumed`."""
        return RecordCopy(
            ids=self.held.copy(),
            n_known=self.n_known,
            n_aligned=self.n_aligned,
            alignment=self.alignment,
            batches=tuple(self.batches),
            logits_from=self.logits_from,
            n_prompt=self.n_prompt,
            stops=self.stops,
            n_opening=self.n_opening,
            scope=self.scope,
            work=self.work,
            has_unsaved=self.has_unsaved,
        )

    def resumed(self, copy: RecordCopy) -> None:
        """Note that the context holds again the positions that it held when `copy` was made."""
        n_tokens = len(copy.ids)
        self.ids[:n_tokens] = copy.ids
        self.n_tokens, self.n_known = n_tokens, copy.n_known
        self.n_aligned = copy.n_aligned if copy.alignment == self.alignment else 0
        self.batches, self.logits_from = list(copy.batches), copy.logits_from
        self.n_prompt, self.has_unsaved = copy.n_prompt, copy.has_unsaved
        self.stops, self.n_opening = copy.stops, copy.n_opening
        self.scope, self.work = copy.scope, copy.work
        self._update_from = None

    def _check(self) -> None:
        """Raise AssertionError if a claim contradicts another; between two updates."""
        if not 0 <= self.n_aligned <= self.n_known <= self.n_tokens <= len(self.ids):
            raise AssertionError("the claims do not nest")
        if self.n_aligned % self.alignment.block_tokens:
            raise AssertionError("the aligned positions end inside a block")
        if (self.ids[: self.n_known] == UNKNOWN).any():
            raise AssertionError("a position that no token wrote is known")
        if self.batches != sorted(set(self.batches)):
            raise AssertionError("batches are not in order")
        if not all(self.n_aligned <= start < self.n_tokens for start in self.batches):
            raise AssertionError("a batch begins among the aligned positions, or after all")
        if self.logits_from is not None and not 0 <= self.logits_from < self.n_tokens:
            raise AssertionError("the logits are of a position that is not held")
        if self.scope is MIXED and self.n_known:
            raise AssertionError("tokens of several scopes are known")
        if self._update_from is not None:
            raise AssertionError("an update has not ended")


def n_shared(left: NDArray[np.int32], right: NDArray[np.int32]) -> int:
    """Return how many leading ids are equal and known."""
    n = min(len(left), len(right))
    differs = (left[:n] != right[:n]) | (left[:n] == UNKNOWN)
    return int(differs.argmax()) if differs.any() else n
