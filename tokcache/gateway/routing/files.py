"""The saved slots: which prefix each file holds, which are evicted, and the list on disk.

A file belongs to one pool: the servers that share a slot folder, a model, a build and a context
size. It is found by the links of its chain, so a look-up costs the request's length, not the number
of files. The list holds digests and numbers only. It is written with each change, so that a restart
finds the files again.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokcache._disk_budget import DiskBudget
from tokcache._files import atomic_file
from tokcache.gateway.routing.chain import EMPTY, Chain
from tokcache.llama.server.removals import Removal, SlotRemovals

# A list of another format is counted as `list_of_other_format`, and its files are not found.
_FORMAT = 3
_USE_IS_WORTH_S = 600.0  # a file used again counts as used that much later, for each use
_MAX_USES = 8
_NAME_BYTES = 20
_MAX_COUNT = 1 << 62


@dataclass(eq=False, slots=True)
class SavedFile:
    """One file; `n_prompt` tokens of it are the chain's first `n_prompt_links`.

    `ids` is the chain of its prompt's token ids, empty where they are not known.
    """

    name: str
    pool: str
    chain: Chain
    n_prompt_links: int
    n_prompt: int
    n_tokens: int
    n_bytes: int
    used_at: float = field(default_factory=time.time)
    n_uses: int = 0
    n_readers: int = 0
    # A file of the warm folder: neither evicted nor replaced by a longer one.
    is_pinned: bool = False
    ids: Chain = EMPTY
    # The tenant; None also for files of an earlier process. It is not in the list on disk.
    scope: str | None = None

    def tokens_at(self, n_links: int) -> int:
        """Return about how many tokens the first `n_links` links take."""
        return tokens_at(self.chain, n_links, self.n_prompt_links, self.n_prompt)


def tokens_at(chain: Chain, n_links: int, n_prompt_links: int, n_prompt: int) -> int:
    """Return the tokens of a chain's first links: known at the prompt's end, else by characters."""
    n_links = min(n_links, n_prompt_links)
    if n_links == n_prompt_links:
        return n_prompt
    return n_prompt * chain.stop_at(n_links) // max(1, chain.stop_at(n_prompt_links))


class Files:
    """All saved slots within a budget of bytes.

    `folders` gives the folder of each pool whose files this process can delete. Evicted files of
    other pools can't be deleted; their names are used again for new files. `max_bytes` may be a
    share of the disk of `folder`.

    Threads: not safe; used from one event loop.
    """

    def __init__(self, max_bytes: int | str, folder: Path | None = None) -> None:
        self.refusals: Counter[str] = Counter()
        self._budget = DiskBudget(max_bytes, folder, self._disk_failed)
        # The public name of this gateway; its files in a shared folder have it in their names.
        self.owner = "none"
        self.n_bytes = 0
        self.n_evictions = 0
        self.folders: dict[str, Path] = {}
        # The probabilities of each pool's model after a fixed prompt, when its files were saved.
        self.probes: dict[str, dict[str, list[Any]]] = {}
        self.removals = SlotRemovals()
        self._files: dict[str, SavedFile] = {}
        self._by_link: dict[tuple[str, bytes], dict[SavedFile, None]] = {}
        self._stale: dict[str, list[str]] = {}

    def _disk_failed(self, _: OSError) -> None:
        self.refusals["disk_unreadable"] += 1

    @property
    def max_bytes(self) -> int:
        """The bytes that all files may take now."""
        return self._budget.n_bytes(self.n_bytes)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[SavedFile]:
        return iter(self._files.values())

    def __contains__(self, file: object) -> bool:
        return isinstance(file, SavedFile) and self._files.get(file.name) is file

    def find(self, pool: str, chain: Chain) -> tuple[SavedFile, int] | None:
        """Return the file of a pool that shares most links with a chain, and their number.

        Cost: O(log n) in the links, because a file that has a link has all links before it.
        """
        by_link, links = self._by_link, chain.links
        n_links = bisect_left(links, True, key=lambda link: (pool, link) not in by_link)
        if not n_links:
            return None
        held = by_link[pool, links[n_links - 1]]
        return max(held, key=lambda file: (-file.n_tokens, file.used_at)), n_links

    def covers(self, pool: str, chain: Chain) -> SavedFile | None:
        """Return a file that holds all links of a chain."""
        held = self._by_link.get((pool, chain.links[-1])) if len(chain) else None
        return next(iter(held)) if held else None

    def new_name(self, pool: str) -> str:
        """Return a name that nobody can guess, or that of an evicted file that is still there."""
        if self._stale.get(pool):
            return self._stale[pool].pop()
        return f"tokcache-{self.owner}-{secrets.token_hex(_NAME_BYTES)}.bin"

    def discard(self, pool: str, name: str) -> None:
        """Remove a file that is not listed, for example one that is half written."""
        if name in self._files:
            self.drop(self._files[name])
        else:
            self._delete(pool, name)

    def note_stale(self, pool: str, name: str) -> None:
        """Record that a file that is not listed may exist; the next save uses its name."""
        self._stale.setdefault(pool, []).append(name)

    def add(self, file: SavedFile) -> bool:
        """List a file and drop the shorter ones that it contains; False if over the budget."""
        for link in file.chain.links:
            for other in list(self._by_link.get((file.pool, link), ())):
                is_within = len(other.chain) <= len(file.chain) and other.chain.links[-1] == link
                is_free = not other.n_readers and not other.is_pinned
                if is_within and is_free and other.name != file.name:
                    self.drop(other)
        if file.name in self._files:
            self._unlist(self._files[file.name])
        if not self.make_room(file.n_bytes):
            self.refusals["file_over_budget"] += 1
            self.note_removal(file.scope, file.chain, "file_over_budget")
            self._delete(file.pool, file.name)
            return False
        self._list(file)
        return True

    def make_room(self, n_bytes: int) -> bool:
        """Evict the files that are worth least until `n_bytes` more fit."""
        max_bytes = self.max_bytes
        if n_bytes > max_bytes:
            return False
        for file in sorted(self._files.values(), key=_value):
            if self.n_bytes + n_bytes <= max_bytes:
                break
            if not file.n_readers and not file.is_pinned:
                self.n_evictions += 1
                self.drop(file, "max_bytes")
        return self.n_bytes + n_bytes <= max_bytes

    def note_removal(self, scope: str | None, chain: Chain, cause: str) -> None:
        """Remember that a tenant's prefix is gone, or could not be kept."""
        self.removals.note_places(repr(scope).encode(), _beginnings(chain), cause)

    def removal(self, scope: str | None, chain: Chain) -> Removal | None:
        """Return why a beginning of `chain` is gone, counted in links; None if none is."""
        return self.removals.find_places(repr(scope).encode(), _beginnings(chain))

    def has_forgotten(self, scope: str | None) -> bool:
        """Return whether some removals of a tenant are forgotten."""
        return self.removals.has_forgotten(repr(scope).encode())

    def touch(self, file: SavedFile) -> None:
        """Record that a file was used."""
        file.used_at = time.time()
        file.n_uses += 1

    def drop(self, file: SavedFile, cause: str = "") -> None:
        """Remove a file from the list and from its folder; remember the cause, if any."""
        if self._files.get(file.name) is file:
            if cause:
                self.note_removal(file.scope, file.chain, cause)
            self._unlist(file)
            self._delete(file.pool, file.name)

    def write_list(self, path: Path) -> None:
        """Write the list, so that a later process finds the files."""
        told = {
            "format": _FORMAT,
            "files": [_told(file) for file in self._files.values()],
            "stale": self._stale,
            "folders": {pool: str(folder) for pool, folder in self.folders.items()},
            "probes": self.probes,
        }
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(json.dumps(told).encode("ascii"))

    def pin_only(self, links: AbstractSet[bytes]) -> None:
        """End the pins of all files but those that have one of these links."""
        for file in self._files.values():
            file.is_pinned = file.is_pinned and not links.isdisjoint(file.chain.links)

    def read_list(self, path: Path, pinned: AbstractSet[bytes] = frozenset()) -> int:
        """List the files of an earlier process that are still there; return their number.

        A file stays pinned if it has one of the links in `pinned`.

        Files of a model that is not served now stay listed, for it may come back. A damaged list is
        counted and ignored: the files in it are then not found.
        """
        try:
            found = json.loads(path.read_bytes())
            if found["format"] != _FORMAT:
                self.refusals["list_of_other_format"] += 1
                return 0
            read = [_read(each) for each in found["files"]]
            stale = _read_stale(found["stale"])
            folders = {str(pool): Path(each) for pool, each in found["folders"].items()}
            probes = {str(pool): dict(each) for pool, each in found["probes"].items()}
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.refusals["list_damaged"] += 1
            return 0
        self.folders.update(folders)
        self.probes.update(probes)
        self._stale.update(stale)
        for file in sorted(read, key=lambda each: each.used_at):
            file.is_pinned = file.is_pinned and not pinned.isdisjoint(file.chain.links)
            if self.is_intact(file):
                self.add(file)
            else:
                self.refusals["file_gone"] += 1
        return len(self)

    def clear(self, pool: str) -> None:
        """Drop all files of a pool, because the model gives other probabilities."""
        for file in [each for each in self._files.values() if each.pool == pool]:
            self.drop(file, "files_of_another_model")

    def is_intact(self, file: SavedFile) -> bool:
        """Return whether a listed file still has its size; True if its folder can't be reached."""
        folder = self.folders.get(file.pool)
        if folder is None:
            return True
        try:
            return (folder / file.name).stat().st_size == file.n_bytes
        except OSError:
            return False

    def _list(self, file: SavedFile) -> None:
        self._files[file.name] = file
        self.n_bytes += file.n_bytes
        for link in file.chain.links:
            self._by_link.setdefault((file.pool, link), {})[file] = None

    def _unlist(self, file: SavedFile) -> None:
        del self._files[file.name]
        self.n_bytes -= file.n_bytes
        for link in file.chain.links:
            held = self._by_link[file.pool, link]
            del held[file]
            if not held:
                del self._by_link[file.pool, link]

    def _delete(self, pool: str, name: str) -> None:
        folder = self.folders.get(pool)
        if folder is not None:
            try:
                (folder / name).unlink(missing_ok=True)
            except OSError:
                self.refusals["file_not_deleted"] += 1
            else:
                return
        self.note_stale(pool, name)


