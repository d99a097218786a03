"""Warm start: what the cache of a tokenizer holds, dumped to a file and loaded by another process.

A file is of one tokenizer: `fingerprint` is over all that decides ids. It is loaded in three
steps, and only the last one changes anything: it is read to its end and its checksum compared; a
random sample of its entries is encoded anew; then the entries are put behind what the cache holds.

Ids are believed as far as the checksum and the sample show. Who can write the file can write a
checksum, too: where that may be others, dump and load with a `key`.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tokenizers

from tokcache._validate import require_scope
from tokcache.errors import (
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
    Damaged,
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
from tokcache.text.engines.copying import (
    ENCODING_PARTS,
    HuggingFaceEngine,
    component_state,
    is_of_library,
    signature,
)
from tokcache.text.segments.char_classes import BMP_CLASSES, N_CLASSES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.config import CacheConfig
    from tokcache.text._implementation import TokenIds
    from tokcache.text.engines.copying import Engine
    from tokcache.text.segments.cache import L1
    from tokcache.text.segments.cuts.plan import CutPlan

MIN_KEY_BYTES = 16
_N_VERIFIED = 16  # entries of each kind that are encoded anew
_HELD_BYTES = 200  # of an entry read, beside its text and ids, until it is in the cache
_SHORT_SHARE = 4  # of L1's budget, one part in so many is for short segments
_SHORT_TABLE_BYTES = 64  # of a short segment in its table
_MAX_ID = 1 << 24
_IDS_AT_ONCE = 1 << 18  # ids that are looked at together

Scopes = Collection[str | None]
_Row = tuple[Any, ...]


class Core(Protocol):
    """The core of a tokenizer, as far as a file is written from it and loaded into it."""

    @property
    def config(self) -> CacheConfig:
        """The settings of the cache."""

    def fresh(self) -> Any:
        """Return the generation of caches that holds now."""

    def engine(self, generation: Any) -> Engine:
        """Return the engine of a generation."""


@dataclass(frozen=True, slots=True)
class CacheFileReport:
    """What a cache file got or gave.

    Units: `n_texts` whole texts, `n_chunks` and `n_shorts` parts of texts, `n_bytes` the size of
    the file; `left_out` entries that were not written or not loaded, by reason: "scope" (not
    asked for), "held" (the cache has them), "no_room" (in the budget, or in a short segment's
    part of its table; what was used last goes in first), "cuts" (texts are cut otherwise here),
    "l1_off" (no such parts are kept here), "no_name" (of a scope that was not asked for lately,
    so that its name is not known), "scopes" (of more scopes than a file takes).
    """

    n_texts: int
    n_chunks: int
    n_shorts: int
    n_bytes: int
    left_out: Mapping[str, int]


def dump(
    core: Core, path: str | os.PathLike[str], scopes: Scopes | None, key: bytes | None
) -> CacheFileReport:
    """Write what the cache holds, of all scopes or some, to a file.

    Errors:  NothingCached; MissingFile; OSError. Then what was at `path` before still is.
    Cost:    fingerprint and file; memory for a copy of all parts and of texts that are not ASCII.
    Threads: safe; what others add meanwhile may or may not be in it.
    """
    wanted, key = _checked_scopes(scopes), _checked_key(key)
    tokenizer, generation = _current(core)
    l1 = generation.l1
    rows = _Rows()
    rows.texts = generation.l0.held()
    if l1 is not None and l1.off is None:
        rows.seed = l1.cache.cut_seed
        rows.chunks, rows.shorts = l1.cache.held_chunks(), l1.cache.held_segments()
    entries = list(_named_entries(rows, l1, wanted))
    names = _numbered(entries, rows.left_out)
    kept = [one for one in entries if one[1] is None or one[1] in names]
    header = Header(fingerprint(tokenizer), _plan_digest(l1), rows.seed, len(kept))
    n_bytes = write(Path(path), header, names, _encoded(kept, names), key)
    return _report(Counter(kind for kind, *_ in kept), n_bytes, rows.left_out)


def load(
    core: Core, path: str | os.PathLike[str], scopes: Scopes | None, key: bytes | None
) -> CacheFileReport:
    """Put what a file holds, of all scopes or some, behind what the cache holds.

    Errors:  InvalidCacheFile for one that is damaged, of another tokenizer or not written with
             `key`, or of which an entry is wrong; MissingFile; NothingCached; TokenizerChanged;
             OSError. Then nothing has changed.
    Cost:    fingerprint, one pass over the file, and the encoding of a few entries; memory for
             what fits into the budget.
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
            f"the tokenizer was changed while {file} was loaded; nothing of it is used, load a "
            "file of the tokenizer as it is now"
        )
    filled = {Kind.TEXT: generation.l0.fill(rows.texts)}
    if l1 is not None:
        filled |= _fill_parts(l1, rows)
    n_there = sum(there for _, there in filled.values())
    counts = Counter({kind: n for kind, (n, _) in filled.items()})
    rows.left_out["held"] += n_there
    rows.left_out["no_room"] += rows.n_rows() - counts.total() - n_there
    return _report(counts, rows.n_bytes, rows.left_out)


