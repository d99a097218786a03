"""The saved slots of one server: the tokens that each file holds, and the choice of evictions.

A file's name is a keyed digest of its contents. Nobody can guess a name, and two clients, which may
use different models, never share one. If the slot folder can be reached, an evicted file is
deleted, and the files of earlier clients go first. If it can't be reached, new files take the names
of evicted ones first, so the folder stops growing, and the counters report the bytes in it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from tokcache._disk_budget import DiskBudget
from tokcache._prefix import n_common
from tokcache.llama.server.checkpoints import ANY_DISTANCE, NO_GAP, Gap, distance
from tokcache.llama.server.folder import DIGEST_BYTES, PREFIX, SUFFIX, Folder
from tokcache.llama.server.namespaces import adapters_of, scope_of
from tokcache.llama.server.removals import SlotRemovals
from tokcache.llama.server.trust import ANSWER, PROMPT, WHOLE

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from tokcache.llama.server.results import SlotFile
    from tokcache.llama.server.trust import Trust
    from tokcache.text.token_ids import TokenIds

_SWEEP_EVERY_S = 60.0
_MAX_LOOKED_AT = 16  # files of a namespace that share no whole step with a prompt


@dataclass(eq=False, slots=True)
class SavedSlot:
    """One file.

    `is_whole_only`: the file lacks the checkpoints that the server needs to use a part of it.

    Units: the file holds `n_saved` tokens, of which `tokens` are known; the first `n_prompt` belong
           to a prompt.
    """

    name: str
    namespace: bytes
    tokens: TokenIds
    n_prompt: int
    n_saved: int
    n_bytes: int
    conversation: str | None
    used_at: float = field(default_factory=time.monotonic)
    n_uses: int = 0
    is_pinned: bool = False
    n_readers: int = 0
    is_whole_only: bool = False
    gap: Gap = NO_GAP
    ends: tuple[int, ...] = ()
    chain: tuple[bytes, ...] = field(default=())

    def match(
        self, prompt: TokenIds, kinds: frozenset[str], too_far: int = ANY_DISTANCE
    ) -> Found | None:
        """Return how `prompt` continues this file, None if that is not among `kinds`.

        A prompt that differs `too_far` from a checkpoint of the file does not continue it. The
        last token of a prompt is always decoded, to get its logits.
        """
        n_same = n_common(self.tokens, prompt)
        n_tokens = min(n_same, len(prompt) - 1)
        # A file with unknown tokens after the known ones is never continued as a whole.
        if n_tokens == len(self.tokens) == self.n_saved:
            kind = WHOLE
        else:
            kind = ANSWER if n_same >= self.n_prompt else PROMPT
        is_usable = kind in kinds and n_tokens not in self.gap
        is_usable &= kind == WHOLE or not self.is_whole_only
        is_usable &= kind != PROMPT or distance(n_tokens, self.ends) < too_far
        return Found(self, n_tokens, kind) if n_tokens > 0 and is_usable else None


@dataclass(frozen=True, slots=True)
class Found:
    """A file that holds a prompt's first `n_tokens`; `kind` is how the prompt continues it."""

    file: SavedSlot
    n_tokens: int
    kind: str