def remove_strangers(folder: Path, files: Files) -> int:
    """Delete the files that this gateway wrote and no longer lists; return their number."""
    n_removed = 0
    listed = {file.name for file in files}
    for path in folder.glob(f"tokcache-{files.owner}-*.bin"):
        if path.name not in listed:
            with contextlib.suppress(OSError):  # another process deleted it first
                path.unlink()
                n_removed += 1
    return n_removed


def _beginnings(chain: Chain) -> list[tuple[int, bytes]]:
    """Return the first 1, 2, 4 … links of a chain and all of them, each as its last link."""
    lengths = [1 << n for n in range(len(chain).bit_length())] + [len(chain)]
    return [(n, chain.links[n - 1]) for n in lengths if 0 < n <= len(chain)]


def _value(file: SavedFile) -> float:
    return file.used_at + _USE_IS_WORTH_S * min(file.n_uses, _MAX_USES)


def _told(file: SavedFile) -> dict[str, Any]:
    told = asdict(file)
    told["links"] = [link.hex() for link in file.chain.links]
    told["stops"] = list(file.chain.stops)
    told["ids"] = [[link.hex(), n] for link, n in zip(file.ids.links, file.ids.stops, strict=True)]
    del told["chain"], told["n_readers"], told["scope"]
    return told


