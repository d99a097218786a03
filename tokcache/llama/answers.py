"""Answers: the ids that a model generated, to take the place of those of their text in a prompt.

A text has many encodings, and a model that samples does not always choose that of its tokenizer.
So the ids of a chat's next prompt part from the held ones inside the last answer. `splice` puts
the generated ids back, where that changes no byte of the prompt's text:

1. The prompt's ids before the answer are those that the answer was generated after.
2. The bytes of the generated ids are those of the prompt's ids up to its next added token. So the
   rest of the prompt begins with an added token: it was encoded alone, and keeps its ids.
3. No generated id is an added token, and the answer does not end within a character.

An answer whose text was trimmed, cut by a stop text, or edited fails the second condition.

Answers are kept by scope, by the number of ids before them, and by a keyed digest of these ids.
Two beginnings with one digest would not change a text, because its bytes are compared.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakSet

import numpy as np
from cachetools import LRUCache

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable

    from numpy.typing import NDArray

    Ids = NDArray[np.int32]
    Key = tuple[Hashable, int, bytes]
    _Base = LRUCache[Key, tuple[NDArray[np.int32], ...]]
else:
    _Base = LRUCache

MAX_BYTES = 4 << 20  # about 1,700 answers of 500 tokens
_MAX_ALTERNATIVES = 8  # answers to one prompt
_OVERHEAD_BYTES = 400  # of an answer: its key, its array and their places in two tables
_MAX_WAITING = 256


class Operation(Protocol):
    """An operation that becomes void when its scope is cleared."""

    @property
    def is_void(self) -> bool:
        """Whether the scope was cleared since the operation began."""


class Added(NamedTuple):
    """Which ids are added tokens, by id.

    `alone`: the tokenizer finds the token in a text before it encodes the rest. `any`: that, or
    the model counts it as a control token.
    """

    alone: NDArray[np.bool_]
    any: NDArray[np.bool_]


class Splice(NamedTuple):
    """The ids of a prompt after splicing.

    `refusal` is the code of the first reason for which an answer kept the ids of its text.

    Units: `n_spliced` generated ids took the place of others.
    """

    ids: Ids
    n_spliced: int = 0
    refusal: str = ""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Begun:
    """An answer that is being generated; void once its scope was cleared."""

    key: Key
    work: Operation | None
    is_cleared: bool = False

    @property
    def is_void(self) -> bool:
        """Whether the scope was cleared since the generation began."""
        return self.is_cleared or (self.work is not None and self.work.is_void)


class Answers:
    """The generated ids of the last answers, within a budget of bytes; the least used go first.

    A scope may be any hashable value. Answers of one scope are never spliced into another's prompt.

    Threads: safe. `remember` takes no lock, so that the garbage collector may call it.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self.reset()

    def reset(self) -> None:
        """Forget everything, in the child of a fork as well."""
        self._lock = Lock()
        self._secret = secrets.token_bytes(32)
        self._kept = _Kept(self._max_bytes)
        self._works: dict[Hashable, Operation] = {}
        # Answers that no call has stored yet.
        self._waiting: deque[tuple[Begun, Ids]] = deque(maxlen=_MAX_WAITING)
        self._begun: WeakSet[Begun] = WeakSet()

    def begin(self, scope: Hashable, prompt: Ids, work: Operation | None = None) -> Begun:
        """Note that the answer to a prompt is about to be generated.

        `work` becomes void if the scope is cleared in another place than here.
        """
        begun = Begun((scope, len(prompt), self._digest(prompt).digest()), work)
        with self._lock:
            self._begun.add(begun)
        return begun

    def remember(self, begun: Begun, answer: Ids) -> None:
        """Remember the ids of an answer, without the token that ended it."""
        if len(answer):
            self._waiting.append((begun, answer))

    def clear(self, is_doomed: Callable[[Any], bool] = lambda _: True) -> None:
        """Forget the answers of these scopes, those that are being generated too."""
        with self._lock:
            for begun in self._begun:
                begun.is_cleared |= is_doomed(begun.key[0])
            self._store_waiting()
            self._drop(is_doomed)

    def _drop(self, is_doomed: Callable[[Any], bool]) -> None:
        for key in [key for key in self._kept if is_doomed(key[0])]:
            del self._kept[key]
        for scope in [scope for scope in self._works if is_doomed(scope)]:
            del self._works[scope]

    def __len__(self) -> int:
        """Return how many answers are remembered."""
        with self._lock:
            self._store_waiting()
            return sum(map(len, self._kept.values()))

    @property
    def n_bytes(self) -> int:
        """How many bytes the remembered answers take."""
        with self._lock:
            self._store_waiting()
            return int(self._kept.currsize)

    def splice(
        self, scope: Hashable, ids: Ids, added: Added
    ) -> Generator[Ids, bytes | None, Splice]:
        """Return the ids of a prompt with the generated ids of its answers.

        It yields ids and is sent their bytes, None if these are not known exactly.

        Cost: a pass over the ids, and a digest for each different length of the remembered prompts.
        """
        with self._lock:
            self._store_waiting()
            lengths = sorted(self._kept.lengths.get(scope, ()))
        n_spliced, end, refusal, is_any = 0, 0, "", False
        digest, n_digested = self._digest(ids[:0]), 0
        for start in lengths:
            if start >= len(ids):
                break
            if start < end:  # inside an answer that is in its place
                continue
            digest.update(np.ascontiguousarray(ids[n_digested:start]).data)
            n_digested = start
            with self._lock:
                answers = self._kept.get((scope, start, digest.copy().digest()), ())
            if not answers:
                continue
            is_any = True
            answer, stop, why = yield from _fitting(answers, ids, start, added)
            if answer is None:
                refusal = refusal or why
                continue
            if not np.array_equal(ids[start:stop], answer):
                n_spliced += len(answer)
                ids = np.concatenate((ids[:start], answer, ids[stop:]))
            end = start + len(answer)
        return Splice(ids, n_spliced, refusal if is_any else "splice_no_answer")

    def _digest(self, ids: Ids) -> blake2b:
        data = np.ascontiguousarray(ids, np.int32)
        return blake2b(data.data, digest_size=16, key=self._secret)

    def _store_waiting(self) -> None:
        """Store the answers that wait, after dropping those whose scopes were cleared."""
        cleared = {scope for scope, work in self._works.items() if work.is_void}
        if cleared:
            self._drop(cleared.__contains__)
        while self._waiting:
            begun, answer = self._waiting.popleft()
            key = begun.key
            if begun.is_void:
                continue
            if begun.work is not None:
                self._works.setdefault(key[0], begun.work)
            others = [each for each in self._kept.get(key, ()) if not np.array_equal(each, answer)]
            answers = (*others[1 - _MAX_ALTERNATIVES :], answer)
            if _n_bytes(answers) > self._max_bytes:
                answers = (answer,)
            if _n_bytes(answers) <= self._max_bytes:
                self._kept[key] = answers