def fingerprint(tokenizer: Tokenizer) -> bytes:
    """Return a digest of all that decides the ids of a text, truncation and padding apart.

    Cost: the serialisation of the model; for a vocabulary of 150,000 a fifth of a second.
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


# ---- both ways


@dataclass(slots=True)
class _Rows:
    """Entries as the caches hold them, and how many were left out on the way, by reason."""

    texts: list[_Row] = field(default_factory=list)
    chunks: list[_Row] = field(default_factory=list)
    shorts: list[_Row] = field(default_factory=list)
    seed: bytes = b""
    n_bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def n_rows(self) -> int:
        return len(self.texts) + len(self.chunks) + len(self.shorts)


def _current(core: Core) -> tuple[Tokenizer, Any]:
    """Return the private copy of the tokenizer, and the generation that it answers for."""
    generation = core.fresh()
    engine = core.engine(generation)
    if not isinstance(engine, HuggingFaceEngine):
        raise NothingCached(
            f"answers of this tokenizer are not kept ({engine.reason}), there are none to dump "
            "or load"
        )
    return engine.tokenizer, generation


def _checked_scopes(scopes: Scopes | None) -> Scopes | None:
    if scopes is None:
        return None
    if isinstance(scopes, str | bytes) or not isinstance(scopes, Collection):
        raise InvalidScope(f"scopes must be a list of scopes or None, not {scopes!r}")
    return frozenset(require_scope(one) for one in scopes)


def _checked_key(key: bytes | None) -> bytes | None:
    if key is not None and (not isinstance(key, bytes) or len(key) < MIN_KEY_BYTES):
        raise InvalidConfig(
            f"key must be None or at least {MIN_KEY_BYTES} bytes, e.g. of secrets.token_bytes"
        )
    return key


def _digest(pieces: Iterable[bytes]) -> bytes:
    digest = sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.digest()


def _plan_digest(l1: L1 | None) -> bytes:
    """Return a digest of where and how texts are cut, which another tokcache may do otherwise."""
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
    n_texts, n_chunks, n_shorts = (counts[kind] for kind in Kind)
    return CacheFileReport(n_texts, n_chunks, n_shorts, n_bytes, dict(+left_out))


# ---- dump

_Named = tuple[Kind, str | None, str, Any, bool, int, int]


def _named_entries(rows: _Rows, l1: L1 | None, wanted: Scopes | None) -> Iterator[_Named]:
    """Yield the entries of wanted scopes, in the order of the file."""
    in_l0 = {scope for *_, scope in rows.texts if scope is not None}
    names = {} if l1 is None else l1.scopes(in_l0)
    for one in _all_entries(rows, names):
        if one[1] is ...:
            rows.left_out["no_name"] += 1
        elif wanted is not None and one[1] not in wanted:
            rows.left_out["scope"] += 1
        else:
            yield one


def _all_entries(rows: _Rows, names: Mapping[int, str | None]) -> Iterator[Any]:
    for text, special, ids, scope in rows.texts:
        yield Kind.TEXT, scope, text, ids, special, 0, 0
    for text, ids, tag, variant, end_class, is_tail in rows.chunks:
        yield Kind.CHUNK, names.get(tag, ...), text, ids, is_tail, variant, end_class
    for text, ids, tag, variant in rows.shorts:
        yield Kind.SHORT, names.get(tag, ...), text, ids, False, variant, 0


def _numbered(entries: list[_Named], left_out: Counter[str]) -> dict[str, int]:
    """Return the place of each scope in the file; what is beyond its limits is left out."""
    names: dict[str, int] = {}
    n_left = MAX_SCOPE_BYTES
    for _, scope, *_ in entries:
        if scope is None or scope in names:
            continue
        n_bytes = len(scope.encode("utf-8", "surrogatepass"))
        if len(names) == MAX_SCOPES or n_bytes > n_left:
            left_out["scopes"] += 1
            continue
        n_left -= n_bytes
        names[scope] = len(names) + 1
    return names


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
    """Reads a file and keeps of it what is wanted, valid and not beyond the budget."""

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
            Kind.SHORT: config.l1_max_bytes // _SHORT_SHARE,
        }
        self._n_texts_left = config.l0_max_entries

    def read(self, reader: Reader) -> _Rows:
        """Return the rows of a file, of which every byte was looked at."""
        rows, header = self._rows, reader.header()
        if header.fingerprint != fingerprint(self._tokenizer):
            raise Damaged(
                "was written by another tokenizer, by one with other settings, or with another "
                "version of tokenizers"
            )
        rows.n_bytes, rows.seed = reader.n_bytes, header.cut_seed
        why_no_parts = self._why_no_parts(header)
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

    def _why_no_parts(self, header: Header) -> str | None:
        if self._l1 is None:
            return "l1_off"
        return None if header.plan == _plan_digest(self._l1) else "cuts"

    def _why_not(self, one: Entry, scope: str | None) -> str | None:
        if self._wanted is not None and scope not in self._wanted:
            return "scope"
        is_text, n_bytes = one.kind is Kind.TEXT, one.n_content + _HELD_BYTES
        if one.kind is Kind.SHORT:
            n_bytes = max(one.n_content, _SHORT_TABLE_BYTES)
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
        assert self._l1 is not None  # noqa: S101 (else no part is kept)
        text = decoded(raw, "strict")  # a part has no half of a surrogate pair
        if one.variant >= len(self._l1.plan.variants) or one.end_class >= N_CLASSES or not text:
            raise Damaged("has a part that no text is cut into")
        row = (text, ids, self._l1.tag(scope), one.variant)
        if one.kind is Kind.CHUNK:
            self._rows.chunks.append((*row, one.end_class, one.flag))
        else:
            self._rows.shorts.append(row)


class _Ids:
    """Sees to it that every id is one of the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import numpy as np  # noqa: PLC0415 (half of the time that importing tokcache takes)

        self._np = np
        self._tokenizer = tokenizer
        self._seen = np.zeros(_MAX_ID, np.bool_)
        self._pending: list[bytes] = []
        self._n_pending = 0

    def see(self, raw: bytes) -> None:
        """Take note of the ids of one entry, as a file has them."""
        self._pending.append(raw)
        self._n_pending += len(raw) // 4
        if self._n_pending >= _IDS_AT_ONCE:
            self._look()

    def _look(self) -> None:
        ids = self._np.frombuffer(b"".join(self._pending), "<u4")
        self._pending, self._n_pending = [], 0
        if len(ids) and int(ids.max()) >= _MAX_ID:
            raise Damaged(f"has the token id {int(ids.max()):,}, which the tokenizer has not")
        self._seen[ids] = True

    def check(self) -> None:
        """Look up every id that was seen; Damaged if the tokenizer has it not."""
        self._look()
        around = self._tokenizer.encode("", add_special_tokens=True).ids
        for index in self._np.flatnonzero(self._seen).tolist():
            if self._tokenizer.id_to_token(index) is None and index not in around:
                raise Damaged(f"has the token id {index:,}, which the tokenizer has not")