class Shelf:
    """The files of one server, within limits of bytes and age.

    `trust` counts the reasons why a file was not kept or not deleted.

    Units: `max_bytes` of all files, or a share of the disk of `folder`; `max_age_s` since a file
           was last used; prefixes are looked up in steps of `step` tokens, and shorter ones are not
           found.
    Threads: not safe; callers hold the lock of the table of slots.
    """

    def __init__(
        self,
        *,
        max_bytes: int | str,
        max_age_s: float,
        folder: Path | None,
        step: int,
        trust: Trust,
    ) -> None:
        self._step = step
        failed = lambda _: trust.refuse("disk_unreadable")  # noqa: E731
        self._budget = DiskBudget(max_bytes, folder, failed)
        self._max_age_s = max_age_s
        self.folder = Folder(folder, trust)
        self._key = secrets.token_bytes(32)
        self._files: dict[str, SavedSlot] = {}
        self._by_chain: dict[bytes, dict[SavedSlot, None]] = {}
        self._by_namespace: dict[bytes, dict[SavedSlot, None]] = {}
        self.removals = SlotRemovals()
        # Evicted files that could not be deleted, with their bytes.
        self.stale: dict[str, int] = {}
        # Conversations to keep, each with the key of its scope.
        self.pinned: set[tuple[bytes, str]] = set()
        # Files that earlier clients left in the folder, oldest first, and their bytes.
        self._left: dict[str, int] = {}
        self._swept_at = time.monotonic()
        self.n_bytes = 0
        self.n_evictions = 0
        self._trust = trust

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[SavedSlot]:
        return iter(self._files.values())

    def find(
        self,
        namespace: bytes,
        prompt: TokenIds,
        kinds: frozenset[str],
        too_far: int = ANY_DISTANCE,
    ) -> Found | None:
        """Return the file that holds most of `prompt`, its last token excluded.

        `kinds` are the allowed ways to continue a file, `too_far` as in `SavedSlot.match`.

        Cost: O(len(prompt)), and a comparison with each file that shares as much as the best one.
        """
        self._sweep_when_due()
        seen: set[str] = set()
        for link in reversed(self._chain(namespace, prompt)):
            files = [file for file in self._by_chain.get(link, ()) if file.name not in seen]
            seen.update(file.name for file in files)
            found = [match for file in files if (match := file.match(prompt, kinds, too_far))]
            if found:  # files at earlier links share less
                # For equal lengths the smaller file is faster to read.
                return max(found, key=lambda each: (each.n_tokens, -each.file.n_bytes))
        return None

    def nearest(self, namespace: bytes, prompt: TokenIds) -> list[SavedSlot]:
        """Return the files that share most whole steps with `prompt`, usable or not.

        If none shares a step, they are some of the namespace.
        """
        for link in reversed(self._chain(namespace, prompt)):
            if found := self._by_chain.get(link):
                return list(islice(reversed(found), _MAX_LOOKED_AT))
        return list(islice(reversed(self._by_namespace.get(namespace, {})), _MAX_LOOKED_AT))

    def name_for(self, namespace: bytes, tokens: TokenIds, n_held: int) -> str:
        """Return a file name for a slot of `n_held` tokens that starts with `tokens`."""
        if self.stale:
            return self.stale.popitem()[0]
        digest = hashlib.blake2b(key=self._key, digest_size=DIGEST_BYTES)
        digest.update(len(namespace).to_bytes(8, "little") + namespace)
        digest.update(n_held.to_bytes(8, "little"))
        digest.update(memoryview(tokens))
        return f"{PREFIX}{digest.hexdigest()}{SUFFIX}"

    def covers(
        self, namespace: bytes, tokens: TokenIds, n_held: int, *, is_whole_only: bool
    ) -> bool:
        """Return whether some file serves every prompt that a slot of `n_held` tokens serves."""
        chain = self._chain(namespace, tokens)
        return any(
            n_common(tokens, file.tokens) == len(tokens)
            and (
                file.n_saved == n_held
                if is_whole_only
                else file.n_saved >= n_held and not file.is_whole_only and not file.gap
            )
            for file in (self._by_chain.get(chain[-1], ()) if chain else ())
        )

    def make_room(self, n_bytes: int) -> bool:
        """Evict files until `n_bytes` more fit; return whether they fit."""
        n_held = self.n_bytes + sum(self._left.values())
        max_bytes = self._budget.n_bytes(n_held)
        if n_bytes > max_bytes:
            return False
        n_over = n_held + n_bytes - max_bytes
        for name, n_left in list(self._left.items()):
            if n_over <= 0:
                break
            n_over -= n_left
            self._unlink_left(name)
        for file in sorted(self, key=lambda file: (file.is_pinned, file.used_at)):
            if self.n_bytes + n_bytes <= max_bytes:
                break
            if file.n_readers == 0 and not file.is_pinned:
                self.n_evictions += 1
                self.drop(file, "max_bytes")
        return self.n_bytes + n_bytes <= max_bytes

    def add(
        self,
        saved: SlotFile,
        namespace: bytes,
        tokens: TokenIds,
        *,
        n_prompt: int,
        conversation: str | None,
        is_pinned: bool,
        is_superseding: bool,
        gap: Gap = NO_GAP,
        ends: tuple[int, ...] = (),
    ) -> SavedSlot | None:
        """Record a file that was written; drop it and return None if it exceeds the budget."""
        replaced = self._files.get(saved.filename)
        if replaced is not None:
            self._unlist(replaced)
        self.stale.pop(saved.filename, None)
        self._sweep_when_due()
        file = SavedSlot(
            name=saved.filename,
            namespace=namespace,
            tokens=tokens,
            n_prompt=n_prompt,
            n_saved=saved.n_tokens,
            n_bytes=saved.n_bytes,
            conversation=conversation,
            is_pinned=is_pinned,
            gap=gap,
            ends=ends,
            chain=tuple(self._chain(namespace, tokens)),
        )
        self.folder.look_for(saved.filename, saved.n_bytes)
        if is_superseding:
            self._drop_older_than(file)
        fits = self.make_room(file.n_bytes)
        self._files[file.name] = file
        self.n_bytes += file.n_bytes
        for link in file.chain:
            self._by_chain.setdefault(link, {})[file] = None
        self._by_namespace.setdefault(namespace, {})[file] = None
        if not fits:
            self._trust.refuse("file_over_budget")
            self.drop(file, "file_over_budget")
            return None
        self._trust.went_well("file_over_budget")
        return file

    def drop(self, file: SavedSlot, cause: str = "") -> None:
        """Remove a file from the records, and delete it if possible; remember the cause, if any."""
        if self._files.get(file.name) is not file:
            return
        if cause:
            self.removals.note(file.namespace, file.tokens, cause)
        self._unlist(file)
        self._remove(file.name, file.n_bytes)

    def clear(self, adapters: bytes | None = None, *, cause: str = "") -> None:
        """Drop all files, or those that were decoded with `adapters`."""
        for file in list(self):
            if adapters is None or adapters_of(file.namespace) == adapters:
                self.drop(file, cause)

    def pin(self, conversation: tuple[bytes, str], *, is_pinned: bool) -> None:
        """Keep a conversation's slot and files from eviction, or allow it again."""
        (self.pinned.add if is_pinned else self.pinned.discard)(conversation)
        for file in self:
            if (scope_of(file.namespace), file.conversation) == conversation:
                file.is_pinned = is_pinned

    def restrict(self, adapters: frozenset[bytes]) -> None:
        """Record that the server can use files with these adapters only as a whole."""
        for file in self:
            file.is_whole_only |= adapters_of(file.namespace) in adapters

    def abandon(self) -> None:
        """Remove all files from the records, but delete none: they belong to another process."""
        self._files.clear()
        self._by_chain.clear()
        self._by_namespace.clear()
        self.removals = SlotRemovals()
        self.stale.clear()
        self._left.clear()
        self._key = secrets.token_bytes(32)
        self.n_bytes = 0

    def drop_name(self, name: str, cause: str) -> None:
        """Drop the file `name`; if none is recorded, one may exist, for example half written."""
        file = self._files.get(name)
        if file is None:
            self._remove(name, 0)
        else:
            self.drop(file, cause)

    def note_stale(self, name: str) -> None:
        """Record that a file `name` may exist, for example half written."""
        if name not in self._files:
            self._remove(name, 0)

    def touch(self, file: SavedSlot) -> None:
        """Record that a file was used."""
        file.used_at = time.monotonic()
        file.n_uses += 1
        self.folder.touch(file.name)

    def take_stock(self) -> None:
        """Count the files of earlier clients in the folder; the budget evicts them first."""
        found = sorted(self._others(), key=lambda each: each[1].st_mtime)
        self._left = {name: stat.st_size for name, stat in found}
        self.make_room(0)

    def _sweep_when_due(self) -> None:
        if time.monotonic() - self._swept_at >= min(_SWEEP_EVERY_S, self._max_age_s / 4):
            self.sweep()

    def sweep(self) -> None:
        """Drop files that are too old, including those of other clients."""
        self._swept_at = time.monotonic()
        oldest = time.monotonic() - self._max_age_s
        for file in list(self):
            if file.used_at < oldest and file.n_readers == 0 and not file.is_pinned:
                self.n_evictions += 1
                self.drop(file, "max_age_s")
        oldest_time = time.time() - self._max_age_s
        for name, stat in self._others():
            if stat.st_mtime < oldest_time:
                self._unlink_left(name)

    def _others(self) -> list[tuple[str, os.stat_result]]:
        """Return the files of other clients in the folder."""
        found = self.folder.files()
        return [each for each in found if each[0] not in self._files and each[0] not in self.stale]

    def _unlink_left(self, name: str) -> None:
        self._left.pop(name, None)
        self.folder.delete(name)

    def _unlist(self, file: SavedSlot) -> None:
        del self._files[file.name]
        self.n_bytes -= file.n_bytes
        for link in file.chain:
            files = self._by_chain[link]
            del files[file]
            if not files:
                del self._by_chain[link]
        files = self._by_namespace[file.namespace]
        del files[file]
        if not files:
            del self._by_namespace[file.namespace]

    def _remove(self, name: str, n_bytes: int) -> None:
        if self.folder.is_reachable is False or not self.folder.delete(name):
            self.stale[name] = max(n_bytes, self.stale.get(name, 0))

    def _drop_older_than(self, newer: SavedSlot) -> None:
        """Drop the files that a newer file replaces.

        For an earlier turn of the same conversation only the prompt must agree: its answer may have
        been edited or sampled again.
        """
        ending = [
            file
            for n_links, link in enumerate(newer.chain, start=1)
            for file in self._by_chain.get(link, ())
            if file.n_prompt // self._step <= n_links <= len(file.chain)
        ]
        for file in dict.fromkeys(ending):
            is_same = file.conversation is not None and file.conversation == newer.conversation
            n_needed = file.n_prompt if is_same else len(file.tokens)
            is_kept = (
                file.n_readers > 0
                or file.name == newer.name
                or (file.is_pinned and not newer.is_pinned)
                or (newer.gap and not file.gap)
            )
            if not is_kept and n_common(file.tokens, newer.tokens) >= n_needed:
                self.drop(file)

    def _chain(self, namespace: bytes, tokens: TokenIds) -> list[bytes]:
        digest = hashlib.blake2b(namespace, key=self._key, digest_size=16)
        links = []
        view = memoryview(tokens).cast("B")
        n_bytes = self._step * memoryview(tokens).itemsize
        for stop in range(n_bytes, len(view) + 1, n_bytes):
            digest.update(view[stop - n_bytes : stop])
            links.append(digest.digest())
        return links