def _read(found: dict[str, Any]) -> SavedFile:
    """Return a file of the list on disk, which anything may have damaged.

    Errors: ValueError, KeyError, TypeError, AttributeError.
    """
    links = tuple(bytes.fromhex(each) for each in found["links"])
    stops = tuple(_count(each) for each in found["stops"])
    ids = tuple((bytes.fromhex(link), _count(n)) for link, n in found["ids"])
    name, pool, used_at = found["name"], found["pool"], found["used_at"]
    if not _is_name(name) or not isinstance(pool, str) or not isinstance(used_at, int | float):
        raise ValueError("name, pool or used_at")
    if not links or len(links) != len(stops) or not math.isfinite(used_at):
        raise ValueError("links or used_at")
    id_links, id_stops = zip(*ids, strict=True) if ids else ((), ())
    return SavedFile(
        name,
        pool,
        Chain(links, stops),
        n_prompt_links=_count(found["n_prompt_links"]),
        n_prompt=_count(found["n_prompt"]),
        n_tokens=_count(found["n_tokens"]),
        n_bytes=_count(found["n_bytes"]),
        used_at=float(used_at),
        n_uses=_count(found["n_uses"]),
        is_pinned=found["is_pinned"] is True,
        ids=Chain(id_links, id_stops),
    )


def _is_name(found: object) -> bool:
    """Return whether this is the name of a saved slot's file, as `new_name` makes them."""
    return isinstance(found, str) and found.startswith("tokcache-") and "/" not in found


def _count(found: object) -> int:
    if type(found) is not int or not 0 <= found < _MAX_COUNT:
        raise ValueError("a count is no number from 0 on")
    return found


def _read_stale(found: dict[str, list[str]]) -> dict[str, list[str]]:
    stale = {str(pool): [str(name) for name in names] for pool, names in found.items()}
    if not all(_is_name(name) for names in stale.values() for name in names):
        raise ValueError("a stale file has a name of another kind")
    return stale