def _fill_parts(l1: L1, rows: _Rows) -> dict[Kind, tuple[int, int]]:
    """Put parts into L1; chunks are of use only where texts are cut with the same secret."""
    parts = l1.cache
    if not parts.cuts_fine:
        rows.left_out["l1_off"] += len(rows.shorts)
        rows.shorts = []
    is_same = parts.cut_seed == rows.seed
    if not is_same and (
        len(parts.cut_seed) != len(rows.seed) or parts.stats().n_chunks >= len(rows.chunks)
    ):
        rows.left_out["cuts"] += len(rows.chunks)
        rows.chunks = []
    elif not is_same:
        parts.cut_seed = rows.seed
    shorts = parts.fill_segments(rows.shorts)  # first: their table doubles, chunks take the rest
    return {Kind.CHUNK: parts.fill_chunks(rows.chunks), Kind.SHORT: shorts}


def _verify(file: Path, tokenizer: Tokenizer, l1: L1 | None, rows: _Rows) -> None:
    """Encode a random sample of all kinds anew; InvalidCacheFile if one has other ids."""
    for text, special, ids, _ in _sample(rows.texts):
        _compare(file, "text", ids, _made_anew(_encode, tokenizer, text, special))
    if l1 is not None:
        for text, ids, _, variant, *_ in [*_sample(rows.chunks), *_sample(rows.shorts)]:
            _compare(file, "part of texts", ids, _made_anew(l1.encode_chunk, text, variant))


def _sample(rows: list[_Row]) -> list[_Row]:
    return random.SystemRandom().sample(rows, min(_N_VERIFIED, len(rows)))


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    # `encode`, not a batch: after a batch, forked children stay serial.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    return ids


def _made_anew(encode: Callable[..., list[int] | None], *args: Any) -> list[int] | str | None:
    try:
        return encode(*args)
    except BaseException as error:  # a tokenizer without unk raises bare Exception
        if not is_of_library(error):
            raise
        return f"an error: {error}"


def _compare(file: Path, what: str, ids: TokenIds, right: list[int] | str | None) -> None:
    if right is not None and right != ids.tolist():  # None: it can't be judged by itself
        raise InvalidCacheFile(
            f"{file} has other ids for a {what} than the tokenizer gives; nothing of it was "
            "loaded, cache_dump writes a new one"
        )