class _Kept(_Base):
    """The answers to each prompt, the newest last, and the lengths of the prompts of each scope."""

    def __init__(self, max_bytes: int) -> None:
        self.lengths: dict[Hashable, Counter[int]] = {}
        super().__init__(max_bytes, getsizeof=_n_bytes)

    def __setitem__(self, key: Key, answers: tuple[Ids, ...]) -> None:
        if key in self:  # else it might be evicted to make room for itself
            del self[key]
        self.lengths.setdefault(key[0], Counter())[key[1]] += 1
        super().__setitem__(key, answers)

    def __delitem__(self, key: Key) -> None:
        super().__delitem__(key)
        scope, length, _ = key
        lengths = self.lengths[scope]
        lengths[length] -= 1
        if not lengths[length]:
            del lengths[length]
        if not lengths:
            del self.lengths[scope]


def _n_bytes(answers: tuple[Ids, ...]) -> int:
    return sum(each.nbytes + _OVERHEAD_BYTES for each in answers)


def _fitting(
    answers: tuple[Ids, ...], ids: Ids, start: int, added: Added
) -> Generator[Ids, bytes | None, tuple[Ids | None, int, str]]:
    """Return the newest answer with the text at `start`, and where that text ends.

    Without one: None, and why the newest answer is not spliced there.
    """
    ends = np.flatnonzero(_are(added.any, ids[start:], unknown=True))
    stop = start + int(ends[0]) if len(ends) else len(ids)
    is_followed = bool(_are(added.alone, ids[stop : stop + 1], unknown=False).any())
    text, first = ((yield ids[start:stop]) if stop > start else b""), ""
    for answer in reversed(answers):
        has_added = bool(_are(added.any, answer, unknown=True).any())
        own = None if has_added else (yield answer)
        if has_added:
            why = "splice_added_token"
        elif own is None or text is None or own.decode(errors="replace").encode() != own:
            why = "splice_partial_character"
        elif own == text and is_followed:
            return answer, stop, ""
        elif text.startswith(own):
            why = "splice_no_added_token_follows"
        elif text and text in own:
            why = "splice_trimmed"
        else:
            why = "splice_other_text"
        first = first or why
    return None, start, first


def _are(table: NDArray[np.bool_], ids: Ids, *, unknown: bool) -> NDArray[np.bool_]:
    """Return the table's value for each id, `unknown` for those outside of it."""
    is_known = (ids >= 0) & (ids < len(table))
    return np.where(is_known, table[np.where(is_known, ids, 0)], unknown)
