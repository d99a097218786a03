"""Warm start: the entries of a tokenizer's cache, dumped to a file and loaded by another process.

A file belongs to one tokenizer: `fingerprint` covers everything that decides ids. Loading has three
steps, and only the last one changes the cache:

1. The file is read to its end, and its checksum or MAC is compared.
2. A random sample of its entries is encoded again, and the ids are compared.
3. The entries are put into the cache, as if they had been used before all that it holds.

A checksum and a sample detect damage, not forgery: whoever can write the file can also write a
checksum. Where others can write it, dump and load with a `key`.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tokenizers

from tokcache._validate import require_scope
from tokcache.errors import (
    Damaged,
    InvalidCacheFile,
    InvalidConfig,
    InvalidScope,
    NothingCached,
    TokenizerChanged,
)
from tokcache.text import _implementation as implementation
from tokcache.text.cache_file.format import (
    MAX_SCOPE_BYTES,
    MAX_SCOPES,
    Entry,
    Header,
    Kind,
    Reader,
    bytes_to_ids,
    decoded,
    ids_to_bytes,
    read,
    write,
)
from tokcache.text.cuts.char_classes import BMP_CLASSES, N_CLASSES
from tokcache.text.engines.copying import (
    ENCODING_PARTS,
    HuggingFaceEngine,
    component_state,
    result_or_error,
    signature,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.config import CacheConfig
    from tokcache.text._implementation import TokenIds
    from tokcache.text.cuts.plan import CutPlan
    from tokcache.text.engines.copying import Engine
    from tokcache.text.segments.cache import L1

MIN_KEY_BYTES = 16
_N_VERIFIED = 16  # entries of each kind that are encoded again
_HELD_BYTES = 200  # memory of an entry besides its text and ids, until it is in the cache
_SEGMENT_SHARE = 4  # short segments get a quarter of L1's budget
_SEGMENT_TABLE_BYTES = 64  # memory of a short segment in its table
_MAX_ID = 1 << 24
_IDS_AT_ONCE = 1 << 18  # ids that are checked together

Scopes = Collection[str | None]
_Row = tuple[Any, ...]


class Core(Protocol):
    """The parts of CachedTokenizer that `dump` and `load` use."""

    @property
    def config(self) -> CacheConfig:
        """The settings of the cache."""

    def fresh(self) -> Any:
        """Return the current generation of caches."""

    def engine(self, generation: Any) -> Engine:
        """Return the engine of a generation."""


@dataclass(frozen=True, slots=True)
class CacheFileReport:
    """The entries that were written to a cache file or loaded from it.

    Units: `n_texts` counts whole texts, `n_chunks` and `n_segments` chunks and short segments;
           `n_bytes` is the size of the file. `left_out` counts the entries that were not written
           or not loaded, by reason. "scope": not asked for. "held": the cache has them already.
           "no_room": over the budget, or no place in the table of short segments; the entries used
           last go in first. "cuts": texts are cut differently here. "l1_off": chunks and segments
           are not cached here. "no_name": the name of their scope is not known, because nobody
           has used the scope lately. "scopes": over the number of scopes that a file can hold.
    """

    n_texts: int
    n_chunks: int
    n_segments: int
    n_bytes: int
    left_out: Mapping[str, int]


def dump(
    core: Core, path: str | os.PathLike[str], scopes: Scopes | None, key: bytes | None
) -> CacheFileReport:
    """Write the cached entries, of all scopes or some, to a file.

    Errors:  NothingCached; MissingFile; OSError. A file at `path` is then unchanged.
    Cost:    the fingerprint and the file; memory for a copy of all segments and of all texts that
             are not ASCII.
    Threads: safe; entries that other threads add meanwhile may be missing from the file.
    """
    wanted, key = _checked_scopes(scopes), _checked_key(key)
    tokenizer, generation = _current(core)
    l1 = generation.l1
    rows = _Rows()
    rows.texts = generation.l0.held()
    if l1 is not None and l1.off is None:
        rows.seed = l1.cache.cut_seed
        rows.chunks, rows.segments = l1.cache.held_chunks(), l1.cache.held_segments()
    entries = list(_named_entries(rows, l1, wanted))

    # The place of each scope in the file's list; the scopes over its limits are left out.
    names: dict[str, int] = {}
    n_left = MAX_SCOPE_BYTES
    for _, scope, *_ in entries:
        if scope is None or scope in names:
            continue
        n_bytes = len(scope.encode("utf-8", "surrogatepass"))
        if len(names) == MAX_SCOPES or n_bytes > n_left:
            rows.left_out["scopes"] += 1
            continue
        n_left -= n_bytes
        names[scope] = len(names) + 1

    kept = [one for one in entries if one[1] is None or one[1] in names]
    header = Header(fingerprint(tokenizer), _plan_digest(l1), rows.seed, len(kept))
    n_bytes = write(Path(path), header, names, _encoded(kept, names), key)
    return _report(Counter(kind for kind, *_ in kept), n_bytes, rows.left_out)


def load(
    core: Core, path: str | os.PathLike[str], scopes: Scopes | None, key: bytes | None
) -> CacheFileReport:
    """Put the entries of a file, of all scopes or some, into the cache, as its oldest entries.

    Errors:  InvalidCacheFile for a file that is damaged, of another tokenizer or not written with
             `key`, or that has a wrong entry; MissingFile; NothingCached; TokenizerChanged;
             OSError. In each case the cache is unchanged.
    Cost:    the fingerprint, one pass over the file, and the encoding of a few entries; memory for
             the entries that fit into the budget.
    Threads: safe.
    """
    wanted, key, file = _checked_scopes(scopes), _checked_key(key), Path(path)
    tokenizer, generation = _current(core)
    l1 = generation.l1 if generation.l1 is not None and generation.l1.off is None else None
    loading = _Loading(tokenizer, l1, core.config, wanted)
    rows = read(file, key, loading.read)
    _verify(file, tokenizer, l1, rows)
    if core.fresh() is not generation:
        raise TokenizerChanged(
            f"the tokenizer was changed while {file} was loaded; nothing was loaded: load a file "
            "that was dumped from the tokenizer as it is now"
        )
    filled = {Kind.TEXT: generation.l0.fill(rows.texts)}
    if l1 is not None:
        if not l1.cache.cuts_fine:
            rows.left_out["l1_off"] += len(rows.segments)
            rows.segments = []
        # The cut seed decides where chunks begin, so chunks are useful only under their own seed.
        # A cache that holds fewer chunks than the file takes over the file's seed.
        own, n_chunks = l1.cache.cut_seed, l1.cache.stats().n_chunks
        if own != rows.seed:
            if len(own) != len(rows.seed) or n_chunks >= len(rows.chunks):
                rows.left_out["cuts"] += len(rows.chunks)
                rows.chunks = []
            else:
                l1.cache.cut_seed = rows.seed
        # First short segments: their table may double, and chunks get the rest.
        filled[Kind.SEGMENT] = l1.cache.fill_segments(rows.segments)
        filled[Kind.CHUNK] = l1.cache.fill_chunks(rows.chunks)
    n_there = sum(there for _, there in filled.values())
    counts = Counter({kind: n for kind, (n, _) in filled.items()})
    rows.left_out["held"] += n_there
    rows.left_out["no_room"] += rows.n_rows() - counts.total() - n_there
    return _report(counts, rows.n_bytes, rows.left_out)


def fingerprint(tokenizer: Tokenizer) -> bytes:
    """Return a digest of everything that decides the ids of a text, except truncation and padding.

    Cost: the serialisation of the model; a fifth of a second for a vocabulary of 150,000.
    """
    added = tokenizer.get_added_tokens_decoder()
    pieces = [
        tokenizers.__version__.encode(),
        ascii(signature(tokenizer, "model")).encode(),
        component_state(tokenizer.model),
        *(component_state(getattr(tokenizer, part)) for part in ENCODING_PARTS),
        *(ascii((index, added[index].__getstate__())).encode() for index in sorted(added)),
        ascii(tokenizer.encode_special_tokens).encode(),
    ]
    return _digest(pieces)


# ---- dump and load


@dataclass(slots=True)
class _Rows:
    """Entries in the form of the caches, and the number of those left out, by reason."""

    texts: list[_Row] = field(default_factory=list)
    chunks: list[_Row] = field(default_factory=list)
    segments: list[_Row] = field(default_factory=list)
    seed: bytes = b""
    n_bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def n_rows(self) -> int:
        return len(self.texts) + len(self.chunks) + len(self.segments)


def _current(core: Core) -> tuple[Tokenizer, Any]:
    """Return the private copy of the tokenizer, and the generation that it answers for."""
    generation = core.fresh()
    engine = core.engine(generation)
    if not isinstance(engine, HuggingFaceEngine):
        raise NothingCached(
            f"this tokenizer's answers are never cached ({engine.reason}), so there are none to "
            "dump or load"
        )
    return engine.tokenizer, generation


def _checked_scopes(scopes: Scopes | None) -> Scopes | None:
    if scopes is None:
        return None
    if isinstance(scopes, str | bytes) or not isinstance(scopes, Collection):
        raise InvalidScope(f"scopes must be a list of str and None, or None, not {scopes!r}")
    return frozenset(require_scope(one) for one in scopes)


def _checked_key(key: bytes | None) -> bytes | None:
    if key is not None and (not isinstance(key, bytes) or len(key) < MIN_KEY_BYTES):
        raise InvalidConfig(
            f"key must be None or at least {MIN_KEY_BYTES} bytes; secrets.token_bytes(32) makes one"
        )
    return key


def _digest(pieces: Iterable[bytes]) -> bytes:
    digest = sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.digest()


def _plan_digest(l1: L1 | None) -> bytes:
    """Return a digest of the cut plan, because another version of tokcache may cut differently."""
    if l1 is None:
        return bytes(32)
    plan: CutPlan = l1.plan
    return _digest(
        [
            plan.coarse,
            plan.fine,
            BMP_CLASSES,
            ascii((plan.separators, plan.variants, plan.variant_of, plan.affixes)).encode(),
        ]
    )


def _report(counts: Counter[Any], n_bytes: int, left_out: Counter[str]) -> CacheFileReport:
    n_texts, n_chunks, n_segments = (counts[kind] for kind in Kind)
    return CacheFileReport(n_texts, n_chunks, n_segments, n_bytes, dict(+left_out))


# ---- dump

_Named = tuple[Kind, str | None, str, Any, bool, int, int]


def _named_entries(rows: _Rows, l1: L1 | None, wanted: Scopes | None) -> Iterator[_Named]:
    """Yield the entries of wanted scopes, in the order of the file."""
    in_l0 = {scope for *_, scope in rows.texts if scope is not None}
    names: Mapping[int, Any] = {} if l1 is None else l1.scopes(in_l0)
    found: Iterable[Any] = chain(
        ((Kind.TEXT, scope, text, ids, special, 0, 0) for text, special, ids, scope in rows.texts),
        (
            (Kind.CHUNK, names.get(tag, ...), text, ids, is_tail, variant, end_class)
            for text, ids, tag, variant, end_class, is_tail in rows.chunks
        ),
        (
            (Kind.SEGMENT, names.get(tag, ...), text, ids, False, variant, 0)
            for text, ids, tag, variant in rows.segments
        ),
    )
    for one in found:
        if one[1] is ...:
            rows.left_out["no_name"] += 1
        elif wanted is not None and one[1] not in wanted:
            rows.left_out["scope"] += 1
        else:
            yield one


def _encoded(
    entries: list[_Named], names: Mapping[str, int]
) -> Iterator[tuple[Entry, bytes, bytes]]:
    for kind, scope, text, ids, flag, variant, end_class in entries:
        raw = text.encode("utf-8", "surrogatepass")
        number = 0 if scope is None else names[scope]
        one = Entry(kind, number, flag, variant, end_class, len(raw), len(ids))
        yield one, raw, ids_to_bytes(ids)


# ---- load


class _Loading:
    """Reads a file and keeps the entries that are wanted, valid and within the budget."""

    def __init__(
        self, tokenizer: Tokenizer, l1: L1 | None, config: CacheConfig, wanted: Scopes | None
    ) -> None:
        self._tokenizer = tokenizer
        self._l1 = l1
        self._wanted = wanted
        self._rows = _Rows()
        self._ids = _Ids(tokenizer)
        self._n_left = {
            Kind.TEXT: config.l0_max_bytes,
            Kind.CHUNK: config.l1_max_bytes,
            Kind.SEGMENT: config.l1_max_bytes // _SEGMENT_SHARE,
        }
        self._n_texts_left = config.l0_max_entries

    def read(self, reader: Reader) -> _Rows:
        """Return the rows of a file, after every byte of it was checked.

        Errors: Damaged.
        """
        rows, header = self._rows, reader.header()
        if header.fingerprint != fingerprint(self._tokenizer):
            raise Damaged(
                "was written by another tokenizer, by one with other settings, or with another "
                "version of tokenizers"
            )
        rows.n_bytes, rows.seed = reader.n_bytes, header.cut_seed
        why_no_parts = None  # why neither chunks nor short segments can be loaded
        if self._l1 is None:
            why_no_parts = "l1_off"
        elif header.plan != _plan_digest(self._l1):
            why_no_parts = "cuts"
        scopes: list[str | None] = [None, *reader.scopes()]
        for one in reader.entries():
            scope = scopes[one.scope]
            why_not = (why_no_parts if one.kind else None) or self._why_not(one, scope)
            if why_not is None:
                self._keep(one, scope, reader)
            else:
                rows.left_out[why_not] += 1
        self._ids.check()
        reader.finish()
        return rows

    def _why_not(self, one: Entry, scope: str | None) -> str | None:
        """Return why an entry is left out; None if it is kept, and its room is then taken."""
        if self._wanted is not None and scope not in self._wanted:
            return "scope"
        is_text, n_bytes = one.kind is Kind.TEXT, one.n_content + _HELD_BYTES
        if one.kind is Kind.SEGMENT:
            n_bytes = max(one.n_content, _SEGMENT_TABLE_BYTES)
        if n_bytes > self._n_left[one.kind] or (is_text and self._n_texts_left == 0):
            return "no_room"
        self._n_left[one.kind] -= n_bytes
        self._n_texts_left -= is_text
        return None

    def _keep(self, one: Entry, scope: str | None, reader: Reader) -> None:
        raw, raw_ids = reader.take(one.n_bytes), reader.take(4 * one.n_ids)
        ids = implementation.TokenIds(bytes_to_ids(raw_ids))
        self._ids.see(raw_ids)
        if one.kind is Kind.TEXT:
            self._rows.texts.append((decoded(raw), one.flag, ids, scope))
            return
        assert self._l1 is not None  # noqa: S101 (else only whole texts are kept)
        text = decoded(raw, "strict")  # no segment has a lone surrogate
        if one.variant >= len(self._l1.plan.variants) or one.end_class >= N_CLASSES or not text:
            raise Damaged("has a segment into which no text is cut")
        row = (text, ids, self._l1.tag(scope), one.variant)
        if one.kind is Kind.CHUNK:
            self._rows.chunks.append((*row, one.end_class, one.flag))
        else:
            self._rows.segments.append(row)


class _Ids:
    """Collects the ids of a file and checks that each of them is one of the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import numpy as np  # noqa: PLC0415 (half of the time that importing tokcache takes)

        self._np = np
        self._tokenizer = tokenizer
        self._seen = np.zeros(_MAX_ID, np.bool_)
        self._pending: list[bytes] = []
        self._n_pending = 0

    def see(self, raw: bytes) -> None:
        """Note the ids of one entry, in the form of the file."""
        self._pending.append(raw)
        self._n_pending += len(raw) // 4
        if self._n_pending >= _IDS_AT_ONCE:
            self._look()

    def _look(self) -> None:
        ids = self._np.frombuffer(b"".join(self._pending), "<u4")
        self._pending, self._n_pending = [], 0
        if len(ids) and int(ids.max()) >= _MAX_ID:
            raise Damaged(f"has the token id {int(ids.max()):,}, which the tokenizer doesn't have")
        self._seen[ids] = True

    def check(self) -> None:
        """Look up every id that was seen.

        Errors: Damaged if the tokenizer doesn't have one of them.
        """
        self._look()
        around = self._tokenizer.encode("", add_special_tokens=True).ids
        for index in self._np.flatnonzero(self._seen).tolist():
            if self._tokenizer.id_to_token(index) is None and index not in around:
                raise Damaged(f"has the token id {index:,}, which the tokenizer doesn't have")


def _verify(file: Path, tokenizer: Tokenizer, l1: L1 | None, rows: _Rows) -> None:
    """Encode a random sample of each kind of entry again.

    Errors: InvalidCacheFile if an entry has other ids.
    """

    def encode_text(text: str, special: bool) -> list[int]:
        # A batch would start threads, after which the children of a fork encode without threads.
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    samples: list[tuple[str, TokenIds, Callable[..., list[int] | None], Any]] = [
        ("text", ids, encode_text, (text, special)) for text, special, ids, _ in _sample(rows.texts)
    ]
    if l1 is not None:
        samples += [
            ("segment", ids, l1.encode_chunk, (text, variant))
            for text, ids, _, variant, *_ in [*_sample(rows.chunks), *_sample(rows.segments)]
        ]
    for kind, ids, encode, args in samples:
        right = result_or_error(encode, *args)
        if right is not None and right != ids.tolist():  # None: it can't be encoded by itself
            raise InvalidCacheFile(
                f"{file} has other ids for a {kind} than the tokenizer gives; nothing was loaded: "
                "dump a new file with cache_dump"
            )


def _sample(rows: list[_Row]) -> list[_Row]:
    return random.SystemRandom().sample(rows, min(_N_VERIFIED, len(rows)))
